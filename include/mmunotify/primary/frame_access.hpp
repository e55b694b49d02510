// SPDX-License-Identifier: MIT
#pragma once

// How software that plays the hardware touches the contents of a frame.
//
// A frame is read and written by several parties at once: the primary, and every secondary that maps it. Real memory
// gives each aligned word in one piece and promises nothing across words; so do these functions. Aligned eight-byte
// words move as relaxed atomics, the ragged ends byte by byte as relaxed atomics: parties that all have the right to
// touch the frame never race in the eyes of the language or of ThreadSanitizer.
//
// The wholesale copies of migration and swapping are plain on purpose: at that moment nobody else has a right to the
// frame, and whoever touches it nevertheless is a data race that ThreadSanitizer reports. (For that it must see them:
// gcc makes string instructions of a memcpy of known size, past the sanitizer. So the size is hidden from it there.)

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// What one access to a frame moves in one piece: the entry sizes of the guest tables that we know.
template <class T>
concept frame_word = std::same_as<T, std::uint32_t> || std::same_as<T, std::uint64_t>;

/// The word at this place in a frame, as an atomic.
/// Preconditions: `at` is aligned to sizeof(Word).
template <frame_word Word>
std::atomic_ref<Word> word_at(std::byte* at) noexcept {
  return std::atomic_ref<Word>(*reinterpret_cast<Word*>(at));
}

namespace detail {

/// Calls f(offset, bytes in one piece: 8 or 1) for the pieces of n bytes that begin at `frame`.
template <class Function>
void for_each_piece(const std::byte* frame, std::size_t n, Function f) noexcept {
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(frame) % 8;
  const std::size_t head = misaligned == 0 ? 0 : std::min(n, 8 - misaligned);
  std::size_t i = 0;
  for (; i < head; i += 1) f(i, std::size_t{1});
  for (; n - i >= 8; i += 8) f(i, std::size_t{8});
  for (; i < n; i += 1) f(i, std::size_t{1});
}

/// page_size; under ThreadSanitizer the compiler does not know that.
inline std::size_t opaque_page_size() noexcept {
  std::size_t n = page_size;
#if MMUNOTIFY_TSAN
  asm("" : "+r"(n));
#endif
  return n;
}

}  // namespace detail

/// Copies a page with plain accesses. Preconditions: nobody else has a right to either, but to read `from`.
inline void copy_page(std::byte* to, const std::byte* from) noexcept {
  std::memcpy(to, from, detail::opaque_page_size());
}

/// Fills a page with plain accesses. Preconditions: nobody else has a right to it.
inline void fill_page(std::byte* page, std::byte value) noexcept {
  std::memset(page, static_cast<int>(value), detail::opaque_page_size());
}

/// Copies n bytes out of a frame. Each aligned word is one of the values it had; words are not ordered.
/// Preconditions: the n bytes lie in one frame. Progress: wait-free.
inline void load_bytes(std::byte* to, std::byte* frame, std::size_t n) noexcept {
  detail::for_each_piece(frame, n, [=](std::size_t at, std::size_t size) {
    if (size == 8) {
      const std::uint64_t word = word_at<std::uint64_t>(frame + at).load(std::memory_order_relaxed);
      std::copy_n(reinterpret_cast<const std::byte*>(&word), 8, to + at);
    } else {
      to[at] = std::atomic_ref<std::byte>(frame[at]).load(std::memory_order_relaxed);
    }
  });
}

/// Copies n bytes into a frame. Each aligned word changes in one piece; words are not ordered.
/// Preconditions: the n bytes lie in one frame. Progress: wait-free.
inline void store_bytes(std::byte* frame, const std::byte* from, std::size_t n) noexcept {
  detail::for_each_piece(frame, n, [=](std::size_t at, std::size_t size) {
    if (size == 8) {
      std::uint64_t word = 0;
      std::copy_n(from + at, 8, reinterpret_cast<std::byte*>(&word));
      word_at<std::uint64_t>(frame + at).store(word, std::memory_order_relaxed);
    } else {
      std::atomic_ref<std::byte>(frame[at]).store(from[at], std::memory_order_relaxed);
    }
  });
}

MMUNOTIFY_END_NAMESPACE
