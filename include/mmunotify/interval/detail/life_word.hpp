// SPDX-License-Identifier: MIT
#pragma once

// A place that is taken and freed over and over, and whose present life others can wait for.
//
// Orderings:
//   (lw1) seq_cst claim / (lw2) seq_cst look: for the protocols of in_flight.hpp and turns.hpp, which need one order.
//   (lw3) release of a place / (lw4) acquire: who has waited for a life comes after its end; the next life, too.

#include <atomic>
#include <cstdint>

#include <mmunotify/config.hpp>
#include <mmunotify/sync/linux/platform.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

class life_word {
 public:
  /// Returns: false if it is taken.
  [[nodiscard]] bool claim() noexcept {
    std::uint32_t s = state_.load(std::memory_order_relaxed);
    return (s & busy) == 0 && state_.compare_exchange_strong(s, s | busy, std::memory_order_seq_cst,  // (lw1), (lw4)
                                                             std::memory_order_relaxed);
  }

  /// By the one who claimed it.
  void free() noexcept {
    const std::uint32_t s = state_.load(std::memory_order_relaxed);
    // (lw3) pairs with (lw4). Each life has a state of its own.
    if ((state_.exchange((s & ~(busy | sleepers)) + life, std::memory_order_acq_rel) & sleepers) != 0) [[unlikely]] {
      linux_platform::wake(state_);
    }
  }

  /// Returns: 0 if nobody is in it, else the name of this life.
  std::uint32_t look() const noexcept {
    const std::uint32_t s = state_.load(std::memory_order_seq_cst);  // (lw2) pairs with (lw1); (lw4) with (lw3)
    return (s & busy) != 0 ? s & ~sleepers : 0;
  }

  /// Returns when the life that look() named is over. Progress: blocking.
  void wait(std::uint32_t name) noexcept {
    while (look() == name) {
      std::uint32_t s = name;
      // (lw3) pairs with (lw4): the one who frees the place sees that somebody sleeps.
      state_.compare_exchange_strong(s, name | sleepers, std::memory_order_acq_rel, std::memory_order_acquire);
      if (look() == name) linux_platform::wait(state_, name | sleepers);
    }
  }

 private:
  static constexpr std::uint32_t busy = 1;
  static constexpr std::uint32_t sleepers = 2;
  static constexpr std::uint32_t life = 4;

  std::atomic<std::uint32_t> state_{life};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
