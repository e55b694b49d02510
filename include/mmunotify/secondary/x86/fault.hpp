// SPDX-License-Identifier: MIT
#pragma once

// The fault path: from a guest access to a shadow leaf.
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
// `again`. Steps 2 and 3 may block on the primary and take its locks; 4 to 6 call nobody (K5). What the guest does to
// its tables is in follow.hpp, in the same order; nothing is guessed from what it writes: the next fault reads it.
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
// With mmu_options::prefetch the empty places around a leaf of 4 KiB are filled as well: prefetch.hpp.
//
// With mmu_options::nx_huge a large leaf is not executable: a fetch makes what is around it small
// (shadow_page::executed), and it stays so until the owner has it recovered.
//
// A frame that no slot holds is MMIO. The leaf's place remembers that, with the generation of the slots, so that the
// next access is known to be MMIO without a walk of the guest's tables; not of a page with a protection key, for which
// that place has no room.

#include <concepts>
#include <cstdint>
#include <mutex>
#include <type_traits>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/follow.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/options.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/prefetch.hpp>
#include <mmunotify/secondary/x86/shadow_modes.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

template <frame_provider Provider, shadowed_modes Modes>
class fault_path {
 public:
  fault_path(backing<Provider> b, shadow_tables& tables, mmu_counters& counters, const mmu_options& o = {}) noexcept
      : backing_(b), tables_(tables), counters_(counters), options_(o) {}

  /// The same for a vCPU in another mode (nested_vcpu.hpp).
  template <walked_mode Mode>
  fault_path<Provider, Mode> in() const noexcept {
    return {backing_, tables_, counters_, options_};
  }

  /// Effects: one attempt to make the access possible. Returns: done (a leaf that allows it was installed), or why not.
  /// Context: the vCPU's thread, outside guest mode, without the MMU lock; may sleep; not in a callback.
  outcome fault(vcpu_state& v, gva a, access how) noexcept {
    counters_.add(mmu_counters::faults);
    if (tables_.released()) return {.what = outcome::released};
    if (restock(v.stock) != errc::ok) return {.what = outcome::no_memory};
    return in_mode<Modes>(
        v.mode, [&]<class Mode>(std::type_identity<Mode>) noexcept { return counted(fault_in<Mode>(v, a, how)); });
  }

 private:
  /// A fault, from step 2 on.
  template <walked_mode Mode>
  struct attempt {
    using tables_type = walked_tables<Provider, typename Mode::entry_type>;
    vcpu_state& v;
    gva a;
    access how;
    tables_type& tables;
    const walk_result& walk;
    bool executes = false;  ///< a part of what could be one large leaf, which may not be executed

    const walk_context& context() const noexcept { return v.context; }
    /// The part of the guest's leaf that an entry of this level stands for has no guest table below it. Without paging
    /// everything is a part of one leaf.
    bool in_leaf(unsigned level) const noexcept { return walk.end_level == 0 || level <= walk.end_level; }
    /// The protection key of the guest's leaf.
    unsigned key() const noexcept { return Mode::has_keys ? walk.protection_key() : 0; }
    /// The highest level that the guest's leaf would fill an entry of.
    unsigned leaf_level() const noexcept { return walk.end_level == 0 ? top_leaf_level : walk.end_level; }
  };

  template <walked_mode Mode>
  outcome fault_in(vcpu_state& v, gva address, access how) noexcept {
    const gva a = shadow_layout<Mode>::linear(address);
    typename attempt<Mode>::tables_type tables(backing_);
    const walk_result walk = guest_walker<Mode>(v.context).walk(tables, a, how);
    switch (walk.status) {
      case walk_status::ok: return resolve(attempt<Mode>{v, a, how, tables, walk});
      case walk_status::page_fault: return {.what = outcome::page_fault, .code = walk.code};
      case walk_status::general_protection: return {.what = outcome::general_protection};
      case walk_status::memory_error: break;
    }
    return outcome_of(tables.error(), walk.end_level > 0 ? walk.entry(walk.end_level).where : gpa{});
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
  template <walked_mode Mode>
  outcome resolve(attempt<Mode> t) noexcept {
    pinned_frame<Provider> page;
    const gfn frame = frame_of(t.walk.address);
    if (const errc e = page.pin(backing_, frame, is_write(t.how)); e != errc::ok) {
      const outcome o = outcome_of(e, t.walk.address);
      return page.at() || frame.value >= shadow_entry::frame_limit || t.key() != 0 ? o : remember_mmio(t, o);
    }
    if (page.lease().frame.value >= shadow_entry::frame_limit) return outcome_of(errc::not_mapped, t.walk.address);
    unsigned most = t.leaf_level() > 1 ? host_level(backing_.provider, page.at(), page.lease().frame, frame) : 1;
    t.executes = options_.nx_huge && is_fetch(t.how) && most > 1 && !detail::mutated(detail::mutation::nx_huge_fetched);
    if (t.executes) most = 1;
    neighbour_pins<Provider> around(backing_.provider, backing_.slots, backing_.window);
    table_prefetch<Provider> prefetch(backing_, tables_, counters_);
    if (options_.prefetch && (most == 1 || backing_.slots.logs(frame))) prefetch.template look_around<Mode>(t, around);
    const std::lock_guard locked{tables_.lock()};
    if (tables_.released()) return {.what = outcome::released};
    if (t.executes) t.executes = page.stands_locked(backing_) && leaf_level_locked(page, 2) > 1;
    shadow_page* filled = nullptr;
    const outcome o = install_locked(t, page, most < t.leaf_level() ? most : t.leaf_level(), filled);
    tables_.commit();
    if (filled != nullptr) prefetch.template install_locked<Mode>(t, *filled, around);
    return o;
  }

  /// Effects: filled is the page of level 1 that has the leaf, if it has.
  template <walked_mode Mode>
  outcome install_locked(const attempt<Mode>& t, const pinned_frame<Provider>& page, unsigned most,
                         shadow_page*& filled) noexcept {
    if (!page.stands_locked(backing_)) return {.what = outcome::again};
    tables_.make_room();
    unsigned level = leaf_level_locked(page, most);
    shadow_page* last = descend_locked(t, level);
    while (last != nullptr && level > 1 && executed_below(*last, shadow_index(t.a, level))) {
      last = descend_locked(t, --level);
    }
    if (last == nullptr) return {.what = outcome::again};
    bool tracked = tables_.tracked(page.frame());
    if (tracked && is_write(t.how) && options_.unsync && tables_.try_unsync(page.frame())) tracked = false;
    if (tracked && is_write(t.how)) return {.what = outcome::write_tracked, .address = t.walk.address};
    // A table in the large frame may have been shadowed on the way down, as one of this walk's own.
    if (level > 1 && leaf_level_locked(page, level) != level) return {.what = outcome::again};
    const shadow_entry leaf = leaf_for<Mode>(t.context(), t.how, t.walk, page, tracked, level).with_key(t.key());
    tables_.map(*last, shadow_index(t.a, level), aligned_to(page.frame(), level), leaf, t.v.stock);
    if (level > 1) counters_.add(mmu_counters::large);
    if (level == 1) filled = last;
    return {};
  }

  /// Entry i links what the guest executes a part of: a large leaf in its place would take that away again.
  static bool executed_below(const shadow_page& p, unsigned i) noexcept {
    if constexpr (detail::mutated(detail::mutation::nx_huge_undone)) return false;
    const shadow_entry e = p.load(i);
    return e.present() && !e.is_leaf() && e.child()->executed;
  }

  /// The level of the leaf: `most` at most, and less where slot, tables, log or brackets demand it.
  unsigned leaf_level_locked(const pinned_frame<Provider>& page, unsigned most) noexcept {
    const gfn f = page.frame();
    const memslot& slot = *tables_.slots().find(f);
    for (unsigned level = most; level > 1; --level) {
      const gfn first = aligned_to(f, level);
      if (!slot.may_be_large(f, level)) continue;
      if (((page.lease().frame.value ^ f.value) & (frames_at(level) - 1)) != 0) continue;
      const auto host = static_cast<std::uintptr_t>(slot.config().host_of(first).value);
      if (!backing_.window.retry(page.since(), {host, host + (frames_at(level) << page_shift)})) return level;
    }
    return 1;
  }

  /// No slot holds the frame. Effects: if that is still so, the place of the leaf remembers it. Returns: o, or `again`.
  template <walked_mode Mode>
  outcome remember_mmio(const attempt<Mode>& t, const outcome& o) noexcept {
    const std::lock_guard locked{tables_.lock()};
    if (tables_.released()) return {.what = outcome::released};
    const gfn frame = frame_of(t.walk.address);
    if (tables_.slots().find(frame) != nullptr) return {.what = outcome::again};
    tables_.make_room();
    shadow_page* const last = descend_locked(t, 1);
    if (last != nullptr) {
      const rights r = leaf_rights<Mode>(t.context(), t.how, t.walk);
      const auto e = shadow_entry::mmio(frame, r, t.walk.granted.user(), tables_.slots().generation());
      tables_.map_mmio(*last, shadow_index(t.a, 1), e);
    }
    tables_.commit();
    return last != nullptr ? o : outcome{.what = outcome::again};
  }

  /// Links shadow pages down to the leaf's level. Returns: the page of that level, or nullptr if the guest or the host
  /// has changed a table.
  template <walked_mode Mode>
  shadow_page* descend_locked(const attempt<Mode>& t, unsigned leaf_level) noexcept {
    using layout = shadow_layout<Mode>;
    const walk_context& c = t.context();
    shadow_page* p = t.v.port.root();
    if (p == nullptr) p = table_locked(layout::root_frame(c), layout::root_role(c), t.v.stock, layout::registers(c));
    for (unsigned level = layout::levels; p != nullptr; --level) {
      p->unheard_writes = 0;
      // The table of this level is write-protected by now: what its entry says holds until the lock is released.
      const bool read = level <= layout::top_table && level >= t.walk.end_level;
      if (read && !stands(t, level)) return nullptr;
      if (level == layout::levels) t.v.port.set_root(p);
      if (level == leaf_level) return p;
      p = child_locked(t, *p, level);
    }
    return nullptr;
  }

  /// Returns: the page below the entry of p, a page of this level; it is linked. nullptr: its table's slot has gone.
  template <walked_mode Mode>
  shadow_page* child_locked(const attempt<Mode>& t, shadow_page& p, unsigned level) noexcept {
    using layout = shadow_layout<Mode>;
    const unsigned i = shadow_index(t.a, level);
    const bool part = t.in_leaf(level);
    const gfn below = part ? first_frame(t.walk.address, level - 1) : layout::table_below(t.context(), t.walk, level);
    const unsigned quadrant = detail::mutated(detail::mutation::one_quadrant) ? 0 : layout::quadrant(t.a, level - 1);
    const page_role role =
        part ? p.role.part_below(leaf_rights<Mode>(t.context(), t.how, t.walk), t.walk.granted.user(), t.key())
             : p.role.table_below(guest_walker<Mode>::rights_above(t.walk, level - 1), quadrant);
    shadow_page* child = linked(p, i, below, role);
    if (child == nullptr) child = table_locked(below, role, t.v.stock);
    if (child != nullptr) tables_.link(p, i, *child, t.v.stock);
    if (child != nullptr && part && t.executes) child->executed = true;
    return child;
  }

  /// Returns: the page that entry i links, if it is this one. Another way to it would have to synchronise it first.
  static shadow_page* linked(const shadow_page& p, unsigned i, gfn below, page_role role) noexcept {
    const shadow_entry e = p.load(i);
    if (!e.present() || e.is_leaf()) return nullptr;
    shadow_page* const child = e.child();
    return child->frame == below && child->role == role ? child : nullptr;
  }

  template <walked_mode Mode>
  static bool stands(const attempt<Mode>& t, unsigned level) noexcept {
    return detail::mutated(detail::mutation::no_entry_recheck) || t.tables.unchanged_locked(t.walk.entry(level));
  }

  /// Returns: the page, or nullptr if the table's slot has gone meanwhile.
  shadow_page* table_locked(gfn frame, page_role role, fault_stock& from,
                            const directory_registers& registers = {}) noexcept {
    if (role.has_table() && tables_.slots().find(frame) == nullptr) return nullptr;
    return &tables_.get(frame, role, from, registers);
  }

  /// The first frame that a shadow table of this level maps, around the address.
  static constexpr gfn first_frame(gpa a, unsigned level) noexcept {
    return frame_of(gpa{a.value & ~(bit(12 + 9 * level) - 1)});
  }

  /// What the leaf may grant as far as the guest is concerned. Before its dirty bit is set: no writing.
  template <walked_mode Mode>
  static constexpr rights leaf_rights(const walk_context& c, access how, const walk_result& walk) noexcept {
    if (is_write(how) && !walk.granted.writable()) {  // CR0.WP=0, by the supervisor
      const bool no_fetch = c.smep && walk.granted.user();
      return changed(walk.granted, rights::write_bit,
                     static_cast<std::uint8_t>(rights::user_bit | (no_fetch ? rights::execute_bit : 0)));
    }
    const bool dirty =
        shadow_layout<Mode>::dirty(c, walk) || is_write(how);  // a walk for writing has set it, or the table is ROM
    return changed(walk.granted, 0, dirty ? 0 : rights::write_bit);
  }

  template <walked_mode Mode>
  shadow_entry leaf_for(const walk_context& c, access how, const walk_result& walk, const pinned_frame<Provider>& page,
                        bool tracked, unsigned level) noexcept {
    const bool read_only = tracked || page.at().read_only || !page.lease().writable;
    const bool no_fetch = level > 1 && options_.nx_huge && !detail::mutated(detail::mutation::nx_huge_fetched);
    const auto lost =
        static_cast<std::uint8_t>((read_only ? rights::write_bit : 0) | (no_fetch ? rights::execute_bit : 0));
    const rights r = changed(leaf_rights<Mode>(c, how, walk), 0, lost);
    const std::uint64_t used = shadow_entry::accessed_bit | (is_write(how) ? shadow_entry::dirty_bit : 0);
    const pfn first{page.lease().frame.value & ~(frames_at(level) - 1)};
    const shadow_entry leaf = shadow_entry::leaf(level > 1 ? first : page.lease().frame, r, walk.granted.user());
    const bool logs = tables_.slots().find(page.frame())->logs(dirty_tracking::write_protect);
    const bool parts_execute = no_fetch && leaf_rights<Mode>(c, how, walk).executable();
    return leaf.with(used | (parts_execute ? shadow_entry::may_execute_bit : 0))
        .without(logs && !is_write(how) ? shadow_entry::write_bit : 0);
  }

  backing<Provider> backing_;
  shadow_tables& tables_;
  mmu_counters& counters_;
  const mmu_options options_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
