// SPDX-License-Identifier: MIT
#pragma once

// The tables of two-dimensional paging: one tree, from guest frame to host frame.
//
// There are no roles, no reverse mappings and no parents: a guest frame has one place. So faults need not exclude each
// other: they hold the lock shared, and whoever loses a compare-exchange finds what the winner has put there. What
// takes something away, by range, holds it exclusively, flushes, and frees tables that have become empty after the
// flush.
//
// Walkers (vCPUs in guest mode, ageing) hold no lock; tables keep their memory until the flush domain's grace period.
// Orderings: (dt1) an entry is published with release and (dt2) loaded with acquire.
//
// Cost of a range: the entries of the tables that lie in it; an empty stretch of any size is one entry of an upper
// table.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/direct_format.hpp>
#include <mmunotify/secondary/x86/memslot.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Unused tables, all zero. Not synchronised. The link is in the first entry.
class table_stock {
 public:
  table_stock() = default;
  table_stock(const table_stock&) = delete;
  table_stock& operator=(const table_stock&) = delete;
  ~table_stock() {
    while (first_ != nullptr) delete &pop();
  }

  std::size_t size() const noexcept { return size_; }
  /// Context: not under the lock. Returns: ok, or no_memory; what was allocated stays.
  errc fill(std::size_t n) noexcept {
    while (size_ < n) {
      auto* const t = new (std::nothrow) direct_table;
      if (t == nullptr) return errc::no_memory;
      push(*t);
    }
    return errc::ok;
  }
  /// Precondition: every entry but the first is zero.
  void push(direct_table& t) noexcept {
    t.entries[0].store(reinterpret_cast<std::uintptr_t>(first_), std::memory_order_relaxed);
    first_ = &t;
    ++size_;
  }
  /// Precondition: size() > 0.
  direct_table& pop() noexcept {
    direct_table& t = *first_;
    first_ = reinterpret_cast<direct_table*>(t.entries[0].exchange(0, std::memory_order_relaxed));
    --size_;
    return t;
  }
  void take_all(table_stock& from) noexcept {
    while (from.size_ > 0) push(from.pop());
  }

 private:
  direct_table* first_ = nullptr;
  std::size_t size_ = 0;
};

template <direct_format Format>
class direct_tables {
 public:
  static constexpr unsigned levels = 4;
  /// Guest frames that there is a place for.
  static constexpr std::uint64_t frame_limit = std::uint64_t{1} << (9 * levels);
  /// Tables that one fault can need.
  static constexpr std::size_t enough = levels - 1;

  direct_tables() = default;
  direct_tables(const direct_tables&) = delete;
  direct_tables& operator=(const direct_tables&) = delete;
  ~direct_tables() { take_down(root_); }

  static constexpr unsigned index(gfn f, unsigned level) noexcept {
    return static_cast<unsigned>(f.value >> (9 * (level - 1)) & 511);
  }

  /// Where a walk ends: at a leaf, or at an entry that leads nowhere.
  struct place {
    std::atomic<std::uint64_t>* entry = nullptr;
    unsigned level = 0;
    std::uint64_t value = 0;
  };
  /// Progress: wait-free. Context: the lock, shared at least, or a section of the flush domain.
  place find(gfn f, unsigned lowest = 1) noexcept {
    direct_table* t = &root_;
    for (unsigned level = levels;; --level) {
      auto& entry = t->entries[index(f, level)];
      const std::uint64_t e = entry.load(std::memory_order_acquire);  // (dt2) pairs with (dt1)
      if (level == lowest || !Format::present(e) || Format::maps(e, level)) return {&entry, level, e};
      t = Format::table(e);
    }
  }

  /// Returns: the place of a leaf of this level for the frame; tables on the way are made. It may be above `level` if a
  /// larger leaf is in the way, and hold a table if smaller ones are. Preconditions: f < frame_limit; the stock holds
  /// `enough`. Context: the lock, shared.
  place make(gfn f, unsigned level, table_stock& from) noexcept {
    while (true) {
      place at = find(f, level);
      if (at.level == level || Format::present(at.value)) return at;
      direct_table& fresh = from.pop();
      // (dt1) release pairs with (dt2): the table is empty for who finds it.
      if (at.entry->compare_exchange_strong(at.value, Format::link(fresh), std::memory_order_release,
                                            std::memory_order_relaxed)) {
        continue;
      }
      from.push(fresh);  // somebody else was faster
    }
  }

  /// Effects: no leaf maps a frame of [first, last). Tables that are empty then are in `removed`, to be used again
  /// after a flush. Calls dropped(gfn, level, entry) for each leaf. Returns: whether there was one. Context: the lock,
  /// exclusive.
  template <class F>
  bool zap(gfn first, gfn last, table_stock& removed, F&& dropped) noexcept {
    return zap(root_, levels, {0}, first, last, removed, dropped);
  }

  /// Calls f(gfn, level, entry&) for each leaf that maps a frame of [first, last). Context: as find.
  template <class F>
  void for_each_leaf(gfn first, gfn last, F&& f) noexcept {
    visit(root_, levels, {0}, first, last, f);
  }

  /// Returns: the first broken invariant, or nullptr. Context: the lock, exclusive.
  const char* verify() noexcept { return verify(root_, levels); }
  direct_table& root() noexcept { return root_; }

 private:
  /// The entries of a table at `base` that reach into [first, last).
  static std::pair<unsigned, unsigned> part(gfn base, unsigned level, gfn first, gfn last) noexcept {
    const std::uint64_t one = frames_at_level(level), end = base.value + 512 * one;
    const std::uint64_t from = std::max(first.value, base.value), to = std::min(last.value, end);
    if (from >= to) return {0, 0};
    return {static_cast<unsigned>((from - base.value) / one), static_cast<unsigned>((to - 1 - base.value) / one + 1)};
  }
  static constexpr std::uint64_t frames_at_level(unsigned level) noexcept {
    return std::uint64_t{1} << (9 * (level - 1));
  }

  template <class F>
  static bool zap(direct_table& t, unsigned level, gfn base, gfn first, gfn last, table_stock& removed,
                  F& dropped) noexcept {
    bool any = false;
    const auto [from, to] = part(base, level, first, last);
    for (unsigned i = from; i < to; ++i) {
      const std::uint64_t e = t.entries[i].load(std::memory_order_relaxed);
      if (!Format::present(e)) continue;
      const gfn at = base + i * frames_at_level(level);
      if (Format::maps(e, level)) {
        // A vCPU may add bits until now: the last value counts.
        dropped(at, level, t.entries[i].exchange(0, std::memory_order_relaxed));
        any = true;
        continue;
      }
      direct_table& below = *Format::table(e);
      any = zap(below, level - 1, at, first, last, removed, dropped) || any;
      if (!empty(below)) continue;
      t.entries[i].store(0, std::memory_order_relaxed);
      removed.push(below);
      any = true;  // somebody may be walking it
    }
    return any;
  }

  template <class F>
  static void visit(direct_table& t, unsigned level, gfn base, gfn first, gfn last, F& f) noexcept {
    const auto [from, to] = part(base, level, first, last);
    for (unsigned i = from; i < to; ++i) {
      const std::uint64_t e = t.entries[i].load(std::memory_order_acquire);  // (dt2) pairs with (dt1)
      if (!Format::present(e)) continue;
      const gfn at = base + i * frames_at_level(level);
      if (Format::maps(e, level)) {
        f(at, level, t.entries[i]);
      } else {
        visit(*Format::table(e), level - 1, at, first, last, f);
      }
    }
  }

  static bool empty(const direct_table& t) noexcept {
    return std::all_of(t.entries.begin(), t.entries.end(),
                       [](const auto& e) { return e.load(std::memory_order_relaxed) == 0; });
  }

  static const char* verify(direct_table& t, unsigned level) noexcept {
    for (auto& entry : t.entries) {
      const std::uint64_t e = entry.load(std::memory_order_relaxed);
      if (e == 0) continue;
      if (!Format::present(e)) return "an entry that is not present has bits";
      if (Format::reserved(e, level)) return "an entry has reserved bits";
      if (Format::maps(e, level)) {
        const bool writable = (e & Format::write_bit) != 0;
        if (writable && (e & direct_may_write_bit) == 0) return "a leaf is writable although it may not be written";
        continue;
      }
      if (const char* broken = verify(*Format::table(e), level - 1); broken != nullptr) return broken;
    }
    return nullptr;
  }

  static void take_down(direct_table& t, unsigned level = levels) noexcept {
    for (auto& entry : t.entries) {
      const std::uint64_t e = entry.load(std::memory_order_relaxed);
      if (!Format::present(e) || Format::maps(e, level)) continue;
      take_down(*Format::table(e), level - 1);
      delete Format::table(e);
    }
  }

  direct_table root_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
