// SPDX-License-Identifier: MIT
#pragma once

// The leaves of a direct MMU, and what is done to them under its lock: all but faults (direct_fault.hpp).
//
// Faults hold the lock shared, what takes something away holds it exclusively: each member says which it wants. As in
// shadow_tables.hpp a removal has two steps: take out of the tables and remember that a flush is due; then commit(),
// which flushes once and only then lets tables be used again.

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/direct_tables.hpp>
#include <mmunotify/secondary/x86/dirty_log.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/split.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Of a link: what is below could be one large leaf, but for the guest's fetches from it. Hardware ignores the bit.
inline constexpr std::uint64_t direct_executed_bit = bit(58);

/// Whether instructions may be fetched through an entry of the format, and the entry without that.
template <direct_format Format>
constexpr bool executable(std::uint64_t e) noexcept {
  if constexpr (requires { Format::execute_bit; }) {
    return (e & Format::execute_bit) != 0;
  } else {
    return (e & pte::no_execute) == 0;
  }
}
template <direct_format Format>
constexpr std::uint64_t not_executable(std::uint64_t e) noexcept {
  if constexpr (requires { Format::execute_bit; }) {
    return e & ~Format::execute_bit;
  } else {
    return e | pte::no_execute;
  }
}
/// The entry with it.
template <direct_format Format>
constexpr std::uint64_t made_executable(std::uint64_t e) noexcept {
  if constexpr (requires { Format::execute_bit; }) {
    return e | Format::execute_bit;
  } else {
    return e & ~pte::no_execute;
  }
}

template <direct_format Format>
class direct_leaves {
 public:
  using tables = direct_tables<Format>;
  /// Frame numbers of the host that fit into an entry.
  static constexpr std::uint64_t frame_limit = std::uint64_t{1} << 40;

  direct_leaves(memslots& slots, flush_gate& gate, mmu_counters& counters) noexcept
      : slots_(slots), gate_(gate), counters_(counters) {}
  direct_leaves(const direct_leaves&) = delete;
  direct_leaves& operator=(const direct_leaves&) = delete;

  std::shared_mutex& lock() noexcept { return lock_; }
  /// Nothing may be mapped: the address space is gone. Written under the lock; a hint without it.
  bool released() const noexcept { return released_.load(std::memory_order_relaxed); }
  void set_released(bool r) noexcept { released_.store(r, std::memory_order_relaxed); }
  const memslot_snapshot& slots() const noexcept { return slots_.current(); }
  tables& tree() noexcept { return tables_; }
  bool flush_due() const noexcept { return flush_due_; }

  static range host_range(const memslot& s, gfn f, unsigned level) noexcept {
    const auto first = static_cast<std::uintptr_t>(s.config().host_of(f).value);
    return {first, first + (frames_at(level) << page_shift)};
  }

  /// Effects: the stock has what a fault can need. Returns: ok, or no_memory. Context: without the lock.
  errc restock(table_stock& stock) noexcept {
    if (stock.size() >= tables::enough) return errc::ok;
    table_stock surplus;  // freed without the lock
    {
      const std::lock_guard locked{lock_};
      while (stock.size() < tables::enough && spare_.size() > 0) stock.push(spare_.pop());
      while (spare_.size() > 64) surplus.push(spare_.pop());
    }
    return stock.fill(tables::enough);
  }

  // --- Under the lock, exclusively; commit() follows. ---------------------------------------------------------------

  void zap(memslot& s, gfn first, gfn last) noexcept {
    const auto dropped = [&](gfn f, unsigned, std::uint64_t e) noexcept {
      if ((e & Format::dirty_bit) != 0 && s.logs(dirty_tracking::dirty_bits)) s.mark_dirty(f);
      counters_.add(mmu_counters::zapped);
    };
    flush_due_ = tables_.zap(first, last, removed_, dropped) || flush_due_;
  }
  /// Effects: these bits of the leaves are clear.
  void reduce(gfn first, gfn last, std::uint64_t bits) noexcept {
    tables_.for_each_leaf(first, last, [&](gfn, unsigned, std::atomic<std::uint64_t>& e) {
      // (dt3) release pairs with (dt4): who upgrades after a harvest sees that its mark was taken.
      const std::uint64_t was = e.fetch_and(~bits, std::memory_order_release);
      if ((was & Format::write_bit) != 0) flush_due_ = true;
    });
  }
  /// Effects: the leaves map what is behind their addresses now. Precondition: none may be written.
  void replace(memslot& s, gfn first, gfn last, const entry_change& c) noexcept {
    for (gfn f = first; f < last && f.value < tables::frame_limit; f = f + 1) {
      const auto at = tables_.find(f);
      if (!Format::present(at.value)) continue;
      const pfn frame{c.frame.value + ((s.config().host_of(f).value - c.range.first) >> page_shift)};
      if (at.level > 1 || frame.value >= frame_limit) {
        zap(s, f, f + 1);
        continue;
      }
      std::uint64_t now = at.value;
      // (dt1) release pairs with (dt2).
      while (!at.entry->compare_exchange_weak(now, (now & ~pte::address) | frame.value << page_shift,
                                              std::memory_order_release, std::memory_order_relaxed)) {
      }
      flush_due_ = true;
    }
  }

  /// Effects: the slot's leaves are as its log, which is in place, wants them (dirty_harvest.hpp: the same).
  void follow_log(memslot& s) noexcept {
    if (s.log() != nullptr) zap_large(s);
    if (s.logs(dirty_tracking::write_protect)) reduce(s.config().base, s.config().end(), Format::write_bit);
    if (s.logs(dirty_tracking::dirty_bits)) {
      collect_dirty(s);
      for (std::uint64_t n = 0; n < dirty_log::words_for(s.config().pages); ++n) static_cast<void>(s.log()->take(n));
    }
    if (s.log() == nullptr) zap(s, s.config().base, s.config().end());  // to be mapped large again
  }
  /// As x86::harvest. Preconditions: the slot keeps a log; out has dirty_log::words_for(pages) words.
  void harvest(memslot& s, std::span<std::uint64_t> out) noexcept {
    dirty_log& log = *s.log();
    if (log.how() == dirty_tracking::dirty_bits) collect_dirty(s);
    if (log.ring() != nullptr) log.ring()->reset_overflow();  // what does not fit from here on is still marked
    for (std::size_t n = 0; n < out.size(); ++n) {
      out[n] = log.take(n);
      if (log.how() == dirty_tracking::write_protect) protect_taken(s.config().base + 64 * n, out[n]);
    }
  }
  /// As x86::harvest_ring. Preconditions: the slot keeps a log by write protection with a ring.
  std::size_t harvest_ring(memslot& s, std::span<gfn> out) noexcept {
    dirty_log& log = *s.log();
    std::size_t n = 0;
    for (std::uint64_t i = 0; n < out.size() && log.ring()->pop(i);) {
      if (!log.take_one(i)) continue;  // a harvest of the bitmap has had it
      out[n] = s.config().base + i;
      reduce(out[n], out[n] + 1, Format::write_bit);
      ++n;
    }
    return n;
  }

  /// Effects: some of the slot's large leaves are made of smaller ones, from its frame `done` on, which moves. Nobody
  /// loses a translation, nothing is flushed (split.hpp). Returns: whether there may be more to do.
  bool split_some(memslot& s, std::uint64_t& done, table_stock& from) noexcept {
    while (done < s.config().pages) {
      const gfn f = s.config().base + done;
      if (f.value >= tables::frame_limit) return false;
      const auto at = tables_.find(f);
      if (at.level > 1 && Format::present(at.value)) {
        if (from.size() == 0) return true;
        split(at, from.pop());
      } else {
        done = aligned_to(f, at.level) + frames_at(at.level) - s.config().base;
      }
    }
    return false;
  }

  /// Effects: up to n tables of the slot that the guest has executed from go. Returns: how many.
  std::size_t zap_executed(memslot& s, std::size_t n) noexcept {
    std::size_t count = 0;
    for (std::uint64_t done = 0; done < s.config().pages && count < n;) {
      const gfn f = s.config().base + done;
      if (f.value >= tables::frame_limit) break;
      const auto at = tables_.find(f, 2);
      const gfn next = aligned_to(f, at.level) + frames_at(at.level);
      if (at.level == 2 && Format::present(at.value) && (at.value & direct_executed_bit) != 0) {
        zap(s, f, next < s.config().end() ? next : s.config().end());
        ++count;
      }
      done = next - s.config().base;
    }
    return count;
  }

  void request_flush() noexcept { flush_due_ = true; }
  void commit() noexcept {
    if (!flush_due_) return;
    flush_due_ = false;
    gate_.flush_locked();
    counters_.add(mmu_counters::flushes);
    spare_.take_all(removed_);
  }

  // --- Without the lock. --------------------------------------------------------------------------------------------

  bool young(range r, bool clear) noexcept {
    const read_section reading{gate_.domain()};
    bool any = false;
    slots_.current().for_each_in(r, [&](memslot&, gfn first, gfn last) {
      tables_.for_each_leaf(first, last, [&](gfn, unsigned, std::atomic<std::uint64_t>& e) {
        const std::uint64_t was =
            clear ? e.fetch_and(~Format::accessed_bit, std::memory_order_relaxed) : e.load(std::memory_order_relaxed);
        any = any || (Format::present(was) && (was & Format::accessed_bit) != 0);
      });
    });
    return any;
  }

 private:
  void split(typename tables::place at, direct_table& into) noexcept {
    constexpr std::uint64_t history = Format::accessed_bit | Format::dirty_bit;
    constexpr std::uint64_t lost = detail::mutated(detail::mutation::split_forgets_bits) ? history : 0;
    std::uint64_t leaf = at.value;
    do {  // again if a vCPU has added bits
      // What may not be executed is so for its size alone.
      const std::uint64_t kept = leaf & ~lost;
      const std::uint64_t small = at.level == 2 ? made_executable<Format>(kept & ~pte::large) : kept;
      for (unsigned n = 0; n < into.entries.size(); ++n) {
        into.entries[n].store(part_of(small, at.level, n), std::memory_order_relaxed);
      }
      // (dt1) release pairs with (dt2).
    } while (!at.entry->compare_exchange_weak(leaf, Format::link(into), std::memory_order_release,
                                              std::memory_order_relaxed));
    counters_.add(mmu_counters::split);
  }
  void zap_large(memslot& s) noexcept {
    tables_.for_each_leaf(s.config().base, s.config().end(), [&](gfn, unsigned level, std::atomic<std::uint64_t>& e) {
      if (level == 1) return;
      e.store(0, std::memory_order_relaxed);
      counters_.add(mmu_counters::zapped);
      flush_due_ = true;
    });
  }
  void collect_dirty(memslot& s) noexcept {
    const gfn base = s.config().base;
    tables_.for_each_leaf(base, s.config().end(), [&](gfn f, unsigned, std::atomic<std::uint64_t>& e) {
      if ((e.fetch_and(~Format::dirty_bit, std::memory_order_relaxed) & Format::dirty_bit) == 0) return;
      s.mark_dirty(f);
      flush_due_ = true;
    });
  }
  void protect_taken(gfn first, std::uint64_t word) noexcept {
    for (; word != 0; word &= word - 1) {
      const gfn f = first + static_cast<unsigned>(std::countr_zero(word));
      reduce(f, f + 1, Format::write_bit);
    }
  }

  memslots& slots_;
  flush_gate& gate_;
  mmu_counters& counters_;
  std::shared_mutex lock_;
  tables tables_;
  table_stock removed_;  ///< unlinked; walkers may still be inside
  table_stock spare_;    ///< free since a flush
  bool flush_due_ = false;
  std::atomic<bool> released_{false};
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
