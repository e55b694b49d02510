// SPDX-License-Identifier: MIT
#pragma once

// An MMU for guests whose own tables the hardware walks: it maps guest-physical to host memory and nothing else (Linux:
// the TDP MMU). A client of the notifier like shadow_mmu, with the same memslots, window, flush and dirty log.
//
//   x86::direct_mmu<reference_mmu<>, x86::ept_format> mmu{primary};
//   subscriber node{mmu};  space.register_subscriber(node, held);
//   mmu.add_slot({.id = 0, .base = {0}, .pages = 1024, .host = {address}});
//   x86::direct_vcpu cpu{mmu};                                                          // direct_vcpu.hpp
//   x86::outcome o = cpu.access(a, x86::access::write, [](std::byte* at) noexcept { *at = std::byte{1}; });
//
// A fault: stock up, snapshot, slot, pin, all without a lock; then, with the lock *shared*, check again that no bracket
// over the page is open or has run (K1), and install by compare-exchange. Brackets hold the lock exclusively. So any
// number of vCPUs fault at the same time, and each of them before or after a bracket, never beside it.
//
// Contract: K1 to K6, as shadow_mmu.hpp has them. Brackets that withdraw write access, or replace frames in place,
// leave read-only leaves.
//
// Limits: four levels (48 bits of guest-physical address); accessed and dirty bits as by hardware that has them; slots
// have reverse mappings, 8 bytes per frame, that are not used here.

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/event.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/direct_tables.hpp>
#include <mmunotify/secondary/x86/fault.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

template <frame_provider Provider, direct_format Format>
class direct_mmu {
 public:
  using provider_type = Provider;
  using format = Format;

  /// A VM without slots and vCPUs. Preconditions: the provider outlives it; provider.data() takes no lock.
  explicit direct_mmu(Provider& provider, event_set downgrades = {event::protection_page, event::soft_dirty}) noexcept
      : provider_(provider), downgrades_(downgrades), slots_(gate_.domain()) {}
  direct_mmu(const direct_mmu&) = delete;
  direct_mmu& operator=(const direct_mmu&) = delete;
  /// Precondition (K6): the owner has destroyed the vCPUs; checked always.
  ~direct_mmu() {
    if (!gate_.empty()) detail::violated("K6", "~direct_mmu", "a vCPU of this VM still exists");
  }

  /// As those of shadow_mmu.
  errc add_slot(const memslot_config& c) noexcept { return slots_.add(c, lock_, updating()); }
  errc remove_slot(unsigned id) noexcept { return slots_.remove(id, lock_, updating()); }
  errc move_slot(unsigned id, gfn base) noexcept { return slots_.move(id, base, lock_, updating()); }
  errc log_writes(unsigned id, dirty_tracking how) noexcept {
    return slots_.set_log(id, how, 0, lock_, [this](memslot& s) noexcept { follow_log(s); });
  }
  errc harvest_writes(unsigned id, std::span<std::uint64_t> out) noexcept {
    const std::lock_guard locked{lock_};
    memslot* const slot = memslots::find_id(slots_.current(), id);
    if (slot == nullptr) return errc::not_registered;
    if (slot->log() == nullptr) return errc::disabled;
    if (out.size() != dirty_log::words_for(slot->config().pages)) return errc::bad_range;
    if (slot->logs(dirty_tracking::dirty_bits)) collect_dirty(*slot);
    for (std::size_t n = 0; n < out.size(); ++n) {
      out[n] = slot->log()->take(n);
      if (slot->logs(dirty_tracking::write_protect)) protect_taken(slot->config().base + 64 * n, out[n]);
    }
    commit();
    return errc::ok;
  }

  // --- Hooks. -------------------------------------------------------------------------------------------------------

  void invalidate_range_start(const invalidation& i) noexcept {
    const std::lock_guard locked{lock_};
    window_.start(i.range);
    if (!keeps_reads(i)) zapping_.start(i.range);
    slots_.current().for_each_in(i.range, [&](memslot& s, gfn first, gfn last) {
      if (keeps_reads(i)) {
        reduce(first, last, Format::write_bit | direct_may_write_bit);
      } else {
        zap(s, first, last);
      }
    });
    commit();
  }
  void invalidate_range_end(const invalidation& i) noexcept {
    const std::lock_guard locked{lock_};
    window_.end(i.range);
    if (!keeps_reads(i)) zapping_.end(i.range);
  }
  void change_entry(const entry_change& c) noexcept {
    const std::lock_guard locked{lock_};
    slots_.current().for_each_in(c.range, [&](memslot& s, gfn first, gfn last) { replace(s, first, last, c); });
    commit();
  }
  /// These two take no lock.
  bool clear_young(range r) noexcept { return young(r, true); }
  bool test_young(range r) noexcept { return young(r, false); }
  bool clear_flush_young(range r) noexcept {
    if (!young(r, true)) return false;
    const std::lock_guard locked{lock_};
    flush_due_ = true;
    commit();
    return true;
  }
  void release() noexcept {
    const std::lock_guard locked{lock_};
    released_.store(true, std::memory_order_relaxed);
    for (memslot* s : slots_.current().slots()) zap(*s, s->config().base, s->config().end());
    commit();
  }
  /// As that of shadow_mmu.
  void resume() noexcept {
    const std::lock_guard locked{lock_};
    window_.forget();
    released_.store(false, std::memory_order_relaxed);
  }

  /// Returns: the first broken invariant, or nullptr. Progress: blocking; looks at everything.
  const char* verify() noexcept {
    const std::lock_guard locked{lock_};
    const char* broken = flush_due_ ? "a flush is due although the lock is free" : tables_.verify();
    tables_.for_each_leaf({0}, {tables::frame_limit}, [&](gfn f, unsigned level, std::atomic<std::uint64_t>& e) {
      const memslot* const s = slots_.current().find(f);
      const bool writable = (e.load(std::memory_order_relaxed) & direct_may_write_bit) != 0;
      if (broken != nullptr) return;
      if (s == nullptr || !s->config().contains(f + (frames_at(level) - 1))) {
        broken = "a leaf maps a frame outside all slots";
      } else if (writable && s->config().read_only) {
        broken = "a read-only slot is mapped writable";
      } else if (zapping_.open_hits(host_range(*s, f, level))) {
        broken = "a leaf is inside an open bracket";
      } else if (writable && window_.open_hits(host_range(*s, f, level))) {
        broken = "a leaf may be written inside an open bracket";
      } else if (level > 1 && s->log() != nullptr) {
        broken = "a large leaf is in a slot whose writes are logged";
      }
    });
    return broken;
  }
  mmu_statistics statistics() const noexcept { return counters_.read(); }

  // --- For direct_vcpu. ---------------------------------------------------------------------------------------------

  Provider& provider() noexcept { return provider_; }
  flush_gate& gate() noexcept { return gate_; }
  std::shared_mutex& lock() noexcept { return lock_; }
  mmu_counters& counters() noexcept { return counters_; }
  const memslots& slots() const noexcept { return slots_; }
  /// Context: a section of the gate's domain.
  typename direct_tables<Format>::place find(gfn f) noexcept { return tables_.find(f); }

  /// Effects: one attempt to make the access possible. Context: a vCPU's thread, outside guest mode; may sleep.
  outcome fault(table_stock& stock, gpa a, bool write) noexcept {
    counters_.add(mmu_counters::faults);
    if (released_.load(std::memory_order_relaxed)) return {.what = outcome::released};
    if (restock(stock) != errc::ok) return {.what = outcome::no_memory};
    const gfn f = frame_of(a);
    const auto since = window_.read_begin();  // before the look-ups: both are checked against it under the lock
    const host_page at = slots_.lookup(f);
    if (!at || (write && at.read_only) || f.value >= tables::frame_limit) return {outcome::not_mapped, {}, a};
    const frame_lease lease = provider_.pin(at.address, write);
    if (!lease) return outcome_of(lease.error, a);
    const outcome o = lease.frame.value >= frame_limit || (write && !lease.writable)
                          ? outcome{outcome::not_mapped, {}, a}
                          : install(stock, f, write, since, at, lease);
    provider_.unpin(lease.frame);
    if (o.what == outcome::again) counters_.add(mmu_counters::retries);
    return o;
  }

 private:
  using tables = direct_tables<Format>;
  static constexpr std::uint64_t frame_limit = std::uint64_t{1} << 40;

  bool keeps_reads(const invalidation& i) const noexcept { return i.in_place || downgrades_.contains(i.event); }

  static range host_range(const memslot& s, gfn f, unsigned level) noexcept {
    const auto first = static_cast<std::uintptr_t>(s.config().host_of(f).value);
    return {first, first + (frames_at(level) << page_shift)};
  }

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

  unsigned host_level(const host_page& at) noexcept {
    if constexpr (large_frame_provider<Provider>) {
      const unsigned shift = provider_.mapping_shift(at.address);
      return shift < 21 ? 1 : shift < 30 ? 2 : 3;
    } else {
      return 1;
    }
  }

  outcome install(table_stock& stock, gfn f, bool write, mmu_window::snapshot since, const host_page& at,
                  const frame_lease& lease) noexcept {
    unsigned level = host_level(at);
    {
      const std::shared_lock locked{lock_};
      if (released_.load(std::memory_order_relaxed)) return {.what = outcome::released};
      const bool same_slot = memslots::lookup_in(slots_.current(), f) == at;
      if (!same_slot || window_.retry(since, page_range(at.address))) return {.what = outcome::again};
      const memslot& slot = *slots_.current().find(f);
      while (level > 1 && !fits(slot, f, level, since, lease)) --level;
      if (put(slot, f, write, at, lease, level, stock)) return {};
    }
    // A larger leaf is in the way that may not say what this one would.
    const std::lock_guard locked{lock_};
    if (memslot* const slot = slots_.current().find(f); slot != nullptr) zap(*slot, f, f + 1);
    commit();
    return {.what = outcome::again};
  }

  bool fits(const memslot& s, gfn f, unsigned level, mmu_window::snapshot since, const frame_lease& lease) noexcept {
    return s.may_be_large(f, level) && ((lease.frame.value ^ f.value) & (frames_at(level) - 1)) == 0 &&
           !window_.retry(since, host_range(s, aligned_to(f, level), level));
  }

  /// Effects: the leaf is in its place, as large as it may be; where there are smaller ones already, it is as small.
  /// What a leaf that is there allows, it goes on allowing: only what flushes takes rights away. Returns: false: a
  /// larger leaf is in the way. Context: the lock, shared.
  bool put(const memslot& slot, gfn f, bool write, const host_page& at, const frame_lease& lease, unsigned level,
           table_stock& stock) noexcept {
    constexpr std::uint64_t kept = Format::accessed_bit | Format::dirty_bit | Format::write_bit | direct_may_write_bit;
    const bool writable = !at.read_only && lease.writable;
    const bool withheld = writable && !write && slot.logs(dirty_tracking::write_protect);
    while (true) {
      const auto place = tables_.make(f, level, stock);
      if (place.level != level) return false;
      std::uint64_t seen = place.value;
      if (Format::present(seen) && !Format::maps(seen, level)) {
        --level;
        continue;
      }
      const pfn frame{lease.frame.value - (f - aligned_to(f, level))};
      const std::uint64_t used = Format::accessed_bit | (write ? Format::dirty_bit : 0);
      std::uint64_t leaf = (Format::leaf(frame, writable, level) | used) & ~(withheld ? Format::write_bit : 0);
      if (Format::present(seen)) leaf |= seen & kept;
      // (dt1) release pairs with (dt2).
      if (place.entry->compare_exchange_strong(seen, leaf, std::memory_order_release, std::memory_order_relaxed)) break;
    }
    counters_.add(mmu_counters::installs);
    if (level > 1) counters_.add(mmu_counters::large);
    if (writable && !withheld && slot.logs(dirty_tracking::write_protect)) slot.mark_dirty(f);
    return true;
  }

  // --- Under the exclusive lock. ------------------------------------------------------------------------------------

  void zap(memslot& s, gfn first, gfn last) noexcept {
    const auto dropped = [&](gfn f, unsigned, std::uint64_t e) noexcept {
      if ((e & Format::dirty_bit) != 0 && s.logs(dirty_tracking::dirty_bits)) s.mark_dirty(f);
      counters_.add(mmu_counters::zapped);
    };
    flush_due_ = tables_.zap(first, last, removed_, dropped) || flush_due_;
  }
  void reduce(gfn first, gfn last, std::uint64_t bits) noexcept {
    tables_.for_each_leaf(first, last, [&](gfn, unsigned, std::atomic<std::uint64_t>& e) {
      // (dt3) release pairs with (dt4): who upgrades after a harvest sees that its mark was taken.
      const std::uint64_t was = e.fetch_and(~bits, std::memory_order_release);
      if ((was & Format::write_bit) != 0) flush_due_ = true;
    });
  }
  void replace(memslot& s, gfn first, gfn last, const entry_change& c) noexcept {
    for (gfn f = first; f < last; f = f + 1) {
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
  void follow_log(memslot& s) noexcept {
    if (s.log() != nullptr) zap_large(s);
    if (s.logs(dirty_tracking::write_protect)) reduce(s.config().base, s.config().end(), Format::write_bit);
    if (s.logs(dirty_tracking::dirty_bits)) {
      collect_dirty(s);
      for (std::uint64_t n = 0; n < dirty_log::words_for(s.config().pages); ++n) static_cast<void>(s.log()->take(n));
    }
    if (s.log() == nullptr) zap(s, s.config().base, s.config().end());  // to be mapped large again
    commit();
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
  void commit() noexcept {
    if (!flush_due_) return;
    flush_due_ = false;
    gate_.flush_locked();
    counters_.add(mmu_counters::flushes);
    spare_.take_all(removed_);
  }

  auto updating() noexcept {
    return [this](memslot* going, std::uint64_t) noexcept {
      if (going != nullptr) zap(*going, going->config().base, going->config().end());
      commit();
    };
  }

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

  // In the order of destruction, last first.
  Provider& provider_;
  const event_set downgrades_;
  mmu_counters counters_;
  mmu_window window_;   ///< every bracket
  mmu_window zapping_;  ///< those that take mappings down; for the self-check
  flush_gate gate_;
  memslots slots_;
  std::shared_mutex lock_;
  tables tables_;
  table_stock removed_;  ///< unlinked; walkers may still be inside
  table_stock spare_;    ///< free since a flush
  bool flush_due_ = false;
  std::atomic<bool> released_{false};
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
