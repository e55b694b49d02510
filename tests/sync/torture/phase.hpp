// SPDX-License-Identifier: MIT
#pragma once

// Who is active. The run is a sequence of phases; in each, some activities run and the others are parked between two
// operations, holding nothing. So there are phases of everything at once, phases with hot loops of few, and phases
// without readers, in which the domains fall idle and are woken again.

#include <atomic>
#include <cstdint>

#include <mmunotify/sync/linux/platform.hpp>

#include "sync/torture/base.hpp"

namespace torture {

inline std::atomic<std::uint32_t> active{0};  ///< a mask of activities
inline std::atomic<std::uint32_t> slots_in_use{8};

/// What most of the choices in the phase come out as; `any`: no taste.
inline constexpr std::uint64_t any = ~std::uint64_t{0};
struct {
  std::atomic<std::uint64_t> arena{any};
  std::atomic<std::uint64_t> section{any};
  std::atomic<std::uint64_t> update{any};
} inline taste;

inline std::uint64_t choose(small_random& random, std::uint64_t n,
                            const std::atomic<std::uint64_t>& favourite) noexcept {
  const std::uint64_t f = favourite.load(std::memory_order_relaxed);
  return f != any && random.below(8) != 0 ? f : random.below(n);
}

inline bool is_active(std::uint32_t a) noexcept { return (active.load(std::memory_order_relaxed) & a) != 0; }

inline void change_active(std::uint32_t mask) noexcept {
  active.store(mask, std::memory_order_relaxed);
  mmunotify::linux_platform::wake(active);
}

/// Calls step() until the end, parked while the activity is off; before_parking() leaves nothing open behind.
template <class Step, class BeforeParking>
void perform(std::uint32_t a, Step step, BeforeParking before_parking) {
  while (!stop.load(std::memory_order_acquire)) {
    const std::uint32_t mask = active.load(std::memory_order_relaxed);
    if ((mask & a) == 0) {
      before_parking();
      const bool signalled = self->takes_signals.exchange(false, std::memory_order_relaxed);
      mmunotify::linux_platform::wait(active, mask);
      self->takes_signals.store(signalled, std::memory_order_relaxed);
      continue;
    }
    step();
  }
  before_parking();
}
template <class Step>
void perform(std::uint32_t a, Step step) {
  perform(a, step, [] {});
}

}  // namespace torture
