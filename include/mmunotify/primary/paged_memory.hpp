// SPDX-License-Identifier: MIT
#pragma once

// What a software primary MMU manages, without the notifier: areas, page table, frames, swap store, and the steps in
// which they change. No step brackets, and none takes the primary's lock: reference_mmu.hpp does both, around them.
//
// The table's entries, the frames' words and the swap slots' words agree whenever no entry is locked: a present entry
// and its frame's mapped bit, a swapped entry and its slot's, appear and go together under the entry's lock.
//
// Context: "shared" and "exclusive" below say how the primary's lock is held. Steps that want it shared run beside each
// other.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/area_list.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/primary/frame_pool.hpp>
#include <mmunotify/primary/nothrow_array.hpp>
#include <mmunotify/primary/page_table.hpp>
#include <mmunotify/primary/statistics.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// What the tables say about an address at one moment.
struct translation {
  errc error = errc::not_mapped;         ///< ok: an area covers the address
  protection allows = protection::none;  ///< the area's
  bool present = false;                  ///< frame is the page
  bool swapped = false;                  ///< the contents are in the swap store
  bool young = false;
  pfn frame{};
};

class paged_memory {
 public:
  using counter = detail::counter;

  /// A page that an operation plans to replace, and what it allocated for it.
  struct page_job {
    page_slot* slot;
    pfn target;  ///< frame_pool::none when used
  };
  using page_jobs = nothrow_array<page_job>;

  paged_memory(std::size_t frames, std::size_t swap_slots) noexcept : frames_(frames), swap_(swap_slots) {}

  /// Every address that can be mapped.
  static constexpr range whole() noexcept { return {0, page_table::address_limit}; }
  /// Errors: bad_range if r is empty, reversed, wrapping, not aligned to pages, or beyond the limit.
  static constexpr errc check(const range& r) noexcept {
    const bool aligned = (r.first & page_mask) == 0 && (r.last & page_mask) == 0;
    return aligned && !r.empty() && whole().contains(r) ? errc::ok : errc::bad_range;
  }

  /// Context: to look, shared; to change, exclusive.
  area_list& areas() noexcept { return areas_; }
  const area_list& areas() const noexcept { return areas_; }
  frame_pool& frames() noexcept { return frames_; }
  const frame_pool& frames() const noexcept { return frames_; }
  /// The swap store: a pool whose frames are slots, which nobody pins.
  frame_pool& swap() noexcept { return swap_; }
  const frame_pool& swap() const noexcept { return swap_; }
  detail::primary_counters& counters() noexcept { return counters_; }
  const detail::primary_counters& counters() const noexcept { return counters_; }

  /// Context: shared.
  translation translate(std::uintptr_t a) const noexcept {
    const area* const covering = areas_.find(a);
    if (covering == nullptr) return {};
    const page_entry e = table_.peek(a);
    return {errc::ok, covering->allows, e.present(), e.swapped(), e.young(), e.present() ? e.frame() : pfn{}};
  }

  // --- Touching pages. ----------------------------------------------------------------------------------------------

  /// Calls f(frame, what the area allows) with a's page present and young, and its entry locked.
  /// Returns: what f returns. Errors: bad_range, not_mapped, access_denied, no_memory. Context: shared.
  template <class Function>
  errc with_page(std::uintptr_t a, bool write, Function f) noexcept {
    if (!whole().contains(a)) return errc::bad_range;
    const area* const covering = areas_.find(a);
    if (covering == nullptr) return errc::not_mapped;
    if (covering->allows < (write ? protection::read_write : protection::read)) return errc::access_denied;
    page_slot* const slot = table_.reach(a);
    if (slot == nullptr) return errc::no_memory;
    locked_entry entry{*slot};
    const errc e = fault_in(entry);
    return e == errc::ok ? f(entry.value.frame(), covering->allows) : e;
  }

  /// Calls copy(place in a frame, bytes done, bytes now) for the pieces of [a, a + n). All pages are taken before the
  /// first is touched, so that nothing is half-done when memory runs out. Errors: as with_page. Context: shared.
  template <class Copy>
  errc transfer(std::uintptr_t a, std::size_t n, bool write, Copy copy) noexcept {
    if (n == 0) return errc::ok;
    if (!whole().contains(a) || n > whole().last - a) return errc::bad_range;
    const protection needed = write ? protection::read_write : protection::read;
    if (const errc e = areas_.allows({a, a + n}, needed); e != errc::ok) return e;
    nothrow_array<pfn> taken;
    errc e = take({a & ~page_mask, a + n}, write, taken);
    for (std::size_t done = 0; e == errc::ok && done < n;) {
      const std::size_t offset = (a + done) & page_mask;
      const std::size_t now = std::min<std::size_t>(n - done, page_size - offset);
      copy(frames_.data(taken[(a + done) / page_size - a / page_size]) + offset, done, now);
      done += now;
    }
    for (const pfn f : taken) static_cast<void>(frames_.unpin(f));
    return e;
  }

  /// Returns: whether any page of r is young. Effects: none is, afterwards, if `clear`. Context: shared.
  bool young(const range& r, bool clear) noexcept {
    bool any = false;
    table_.for_each(r, [&](std::uintptr_t, page_slot& slot) {
      locked_entry entry{slot};
      any = any || entry.value.young();
      if (clear) entry.value.bits &= ~page_entry::young_bit;
    });
    return any;
  }

  // --- Replacing pages: plan before the bracket, replace inside, give_back after it. ---------------------------------

  /// Lists the present pages of r, and allocates for each. Returns: false when something ran out; nothing is allocated
  /// then. Context: shared, from here to give_back.
  [[nodiscard]] bool plan(const range& r, frame_pool& into, page_jobs& jobs) noexcept {
    std::size_t present = 0;
    table_.for_each(r, [&](std::uintptr_t, page_slot& slot) { present += is_present(slot) ? 1U : 0U; });
    if (!jobs.reserve(present)) return false;
    bool enough = true;
    table_.for_each(r, [&](std::uintptr_t, page_slot& slot) {
      if (!enough || jobs.size() == present || !is_present(slot)) return;  // what comes later comes after the operation
      const pfn target = into.allocate();
      enough = target != frame_pool::none;
      if (enough) jobs.push_back({&slot, target});
    });
    if (!enough) give_back(jobs, into);
    return enough;
  }

  /// Copies each planned page and lets made(target, was young) stand for it; its old frame joins the chain. Pages on
  /// loan are skipped; so are those that another thread has swapped out since.
  template <class Made>
  void replace(page_jobs& jobs, frame_pool& into, counter counted, frame_chain& dying, Made made) noexcept {
    for (page_job& job : jobs) {
      locked_entry entry{*job.slot};
      if (!entry.value.present()) continue;
      const pfn old = entry.value.frame();
      if (frames_.on_loan(old)) {
        counters_.add(counter::skipped_pinned);
        continue;
      }
      copy_page(into.data(job.target), frames_.data(old));
      into.install(job.target);
      entry.value = made(job.target, entry.value.young());
      job.target = frame_pool::none;
      withdraw(old, dying);
      counters_.add(counted);
    }
  }

  /// Frees what was planned and not used.
  static void give_back(page_jobs& jobs, frame_pool& into) noexcept {
    for (const page_job& job : jobs) {
      if (job.target != frame_pool::none) into.drop(job.target);
    }
  }

  // --- Taking away and moving. --------------------------------------------------------------------------------------

  /// Empties the entries of r; their frames join the chain. Returns: how many there were. Context: exclusive.
  std::size_t take_away(const range& r, frame_chain& dying) noexcept {
    std::size_t taken = 0;
    table_.for_each(r, [&](std::uintptr_t, page_slot& slot) {
      locked_entry entry{slot};
      taken += entry.value.none() ? 0U : 1U;
      if (entry.value.present()) {
        withdraw(entry.value.frame(), dying);
      } else if (entry.value.swapped()) {
        free_slot(entry.value.frame());
      }
      entry.value = {};
    });
    return taken;
  }

  /// Makes the entries to which those of `old` can move. Returns: false when memory ran out. Context: exclusive.
  [[nodiscard]] bool make_way(const range& old, std::uintptr_t to) noexcept {
    bool made = true;
    table_.for_each(old,
                    [&](std::uintptr_t a, page_slot&) { made = made && table_.reach(a - old.first + to) != nullptr; });
    return made;
  }

  /// Moves the entries of `old`. Preconditions: make_way; nothing is there. Context: exclusive.
  void move_entries(const range& old, std::uintptr_t to) noexcept {
    table_.for_each(old, [&](std::uintptr_t a, page_slot& slot) {
      page_slot* const target = table_.reach(a - old.first + to);
      target->store(slot.exchange(0, std::memory_order_relaxed), std::memory_order_relaxed);
      counters_.add(counter::moved);
    });
  }

  /// Frees the nodes of the table that r leaves empty. Context: exclusive.
  void prune(const range& r) noexcept { table_.prune(r); }

  // --- Checking. ----------------------------------------------------------------------------------------------------

  /// The first broken invariant, or null. Context: exclusive.
  const char* verify() noexcept {
    if (const char* broken = areas_.verify(); broken != nullptr) return broken;
    if (const char* broken = frames_.verify(); broken != nullptr) return broken;
    if (const char* broken = swap_.verify(); broken != nullptr) return broken;
    const std::unique_ptr<bool[]> frame_seen{new (std::nothrow) bool[frames_.size() + 1]()};
    const std::unique_ptr<bool[]> slot_seen{new (std::nothrow) bool[swap_.size() + 1]()};
    if (frame_seen == nullptr || slot_seen == nullptr) return "no memory to verify with";
    const char* broken = nullptr;
    table_.for_each(whole(), [&](std::uintptr_t a, page_slot& slot) {
      const page_entry entry{slot.load(std::memory_order_relaxed)};
      const bool present = entry.present();
      const char* const found =
          verify_entry(a, entry, present ? frames_ : swap_, present ? frame_seen.get() : slot_seen.get());
      if (broken == nullptr) broken = found;
    });
    for (std::size_t f = 0; broken == nullptr && f < frames_.size(); f += 1) {
      if (frames_.mapped({f}) != frame_seen[f]) broken = "a frame's mapped bit and the entries disagree";
    }
    for (std::size_t s = 0; broken == nullptr && s < swap_.size(); s += 1) {
      if (swap_.mapped({s}) != slot_seen[s]) broken = "a swap slot's state and the entries disagree";
    }
    return broken;
  }

 private:
  static bool is_present(const page_slot& slot) noexcept {
    return page_entry{slot.load(std::memory_order_relaxed)}.present();
  }
  void withdraw(pfn f, frame_chain& dying) noexcept {
    frames_.withdraw(f);
    frames_.push(dying, f);
  }
  void free_slot(pfn slot) noexcept {
    swap_.withdraw(slot);
    swap_.drop(slot);
  }

  /// Makes the entry's page present and young. Errors: no_memory. Context: shared, the entry is locked.
  errc fault_in(locked_entry& entry) noexcept {
    if (entry.value.present()) {
      entry.value.bits |= page_entry::young_bit;
      return errc::ok;
    }
    const pfn f = frames_.allocate();
    if (f == frame_pool::none) return errc::no_memory;
    if (entry.value.swapped()) {
      copy_page(frames_.data(f), swap_.data(entry.value.frame()));
      free_slot(entry.value.frame());
      counters_.add(counter::swapped_in);
    } else {
      fill_page(frames_.data(f), std::byte{0});
      counters_.add(counter::zero_filled);
    }
    frames_.install(f);
    entry.value = page_entry::mapping(f, true);
    return errc::ok;
  }

  /// Pins the pages of r, which begins with a page. Effects: `taken` has those pinned, also on failure.
  errc take(const range& r, bool write, nothrow_array<pfn>& taken) noexcept {
    if (!taken.reserve((r.last - r.first - 1) / page_size + 1)) return errc::no_memory;
    errc e = errc::ok;
    for (std::uintptr_t page = r.first; e == errc::ok && page < r.last; page += page_size) {
      e = with_page(page, write, [&](pfn f, protection) {
        frames_.pin(f);
        taken.push_back(f);
        return errc::ok;
      });
    }
    return e;
  }

  const char* verify_entry(std::uintptr_t a, page_entry entry, const frame_pool& pool, bool* seen) const noexcept {
    if ((entry.bits & page_entry::lock_bit) != 0) return "an entry is locked and nobody is inside";
    if (entry.none()) return "an empty entry has bits set";
    if (entry.present() && entry.swapped()) return "a page is present and swapped out";
    if (areas_.find(a) == nullptr) return "a page lies in no area";
    if (!pool.contains(entry.frame())) return "an entry points outside the pool";
    return std::exchange(seen[entry.frame().value], true) ? "two entries share a frame or a swap slot" : nullptr;
  }

  area_list areas_;
  page_table table_;
  frame_pool frames_;
  frame_pool swap_;
  detail::primary_counters counters_;
};

MMUNOTIFY_END_NAMESPACE
