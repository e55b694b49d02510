// SPDX-License-Identifier: MIT
#pragma once

// The fault path of a direct MMU: from a guest-physical access to a leaf.
//
// Stock up, snapshot, slot, pin, all without a lock; then, with the lock *shared*, check again that no bracket over the
// page is open or has run (K1), and install by compare-exchange. Brackets hold the lock exclusively. So any number of
// vCPUs fault at the same time, and each of them before or after a bracket, never beside it.
//
// A leaf that is there goes on allowing what it allows: only what flushes takes rights away.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <shared_mutex>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/direct_leaves.hpp>
#include <mmunotify/secondary/x86/direct_tables.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/options.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/prefetch.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

template <frame_provider Provider, direct_format Format>
class direct_fault_path {
 public:
  direct_fault_path(Provider& provider, memslots& slots, mmu_window& window, direct_leaves<Format>& leaves,
                    mmu_counters& counters, const mmu_options& o) noexcept
      : provider_(provider),
        slots_(slots),
        window_(window),
        leaves_(leaves),
        counters_(counters),
        prefetch_(o.prefetch),
        nx_huge_(o.nx_huge) {}

  /// Effects: one attempt to make the access possible. Context: a vCPU's thread, outside guest mode; may sleep.
  outcome fault(table_stock& stock, gpa a, bool write, bool fetch = false) noexcept {
    counters_.add(mmu_counters::faults);
    if (leaves_.released()) return {.what = outcome::released};
    if (leaves_.restock(stock) != errc::ok) return {.what = outcome::no_memory};
    const gfn f = frame_of(a);
    const auto since = window_.read_begin();  // before the look-ups: both are checked against it under the lock
    const host_page at = slots_.lookup(f);
    if (!at || (write && at.read_only) || f.value >= tables::frame_limit) return {outcome::not_mapped, {}, a};
    const frame_lease lease = provider_.pin(at.address, write);
    if (!lease) return outcome_of(lease.error, a);
    const outcome o = lease.frame.value >= leaves_.frame_limit || (write && !lease.writable)
                          ? outcome{outcome::not_mapped, {}, a}
                          : install({f, write, fetch, since, at, lease}, stock);
    provider_.unpin(lease.frame);
    if (o.what == outcome::again) counters_.add(mmu_counters::retries);
    return o;
  }

 private:
  using tables = direct_tables<Format>;
  /// A page that was looked up.
  struct looked_up {
    gfn frame;
    bool write;
    bool fetch;
    mmu_window::snapshot since;
    host_page at;
    frame_lease lease;

    bool writable() const noexcept { return !at.read_only && lease.writable; }
  };

  outcome install(const looked_up& page, table_stock& stock) noexcept {
    unsigned level = host_level(provider_, page.at, page.lease.frame, page.frame);
    const bool executes = nx_huge_ && page.fetch && level > 1 && !detail::mutated(detail::mutation::nx_huge_fetched);
    if (executes) level = 1;
    neighbour_pins<Provider> around(provider_, slots_, window_);
    if (prefetch_ && (level == 1 || slots_.logs(page.frame))) look_around(page.frame, around);
    {
      const std::shared_lock locked{leaves_.lock()};
      if (leaves_.released()) return {.what = outcome::released};
      const bool same_slot = memslots::lookup_in(slots_.current(), page.frame) == page.at;
      if (!same_slot || window_.retry(page.since, page_range(page.at.address))) return {.what = outcome::again};
      const memslot& slot = *slots_.current().find(page.frame);
      while (level > 1 && !fits(slot, page, level)) --level;
      if (put(slot, page, level, stock)) {
        put_around(around);
        if (executes && fits(slot, page, 2)) note_executed(page.frame);
        return {};
      }
    }
    // A larger leaf is in the way that may not say what this one would.
    const std::lock_guard locked{leaves_.lock()};
    if (memslot* const slot = slots_.current().find(page.frame); slot != nullptr) {
      leaves_.zap(*slot, page.frame, page.frame + 1);
    }
    leaves_.commit();
    return {.what = outcome::again};
  }

  bool fits(const memslot& s, const looked_up& page, unsigned level) noexcept {
    const std::uint64_t inside = frames_at(level) - 1;
    return s.may_be_large(page.frame, level) && ((page.lease.frame.value ^ page.frame.value) & inside) == 0 &&
           !window_.retry(page.since, leaves_.host_range(s, aligned_to(page.frame, level), level));
  }

  /// Effects: the leaf is in its place, as large as it may be; where there are smaller ones already, it is as small.
  /// Returns: false: a larger leaf is in the way. Context: the lock, shared.
  bool put(const memslot& slot, const looked_up& page, unsigned level, table_stock& stock) noexcept {
    constexpr std::uint64_t kept = Format::accessed_bit | Format::dirty_bit | Format::write_bit | direct_may_write_bit;
    const bool withheld = page.writable() && !page.write && slot.logs(dirty_tracking::write_protect);
    while (true) {
      const auto place = leaves_.tree().make(page.frame, level, stock);
      if (place.level != level) return false;
      std::uint64_t seen = place.value;
      if (Format::present(seen) && !Format::maps(seen, level)) {
        --level;
        continue;
      }
      const pfn frame{page.lease.frame.value - (page.frame - aligned_to(page.frame, level))};
      const std::uint64_t used = Format::accessed_bit | (page.write ? Format::dirty_bit : 0);
      std::uint64_t leaf = (Format::leaf(frame, page.writable(), level) | used) & ~(withheld ? Format::write_bit : 0);
      if (level > 1 && nx_huge_ && !detail::mutated(detail::mutation::nx_huge_fetched)) {
        leaf = not_executable<Format>(leaf);
      }
      if (Format::present(seen)) leaf |= seen & kept;
      // (dt1) release pairs with (dt2).
      if (place.entry->compare_exchange_strong(seen, leaf, std::memory_order_release, std::memory_order_relaxed)) break;
    }
    counters_.add(mmu_counters::installs);
    if (level > 1) counters_.add(mmu_counters::large);
    if (page.writable() && !withheld && slot.logs(dirty_tracking::write_protect)) slot.mark_dirty(page.frame);
    return true;
  }

  /// Effects: the table of the frame counts as one that is executed from. Context: the lock, shared.
  void note_executed(gfn f) noexcept {
    if (const auto at = leaves_.tree().find(f, 2); at.level == 2 && !Format::maps(at.value, 2)) {
      at.entry->fetch_or(direct_executed_bit, std::memory_order_relaxed);
    }
  }

  // --- Prefetch. ----------------------------------------------------------------------------------------------------

  /// Effects: pins what may be mapped beside the frame, and is not.
  void look_around(gfn f, neighbour_pins<Provider>& around) noexcept {
    if constexpr (prefetch_provider<Provider>) {
      const gfn first{f.value & ~std::uint64_t{prefetch_group - 1}};
      unsigned empty = 0;
      {
        const read_section reading{slots_.domain()};
        for (unsigned i = 0; i < prefetch_group; ++i) {
          if (first + i != f && !Format::present(leaves_.tree().find(first + i).value)) empty |= 1U << i;
        }
      }
      for (unsigned i = 0; empty >> i != 0; ++i) {
        if ((empty >> i & 1) != 0) around.add(i, first + i);
      }
    }
  }
  /// Context: the lock, shared; the table is there.
  void put_around(const neighbour_pins<Provider>& around) noexcept {
    for (const auto& n : around.found()) {
      if (n.lease.frame.value >= leaves_.frame_limit || !around.stands_locked(n)) continue;
      const auto place = leaves_.tree().find(n.frame);
      std::uint64_t nothing = 0;
      if (place.level != 1 || place.value != nothing) continue;
      const bool writable = !n.at.read_only && n.lease.writable;
      const bool logs = slots_.current().find(n.frame)->logs(dirty_tracking::write_protect);
      const std::uint64_t leaf = Format::leaf(n.lease.frame, writable, 1) & ~(logs ? Format::write_bit : 0);
      // (dt1) release pairs with (dt2).
      if (place.entry->compare_exchange_strong(nothing, leaf, std::memory_order_release, std::memory_order_relaxed)) {
        counters_.add(mmu_counters::prefetched);
      }
    }
  }

  Provider& provider_;
  memslots& slots_;
  mmu_window& window_;
  direct_leaves<Format>& leaves_;
  mmu_counters& counters_;
  const bool prefetch_;
  const bool nx_huge_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
