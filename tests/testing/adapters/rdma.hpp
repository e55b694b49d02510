// SPDX-License-Identifier: MIT
#pragma once

// A mirror of the RDMA kind: a region with on-demand pages, that listens to its own range only, faults several pages in
// at a time, and throws a whole batch away when any of it was invalidated. It makes no claim of precision.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/notifier/subscriber.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/testing/adapter.hpp>

namespace adapters {

using namespace mmunotify;

/// Its lock is a std::mutex: the kit can disturb it only while it looks pages up.
class rdma {
 public:
  using client_type = rdma;

  explicit rdma(testing::test_primary& primary) noexcept : primary_(primary) {}

  errc attach(testing::test_space& space) noexcept {
    const errc e = space.register_subscriber(node_);
    if (e != errc::ok) return e;
    const std::lock_guard locked{umem_};
    brackets_.forget();
    closed_ = false;
    return errc::ok;
  }
  errc detach(testing::test_space& space) noexcept { return space.unregister(node_); }

  bool mapped(std::uintptr_t at) noexcept {
    const std::lock_guard locked{umem_};
    return pages_[page_of(at)].present;
  }

  testing::access_result access(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    {
      const std::lock_guard locked{umem_};
      if (closed_) return {.error = errc::released};
      if (pages_[page_of(at)].allows(write)) return touch(at, write, value);
    }
    return fault(at, write, value);
  }

  void invalidate_range_start(const invalidation& i) noexcept {
    const std::lock_guard locked{umem_};
    brackets_.start(i.range);
    const range hit = i.range.clipped_to(testing::window);
    for (std::size_t p = page_of(hit.first); p <= page_of(hit.last - 1); ++p) pages_[p] = {};
  }
  void invalidate_range_end(const invalidation& i) noexcept {
    const std::lock_guard locked{umem_};
    brackets_.end(i.range);
  }
  void release() noexcept {
    const std::lock_guard locked{umem_};
    closed_ = true;
    pages_ = {};
  }

 private:
  static constexpr std::size_t batch_pages = 4;
  struct page {
    pfn frame{};
    bool present = false;
    bool writable = false;
    bool allows(bool write) const noexcept { return present && (writable || !write); }
  };
  static std::size_t page_of(std::uintptr_t at) noexcept { return (at - testing::window.first) / page_size; }

  /// The page and those after it. If they cannot be had together, the page alone.
  testing::access_result fault(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    const testing::access_result r = fault_batch(at, batch_pages, write, value);
    return r.error == errc::again ? fault_batch(at, 1, write, value) : r;
  }

  testing::access_result fault_batch(std::uintptr_t at, std::size_t wanted, bool write, std::uint64_t value) noexcept {
    const std::size_t first = page_of(at);
    const std::size_t n = std::min(wanted, static_cast<std::size_t>(testing::window_pages) - first);
    const auto since = brackets_.read_begin();
    std::array<frame_lease, batch_pages> leases{};
    for (std::size_t i = 0; i < n; ++i) {
      leases[i] = primary_.pin(hva{testing::pages_at(first + i).first}, write && i == 0);
      if (!leases[0]) return {.error = leases[0].error};
    }
    const testing::access_result r = install(leases, n, since, at, write, value);
    for (const frame_lease& l : leases) {
      if (l) primary_.unpin(l.frame);
    }
    return r;
  }

  testing::access_result install(const std::array<frame_lease, batch_pages>& leases, std::size_t n, std::uint64_t since,
                                 std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    const std::lock_guard locked{umem_};
    const std::size_t first = page_of(at);
    if (closed_) return {.error = errc::released};
    if (brackets_.retry(since, testing::pages_at(first, n))) return {.error = errc::again};
    for (std::size_t i = 0; i < n; ++i) {
      if (leases[i]) pages_[first + i] = {leases[i].frame, true, leases[i].writable};
    }
    return touch(at, write, value);
  }

  testing::access_result touch(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    const auto word = word_at<std::uint64_t>(primary_.data(pages_[page_of(at)].frame) + at % page_size);
    if (write) word.store(value, std::memory_order_relaxed);
    return {errc::ok, write ? value : word.load(std::memory_order_relaxed)};
  }

  testing::test_primary& primary_;
  subscriber<rdma> node_{*this, {.range = testing::window}};
  std::mutex umem_;
  invalidation_window<> brackets_;
  std::array<page, testing::window_pages> pages_{};
  bool closed_ = true;
};

}  // namespace adapters
