// SPDX-License-Identifier: MIT
#pragma once

// A mirror of four intervals side by side, each with a lock of its own and a device whose flush takes its time: a start
// has two passes. Its locks are std::mutex: the kit can disturb it only while it looks pages up.

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>

#include <mmunotify/interval/interval_notifier.hpp>
#include <mmunotify/notifier/two_pass.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/testing/interval_adapter.hpp>

namespace adapters {

using namespace mmunotify;

class interval_regions {
  struct page {
    pfn frame{};
    bool present = false;
    bool writable = false;
  };

 public:
  /// One region: the client of one interval.
  class region {
   public:
    first_pass invalidate_begin(const interval_invalidation& i) noexcept {
      const std::lock_guard locked{lock};
      for (std::uintptr_t at = i.range.first; at < i.range.last; at = (at / page_size + 1) * page_size)
        pages[page_of(at)] = {};
      flush* const mine = take();
      if (mine == nullptr) return first_pass::complete();  // and flushed at once
      return *mine;
    }
    void invalidate_finish(two_pass_token& t, const interval_invalidation&) noexcept {
      const std::lock_guard locked{lock};
      static_cast<flush&>(t).busy = false;
    }
    void release() noexcept { close(); }

    void close() noexcept {
      const std::lock_guard locked{lock};
      closed = true;
      pages = {};
    }

    static std::size_t page_of(std::uintptr_t at) noexcept { return (at - testing::window.first) / page_size; }

    std::mutex lock;
    std::array<page, testing::window_pages> pages{};
    bool closed = true;
    interval_notifier<region> interval{*this};

   private:
    struct flush : two_pass_token {
      bool busy = false;
    };
    flush* take() noexcept {
      for (flush& f : flushes_) {
        if (!f.busy) return f.busy = true, &f;
      }
      return nullptr;
    }
    std::array<flush, 2> flushes_{};
  };
  using client_type = region;
  static constexpr bool precise = true;

  explicit interval_regions(testing::test_primary& primary) noexcept : primary_(primary) {}

  errc attach(testing::test_space& space, range r) noexcept {
    const std::uint64_t pages = (r.last - r.first) / page_size;
    std::uintptr_t at = r.first;
    for (std::size_t i = 0; i < used; ++i) {
      const std::uintptr_t next = i + 1 == used ? r.last : r.first + pages * (i + 1) / used * page_size;
      const errc e = space.insert(regions_[i].interval, {at, next});
      if (e != errc::ok) return e == errc::released && i == 0 ? e : undo(space, i, e);
      at = next;
      const std::lock_guard locked{regions_[i].lock};
      regions_[i].closed = false;
    }
    return errc::ok;
  }
  errc detach(testing::test_space& space) noexcept {
    for (region& r : regions_) r.close();
    errc worst = errc::ok;
    for (region& r : regions_) {
      if (const errc e = space.remove(r.interval); e != errc::ok && e != errc::not_registered) worst = e;
    }
    return worst;
  }

  bool mapped(std::uintptr_t at) noexcept {
    bool any = false;
    for (region& r : regions_) {
      const std::lock_guard locked{r.lock};
      any = any || r.pages[region::page_of(at)].present;
    }
    return any;
  }
  testing::access_result access(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    region* const r = region_of(at);
    if (r == nullptr) return {.error = errc::not_mapped};
    {
      const std::lock_guard locked{r->lock};
      const page& p = r->pages[region::page_of(at)];
      if (r->closed) return {.error = errc::released};
      if (p.present && (p.writable || !write)) return touch(p, at, write, value);
    }
    const interval_sequence seq = r->interval.read_begin();
    const frame_lease lease = primary_.pin(hva{at}.page(), write);
    if (!lease) return {.error = lease.error};
    const testing::access_result result = install(*r, lease, seq, at, write, value);
    primary_.unpin(lease.frame);
    return result;
  }

 private:
  static constexpr std::size_t used = 4;

  errc undo(testing::test_space& space, std::size_t inserted, errc why) noexcept {
    for (std::size_t i = 0; i < inserted; ++i) {
      regions_[i].close();
      static_cast<void>(space.remove(regions_[i].interval));
    }
    return why;
  }
  region* region_of(std::uintptr_t at) noexcept {
    for (region& r : regions_) {
      if (r.interval.range().contains(at)) return &r;
    }
    return nullptr;
  }
  testing::access_result install(region& r, const frame_lease& lease, interval_sequence seq, std::uintptr_t at,
                                 bool write, std::uint64_t value) noexcept {
    const std::lock_guard locked{r.lock};
    if (r.closed) return {.error = errc::released};
    if (r.interval.read_retry(seq)) return {};
    page& p = r.pages[region::page_of(at)];
    p = {lease.frame, true, lease.writable};
    return touch(p, at, write, value);
  }
  testing::access_result touch(const page& p, std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    const auto word = word_at<std::uint64_t>(primary_.data(p.frame) + at % page_size);
    if (write) word.store(value, std::memory_order_relaxed);
    return {errc::ok, write ? value : word.load(std::memory_order_relaxed)};
  }

  testing::test_primary& primary_;
  std::array<region, used> regions_{};
};

}  // namespace adapters
