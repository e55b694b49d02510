// SPDX-License-Identifier: MIT
#pragma once

// A list of trivial values of a size that is known before it is filled, for the work that an operation plans before it
// changes anything. The first few live in the object, so that small operations allocate nothing; more are allocated
// once, without an exception, and a failure is an answer.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <class T, std::size_t Inline = 8>
  requires std::is_trivially_copyable_v<T>
class nothrow_array {
 public:
  nothrow_array() = default;
  nothrow_array(const nothrow_array&) = delete;
  nothrow_array& operator=(const nothrow_array&) = delete;

  /// Makes room for n values in an array that is empty. Returns: false when memory ran out.
  [[nodiscard]] bool reserve(std::size_t n) noexcept {
    if (n <= capacity_) return true;
    heap_.reset(n <= PTRDIFF_MAX / sizeof(T) ? new (std::nothrow) T[n] : nullptr);
    if (heap_ == nullptr) return false;
    items_ = heap_.get();
    capacity_ = n;
    return true;
  }

  bool empty() const noexcept { return size_ == 0; }
  bool full() const noexcept { return size_ == capacity_; }
  std::size_t size() const noexcept { return size_; }
  T& operator[](std::size_t i) noexcept { return items_[i]; }
  T* begin() noexcept { return items_; }
  T* end() noexcept { return items_ + size_; }
  /// Preconditions: not full().
  void push_back(const T& value) noexcept { items_[size_++] = value; }

 private:
  T inline_[Inline] = {};
  std::unique_ptr<T[]> heap_;
  T* items_ = inline_;
  std::size_t size_ = 0;
  std::size_t capacity_ = Inline;
};

MMUNOTIFY_END_NAMESPACE
