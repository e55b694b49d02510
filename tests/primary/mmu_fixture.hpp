// SPDX-License-Identifier: MIT
#pragma once

// What the tests of reference_mmu's operations share: pages by number, and two clients.

#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/primary/reference_mmu.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace mmu_tests {

using namespace mmunotify;

using mmu_type = reference_mmu<>;

using page_list = std::initializer_list<std::uintptr_t>;

/// Page 0 begins a 2 MiB block.
inline constexpr std::uintptr_t base = 0x4000'0000;
inline constexpr std::uintptr_t block = 512;
constexpr std::uintptr_t at(std::uintptr_t page) { return base + page * page_size; }
constexpr range pages(std::uintptr_t first, std::uintptr_t last) { return {at(first), at(last)}; }

inline errc put(mmu_type& mmu, std::uintptr_t page, std::uint64_t value) {
  return mmu.write(at(page), std::as_bytes(std::span{&value, 1}));
}
inline std::uint64_t get(mmu_type& mmu, std::uintptr_t page) {
  std::uint64_t value = ~std::uint64_t{0};
  REQUIRE(mmu.read(at(page), std::as_writable_bytes(std::span{&value, 1})) == errc::ok);
  return value;
}
inline translation look(mmu_type& mmu, std::uintptr_t page) {
  const std::shared_lock held{mmu.tables()};
  return mmu.translate_locked(hva{at(page)});
}
inline void sound(mmu_type& mmu) {
  const char* const broken = mmu.verify();
  CHECK_MESSAGE(broken == nullptr, broken);
}
template <class... Mmu>
void sound(mmu_type& a, mmu_type& b, Mmu&... more) {
  mmu_type* const family[] = {&a, &b, &more...};
  const char* const broken = mmu_type::verify(family);
  CHECK_MESSAGE(broken == nullptr, broken);
}

/// A bracket as a test expects it, in pages.
struct bracket_seen {
  event why;
  std::uintptr_t first, last;
  const void* owner = nullptr;
  friend bool operator==(const bracket_seen&, const bracket_seen&) = default;
  friend doctest::String toString(const bracket_seen& b) {
    const std::string text = std::string(to_string(b.why)) + "[" + std::to_string(b.first) + "," +
                             std::to_string(b.last) + ")" + (b.owner != nullptr ? " owned" : "");
    return text.c_str();
  }
};

/// Watches single pages and the order of things: nothing is changed at start, nothing is freed at end.
class watcher {
 public:
  explicit watcher(mmu_type& m, std::vector<std::uintptr_t> watched = {}) : mmu(m), watched_(std::move(watched)) {
    const auto held = m.lock_tables();
    REQUIRE(m.space().register_subscriber(node_, held) == errc::ok);
    remember();
  }
  ~watcher() { static_cast<void>(mmu.space().unregister(node_)); }
  watcher(const watcher&) = delete;
  watcher& operator=(const watcher&) = delete;

  bool invalidate_range_start(const invalidation& i) {
    CHECK_FALSE(open_);
    open_ = i;
    free_ = free_now();
    CHECK(same(before_, seen()));
    if (at_start) at_start();
    return i.blockable || !(refuses && i.range.overlaps(*refuses));
  }
  void invalidate_range_end(const invalidation& i) {
    REQUIRE(open_);
    CHECK(open_->range == i.range);
    CHECK(open_->event == i.event);
    CHECK(open_->owner == i.owner);
    CHECK(free_ == free_now());
    open_.reset();
    remember();
    seen_.push_back({i.event, (i.range.first - base) / page_size, (i.range.last - base) / page_size, i.owner});
  }

  /// The brackets since the last call.
  std::vector<bracket_seen> take() {
    CHECK_FALSE(open_);
    remember();
    return std::exchange(seen_, {});
  }
  /// What the watched pages are from now on, when they have changed without a bracket.
  void remember() { before_ = seen(); }

  mmu_type& mmu;
  void (*at_start)() = nullptr;
  std::optional<range> refuses;

 private:
  std::vector<translation> seen() const {
    std::vector<translation> all;
    for (const std::uintptr_t page : watched_) all.push_back(mmu.translate_locked(hva{at(page)}));
    return all;
  }
  static bool same(const std::vector<translation>& a, const std::vector<translation>& b) {
    bool equal = a.size() == b.size();
    for (std::size_t i = 0; equal && i < a.size(); ++i) {
      equal = a[i].frame == b[i].frame && a[i].present == b[i].present && a[i].writable == b[i].writable;
    }
    return equal;
  }
  std::size_t free_now() const { return mmu.memory().frames.free_count() + mmu.memory().device.free_count(); }

  std::vector<std::uintptr_t> watched_;
  std::vector<translation> before_;
  std::vector<bracket_seen> seen_;
  std::optional<invalidation> open_;
  std::size_t free_ = 0;
  subscriber<watcher> node_{*this};
};
using seen_list = std::vector<bracket_seen>;

/// A secondary MMU in the small: frames with their rights, filled by faults. It can use device pages and exclusive ones
/// of which it is the owner, and lets translations be changed in place.
class mirror {
 public:
  struct entry {
    pfn frame{};
    std::byte* data = nullptr;
    bool writable = false;
    bool owned = false;  ///< on the device, or exclusive
  };

  explicit mirror(mmu_type& m) : mmu(m) {
    const auto held = m.lock_tables();
    REQUIRE(m.space().register_subscriber(node_, held) == errc::ok);
  }
  ~mirror() { static_cast<void>(mmu.space().unregister(node_)); }
  mirror(const mirror&) = delete;
  mirror& operator=(const mirror&) = delete;

  bool invalidate_range_start(const invalidation& i) noexcept {
    const std::lock_guard held{mutex_};
    if (!i.blockable && refuses_) {
      window_.start(i.range);  // its end comes, too
      return false;
    }
    window_.start(i.range);
    if (!i.in_place || !keeps_in_place)
      table_.erase(table_.lower_bound(i.range.first), table_.lower_bound(i.range.last));
    return true;
  }
  void change_entry(const entry_change& e) noexcept {
    const std::lock_guard held{mutex_};
    const auto found = table_.find(e.range.first);
    if (found != table_.end()) found->second = {e.frame, mmu.data(e.frame), e.writable, false};
  }
  void invalidate_range_end(const invalidation& i) noexcept {
    const std::lock_guard held{mutex_};
    window_.end(i.range);
  }
  void release() noexcept {
    const std::lock_guard held{mutex_};
    table_.clear();
    released_ = true;
  }

  /// Calls f(word, in the page's frame) under the lock, with the page mapped for this access.
  /// Returns: false if it cannot be, after some collisions.
  template <class Function>
  bool access(std::uintptr_t a, bool write, Function f) {
    const range page{a & ~page_mask, (a & ~page_mask) + page_size};
    for (int attempt = 0; attempt < 100; ++attempt) {
      {
        const std::lock_guard held{mutex_};
        const auto found = table_.find(page.first);
        if (found != table_.end() && (!write || found->second.writable)) {
          f(word_at<std::uint64_t>(found->second.data + (a & page_mask)));
          return true;
        }
      }
      const auto snapshot = window_.read_begin();
      if (const owned_page own = mmu.find_owned(hva{a}, this, write); own) {
        install(page, {own.frame, own.data, write, true}, snapshot);
        continue;
      }
      const frame_lease lease = mmu.pin(hva{a}, write);
      if (!lease) return false;
      install(page, {lease.frame, mmu.data(lease.frame), lease.writable, false}, snapshot);
      mmu.unpin(lease.frame);
    }
    return false;
  }

  void refuse(bool yes) {
    const std::lock_guard held{mutex_};
    refuses_ = yes;
  }

  /// O1: what is mapped here is what the primary's tables say. Context: nobody is inside the primary.
  bool agrees() {
    const std::shared_lock tables{mmu.tables()};
    const std::lock_guard held{mutex_};
    for (const auto& [a, e] : table_) {
      const translation t = mmu.translate_locked(hva{a});
      const bool there = e.owned ? t.device || t.exclusive : t.present && (!e.writable || t.writable);
      if (!there || t.frame != e.frame) return false;
    }
    return true;
  }
  std::size_t size() {
    const std::lock_guard held{mutex_};
    return table_.size();
  }

  mmu_type& mmu;
  std::atomic<bool> keeps_in_place{true};

 private:
  void install(const range& page, const entry& e, invalidation_window<>::snapshot since) {
    const std::lock_guard held{mutex_};
    if (!released_ && !window_.retry(since, page)) table_[page.first] = e;
  }

  std::mutex mutex_;
  invalidation_window<> window_;
  std::map<std::uintptr_t, entry> table_;
  bool refuses_ = false;
  bool released_ = false;
  subscriber<mirror> node_{*this};
};

}  // namespace mmu_tests
