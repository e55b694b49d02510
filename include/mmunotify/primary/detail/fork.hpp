// SPDX-License-Identifier: MIT
#pragma once

// fork: a child gets the parent's areas and pages (Linux: dup_mmap, copy_page_range).
//
// Pages are shared, and write-protected in both: whoever writes first gets a copy. So the parent's translations change,
// and each of its areas that has pages is bracketed with event::protection_page. The child has had no translations, and
// is not bracketed. Not shared but copied at once, for the child:
//   - pages on loan that were the parent's alone: who borrowed one may write, and goes on to;
//   - pages in the device's memory: the parent's stay there, the child's are in frames.
// Pages that a device has for itself become the processor's again first, in the same bracket.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/event.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/detail/huge.hpp>
#include <mmunotify/primary/paged_memory.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <class Core>
class forking {
 public:
  /// Context: the tables of both are held exclusive.
  forking(Core& parent, Core& child) noexcept : parent_(parent), child_(child) {}

  /// Errors: overlap (the child has areas), no_memory; nothing has changed then.
  errc run() noexcept {
    if (!child_.memory.areas().items().empty()) return errc::overlap;
    area_list areas;
    const bool copied = parent_.memory.areas().changed(
        {}, [](area&) {}, areas);
    if (!copied || !plan()) {
      paged_memory::give_back(copies_, frames());
      child_.memory.prune(paged_memory::whole());
      return errc::no_memory;
    }
    for (const area& a : parent_.memory.areas().items()) share_area(a.range);
    paged_memory::give_back(copies_, frames());
    child_.memory.areas().swap(areas);
    return errc::ok;
  }

 private:
  frame_pool& frames() noexcept { return parent_.memory.frames(); }

  bool needs_copy(page_entry e) noexcept {
    return e.device() || (e.present() && frames().sole(e.frame()) && frames().on_loan(e.frame()));
  }

  /// Makes the child's entries, and allocates for the pages that are copied. Loans of pages that are the parent's alone
  /// can only become fewer from here on.
  bool plan() noexcept {
    std::size_t n = 0;
    const auto value = [](const page_slot& slot) { return page_entry{slot.load(std::memory_order_relaxed)}; };
    table().for_each(paged_memory::whole(),
                     [&](std::uintptr_t, page_slot& slot) { n += needs_copy(value(slot)) ? 1U : 0U; });
    if (!copies_.reserve(n)) return false;
    bool enough = true;
    table().for_each(paged_memory::whole(), [&](std::uintptr_t a, page_slot& slot) {
      enough = enough && child_.memory.table().reach(a) != nullptr;
      if (!enough || copies_.size() == n || !needs_copy(value(slot))) return;
      const pfn target = frames().allocate();
      enough = target != frame_pool::none;
      if (enough) copies_.push_back({&slot, target});
    });
    return enough;
  }

  void share_area(const range& r) noexcept {
    bool any = false;
    table().for_each(r, [&](std::uintptr_t, page_slot&) { any = true; });
    if (!any) return;
    parent_.change(r, event::protection_page, nullptr, [&](withdrawn_pages&) {
      table().for_each(r, [&](std::uintptr_t a, page_slot& slot) { share_page(a, slot); });
      table().for_each_huge(r, [&](std::uintptr_t block) {
        if (is_block(child_.memory.table(), block)) child_.memory.table().set_huge(block);
      });
    });
  }

  void share_page(std::uintptr_t a, page_slot& slot) noexcept {
    locked_entry from{slot};
    if (from.value.exclusive()) {
      frames().set_owner(from.value.frame(), nullptr);
      from.value = from.value.without(page_entry::exclusive_bit).with(page_entry::present_bit);
      parent_.memory.counters().add(counter::revoked);
    }
    if constexpr (!mutated(mutation::fork_keeps_writable)) from.value = from.value.without(page_entry::writable_bit);
    const bool planned = next_ < copies_.size() && copies_[next_].slot == &slot;
    pfn* const target = planned ? &copies_[next_].target : nullptr;
    next_ += planned ? 1U : 0U;
    page_entry to = from.value.without(page_entry::writable_bit | page_entry::young_bit);
    if (target != nullptr && (from.value.device() || frames().on_loan(from.value.frame()))) {
      to = copy(from.value, *target);
    } else {
      (from.value.swapped() ? parent_.memory.swap() : frames()).share(from.value.frame());
    }
    child_.memory.table().reach(a)->store(to.bits, std::memory_order_relaxed);  // nobody else is in the child
    parent_.memory.counters().add(counter::forked);
  }

  page_entry copy(page_entry old, pfn& target) noexcept {
    frame_pool& pool = old.device() ? parent_.memory.device() : frames();
    load_bytes(frames().data(target), pool.data(old.frame()), page_size);  // a borrower may be writing at this moment
    frames().install(target);
    const page_entry made = page_entry::mapping(target, false).with(old.bits & page_entry::soft_dirty_bit);
    target = frame_pool::none;
    return made;
  }

  page_table& table() noexcept { return parent_.memory.table(); }

  Core& parent_;
  Core& child_;
  paged_memory::page_jobs copies_;  ///< in the order of addresses
  std::size_t next_ = 0;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
