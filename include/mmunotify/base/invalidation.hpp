// SPDX-License-Identifier: MIT
#pragma once

// What a callback is told about the bracket it is in (Linux: struct mmu_notifier_range).

#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/event.hpp>
#include <mmunotify/base/range.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// One invalidation. The same values are passed to start and to end.
template <address_key Key>
struct basic_invalidation {
  basic_range<Key> range;
  mmunotify::event event = mmunotify::event::unmap;
  const void* owner = nullptr;  ///< who initiated it, for migrate and exclusive; null otherwise (never left unset)
  bool blockable = true;        ///< false: the callback must not sleep, and may refuse if its hook returns bool
  bool in_place = false;        ///< what changes will be told by change_entry: who has that hook need not let go
};

/// A translation that was replaced inside an in-place bracket.
template <address_key Key>
struct basic_entry_change {
  basic_range<Key> range;  ///< the pages that are translated anew
  pfn frame{};             ///< that of the first page; the others follow it
  bool writable = false;   ///< what the primary's entry allows now
};

using invalidation = basic_invalidation<std::uintptr_t>;
using entry_change = basic_entry_change<std::uintptr_t>;

MMUNOTIFY_END_NAMESPACE
