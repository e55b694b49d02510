// SPDX-License-Identifier: MIT
#pragma once

// How the audience of a space calls its set of intervals, whose type it does not know: the table, and what it counts.

#include <concepts>
#include <cstdint>

#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/young_batch.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/interval_context.hpp>
#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/observe/observe.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// Counts for the space's observer, which the set does not know.
struct interval_tally {
  using is_observer = void;
  std::uint64_t* calls;
  void note(observe::occurrence, std::uint64_t n) noexcept { *calls += n; }
};

/// Home: an interval_set that knows whether its space was released. O: interval_tally, or none where nobody counts.
template <class Home, address_key Key, observe::observer O>
class interval_forwarding {
 public:
  static constexpr interval_calls<Key> table() noexcept {
    interval_calls<Key> c{&start, &end, &cancel, nullptr, &ask_young, nullptr, &flush};
    if constexpr (paged_key<Key>) {
      c.change_entry = &change_entry;
      c.ask_young_pages = &ask_young_pages;
    }
    return c;
  }

 private:
  static Home& home_at(void* set) noexcept { return *static_cast<Home*>(set); }
  static O observer_of([[maybe_unused]] std::uint64_t* calls) noexcept {
    if constexpr (std::same_as<O, interval_tally>) {
      return {calls};
    } else {
      return {};
    }
  }

  static bool start(void* set, const basic_invalidation<Key>& i, pending_passes<Key>& passes, void*& m,
                    std::uint64_t* calls) noexcept {
    O o = observer_of(calls);
    flight_memo memo;
    if (home_at(set).released()) return true;  // L3: another may keep the space armed
    if (!home_at(set).start(i, memo, passes, o)) return false;
    m = memo.to_pointer();
    return true;
  }
  static void end(void* set, const basic_invalidation<Key>& i, void* m, std::uint64_t* calls) noexcept {
    O o = observer_of(calls);
    home_at(set).end(i, flight_memo::from_pointer(m), o);
  }
  static void cancel(void* set, const basic_invalidation<Key>& i, void* m, std::uint64_t* calls) noexcept {
    O o = observer_of(calls);
    home_at(set).cancel(i, flight_memo::from_pointer(m), o);
  }
  static void change_entry(void* set, const basic_entry_change<Key>& change, std::uint64_t* calls) noexcept {
    O o = observer_of(calls);
    if (!home_at(set).released()) home_at(set).change_entry(change, o);
  }
  static bool ask_young(void* set, young_hook<Key> hook, basic_range<Key> r, bool first_yes,
                        std::uint64_t* calls) noexcept {
    O o = observer_of(calls);
    if (home_at(set).released()) return false;
    return first_yes ? home_at(set).template ask_young<true>(hook, r, o)
                     : home_at(set).template ask_young<false>(hook, r, o);
  }
  static void ask_young_pages(void* set, typename interval_calls<Key>::batch& batch, std::uint64_t* calls) noexcept {
    O o = observer_of(calls);
    if (!home_at(set).released()) home_at(set).ask_young_pages(batch, o);
  }
  static void flush(void* set, basic_range<Key> r, std::uint64_t* calls) noexcept {
    O o = observer_of(calls);
    if (!home_at(set).released()) home_at(set).invalidate_secondary_tlbs(r, o);
  }
};

/// What an audience is given. Friend of Home, whose destructor is private.
template <class Home, address_key Key>
interval_hooks<Key> hooks_of(Home& home) noexcept {
  return {&home, interval_forwarding<Home, Key, observe::none>::table(),
          interval_forwarding<Home, Key, interval_tally>::table(),
          [](void* set) noexcept { delete static_cast<Home*>(set); }};
}

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
