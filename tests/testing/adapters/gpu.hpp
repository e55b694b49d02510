// SPDX-License-Identifier: MIT
#pragma once

// A mirror of the GPU kind: its device has a TLB whose flush takes its time, so a start has two passes; it migrates
// pages itself and ignores those brackets; it takes replacements in place.

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/notifier/subscriber.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/testing/adapter.hpp>
#include <mmunotify/testing/schedule.hpp>

namespace adapters {

using namespace mmunotify;

enum class gpu_mistake {
  none,
  finish_not_waited,          ///< the second pass does not wait for the flush
  one_token_for_all,          ///< two brackets in parallel hand out the same token
  no_flush_without_token,     ///< when no token is left, nothing is flushed
  begin_does_not_record,      ///< the window learns of the bracket in the second pass
  own_and_others_migrations,  ///< it ignores migrations, whoever does them
  own_bracket_any_event,      ///< it ignores every bracket with its name, also those that are no migrations
  change_entry_keeps_old,
  change_entry_keeps_write,
  change_entry_only_first,
  change_entry_not_flushed,
  change_entry_maps_unmapped,
  change_entry_revives,  ///< what only the TLB has left counts as mapped
};

class gpu {
  bool is(gpu_mistake m) const noexcept { return mistake_ == m; }

 public:
  using client_type = gpu;
  static constexpr bool precise = true;
  explicit gpu(testing::test_primary& primary, gpu_mistake m = gpu_mistake::none) noexcept
      : primary_(primary), mistake_(m), node_(*this, filter()) {}

  errc attach(testing::test_space& space) noexcept {
    const errc e = space.register_subscriber(node_);
    if (e != errc::ok) return e;
    const std::lock_guard locked{lock_};
    brackets_.forget();
    closed_ = false;
    return errc::ok;
  }
  errc detach(testing::test_space& space) noexcept { return space.unregister(node_); }
  const void* owner() const noexcept { return this; }

  bool mapped(std::uintptr_t at) noexcept {
    const std::lock_guard locked{lock_};
    return tlb_[page_of(at)].present || table_[page_of(at)].present;
  }

  testing::access_result access(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    {
      const std::lock_guard locked{lock_};
      entry& cached = tlb_[page_of(at)];
      if (!cached.allows(write)) cached = table_[page_of(at)].allows(write) ? table_[page_of(at)] : cached;
      if (cached.allows(write)) return touch(cached, at, write, value);
      if (closed_) return {.error = errc::released};
    }
    const auto since = brackets_.read_begin();
    const frame_lease lease = primary_.pin(hva{at}.page(), write);
    if (!lease) return {.error = lease.error};
    const testing::access_result r = install(lease, since, at, write, value);
    primary_.unpin(lease.frame);
    return r;
  }

  first_pass invalidate_begin(const invalidation& i) noexcept {
    if (is(gpu_mistake::own_bracket_any_event) && i.owner == this) return first_pass::complete();
    const std::lock_guard locked{lock_};
    if (!is(gpu_mistake::begin_does_not_record)) brackets_.start(i.range);
    if (i.in_place) {
      if (is(gpu_mistake::begin_does_not_record)) brackets_.start(i.range);
      return first_pass::complete();
    }
    for_each(i.range, [this](std::size_t p) { table_[p] = {}; });  // the TLB still has them
    for (flush& f : flushes_) {
      if (f.taken && !is(gpu_mistake::one_token_for_all)) continue;
      f.taken = true;
      return f;
    }
    if (is(gpu_mistake::begin_does_not_record)) brackets_.start(i.range);
    if (!is(gpu_mistake::no_flush_without_token)) flush_tlb(i.range);
    return first_pass::complete();
  }
  void invalidate_finish(two_pass_token& t, const invalidation& i) noexcept {
    const std::lock_guard locked{lock_};
    if (is(gpu_mistake::begin_does_not_record)) brackets_.start(i.range);
    static_cast<flush&>(t).taken = false;
    if (!is(gpu_mistake::finish_not_waited)) flush_tlb(i.range);
  }
  void invalidate_range_end(const invalidation& i) noexcept {
    if (is(gpu_mistake::own_bracket_any_event) && i.owner == this) return;
    const std::lock_guard locked{lock_};
    if (is(gpu_mistake::finish_not_waited)) flush_tlb(i.range);
    brackets_.end(i.range);
  }
  void change_entry(const entry_change& c) noexcept {
    const std::lock_guard locked{lock_};
    std::uint64_t n = 0;
    for_each(c.range, [&](std::size_t p) {
      const pfn frame = c.frame + n++;
      if (is(gpu_mistake::change_entry_only_first) && n > 1) return;
      // What only the TLB has left is being invalidated by another bracket: it must not come back.
      const entry was = is(gpu_mistake::change_entry_revives) && tlb_[p].present ? tlb_[p] : table_[p];
      if (!is(gpu_mistake::change_entry_not_flushed)) tlb_[p] = {};
      if (!was.present && !is(gpu_mistake::change_entry_maps_unmapped)) return;
      table_[p] = {is(gpu_mistake::change_entry_keeps_old) ? was.frame : frame, true,
                   is(gpu_mistake::change_entry_keeps_write) ? was.writable : c.writable};
      if (is(gpu_mistake::change_entry_maps_unmapped)) table_[p].frame = c.frame;
    });
  }
  void release() noexcept {
    const std::lock_guard locked{lock_};
    closed_ = true;
    table_ = {};
    tlb_ = {};
  }

 private:
  struct entry {
    pfn frame{};
    bool present = false;
    bool writable = false;
    bool allows(bool write) const noexcept { return present && (writable || !write); }
  };
  struct flush : two_pass_token {
    bool taken = false;
  };

  subscriber_filter filter() const noexcept {
    if (is(gpu_mistake::own_bracket_any_event)) return {};
    if (!is(gpu_mistake::own_and_others_migrations)) return {.owner = this};
    return {.events = {event::unmap, event::clear, event::protection_vma, event::protection_page, event::soft_dirty}};
  }
  static std::size_t page_of(std::uintptr_t at) noexcept { return (at - testing::window.first) / page_size; }
  template <class F>
  static void for_each(range r, F f) noexcept {
    const range hit = r.clipped_to(testing::window);
    if (hit.empty()) return;
    for (std::size_t p = page_of(hit.first); p <= page_of(hit.last - 1); ++p) f(p);
  }
  void flush_tlb(range r) noexcept {
    for_each(r, [this](std::size_t p) { tlb_[p] = {}; });
  }

  testing::access_result install(const frame_lease& lease, std::uint64_t since, std::uintptr_t at, bool write,
                                 std::uint64_t value) noexcept {
    const std::lock_guard locked{lock_};
    if (closed_) return {.error = errc::released};
    if (brackets_.retry(since, testing::pages_at(page_of(at)))) return {.error = errc::again};
    table_[page_of(at)] = tlb_[page_of(at)] = {lease.frame, true, lease.writable};
    return touch(tlb_[page_of(at)], at, write, value);
  }
  testing::access_result touch(const entry& e, std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    const auto word = word_at<std::uint64_t>(primary_.data(e.frame) + at % page_size);
    if (write) word.store(value, std::memory_order_relaxed);
    return {errc::ok, write ? value : word.load(std::memory_order_relaxed)};
  }

  testing::test_primary& primary_;
  const gpu_mistake mistake_;
  subscriber<gpu> node_;
  testing::mutex lock_;
  invalidation_window<> brackets_;
  std::array<entry, testing::window_pages> table_{};
  std::array<entry, testing::window_pages> tlb_{};
  std::array<flush, 2> flushes_{};
  bool closed_ = true;
};

}  // namespace adapters
