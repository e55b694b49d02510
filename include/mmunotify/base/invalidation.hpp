// SPDX-License-Identifier: MIT
#pragma once

// What a callback is told about the bracket it is in (Linux: struct mmu_notifier_range).

#include <cstdint>

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
};

using invalidation = basic_invalidation<std::uintptr_t>;

MMUNOTIFY_END_NAMESPACE
