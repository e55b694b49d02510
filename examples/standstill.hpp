// SPDX-License-Identifier: MIT
#pragma once

// Threads that work, and now and then all stand still while one looks at what they have done.
//
// A worker is a member while it works, and calls pass() between two pieces of work; inside pass() it stands while
// somebody looks. No worker may wait, within a piece of work, for another one's next piece.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>

class standstill {
 public:
  /// A thread's membership.
  class worker {
   public:
    explicit worker(standstill& s) : all_(s) {
      std::unique_lock lock(all_.mutex_);
      all_.changed_.wait(lock, [&] { return !all_.wanted_.load(std::memory_order_relaxed); });
      ++all_.moving_;
    }
    ~worker() {
      const std::lock_guard lock(all_.mutex_);
      all_.stands_locked();
    }
    worker(const worker&) = delete;
    worker& operator=(const worker&) = delete;

    void pass() {
      // (ss1) acquire pairs with (ss2); what the look comes after, and what comes after it, is ordered by the mutex.
      if (!all_.wanted_.load(std::memory_order_acquire)) [[likely]]
        return;
      std::unique_lock lock(all_.mutex_);
      all_.stands_locked();
      all_.changed_.wait(lock, [&] { return !all_.wanted_.load(std::memory_order_relaxed); });
      ++all_.moving_;
    }

   private:
    standstill& all_;
  };

  /// Calls look() while no worker moves. Returns: false if one has not stopped within that time; then it did not look.
  /// One caller at a time.
  template <class Look>
  bool run(std::chrono::seconds patience, Look look) {
    std::unique_lock lock(mutex_);
    wanted_.store(true, std::memory_order_release);  // (ss2) pairs with (ss1)
    const bool still = changed_.wait_for(lock, patience, [&] { return moving_ == 0; });
    if (still) look();
    wanted_.store(false, std::memory_order_release);  // (ss2)
    changed_.notify_all();
    return still;
  }

 private:
  void stands_locked() {
    if (--moving_ == 0) changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t moving_ = 0;
  std::atomic<bool> wanted_{false};
};
