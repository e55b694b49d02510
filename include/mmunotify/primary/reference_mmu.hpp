// SPDX-License-Identifier: MIT
#pragma once

// A complete primary MMU in software, in the small: areas, page faults, small and huge pages, copy on write after fork,
// merging, swap, migration, device memory, exclusive access, moves, young and soft-dirty bits, reaping and exit.
//
// It shows how a primary uses the notifier, it is what examples and torture tests run against, and an emulator can be
// built on it. Every change of a translation goes through one of two helpers, change() and change_in_place(), which do
// things in the one right order: start, change the tables, end, and only then free the frames that it took away.
//
// Locks, outermost first:
//   tables()        exclusive: what changes areas, forks, merges or collapses, exit, verify; shared: everything else.
//                   Brackets run under it: that is what arming::under demands.
//   (callbacks)     run here, with tables() held and nothing else: they may sleep and take the secondary's own lock.
//   entry lock      one page-table entry, to fault in, look, copy and replace. Never held across a callback.
//   pool lock       the free list. unpin() takes this one alone, and may so be called under the secondary's lock.
// So a secondary's lock comes after tables(): pin() and everything else that takes tables() is called without it.
// A call from inside a callback of the same mmu would wait for itself; it is refused with errc::would_deadlock.
// std::shared_mutex may prefer readers; writer_gate.hpp in front of it keeps faults from starving unmap.
//
// Pages on loan. As in Linux, swap_out and migrate leave a page alone that has references besides the table's: the
// contents could change after they were copied. They look after start has returned, under the entry lock, where no new
// reference can appear; the page is counted as skipped, and the operation succeeds. unmap takes the page away all the
// same: the frame then lives on until the last unpin and is nobody's page.
//
// The same goes for everything else that takes contents elsewhere; fork gives the child a copy. A lease is of a frame
// and not of an address: after copy on write its holder has the old one, until the invalidation tells.
//
// Which bracket (as in Linux; each over the pages or areas that change):
//   unmap             unmap; both sides of move       protection_vma    protect
//   clear             swap_out, migrate, merge_equal, collapse, splits, reap, copy on write, the processor taking an
//                     exclusive page back
//   protection_page   fork, in the parent             soft_dirty        clear_soft_dirty
//   migrate           migrate with an owner, to a device and back; no owner when the processor fetches the page
//   exclusive         make_exclusive
// Rights that only grow (a page becomes writable where it is) need none. Copy on write and merging bracket in place:
// who has change_entry keeps what it maps, and is told what to map instead.
//
// Contents are copied after start has returned, since secondaries may write until then.
//
// Errors: every function allocates all it needs before it changes anything. errc::no_memory, and any other error, means
// that translations, areas and contents are as before. (Pages that were faulted in on the way stay in.)
//
// Limits: pages of 4 KiB and 2 MiB; addresses below 2^57; swap, frames and device pages of a fixed number; memory is
// private (no files, nothing shared for writing). swap_out and migrate of a page that is shared give this address space
// a page of its own, and free nothing.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <shared_mutex>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/event.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/primary/area_list.hpp>
#include <mmunotify/primary/detail/accessed_memory.hpp>
#include <mmunotify/primary/detail/device.hpp>
#include <mmunotify/primary/detail/fork.hpp>
#include <mmunotify/primary/detail/huge.hpp>
#include <mmunotify/primary/detail/memory_check.hpp>
#include <mmunotify/primary/detail/merge.hpp>
#include <mmunotify/primary/detail/reap.hpp>
#include <mmunotify/primary/detail/replacements.hpp>
#include <mmunotify/primary/frame_pool.hpp>
#include <mmunotify/primary/paged_memory.hpp>
#include <mmunotify/primary/physical_memory.hpp>
#include <mmunotify/primary/statistics.hpp>
#include <mmunotify/primary/tables_lock.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <notifying_space Space = address_space<arming::under<std::shared_mutex>>>
class reference_mmu : public detail::accessed_memory<Space> {
  using base = detail::accessed_memory<Space>;
  using base::core_, base::lock_, base::memory_;

 public:
  /// An empty address space over memory of its own. When memory for it cannot be had, there is none, and what needs
  /// some answers errc::no_memory.
  reference_mmu(std::size_t frames, std::size_t swap_slots, std::size_t device_pages = 0) noexcept
      : base(frames, swap_slots, device_pages) {}
  explicit reference_mmu(std::size_t frames) noexcept : reference_mmu(frames, frames) {}
  /// An empty address space over memory that others use as well. Preconditions: it outlives this object.
  explicit reference_mmu(physical_memory& shared) noexcept : base(shared) {}
  reference_mmu(const reference_mmu&) = delete;
  reference_mmu& operator=(const reference_mmu&) = delete;
  /// Effects: exit(). Preconditions: nobody is inside; no frame of this object is on loan (checked always).
  ~reference_mmu() {
    static_cast<void>(exit());
    const primary_statistics s = statistics();
    if (s.pins != s.unpins) {
      detail::violated("K4", "reference_mmu::~reference_mmu", "%llu frames were lent, and %llu were given back",
                       static_cast<unsigned long long>(s.pins), static_cast<unsigned long long>(s.unpins));
    }
  }

  // --- Areas. Each: Context: may sleep (callbacks do); not in a callback; without locks that callbacks take. ---------

  /// Effects: makes an area; pages appear when they are touched, filled with zeros. Nothing is bracketed: nothing was.
  /// Errors: bad_range, overlap, access_denied (no such protection), no_memory, released, would_deadlock.
  errc map(range r, protection allows) noexcept {
    const tables_lock::exclusive in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    if (allows > protection::read_write) return errc::access_denied;
    if (memory_.areas().overlaps(r)) return errc::overlap;
    area_list next;
    const area made{r, allows};
    if (!memory_.areas().replaced(r, {&made, 1}, next)) return errc::no_memory;
    memory_.areas().swap(next);
    return errc::ok;
  }

  /// Effects: the same with huge pages, all of them there at once, filled with zeros.
  /// Errors: as map; bad_range also if r is not aligned to 2 MiB, no_memory if there are not enough blocks of frames.
  errc map_huge(range r, protection allows) noexcept {
    const tables_lock::exclusive in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    if (r.first % page_table::block_size != 0 || r.last % page_table::block_size != 0) return errc::bad_range;
    if (allows > protection::read_write) return errc::access_denied;
    if (memory_.areas().overlaps(r)) return errc::overlap;
    area_list next;
    const area made{r, allows};
    if (!memory_.areas().replaced(r, {&made, 1}, next)) return errc::no_memory;
    return detail::map_blocks(memory_, r, allows, next);
  }

  /// Effects: takes away what is mapped in r, in one bracket over r with event::unmap; areas are split where needed.
  /// Frames on loan live on until they are given back. Holes in r are no error.
  /// Errors: bad_range, not_mapped (nothing at all is), no_memory, released, would_deadlock.
  errc unmap(range r) noexcept {
    const tables_lock::exclusive in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    if (!memory_.areas().overlaps(r)) return errc::not_mapped;
    area_list next;
    if (!memory_.areas().replaced(r, {}, next)) return errc::no_memory;
    core_.destroy(r, next);
    memory_.prune(r);
    return errc::ok;
  }

  /// Effects: all of r allows this from now on, in one bracket over r with event::protection_vma.
  /// Errors: bad_range, not_mapped (some of r is not), access_denied (no such protection), no_memory, released,
  /// would_deadlock.
  errc protect(range r, protection allows) noexcept {
    const tables_lock::exclusive in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    if (allows > protection::read_write) return errc::access_denied;
    if (!memory_.areas().covers(r)) return errc::not_mapped;
    area_list next;
    if (!memory_.areas().changed(
            r, [allows](area& a) { a.allows = allows; }, next))
      return errc::no_memory;
    core_.split_edges(r);
    core_.change(r, event::protection_vma, nullptr, [&](withdrawn_pages&) {
      memory_.areas().swap(next);
      if (allows == protection::read_write) {
        memory_.allow_writes(r);
      } else {
        memory_.write_protect(r);
      }
    });
    return errc::ok;
  }

  /// Effects: pages and areas of `old` move to [to, to + size), frames and contents unchanged, as mremap with a fixed
  /// destination does; huge pages stay huge if the distance is a multiple of 2 MiB. At `to` they are soft-dirty. What
  /// was mapped there is destroyed, in a bracket of its own over the destination with event::unmap; then the move
  /// itself in a bracket over `old` with event::unmap. Errors: bad_range (either range), not_mapped (some of `old` is
  /// not), overlap (of the two), no_memory, released, would_deadlock.
  errc move(range old, std::uintptr_t to) noexcept {
    const tables_lock::exclusive in{lock_};
    if (const errc e = core_.admitted(in, old); e != errc::ok) return e;
    const range target{to, to + (old.last - old.first)};
    if (const errc e = memory_.check(target); e != errc::ok) return e;
    if (target.overlaps(old)) return errc::overlap;
    if (!memory_.areas().covers(old)) return errc::not_mapped;
    area_list cleared, lifted, moving, next;
    if (!memory_.areas().replaced(target, {}, cleared) || !cleared.replaced(old, {}, lifted) ||
        !memory_.areas().shifted(old, to, moving) || !lifted.replaced(target, moving.items(), next) ||
        !memory_.make_way(old, to)) {
      memory_.prune(target);
      return errc::no_memory;
    }
    if (memory_.areas().overlaps(target)) core_.destroy(target, cleared);
    core_.split_edges(old);
    core_.change(old, event::unmap, nullptr, [&](withdrawn_pages&) {
      memory_.move_entries(old, to);
      memory_.areas().swap(next);
    });
    memory_.prune(old);
    return errc::ok;
  }

  /// Effects: `child` gets the areas and pages of this address space, shared until one of the two writes. The areas
  /// that have pages are bracketed here with event::protection_page. Pages that may be written through a loan, and
  /// those in a device's memory, are copied for the child at once. Errors: access_denied (the child uses other memory),
  /// overlap (it has areas), no_memory, released (either), would_deadlock (also if it is this one).
  errc fork(reference_mmu& child) noexcept {
    const bool before = std::less<>{}(this, &child);
    const tables_lock::exclusive first{before ? lock_ : child.lock_};
    const tables_lock::exclusive second{before ? child.lock_ : lock_};
    if (const errc e = core_.admitted(before ? first : second); e != errc::ok) return e;
    if (const errc e = child.core_.admitted(before ? second : first); e != errc::ok) return e;
    if (&memory_.physical() != &child.memory_.physical()) return errc::access_denied;
    return detail::forking{core_, child.core_}.run();
  }

  /// Effects: r counts as clean from here on, in one bracket over r with event::soft_dirty; its pages are
  /// write-protected, so that the first write of anybody is a fault. Errors: bad_range, not_mapped (nothing in r is),
  /// no_memory, released, would_deadlock.
  errc clear_soft_dirty(range r) noexcept {
    const tables_lock::exclusive in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    if (!memory_.areas().overlaps(r)) return errc::not_mapped;
    area_list next;
    if (!memory_.areas().changed(
            r, [](area& a) { a.soft_dirty = false; }, next))
      return errc::no_memory;
    core_.split_edges(r);
    core_.change(r, event::soft_dirty, nullptr, [&](withdrawn_pages&) {
      if constexpr (!detail::mutated(detail::mutation::soft_dirty_keeps_write)) memory_.write_protect(r, true);
      memory_.areas().swap(next);
    });
    return errc::ok;
  }

  // --- Pages. Each: Context: as for areas. They run beside each other and beside faults, but for the first two.
  // -------

  /// Effects: the aligned 2 MiB of r that lie in one area and have pages become huge pages, each in one bracket with
  /// event::clear: small pages are copied, swapped ones come back, missing ones are zero. Blocks with pages on loan are
  /// skipped and counted, those with pages that a device has are left alone.
  /// Errors: bad_range, not_mapped (nothing in r is), no_memory (not enough blocks for all), released, would_deadlock.
  errc collapse(range r) noexcept {
    const tables_lock::exclusive in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    if (!memory_.areas().overlaps(r)) return errc::not_mapped;
    return detail::collapsing{core_}.run(r);
  }

  /// Effects: present pages of r that hold the same bytes share one frame, read-only until somebody writes. Of each
  /// pair both are bracketed, one after the other, with event::clear. Pages on loan are left alone. Pages of this
  /// address space only. Errors: bad_range, not_mapped (nothing in r is), no_memory, released, would_deadlock. Cost:
  /// hashes r.
  merge_answer merge_equal(range r) noexcept {
    const tables_lock::exclusive in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return {e, 0};
    if (!memory_.areas().overlaps(r)) return {errc::not_mapped, 0};
    return detail::merging{core_}.run(r);
  }

  /// Effects: the present pages of r go to the swap store, in one bracket over r with event::clear; none if there are
  /// none. Huge pages are split first. Pages on loan are skipped and counted. Faults bring the pages back.
  /// Errors: bad_range, not_mapped (nothing in r is), no_memory (not enough swap for all of them), released,
  /// would_deadlock.
  errc swap_out(range r) noexcept {
    return replace_pages(r, event::clear, nullptr, detail::to_swap(memory_.physical()));
  }

  /// Effects: the present pages of r move to fresh frames, in one bracket over r with event::clear, or, when an owner
  /// is named, event::migrate. Pages on loan are skipped and counted. Errors: as swap_out (not enough frames).
  errc migrate(range r, const void* owner = nullptr) noexcept {
    return replace_pages(r, owner == nullptr ? event::clear : event::migrate, owner,
                         detail::to_other_frames(memory_.physical()));
  }

  /// Effects: the present pages of r move to the device's memory and are the owner's, in one bracket over r with
  /// event::migrate and the owner, who need not listen to it if he has let go of them himself. An access by the
  /// processor brings a page back, in a bracket of its own with event::migrate and no owner: to that one the owner has
  /// to listen. Errors: as swap_out (not enough device pages); access_denied: the owner is null.
  errc migrate_to_device(range r, const void* owner) noexcept {
    if (owner == nullptr) return errc::access_denied;
    return replace_pages(r, event::migrate, owner, detail::to_device(memory_.physical(), owner));
  }

  /// Effects: the owner gives its device pages in r back, in one bracket over r with event::migrate and the owner.
  /// Errors: as migrate_to_device (not enough frames).
  errc migrate_to_system(range r, const void* owner) noexcept {
    if (owner == nullptr) return errc::access_denied;
    return replace_pages(r, event::migrate, owner, detail::to_system(memory_.physical(), owner));
  }

  /// Effects: the pages of r are faulted in for writing; then, in one bracket over r with event::exclusive and the
  /// owner, they become the owner's alone. An access by the processor takes a page back, in a bracket of its own with
  /// event::clear. Pages on loan are skipped and counted; find_owned says which the owner has.
  /// Errors: bad_range, not_mapped, access_denied (some of r may not be written, or the owner is null), no_memory,
  /// released, would_deadlock.
  errc make_exclusive(range r, const void* owner) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    return owner == nullptr ? errc::access_denied : detail::make_exclusive(core_, r, owner);
  }

  /// Returns: the page at a, if it is this owner's, on the device or exclusively; for a write it is soft-dirty then.
  /// Errors: not_mapped (also if it is not the owner's now), access_denied, bad_range, no_memory, released,
  /// would_deadlock. Progress: blocking. Context: as pin(), and to be used like it: take a window's snapshot before.
  owned_page find_owned(hva a, const void* owner, bool write) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in); e != errc::ok) return {.error = e};
    return detail::find_owned(memory_, static_cast<std::uintptr_t>(a.value), owner, write);
  }

  /// Effects: takes the pages of all areas away, and waits for nobody: each area is one bracket that may not block,
  /// with event::clear. An area that a secondary refuses is left exactly as it is. The areas stay; contents are lost:
  /// this is for an address space whose user is about to die. Progress: non-blocking. Returns: what was reaped and what
  /// refused. Errors: again (the tables are in use), released, would_deadlock.
  reap_answer reap() noexcept {
    const tables_lock::try_shared in{lock_};
    if (const errc e = core_.admitted(in); e != errc::ok) return {.error = e};
    return detail::reap(core_);
  }

  // --- The end, and looking inside. ---------------------------------------------------------------------------------

  /// Effects: the address space dies: from the first moment on every other call answers errc::released; all secondaries
  /// are told (space().release()); then everything is freed. Frames on loan live on until they are given back.
  /// Returns: ok when all that is done, also for a later or concurrent call. Errors: would_deadlock in a callback or an
  /// open bracket; nothing has changed then, but others may have been answered errc::released meanwhile. Progress:
  /// blocking.
  errc exit() noexcept { return core_.exit(); }

  /// What the tables say about a now. Preconditions: tables() is held, shared or exclusive, by this thread or by the
  /// one whose bracket's callback this is. Context: made for callbacks and tests. Progress: wait-free.
  translation translate_locked(hva a) const noexcept { return memory_.translate(static_cast<std::uintptr_t>(a.value)); }

  /// The areas now, merged where neighbours agree. Preconditions: as translate_locked.
  std::span<const area> areas_locked() const noexcept { return memory_.areas().items(); }

  /// The memory, for looking at: free_count, pins, generation, frame_pool::poison.
  const frame_pool& frames() const noexcept { return memory_.frames(); }
  /// The swap store: free_count.
  const frame_pool& swap() const noexcept { return memory_.swap(); }
  /// All of it, to make other address spaces that share it.
  physical_memory& memory() noexcept { return memory_.physical(); }

  primary_statistics statistics() const noexcept {
    primary_statistics s = memory_.counters().read();
    s.stale_writes = memory_.frames().stale_writes();
    return s;
  }

  /// The first broken invariant as a sentence, or null (detail/memory_check.hpp has them all): of areas, entries, huge
  /// pages; of counts and the free lists. While others use the memory, their entries may explain higher counts.
  /// Progress: blocking; looks at everything. Context: not in a callback.
  const char* verify() noexcept {
    reference_mmu* const alone[] = {this};
    return verify(alone);
  }

  /// The same for address spaces that share memory: all counts are exact if they are all of its users.
  /// Preconditions: they share it; when there are several, nobody is inside any of them. Context: as verify().
  static const char* verify(std::span<reference_mmu* const> family) noexcept {
    if (family.empty()) return nullptr;
    detail::memory_check check{family.front()->memory_.physical()};
    for (std::size_t i = 0; i < family.size(); i += 1) {
      const tables_lock::exclusive in{family[i]->lock_};
      if (in.error() != errc::ok) return "verify was called inside a callback";
      if (const char* broken = check.look_at(family[i]->memory_); broken != nullptr) return broken;
      if (i + 1 != family.size()) continue;
      if (const char* broken = check.look_at_shared(); broken != nullptr) return broken;
    }
    return nullptr;
  }

 private:
  /// The pages of r that are wanted are replaced in one bracket.
  errc replace_pages(range r, event why, const void* owner, const replacement& how) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    if (!memory_.areas().overlaps(r)) return errc::not_mapped;
    paged_memory::page_jobs jobs;
    if (!memory_.plan(r, how, jobs)) return errc::no_memory;
    if (jobs.empty()) return errc::ok;
    core_.split_touching(r);
    core_.change(r, why, owner, [&](withdrawn_pages& gone) { memory_.replace(jobs, how, gone); });
    paged_memory::give_back(jobs, how.into);
    return errc::ok;
  }
};

static_assert(frame_provider<reference_mmu<>>);

MMUNOTIFY_END_NAMESPACE
