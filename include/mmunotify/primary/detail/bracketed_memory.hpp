// SPDX-License-Identifier: MIT
#pragma once

// The core of reference_mmu: who may come in, how a change is bracketed, and how it all ends.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include <mmunotify/base/event.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/paged_memory.hpp>
#include <mmunotify/primary/tables_lock.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// What reference_mmu asks of an address space: brackets, the young hooks, release.
template <class Space>
concept notifying_space = requires(Space& s, range r, const void* owner) {
  s.invalidate(r, event::clear, owner);
  { s.clear_young(r) } -> std::same_as<bool>;
  { s.clear_flush_young(r) } -> std::same_as<bool>;
  { s.test_young(r) } -> std::same_as<bool>;
  { s.release() } -> std::same_as<errc>;
};

namespace detail {

template <notifying_space Space>
class bracketed_memory {
 public:
  bracketed_memory(std::size_t frames, std::size_t swap_slots) noexcept : memory(frames, swap_slots) {}

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

  /// The one place that brackets. work(chain) changes the tables and adds the frames that lost their page to the chain;
  /// they are freed when the bracket is over. Context: tables held.
  template <std::invocable<frame_chain&> Work>
  void change(const range& r, event why, const void* owner, Work work) noexcept {
    frame_chain dying;
    memory.counters().add(counter::brackets);
    if constexpr (mutated(mutation::start_after_change)) {
      work(dying);  // the negative control: everything is over before anybody hears of it
      memory.frames().drop(dying);
      [[maybe_unused]] const auto bracket = space.invalidate(r, why, owner);
    } else {
      {
        [[maybe_unused]] const auto bracket = space.invalidate(r, why, owner);
        work(dying);
      }
      memory.frames().drop(dying);
    }
  }

  /// Takes r away; `next` are the areas without it. Context: tables exclusive.
  void destroy(const range& r, area_list& next) noexcept {
    change(r, event::unmap, nullptr, [&](frame_chain& dying) {
      memory.counters().add(counter::unmapped, memory.take_away(r, dying));
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
    frame_chain dying;
    memory.take_away(paged_memory::whole(), dying);
    memory.frames().drop(dying);
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
