// SPDX-License-Identifier: MIT
#pragma once

// A device that mirrors any part of an address space, as Linux's test_hmm module does: it loads and stores words
// through mappings of its own, takes pages into its memory, and takes pages for itself alone.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <shared_mutex>

#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/notifier/subscriber.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/primary/reference_mmu.hpp>

namespace adapters {

using namespace mmunotify;

class dmirror {
 public:
  using primary_type = reference_mmu<>;

  explicit dmirror(primary_type& primary) noexcept : primary_(primary) {}
  dmirror(const dmirror&) = delete;
  dmirror& operator=(const dmirror&) = delete;
  ~dmirror() { static_cast<void>(close()); }

  errc open() {
    const auto held = primary_.lock_tables();
    const errc e = primary_.space().register_subscriber(node_, held);
    const std::lock_guard locked{lock_};
    brackets_.forget();
    open_ = e == errc::ok;
    return e;
  }
  errc close() { return node_.registered() ? primary_.space().unregister(node_) : errc::not_registered; }

  /// One word, as the device sees it.
  errc load(std::uintptr_t at, std::uint64_t& value) {
    return access(at, false, [&](std::atomic_ref<std::uint64_t> w) { value = w.load(std::memory_order_relaxed); });
  }
  errc store(std::uintptr_t at, std::uint64_t value) {
    return access(at, true, [&](std::atomic_ref<std::uint64_t> w) { w.store(value, std::memory_order_relaxed); });
  }

  /// Adds to the word, in one step as far as the device's other accesses go.
  errc add(std::uintptr_t at, std::uint64_t value) {
    return access(at, true, [&](std::atomic_ref<std::uint64_t> w) { w.fetch_add(value, std::memory_order_relaxed); });
  }

  /// What the device would see of the page without a fault: what the primary's tables say.
  translation snapshot(std::uintptr_t at) {
    const std::shared_lock reading{primary_.tables()};
    return primary_.translate_locked(hva{at});
  }
  bool mapped(std::uintptr_t at) {
    const std::lock_guard locked{lock_};
    return entries_.count(at / page_size) != 0;
  }

  /// The device's own bracket around something that the primary does for it: it does not listen to that one, and has
  /// let go itself.
  template <class F>
  errc on_its_own(range r, F f) {
    {
      const std::lock_guard locked{lock_};
      brackets_.start(r);
      drop(r);
    }
    const errc e = f();
    const std::lock_guard locked{lock_};
    brackets_.end(r);
    return e;
  }

  unsigned faults() const { return faults_.load(); }
  unsigned collisions() const { return collisions_.load(); }

  void invalidate_range_start(const invalidation& i) noexcept {
    const std::lock_guard locked{lock_};
    brackets_.start(i.range);
    drop(i.range);
  }
  void invalidate_range_end(const invalidation& i) noexcept {
    const std::lock_guard locked{lock_};
    brackets_.end(i.range);
  }
  void release() noexcept {
    const std::lock_guard locked{lock_};
    open_ = false;
    entries_.clear();
  }

 private:
  struct entry {
    std::byte* data;
    bool writable;
  };
  struct found {
    errc error = errc::not_mapped;
    entry page{};
    pfn lent{};
    bool is_lent = false;
  };

  void drop(range r) {
    entries_.erase(entries_.lower_bound(r.first / page_size), entries_.upper_bound((r.last - 1) / page_size));
  }

  /// The page, in the device's memory, or the device's alone, or lent by the primary. Without the lock.
  found look_up(std::uintptr_t at, bool write) {
    if (const auto owned = primary_.find_owned(hva{at}, this, write); owned) return {errc::ok, {owned.data, write}};
    const frame_lease l = primary_.pin(hva{at}, write);
    if (!l) return {.error = l.error};
    return {errc::ok, {primary_.data(l.frame), l.writable}, l.frame, true};
  }

  template <class F>
  errc access(std::uintptr_t at, bool write, F f) {
    while (true) {
      {
        const std::lock_guard locked{lock_};
        if (!open_) return errc::released;
        const auto e = entries_.find(at / page_size);
        if (e != entries_.end() && (e->second.writable || !write)) {
          f(word_at<std::uint64_t>(e->second.data + at % page_size));
          return errc::ok;
        }
      }
      const errc e = fault(at, write);
      if (e != errc::ok && e != errc::again) return e;
    }
  }

  errc fault(std::uintptr_t at, bool write) {
    faults_.fetch_add(1);
    const auto since = brackets_.read_begin();
    const found page = look_up(at, write);
    if (page.error != errc::ok) return page.error;
    errc e = errc::again;
    {
      const std::lock_guard locked{lock_};
      const std::uintptr_t first = at / page_size * page_size;
      if (open_ && !brackets_.retry(since, {first, first + page_size})) {
        entries_[at / page_size] = page.page;
        e = errc::ok;
      }
    }
    if (page.is_lent) primary_.unpin(page.lent);
    if (e == errc::again) collisions_.fetch_add(1);
    return e;
  }

  primary_type& primary_;
  subscriber<dmirror> node_{*this, {.owner = this}};
  std::mutex lock_;
  invalidation_window<> brackets_;
  std::map<std::uintptr_t, entry> entries_;
  bool open_ = false;
  std::atomic<unsigned> faults_{0}, collisions_{0};
};

}  // namespace adapters
