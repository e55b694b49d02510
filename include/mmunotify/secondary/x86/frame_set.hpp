// SPDX-License-Identifier: MIT
#pragma once

// A set of small numbers that finds its next member in a few words, however far away that is.
//
// Problem. An invalidation names a range, and a slot may have a million frames of which three are mapped: looking at
// each frame's reverse mapping makes the cost a matter of the range. Here a tree of bits says which frames have one:
// bit i of a word of level n+1 is set if word i of level n is not zero. The next member is found by going up until a
// word has a bit to the right, and down again: two words per level, four levels for 16 million frames.
//
// Memory: 1.016 bits per number. Changes: one thread at a time (the MMU lock). Readers without it may miss what is
// being added or see what is being removed.

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

class frame_set {
 public:
  static constexpr std::uint64_t none = ~std::uint64_t{0};

  frame_set() = default;
  frame_set(const frame_set&) = delete;
  frame_set& operator=(const frame_set&) = delete;

  /// Effects: an empty set of numbers below n. Returns: false: no memory. Precondition: called once.
  bool make(std::uint64_t n) noexcept {
    std::uint64_t total = 0;
    for (std::uint64_t words = n; levels_ == 0 || words > 1; ++levels_) {
      if (levels_ == max_levels) return false;
      words = (words + 63) / 64;
      first_[levels_] = total;
      words_of_[levels_] = words;
      total += words;
    }
    words_.reset(new (std::nothrow) std::atomic<std::uint64_t>[total]());
    return words_ != nullptr;
  }

  bool contains(std::uint64_t i) const noexcept { return (word(0, i / 64) >> (i % 64) & 1) != 0; }

  void insert(std::uint64_t i) noexcept {
    for (unsigned l = 0; l < levels_; ++l, i /= 64) {
      auto& w = at(l, i / 64);
      const std::uint64_t was = w.load(std::memory_order_relaxed);
      w.store(was | std::uint64_t{1} << (i % 64), std::memory_order_relaxed);
      if (was != 0) return;
    }
  }
  void erase(std::uint64_t i) noexcept {
    for (unsigned l = 0; l < levels_; ++l, i /= 64) {
      auto& w = at(l, i / 64);
      const std::uint64_t now = w.load(std::memory_order_relaxed) & ~(std::uint64_t{1} << (i % 64));
      w.store(now, std::memory_order_relaxed);
      if (now != 0) return;
    }
  }

  /// Returns: the smallest member that is not below i, or none. Progress: wait-free.
  std::uint64_t next(std::uint64_t i) const noexcept {
    for (unsigned l = 0; l < levels_; ++l, i = i / 64 + 1) {
      for (; i / 64 < words_of_[l]; ++i) {
        const std::uint64_t right = word(l, i / 64) >> (i % 64);
        if (right == 0) break;
        i += static_cast<unsigned>(std::countr_zero(right));
        const std::uint64_t found = first_below(l, i);
        if (found != none) return found;  // else it was removed meanwhile: try the next bit
      }
    }
    return none;
  }

  /// Calls f(i) for each member of [first, last), in order; f may remove members.
  template <class F>
  void for_each_in(std::uint64_t first, std::uint64_t last, F&& f) const {
    for (std::uint64_t i = next(first); i < last; i = next(i + 1)) f(i);
  }

 private:
  static constexpr unsigned max_levels = 8;

  std::atomic<std::uint64_t>& at(unsigned l, std::uint64_t i) noexcept { return words_[first_[l] + i]; }
  std::uint64_t word(unsigned l, std::uint64_t i) const noexcept {
    return words_[first_[l] + i].load(std::memory_order_relaxed);
  }
  /// The smallest member below bit i of level l. A bit above may outlive what it stands for by a moment.
  std::uint64_t first_below(unsigned l, std::uint64_t i) const noexcept {
    if (l == 0) return i;
    for (std::uint64_t left = word(l - 1, i); left != 0; left &= left - 1) {
      const std::uint64_t found = first_below(l - 1, i * 64 + static_cast<unsigned>(std::countr_zero(left)));
      if (found != none) return found;
    }
    return none;
  }

  std::unique_ptr<std::atomic<std::uint64_t>[]> words_;
  std::array<std::uint64_t, max_levels> first_{};     ///< where a level's words begin
  std::array<std::uint64_t, max_levels> words_of_{};  ///< and how many there are
  unsigned levels_ = 0;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
