// SPDX-License-Identifier: MIT
#pragma once

// Strong addresses and frame numbers.
//
// A guest virtual, a guest physical and a host virtual address are all 64 bits wide and mean entirely different
// things; half of the bugs of a shadow MMU are one of them passed as another. Each has a type of its own here: they
// compare and differ with their own kind, move by byte counts, and convert only by name.

#include <compare>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

inline constexpr unsigned page_shift = 12;
inline constexpr std::uint64_t page_size = std::uint64_t{1} << page_shift;
inline constexpr std::uint64_t page_mask = page_size - 1;

/// A byte address in the space that Space names. Trivial, ordered, 8 bytes.
template <class Space>
struct address {
  std::uint64_t value = 0;

  constexpr auto operator<=>(const address&) const = default;
  /// Moves by bytes, modulo 2^64.
  friend constexpr address operator+(address a, std::uint64_t bytes) noexcept { return {a.value + bytes}; }
  friend constexpr address operator-(address a, std::uint64_t bytes) noexcept { return {a.value - bytes}; }
  /// Distance in bytes, modulo 2^64.
  friend constexpr std::uint64_t operator-(address a, address b) noexcept { return a.value - b.value; }
  /// The first byte of the 4 KiB page.
  constexpr address page() const noexcept { return {value & ~page_mask}; }
  /// The offset in the 4 KiB page.
  constexpr std::uint64_t offset() const noexcept { return value & page_mask; }
};

/// A 4 KiB frame number in the physical space that Space names.
template <class Space>
struct frame_number {
  std::uint64_t value = 0;

  constexpr auto operator<=>(const frame_number&) const = default;
  friend constexpr frame_number operator+(frame_number f, std::uint64_t frames) noexcept { return {f.value + frames}; }
  friend constexpr std::uint64_t operator-(frame_number a, frame_number b) noexcept { return a.value - b.value; }
};

struct guest_virtual;
struct guest_physical;
struct host_virtual;
struct host_physical;

using gva = address<guest_virtual>;
using gpa = address<guest_physical>;
using hva = address<host_virtual>;
using gfn = frame_number<guest_physical>;
/// A host frame. What the number means is the frame provider's business; the library never dereferences it.
using pfn = frame_number<host_physical>;

/// The frame that holds the byte.
template <class Space>
constexpr frame_number<Space> frame_of(address<Space> a) noexcept {
  return {a.value >> page_shift};
}

/// The frame's first byte.
template <class Space>
constexpr address<Space> base_of(frame_number<Space> f) noexcept {
  return {f.value << page_shift};
}

/// Keys whose pages can be told apart: numbers of bytes, strong addresses, frame numbers.
template <class Key>
concept byte_key = (std::unsigned_integral<Key> && sizeof(Key) >= 4) || requires(Key k) {
  { k.page() } -> std::same_as<Key>;
};
template <class Key>
concept paged_key = byte_key<Key> || requires(Key k, Key other, std::uint64_t n) {
  { k + n } -> std::same_as<Key>;
  { k - other } -> std::same_as<std::uint64_t>;
};

/// One page, in the key's unit.
template <paged_key Key>
inline constexpr std::uint64_t page_of_keys = byte_key<Key> ? page_size : 1;

MMUNOTIFY_END_NAMESPACE

template <class Space>
struct std::hash<mmunotify::address<Space>> {
  std::size_t operator()(mmunotify::address<Space> a) const noexcept { return std::hash<std::uint64_t>{}(a.value); }
};

template <class Space>
struct std::hash<mmunotify::frame_number<Space>> {
  std::size_t operator()(mmunotify::frame_number<Space> f) const noexcept {
    return std::hash<std::uint64_t>{}(f.value);
  }
};
