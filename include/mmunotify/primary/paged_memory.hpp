// SPDX-License-Identifier: MIT
#pragma once

// What a software primary MMU manages, without the notifier: areas, page table, and the steps in which pages change. No
// step brackets, and none takes the primary's lock: detail/bracketed_memory.hpp and what stands on it do both.
//
// The table's entries and the words of the frames, device pages and swap slots that they point to agree whenever no
// entry is locked: they change together, under the entry's lock. An entry may be writable only if its area allows
// writes, its frame has no other entry, and it is soft-dirty; so a write that needs a fault is one that must be copied,
// or that somebody wants to know of.
//
// Context: "shared" and "exclusive" below say how the primary's lock is held. Steps that want it shared run beside each
// other.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/area_list.hpp>
#include <mmunotify/primary/detail/replacements.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/primary/frame_pool.hpp>
#include <mmunotify/primary/nothrow_array.hpp>
#include <mmunotify/primary/page_table.hpp>
#include <mmunotify/primary/physical_memory.hpp>
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
  bool writable = false;    ///< present, and a write needs no fault
  bool soft_dirty = false;  ///< written since clear_soft_dirty, as far as is known
  bool huge = false;        ///< part of a 2 MiB mapping
  bool device = false;      ///< the contents are in the device's memory
  bool exclusive = false;   ///< a device has the frame for itself
};

/// What stands between an access and its page, and takes a bracket to be cleared away.
enum class obstacle : std::uint8_t {
  none,
  shared,     ///< a write to a frame with other entries
  huge,       ///< a write to a page of a huge mapping that is not writable
  device,     ///< the page is in the device's memory
  exclusive,  ///< a device has it for itself
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

  explicit paged_memory(physical_memory& m) noexcept : physical_(m) { m.add_user(); }
  ~paged_memory() { physical_.remove_user(); }
  paged_memory(const paged_memory&) = delete;
  paged_memory& operator=(const paged_memory&) = delete;

  /// Every address that can be mapped.
  static constexpr range whole() noexcept { return {0, page_table::address_limit}; }
  /// Errors: bad_range if r is empty, reversed, wrapping, not aligned to pages, or beyond the limit.
  static constexpr errc check(const range& r) noexcept {
    const bool aligned = (r.first & page_mask) == 0 && (r.last & page_mask) == 0;
    return aligned && !r.empty() && whole().contains(r) ? errc::ok : errc::bad_range;
  }
  /// The page around an address.
  static constexpr range page_of(std::uintptr_t a) noexcept { return {a & ~page_mask, (a & ~page_mask) + page_size}; }

  /// Context: to look, shared; to change, exclusive.
  area_list& areas() noexcept { return areas_; }
  const area_list& areas() const noexcept { return areas_; }
  page_table& table() noexcept { return table_; }
  physical_memory& physical() noexcept { return physical_; }
  frame_pool& frames() noexcept { return physical_.frames; }
  const frame_pool& frames() const noexcept { return physical_.frames; }
  frame_pool& swap() noexcept { return physical_.swap; }
  const frame_pool& swap() const noexcept { return physical_.swap; }
  frame_pool& device() noexcept { return physical_.device; }
  detail::primary_counters& counters() noexcept { return counters_; }
  const detail::primary_counters& counters() const noexcept { return counters_; }

  /// Context: shared.
  translation translate(std::uintptr_t a) const noexcept {
    const area* const covering = areas_.find(a);
    if (covering == nullptr) return {};
    const page_entry e = table_.peek(a);
    return {.error = errc::ok,
            .allows = covering->allows,
            .present = e.present(),
            .swapped = e.swapped(),
            .young = e.young(),
            .frame = e.has_frame() || e.device() ? e.frame() : pfn{},
            .writable = e.writable(),
            .soft_dirty = covering->soft_dirty || e.soft_dirty(),
            .huge = table_.huge(a),
            .device = e.device(),
            .exclusive = e.exclusive()};
  }

  // --- Touching pages. ----------------------------------------------------------------------------------------------

  /// Calls f(frame, whether it is writable) with a's page present and young, and writable if `write`, its entry locked.
  /// Returns: what f returns. Errors: bad_range, not_mapped, access_denied, no_memory; again when `found` is what a
  /// bracket must clear away first. Context: shared.
  template <class Function>
  errc try_page(std::uintptr_t a, bool write, obstacle& found, Function f) noexcept {
    found = obstacle::none;
    if (!whole().contains(a)) return errc::bad_range;
    const area* const covering = areas_.find(a);
    if (covering == nullptr) return errc::not_mapped;
    if (covering->allows < (write ? protection::read_write : protection::read)) return errc::access_denied;
    page_slot* const slot = table_.reach(a);
    if (slot == nullptr) return errc::no_memory;
    locked_entry entry{*slot};
    found = obstacle_to(entry.value, write, a);
    if (found != obstacle::none) return errc::again;
    const errc e = fault_in(entry, *covering, write);
    return e == errc::ok ? f(entry.value.frame(), entry.value.writable()) : e;
  }

  /// Calls copy(place in a frame, bytes done, bytes now) for the pieces of [a, a + n). pin(page, frame) -> errc pins
  /// one page. All are pinned before the first is touched, so that nothing is half-done when memory runs out. Errors:
  /// bad_range, not_mapped, access_denied, no_memory, and those of pin. Context: shared.
  template <class Pin, class Copy>
  errc transfer(std::uintptr_t a, std::size_t n, bool write, Pin pin, Copy copy) noexcept {
    if (n == 0) return errc::ok;
    if (!whole().contains(a) || n > whole().last - a) return errc::bad_range;
    const protection needed = write ? protection::read_write : protection::read;
    if (const errc e = areas_.allows({a, a + n}, needed); e != errc::ok) return e;
    nothrow_array<pfn> taken;
    if (!taken.reserve((a % page_size + n - 1) / page_size + 1)) return errc::no_memory;
    errc e = errc::ok;
    for (std::uintptr_t page = a & ~page_mask; e == errc::ok && page < a + n; page += page_size) {
      pfn f{};
      e = pin(page, f);
      if (e == errc::ok) taken.push_back(f);
    }
    for (std::size_t done = 0; e == errc::ok && done < n;) {
      const std::size_t offset = (a + done) & page_mask;
      const std::size_t now = std::min<std::size_t>(n - done, page_size - offset);
      copy(frames().data(taken[(a + done) / page_size - a / page_size]) + offset, done, now);
      done += now;
    }
    for (const pfn f : taken) static_cast<void>(frames().unpin(f));
    return e;
  }

  /// Copy on write: a's page moves to `target`, unless nobody shares it any more. Returns: the frame that it had, to be
  /// withdrawn when nobody maps it any more: before, its other entries must not find themselves alone, and write to it;
  /// none if nothing has changed. Context: shared, in a bracket.
  pfn unshare(std::uintptr_t a, pfn target) noexcept {
    locked_entry entry{*table_.reach(a)};
    const page_entry old = entry.value;
    if (!old.present() || old.writable() || frames().sole(old.frame())) return frame_pool::none;
    copy_page(frames().data(target), frames().data(old.frame()));
    frames().install(target);
    entry.value = old.at(target).with(page_entry::writable_bit | page_entry::soft_dirty_bit | page_entry::young_bit);
    counters_.add(counter::copied);
    return old.frame();
  }

  /// The processor takes a's page back from whoever had it for himself. Context: shared, in a bracket.
  void revoke(std::uintptr_t a) noexcept {
    locked_entry entry{*table_.reach(a)};
    if (!entry.value.exclusive()) return;
    frames().set_owner(entry.value.frame(), nullptr);
    entry.value = entry.value.without(page_entry::exclusive_bit).with(page_entry::present_bit);
    counters_.add(counter::revoked);
  }

  /// Calls f(address) for the pages of r that are young; none is, afterwards, if `clear`. Context: shared.
  template <class Function>
  void each_young(const range& r, bool clear, Function f) noexcept {
    table_.for_each(r, [&](std::uintptr_t a, page_slot& slot) {
      locked_entry entry{slot};
      if (entry.value.young()) f(a);
      if (clear) entry.value = entry.value.without(page_entry::young_bit);
    });
  }
  bool young(const range& r, bool clear) noexcept {
    bool any = false;
    each_young(r, clear, [&](std::uintptr_t) { any = true; });
    return any;
  }

  /// Returns: whether an area or a page of r is soft-dirty. Context: shared.
  bool soft_dirty(const range& r) noexcept {
    bool any = false;
    for (const area& a : areas_.items()) any = any || (a.soft_dirty && a.range.overlaps(r));
    table_.for_each(r, [&](std::uintptr_t, page_slot& slot) {
      any = any || page_entry{slot.load(std::memory_order_relaxed)}.soft_dirty();
    });
    return any;
  }

  // --- Replacing pages: plan before the bracket, replace inside, give_back after it. ---------------------------------

  /// Lists the pages of r that are wanted, and allocates for each. Returns: false when something ran out; nothing is
  /// allocated then. Context: shared, from here to give_back.
  [[nodiscard]] bool plan(const range& r, const replacement& how, page_jobs& jobs) noexcept {
    std::size_t found = 0;
    table_.for_each(r, [&](std::uintptr_t, page_slot& slot) { found += wanted(slot, how) ? 1U : 0U; });
    if (!jobs.reserve(found)) return false;
    bool enough = true;
    table_.for_each(r, [&](std::uintptr_t, page_slot& slot) {
      if (!enough || jobs.size() == found || !wanted(slot, how)) return;  // what comes later comes after the operation
      const pfn target = how.into.allocate();
      enough = target != frame_pool::none;
      if (enough) jobs.push_back({&slot, target});
    });
    if (!enough) give_back(jobs, how.into);
    return enough;
  }

  /// Copies each planned page and lets another entry stand for it; its old frame is withdrawn. Pages on loan are
  /// skipped; so are those that another thread has replaced since.
  void replace(page_jobs& jobs, const replacement& how, withdrawn_pages& gone) noexcept {
    for (page_job& job : jobs) {
      locked_entry entry{*job.slot};
      if (!wanted(entry.value, how)) continue;
      const pfn old = entry.value.frame();
      if (how.from.on_loan(old)) {
        counters_.add(counter::skipped_pinned);
        continue;
      }
      copy_page(how.into.data(job.target), how.from.data(old));
      how.into.set_owner(job.target, how.given_to);
      how.into.install(job.target);
      entry.value = how.made(job.target, entry.value);
      job.target = frame_pool::none;
      withdraw(how.from, old, gone);
      counters_.add(how.counted);
    }
  }

  /// Frees what was planned and not used.
  static void give_back(page_jobs& jobs, frame_pool& into) noexcept {
    for (const page_job& job : jobs) {
      if (job.target != frame_pool::none) into.drop(job.target);
    }
  }

  // --- Taking away and moving. --------------------------------------------------------------------------------------

  /// Empties the entries of r; their frames are withdrawn. No huge page may be partly in r. Returns: how many there
  /// were. Context: shared.
  std::size_t take_away(const range& r, withdrawn_pages& gone) noexcept {
    std::size_t taken = 0;
    table_.for_each_huge(r, [&](std::uintptr_t block) {
      if (r.contains(page_table::block_of(block))) table_.clear_huge(block);
    });
    table_.for_each(r, [&](std::uintptr_t, page_slot& slot) {
      locked_entry entry{slot};
      taken += entry.value.none() ? 0U : 1U;
      if (entry.value.has_frame()) {
        withdraw(frames(), entry.value.frame(), gone);
      } else if (entry.value.device()) {
        withdraw(device(), entry.value.frame(), gone);
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

  /// Moves the entries of `old`; there they are soft-dirty. Huge pages stay huge if they stay aligned.
  /// Preconditions: make_way; nothing is there; no huge page is partly in `old`. Context: exclusive.
  void move_entries(const range& old, std::uintptr_t to) noexcept {
    const bool aligned = (to - old.first) % page_table::block_size == 0;
    table_.for_each_huge(old, [&](std::uintptr_t block) {
      table_.clear_huge(block);
      if (aligned) table_.set_huge(block - old.first + to);
      if (!aligned) counters_.add(counter::split);
    });
    table_.for_each(old, [&](std::uintptr_t a, page_slot& slot) {
      const page_entry e{slot.exchange(0, std::memory_order_relaxed)};
      table_.reach(a - old.first + to)->store(e.with(page_entry::soft_dirty_bit).bits, std::memory_order_relaxed);
      counters_.add(counter::moved);
    });
  }

  /// Frees the nodes of the table that r leaves empty. Context: exclusive.
  void prune(const range& r) noexcept { table_.prune(r); }

  /// The pages of r need a fault to be written. If `clean`, they are not soft-dirty either. Context: exclusive.
  void write_protect(const range& r, bool clean = false) noexcept {
    const std::uint64_t cleared = page_entry::writable_bit | (clean ? page_entry::soft_dirty_bit : 0);
    table_.for_each(r, [&](std::uintptr_t, page_slot& slot) {
      locked_entry entry{slot};
      entry.value = entry.value.without(cleared);
    });
  }

  /// The pages of r can be written, but for those whose first write somebody waits for: they are shared, or not
  /// soft-dirty. A huge page as a whole, or not. The areas must allow it. Context: exclusive.
  void allow_writes(const range& r) noexcept {
    table_.for_each_block(r, [&](std::uintptr_t block, bool huge) {
      const range part = page_table::block_of(block).clipped_to(r);
      bool all = true;
      if (huge) table_.for_each(part, [&](std::uintptr_t, page_slot& slot) { all = all && may_be_writable(slot); });
      if (!all) return;
      table_.for_each(part, [&](std::uintptr_t, page_slot& slot) {
        if (may_be_writable(slot)) slot.fetch_or(page_entry::writable_bit, std::memory_order_relaxed);
      });
    });
  }

  // --- For the operations in detail/. -------------------------------------------------------------------------------

  /// The entry loses its frame, which is freed after the bracket if it was the last one. Context: the entry is locked.
  void withdraw(frame_pool& pool, pfn f, withdrawn_pages& gone) noexcept {
    if (pool.withdraw(f)) pool.push(&pool == &device() ? gone.device : gone.frames, f);
  }
  void drop(withdrawn_pages& gone) noexcept {
    frames().drop(gone.frames);
    device().drop(gone.device);
  }
  /// Context: the entry that points to the slot is locked.
  void free_slot(pfn slot) noexcept {
    if (swap().withdraw(slot)) swap().drop(slot);
  }
  void unmark_huge(std::uintptr_t block) noexcept {
    if (table_.clear_huge(block)) counters_.add(counter::split);
  }

 private:
  bool wanted(page_entry e, const replacement& how) const noexcept {
    return how.wanted(e) && (how.of_owner == nullptr || how.from.owner(e.frame()) == how.of_owner);
  }
  bool wanted(const page_slot& slot, const replacement& how) const noexcept {
    return wanted(page_entry{slot.load(std::memory_order_relaxed)}, how);
  }
  bool may_be_writable(const page_slot& slot) const noexcept {
    const page_entry e{slot.load(std::memory_order_relaxed)};
    return e.present() && e.soft_dirty() && frames().sole(e.frame());
  }

  obstacle obstacle_to(page_entry e, bool write, std::uintptr_t a) const noexcept {
    if (e.device()) return obstacle::device;
    if (e.exclusive()) return obstacle::exclusive;
    if (!e.present() || !write || e.writable()) return obstacle::none;
    if (table_.huge(a)) return obstacle::huge;
    if constexpr (detail::mutated(detail::mutation::write_to_shared)) return obstacle::none;
    return frames().sole(e.frame()) ? obstacle::none : obstacle::shared;
  }

  /// Makes the entry's page present and young, and writable where nobody waits for its first write.
  /// Errors: no_memory. Context: shared, the entry is locked and nothing stands in the way.
  errc fault_in(locked_entry& entry, const area& covering, bool write) noexcept {
    if (!entry.value.present()) {
      const bool swapped = entry.value.swapped();
      const pfn f = frames().allocate();
      if (f == frame_pool::none) return errc::no_memory;
      if (swapped) {
        copy_page(frames().data(f), swap().data(entry.value.frame()));
        free_slot(entry.value.frame());
      } else {
        fill_page(frames().data(f), std::byte{0});
      }
      counters_.add(swapped ? counter::swapped_in : counter::zero_filled);
      frames().install(f);
      write = covering.allows == protection::read_write && (write || covering.soft_dirty || entry.value.soft_dirty());
      const bool dirty = covering.soft_dirty || entry.value.soft_dirty();
      entry.value = page_entry::mapping(f, true).with(dirty ? page_entry::soft_dirty_bit : 0);
    }
    entry.value = entry.value.with(page_entry::young_bit);
    if (write) entry.value = entry.value.with(page_entry::writable_bit | page_entry::soft_dirty_bit);
    return errc::ok;
  }

  physical_memory& physical_;
  area_list areas_;
  page_table table_;
  detail::primary_counters counters_;
};

MMUNOTIFY_END_NAMESPACE
