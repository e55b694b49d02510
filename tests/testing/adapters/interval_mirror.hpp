// SPDX-License-Identifier: MIT
#pragma once

// A mirror of one interval as it should be, and what goes wrong with one: each mistake is the same code with one thing
// changed. It keeps its mappings through brackets in place, and needs no record of brackets: its interval has that.

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>

#include <mmunotify/interval/interval_notifier.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/testing/interval_adapter.hpp>
#include <mmunotify/testing/schedule.hpp>

#include "testing/adapters/busy.hpp"

namespace adapters {

using namespace mmunotify;

enum class interval_mistake {
  none,
  // The fault.
  ignores_read_retry,
  looks_up_before_read_begin,
  keeps_its_first_sequence,
  checks_retry_before_the_lock,
  maps_outside_the_lock,
  // The start.
  takes_no_lock_in_start,
  drops_only_the_first_page,
  forgets_the_last_page,
  drops_all_of_the_interval,
  drops_at_the_end,
  drops_in_place_and_misses_the_change,
  keeps_the_first_frame_of_a_change,
  refuses_blockable,
  refuses_half_way,
  // Inside callbacks.
  removes_in_a_callback,
  faults_in_a_callback,
  // Its life.
  maps_when_inserted,
  removes_without_waiting,
  keeps_its_mappings_when_removed,
  maps_while_it_is_removed,
  keeps_what_it_shrinks_from,
  faults_where_it_no_longer_is,
  keeps_the_upper_half,
  // Turns.
  takes_no_turn,
  takes_its_turn_too_late,
  gives_its_turn_back_early,
};

class interval_mirror {
  bool is(interval_mistake m) const noexcept { return mistake_ == m; }
  using mistake = interval_mistake;
  using lock_guard = std::lock_guard<testing::mutex>;

 public:
  using client_type = interval_mirror;
  static constexpr bool precise = true;

  explicit interval_mirror(testing::test_primary& primary, interval_mistake m = interval_mistake::none) noexcept
      : primary_(primary), mistake_(m) {}
  ~interval_mirror() {
    while (is(mistake::removes_without_waiting) && iv_.registered()) std::this_thread::yield();
  }
  interval_mirror(const interval_mirror&) = delete;
  interval_mirror& operator=(const interval_mirror&) = delete;

  // --- The adapter. -------------------------------------------------------------------------------------------------

  errc attach(testing::test_space& space, range r) noexcept {
    space_ = &space;
    const errc e = space.insert(iv_, r);
    if (e != errc::ok) return e;
    {
      const lock_guard locked{lock_};
      closed_ = false;
      covered_ = r;
      first_ = {};
      has_first_ = false;
    }
    if (is(mistake::maps_when_inserted)) map_all(r);
    return errc::ok;
  }
  errc detach(testing::test_space& space) noexcept {
    close();
    return is(mistake::removes_without_waiting) ? space.remove_async(iv_) : space.remove(iv_);
  }
  errc detach_later(testing::test_space& space) noexcept {
    if (!is(mistake::maps_while_it_is_removed)) close();
    return space.remove_async(iv_);
  }
  bool attached() const noexcept { return iv_.registered(); }

  /// What it no longer covers is dropped first, and what it covers anew is mapped last.
  errc resize(testing::test_space& space, range r) noexcept {
    range before{};
    {
      const lock_guard locked{lock_};
      before = covered_;
      if (!is(mistake::faults_where_it_no_longer_is)) covered_ = covered_.clipped_to(r);
      if (!is(mistake::keeps_what_it_shrinks_from)) drop_outside(r);
    }
    const errc e = space.resize(iv_, r);
    const lock_guard locked{lock_};
    if (!is(mistake::faults_where_it_no_longer_is) || e != errc::ok) covered_ = e == errc::ok ? r : before;
    return e;
  }
  errc split(testing::test_space& space, std::uintptr_t at, interval_mirror& upper) noexcept {
    range before{};
    {
      const lock_guard locked{lock_};
      before = covered_;
      covered_.last = at;
      if (!is(mistake::keeps_the_upper_half)) drop_outside(covered_);
    }
    const errc e = space.split(iv_, at, upper.iv_);
    if (e != errc::ok) {
      const lock_guard locked{lock_};
      covered_ = before;
      return e;
    }
    const lock_guard locked{upper.lock_};
    upper.covered_ = {at, before.last};
    upper.closed_ = false;
    return e;
  }

  bool mapped(std::uintptr_t at) noexcept {
    const lock_guard locked{lock_};
    return entries_[page_of(at)].present;
  }
  testing::access_result access(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    {
      const lock_guard locked{lock_};
      const errc e = usable(at);
      if (e != errc::ok) return {.error = e};
      if (entries_[page_of(at)].allows(write)) return touch(at, write, value);
    }
    return fault(at, write, value);
  }
  testing::access_result access_in_turn(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    if (is(mistake::takes_no_turn)) return access(at, write, value);
    if (is(mistake::takes_its_turn_too_late)) {
      const interval_sequence seq = iv_.read_begin();
      testing::point();
      const interval_turn turn = iv_.take_turn();
      return fault_from(seq, at, write, value);
    }
    if (is(mistake::gives_its_turn_back_early)) {
      interval_sequence seq;
      {
        const interval_turn turn = iv_.take_turn();
        seq = iv_.read_begin();
      }
      return fault_from(seq, at, write, value);
    }
    const interval_turn turn = iv_.take_turn();
    return turn ? access(at, write, value) : testing::access_result{};
  }

  /// While it lives, the device cannot be stopped.
  busy::hold hold() noexcept { return busy::hold{busy_}; }

  // --- The hooks. ---------------------------------------------------------------------------------------------------

  bool invalidate_range_start(const interval_invalidation& i) noexcept {
    if (is(mistake::removes_in_a_callback)) static_cast<void>(space_->remove(iv_));
    if (is(mistake::faults_in_a_callback)) static_cast<void>(iv_.read_begin());
    if (is(mistake::refuses_blockable) && i.unclipped.last == UINTPTR_MAX) return false;
    if (i.blockable) busy_.wait();
    std::unique_lock locked{lock_, std::defer_lock};
    if (!is(mistake::takes_no_lock_in_start)) locked.lock();
    if (busy_) {
      if (is(mistake::refuses_half_way)) drop(i.range);
      return false;
    }
    if (i.in_place || is(mistake::drops_at_the_end)) return true;
    drop(is(mistake::drops_all_of_the_interval) ? covered_ : i.range);
    return true;
  }
  void invalidate_range_end(const interval_invalidation& i) noexcept {
    if (!is(mistake::drops_at_the_end)) return;
    const lock_guard locked{lock_};
    drop(i.range);
  }
  void change_entry(const entry_change& c) noexcept {
    if (is(mistake::drops_in_place_and_misses_the_change)) return;
    const lock_guard locked{lock_};
    const std::size_t first = page_of(c.range.first);
    for_each(c.range, [&](std::size_t p) {
      if (!entries_[p].present) return;
      entries_[p].frame = is(mistake::keeps_the_first_frame_of_a_change) ? c.frame : c.frame + (p - first);
      entries_[p].writable = c.writable;
    });
  }
  bool test_young(range r) noexcept { return ask(r, false); }
  bool clear_young(range r) noexcept { return ask(r, true); }
  void young_pages(young_batch& b) noexcept {
    const lock_guard locked{lock_};
    for_each(b.range(), [&](std::size_t p) {
      if (entries_[p].present && entries_[p].young) b.mark(testing::pages_at(p).first);
      if (b.clear()) entries_[p].young = false;
    });
  }
  void release() noexcept { close(); }

 private:
  struct entry {
    pfn frame{};
    bool present = false;
    bool writable = false;
    bool young = false;
    bool allows(bool write) const noexcept { return present && (writable || !write); }
  };

  static std::size_t page_of(std::uintptr_t at) noexcept { return (at - testing::window.first) / page_size; }
  template <class F>
  static void for_each(range r, F f) noexcept {
    const range hit = r.clipped_to(testing::window);
    if (hit.empty()) return;
    for (std::size_t p = page_of(hit.first); p <= page_of(hit.last - 1); ++p) f(p);
  }

  void close() noexcept {
    const lock_guard locked{lock_};
    closed_ = true;
    if (!is(mistake::keeps_its_mappings_when_removed)) entries_ = {};
  }
  errc usable(std::uintptr_t at) const noexcept {
    if (closed_) return errc::released;
    return covered_.contains(at) ? errc::ok : errc::not_mapped;
  }

  // --- Faults. ------------------------------------------------------------------------------------------------------

  testing::access_result fault(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    if (is(mistake::looks_up_before_read_begin)) return fault_backwards(at, write, value);
    interval_sequence seq = iv_.read_begin();
    if (is(mistake::keeps_its_first_sequence)) {
      if (!has_first_) first_ = seq;
      has_first_ = true;
      seq = first_;
    }
    return fault_from(seq, at, write, value);
  }
  testing::access_result fault_from(interval_sequence seq, std::uintptr_t at, bool write,
                                    std::uint64_t value) noexcept {
    const frame_lease lease = primary_.pin(hva{at}.page(), write);
    if (!lease) return {.error = lease.error};
    const testing::access_result r = install(lease, seq, at, write, value);
    primary_.unpin(lease.frame);
    return r;
  }
  testing::access_result fault_backwards(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    const frame_lease lease = primary_.pin(hva{at}.page(), write);
    if (!lease) return {.error = lease.error};
    const testing::access_result r = install(lease, iv_.read_begin(), at, write, value);
    primary_.unpin(lease.frame);
    return r;
  }
  testing::access_result install(const frame_lease& lease, interval_sequence seq, std::uintptr_t at, bool write,
                                 std::uint64_t value) noexcept {
    if (is(mistake::checks_retry_before_the_lock) && iv_.read_retry(seq)) return {};
    std::unique_lock locked{lock_, std::defer_lock};
    if (!is(mistake::takes_no_lock_in_start)) locked.lock();  // or it would be one that keeps no start out
    if (const errc e = usable(at); e != errc::ok) return {.error = e};
    const bool checks = !is(mistake::ignores_read_retry) && !is(mistake::checks_retry_before_the_lock);
    if (checks && iv_.read_retry(seq)) return {};
    if (is(mistake::takes_no_lock_in_start)) testing::point();
    if (is(mistake::maps_outside_the_lock)) {
      locked.unlock();
      locked.lock();
    }
    entries_[page_of(at)] = {lease.frame, true, lease.writable, false};
    return touch(at, write, value);
  }
  testing::access_result touch(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    entry& e = entries_[page_of(at)];
    e.young = true;
    const auto word = word_at<std::uint64_t>(primary_.data(e.frame) + at % page_size);
    if (write) word.store(value, std::memory_order_relaxed);
    return {errc::ok, write ? value : word.load(std::memory_order_relaxed)};
  }
  void map_all(range r) noexcept {
    for_each(r, [&](std::size_t p) {
      const frame_lease lease = primary_.pin(hva{testing::pages_at(p).first}, false);
      if (!lease) return;
      primary_.unpin(lease.frame);
      const lock_guard locked{lock_};
      entries_[p] = {lease.frame, true, lease.writable, false};
    });
  }

  // --- Dropping. Context: the lock. ---------------------------------------------------------------------------------

  void drop(range r) noexcept {
    const std::size_t first = page_of(r.first), last = page_of(r.last - 1);
    for_each(r, [&](std::size_t p) {
      if (is(mistake::drops_only_the_first_page) && p != first) return;
      if (is(mistake::forgets_the_last_page) && p == last && p != first) return;
      entries_[p] = {};
    });
  }
  void drop_outside(range r) noexcept {
    for_each(testing::window, [&](std::size_t p) {
      if (!testing::pages_at(p).overlaps(r)) entries_[p] = {};
    });
  }
  bool ask(range r, bool clear) noexcept {
    const lock_guard locked{lock_};
    bool any = false;
    for_each(r, [&](std::size_t p) {
      any = any || (entries_[p].present && entries_[p].young);
      if (clear) entries_[p].young = false;
    });
    return any;
  }

  testing::test_primary& primary_;
  const interval_mistake mistake_;
  interval_notifier<interval_mirror> iv_{*this};
  testing::test_space* space_ = nullptr;
  testing::mutex lock_;
  std::array<entry, testing::window_pages> entries_{};
  range covered_{};
  busy busy_;
  bool closed_ = true;  ///< not inserted, or going
  // What only a mistake needs.
  interval_sequence first_{};
  bool has_first_ = false;
};

}  // namespace adapters
