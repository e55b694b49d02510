// SPDX-License-Identifier: MIT
#pragma once

// What a fault asks about its interval: does a bracket overlap it now, and did one since? One word.
//
//   bits 0..18   brackets that overlap the interval and are between start and end
//   bit 19       somebody sleeps until they are gone
//   bit 20       the interval was inserted or grew under brackets that do not know it; who faults must wait for them
//   bits 21..63  the sequence: how many brackets have ended here, and how often the range has changed
//
// A word whose lower 21 bits are 0 is quiet, and is what read_begin hands out: if it is still the same later, nothing
// has happened in between. A bracket that was refused leaves the word as it was (P4). The sequence wraps (C7): it comes
// back to a value after 2^43 brackets over one interval within one fault, at 5 ns each half a day.
//
// Orderings:
//   (iw1) release of an end / (iw2) acquire of a look: who sees that a bracket has ended here sees the primary's tables
//   as it left them.
//   (iw3) acq_rel of a start: the callback, and the change of the tables, come after it; so a fault that has found the
//   old tables, and takes the client's lock after the callback, sees it (through that lock).

#include <atomic>
#include <cstdint>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

class collision_word {
 public:
  using value = std::uint64_t;
  static constexpr unsigned active_bits = 19;
  static constexpr value active_mask = (value{1} << active_bits) - 1;
  static constexpr value sleepers = value{1} << active_bits;
  static constexpr value pending = value{1} << (active_bits + 1);
  static constexpr value step = value{1} << (active_bits + 2);
  /// Never what a quiet word is.
  static constexpr value no_value = 1;

  constexpr collision_word() = default;
  /// Starts at a sequence, for tests of the wrap.
  constexpr explicit collision_word(value sequence) noexcept : word_(sequence * step) {}

  static constexpr bool is_quiet(value v) noexcept { return (v & (step - 1)) == 0; }
  static constexpr bool is_active(value v) noexcept { return (v & active_mask) != 0; }
  static constexpr bool is_pending(value v) noexcept { return (v & pending) != 0; }

  value load() const noexcept { return word_.load(std::memory_order_acquire); }  // (iw2) pairs with (iw1)

  /// Returns: true if a bracket overlaps the interval or has since `quiet` was read.
  bool has_moved(value quiet) const noexcept {
    const value now = load();
    return now != quiet || !is_quiet(now);
  }

  /// A bracket's start.
  void raise() noexcept { word_.fetch_add(1, std::memory_order_acq_rel); }  // (iw3) pairs with (iw2)

  /// A bracket's end. Returns: true if sleepers are to be woken.
  [[nodiscard]] bool lower() noexcept {
    constexpr value by = mutated(mutation::interval_end_keeps_sequence) ? value{0} - 1 : step - 1;
    const value after = word_.fetch_add(by, std::memory_order_acq_rel) + by;  // (iw1) pairs with (iw2)
    return !is_active(after) && take_sleepers(after);
  }
  /// A start is taken back: nothing has happened.
  [[nodiscard]] bool cancel() noexcept {
    constexpr value by = mutated(mutation::interval_refusal_bumps) ? step - 1 : value{0} - 1;
    const value after = word_.fetch_add(by, std::memory_order_acq_rel) + by;  // (iw1) pairs with (iw2)
    return !is_active(after) && take_sleepers(after);
  }

  /// Who faults has to look for brackets that do not know the interval. Counts as an end, so that no two times are
  /// alike.
  void set_pending() noexcept {
    value v = word_.load(std::memory_order_relaxed);
    // (iw1) pairs with (iw2)
    while (
        !word_.compare_exchange_weak(v, (v | pending) + step, std::memory_order_acq_rel, std::memory_order_relaxed)) {
    }
  }
  /// The range has changed: what was begun before is no good any more.
  void move_on() noexcept { word_.fetch_add(step, std::memory_order_acq_rel); }  // (iw1) pairs with (iw2)
  /// They are gone, if the word is still as it was seen before looking for them. Counts as an end, for those who knew
  /// the interval when it was smaller.
  void clear_pending(value seen) noexcept {
    // (iw1) pairs with (iw2)
    word_.compare_exchange_strong(seen, seen - pending + step, std::memory_order_acq_rel, std::memory_order_relaxed);
  }

  /// Says that somebody is about to sleep. Returns: false if no bracket is active any more.
  [[nodiscard]] bool announce_sleeper() noexcept {
    value v = load();  // (iw2)
    while (is_active(v)) {
      if ((v & sleepers) != 0) return true;
      // (iw3) pairs with (iw2): the one that ends last sees it.
      if (word_.compare_exchange_weak(v, v | sleepers, std::memory_order_acq_rel, std::memory_order_acquire)) {
        return true;
      }
    }
    return false;
  }

 private:
  bool take_sleepers(value after) noexcept {
    if ((after & sleepers) == 0) [[likely]]
      return false;
    return (word_.fetch_and(~sleepers, std::memory_order_acq_rel) & sleepers) != 0;  // (iw1) pairs with (iw2)
  }

  std::atomic<value> word_{0};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
