// SPDX-License-Identifier: MIT
#pragma once

// The shadow page tables of a VM: building them, taking them down, and ageing them. All of it under the MMU lock.
//
// What always holds when the lock is free (verify.hpp checks it):
//   - a present leaf is in the reverse mapping of its guest frame, and nothing else is;
//   - a present link is in the parents of the page it links, and nothing else is;
//   - every page is in the index, once; a frame that has an indirect page is mapped writable nowhere;
//   - no vCPU has cached, in its TLB or in a walk, a translation that is gone or reduced in the tables: whoever takes
//     something away flushes before it gives the lock back. So "nothing mapped" in the tables is "nothing usable"
//     anywhere, and an invalidation that finds nothing need not flush (K3).
// Hence the two steps of every removal: take out of the tables and remember that a flush is due; then commit(), which
// flushes once and only then lets memory be used again.
//
// Nothing here allocates or frees: a fault brings its stock, what is taken down goes to the spares.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/memory_cache.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/rmap.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// What one fault can need at most under the lock: a page per level, and a node for each link and for the leaf.
struct fault_stock {
  static constexpr std::size_t enough = 5;
  stock<shadow_page> pages;
  stock<rmap_node> nodes;

  bool full() const noexcept { return pages.size() >= enough && nodes.size() >= enough; }
  errc fill() noexcept {
    const errc e = pages.fill(enough);
    return e != errc::ok ? e : nodes.fill(enough);
  }
};

class shadow_tables {
 public:
  /// Guest writes to a shadowed table, without a fault through it, after which it is taken for something else.
  static constexpr unsigned write_flood = 3;

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

  // --- Building. ----------------------------------------------------------------------------------------------------

  /// Effects: makes sure that a fault finds room for its pages under the limit; the oldest ones go.
  void make_room() noexcept {
    while (index_.size() > 0 && index_.size() + fault_stock::enough > max_pages_) zap_page(*index_.oldest());
    commit();
  }

  /// Returns: the page of this frame and role. Effects: makes it if need be; before the first entry of a guest table
  /// can be shadowed, the frame is write-protected wherever it is mapped, and no vCPU has a writable translation left.
  shadow_page& get(gfn frame, const page_role& role, fault_stock& from) noexcept {
    if (shadow_page* const known = index_.find(frame, role); known != nullptr) {
      known->unheard_writes = 0;
      return *known;
    }
    shadow_page& p = from.pages.pop();
    p.frame = frame;
    p.role = role;
    p.unheard_writes = 0;
    index_.insert(p);
    if (!role.direct) {
      write_protect(frame);
      commit();
    }
    return p;
  }

  /// Effects: entry i of the parent links the child. Precondition: the stock has a node.
  void link(shadow_page& parent, unsigned i, shadow_page& child, fault_stock& from) noexcept {
    const shadow_entry wanted = shadow_entry::link(child);
    if (parent.load(i) == wanted) return;
    drop(parent, i);
    child.parents.add({&parent, i}, from.nodes);
    ++parent.present;
    parent.exchange(i, wanted);
  }

  /// Effects: entry i maps the frame. Rights that the entry loses are flushed by commit().
  /// Preconditions: a page of level 1; a slot holds the frame; the stock has a node.
  void map(shadow_page& p, unsigned i, gfn frame, shadow_entry leaf, fault_stock& from) noexcept {
    const shadow_entry now = p.load(i);
    if (now.present() && (now.frame() != leaf.frame() || p.leaf_frames[i] != frame.value)) drop(p, i);
    if (!p.load(i).present()) {
      slots_.current().find(frame)->mappings(frame).add({&p, i}, from.nodes);
      p.leaf_frames[i] = frame.value;
      ++p.present;
    }
    const shadow_entry was = p.exchange(i, leaf);
    if (was.present() && !covers(leaf.allows(), was.allows())) flush_due_ = true;
    counters_.add(mmu_counters::installs);
  }

  // --- Taking down; each leaves the flush to commit(). --------------------------------------------------------------

  /// Effects: no leaf maps a frame that is backed by a byte of the range.
  void zap_host_range(range r) noexcept {
    slots_.current().for_each_in(r, [&](memslot& s, gfn first, gfn last) {
      for (gfn f = first; f < last; f = f + 1) zap_frame(s.mappings(f));
    });
  }

  /// Effects: nothing maps a frame of the slot or shadows a table in it.
  void zap_slot(memslot& s) noexcept {
    for (gfn f = s.config().base; f < s.config().end(); f = f + 1) zap_frame(s.mappings(f));
    index_.for_each([&](shadow_page& p) {
      if (s.config().contains(p.frame)) zap_page(p);
    });
  }

  /// Effects: the guest has written entries first..last of the table in this frame: exactly their shadows go. A table
  /// that is written again and again and used by no fault is shadowed no more. Returns: whether it was shadowed.
  bool zap_written(gfn frame, unsigned first, unsigned last) noexcept {
    if (!index_.tracked(frame)) return false;
    counters_.add(mmu_counters::tracked_writes);
    index_.for_each_of(frame, [&](shadow_page& p) {
      if (p.role.direct) return;
      if (++p.unheard_writes > write_flood) return zap_page(p);
      for (unsigned i = first; i <= last; ++i) drop(p, i);
    });
    return true;
  }

  void zap_everything() noexcept {
    index_.for_each([&](shadow_page& p) { zap_page(p); });
  }

  /// Effects: flushes if something was taken away since the last time; what was unlinked may be used again.
  void commit() noexcept {
    if (!flush_due_) return;
    flush_due_ = false;
    gate_.flush_locked();
    counters_.add(mmu_counters::flushes);
    spare_pages_.take_from(retired_, SIZE_MAX);
  }

  // --- Ageing. ------------------------------------------------------------------------------------------------------

  enum class ageing { test, clear, clear_and_flush };

  /// Returns: whether a leaf of the range was accessed. The flush, if one is asked for, is commit()'s.
  bool young(range r, ageing how) noexcept {
    bool any = false;
    slots_.current().for_each_in(r, [&](memslot& s, gfn first, gfn last) {
      for (gfn f = first; f < last && !(any && how == ageing::test); f = f + 1) {
        s.mappings(f).for_each([&](entry_place at) { any = young(at, how) || any; });
      }
    });
    return any;
  }

  // --- Spares. ------------------------------------------------------------------------------------------------------

  /// Effects: fills the stock from what was taken down; at most `keep` spare pages stay, the rest goes to `surplus`,
  /// which the caller frees without the lock.
  void restock(fault_stock& into, fault_stock& surplus) noexcept {
    constexpr std::size_t keep = 64;
    into.pages.take_from(spare_pages_, fault_stock::enough);
    into.nodes.take_from(spare_nodes_, fault_stock::enough);
    if (spare_pages_.size() > keep) surplus.pages.take_from(spare_pages_, spare_pages_.size() - keep);
    if (spare_nodes_.size() > keep) surplus.nodes.take_from(spare_nodes_, spare_nodes_.size() - keep);
  }

 private:
  friend class table_check;

  /// Effects: entry i is not present. Returns: whether it was.
  bool drop(shadow_page& p, unsigned i) noexcept {
    const shadow_entry was = p.exchange(i, {});
    if (!was.present()) return false;
    --p.present;
    flush_due_ = true;
    if (was.is_leaf()) {
      const gfn frame{p.leaf_frames[i]};
      slots_.current().find(frame)->mappings(frame).remove({&p, i}, spare_nodes_);
      counters_.add(mmu_counters::zapped);
    } else {
      was.child()->parents.remove({&p, i}, spare_nodes_);
    }
    return true;
  }

  void zap_frame(entry_list& mappings) noexcept {
    while (!mappings.empty()) {
      const entry_place at = mappings.first();
      drop(*at.page, at.index);
    }
  }

  /// Effects: the page is empty, unlinked, nobody's root, and out of the index; its memory waits for the flush.
  void zap_page(shadow_page& p) noexcept {
    for (unsigned i = 0; i < entries_per_table && p.present > 0; ++i) drop(p, i);
    while (!p.parents.empty()) {
      const entry_place at = p.parents.first();
      drop(*at.page, at.index);
    }
    gate_.for_each_locked([&](vcpu_port& port) {
      if (port.root() == &p) port.set_root(nullptr);
    });
    index_.remove(p);
    retired_.push(p);
    flush_due_ = true;  // somebody may be walking it
    counters_.add(mmu_counters::pages_zapped);
  }

  void write_protect(gfn frame) noexcept {
    memslot* const s = slots_.current().find(frame);
    if (s == nullptr) return;
    s->mappings(frame).for_each([&](entry_place at) {
      const shadow_entry was = clear_bits(at, shadow_entry::write_bit);
      if (!was.allows().writable()) return;
      flush_due_ = true;
      counters_.add(mmu_counters::write_protected);
    });
  }

  bool young(entry_place at, ageing how) noexcept {
    if (how == ageing::test) return at.page->load(at.index).accessed();
    const bool was = clear_bits(at, shadow_entry::accessed_bit).accessed();
    if (was && how == ageing::clear_and_flush) flush_due_ = true;
    return was;
  }

  static shadow_entry clear_bits(entry_place at, std::uint64_t bits) noexcept {
    return shadow_entry(at.page->entries[at.index].fetch_and(~bits, std::memory_order_relaxed));
  }

  std::mutex lock_;
  memslots& slots_;
  flush_gate& gate_;
  mmu_counters& counters_;
  const std::size_t max_pages_;
  page_index index_;
  stock<shadow_page> retired_;      ///< unlinked; walkers may still be inside
  stock<shadow_page> spare_pages_;  ///< free since a flush
  stock<rmap_node> spare_nodes_;
  bool flush_due_ = false;
  std::atomic<bool> released_{false};
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
