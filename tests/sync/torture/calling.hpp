// SPDX-License-Identifier: MIT
#pragma once

// Numbered callbacks: what a barrier promises, and floods of calls against a bounded backlog.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include <mmunotify/sync/srcu_domain.hpp>

#include "sync/torture/base.hpp"

namespace torture {

/// Callbacks that one thread queues in one domain. They run in that order, each once.
template <class Domain>
class numbered_calls {
 public:
  static constexpr std::size_t size = 256;

  /// sleepy: some callbacks wait for a grace period of their own domain.
  numbered_calls(Domain& d, const char* name, bool sleepy)
      : domain_(d), name_(name), sleepy_(sleepy), jobs_(std::make_unique<job[]>(size)) {
    for (std::size_t i = 0; i < size; ++i) jobs_[i].home = this;
  }

  /// Some calls, then a barrier: all have run.
  void with_barrier(std::uint64_t n) {
    const std::uint64_t queued = queue(n);
    {
      const in_flight f("barrier", name_);
      domain_.barrier();
    }
    if (ran_ != queued) {
      fail("S4, L8: a barrier of %s has returned, and of %lu callbacks queued before, %lu have run", name_,
           static_cast<unsigned long>(queued), static_cast<unsigned long>(ran_));
    }
    self->note(count::barrier);
  }

  /// Some calls, which have to run without a barrier.
  void with_patience(std::uint64_t n) {
    const std::uint64_t queued = queue(n);
    const in_flight f("callbacks", name_);
    // (c1) acquire pairs with (c2): the callbacks are over.
    while (seen_.load(std::memory_order_acquire) != queued) std::this_thread::yield();
    self->note(count::flooded, queued);
  }

  /// How often call() was refused.
  std::uint64_t refused() const noexcept { return refused_; }

 private:
  struct job : mmunotify::srcu_head {
    numbered_calls* home = nullptr;
    std::uint64_t number = 0;
  };

  /// Precondition: none of the last round is queued. Returns: how many are; a full backlog cuts the round short.
  std::uint64_t queue(std::uint64_t n) {
    ran_ = 0;
    seen_.store(0, std::memory_order_relaxed);
    for (std::uint64_t i = 0; i < n; ++i) {
      jobs_[i].number = i;
      const auto e = domain_.call(jobs_[i], &run);
      if (e == mmunotify::errc::ok) continue;
      if (e != mmunotify::errc::again) fail("call in %s failed", name_);
      ++refused_;
      self->note(count::refused);
      return i;
    }
    return n;
  }

  static void run(mmunotify::srcu_head* h) noexcept {
    job& j = *static_cast<job*>(h);
    numbered_calls& l = *j.home;
    // A forked child loses the callback that the parent was running.
    if (j.number != l.ran_ && !is_child.load(std::memory_order_relaxed))
      fail("callbacks of %s run in another order than they were queued in", l.name_);
    ++l.ran_;
    if (l.sleepy_ && j.number % 16 == 5) l.domain_.synchronize();
    l.seen_.fetch_add(1, std::memory_order_release);  // (c2) pairs with (c1)
  }

  Domain& domain_;
  const char* name_;
  const bool sleepy_;
  std::unique_ptr<job[]> jobs_;
  std::uint64_t ran_ = 0;  ///< plain: of the callbacks, and of the owner after them
  std::uint64_t refused_ = 0;
  std::atomic<std::uint64_t> seen_{0};
};

}  // namespace torture
