// SPDX-License-Identifier: MIT
#pragma once

// Splitting large leaves in place, before anybody has to: a log of writes is kept by 4 KiB, so large leaves must go
// when it begins. Without this they are zapped, and every vCPU faults on each of its pages, all at the same moment.
//
// A leaf is replaced by a link to a table whose leaves map the same frames with the same rights. Nobody loses a
// translation, so nothing is flushed: vCPUs go on with what they have cached of either. (But for a table that is there
// already, whose leaves may have lost rights since: nobody may go on with more than they allow.) Accessed and dirty
// bits are taken at the moment of the exchange and inherited by all parts: a vCPU may have cached the right to write
// because the large leaf was dirty, and who clears dirty bits must find one to know that it has to flush. What could
// not be executed for its size alone (mmu_options::nx_huge) can be once it is small.
//
// It runs in batches: what is needed is allocated without the MMU lock, a few leaves are split under it, and so on. It
// is done as well as possible: when memory or the limit of pages is short, what is left is zapped by the log, as ever.
//
// References: Linux arch/x86/kvm/mmu (kvm_mmu_slot_try_split_huge_pages: eager page splitting).

#include <cstddef>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/memslot.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Large leaves that are split under one hold of the lock, 512 entries each.
inline constexpr std::size_t split_batch = 2;

/// The bits of a large leaf of this level, as those of its nth part: the same frames, the same bits.
constexpr std::uint64_t part_of(std::uint64_t leaf, unsigned level, unsigned n) noexcept {
  return leaf + (n * frames_at(level - 1) << page_shift);
}

/// Of shadow tables.
class leaf_splitter {
 public:
  /// What a batch may need.
  struct supply {
    stock<shadow_page> pages;
    stock<rmap_chunk> chunks;

    /// Context: without the MMU lock.
    bool fill() noexcept { return pages.fill(split_batch) == errc::ok && chunks.fill(per_leaf) == errc::ok; }
  };

  explicit leaf_splitter(shadow_tables& tables) noexcept : tables_(tables) {}

  /// Effects: some of the slot's large leaves are made of smaller ones. Returns: whether there may be more to do.
  /// Precondition: the slot keeps no log. Context: MMU lock; commit() follows.
  bool split_some(memslot& slot, supply& from) noexcept {
    while (from.pages.size() > 0 && from.chunks.size() >= per_leaf) {
      unsigned level = 0;
      entry_list* const leaves = slot.large_mappings(level);
      if (leaves == nullptr) return false;
      if (tables_.index_.size() + fault_stock::enough >= tables_.max_pages_) return false;
      split(slot, leaves->first(), from);
    }
    return true;
  }

 private:
  /// A chunk for each part, which may be mapped elsewhere already, and one for the link.
  static constexpr std::size_t per_leaf = entries_per_table + 1;

  void split(memslot& slot, entry_place at, supply& from) noexcept {
    shadow_page& p = *at.page;
    const gfn first = p.leaf_frame(at.index);
    const shadow_entry leaf = p.load(at.index);
    if (p.generation != tables_.generation_) return static_cast<void>(tables_.drop(p, at.index));  // on its way out
    const auto withheld = static_cast<std::uint8_t>((leaf.may_write() ? rights::write_bit : 0) |
                                                    (leaf.may_execute() ? rights::execute_bit : 0));
    const rights r = changed(leaf.allows(), withheld, 0);
    const page_role role = p.role.part_below(r, leaf.guest_user(), leaf.key());
    shadow_page& below = page_for(first, role, from);
    // A vCPU may add bits until now: the last value counts.
    const shadow_entry was = p.exchange(at.index, shadow_entry::link(below));
    slot.remove_mapping(first, p.role.level(), at, tables_.spare_chunks_);
    below.parents.add(at, from.chunks);
    for (unsigned n = 0; n < entries_per_table; ++n) fill(slot, below, n, was, from);
    tables_.counters_.add(mmu_counters::split);
  }

  /// As shadow_tables::get for a direct page.
  shadow_page& page_for(gfn first, page_role role, supply& from) noexcept {
    if (shadow_page* const known = tables_.index_.find(first, role, tables_.generation_); known != nullptr) {
      tables_.request_flush();
      return *known;
    }
    shadow_page& p = from.pages.pop();
    p.begin(first, role, tables_.generation_);
    tables_.index_.insert(p);
    return p;
  }

  /// Effects: entry n of the page is that part of the leaf. One that is there stays, and is as old as the leaf was.
  void fill(memslot& slot, shadow_page& p, unsigned n, shadow_entry leaf, supply& from) noexcept {
    constexpr bool forgets = detail::mutated(detail::mutation::split_forgets_bits);
    constexpr std::uint64_t history = shadow_entry::accessed_bit | shadow_entry::dirty_bit;
    const unsigned level = p.role.level();
    if (const shadow_entry e = p.load(n); e.present()) {
      if (e.is_leaf()) p.entries[n].fetch_or(leaf.bits() & history, std::memory_order_relaxed);
      return;
    }
    const gfn frame = p.frame + n * frames_at(level);
    if (slot.mappings(frame, level).count() + 1 >= entry_list::recycle_at) {
      return tables_.request_flush();  // its own fault will see to it
    }
    tables_.drop(p, n);  // what it remembers of MMIO
    slot.add_mapping(frame, level, {&p, n}, from.chunks);
    p.leaf_frames[n].store(frame.value, std::memory_order_relaxed);
    ++p.present;
    shadow_entry part(part_of(leaf.bits(), level + 1, n));
    if (level == 1 && part.may_execute())
      part = part.without(shadow_entry::may_execute_bit | shadow_entry::no_execute_bit);
    p.exchange(n, forgets ? part.without(history) : part);
  }

  shadow_tables& tables_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
