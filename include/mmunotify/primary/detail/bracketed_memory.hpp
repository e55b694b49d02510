// SPDX-License-Identifier: MIT
#pragma once

// The core of reference_mmu: who may come in, how a change is bracketed, what an access has to clear away first, and
// how it all ends.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>

#include <mmunotify/base/event.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/detail/replacements.hpp>
#include <mmunotify/primary/paged_memory.hpp>
#include <mmunotify/primary/tables_lock.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// What reference_mmu asks of an address space: brackets of all kinds, the young hooks, release.
template <class Space>
concept notifying_space = requires(Space& s, range r, const void* owner) {
  s.invalidate(r, event::clear, owner);
  static_cast<bool>(s.try_invalidate(r, event::clear, owner));
  s.invalidate_in_place(r, event::clear, owner);
  s.change_entry(entry_change{});
  s.invalidate_secondary_tlbs(r);
  { s.young_pages(r, std::span<std::uint64_t>{}, true) } -> std::same_as<errc>;
  { s.clear_young(r) } -> std::same_as<bool>;
  { s.clear_flush_young(r) } -> std::same_as<bool>;
  { s.test_young(r) } -> std::same_as<bool>;
  { s.release() } -> std::same_as<errc>;
};

namespace detail {

template <notifying_space Space>
class bracketed_memory {
 public:
  using space_type = Space;

  explicit bracketed_memory(physical_memory& m) noexcept : memory(m) {}

  /// Whether an operation may go on. Errors: would_deadlock, released; for the second form, bad_range as well.
  template <class Guard>
  errc admitted(const Guard& in) const noexcept {
    if (in.error() != errc::ok) return in.error();
    return state_ == state::living ? errc::ok : errc::released;
  }
  template <class Guard>
  errc admitted(const Guard& in, const range& r) const noexcept {
    const errc e = admitted(in);
    return e == errc::ok ? paged_memory::check(r) : e;
  }

  /// The one place that brackets, but for change_in_place. work(pages) changes the tables and adds what lost its last
  /// entry to the pages; devices that walk the tables flush; the pages are freed when the bracket is over.
  /// Context: tables held.
  template <std::invocable<withdrawn_pages&> Work>
  void change(const range& r, event why, const void* owner, Work work) noexcept {
    withdrawn_pages gone;
    memory.counters().add(counter::brackets);
    if constexpr (mutated(mutation::start_after_change)) {
      work(gone);  // the negative control: everything is over before anybody hears of it
      memory.drop(gone);
      [[maybe_unused]] const auto bracket = space.invalidate(r, why, owner);
    } else {
      {
        [[maybe_unused]] const auto bracket = space.invalidate(r, why, owner);
        work(gone);
        space.invalidate_secondary_tlbs(r);
        if constexpr (mutated(mutation::free_before_end)) memory.drop(gone);
      }
      memory.drop(gone);
    }
  }

  /// The same for one page that is replaced by its equal, or loses the right to be written: secondaries may keep what
  /// they map, and work tells them what to map instead with tell(). Until then it leaves the contents alone, and does
  /// not withdraw the frame: whoever shares it would find himself alone, and write.
  template <std::invocable<withdrawn_pages&> Work>
  void change_in_place(const range& page, Work work) noexcept {
    withdrawn_pages gone;
    memory.counters().add(counter::brackets);
    {
      [[maybe_unused]] const auto bracket = space.invalidate_in_place(page, event::clear);
      work(gone);
      space.invalidate_secondary_tlbs(page);
    }
    memory.drop(gone);
  }
  /// Who has kept the page maps this from now on. One that a bracket of another thread has taken since is mapped by
  /// nobody, and nobody maps it. Context: in change_in_place, without entry locks.
  void tell(const range& page, pfn f, bool writable) noexcept { space.change_entry({page, f, writable}); }

  // --- Accesses. ----------------------------------------------------------------------------------------------------

  /// paged_memory::try_page, after what stands in its way. Every turn clears one thing away, and starts anew, since
  /// what was found may have changed while callbacks ran. Context: tables held; callbacks run.
  template <class Function>
  errc with_page(std::uintptr_t a, bool write, Function f) noexcept {
    while (true) {
      obstacle found = obstacle::none;
      const errc e = memory.try_page(a, write, found, f);
      if (found == obstacle::none) return e;
      if (const errc failed = clear_away(found, paged_memory::page_of(a)); failed != errc::ok) return failed;
    }
  }

  /// One huge page becomes small ones. Nothing is translated otherwise afterwards; whoever mirrors it as one entry is
  /// told all the same, as in Linux. Context: tables held.
  void split(std::uintptr_t block) noexcept {
    change(page_table::block_of(block), event::clear, nullptr, [&](withdrawn_pages&) { memory.unmark_huge(block); });
  }
  /// Huge pages that are partly in r become small ones. Context: tables held; before r's own bracket.
  void split_edges(const range& r) noexcept {
    if constexpr (mutated(mutation::huge_survives_a_change)) return;
    for (const std::uintptr_t a : {r.first, r.last - 1}) {
      if (memory.table().huge(a) && !r.contains(page_table::block_of(a))) split(page_table::block_of(a).first);
    }
  }
  /// Huge pages that r touches become small ones. Context: as split_edges.
  void split_touching(const range& r) noexcept {
    if constexpr (mutated(mutation::huge_survives_a_change)) return;
    memory.table().for_each_huge(r, [&](std::uintptr_t block) { split(block); });
  }

  /// Takes r away; `next` are the areas without it. Context: tables exclusive.
  void destroy(const range& r, area_list& next) noexcept {
    split_edges(r);
    change(r, event::unmap, nullptr, [&](withdrawn_pages& gone) {
      memory.counters().add(counter::unmapped, memory.take_away(r, gone));
      memory.areas().swap(next);
    });
  }

  /// reference_mmu::exit.
  errc exit() noexcept {
    if (lock.inside()) return errc::would_deadlock;
    const std::lock_guard once{exit_mutex_};
    if (set_state(state::exiting) == state::dead) return errc::ok;
    if (const errc e = release_space(); e != errc::ok) {
      set_state(state::living);
      return e;
    }
    const tables_lock::exclusive in{lock};
    withdrawn_pages gone;
    memory.take_away(paged_memory::whole(), gone);
    memory.drop(gone);
    memory.prune(paged_memory::whole());
    area_list none;
    memory.areas().swap(none);
    state_ = state::dead;
    return errc::ok;
  }

  Space space;
  tables_lock lock;
  paged_memory memory;

 private:
  errc clear_away(obstacle found, const range& page) noexcept {
    switch (found) {
      case obstacle::none: break;
      case obstacle::huge: split(page_table::block_of(page.first).first); break;
      case obstacle::shared: return unshare(page);
      case obstacle::device: return fetch(page);
      case obstacle::exclusive: revoke(page); break;
    }
    return errc::ok;
  }

  /// Copy on write. Nobody writes to the frame while it is shared. Errors: no_memory.
  errc unshare(const range& page) noexcept {
    const pfn target = memory.frames().allocate();
    if (target == frame_pool::none) return errc::no_memory;
    bool used = false;
    change_in_place(page, [&](withdrawn_pages& gone) {
      const pfn old = memory.unshare(page.first, target);
      used = old != frame_pool::none;
      if (!used) return;
      tell(page, target, true);
      memory.withdraw(memory.frames(), old, gone);
    });
    if (!used) memory.frames().drop(target);
    return errc::ok;
  }

  /// A page of the device's comes back. The bracket names no owner: nobody has asked for this, and the device, too, has
  /// to let go. Errors: no_memory.
  errc fetch(const range& page) noexcept {
    const replacement how = to_system(memory.physical());
    paged_memory::page_jobs jobs;
    if (!memory.plan(page, how, jobs)) return errc::no_memory;
    if constexpr (mutated(mutation::device_copied_early)) {
      withdrawn_pages gone;
      memory.replace(jobs, how, gone);
      memory.drop(gone);
    }
    change(page, event::migrate, nullptr, [&](withdrawn_pages& gone) { memory.replace(jobs, how, gone); });
    paged_memory::give_back(jobs, how.into);
    return errc::ok;
  }

  void revoke(const range& page) noexcept {
    if constexpr (mutated(mutation::exclusive_not_revoked)) {
      memory.revoke(page.first);
    } else {
      change(page, event::clear, nullptr, [&](withdrawn_pages&) { memory.revoke(page.first); });
    }
  }

  enum class state : std::uint8_t { living, exiting, dead };

  /// Returns: the state before; a dead one stays so.
  state set_state(state next) noexcept {
    const tables_lock::exclusive in{lock};
    const state before = state_;
    if (before != state::dead) state_ = next;
    return before;
  }

  /// Without the tables' lock: a release hook may wait for threads that are on their way out of pin().
  errc release_space() noexcept {
    const tables_lock::marked calling_out{lock};
    const errc e = space.release();
    return e == errc::would_deadlock ? e : errc::ok;
  }

  std::mutex exit_mutex_;        ///< outermost: one exit() at a time
  state state_ = state::living;  ///< changes under tables, exclusive
};

}  // namespace detail

MMUNOTIFY_END_NAMESPACE
