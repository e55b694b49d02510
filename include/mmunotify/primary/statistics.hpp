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
  std::uint64_t skipped_pinned = 0;  ///< pages that an operation left alone because they were on loan
  std::uint64_t copied = 0;          ///< pages copied because they were shared and somebody wrote: copy on write
  std::uint64_t forked = 0;          ///< pages that a child got, shared or copied
  std::uint64_t merged = 0;          ///< pages that gave up their frame for an equal one
  std::uint64_t collapsed = 0;       ///< blocks that became one huge page, not counting map_huge
  std::uint64_t split = 0;           ///< huge pages that became small ones
  std::uint64_t to_device = 0;       ///< pages taken to the device's memory
  std::uint64_t from_device = 0;     ///< pages brought back
  std::uint64_t made_exclusive = 0;  ///< pages whose owner got exclusive access
  std::uint64_t revoked = 0;         ///< exclusive accesses that ended because the processor came
  std::uint64_t reaped = 0;          ///< pages reaped
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
  copied,
  forked,
  merged,
  collapsed,
  split,
  to_device,
  from_device,
  made_exclusive,
  revoked,
  reaped,
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
    s.copied = get(counter::copied);
    s.forked = get(counter::forked);
    s.merged = get(counter::merged);
    s.collapsed = get(counter::collapsed);
    s.split = get(counter::split);
    s.to_device = get(counter::to_device);
    s.from_device = get(counter::from_device);
    s.made_exclusive = get(counter::made_exclusive);
    s.revoked = get(counter::revoked);
    s.reaped = get(counter::reaped);
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
