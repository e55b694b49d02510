// SPDX-License-Identifier: MIT
#pragma once

// A range mirror as it should be, and what goes wrong with one: each mistake is the same code with one thing changed.
//
// The mirror has one entry for each page of the window. One short lock protects the entries and the window of brackets;
// no callback waits while it holds it.

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>

#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/notifier/subscriber.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/testing/adapter.hpp>
#include <mmunotify/testing/schedule.hpp>

#include "testing/adapters/busy.hpp"

namespace adapters {

using namespace mmunotify;
using testing::access_result;
using testing::pages_at;
using testing::test_primary;
using testing::test_space;
using testing::window;
using testing::window_pages;

enum class mistake {
  none,
  // What is dropped.
  forgets_last_page,
  off_by_one_first,
  one_page_of_a_huge_range,
  rounds_crooked_edges_inwards,
  clears_other_ranges,
  ignores_soft_dirty,
  ignores_all_migrations,
  device_keeps_its_translation,
  // When.
  zaps_at_the_end,
  zaps_at_the_next_access,
  zaps_before_it_records,
  opens_before_it_has_ended_all,
  remembers_one_bracket,
  remembers_four_brackets,
  end_forgets_history,
  // The retry.
  no_retry_check,
  ignores_open_brackets,
  ignores_ended_brackets,
  snapshot_too_late,
  checks_retry_before_lock,
  drops_the_lock_after_the_check,
  retries_for_any_bracket,
  retries_for_ever_after_many,
  maps_read_only_pages_writable,
  // Refusals.
  refuses_blockable,
  half_done_refusal,
  refuses_unrecorded,
  refuses_without_reason,
  // Young.
  young_always_false,
  young_always_true,
  test_clears_young,
  clearing_leaves_young,
  clearing_clears_all,
  no_young_after_clearing,
  // Its life.
  keeps_mappings_on_release,
  maps_after_release,
  maps_before_registered,
  usable_while_registering,
  does_not_forget_when_it_returns,
  registers_on_a_released_space,
  // Inside callbacks.
  pins_in_a_callback,
  locks_twice,
  allocates_in_a_callback,
  // Frames, and the device's TLB.
  keeps_a_pin_after_a_collision,
  unpins_twice,
  flush_of_everything_overflows,
};

class mirror {
  bool is(mistake m) const noexcept { return mistake_ == m; }

 public:
  using client_type = mirror;
  static constexpr bool precise = true;

  explicit mirror(test_primary& primary, mistake m = mistake::none) noexcept : primary_(primary), mistake_(m) {}

  // --- The adapter. -------------------------------------------------------------------------------------------------

  errc attach(test_space& space) noexcept {
    if (is(mistake::usable_while_registering)) closed_ = false;
    const errc e = space.register_subscriber(node_);
    if (e != errc::ok) return is(mistake::registers_on_a_released_space) ? errc::ok : e;
    const std::lock_guard locked{lock_};
    if (!is(mistake::does_not_forget_when_it_returns)) brackets_.forget();
    closed_ = false;
    return errc::ok;
  }
  errc detach(test_space& space) noexcept { return space.unregister(node_); }

  bool mapped(std::uintptr_t at) noexcept {
    const std::lock_guard locked{lock_};
    return entries_[page_of(at)].present;
  }

  access_result access(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    {
      const std::lock_guard locked{lock_};
      if (is(mistake::zaps_at_the_next_access)) zap_later();
      const entry& e = is(mistake::device_keeps_its_translation) ? device_[page_of(at)] : entries_[page_of(at)];
      if (e.present && (!write || e.writable)) return touch(at, write, value);
      if (closed_ && !is(mistake::maps_before_registered)) return {.error = errc::released};
    }
    return fault(at, write, value);
  }

  /// While it lives, the device cannot be stopped.
  busy::hold hold() noexcept { return busy::hold{busy_}; }

  // --- The hooks. ---------------------------------------------------------------------------------------------------

  bool invalidate_range_start(const invalidation& i) noexcept {
    if (is(mistake::ignores_soft_dirty) && i.event == event::soft_dirty) return true;
    if (is(mistake::ignores_all_migrations) && i.event == event::migrate) return true;
    if (is(mistake::refuses_unrecorded) && !i.blockable && busy_) return false;
    if (is(mistake::refuses_blockable) && i.range.last == UINTPTR_MAX) return refused(i);
    if (is(mistake::refuses_without_reason) && !i.blockable) return refused(i);
    if (i.blockable) busy_.wait();
    if (is(mistake::pins_in_a_callback)) pin_in_callback();
    if (is(mistake::allocates_in_a_callback)) ::operator delete(::operator new(sizeof(int)));
    if (is(mistake::zaps_before_it_records)) {
      {
        const std::lock_guard locked{lock_};
        zap(i.range);
      }
      const std::lock_guard locked{lock_};
      record_start(i.range);
      return true;
    }
    const std::lock_guard locked{lock_};
    record_start(i.range);
    if (!i.blockable && busy_) {
      if (is(mistake::half_done_refusal)) zap(i.range);
      return false;
    }
    if (is(mistake::zaps_at_the_next_access)) {
      later_ = later_.empty() ? i.range : later_.hull_with(i.range);
    } else if (!is(mistake::zaps_at_the_end)) {
      zap(i.range);
    }
    return true;
  }

  void invalidate_range_end(const invalidation& i) noexcept {
    if (is(mistake::ignores_soft_dirty) && i.event == event::soft_dirty) return;
    if (is(mistake::ignores_all_migrations) && i.event == event::migrate) return;
    const std::lock_guard locked{lock_};
    if (is(mistake::locks_twice)) {
      const std::lock_guard again{lock_};
    }
    if (is(mistake::zaps_at_the_end)) zap(i.range);
    record_end(i.range);
  }

  bool test_young(range r) noexcept { return young(r, is(mistake::test_clears_young)); }
  bool clear_young(range r) noexcept { return young(r, !is(mistake::clearing_leaves_young)); }
  bool clear_flush_young(range r) noexcept { return young(r, !is(mistake::clearing_leaves_young)); }

  void invalidate_secondary_tlbs(range r) noexcept {
    if (is(mistake::flush_of_everything_overflows) && r.last + page_mask < r.last) return;
    const std::lock_guard locked{lock_};
    zap(r);
  }

  void release() noexcept {
    const std::lock_guard locked{lock_};
    if (!is(mistake::maps_after_release)) closed_ = true;
    if (!is(mistake::keeps_mappings_on_release)) zap(window);
  }

 private:
  struct entry {
    pfn frame{};
    bool present = false;
    bool writable = false;
    bool young = false;
  };

  static std::size_t page_of(std::uintptr_t at) noexcept { return (at - window.first) / page_size; }

  // --- Faults. ------------------------------------------------------------------------------------------------------

  access_result fault(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    const hva page = hva{at}.page();
    const range over = pages_at(page_of(at));
    auto since = brackets_.read_begin();
    const frame_lease lease = primary_.pin(page, write);
    if (!lease) return {.error = lease.error};
    if (is(mistake::snapshot_too_late)) since = brackets_.read_begin();
    const access_result r = install(at, write, value, over, since, lease);
    if (!(is(mistake::keeps_a_pin_after_a_collision) && r.error == errc::again)) primary_.unpin(lease.frame);
    if (is(mistake::unpins_twice)) primary_.unpin(lease.frame);
    return r;
  }

  access_result install(std::uintptr_t at, bool write, std::uint64_t value, range over, std::uint64_t since,
                        const frame_lease& lease) noexcept {
    if (is(mistake::checks_retry_before_lock) && collides(since, over)) return {.error = errc::again};
    std::unique_lock locked{lock_};
    if (closed_ && !is(mistake::maps_before_registered)) return {.error = errc::released};
    if (!is(mistake::checks_retry_before_lock) && collides(since, over)) return {.error = errc::again};
    if (is(mistake::drops_the_lock_after_the_check)) {
      locked.unlock();
      locked.lock();
    }
    const bool writable = lease.writable || is(mistake::maps_read_only_pages_writable);
    entries_[page_of(at)] = device_[page_of(at)] = {lease.frame, true, writable, false};
    return touch(at, write, value);
  }

  bool collides(std::uint64_t since, range over) const noexcept {
    if (is(mistake::no_retry_check)) return false;
    if (is(mistake::ignores_open_brackets)) return brackets_.read_begin() != since;
    if (is(mistake::ignores_ended_brackets)) return brackets_.open_hits(over);
    if (is(mistake::remembers_one_bracket)) {
      return one_.overlaps(over) || brackets_.read_begin() != since;
    }
    if (is(mistake::remembers_four_brackets)) {
      for (std::size_t i = 0; i < 4 && i < four_count_; ++i) {
        if (four_[i].overlaps(over)) return true;
      }
      return brackets_.read_begin() != since;
    }
    if (is(mistake::opens_before_it_has_ended_all)) {
      return (open_ && brackets_.open_hits(over)) || brackets_.read_begin() != since;
    }
    if (is(mistake::retries_for_any_bracket)) return brackets_.open() != 0 || brackets_.read_begin() != since;
    if (is(mistake::retries_for_ever_after_many)) {
      if (brackets_.read_begin() > 900) return true;
    }
    if (is(mistake::end_forgets_history)) {
      return brackets_.open_hits(over) || (brackets_.read_begin() - since == 1 && brackets_.retry(since, over));
    }
    return brackets_.retry(since, over);
  }

  /// What the device does with its translation. Context: the lock.
  access_result touch(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    entry& e = entries_[page_of(at)];
    if (!is(mistake::no_young_after_clearing) || !cleared_) e.young = true;
    const pfn frame = is(mistake::device_keeps_its_translation) ? device_[page_of(at)].frame : e.frame;
    const auto word = word_at<std::uint64_t>(primary_.data(frame) + at % page_size);
    if (!write) return {errc::ok, word.load(std::memory_order_relaxed)};
    word.store(value, std::memory_order_relaxed);
    return {errc::ok, value};
  }

  // --- Dropping, and what is remembered of brackets. Context: the lock. ---------------------------------------------

  template <class F>
  void for_each(range r, F f) const noexcept {
    const range hit = r.clipped_to(window);
    if (hit.empty()) return;
    std::size_t first = page_of(hit.first), last = page_of(hit.last - 1);
    if (is(mistake::off_by_one_first)) first += 1;
    if (is(mistake::forgets_last_page) && last != first) last -= 1;
    if (is(mistake::one_page_of_a_huge_range) && last - first + 1 == window_pages) last = first;
    if (is(mistake::clears_other_ranges)) last = last + 1 < window_pages ? last + 1 : last;
    if (is(mistake::rounds_crooked_edges_inwards)) {
      first = page_of(hit.first + page_mask);
      last = page_of(hit.last);
      if (last == 0) return;
      last -= 1;
    }
    for (std::size_t p = first; p <= last && p < window_pages; ++p) f(p);
  }
  void zap(range r) noexcept {
    for_each(r, [this](std::size_t p) { entries_[p] = {}; });
  }
  void zap_later() noexcept {
    zap(later_);
    later_ = {};
  }
  void record_start(range r) noexcept {
    brackets_.start(r);
    if (is(mistake::remembers_one_bracket) && one_.empty()) one_ = r;
    if (is(mistake::remembers_four_brackets) && four_count_++ < 4) four_[four_count_ - 1] = r;
    open_ = true;
  }
  void record_end(range r) noexcept {
    brackets_.end(r);
    if (one_ == r) one_ = {};
    if (is(mistake::remembers_four_brackets) && --four_count_ < 4) {
      for (std::size_t i = 0; i < four_count_; ++i) {
        if (four_[i] == r) four_[i] = four_[four_count_];
      }
    }
    open_ = false;
  }
  bool refused(const invalidation& i) noexcept {
    const std::lock_guard locked{lock_};
    record_start(i.range);
    return false;
  }
  void pin_in_callback() noexcept {
    const frame_lease l = primary_.pin(hva{window.first}, false);
    if (l) primary_.unpin(l.frame);
  }

  bool young(range r, bool clear) noexcept {
    if (is(mistake::young_always_false)) return false;
    const std::lock_guard locked{lock_};
    bool any = is(mistake::young_always_true);
    const range cleared = is(mistake::clearing_clears_all) ? window : r;
    for_each(r, [&](std::size_t p) { any = any || (entries_[p].present && entries_[p].young); });
    if (clear) {
      for_each(cleared, [&](std::size_t p) { entries_[p].young = false; });
      cleared_ = true;
    }
    return any;
  }

  test_primary& primary_;
  const mistake mistake_;
  subscriber<mirror> node_{*this};
  testing::mutex lock_;
  invalidation_window<> brackets_;
  std::array<entry, window_pages> entries_{};
  std::array<entry, window_pages> device_{};  ///< what the device has loaded of them, where it is not the same
  busy busy_;
  bool closed_ = true;  ///< not registered, or released
  // What only mistakes need.
  range later_{}, one_{};
  std::array<range, 4> four_{};
  std::size_t four_count_ = 0;
  bool open_ = false;
  bool cleared_ = false;
};

}  // namespace adapters
