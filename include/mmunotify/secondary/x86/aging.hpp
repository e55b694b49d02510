// SPDX-License-Identifier: MIT
#pragma once

// Has the guest used these pages? Without the MMU lock: whoever looks for pages to reclaim asks all the time, about
// everything, and must not hold up faults.
//
// What makes it right: slots and shadow pages keep their memory until the flush domain's grace period, and this runs in
// a section of it; lists of more than one entry are locked by a bit of their own (rmap.hpp). An entry that goes away
// meanwhile answers or not, which is as if the question had come a moment earlier or later. Clearing an accessed bit of
// an entry that has become a link or an MMIO entry since changes nothing: those have no such bit.
//
// Cost: what is mapped in the range. Progress: blocking only for the few loads that a list's bit is held.

#include <atomic>
#include <cstdint>

#include <mmunotify/base/range.hpp>
#include <mmunotify/base/young_batch.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

enum class ageing : std::uint8_t { test, clear };

/// Returns: whether a leaf of the range was accessed since the last clearing. Effects: clear: they count as not
/// accessed from now on, but for what TLBs hold.
inline bool young(const memslots& slots, srcu_domain& flush_domain, range r, ageing how) noexcept {
  const read_section reading{flush_domain};
  bool any = false;
  const auto look = [&](entry_place at) noexcept {
    if (how == ageing::test) {
      any = any || at.page->load(at.index).accessed();
    } else {
      constexpr std::uint64_t bit = shadow_entry::accessed_bit;
      any = (at.page->entries[at.index].fetch_and(~bit, std::memory_order_relaxed) & bit) != 0 || any;
    }
  };
  slots.current().for_each_in(r, [&](memslot& s, gfn first, gfn last) {
    s.for_each_mapped(first, last, [&](unsigned, gfn, entry_list& l) {
      if (!any || how == ageing::clear) l.for_each_unlocked(look);
    });
  });
  return any;
}

/// Effects: marks each page of the batch that a leaf has accessed, and clears if the batch says so. A large leaf has
/// one accessed bit: all of its pages are young, or none.
inline void young_pages(const memslots& slots, srcu_domain& flush_domain, young_batch& batch) noexcept {
  const read_section reading{flush_domain};
  slots.current().for_each_in(batch.range(), [&](memslot& s, gfn first, gfn last) {
    s.for_each_mapped(first, last, [&](unsigned level, gfn f, entry_list& l) {
      bool any = false;
      l.for_each_unlocked([&](entry_place at) noexcept {
        constexpr std::uint64_t bit = shadow_entry::accessed_bit;
        auto& entry = at.page->entries[at.index];
        const std::uint64_t was =
            batch.clear() ? entry.fetch_and(~bit, std::memory_order_relaxed) : entry.load(std::memory_order_relaxed);
        any = any || (was & bit) != 0;
      });
      for (std::uint64_t i = 0; any && i < frames_at(level); ++i) {
        if (s.config().contains(f + i)) batch.mark(static_cast<std::uintptr_t>(s.config().host_of(f + i).value));
      }
    });
  });
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
