// SPDX-License-Identifier: MIT
#pragma once

// What a set of intervals shares with each of them: versions, brackets in flight, turns; and how a bracket enters.

#include <cstdint>

#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/in_flight.hpp>
#include <mmunotify/interval/detail/turns.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// What a bracket remembers from its start to its end: one word, its slot, or its version if it has none.
class flight_memo {
  static constexpr std::uint64_t has_version = 1;
  static constexpr std::uint64_t called_nobody = 2;
  static constexpr std::uint64_t called_one = 4;  // with a slot

 public:
  constexpr flight_memo() noexcept = default;
  explicit flight_memo(flight_slot* s) noexcept : word_(reinterpret_cast<std::uintptr_t>(s)) {}
  explicit constexpr flight_memo(std::uint64_t version) noexcept : word_(version << 2 | has_version) {}

  flight_slot* slot() const noexcept {
    return (word_ & has_version) != 0 ? nullptr : reinterpret_cast<flight_slot*>(word_ & ~(called_nobody | called_one));
  }
  std::uint64_t version() const noexcept { return (word_ & has_version) != 0 ? word_ >> 2 : slot()->version(); }

  /// Its start has called nobody, and so its end will not: the audience is the same.
  void call_nobody() noexcept { word_ |= called_nobody; }
  bool calls_nobody() const noexcept { return (word_ & called_nobody) != 0; }

  /// Its start has called one only, and so will its end: no need to look for it again. Without a slot that is
  /// forgotten.
  void call_one(void* who) noexcept {
    if ((word_ & has_version) != 0) return;
    slot()->only = who;
    word_ |= called_one;
  }
  /// Returns: nullptr if it must be looked for.
  void* the_one() const noexcept { return (word_ & (has_version | called_one)) == called_one ? slot()->only : nullptr; }

  /// As a pointer's worth, never null, for who keeps it.
  void* to_pointer() const noexcept { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(word_)); }
  static flight_memo from_pointer(void* p) noexcept {
    flight_memo m;
    m.word_ = reinterpret_cast<std::uintptr_t>(p);
    return m;
  }

 private:
  std::uint64_t word_ = 0;
};

struct interval_context {
  explicit interval_context(srcu_domain& d) noexcept : domain(d) {}

  srcu_domain& domain;
  version_clock clock;
  flight_table flights;
  turn_table turns;

  /// Effects: a bracket over [first, last) is in flight, and has waited for its turn. Returns: false if it must not
  /// wait (may_wait) and would have to: then it is not. Precondition: inside a section, which lasts until leave().
  [[nodiscard]] bool enter(std::uint64_t first, std::uint64_t last, bool may_wait, flight_memo& memo) noexcept {
    flight_slot* const slot = flights.enter();
    if (slot == nullptr) [[unlikely]] {
      memo = flight_memo(clock.read());  // (if2)
      return true;
    }
    memo = flight_memo(slot);
    if (turns.any()) [[unlikely]]  // (tu3)
      return enter_queued(*slot, first, last, may_wait, memo);
    slot->fill({first, last, clock.read(), 0, linux_platform::self()});  // (if2)
    return true;
  }

  void leave(flight_memo memo) noexcept { flights.leave(memo.slot()); }

 private:
  MMUNOTIFY_COLD bool enter_queued(flight_slot& slot, std::uint64_t first, std::uint64_t last, bool may_wait,
                                   flight_memo& memo) noexcept {
    flight f{first, last, 0, 0, linux_platform::self()};
    if (!flights.holds(f.thread)) f.number = turns.draw();
    f.version = clock.read();  // (if2), after the number: see interval_notifier.hpp, take_turn
    slot.fill(f);
    turn_table::blocking_turn blocker;
    switch (turns.pass(f, may_wait, blocker, flights, slot)) {
      case turn_table::passage::open: return true;
      case turn_table::passage::refused: slot.free(); return false;
      case turn_table::passage::again: break;
    }
    slot.free();
    blocker.wait();
    return enter(first, last, may_wait, memo);
  }
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
