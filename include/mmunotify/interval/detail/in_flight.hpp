// SPDX-License-Identifier: MIT
#pragma once

// Which brackets are in flight, and where: for those who insert an interval under them (C5), and for turns (C8).
//
// A bracket claims a slot before it walks the index, and frees it after its end. A slot is a cache line, and a thread
// comes back to the same one, so that brackets of different threads do not meet. When all slots are taken the bracket
// is only counted: then whoever must wait for it waits for a grace period of the domain instead, which every bracket
// holds up.
//
// The clock gives versions, by which it is decided which bracket calls which interval (interval_entry.hpp).
//
// Orderings. Those of the first two lines are seq_cst, so that they are in one order:
//   (if1) a bracket: claim a slot; (if2) read its version g from the clock; then walk.
//   (if3) an insertion: link; step on the clock; (if4) look at the slots.
//   So either the insertion sees the slot, or the bracket's g comes after the insertion and the bracket calls it.
//   (if5) release of a slot's contents / (if6) acquire: what is read between two looks at the same life belongs to it.
//   (if7) release of a count / (if4): who finds nobody counted comes after their ends.

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/life_word.hpp>
#include <mmunotify/sync/linux/platform.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// Versions. A word that all share, on a line of its own.
class version_clock {
 public:
  std::uint64_t read() const noexcept { return now_.load(std::memory_order_seq_cst); }           // (if2)
  std::uint64_t advance() noexcept { return now_.fetch_add(1, std::memory_order_seq_cst) + 1; }  // (if3)

 private:
  alignas(64) std::atomic<std::uint64_t> now_{1};
};

/// A bracket in flight. Keys are numbers here.
struct flight {
  std::uint64_t first = 0;
  std::uint64_t last = 0;
  std::uint64_t version = 0;  ///< g; 0: the slot was just claimed, and does not say yet
  std::uint64_t number = 0;   ///< its place in the queue with turns; 0: before all of them
  std::uintptr_t thread = 0;  ///< who began it

  constexpr bool overlaps(std::uint64_t a, std::uint64_t b) const noexcept { return first < b && a < last; }
};

class alignas(64) flight_slot {
 public:
  life_word life;

  /// By the owner.
  void fill(const flight& f) noexcept {
    first_.store(f.first, std::memory_order_release);      // (if5) pairs with (if6)
    last_.store(f.last, std::memory_order_release);        // (if5)
    number_.store(f.number, std::memory_order_release);    // (if5)
    thread_.store(f.thread, std::memory_order_release);    // (if5)
    version_.store(f.version, std::memory_order_release);  // (if5)
  }
  std::uint64_t version() const noexcept { return version_.load(std::memory_order_relaxed); }
  /// Whom its start has called, if that was one; for its end.
  void* only = nullptr;
  void free() noexcept {
    version_.store(0, std::memory_order_relaxed);
    life.free();
  }

  /// Only good if life.look() says the same before and after.
  flight read() const noexcept {
    flight f;
    f.version = version_.load(std::memory_order_acquire);  // (if6) pairs with (if5)
    f.first = first_.load(std::memory_order_acquire);      // (if6)
    f.last = last_.load(std::memory_order_acquire);        // (if6)
    f.number = number_.load(std::memory_order_acquire);    // (if6)
    f.thread = thread_.load(std::memory_order_acquire);    // (if6)
    return f;
  }

 private:
  std::atomic<std::uint64_t> version_{0};
  std::atomic<std::uint64_t> first_{0};
  std::atomic<std::uint64_t> last_{0};
  std::atomic<std::uint64_t> number_{0};
  std::atomic<std::uintptr_t> thread_{0};
};
static_assert(sizeof(flight_slot) == 64);

class flight_table {
 public:
  static constexpr unsigned size = 64;

  /// Returns: a claimed slot; nullptr if none is left: then the bracket is counted, until leave(nullptr).
  [[nodiscard]] flight_slot* enter() noexcept {
    std::uint32_t& hint = linux_platform::own<flight_table, std::uint32_t>();
    if (hint == 0) [[unlikely]]
      hint = next_hint_.fetch_add(1, std::memory_order_relaxed) % size + 1;
    for (unsigned n = 0; n < size; ++n) {
      const unsigned i = (hint - 1 + n) % size;
      const std::uint64_t bit = std::uint64_t{1} << i;
      if ((used_.load(std::memory_order_seq_cst) & bit) == 0) [[unlikely]]  // (if1) pairs with (if4)
        used_.fetch_or(bit, std::memory_order_seq_cst);                     // (if1)
      if (slots_[i].life.claim()) [[likely]]                                // (if1)
        return &slots_[i];
    }
    overflow_.fetch_add(1, std::memory_order_seq_cst);  // (if1) pairs with (if4)
    return nullptr;
  }
  void leave(flight_slot* s) noexcept {
    if (s != nullptr) [[likely]] {
      s->free();
    } else {
      overflow_.fetch_sub(1, std::memory_order_release);  // (if7)
    }
  }

  /// Returns: true if brackets are in flight that have no slot.
  bool overflows() const noexcept { return overflow_.load(std::memory_order_seq_cst) != 0; }  // (if4) pairs with (if1)

  /// Calls f(slot, life, flight) for every bracket with a slot, until it says true. Returns: true if it did. Waits for
  /// brackets that are just being claimed, a few instructions.
  template <class F>
  bool any(F&& f) noexcept {
    for (std::uint64_t u = used_.load(std::memory_order_seq_cst); u != 0; u &= u - 1) {  // (if4) pairs with (if1)
      flight_slot& s = slots_[static_cast<unsigned>(std::countr_zero(u))];
      std::uint32_t name = s.life.look();
      while (name != 0) {
        const flight c = s.read();
        const std::uint32_t again = s.life.look();
        if (again == name && c.version != 0) {
          if (f(s, name, c)) return true;
          break;
        }
        if (again == name) linux_platform::yield();
        name = again;
      }
    }
    return false;
  }

  /// Returns: true if the thread, which is the caller's, is in a bracket with a slot. Waits for nobody.
  bool holds(std::uintptr_t thread) const noexcept {
    for (std::uint64_t u = used_.load(std::memory_order_relaxed); u != 0; u &= u - 1) {
      const flight c = slots_[static_cast<unsigned>(std::countr_zero(u))].read();
      if (c.version != 0 && c.thread == thread) return true;  // only a thread itself says that it is in a slot
    }
    return false;
  }

  /// The same for a bracket over [first, last), in another slot than `own`.
  bool holds_over(std::uintptr_t thread, std::uint64_t first, std::uint64_t last,
                  const flight_slot& own) const noexcept {
    for (std::uint64_t u = used_.load(std::memory_order_relaxed); u != 0; u &= u - 1) {
      const flight_slot& s = slots_[static_cast<unsigned>(std::countr_zero(u))];
      const flight c = s.read();
      if (&s != &own && c.version != 0 && c.thread == thread && c.overlaps(first, last)) return true;
    }
    return false;
  }

 private:
  alignas(64) std::atomic<std::uint64_t> used_{0};  ///< slots that somebody was in; a bit stays
  std::atomic<std::uint64_t> overflow_{0};
  std::array<flight_slot, size> slots_{};

  static inline std::atomic<std::uint32_t> next_hint_{0};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
