// SPDX-License-Identifier: MIT
#pragma once

// What the kit asks of a secondary MMU in order to test it: an adapter of a few functions around the driver.
//
// The kit is the primary. It gives the adapter a test_primary to fault pages in from, and a space to register with, and
// plays the accesses of the device.
//
//   struct my_adapter {
//     using client_type = my_driver;              // the type with the hooks: tells the kit which of them to test
//     static constexpr bool precise = true;       // claims: a bracket disturbs no page outside of it
//     errc attach(test_space&);                   // registers the driver; it may map from then on
//     errc detach(test_space&);                   // unregisters it
//     access_result access(std::uintptr_t at, bool write, std::uint64_t value);
//     bool mapped(std::uintptr_t at);
//   };
//
// access   One attempt of the device to load, or store, the 8-byte word at the address: through the mapping if there is
//          one, else after one attempt to fault the page in. It must not loop: errc::again is an answer (a bracket came
//          in between). What the device sees is read while no bracket can get past its start, as a flush would wait for
//          a device that is in the middle of it.
// mapped   Whether the device could use the address now, without a fault. Must not change anything.
// Both are called by several threads at once, and outside of all locks.
//
// Optional:
//   const void* owner()     what it names as owner of its own migrations and exclusive accesses, if it ignores those
//   auto hold()             a guard; while it lives, a start has to wait or, if the bracket is not blockable, to refuse
//
// The factory makes one for each scenario: factory(test_primary&) returns a pointer of any kind to the adapter. Its
// pages are window(); all of them are to be mapped on demand.

#include <concepts>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/interval/interval_invalidation.hpp>
#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/notifier/hooks.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing {

/// The space of the kit's primaries: brackets need no lock there, so that a scenario can do anything inside one.
using test_space = address_space<arming::tracked>;

/// The pages that the kit maps, takes away and touches.
inline constexpr std::uint64_t window_pages = 32;
inline constexpr range window{std::uintptr_t{0x4000'0000}, std::uintptr_t{0x4000'0000} + window_pages* page_size};

/// The bytes of pages [first, first + n) of the window.
constexpr range pages_at(std::uint64_t first, std::uint64_t n = 1) noexcept {
  return {window.first + first * page_size, window.first + (first + n) * page_size};
}

/// Where an adapter gets its pages from: a frame_provider whose type is the same for every primary of the kit.
/// pin() may be a point (schedule.hpp), so the adapter's own lock must not be held; it is not for hooks (L7, reported).
class test_primary {
 public:
  virtual frame_lease pin(hva a, bool write) noexcept = 0;
  virtual void unpin(pfn f) noexcept = 0;
  virtual std::byte* data(pfn f) noexcept = 0;

 protected:
  ~test_primary() = default;
};
static_assert(frame_provider<test_primary>);

/// What the device got. `value` is what a load saw; after an error it means nothing.
struct access_result {
  errc error = errc::again;
  std::uint64_t value = 0;
};

template <class A>
concept conformance_adapter = requires(A& a, test_space& space, std::uintptr_t at, bool write, std::uint64_t value) {
  typename A::client_type;
  { a.attach(space) } -> std::same_as<errc>;
  { a.detach(space) } -> std::same_as<errc>;
  { a.access(at, write, value) } -> std::same_as<access_result>;
  { a.mapped(at) } -> std::same_as<bool>;
} && secondary_mmu<typename A::client_type, std::uintptr_t, interval_invalidation>;  // of either kind

/// Claims that its brackets disturb no other page: neither their mappings nor their faults.
template <class A>
concept claims_precision = requires {
  { A::precise } -> std::convertible_to<bool>;
} && static_cast<bool>(A::precise);

template <class A>
concept has_owner_name = requires(A& a) {
  { a.owner() } -> std::convertible_to<const void*>;
};
template <class A>
concept can_be_held = requires(A& a) { a.hold(); };

}  // namespace testing
MMUNOTIFY_END_NAMESPACE
