// SPDX-License-Identifier: MIT
#pragma once

// What the kit asks of a driver whose mirrors are intervals (interval/interval_notifier.hpp): an adapter around one of
// them. adapter.hpp says what is common to all adapters; here attach() gets the range.
//
//   struct my_adapter {
//     using client_type = my_mirror;              // the type with the hooks
//     static constexpr bool precise = true;       // claims: a bracket takes no mapping away outside of its range
//     errc attach(test_space&, range);            // inserts the interval; it may map from then on
//     errc detach(test_space&);                   // removes it, with remove(), and drops all mappings
//     access_result access(std::uintptr_t at, bool write, std::uint64_t value);
//     bool mapped(std::uintptr_t at);
//   };
//
// access   Has to make one attempt with read_begin and read_retry, as in production, and answers errc::again if that
//          retries. In scenarios its thread often plays the primary, too, and has a bracket open: there read_begin does
//          not wait, which would be for ever, but returns at once what always fails; the kit does not take that for a
//          contract failure. An address outside of the interval is an error, and is not mapped.
// attach   May be given any whole pages of the window, also while brackets are open.
//
// Optional, for what the driver does of it:
//   errc resize(test_space&, range)                       the interval covers the range from then on; what it covers no
//                                                         longer is not mapped any more
//   errc split(test_space&, std::uintptr_t at, A& upper)  another adapter, detached before, has what is not below `at`
//   errc detach_later(test_space&); bool attached()       removes it with remove_async(); true until it is free
//   access_result access_in_turn(at, write, value)        the attempt of a fault that has collided often, with
//                                                         take_turn(): the first one must succeed
//   owner(), hold()                                       as in adapter.hpp

#include <concepts>
#include <cstdint>
#include <utility>

#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/interval/interval_notifier.hpp>
#include <mmunotify/testing/adapter.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing {

template <class A>
concept interval_conformance_adapter =
    requires(A& a, test_space& space, range r, std::uintptr_t at, bool write, std::uint64_t value) {
      typename A::client_type;
      { a.attach(space, r) } -> std::same_as<errc>;
      { a.detach(space) } -> std::same_as<errc>;
      { a.access(at, write, value) } -> std::same_as<access_result>;
      { a.mapped(at) } -> std::same_as<bool>;
    } && secondary_mmu<typename A::client_type, std::uintptr_t, interval_invalidation>;

template <class A>
concept can_resize = requires(A& a, test_space& space, range r) {
  { a.resize(space, r) } -> std::same_as<errc>;
};
template <class A>
concept can_split = requires(A& a, test_space& space, std::uintptr_t at) {
  { a.split(space, at, a) } -> std::same_as<errc>;
};
template <class A>
concept can_detach_later = requires(A& a, test_space& space) {
  { a.detach_later(space) } -> std::same_as<errc>;
  { a.attached() } -> std::same_as<bool>;
};
template <class A>
concept can_take_turns = requires(A& a, std::uintptr_t at, bool write, std::uint64_t value) {
  { a.access_in_turn(at, write, value) } -> std::same_as<access_result>;
};

namespace detail {

/// An interval adapter as the other scenarios know adapters, and the pointer to it: its interval is at `where`.
template <class Pointer>
class placed {
 public:
  using interval_adapter = std::remove_cvref_t<decltype(*std::declval<Pointer&>())>;
  using client_type = typename interval_adapter::client_type;
  static constexpr bool precise = false;  // one interval: a bracket over it makes all its faults wait

  explicit placed(Pointer a) noexcept : adapter_(std::move(a)) {}
  placed& operator*() noexcept { return *this; }
  placed* operator->() noexcept { return this; }

  errc attach(test_space& space) noexcept { return adapter().attach(space, where); }
  errc detach(test_space& space) noexcept { return adapter().detach(space); }
  access_result access(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    return adapter().access(at, write, value);
  }
  bool mapped(std::uintptr_t at) noexcept { return adapter().mapped(at); }
  const void* owner() noexcept
    requires has_owner_name<interval_adapter>
  {
    return adapter().owner();
  }
  auto hold() noexcept
    requires can_be_held<interval_adapter>
  {
    return adapter().hold();
  }

  interval_adapter& adapter() noexcept { return *adapter_; }

  range where = window;

 private:
  Pointer adapter_;
};

template <class A>
inline constexpr bool is_placed = false;
template <class Pointer>
inline constexpr bool is_placed<placed<Pointer>> = true;

}  // namespace detail
}  // namespace testing
MMUNOTIFY_END_NAMESPACE
