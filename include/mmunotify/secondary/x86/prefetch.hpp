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
#include <mmunotify/secondary/x86/memslots.hpp>

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

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
