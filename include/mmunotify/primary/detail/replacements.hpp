// SPDX-License-Identifier: MIT
#pragma once

// The kinds in which pages are replaced: swapping out, migrating, to a device and back. What was soft-dirty stays so.

#include <mmunotify/primary/frame_pool.hpp>
#include <mmunotify/primary/page_table.hpp>
#include <mmunotify/primary/physical_memory.hpp>
#include <mmunotify/primary/statistics.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// How pages are replaced by others: which ones, from where, to where, and what stands for them then.
struct replacement {
  frame_pool& from;
  frame_pool& into;
  bool (*wanted)(page_entry) noexcept;
  page_entry (*made)(pfn target, page_entry old) noexcept;
  detail::counter counted;
  const void* of_owner = nullptr;  ///< only pages that were given to this one; null: any
  const void* given_to = nullptr;  ///< who owns the new ones
};

namespace detail {

inline bool is_present(page_entry e) noexcept { return e.present(); }

/// Present pages to the swap store.
inline replacement to_swap(physical_memory& m) noexcept {
  return {m.frames, m.swap, is_present,
          [](pfn slot, page_entry old) noexcept {
            return page_entry::swapped_to(slot).with(old.bits & page_entry::soft_dirty_bit);
          },
          counter::swapped_out};
}

/// Present pages to other frames. One that was shared is not, afterwards.
inline replacement to_other_frames(physical_memory& m) noexcept {
  return {m.frames, m.frames, is_present, [](pfn f, page_entry old) noexcept { return old.at(f); }, counter::migrated};
}

/// Present pages to the device's memory, for this owner.
inline replacement to_device(physical_memory& m, const void* owner) noexcept {
  return {m.frames,
          m.device,
          is_present,
          [](pfn page, page_entry old) noexcept {
            return page_entry::on_device(page).with(old.bits & page_entry::soft_dirty_bit);
          },
          counter::to_device,
          nullptr,
          owner};
}

/// The device's pages back to frames, those of one owner or all. The first write makes them writable.
inline replacement to_system(physical_memory& m, const void* owner = nullptr) noexcept {
  return {m.device,
          m.frames,
          [](page_entry e) noexcept { return e.device(); },
          [](pfn f, page_entry old) noexcept {
            return page_entry::mapping(f, true).with(old.bits & page_entry::soft_dirty_bit);
          },
          counter::from_device,
          owner};
}

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
