// SPDX-License-Identifier: MIT
#pragma once

// Objects on stock, so that nothing is allocated under the MMU lock.
//
// Problem. A fault links page tables and reverse mappings under the lock that the notifier's callbacks take. An
// allocation there can fail half-way, can sleep, and can even call back: an allocator that returns memory to the system
// unmaps it, which is a bracket of its own. So a fault stocks up with the most that it can need *before* it takes the
// lock, and what is taken down under the lock goes to a stock, not to the allocator.
//
// Not synchronised: a stock belongs to one thread, or is used under the MMU lock.

#include <cstddef>
#include <new>
#include <utility>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// A stack of unused objects. T has a member `T* next_spare`, which is the stock's while the object is in it.
template <class T>
class stock {
 public:
  stock() = default;
  stock(const stock&) = delete;
  stock& operator=(const stock&) = delete;
  ~stock() { trim(0); }

  std::size_t size() const noexcept { return size_; }

  /// Effects: allocates until n are on stock. Returns: ok, or no_memory; what was allocated stays. Context: may sleep.
  errc fill(std::size_t n) noexcept {
    while (size_ < n) {
      T* fresh = new (std::nothrow) T;
      if (fresh == nullptr) return errc::no_memory;
      push(*fresh);
    }
    return errc::ok;
  }

  /// Effects: gives back to the allocator what exceeds n. Context: not under the MMU lock.
  void trim(std::size_t n) noexcept {
    while (size_ > n) delete &pop();
  }

  void push(T& object) noexcept {
    object.next_spare = std::exchange(head_, &object);
    ++size_;
  }

  /// Precondition: size() > 0.
  [[nodiscard]] T& pop() noexcept {
    T& object = *head_;
    head_ = std::exchange(object.next_spare, nullptr);
    --size_;
    return object;
  }

  /// Effects: moves objects from `from` until n are here or `from` has no more.
  void take_from(stock& from, std::size_t n) noexcept {
    while (size_ < n && from.size_ > 0) push(from.pop());
  }

 private:
  T* head_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
