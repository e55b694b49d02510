// SPDX-License-Identifier: MIT
#pragma once

// Filling the neighbours of a leaf: eight places of a table that lie side by side, for one fault.
//
// A guest that touches a page touches the next one soon, and a fault is mostly walking, locking and looking up. So a
// fault also fills those of the eight places around its own that are empty, as far as their translation is known and
// nobody has to be waited for:
//   - the guest's entry is present, has no reserved bit, and is marked as accessed: that bit is the guest's, and means
//     that it used the page; a prefetch sets none. Without its dirty bit the leaf is read-only, as after a fault.
//     (Parts of a large guest leaf, and all of a direct MMU's, have no entry of their own.)
//   - a slot holds the frame: MMIO is left to its own fault;
//   - the primary has the page now. It is asked by try_pin, outside the lock, and never made to fault a page in.
// What is there already is left alone. Leaves are not marked as accessed: nobody has used them yet.
//
// K1 holds as for the fault itself: snapshot, look-ups and pins come before the lock; under it each page is judged by
// itself, and one with a bracket over it, open or finished since, is left out. None of this can make a fault fail.
//
// References: Linux arch/x86/kvm/mmu (FNAME(pte_prefetch), direct_pte_prefetch), which does the same.

#include <array>
#include <concepts>
#include <cstdint>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/shadow_modes.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// A provider that can be asked for a page without waiting for it.
///   try_pin(a)  as pin(a, false), but of a page that is there: it does not fault, sleep, or wait for who changes the
///               page, and the page is not young for it. Errors: again, instead of all that; those of pin.
template <class P>
concept prefetch_provider = frame_provider<P> && requires(P& p, hva a) {
  { p.try_pin(a) } noexcept -> std::same_as<frame_lease>;
};

/// Places of a table that are filled together, aligned.
inline constexpr unsigned prefetch_group = 8;

/// Pages that a fault did not ask for, pinned until the object goes.
template <frame_provider Provider>
class neighbour_pins {
 public:
  struct neighbour {
    unsigned index = 0;  ///< in the table
    gfn frame{};
    std::uint64_t entry = 0;  ///< the guest's, if there is one
    host_page at{};
    frame_lease lease{};
  };

  /// Effects: takes the snapshot. Context: before what add() is told is read.
  neighbour_pins(Provider& provider, const memslots& slots, const mmu_window& window) noexcept
      : provider_(provider), slots_(slots), window_(window), since_(window.read_begin()) {}
  neighbour_pins(const neighbour_pins&) = delete;
  neighbour_pins& operator=(const neighbour_pins&) = delete;
  ~neighbour_pins() {
    for (const neighbour& n : found()) provider_.unpin(n.lease.frame);
  }

  /// Effects: pins the page of the frame, if it is there and not being changed. Preconditions: called at most
  /// prefetch_group times. Context: as pin.
  void add(unsigned index, gfn frame, std::uint64_t entry = 0) noexcept {
    if constexpr (prefetch_provider<Provider>) {
      const host_page at = slots_.lookup(frame);
      if (!at || window_.check_retry(since_, page_range(at.address))) return;
      const frame_lease lease = provider_.try_pin(at.address);
      if (lease) found_[count_++] = {index, frame, entry, at, lease};
    }
  }

  std::span<const neighbour> found() const noexcept { return std::span(found_).first(count_); }

  /// Returns: the frame is still at its host page, and no bracket over it is open or has run since. (K1)
  /// Context: MMU lock.
  bool stands_locked(const neighbour& n) const noexcept {
    if constexpr (detail::mutated(detail::mutation::prefetch_unchecked)) return true;
    return memslots::lookup_in(slots_.current(), n.frame) == n.at && !window_.retry(since_, page_range(n.at.address));
  }

 private:
  Provider& provider_;
  const memslots& slots_;
  const mmu_window& window_;
  const mmu_window::snapshot since_;
  std::array<neighbour, prefetch_group> found_;
  std::size_t count_ = 0;
};

/// The mode's entries are the processor's own. (One for the tables of a guest hypervisor names their kind: another
/// format, whose entries are left to their own faults.)
template <class Mode>
inline constexpr bool plain_entries = !requires(const walk_context& c) { Mode::kind(c); };

/// The part of a fault that fills neighbours in shadow tables.
/// Attempt: what the fault knows after its walk (fault_path::attempt).
template <frame_provider Provider>
class table_prefetch {
 public:
  table_prefetch(backing<Provider>& b, shadow_tables& tables, mmu_counters& counters) noexcept
      : backing_(b), tables_(tables), counters_(counters) {}

  /// Effects: pins what may be mapped beside the page, and is not.
  template <walked_mode Mode, class Attempt>
  void look_around(const Attempt& t, neighbour_pins<Provider>& around) noexcept {
    if constexpr (prefetch_provider<Provider> && plain_entries<Mode>) {
      const unsigned own = shadow_index(t.a, 1), first = own & ~(prefetch_group - 1);
      const unsigned empty = empty_around<Mode>(t) & ~(1U << (own - first));
      const gfn part = frame_of(gpa{t.walk.address.value & ~bit_range(0, 20)});
      for (unsigned i = 0; empty >> i != 0; ++i) {
        if ((empty >> i & 1) == 0) continue;
        if (t.walk.end_level != 1) {
          around.add(first + i, part + (first + i));
          continue;
        }
        if constexpr (Mode::levels > 0) add_entry<Mode>(t, first + i, own, around);
      }
    }
  }

  /// Effects: leaves for what stands of it, in places that are empty. Not in a table that is out of step: what its
  /// entries say may change at any time. Context: MMU lock; no flush is due.
  template <walked_mode Mode, class Attempt>
  void install_locked(const Attempt& t, shadow_page& p, const neighbour_pins<Provider>& around) noexcept {
    if (p.unsync) return;
    const unsigned own = shadow_index(t.a, 1);
    for (const auto& n : around.found()) {
      const bool fits = n.lease.frame.value < shadow_entry::frame_limit && p.load(n.index) == shadow_entry{};
      if (!fits || !around.stands_locked(n)) continue;
      rights r = p.role.access();
      bool user = p.role.guest_user();
      unsigned key = p.role.key();
      if constexpr (Mode::levels > 0) {
        if (!p.role.direct()) {
          if (!t.tables.unchanged_locked({place_of<Mode>(t, n.index, own), n.entry})) continue;
          r = r & rights_in(Mode::grants(static_cast<typename Mode::entry_type>(n.entry), 1));
          user = r.user();
          if ((n.entry & pte::dirty) == 0) r = changed(r, 0, rights::write_bit);
          key = Mode::has_keys ? (n.entry & pte::protection_key) >> pte::protection_key_shift : 0;
        }
      }
      memslot& slot = *tables_.slots().find(n.frame);
      if (slot.mappings(n.frame).count() + 1 >= entry_list::recycle_at) continue;
      if (tables_.tracked(n.frame) || n.at.read_only || !n.lease.writable) r = changed(r, 0, rights::write_bit);
      const shadow_entry leaf = shadow_entry::leaf(n.lease.frame, r, user).with_key(key);
      const bool logs = slot.logs(dirty_tracking::write_protect);
      tables_.map(p, n.index, n.frame, leaf.without(logs ? shadow_entry::write_bit : 0), t.v.stock);
      counters_.add(mmu_counters::prefetched);
    }
  }

 private:
  /// The guest's entry that many places from the walk's own may be followed without a walk.
  template <paging_mode Mode, class Attempt>
  void add_entry(const Attempt& t, unsigned index, unsigned own, neighbour_pins<Provider>& around) noexcept {
    using word = typename Mode::entry_type;
    constexpr bool early = detail::mutated(detail::mutation::prefetch_unaccessed);
    constexpr std::uint64_t needed = pte::present | (early ? 0 : pte::accessed);
    word entry = 0;
    if (!t.tables.read_entry(place_of<Mode>(t, index, own), entry)) return;
    if ((entry & (Mode::reserved(1, t.context().format()) | needed)) != needed) return;
    around.add(index, frame_of(Mode::frame(entry, 1)), entry);
  }
  template <paging_mode Mode, class Attempt>
  static gpa place_of(const Attempt& t, unsigned index, unsigned own) noexcept {
    const gpa where = t.walk.entry(1).where;
    return gpa{where.value - own * sizeof(typename Mode::entry_type)} + index * sizeof(typename Mode::entry_type);
  }

  /// Returns: the places around the leaf's that are empty now, as far as can be seen without the lock.
  template <walked_mode Mode, class Attempt>
  unsigned empty_around(const Attempt& t) noexcept {
    const read_section reading{backing_.slots.domain()};  // pages keep their memory as long
    shadow_page* p = t.v.port.root();
    for (unsigned level = shadow_layout<Mode>::levels; p != nullptr && level > 1; --level) {
      const shadow_entry e = p->load(shadow_index(t.a, level));
      p = e.present() && !e.is_leaf() ? e.child() : nullptr;
    }
    unsigned empty = p == nullptr ? (1U << prefetch_group) - 1 : 0;
    const unsigned first = shadow_index(t.a, 1) & ~(prefetch_group - 1);
    for (unsigned i = 0; p != nullptr && i < prefetch_group; ++i) {
      if (p->load(first + i) == shadow_entry{}) empty |= 1U << i;
    }
    return empty;
  }

  backing<Provider>& backing_;
  shadow_tables& tables_;
  mmu_counters& counters_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
