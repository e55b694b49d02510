// SPDX-License-Identifier: MIT
#pragma once

// Beginning, harvesting and ending the log of what a guest writes (dirty_log.hpp says what is kept). Under the MMU
// lock.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/dirty_log.hpp>
#include <mmunotify/secondary/x86/memslot.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Effects: the slot's leaves are as its log wants them. Log by write protection: none is writable; the first write to
/// each makes it so. By dirty bits: none is dirty. Large leaves go, so that writes are logged by 4 KiB; when the log
/// has ended, the 4 KiB parts of large guest leaves go, so that they can be mapped large again. Preconditions: the log
/// is in place. Context: MMU lock; commit() follows.
inline void follow_log(shadow_tables& tables, memslot& slot) noexcept {
  const dirty_log* const log = slot.log();
  slot.for_each_mapped([&](unsigned level, gfn, entry_list& l) {
    if (log == nullptr) {
      if (level == 1 && l.first().page->role.direct()) tables.zap_list(l);
    } else if (level > 1) {
      tables.zap_list(l);
    } else if (log->how() == dirty_tracking::write_protect) {
      l.for_each([&](entry_place at) { tables.clear(at, shadow_entry::write_bit); });
    } else {
      l.for_each([&](entry_place at) {
        if (tables.clear(at, shadow_entry::dirty_bit).dirty()) tables.request_flush();
      });
    }
  });
}

/// Effects: out[n] has a bit for each of the slot's frames 64 n to 64 n + 63 that was written since the last harvest;
/// they count as clean from now on. Returns: how many there are.
/// Preconditions: the slot keeps a log; out has dirty_log::words_for(pages) words. Context: MMU lock; commit() follows,
/// before anybody uses the answer.
inline std::uint64_t harvest(shadow_tables& tables, memslot& slot, std::span<std::uint64_t> out) noexcept {
  dirty_log& log = *slot.log();
  const gfn base = slot.config().base;
  if (log.how() == dirty_tracking::dirty_bits) {
    slot.for_each_mapped([&](unsigned, gfn f, entry_list& l) {
      l.for_each([&](entry_place at) {
        if (!tables.clear(at, shadow_entry::dirty_bit).dirty()) return;
        log.mark(f - base);
        tables.request_flush();
      });
    });
  }
  if (log.ring() != nullptr) log.ring()->reset_overflow();  // what does not fit from here on is still marked
  std::uint64_t total = 0;
  for (std::size_t n = 0; n < out.size(); ++n) {
    out[n] = log.take(n);
    total += static_cast<std::uint64_t>(std::popcount(out[n]));
    if (log.how() != dirty_tracking::write_protect) continue;
    for (std::uint64_t left = out[n]; left != 0; left &= left - 1) {
      const gfn f = base + (64 * n + static_cast<unsigned>(std::countr_zero(left)));
      slot.mappings(f).for_each([&](entry_place at) { tables.clear(at, shadow_entry::write_bit); });
    }
  }
  return total;
}

/// Effects: out[0] and on are frames of the slot that were written since they were harvested last; they count as clean
/// from now on. Returns: how many; fewer than out.size(): there are no more.
/// Preconditions: the slot keeps a log by write protection with a ring. Context: as harvest.
inline std::size_t harvest_ring(shadow_tables& tables, memslot& slot, std::span<gfn> out) noexcept {
  dirty_log& log = *slot.log();
  std::size_t n = 0;
  for (std::uint64_t i = 0; n < out.size() && log.ring()->pop(i);) {
    if (!log.take_one(i)) continue;  // a harvest of the bitmap has had it
    out[n] = slot.config().base + i;
    slot.mappings(out[n]).for_each([&](entry_place at) { tables.clear(at, shadow_entry::write_bit); });
    ++n;
  }
  return n;
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
