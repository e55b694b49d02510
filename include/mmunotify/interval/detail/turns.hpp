// SPDX-License-Identifier: MIT
#pragma once

// Turns: a fault that has collided too often asks the brackets to wait (C8).
//
// Turns and brackets stand in one queue, in which only those that overlap wait for each other, and each only for lower
// numbers; so nobody waits in a circle, and nobody is overtaken more than once. While no turn is wanted a bracket draws
// no number, and is before all turns (0).
//
//   a turn:    count it; take a place in the table; draw a number; wait for the brackets over its range that are before
//              it. It is granted then, and lasts until it is given back.
//   a bracket: claim its slot (in_flight.hpp); if turns are counted: draw a number; fill the slot; wait for the turns
//              over its range that are before it. One that must not wait is refused.
//
// A bracket that begins inside another one of its thread would close a circle: the turn may wait for the outer one. It
// goes before all turns that are not granted yet (0). If one is granted it gives its slot up, waits, and begins anew:
// for whoever is about to grant itself a turn waits for those slots. Brackets that found no slot do not queue.
//
// Orderings: all counts, claims and numbers are seq_cst, in one order.
//   (tu1) a turn: count, claim its place; (tu2) look at the slots (if4).
//   (if1) a bracket: claim its slot; (tu3) look at the count. So either the bracket sees the turn, or the turn the
//   slot. (tu4) a turn claims its place before it draws; (tu5) a bracket looks at the table after it drew: so it sees
//   the place of every turn with a lower number. (tu6) release of a place's contents / (tu7) acquire.

#include <array>
#include <atomic>
#include <cstdint>

#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/in_flight.hpp>
#include <mmunotify/interval/detail/life_word.hpp>
#include <mmunotify/sync/linux/platform.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

class turn_table {
 public:
  static constexpr unsigned size = 8;  ///< turns at a time; one more waits for a place

  class place {
    friend turn_table;
    life_word life_;
    std::atomic<std::uint64_t> first_{0};
    std::atomic<std::uint64_t> last_{0};
    std::atomic<std::uint64_t> number_{0};  ///< 0: not drawn yet
    std::atomic<std::uintptr_t> thread_{0};
    std::atomic<bool> granted_{false};
  };

  /// Returns: true if somebody wants or has a turn: then a bracket must queue.
  [[gnu::always_inline]] bool any() const noexcept {
    return count_.load(std::memory_order_seq_cst) != 0;  // (tu3) pairs with (tu1)
  }
  std::uint64_t draw() noexcept { return last_number_.fetch_add(1, std::memory_order_seq_cst) + 1; }  // (tu4), (tu5)

  /// Returns: true if the thread has or wants a turn. Hint for others, exact for the caller's own.
  bool is_held_by(std::uintptr_t thread) const noexcept {
    for (const place& p : places_) {
      if (p.life_.look() != 0 && p.thread_.load(std::memory_order_relaxed) == thread) return true;
    }
    return false;
  }

  /// Effects: no bracket over [first, last) is between start and end, nor starts, until give_back. Progress: blocking.
  place& take(std::uint64_t first, std::uint64_t last, flight_table& flights) noexcept {
    count_.fetch_add(1, std::memory_order_seq_cst);  // (tu1) pairs with (tu3)
    place& p = claim_place();
    p.first_.store(first, std::memory_order_relaxed);
    p.last_.store(last, std::memory_order_relaxed);
    p.thread_.store(linux_platform::self(), std::memory_order_relaxed);
    const std::uint64_t mine = draw();
    p.number_.store(mine, std::memory_order_seq_cst);  // (tu6) pairs with (tu7)
    const auto is_before = [=](const flight& f) { return f.overlaps(first, last) && f.number < mine; };
    while (wait_for_one(flights, is_before)) {
    }
    p.granted_.store(true, std::memory_order_seq_cst);  // (tu6) pairs with (tu7)
    // An inner bracket that came while the turn was not granted has not waited; from now on they do.
    while (wait_for_one(flights, is_before)) {
    }
    return p;
  }

  void give_back(place& p) noexcept {
    p.granted_.store(false, std::memory_order_relaxed);
    p.number_.store(0, std::memory_order_relaxed);
    p.life_.free();                                  // (lw3)
    count_.fetch_sub(1, std::memory_order_seq_cst);  // (tu1)
  }

  /// A turn that a bracket has to wait for.
  struct blocking_turn {
    life_word* word = nullptr;
    std::uint32_t life = 0;
    void wait() const noexcept { word->wait(life); }
  };
  enum class passage : std::uint8_t { open, refused, again };

  /// Effects: a bracket waits for the turns before it. Its number is what it drew, or 0 if it is inside another bracket
  /// of its thread. Returns: open; refused if it must not wait (may_wait), and would have to; again if it has to give
  /// up its slot: then `blocker` is what to wait for.
  [[nodiscard]] passage pass(const flight& f, bool may_wait, blocking_turn& blocker) noexcept {
    if constexpr (mutated(mutation::interval_ignores_turns)) return passage::open;
    for (place& p : places_) {
      while (true) {
        const std::uint32_t life = p.life_.look();  // (tu5) pairs with (tu4)
        if (life == 0) break;
        const std::uint64_t number = p.number_.load(std::memory_order_seq_cst);  // (tu7) pairs with (tu6)
        const bool granted = p.granted_.load(std::memory_order_seq_cst);         // (tu7)
        const bool overlaps =
            f.overlaps(p.first_.load(std::memory_order_relaxed), p.last_.load(std::memory_order_relaxed));
        const bool own = p.thread_.load(std::memory_order_relaxed) == f.thread;
        if (p.life_.look() != life) continue;
        if (number == 0) {  // it is about to draw, or to go
          linux_platform::yield();
          continue;
        }
        if (!overlaps || (f.number == 0 ? !granted : number > f.number)) break;
        if (!may_wait) return passage::refused;
        if (own) {
          violated("C8", "invalidate_range_start", "the thread has a turn over the range: it would wait for itself");
          break;
        }
        blocker = {&p.life_, life};
        if (f.number == 0) return passage::again;
        blocker.wait();
      }
    }
    return passage::open;
  }

 private:
  place& claim_place() noexcept {
    for (unsigned i = 0;; i = (i + 1) % size) {
      place& p = places_[i];
      if (p.life_.claim()) return p;  // (tu1), (tu4)
      if (i + 1 == size) {
        const std::uint32_t life = p.life_.look();
        if (life != 0) p.life_.wait(life);
      }
    }
  }

  /// Returns: false if no bracket is before.
  template <class IsBefore>
  static bool wait_for_one(flight_table& flights, IsBefore is_before) noexcept {
    flight_slot* slot = nullptr;
    std::uint32_t life = 0;
    flights.any([&](flight_slot& s, std::uint32_t l, const flight& f) {  // (tu2)
      if (!is_before(f)) return false;
      slot = &s;
      life = l;
      return true;
    });
    if (slot == nullptr) return false;
    slot->life.wait(life);
    return true;
  }

  alignas(64) std::atomic<std::uint32_t> count_{0};
  std::atomic<std::uint64_t> last_number_{0};
  std::array<place, size> places_{};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
