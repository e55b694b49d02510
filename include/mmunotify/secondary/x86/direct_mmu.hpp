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
// Faults hold the lock shared (direct_fault.hpp), brackets exclusively (direct_leaves.hpp).
//
// Contract: K1 to K6, as shadow_mmu.hpp has them. Brackets that withdraw write access, or replace frames in place,
// leave read-only leaves.
//
// Limits: four levels (48 bits of guest-physical address); accessed and dirty bits as by hardware that has them; slots
// have reverse mappings, 8 bytes per frame, that are not used here.

#include <atomic>
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
#include <mmunotify/secondary/x86/direct_fault.hpp>
#include <mmunotify/secondary/x86/direct_leaves.hpp>
#include <mmunotify/secondary/x86/direct_tables.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/options.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/split.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

template <frame_provider Provider, direct_format Format>
class direct_mmu {
 public:
  using provider_type = Provider;
  using format = Format;

  /// A VM without slots and vCPUs. Preconditions: the provider outlives it; provider.data() takes no lock.
  explicit direct_mmu(Provider& provider, const mmu_options& o = {}) noexcept
      : provider_(provider),
        downgrades_(o.downgrades),
        eager_split_(o.eager_split),
        nx_huge_(o.nx_huge),
        slots_(gate_.domain()),
        leaves_(slots_, gate_, counters_),
        faults_(provider, slots_, window_, leaves_, counters_, o) {}
  direct_mmu(const direct_mmu&) = delete;
  direct_mmu& operator=(const direct_mmu&) = delete;
  /// Precondition (K6): the owner has destroyed the vCPUs; checked always.
  ~direct_mmu() {
    if (!gate_.empty()) detail::violated("K6", "~direct_mmu", "a vCPU of this VM still exists");
  }

  // --- As those of shadow_mmu. --------------------------------------------------------------------------------------

  errc add_slot(const memslot_config& c) noexcept { return slots_.add(c, lock(), updating()); }
  errc remove_slot(unsigned id) noexcept { return slots_.remove(id, lock(), updating()); }
  errc move_slot(unsigned id, gfn base) noexcept { return slots_.move(id, base, lock(), updating()); }

  errc log_writes(unsigned id, dirty_tracking how, std::uint64_t ring = 0) noexcept {
    if (ring != 0 && how != dirty_tracking::write_protect) return errc::bad_range;
    if (eager_split_ && how != dirty_tracking::off) split_large(id);
    return slots_.set_log(id, how, ring, lock(), [this](memslot& s) noexcept {
      leaves_.follow_log(s);
      leaves_.commit();
    });
  }
  errc harvest_writes(unsigned id, std::span<std::uint64_t> out) noexcept {
    const std::lock_guard locked{lock()};
    memslot* const slot = memslots::find_id(slots_.current(), id);
    if (slot == nullptr) return errc::not_registered;
    if (slot->log() == nullptr) return errc::disabled;
    if (out.size() != dirty_log::words_for(slot->config().pages)) return errc::bad_range;
    leaves_.harvest(*slot, out);
    leaves_.commit();
    return errc::ok;
  }

  written_frames harvest_ring(unsigned id, std::span<gfn> out) noexcept {
    const std::lock_guard locked{lock()};
    memslot* const slot = memslots::find_id(slots_.current(), id);
    if (const errc e = ring_error(slot); e != errc::ok) return {.error = e};
    const written_frames found{.count = leaves_.harvest_ring(*slot, out)};
    leaves_.commit();
    return found;
  }

  // --- Hooks. -------------------------------------------------------------------------------------------------------

  void invalidate_range_start(const invalidation& i) noexcept {
    const std::lock_guard locked{lock()};
    window_.start(i.range);
    if (!keeps_reads(i)) zapping_.start(i.range);
    slots_.current().for_each_in(i.range, [&](memslot& s, gfn first, gfn last) {
      if (keeps_reads(i)) {
        leaves_.reduce(first, last, Format::write_bit | direct_may_write_bit);
      } else {
        leaves_.zap(s, first, last);
      }
    });
    leaves_.commit();
  }
  void invalidate_range_end(const invalidation& i) noexcept {
    const std::lock_guard locked{lock()};
    window_.end(i.range);
    if (!keeps_reads(i)) zapping_.end(i.range);
  }
  void change_entry(const entry_change& c) noexcept {
    const std::lock_guard locked{lock()};
    slots_.current().for_each_in(c.range, [&](memslot& s, gfn first, gfn last) { leaves_.replace(s, first, last, c); });
    leaves_.commit();
  }
  /// These two take no lock.
  bool clear_young(range r) noexcept { return leaves_.young(r, true); }
  bool test_young(range r) noexcept { return leaves_.young(r, false); }
  bool clear_flush_young(range r) noexcept {
    if (!leaves_.young(r, true)) return false;
    const std::lock_guard locked{lock()};
    leaves_.request_flush();
    leaves_.commit();
    return true;
  }
  void release() noexcept {
    const std::lock_guard locked{lock()};
    leaves_.set_released(true);
    for (memslot* s : slots_.current().slots()) leaves_.zap(*s, s->config().base, s->config().end());
    leaves_.commit();
  }
  /// As that of shadow_mmu.
  void resume() noexcept {
    const std::lock_guard locked{lock()};
    window_.forget();
    leaves_.set_released(false);
  }

  /// As that of shadow_mmu.
  std::size_t recover_large(std::size_t n) noexcept {
    const std::lock_guard locked{lock()};
    std::size_t done = 0;
    for (memslot* s : slots_.current().slots()) done += leaves_.zap_executed(*s, n - done);
    leaves_.commit();
    return done;
  }

  /// Returns: the first broken invariant, or nullptr. Progress: blocking; looks at everything.
  const char* verify() noexcept {
    const std::lock_guard locked{lock()};
    const char* broken = leaves_.flush_due() ? "a flush is due although the lock is free" : leaves_.tree().verify();
    leaves_.tree().for_each_leaf({0}, {direct_tables<Format>::frame_limit},
                                 [&](gfn f, unsigned level, std::atomic<std::uint64_t>& e) {
                                   if (broken == nullptr) broken = check_leaf(f, level, e);
                                 });
    return broken;
  }
  mmu_statistics statistics() const noexcept { return counters_.read(); }

  // --- For direct_vcpu. ---------------------------------------------------------------------------------------------

  Provider& provider() noexcept { return provider_; }
  flush_gate& gate() noexcept { return gate_; }
  std::shared_mutex& lock() noexcept { return leaves_.lock(); }
  mmu_counters& counters() noexcept { return counters_; }
  const memslots& slots() const noexcept { return slots_; }
  /// Context: a section of the gate's domain.
  typename direct_tables<Format>::place find(gfn f) noexcept { return leaves_.tree().find(f); }
  /// See direct_fault_path::fault.
  outcome fault(table_stock& stock, gpa a, bool write, bool fetch = false) noexcept {
    return faults_.fault(stock, a, write, fetch);
  }

 private:
  bool keeps_reads(const invalidation& i) const noexcept { return i.in_place || downgrades_.contains(i.event); }

  const char* check_leaf(gfn f, unsigned level, const std::atomic<std::uint64_t>& e) const noexcept {
    const memslot* const s = slots_.current().find(f);
    const std::uint64_t now = e.load(std::memory_order_relaxed);
    const bool writable = (now & direct_may_write_bit) != 0;
    if (s == nullptr || !s->config().contains(f + (frames_at(level) - 1))) {
      return "a leaf maps a frame outside all slots";
    }
    const range bytes = leaves_.host_range(*s, f, level);
    if (writable && s->config().read_only) return "a read-only slot is mapped writable";
    if (zapping_.open_hits(bytes)) return "a leaf is inside an open bracket";
    if (writable && window_.open_hits(bytes)) return "a leaf may be written inside an open bracket";
    if (level > 1 && s->log() != nullptr) return "a large leaf is in a slot whose writes are logged";
    if (level > 1 && nx_huge_ && executable<Format>(now)) return "a large leaf may be executed";
    return nullptr;
  }

  /// As that of shadow_mmu.
  void split_large(unsigned id) noexcept {
    table_stock supply;
    std::uint64_t done = 0;
    for (bool more = true; more && supply.fill(split_batch) == errc::ok;) {
      const std::lock_guard locked{lock()};
      memslot* const slot = memslots::find_id(slots_.current(), id);
      more = slot != nullptr && slot->log() == nullptr && leaves_.split_some(*slot, done, supply);
    }
  }

  auto updating() noexcept {
    return [this](memslot* going, std::uint64_t) noexcept {
      if (going != nullptr) leaves_.zap(*going, going->config().base, going->config().end());
      leaves_.commit();
    };
  }

  // In the order of destruction, last first.
  Provider& provider_;
  const event_set downgrades_;
  const bool eager_split_;
  const bool nx_huge_;
  mmu_counters counters_;
  mmu_window window_;   ///< every bracket
  mmu_window zapping_;  ///< those that take mappings down; for the self-check
  flush_gate gate_;
  memslots slots_;
  direct_leaves<Format> leaves_;
  direct_fault_path<Provider, Format> faults_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
