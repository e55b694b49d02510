// SPDX-License-Identifier: MIT
#pragma once

// The worker's rests: while callbacks come in numbers it lets them collect for a moment, so that one grace period, one
// heavy fence and one wake-up serve hundreds of them. A rest delays callbacks and nothing else, and is cut short:
//
//   - by who waits for callbacks: in a barrier, at exit. It says so for as long as it waits, and meanwhile there is no
//     rest at all (hurry, calm);
//   - by a backlog that has grown enough (enough): it bounds the memory that waits.
//
// Orderings. Dekker: who hurries says so (k11), then looks whether the worker rests (k12); the worker says that it
// rests (k13), then looks whether somebody hurries (k14). One of them sees the other, and what is slept on is the very
// word that who hurries has changed. (k15) is for who was woken: it comes after what had been queued before (k11).
// `enough` is not ordered: missed, it costs the rest of a rest.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <class Platform>
class rest {
 public:
  /// A backlog that is not left alone.
  static constexpr std::size_t too_many = 4096;

  /// Effects: the worker does not rest until calm(), once for each. Context: anywhere.
  void hurry() noexcept {
    hurried_.fetch_add(one, std::memory_order_seq_cst);  // (k11) pairs with (k14), (k15)
    if constexpr (mutated(mutation::silent_barrier)) return;
    if (resting_.load(std::memory_order_seq_cst)) Platform::wake(hurried_);  // (k12) pairs with (k13)
  }
  void calm() noexcept { hurried_.fetch_sub(one, std::memory_order_relaxed); }

  /// Effects: a rest that is under way ends. Context: anywhere; a load if there is none.
  void enough() noexcept {
    if (!resting_.load(std::memory_order_relaxed)) return;
    if ((hurried_.fetch_or(backlog, std::memory_order_relaxed) & backlog) == 0) Platform::wake(hurried_);
  }

  /// Returns: true while somebody waits. For the worker, as the rest.
  bool hurried() const noexcept { return hurried_.load(std::memory_order_relaxed) >= one; }

  /// Effects: sleeps for a moment.
  void take() noexcept {
    resting_.store(true, std::memory_order_seq_cst);      // (k13) pairs with (k12)
    if (hurried_.load(std::memory_order_seq_cst) == 0) {  // (k14) pairs with (k11)
      Platform::wait_for(hurried_, 0, Platform::rest_ns);
    }
    resting_.store(false, std::memory_order_relaxed);
    hurried_.fetch_and(~backlog, std::memory_order_acquire);  // (k15) pairs with (k11)
  }

  /// In a forked child, where nobody else waits. waits: the caller does.
  void after_fork(bool waits) noexcept {
    resting_.store(false, std::memory_order_relaxed);
    hurried_.store(waits ? one : 0, std::memory_order_relaxed);
  }

 private:
  static constexpr std::uint32_t backlog = 1;
  static constexpr std::uint32_t one = 2;

  std::atomic<std::uint32_t> hurried_{0};  ///< how many wait, in steps of two; bit 0: the backlog is large
  std::atomic<bool> resting_{false};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
