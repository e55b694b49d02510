// SPDX-License-Identifier: MIT
#pragma once

// Half-open ranges [first, last) over any ordered key.
//
// One byte of overlap hits; ranges that touch do not (contract C4). An empty range overlaps nothing, and neither does
// a reversed one: the entry points that take ranges refuse both.

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// What an address space can be keyed by: a host virtual address, a guest frame number, a file offset, an IOVA.
template <class K>
concept address_key = std::totally_ordered<K> && std::is_trivially_copyable_v<K> && sizeof(K) <= sizeof(std::uint64_t);

/// [first, last): `first` is in it, `last` is not.
template <address_key Key>
struct basic_range {
  Key first{};
  Key last{};

  friend constexpr bool operator==(const basic_range&, const basic_range&) = default;

  /// Nothing is in it. A range that wraps around the end of the key space is reversed, and so empty.
  constexpr bool empty() const noexcept { return !(first < last); }
  constexpr bool contains(const Key& k) const noexcept { return !(k < first) && k < last; }
  constexpr bool contains(const basic_range& r) const noexcept { return !(r.first < first) && !(last < r.last); }
  constexpr bool overlaps(const basic_range& r) const noexcept {
    return first < r.last && r.first < last && !empty() && !r.empty();
  }
  /// The common part; empty if there is none.
  constexpr basic_range clipped_to(const basic_range& r) const noexcept {
    return {std::max(first, r.first), std::min(last, r.last)};
  }
  /// The smallest range that contains both; neither may be empty.
  constexpr basic_range hull_with(const basic_range& r) const noexcept {
    return {std::min(first, r.first), std::max(last, r.last)};
  }
};

/// Ranges of host virtual addresses, the default key.
using range = basic_range<std::uintptr_t>;

static_assert(address_key<std::uintptr_t> && std::is_trivially_copyable_v<range>);

MMUNOTIFY_END_NAMESPACE
