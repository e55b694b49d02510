// SPDX-License-Identifier: MIT
#pragma once

// The shadow page tables of a VM: building them and taking them down. All of it under the MMU lock.
//
// What always holds when the lock is free (verify.hpp checks it):
//   - a present leaf is in the reverse mapping of its guest frame, at its level, and nothing else is;
//   - a present link is in the parents of the page it links, and nothing else is;
//   - every page is in the index, once; a frame that has an indirect page is part of no large leaf, and mapped writable
//     nowhere unless all its pages are marked to be out of step (unsync);
//   - no vCPU has cached, in its TLB or in a walk, a translation that is gone or reduced in the tables: whoever takes
//     something away flushes before it gives the lock back. So "nothing mapped" in the tables is "nothing usable"
//     anywhere, and an invalidation that finds nothing need not flush (K3);
//   - so an entry that was present is not made a leaf again before a flush: what a vCPU in guest mode has read of it
//     and its frame belongs together.
// Hence the two steps of every removal: take out of the tables and remember that a flush is due; then commit(), which
// flushes once and only then lets memory be used again.
//
// Nothing here allocates or frees: a fault brings its stock, what is taken down goes to the spares.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/memory_cache.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/rmap.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>
#include <mmunotify/secondary/x86/unsync.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

class shadow_tables {
 public:
  /// Guest writes to a shadowed table, without a fault through it, after which it is taken for something else.
  static constexpr unsigned write_flood = 3;
  /// Pages that are taken down under one hold of the lock when all of them go.
  static constexpr std::size_t batch = 10;

  shadow_tables(memslots& slots, flush_gate& gate, mmu_counters& counters, std::size_t max_pages) noexcept
      : slots_(slots), gate_(gate), counters_(counters), max_pages_(max_pages) {}
  shadow_tables(const shadow_tables&) = delete;
  shadow_tables& operator=(const shadow_tables&) = delete;
  /// Precondition: no vCPU is attached.
  ~shadow_tables() {
    zap_everything();
    spare_pages_.take_from(retired_, SIZE_MAX);
  }

  /// The MMU lock. Callbacks take it while the primary holds its own lock, so nobody calls the primary under it.
  std::mutex& lock() noexcept { return lock_; }

  /// Nothing may be mapped: the address space is gone. Written under the lock; a hint without it.
  bool released() const noexcept { return released_.load(std::memory_order_relaxed); }
  void set_released(bool r) noexcept { released_.store(r, std::memory_order_relaxed); }

  bool tracked(gfn frame) const noexcept { return index_.tracked(frame); }
  std::size_t page_count() const noexcept { return index_.size(); }
  /// Returns: the slots now. Context: MMU lock.
  const memslot_snapshot& slots() const noexcept { return slots_.current(); }

  // --- Building. ----------------------------------------------------------------------------------------------------

  /// Effects: makes sure that a fault finds room for its pages under the limit; the oldest ones go, some more of them
  /// than this fault needs, so that not every fault flushes.
  void make_room() noexcept {
    if (index_.size() + fault_stock::enough <= max_pages_) return;
    const std::size_t more = fault_stock::enough + max_pages_ / 16;
    while (index_.size() > 0 && index_.size() + more > max_pages_) zap_page(*index_.oldest());
    commit();
  }

  /// Returns: the page of this frame and role. Effects: makes it if need be; before the first entry of a guest table
  /// can be shadowed, the frame is write-protected wherever it is mapped, and no vCPU has a writable translation left.
  /// Preconditions: a slot holds the frame if the role has a table; the stock has a page.
  shadow_page& get(gfn frame, page_role role, fault_stock& from, const directory_registers& registers = {}) noexcept {
    if (shadow_page* const known = index_.find(frame, role, generation_, registers); known != nullptr) {
      known->unheard_writes = 0;
      // Who comes here anew has nothing of it in its TLB, so it may not see what is out of date.
      if (known->unsync) protect_unsync(frame), settle(frame, [](auto&, unsigned, shadow_entry) { return false; });
      return *known;
    }
    shadow_page& p = from.pages.pop();
    p.begin(frame, role, generation_, registers);
    index_.insert(p);
    if (role.has_table()) {
      if (memslot* const s = slots().find(frame); s != nullptr) {
        s->count_table(frame, 1);
        if constexpr (!detail::mutated(detail::mutation::no_write_tracking)) write_protect(*s, frame);
      }
      commit();
    }
    return p;
  }

  /// Effects: entry i of the parent links the child. Precondition: the stock has a chunk.
  void link(shadow_page& parent, unsigned i, shadow_page& child, fault_stock& from) noexcept {
    const shadow_entry wanted = shadow_entry::link(child);
    if (parent.load(i) == wanted) return;
    drop(parent, i);
    child.parents.add({&parent, i}, from.chunks);
    ++parent.present;
    parent.exchange(i, wanted);
  }

  /// Effects: entry i maps the frame, at the page's level. Rights that the entry loses are flushed by commit(). Where
  /// writes are logged by write protection, a writable leaf counts as a write.
  /// Preconditions: a slot holds all of the frame; frame and leaf are aligned to the level; the stock has a chunk.
  void map(shadow_page& p, unsigned i, gfn frame, shadow_entry leaf, fault_stock& from) noexcept {
    shadow_entry now = p.load(i);
    if (now.present() && (!now.is_leaf() || now.frame() != leaf.frame() || p.leaf_frame(i) != frame)) {
      drop(p, i);
      commit();
      now = {};
    }
    memslot& slot = *slots().find(frame);
    if (!now.present()) {
      drop(p, i);  // what it remembers of MMIO
      entry_list& others = slot.mappings(frame, p.role.level());
      if (others.count() >= entry_list::recycle_at) zap_list(others);
      slot.add_mapping(frame, p.role.level(), {&p, i}, from.chunks);
      p.leaf_frames[i].store(frame.value, std::memory_order_relaxed);
      ++p.present;
    }
    const shadow_entry was = p.exchange(i, leaf);
    if (was.present() && (!covers(leaf.allows(), was.allows()) || leaf.key() != was.key())) flush_due_ = true;
    if (was.dirty() && !leaf.dirty() && slot.logs(dirty_tracking::dirty_bits)) slot.mark_dirty(frame);
    if (leaf.allows().writable() && slot.logs(dirty_tracking::write_protect)) slot.mark_dirty(frame);
    counters_.add(mmu_counters::installs);
  }

  /// Effects: entry i remembers that the guest maps a frame there that no slot holds.
  void map_mmio(shadow_page& p, unsigned i, shadow_entry mmio) noexcept {
    drop(p, i);
    ++p.mmio;
    p.exchange(i, mmio);
  }

  // --- Taking down; each leaves the flush to commit(). --------------------------------------------------------------

  /// Effects: no leaf maps a frame that is backed by a byte of the range. Cost: what is mapped there.
  void zap_host_range(range r) noexcept {
    slots().for_each_in(r, [&](memslot& s, gfn first, gfn last) {
      s.for_each_mapped(first, last, [&](unsigned, gfn, entry_list& l) { zap_list(l); });
    });
  }

  /// Effects: no leaf that maps such a frame can be written, nor made writable without a fault.
  void write_protect_host_range(range r) noexcept {
    constexpr bool weak = detail::mutated(detail::mutation::weak_downgrade);
    constexpr std::uint64_t lost = shadow_entry::write_bit | (weak ? 0 : shadow_entry::may_write_bit);
    slots().for_each_in(r, [&](memslot& s, gfn first, gfn last) {
      s.for_each_mapped(first, last, [&](unsigned, gfn, entry_list& l) {
        l.for_each([&](entry_place at) {
          if (clear(at, lost).allows().writable()) counters_.add(mmu_counters::downgraded);
        });
      });
    });
  }

  /// Effects: leaves that map a frame of the range map the frame that is behind its address now. Large leaves go.
  /// Precondition: no leaf of the range may be written.
  void change_host_range(const entry_change& c) noexcept {
    slots().for_each_in(c.range, [&](memslot& s, gfn first, gfn last) {
      s.for_each_mapped(first, last, [&](unsigned level, gfn f, entry_list& l) {
        const std::uint64_t offset = s.config().host_of(f).value - c.range.first;
        const pfn frame{c.frame.value + (offset >> page_shift)};
        if (level > 1 || frame.value >= shadow_entry::frame_limit) return zap_list(l);
        l.for_each([&](entry_place at) {
          at.page->replace_frame(at.index, frame);
          counters_.add(mmu_counters::replaced);
        });
        flush_due_ = true;
      });
    });
  }

  /// Effects: nothing maps a frame of the slot or shadows a table in it.
  void zap_slot(memslot& s) noexcept {
    s.for_each_mapped([&](unsigned, gfn, entry_list& l) { zap_list(l); });
    index_.for_each([&](shadow_page& p) {
      if (s.config().contains(p.frame)) zap_page(p);
    });
  }

  /// Effects: the guest has written bytes first..last of the table in this frame: exactly the shadows of the entries
  /// that they touch go. A table that is written again and again and used by no fault is shadowed no more.
  /// Returns: whether it was shadowed.
  bool zap_written(gfn frame, unsigned first, unsigned last) noexcept {
    if (!index_.tracked(frame)) return false;
    counters_.add(mmu_counters::tracked_writes);
    if constexpr (detail::mutated(detail::mutation::half_written_zap)) last = first;
    index_.for_each_of(frame, [&](shadow_page& p) {
      if (!p.role.has_table()) return;
      const auto touched = shadow_page::shadows_of(p.role, first, last);
      if (touched.first > touched.last) return;
      if (++p.unheard_writes > write_flood) return zap_page(p);
      for (unsigned i = touched.first; i <= touched.last; ++i) drop(p, i);
    });
    return true;
  }

  // --- Tables that the guest writes freely. -------------------------------------------------------------------------

  /// Returns: whether the guest may write the table in this frame without being noticed: all its shadows are of
  /// level 1. Effects: if so, they are out of step from now on, until settle().
  bool try_unsync(gfn frame) noexcept {
    bool lowest = true;
    index_.for_each_of(frame, [&](shadow_page& p) { lowest = lowest && (!p.role.has_table() || p.role.level() == 1); });
    if (!lowest) return false;
    index_.for_each_of(frame, [&](shadow_page& p) {
      if (p.role.has_table() && !p.unsync) unsync_.add(p);
    });
    return true;
  }
  /// Returns: pages that are out of step. Without the lock a hint: who has made one so himself sees it.
  std::size_t unsync_count() const noexcept { return unsync_.size(); }
  /// Effects: frames[0] and on are tables that are out of step, those that have been so longest first. Returns: how
  /// many.
  std::size_t unsync_frames(std::span<gfn> frames) const noexcept { return unsync_.oldest(frames); }

  /// Effects: the guest cannot write the table in this frame without being noticed.
  void protect_unsync(gfn frame) noexcept {
    if (memslot* const s = slots().find(frame); s != nullptr) write_protect(*s, frame);
    commit();
  }
  /// Effects: the shadows of the table in this frame are in step again: an entry stays if keep(page, i, entry) says
  /// that it still follows from the guest's. Precondition: protect_unsync came before, under the same hold of the lock.
  template <class Keep>
  void settle(gfn frame, Keep&& keep) noexcept {
    index_.for_each_of(frame, [&](shadow_page& p) {
      if (!p.unsync) return;
      for (unsigned i = 0; i < entries_per_table && p.present + p.mmio > 0; ++i) {
        const shadow_entry e = p.load(i);
        if (e.is_mmio() || (e.present() && !keep(p, i, e))) drop(p, i);
      }
      unsync_.remove(p);
      counters_.add(mmu_counters::resynced);
    });
    commit();
  }

  void zap_everything() noexcept {
    index_.for_each([&](shadow_page& p) { zap_page(p); });
  }

  /// Effects: nothing leads to the pages that there are; they are taken down by zap_obsolete. Cost: the vCPUs.
  void begin_generation() noexcept {
    ++generation_;
    gate_.for_each_locked([](vcpu_port& port) { port.forget_roots(); });
    flush_due_ = true;
  }
  /// Effects: takes down some pages of older generations. Returns: whether there are more.
  bool zap_obsolete() noexcept {
    // New pages are newer: the obsolete ones are the oldest.
    for (std::size_t n = 0; n < batch; ++n) {
      if (index_.oldest() == nullptr || index_.oldest()->generation == generation_) return false;
      zap_page(*index_.oldest());
    }
    return true;
  }

  /// Effects: up to n pages whose place a large leaf could take go, oldest first. Returns: how many.
  std::size_t zap_executed(std::size_t n) noexcept {
    const std::size_t before = index_.size();
    index_.for_each([&](shadow_page& p) {
      if (p.executed && before - index_.size() < n) zap_page(p);
    });
    return before - index_.size();
  }

  /// Effects: no entry remembers MMIO. For the generation that an old entry would be taken for one of.
  void zap_mmio() noexcept {
    index_.for_each([&](shadow_page& p) {
      for (unsigned i = 0; i < entries_per_table && p.mmio > 0; ++i) {
        if (p.load(i).is_mmio()) drop(p, i);
      }
    });
  }

  /// Effects: entry i is not present. Returns: whether it was.
  bool drop(shadow_page& p, unsigned i) noexcept {
    const shadow_entry was = p.exchange(i, {});
    if (!was.present()) {
      if (was.is_mmio()) --p.mmio;
      return false;
    }
    --p.present;
    flush_due_ = true;
    if (was.is_leaf()) {
      const gfn frame = p.leaf_frame(i);
      memslot& slot = *slots().find(frame);
      slot.remove_mapping(frame, p.role.level(), {&p, i}, spare_chunks_);
      if (was.dirty() && slot.logs(dirty_tracking::dirty_bits)) slot.mark_dirty(frame);
      counters_.add(mmu_counters::zapped);
    } else {
      was.child()->parents.remove({&p, i}, spare_chunks_);
    }
    return true;
  }

  void zap_list(entry_list& mappings) noexcept {
    while (!mappings.empty()) {
      const entry_place at = mappings.first();
      drop(*at.page, at.index);
    }
  }

  /// Effects: these bits of the leaf are clear; if it could be written and cannot any more, a flush is due.
  /// Returns: the leaf as it was.
  shadow_entry clear(entry_place at, std::uint64_t bits) noexcept {
    // (sp3) release pairs with (sp4).
    const shadow_entry was(at.page->entries[at.index].fetch_and(~bits, std::memory_order_release));
    if (was.allows().writable() && (bits & shadow_entry::write_bit) != 0) flush_due_ = true;
    return was;
  }

  void request_flush() noexcept { flush_due_ = true; }

  /// Effects: flushes if something was taken away since the last time; what was unlinked may be used again.
  void commit() noexcept {
    if (!flush_due_) return;
    flush_due_ = false;
    if constexpr (!detail::mutated(detail::mutation::no_shadow_flush)) gate_.flush_locked();
    counters_.add(mmu_counters::flushes);
    spare_pages_.take_from(retired_, SIZE_MAX);
  }

  // --- Spares. ------------------------------------------------------------------------------------------------------

  /// Effects: fills the stock from what was taken down; at most `keep` spare pages stay, the rest goes to `surplus`,
  /// which the caller frees without the lock.
  void restock(fault_stock& into, fault_stock& surplus) noexcept {
    constexpr std::size_t keep = 64;
    into.pages.take_from(spare_pages_, fault_stock::enough);
    into.chunks.take_from(spare_chunks_, fault_stock::enough_chunks);
    if (spare_pages_.size() > keep) surplus.pages.take_from(spare_pages_, spare_pages_.size() - keep);
    if (spare_chunks_.size() > keep) surplus.chunks.take_from(spare_chunks_, spare_chunks_.size() - keep);
  }

 private:
  friend class table_check;
  friend class leaf_splitter;

  /// Effects: the page is empty, unlinked, nobody's root, and out of the index; its memory waits for the flush.
  void zap_page(shadow_page& p) noexcept {
    for (unsigned i = 0; i < entries_per_table && p.present + p.mmio > 0; ++i) drop(p, i);
    while (!p.parents.empty()) {
      const entry_place at = p.parents.first();
      drop(*at.page, at.index);
    }
    gate_.for_each_locked([&](vcpu_port& port) { port.forget_root(p); });
    if (memslot* const s = p.role.has_table() ? slots().find(p.frame) : nullptr; s != nullptr)
      s->count_table(p.frame, -1);
    if (p.unsync) unsync_.remove(p);
    index_.remove(p);
    p.role = p.role.as_invalid();
    retired_.push(p);
    flush_due_ = true;  // somebody may be walking it
    counters_.add(mmu_counters::pages_zapped);
  }

  void write_protect(memslot& s, gfn frame) noexcept {
    s.mappings(frame).for_each([&](entry_place at) {
      const shadow_entry was = clear(at, shadow_entry::write_bit | shadow_entry::may_write_bit);
      if (was.allows().writable()) counters_.add(mmu_counters::write_protected);
    });
    for (unsigned level = 2; level <= top_leaf_level; ++level) zap_list(s.mappings(frame, level));
  }

  std::mutex lock_;
  memslots& slots_;
  flush_gate& gate_;
  mmu_counters& counters_;
  const std::size_t max_pages_;
  page_index index_;
  unsync_list unsync_;
  std::uint64_t generation_ = 0;
  stock<shadow_page> retired_;      ///< unlinked; walkers may still be inside
  stock<shadow_page> spare_pages_;  ///< free since a flush
  stock<rmap_chunk> spare_chunks_;
  bool flush_due_ = false;
  std::atomic<bool> released_{false};
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
