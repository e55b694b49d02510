// SPDX-License-Identifier: MIT
#pragma once

// A device that is working cannot be stopped just now: what a start has to wait for, and why it may refuse.

#include <atomic>
#include <thread>

namespace adapters {

class busy {
 public:
  /// While it lives, the device cannot be stopped.
  class hold {
   public:
    explicit hold(busy& b) noexcept : busy_(b) { b.holds_.fetch_add(1); }
    ~hold() { busy_.holds_.fetch_sub(1); }
    hold(const hold&) = delete;
    hold& operator=(const hold&) = delete;

   private:
    busy& busy_;
  };

  explicit operator bool() const noexcept { return holds_.load() != 0; }
  void wait() const noexcept {
    while (*this) std::this_thread::yield();
  }

 private:
  std::atomic<unsigned> holds_{0};
};

}  // namespace adapters
