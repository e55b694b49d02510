// SPDX-License-Identifier: MIT
#pragma once

// What the callbacks of an interval are told: `range` is what the bracket and the interval have in common (C10).

#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// A client's hook may take this, or const basic_invalidation<Key>&.
template <address_key Key>
struct basic_interval_invalidation : basic_invalidation<Key> {
  basic_range<Key> unclipped;  ///< that of the bracket
};

using interval_invalidation = basic_interval_invalidation<std::uintptr_t>;

namespace detail {

/// The part of a bracket that lies in the interval's range. Precondition: they overlap.
template <address_key Key>
basic_interval_invalidation<Key> clipped(const basic_invalidation<Key>& i, const basic_range<Key>& interval) noexcept {
  basic_interval_invalidation<Key> mine{i, i.range};
  mine.range = i.range.clipped_to(interval);
  return mine;
}

/// The part of a change that lies in the interval's range: `frame` is that of its first page. Precondition: they
/// overlap.
template <paged_key Key>
basic_entry_change<Key> clipped(const basic_entry_change<Key>& c, const basic_range<Key>& interval) noexcept {
  const auto page_of = [](Key k) { return static_cast<std::uint64_t>(k - Key{}) / page_of_keys<Key>; };
  const basic_range<Key> mine = c.range.clipped_to(interval);
  return {mine, c.frame + (page_of(mine.first) - page_of(c.range.first)), c.writable};
}

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
