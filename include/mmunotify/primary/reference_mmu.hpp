// SPDX-License-Identifier: MIT
#pragma once

// A complete primary MMU in software, in the small: areas, page faults, swap, migration, moves, young bits and exit.
//
// It shows how a primary uses the notifier, it is what examples and torture tests run against, and an emulator can be
// built on it. Every change of a translation goes through one helper, change(), which does things in the one right
// order: start, change the tables, end, and only then free the frames that the change took away.
//
// Locks, outermost first:
//   tables()        exclusive: map, unmap, protect, move, exit, verify; shared: everything that works page by page.
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
// Contents are copied after start has returned, since secondaries may write until then.
//
// Errors: every function allocates all it needs before it changes anything. errc::no_memory, and any other error, means
// that translations, areas and contents are as before. (Pages that were faulted in on the way stay in.)
//
// Limits: 4 KiB pages; addresses below 2^57; swap and frames of a fixed number; no fork, no merging of equal pages.

#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/event.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/primary/area_list.hpp>
#include <mmunotify/primary/detail/bracketed_memory.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/primary/frame_pool.hpp>
#include <mmunotify/primary/paged_memory.hpp>
#include <mmunotify/primary/statistics.hpp>
#include <mmunotify/primary/tables_lock.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// Whether anybody, primary or secondary, has accessed a range.
struct young_answer {
  errc error = errc::ok;
  bool young = false;

  constexpr explicit operator bool() const noexcept { return young; }
};

template <notifying_space Space = address_space<arming::under<std::shared_mutex>>>
class reference_mmu {
 public:
  using space_type = Space;

  /// An empty address space over `frames` frames of memory and `swap_slots` pages of swap. When memory for them cannot
  /// be had, there are none, and what needs one answers errc::no_memory.
  reference_mmu(std::size_t frames, std::size_t swap_slots) noexcept : core_(frames, swap_slots) {}
  explicit reference_mmu(std::size_t frames) noexcept : reference_mmu(frames, frames) {}
  reference_mmu(const reference_mmu&) = delete;
  reference_mmu& operator=(const reference_mmu&) = delete;
  /// Effects: exit(). Preconditions: nobody is inside; no frame is on loan (checked always).
  ~reference_mmu() {
    static_cast<void>(exit());
    if (memory_.frames().free_count() != memory_.frames().size()) {
      detail::violated("K4", "reference_mmu::~reference_mmu", "%zu frames are still on loan",
                       memory_.frames().size() - memory_.frames().free_count());
    }
  }

  // --- For secondaries, and who registers them. ---------------------------------------------------------------------

  /// The address space whose brackets this primary runs.
  Space& space() noexcept { return core_.space; }
  /// The lock under which it runs them. Calls of this class must not be made while it is held.
  std::shared_mutex& tables() noexcept { return lock_.mutex(); }
  /// tables(), exclusive: the witness that register_subscriber wants. Unlike a plain lock it is not starved by faults.
  [[nodiscard]] std::unique_lock<std::shared_mutex> lock_tables() noexcept { return lock_.witness(); }

  /// Effects: faults the page in if need be, takes one reference, marks the page young.
  /// Returns: a lease; `writable` says that the area allows writes now.
  /// Errors: not_mapped, access_denied, no_memory, released, bad_range (beyond the address limit), would_deadlock.
  /// Progress: blocking. Context: may sleep; without the secondary's own lock; not in a callback.
  frame_lease pin(hva a, bool write) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in); e != errc::ok) return {.error = e};
    frame_lease lease;
    lease.error = memory_.with_page(static_cast<std::uintptr_t>(a.value), write, [&](pfn f, protection allows) {
      memory_.frames().pin(f);
      lease.frame = f;
      lease.writable = allows == protection::read_write;
      return errc::ok;
    });
    if (lease) memory_.counters().add(counter::pins);
    return lease;
  }

  /// Effects: gives one reference back. Preconditions: pin() lent it (checked as far as a count can).
  /// Progress: takes the pool's short lock when the frame is freed. Context: any, callbacks and release hooks included.
  void unpin(pfn f) noexcept {
    if (!memory_.frames().unpin(f)) {
      detail::violated("K4", "reference_mmu::unpin", "frame %llu is not on loan",
                       static_cast<unsigned long long>(f.value));
      return;
    }
    memory_.counters().add(counter::unpins);
  }

  /// The frame's 4 KiB; word_at, load_bytes and store_bytes access them. Stable while the frame is pinned, or mapped
  /// under the notifier's protection. Preconditions: f came from pin(). Progress: wait-free. Context: any.
  std::byte* data(pfn f) noexcept { return memory_.frames().data(f); }

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
    const area made{r, allows};
    if (!memory_.areas().replaced(r, {&made, 1}, next)) return errc::no_memory;
    core_.change(r, event::protection_vma, nullptr, [&](frame_chain&) { memory_.areas().swap(next); });
    return errc::ok;
  }

  /// Effects: pages and areas of `old` move to [to, to + size), frames and contents unchanged, as mremap with a fixed
  /// destination does. What was mapped there is destroyed, in a bracket of its own over the destination with
  /// event::unmap; then the move itself in a bracket over `old` with event::unmap.
  /// Errors: bad_range (either range), not_mapped (some of `old` is not), overlap (of the two), no_memory, released,
  /// would_deadlock.
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
    core_.change(old, event::unmap, nullptr, [&](frame_chain&) {
      memory_.move_entries(old, to);
      memory_.areas().swap(next);
    });
    memory_.prune(old);
    return errc::ok;
  }

  // --- Pages. Each: Context: as for areas. They run beside each other, and beside faults. ----------------------------

  /// Effects: the present pages of r go to the swap store, in one bracket over r with event::clear; none if there are
  /// none. Pages on loan are skipped and counted. Faults bring the pages back.
  /// Errors: bad_range, not_mapped (nothing in r is), no_memory (not enough swap for all of them), released,
  /// would_deadlock.
  errc swap_out(range r) noexcept {
    return replace_pages(r, event::clear, nullptr, memory_.swap(), counter::swapped_out,
                         [](pfn slot, bool) { return page_entry::swapped_to(slot); });
  }

  /// Effects: the present pages of r move to fresh frames, in one bracket over r with event::clear, or, when an owner
  /// is named, event::migrate. Pages on loan are skipped and counted. Errors: as swap_out (not enough frames).
  errc migrate(range r, const void* owner = nullptr) noexcept {
    return replace_pages(r, owner == nullptr ? event::clear : event::migrate, owner, memory_.frames(),
                         counter::migrated, [](pfn f, bool young) { return page_entry::mapping(f, young); });
  }

  /// Effects: clears "accessed" for r here and in every secondary, without a flush there.
  /// Returns: whether any page was young anywhere. Errors: bad_range, not_mapped, released, would_deadlock.
  young_answer clear_young(range r) noexcept {
    return ask_young(r, true, [&] { return core_.space.clear_young(r); });
  }
  /// The same, and secondaries flush.
  young_answer clear_flush_young(range r) noexcept {
    return ask_young(r, true, [&] { return core_.space.clear_flush_young(r); });
  }
  /// Returns: whether any page of r is young anywhere; secondaries are asked only if none is here. Errors: as above.
  young_answer test_young(range r) noexcept {
    return ask_young(r, false, [&] { return core_.space.test_young(r); });
  }

  // --- Access by the primary itself. Each faults pages in and marks them young. Context: as pin(). -------------------

  /// Effects: copies out.size() bytes from a. Each aligned 8-byte word is one that was there; nothing orders words.
  /// Errors: bad_range (wraps, or beyond the address limit), not_mapped, access_denied, no_memory, released,
  /// would_deadlock; `out` is then untouched.
  errc read(std::uintptr_t a, std::span<std::byte> out) noexcept {
    return transfer(a, out.size(), false, [&](std::byte* frame, std::size_t done, std::size_t n) {
      load_bytes(out.data() + done, frame, n);
    });
  }

  /// Effects: copies in.size() bytes to a. Errors: as read(); nothing is written then.
  errc write(std::uintptr_t a, std::span<const std::byte> in) noexcept {
    return transfer(a, in.size(), true, [&](std::byte* frame, std::size_t done, std::size_t n) {
      store_bytes(frame, in.data() + done, n);
    });
  }

  /// Effects: one atomic acquire load of 4 or 8 bytes. Errors: as read(); bad_range also if a is not aligned.
  template <frame_word Word>
  errc load(hva a, Word& value) noexcept {
    return with_word<Word>(a, false, [&](std::atomic_ref<Word> word) {
      // (rm1) acquire pairs with (rm2).
      value = word.load(std::memory_order_acquire);
      return errc::ok;
    });
  }

  /// Effects: if the word at a is `expected`, it becomes `desired`, atomically, in the frame that is the page at that
  /// moment: no migration, swap or unmap comes between. Otherwise `expected` becomes what was found.
  /// Errors: again (it was not `expected`); else as load(), and access_denied if the area does not allow writes.
  template <frame_word Word>
  errc compare_exchange(hva a, Word& expected, Word desired) noexcept {
    return with_word<Word>(a, true, [&](std::atomic_ref<Word> word) {
      // (rm2) release pairs with (rm1), acquire with (rm2) of others: guest tables are built and linked with these.
      return word.compare_exchange_strong(expected, desired, std::memory_order_acq_rel, std::memory_order_acquire)
                 ? errc::ok
                 : errc::again;
    });
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

  primary_statistics statistics() const noexcept {
    primary_statistics s = memory_.counters().read();
    s.stale_writes = memory_.frames().stale_writes();
    return s;
  }

  /// The first broken invariant, or null: areas are sorted and disjoint; each page lies in one; each frame is mapped
  /// once, or on loan, or free and untouched since; each swap slot is used once or free.
  /// Progress: blocking; looks at everything. Context: not in a callback.
  const char* verify() noexcept {
    const tables_lock::exclusive in{lock_};
    if (in.error() != errc::ok) return "verify was called inside a callback";
    return memory_.verify();
  }

 private:
  using counter = detail::counter;
  using core = detail::bracketed_memory<Space>;

  /// swap_out and migrate: the present pages of r go `into` a pool. made(target, was young) is the new entry.
  template <class Made>
  errc replace_pages(range r, event why, const void* owner, frame_pool& into, counter counted, Made made) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    if (!memory_.areas().overlaps(r)) return errc::not_mapped;
    paged_memory::page_jobs jobs;
    if (!memory_.plan(r, into, jobs)) return errc::no_memory;
    if (jobs.empty()) return errc::ok;
    core_.change(r, why, owner, [&](frame_chain& dying) { memory_.replace(jobs, into, counted, dying, made); });
    paged_memory::give_back(jobs, into);
    return errc::ok;
  }

  template <class Ask>
  young_answer ask_young(const range& r, bool clear, Ask ask) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return {e, false};
    if (!memory_.areas().overlaps(r)) return {errc::not_mapped, false};
    const bool here = memory_.young(r, clear);
    const bool elsewhere = (clear || !here) && ask();  // clearing asks everybody
    return {errc::ok, here || elsewhere};
  }

  template <frame_word Word, class Function>
  errc with_word(hva a, bool write, Function f) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in); e != errc::ok) return e;
    if (a.value % sizeof(Word) != 0) return errc::bad_range;
    return memory_.with_page(static_cast<std::uintptr_t>(a.value), write, [&](pfn frame, protection) {
      return f(word_at<Word>(memory_.frames().data(frame) + a.offset()));
    });
  }

  template <class Copy>
  errc transfer(std::uintptr_t a, std::size_t n, bool write, Copy copy) noexcept {
    const tables_lock::shared in{lock_};
    const errc e = core_.admitted(in);
    return e == errc::ok ? memory_.transfer(a, n, write, copy) : e;
  }

  core core_;
  tables_lock& lock_ = core_.lock;
  paged_memory& memory_ = core_.memory;
};

static_assert(frame_provider<reference_mmu<>>);

MMUNOTIFY_END_NAMESPACE
