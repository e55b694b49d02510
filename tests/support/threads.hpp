// SPDX-License-Identifier: MIT
#pragma once

// Small helpers for tests with threads: no test sleeps, they wait for each other.

#include <atomic>
#include <cstdint>
#include <thread>

/// Spins, yielding, until the flag is set.
inline void wait_for(const std::atomic<bool>& flag) {
  while (!flag.load(std::memory_order_acquire)) std::this_thread::yield();
}

/// Gives others the processor many times: what could overtake, has overtaken by then. Proves nothing when nothing
/// happens; a broken variant fails after it.
inline void let_others_run() {
  for (int i = 0; i < 200; ++i) std::this_thread::yield();
}

/// xorshift64*: small, seeded, the same on every machine.
class small_random {
 public:
  explicit small_random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15U + 1) {}
  std::uint64_t operator()() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1dU;
  }
  std::uint64_t below(std::uint64_t n) { return (*this)() % n; }

 private:
  std::uint64_t state_;
};
