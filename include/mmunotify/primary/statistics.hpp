// SPDX-License-Identifier: MIT
#pragma once

// What a reference_mmu has done, as numbers.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// Counts since construction. Each is exact; together they are one moment only when nobody changes anything.
struct primary_statistics {
  std::uint64_t faults = 0;          ///< pages brought in: zero_filled + swapped_in
  std::uint64_t zero_filled = 0;     ///< pages touched for the first time
  std::uint64_t swapped_in = 0;      ///< pages brought back from the swap store
  std::uint64_t swapped_out = 0;     ///< pages taken to the swap store
  std::uint64_t migrated = 0;        ///< pages moved to another frame
  std::uint64_t moved = 0;           ///< pages moved to another address
  std::uint64_t unmapped = 0;        ///< frames and swap slots whose page was unmapped, not counting exit
  std::uint64_t skipped_pinned = 0;  ///< pages that swap_out or migrate left alone because they were on loan
  std::uint64_t brackets = 0;        ///< brackets opened, armed or not
  std::uint64_t pins = 0;            ///< references lent by pin
  std::uint64_t unpins = 0;          ///< references given back
  std::uint64_t stale_writes = 0;    ///< freed frames found written when they were used again; must be 0
};

namespace detail {

enum class counter : std::size_t {
  zero_filled,
  swapped_in,
  swapped_out,
  migrated,
  moved,
  unmapped,
  skipped_pinned,
  brackets,
  pins,
  unpins,
  count
};

/// The counters behind it. One object for all threads: whoever counts has just taken the primary's lock, next to which
/// an addition is nothing.
class primary_counters {
 public:
  void add(counter c, std::uint64_t n = 1) noexcept {
    values_[static_cast<std::size_t>(c)].fetch_add(n, std::memory_order_relaxed);
  }

  primary_statistics read() const noexcept {
    primary_statistics s;
    s.zero_filled = get(counter::zero_filled);
    s.swapped_in = get(counter::swapped_in);
    s.faults = s.zero_filled + s.swapped_in;
    s.swapped_out = get(counter::swapped_out);
    s.migrated = get(counter::migrated);
    s.moved = get(counter::moved);
    s.unmapped = get(counter::unmapped);
    s.skipped_pinned = get(counter::skipped_pinned);
    s.brackets = get(counter::brackets);
    s.pins = get(counter::pins);
    s.unpins = get(counter::unpins);
    return s;
  }

 private:
  std::uint64_t get(counter c) const noexcept {
    return values_[static_cast<std::size_t>(c)].load(std::memory_order_relaxed);
  }

  std::atomic<std::uint64_t> values_[static_cast<std::size_t>(counter::count)] = {};
};

}  // namespace detail

MMUNOTIFY_END_NAMESPACE
