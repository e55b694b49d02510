// SPDX-License-Identifier: MIT
#pragma once

// The last leaver. A grace period that sleeps is woken by whoever leaves; if that wake-up is lost, the next leaver
// makes good for it, and nobody notices. So here nobody comes after: one reader leaves at about the moment when the
// grace period goes to sleep, and does not come again before it has ended.

#include <atomic>
#include <cstdint>
#include <thread>

#include <mmunotify/sync/srcu_domain.hpp>

#include "sync/torture/base.hpp"

namespace torture {

template <class Domain>
class quiet_pair {
 public:
  quiet_pair(Domain& d, const char* name) : domain_(d), name_(name) {}

  /// The reader's side.
  void leave_last() {
    const std::uint64_t n = ended_.load(std::memory_order_relaxed) + 1;
    const in_flight f("the last leaver's grace period", name_);
    const bool by_handoff = self->random.below(4) == 0;
    typename Domain::handoff_token token;
    if (by_handoff) {
      token = domain_.down_read();
    } else {
      domain_.lock();
    }
    asked_.store(n, std::memory_order_release);  // (y1) pairs with (y2)
    while (begun_.load(std::memory_order_acquire) != n) std::this_thread::yield();
    relax(self->random.below(500));
    if (self->random.below(2) == 0) fill_store_buffer(self->random);
    if (by_handoff) {
      domain_.up_read(token);
    } else {
      domain_.unlock();
    }
    while (ended_.load(std::memory_order_acquire) != n) std::this_thread::yield();  // (y3) pairs with (y4)
    self->note(count::last_leaver);
  }

  /// The updater's side; returns at once if nothing is asked.
  bool answer() {
    const std::uint64_t n = asked_.load(std::memory_order_acquire);  // (y2)
    if (n == ended_.load(std::memory_order_relaxed)) return false;
    if (self->random.below(4) == 0) {
      ran_.store(false, std::memory_order_relaxed);
      if (head_.call(*this) != mmunotify::errc::ok) fail("call in %s failed", name_);
      begun_.store(n, std::memory_order_release);
      while (!ran_.load(std::memory_order_acquire)) std::this_thread::yield();  // (y5) pairs with (y6)
    } else {
      begun_.store(n, std::memory_order_release);
      domain_.synchronize();
    }
    ended_.store(n, std::memory_order_release);  // (y4)
    return true;
  }

 private:
  struct head : mmunotify::srcu_head {
    quiet_pair* owner = nullptr;
    mmunotify::errc call(quiet_pair& o) noexcept {
      owner = &o;
      return o.domain_.call(*this, [](mmunotify::srcu_head* h) noexcept {
        static_cast<head*>(h)->owner->ran_.store(true, std::memory_order_release);  // (y6)
      });
    }
  };

  Domain& domain_;
  const char* name_;
  head head_;
  std::atomic<std::uint64_t> asked_{0};
  std::atomic<std::uint64_t> begun_{0};
  std::atomic<std::uint64_t> ended_{0};
  std::atomic<bool> ran_{false};
};

}  // namespace torture
