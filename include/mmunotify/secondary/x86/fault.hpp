// SPDX-License-Identifier: MIT
#pragma once

// The fault path: from a guest access to a shadow leaf, and a guest's write to its own page tables.
//
// In this order, because each step protects the next:
//    1 stock up                 everything that the lock-free part cannot allocate later
//    2 walk the guest's tables  permissions, reserved bits, accessed and dirty; each table stays pinned
//    3 snapshot, slot, pin      may sleep in the primary; then the lock-free hint whether it was in vain
//    4 MMU lock
//    5 check again (K1)         no bracket over the page is open or has run since the snapshot, the slot is the same;
//                               the same for each table, and each entry still has the value that the walk saw: read
//                               again after its table was write-protected, level by level while linking
//    6 install, reverse-map, unlock, unpin: from here the notifier alone protects the mapping
// A collision undoes nothing, since nothing was done but linking tables that are right for themselves: the outcome is
// `again`. Steps 2 and 3 may block on the primary and take its locks; 4 to 6 call nobody (K5). A guest write is done in
// the same order, and nothing is guessed from what it writes: the next fault reads it.
//
// Rights of the leaf: those of the guest's walk; not writable while the guest's dirty bit is clear (so that the first
// write comes here), if the host lent the frame read-only, or if the frame is a shadowed table. Where CR0.WP=0 lets the
// supervisor write what the guest's W forbids, the leaf is writable and not for users, and not executable under SMEP;
// the next user access brings it back.
//
// Size of the leaf: the guest's, unless the host's mapping, the slot (alignment, end), a shadowed table in the large
// frame, a log of its writes or a bracket over a part of it allow less; what is left of a large guest leaf is made of
// direct pages. A provider that has large frames says so by mapping_shift (large_frame_provider).
//
// A frame that no slot holds is MMIO. The leaf's place remembers that, with the generation of the slots, so that the
// next access is known to be MMIO without a walk of the guest's tables.

#include <array>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Modes that can be shadowed: 512 entries of 8 bytes in every table, as the shadow tables have.
template <class M>
concept shadowed_mode =
    paging_mode<M> && std::same_as<typename M::entry_type, std::uint64_t> && (M::levels == 4 || M::levels == 5);

static_assert(shadowed_mode<long_mode_4> && shadowed_mode<long_mode_5>);

/// A provider that has frames larger than 4 KiB.
///   mapping_shift(a)  log2 of the size of an aligned run of host pages around `a` that one aligned run of frames with
///                     consecutive numbers backs, all with the same rights; at least 12. May be stale on arrival: what
///                     ends it is bracketed over all of the run. Context: as pin, and a's page is pinned.
template <class P>
concept large_frame_provider = frame_provider<P> && requires(P& p, hva a) {
  { p.mapping_shift(a) } noexcept -> std::same_as<unsigned>;
};

/// What the fault path knows of a vCPU. Context: its owner thread, but for the port.
struct vcpu_state {
  walk_context context{};
  vcpu_port port{};
  fault_stock stock{};
};

template <frame_provider Provider, shadowed_mode Mode>
class fault_path {
 public:
  /// The role of the top shadow table of a processor in this state.
  static constexpr page_role root_role(const walk_context& c) noexcept {
    return page_role::root(c, Mode::levels, table_format::long_mode);
  }
  /// unsync: the guest may write lowest-level tables without being noticed, until it flushes (unsync.hpp).
  fault_path(backing<Provider> b, shadow_tables& tables, mmu_counters& counters, bool unsync = false) noexcept
      : backing_(b), tables_(tables), counters_(counters), unsync_(unsync) {}

  /// Effects: one attempt to make the access possible. Returns: done (a leaf that allows it was installed), or why not.
  /// Context: the vCPU's thread, outside guest mode, without the MMU lock; may sleep; not in a callback.
  outcome fault(vcpu_state& v, gva a, access how) noexcept {
    counters_.add(mmu_counters::faults);
    if (tables_.released()) return {.what = outcome::released};
    if (restock(v.stock) != errc::ok) return {.what = outcome::no_memory};
    walked_tables<Provider> tables(backing_);
    const walk_result walk = guest_walker<Mode>(v.context).walk(tables, a, how);
    switch (walk.status) {
      case walk_status::ok: return counted(resolve(v, a, how, walk, tables));
      case walk_status::page_fault: return {.what = outcome::page_fault, .code = walk.code};
      case walk_status::general_protection: return {.what = outcome::general_protection};
      case walk_status::memory_error: break;
    }
    return counted(outcome_of(tables.error(), walk.entry(walk.end_level).where));
  }

  /// Effects: writes guest memory for the guest, each aligned 8-byte word in one piece; where it hits a shadowed table,
  /// exactly the shadows of the entries that it touches are gone, on every vCPU, when it returns. (K5)
  /// Errors: bad_range (wraps), not_mapped (no slot, or the host has nothing), access_denied (read-only), released,
  /// no_memory; pages before the one that failed are written. Context: as fault.
  errc guest_write(gpa where, std::span<const std::byte> bytes) noexcept {
    if (bytes.size() > UINT64_MAX - where.value) return errc::bad_range;
    while (!bytes.empty()) {
      const auto room = static_cast<std::size_t>(page_size - where.offset());
      const auto piece = bytes.first(bytes.size() < room ? bytes.size() : room);
      const errc e = write_in_page(where, piece);
      if (e == errc::again) {
        counters_.add(mmu_counters::retries);
        std::this_thread::yield();
        continue;
      }
      if (e != errc::ok) return e;
      bytes = bytes.subspan(piece.size());
      where = where + piece.size();
    }
    return errc::ok;
  }

  /// Effects: tables that the guest had written freely when it is called are in step with their shadows: the guest has
  /// flushed its TLB. Context: as fault.
  void synchronise(const walk_context& c) noexcept {
    std::array<gfn, sync_batch> frames;
    for (std::size_t left = tables_.unsync_count(); left > 0; left -= left < sync_batch ? left : sync_batch) {
      std::size_t n = 0;
      {
        const std::lock_guard locked{tables_.lock()};
        n = tables_.unsync_frames(frames);
      }
      if (n == 0) return;
      synchronise(c, std::span(frames).first(n));
    }
  }

  /// Effects: the guest has flushed this address alone: its entry, if it may be out of step, is gone.
  /// Context: the vCPU's thread, outside guest mode, without the MMU lock.
  void invalidate(vcpu_state& v, gva a) noexcept {
    if (tables_.unsync_count() == 0) return;
    const std::lock_guard locked{tables_.lock()};
    shadow_page* p = v.port.root();
    for (unsigned level = Mode::levels; p != nullptr; --level) {
      const auto i = static_cast<unsigned>(Mode::index(a, level));
      if (level == 1) {
        if (p->unsync) tables_.drop(*p, i);
        break;
      }
      const shadow_entry e = p->load(i);
      p = e.present() && !e.is_leaf() ? e.child() : nullptr;
    }
    tables_.commit();
  }

 private:
  static constexpr std::size_t sync_batch = 4;

  void synchronise(const walk_context& c, std::span<const gfn> frames) noexcept {
    std::array<pinned_frame<Provider>, sync_batch> pins;
    for (std::size_t i = 0; i < frames.size(); ++i) {
      if (pins[i].pin(backing_, frames[i], false) != errc::ok) pins[i].reset();
    }
    const std::lock_guard locked{tables_.lock()};
    for (const gfn f : frames) tables_.protect_unsync(f);
    for (std::size_t i = 0; i < frames.size(); ++i) {
      const bool readable = pins[i] && pins[i].stands_locked(backing_);
      tables_.settle(frames[i], [&](const shadow_page& p, unsigned n, shadow_entry e) noexcept {
        return readable && p.role.read_like(root_role(c)) && follows(c, p, n, e, entry_of(pins[i], n));
      });
    }
  }

  static std::uint64_t entry_of(const pinned_frame<Provider>& table, unsigned n) noexcept {
    std::atomic_ref<std::uint64_t> word(reinterpret_cast<std::uint64_t*>(table.data())[n]);
    return word.load(std::memory_order_acquire);  // (bk2) pairs with (bk1)
  }

  /// Whether the guest's entry, as it is now, still allows all that the leaf does.
  static bool follows(const walk_context& c, const shadow_page& p, unsigned n, shadow_entry leaf,
                      std::uint64_t entry) noexcept {
    if constexpr (detail::mutated(detail::mutation::stale_sync)) return true;
    const std::uint64_t needed = pte::present | pte::accessed | (leaf.may_write() ? pte::dirty : 0);
    if ((entry & (Mode::reserved(1, c.format()) | needed)) != needed) return false;
    if (frame_of(Mode::frame(entry, 1)) != p.leaf_frame(n)) return false;
    const rights granted = rights_in(Mode::grants(entry, 1)) & p.role.access();
    if (leaf.may_write() && !granted.writable()) return false;
    return covers(granted, leaf.allows()) && leaf.guest_user() == granted.user();
  }

  outcome counted(outcome o) noexcept {
    if (o.what == outcome::again) counters_.add(mmu_counters::retries);
    return o;
  }

  errc restock(fault_stock& s) noexcept {
    if (s.full()) return errc::ok;
    fault_stock surplus;
    {
      const std::lock_guard locked{tables_.lock()};
      tables_.restock(s, surplus);
    }
    return s.fill();
  }

  /// The access is allowed: steps 3 to 6.
  outcome resolve(vcpu_state& v, gva a, access how, const walk_result& walk, walked_tables<Provider>& tables) noexcept {
    pinned_frame<Provider> page;
    const gfn frame = frame_of(walk.address);
    if (const errc e = page.pin(backing_, frame, is_write(how)); e != errc::ok) {
      const outcome o = outcome_of(e, walk.address);
      return page.at() || frame.value >= shadow_entry::frame_limit ? o : remember_mmio(v, a, how, walk, tables, o);
    }
    if (page.lease().frame.value >= shadow_entry::frame_limit) return outcome_of(errc::not_mapped, walk.address);
    const unsigned most = walk.end_level > 1 ? host_level(page) : 1;
    const std::lock_guard locked{tables_.lock()};
    if (tables_.released()) return {.what = outcome::released};
    const outcome o = install_locked(v, a, how, walk, tables, page, most);
    tables_.commit();
    return o;
  }

  /// The highest level at which the host has the page in one piece.
  unsigned host_level(const pinned_frame<Provider>& page) noexcept {
    if constexpr (large_frame_provider<Provider>) {
      const unsigned shift = backing_.provider.mapping_shift(page.at().address);
      return shift < 21 ? 1 : shift < 30 ? 2 : 3;
    } else {
      return 1;
    }
  }

  outcome install_locked(vcpu_state& v, gva a, access how, const walk_result& walk, walked_tables<Provider>& tables,
                         const pinned_frame<Provider>& page, unsigned most) noexcept {
    if (!page.stands_locked(backing_)) return {.what = outcome::again};
    tables_.make_room();
    const unsigned level = leaf_level_locked(walk, page, most);
    shadow_page* const last = descend_locked(v, a, how, walk, tables, level);
    if (last == nullptr) return {.what = outcome::again};
    bool tracked = tables_.tracked(page.frame());
    if (tracked && is_write(how) && unsync_ && tables_.try_unsync(page.frame())) tracked = false;
    if (tracked && is_write(how)) return {.what = outcome::write_tracked, .address = walk.address};
    // A table in the large frame may have been shadowed on the way down, as one of this walk's own.
    if (level > 1 && leaf_level_locked(walk, page, level) != level) return {.what = outcome::again};
    const shadow_entry leaf = leaf_for(v.context, how, walk, page, tracked, level);
    const auto i = static_cast<unsigned>(Mode::index(a, level));
    tables_.map(*last, i, aligned_to(page.frame(), level), leaf, v.stock);
    if (level > 1) counters_.add(mmu_counters::large);
    return {};
  }

  /// The level of the leaf: `most` at most, and less where slot, tables, log or brackets demand it.
  unsigned leaf_level_locked(const walk_result& walk, const pinned_frame<Provider>& page, unsigned most) noexcept {
    const gfn f = page.frame();
    const memslot& slot = *tables_.slots().find(f);
    for (unsigned level = most < walk.end_level ? most : walk.end_level; level > 1; --level) {
      const gfn first = aligned_to(f, level);
      if (!slot.may_be_large(f, level)) continue;
      if (((page.lease().frame.value ^ f.value) & (frames_at(level) - 1)) != 0) continue;
      const auto host = static_cast<std::uintptr_t>(slot.config().host_of(first).value);
      if (!backing_.window.retry(page.since(), {host, host + (frames_at(level) << page_shift)})) return level;
    }
    return 1;
  }

  /// No slot holds the frame. Effects: if that is still so, the place of the leaf remembers it. Returns: o, or `again`.
  outcome remember_mmio(vcpu_state& v, gva a, access how, const walk_result& walk, walked_tables<Provider>& tables,
                        const outcome& o) noexcept {
    const std::lock_guard locked{tables_.lock()};
    if (tables_.released()) return {.what = outcome::released};
    const gfn frame = frame_of(walk.address);
    if (tables_.slots().find(frame) != nullptr) return {.what = outcome::again};
    tables_.make_room();
    shadow_page* const last = descend_locked(v, a, how, walk, tables, 1);
    if (last != nullptr) {
      const rights r = leaf_rights(v.context, how, walk);
      const auto e = shadow_entry::mmio(frame, r, walk.granted.user(), tables_.slots().generation());
      tables_.map_mmio(*last, static_cast<unsigned>(Mode::index(a, 1)), e);
    }
    tables_.commit();
    return last != nullptr ? o : outcome{.what = outcome::again};
  }

  /// Links shadow pages down to the leaf's level. Returns: the page of that level, or nullptr if the guest or the host
  /// has changed a table.
  shadow_page* descend_locked(vcpu_state& v, gva a, access how, const walk_result& walk,
                              walked_tables<Provider>& tables, unsigned leaf_level) noexcept {
    shadow_page* p = v.port.root();
    if (p == nullptr) p = table_locked(frame_of(Mode::root(v.context.cr3)), root_role(v.context), v.stock);
    for (unsigned level = Mode::levels; p != nullptr; --level) {
      p->unheard_writes = 0;
      const bool direct = level <= walk.end_level;  // what is below this level is part of the guest's leaf
      // The table of this level is write-protected by now: what its entry says holds until the lock is released.
      if (level >= walk.end_level && !stands(tables, walk.entry(level))) return nullptr;
      if (level == Mode::levels) v.port.set_root(p);
      if (level == leaf_level) return p;
      const gfn below = direct ? first_frame(walk.address, level - 1)
                               : frame_of(Mode::table(static_cast<std::uint64_t>(walk.entry(level).value)));
      const page_role role = direct ? p->role.part_below(leaf_rights(v.context, how, walk), walk.granted.user())
                                    : p->role.table_below(guest_walker<Mode>::rights_above(walk, level - 1));
      shadow_page* child = linked(*p, static_cast<unsigned>(Mode::index(a, level)), below, role);
      if (child == nullptr) child = table_locked(below, role, v.stock);
      if (child != nullptr) tables_.link(*p, static_cast<unsigned>(Mode::index(a, level)), *child, v.stock);
      p = child;
    }
    return nullptr;
  }

  /// Returns: the page that entry i links, if it is this one. Another way to it would have to synchronise it first.
  static shadow_page* linked(const shadow_page& p, unsigned i, gfn below, page_role role) noexcept {
    const shadow_entry e = p.load(i);
    if (!e.present() || e.is_leaf()) return nullptr;
    shadow_page* const child = e.child();
    return child->frame == below && child->role == role ? child : nullptr;
  }

  static bool stands(walked_tables<Provider>& tables, const walked_entry& e) noexcept {
    return detail::mutated(detail::mutation::no_entry_recheck) || tables.unchanged_locked(e);
  }

  /// Returns: the page, or nullptr if the table's slot has gone meanwhile.
  shadow_page* table_locked(gfn frame, page_role role, fault_stock& from) noexcept {
    if (!role.direct() && tables_.slots().find(frame) == nullptr) return nullptr;
    return &tables_.get(frame, role, from);
  }

  /// The first frame that a shadow table of this level maps, around the address.
  static constexpr gfn first_frame(gpa a, unsigned level) noexcept {
    const std::uint64_t covered = bit(Mode::page_shift(level)) * entries_per_table;
    return frame_of(gpa{a.value & ~(covered - 1)});
  }

  /// What the leaf may grant as far as the guest is concerned. Before its dirty bit is set: no writing.
  static constexpr rights leaf_rights(const walk_context& c, access how, const walk_result& walk) noexcept {
    if (is_write(how) && !walk.granted.writable()) {  // CR0.WP=0, by the supervisor
      const bool no_fetch = c.smep && walk.granted.user();
      return changed(walk.granted, rights::write_bit,
                     static_cast<std::uint8_t>(rights::user_bit | (no_fetch ? rights::execute_bit : 0)));
    }
    const bool dirty = walk.dirty() || is_write(how);  // a walk for writing has set it, or the table is ROM
    return changed(walk.granted, 0, dirty ? 0 : rights::write_bit);
  }

  shadow_entry leaf_for(const walk_context& c, access how, const walk_result& walk, const pinned_frame<Provider>& page,
                        bool tracked, unsigned level) noexcept {
    const bool read_only = tracked || page.at().read_only || !page.lease().writable;
    const rights r = changed(leaf_rights(c, how, walk), 0, read_only ? rights::write_bit : 0);
    const std::uint64_t used = shadow_entry::accessed_bit | (is_write(how) ? shadow_entry::dirty_bit : 0);
    const pfn first{page.lease().frame.value & ~(frames_at(level) - 1)};
    const shadow_entry leaf = shadow_entry::leaf(level > 1 ? first : page.lease().frame, r, walk.granted.user());
    const bool logs = tables_.slots().find(page.frame())->logs(dirty_tracking::write_protect);
    return leaf.with(used).without(logs && !is_write(how) ? shadow_entry::write_bit : 0);
  }

  errc write_in_page(gpa where, std::span<const std::byte> bytes) noexcept {
    if (tables_.released()) return errc::released;
    pinned_frame<Provider> page;
    if (const errc e = page.pin(backing_, frame_of(where), true); e != errc::ok) return e;
    const std::lock_guard locked{tables_.lock()};
    if (tables_.released()) return errc::released;
    if (!page.stands_locked(backing_)) return errc::again;
    const auto offset = static_cast<std::size_t>(where.offset());
    store_in_words(page.data(), offset, bytes);
    tables_.slots().find(page.frame())->mark_dirty(page.frame());
    const auto first = static_cast<unsigned>(offset / sizeof(std::uint64_t));
    const auto last = static_cast<unsigned>((offset + bytes.size() - 1) / sizeof(std::uint64_t));
    static_cast<void>(tables_.zap_written(page.frame(), first, last));
    tables_.commit();
    return errc::ok;
  }

  backing<Provider> backing_;
  shadow_tables& tables_;
  mmu_counters& counters_;
  const bool unsync_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
