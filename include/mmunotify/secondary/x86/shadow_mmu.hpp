// SPDX-License-Identifier: MIT
#pragma once

// A shadow MMU for x86 guests, as a client of the notifier: KVM's shadow paging in the small.
//
//   x86::shadow_mmu<reference_mmu<>> mmu{primary};
//   subscriber node{mmu};  space.register_subscriber(node, held);
//   mmu.add_slot({.id = 0, .base = {0}, .pages = 1024, .host = {address}});
//   x86::vcpu cpu{mmu};  cpu.set_cr3(root);
//   x86::outcome o = cpu.access(a, x86::access::write, [](std::byte* at) noexcept { *at = std::byte{1}; });
//
// The guest's paging mode is the second parameter: 4 levels here; no_paging, two_level, pae, long_mode_5; or
// every_mode, whose vCPUs change it by writing their registers (vcpu::set_controls).
//
// It shadows the guest's page tables: a guest virtual address leads through shadow tables straight to a host frame, two
// translations in one. Mappings are made by faults and protected by nothing but the notifier.
//
// Contract: K1 to K6.
//   K1  fault.hpp: a leaf is installed only after checking, under the MMU lock, that no bracket over its host page is
//       open or has run since before the page was looked up.
//   K2  memslots.hpp: the window is keyed by host virtual address; start and end cannot see different slots.
//   K3  invalidate_range_start takes every leaf of the range down and flushes every vCPU before it returns.
//   K4  frames come from and go to the provider by number.
//   K5  no function returns holding a lock that its caller did not take; the provider is never called under the lock.
//   K6  the VM belongs to its owner: release() tears mappings down and nothing else; the object lives until its owner
//       destroys it, and can be registered and resume()d again.
//
// Locks, outermost first: the primary's own (callbacks run under it); the slots' writers; the MMU lock; the domain's
// grace-period mutex. Callbacks take the MMU lock alone. Guest-mode sections are inside no lock and take none. The VM's
// domain is its own: grace periods of the notifier and flushes of the VM never wait for each other's readers.
//
// Register the MMU before the first vCPU runs: mappings made by an unregistered MMU are protected by nobody.
//
// Events. Linux's KVM takes every bracket for an unmapping. Here a bracket that only withdraws write access
// (`downgrades`, below) leaves mappings in place and write-protects them, and so does one in which frames are replaced
// in place (change_entry): reads go on all the time, through the old frame and then through the new one. All others
// take mappings down.
//
// Limits: each guest write to an upper table that is shadowed, and without mmu_options::unsync to any, is the caller's
// to emulate; guest tables that the host itself changes behind the MMU's back are not noticed until their shadow goes,
// as on KVM; a fault that collides again and again has no ticket.
//
// References: Linux virt/kvm/kvm_main.c, arch/x86/kvm/mmu (the same problem); Intel SDM vol. 3, 4.10 (TLBs).

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/event.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/aging.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/dirty_harvest.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/fault.hpp>
#include <mmunotify/secondary/x86/follow.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/options.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/shadow_modes.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>
#include <mmunotify/secondary/x86/split.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>
#include <mmunotify/secondary/x86/vcpu.hpp>
#include <mmunotify/secondary/x86/verify.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Modes: the paging mode of its guest, or every_mode.
template <frame_provider Provider, shadowed_modes Modes = long_mode_4>
class shadow_mmu {
 public:
  using provider_type = Provider;
  using modes = Modes;

  /// A VM without slots and vCPUs.
  /// Preconditions: the provider outlives it; provider.data() takes no lock (it is called in guest mode).
  explicit shadow_mmu(Provider& provider, const mmu_options& o = {}) noexcept
      : provider_(provider),
        downgrades_(o.downgrades),
        eager_split_(o.eager_split),
        nx_huge_(o.nx_huge),
        slots_(gate_.domain()),
        tables_(slots_, gate_, counters_, o.max_pages),
        follows_({provider, slots_, window_, tables_.lock()}, tables_, counters_),
        faults_({provider, slots_, window_, tables_.lock()}, tables_, counters_, o) {}
  shadow_mmu(const shadow_mmu&) = delete;
  shadow_mmu& operator=(const shadow_mmu&) = delete;
  /// Precondition (K6): the owner has destroyed the vCPUs; checked always.
  ~shadow_mmu() {
    if (!gate_.empty()) detail::violated("K6", "~shadow_mmu", "a vCPU of this VM still exists");
  }

  /// Returns: ok, or no_slot if the VM could not get a read-section domain; then it must not be used.
  errc status() noexcept { return gate_.domain().status(); }

  // --- The guest's physical memory. Context: may sleep; not in a callback, not in guest mode. -----------------------

  /// Effects: gives the guest memory. Errors: see memslots::add; nothing is changed then.
  errc add_slot(const memslot_config& c) noexcept { return slots_.add(c, tables_.lock(), updating()); }
  /// Effects: takes it away; when it returns nothing maps it. Errors: see memslots::remove.
  errc remove_slot(unsigned id) noexcept { return slots_.remove(id, tables_.lock(), updating()); }
  /// Effects: the slot is at another guest-physical address; its mappings and its log are gone. Errors: see
  /// memslots::move.
  errc move_slot(unsigned id, gfn base) noexcept { return slots_.move(id, base, tables_.lock(), updating()); }
  const memslots& slots() const noexcept { return slots_; }

  /// Effects: writes guest memory on behalf of the guest (emulated instructions, devices); shadows of the table entries
  /// that it hits are gone when it returns. Errors, context: see table_follower::guest_write.
  errc guest_write(gpa where, std::span<const std::byte> bytes) noexcept { return follows_.guest_write(where, bytes); }

  // --- What the guest writes. Context: as for slots. ----------------------------------------------------------------

  /// Effects: writes to the slot are logged from now on, in this way, or no longer (dirty_log.hpp); ring: places of the
  /// ring, for a log by write protection; 0: none. With mmu_options::eager_split, large leaves are split before that.
  /// Errors: not_registered (no such slot), bad_range (a ring for another log), no_memory; nothing is changed then, but
  /// for what was split.
  errc log_writes(unsigned id, dirty_tracking how, std::uint64_t ring = 0) noexcept {
    if (ring != 0 && how != dirty_tracking::write_protect) return errc::bad_range;
    if (eager_split_ && how != dirty_tracking::off) split_large(id);
    return slots_.set_log(id, how, ring, tables_.lock(), [this](memslot& s) noexcept {
      follow_log(tables_, s);
      tables_.commit();
    });
  }
  /// Effects: out has a bit for each frame of the slot that was written since the last harvest, first frame in bit 0 of
  /// out[0]; from now on they count as clean. A write is in this harvest or in a later one, whatever runs beside it.
  /// Errors: not_registered (no such slot), disabled (it keeps no log), bad_range (out has not one bit per frame,
  /// rounded up to words); nothing is changed then.
  errc harvest_writes(unsigned id, std::span<std::uint64_t> out) noexcept {
    const std::lock_guard locked{tables_.lock()};
    memslot* const slot = memslots::find_id(slots_.current(), id);
    if (slot == nullptr) return errc::not_registered;
    if (slot->log() == nullptr) return errc::disabled;
    if (out.size() != dirty_log::words_for(slot->config().pages)) return errc::bad_range;
    static_cast<void>(harvest(tables_, *slot, out));
    tables_.commit();
    return errc::ok;
  }

  /// Effects: out[0] and on are frames of the slot that were written since they were harvested last; they count as
  /// clean from now on. Cost: what was written. Errors: not_registered (no such slot), disabled (it keeps no ring),
  /// again; the log is as before then.
  written_frames harvest_ring(unsigned id, std::span<gfn> out) noexcept {
    const std::lock_guard locked{tables_.lock()};
    memslot* const slot = memslots::find_id(slots_.current(), id);
    if (const errc e = ring_error(slot); e != errc::ok) return {.error = e};
    const written_frames found{.count = x86::harvest_ring(tables_, *slot, out)};
    tables_.commit();
    return found;
  }

  // --- Hooks: for the notifier. Context: under the primary's locks. They take the MMU lock, and sleep in a flush. ----

  /// Effects: no mapping of the range is usable when it returns, and none becomes so before the end. (K3, O1)
  /// Preconditions: not called in guest mode by the vCPU's own thread (it would wait for itself; L7 is reported).
  void invalidate_range_start(const invalidation& i) noexcept {
    const std::lock_guard locked{tables_.lock()};
    window_.start(i.range);
    if (keeps_reads(i)) {
      tables_.write_protect_host_range(i.range);
    } else {
      zapping_.start(i.range);
      tables_.zap_host_range(i.range);
    }
    tables_.commit();
  }
  /// Effects: mappings may be made again; faults that looked the page up before retry.
  void invalidate_range_end(const invalidation& i) noexcept {
    const std::lock_guard locked{tables_.lock()};
    window_.end(i.range);
    if (!keeps_reads(i)) zapping_.end(i.range);
  }
  /// Effects: what maps a page of the range maps its new frame when it returns, read-only; the first write faults.
  /// Precondition: inside an in-place bracket over the range.
  void change_entry(const entry_change& c) noexcept {
    const std::lock_guard locked{tables_.lock()};
    tables_.change_host_range(c);
    tables_.commit();
  }
  /// Returns: whether the guest has accessed the range since the last clearing. A vCPU that goes on to use a page sets
  /// its bit again: TLBs are empty. Takes the MMU lock only if something was young.
  bool clear_flush_young(range r) noexcept {
    if (!clear_young(r)) return false;
    const std::lock_guard locked{tables_.lock()};
    tables_.request_flush();
    tables_.commit();
    return true;
  }
  /// The same without a flush: what a TLB holds is used without setting the bit again. Takes no lock of the MMU.
  bool clear_young(range r) noexcept { return young(slots_, gate_.domain(), r, ageing::clear); }
  bool test_young(range r) noexcept { return young(slots_, gate_.domain(), r, ageing::test); }
  /// The same for each page. Takes no lock of the MMU.
  void young_pages(young_batch& batch) noexcept { x86::young_pages(slots_, gate_.domain(), batch); }
  /// Effects: everything is unmapped; faults answer `released` from now on. Slots and vCPUs stay. (K6)
  void release() noexcept {
    const std::lock_guard locked{tables_.lock()};
    tables_.set_released(true);
    tables_.zap_everything();
    tables_.commit();
  }

  // --- The owner. ---------------------------------------------------------------------------------------------------

  /// Effects: faults map again; those that are under way since before retry, because brackets may have passed the MMU
  /// by meanwhile. Precondition: the owner has registered the MMU anew. Context: not in a callback.
  void resume() noexcept {
    const std::lock_guard locked{tables_.lock()};
    window_.forget();
    tables_.set_released(false);
  }

  /// Effects: every shadow page that there is now is gone when it returns; vCPUs fault anew. The MMU lock is held for a
  /// few pages at a time, and faults go on beside it: what exists is cut off at once, by generation, and taken down
  /// afterwards.
  void zap_all() noexcept {
    for (bool more = true, first = true; more; first = false) {
      const std::lock_guard locked{tables_.lock()};
      if (first) tables_.begin_generation();
      more = tables_.zap_obsolete();
      tables_.commit();
    }
  }

  /// Effects: up to n tables that are there because the guest has executed parts of large leaves go; the next fault
  /// decides anew (mmu_options::nx_huge). For the owner to do now and then, a few at a time. Returns: how many.
  std::size_t recover_large(std::size_t n) noexcept {
    const std::lock_guard locked{tables_.lock()};
    const std::size_t done = tables_.zap_executed(n);
    tables_.commit();
    return done;
  }

  /// Returns: the first broken invariant, or nullptr. Progress: blocking; looks at everything. Context: as the hooks.
  const char* verify() noexcept {
    const std::lock_guard locked{tables_.lock()};
    return table_check(tables_, window_, zapping_, nx_huge_).run();
  }

  mmu_statistics statistics() const noexcept { return counters_.read(); }
  /// Returns: shadow pages in use.
  std::size_t page_count() noexcept {
    const std::lock_guard locked{tables_.lock()};
    return tables_.page_count();
  }

  // --- For vcpu. ----------------------------------------------------------------------------------------------------

  Provider& provider() noexcept { return provider_; }
  flush_gate& gate() noexcept { return gate_; }
  std::mutex& lock() noexcept { return tables_.lock(); }
  mmu_counters& counters() noexcept { return counters_; }
  /// See fault_path::fault.
  outcome fault(vcpu_state& v, gva a, access how) noexcept { return faults_.fault(v, a, how); }
  /// See table_follower.
  void synchronise(const vcpu_state& v) noexcept { follows_.synchronise(v); }
  void invalidate(vcpu_state& v, gva a) noexcept { follows_.invalidate(v, a); }
  errc load_pdptes(walk_context& c) noexcept { return follows_.load_pdptes(c); }

  // --- For nested_vcpu. ---------------------------------------------------------------------------------------------

  /// A fault of a vCPU in this mode of a nested guest.
  template <walked_mode Mode>
  outcome nested_fault(vcpu_state& v, gva a, access how) noexcept {
    return faults_.template in<Mode>().fault(v, a, how);
  }
  backing<Provider> memory() noexcept { return {provider_, slots_, window_, tables_.lock()}; }
  shadow_tables& tables() noexcept { return tables_; }

 private:
  bool keeps_reads(const invalidation& i) const noexcept { return i.in_place || downgrades_.contains(i.event); }

  /// Effects: the slot has no large leaves, as far as memory goes. A fault may make one meanwhile; the log zaps it.
  void split_large(unsigned id) noexcept {
    leaf_splitter splitter(tables_);
    leaf_splitter::supply supply;
    for (bool more = true; more && supply.fill();) {
      const std::lock_guard locked{tables_.lock()};
      memslot* const slot = memslots::find_id(slots_.current(), id);
      more = slot != nullptr && slot->log() == nullptr && splitter.split_some(*slot, supply);
      tables_.commit();
    }
  }

  /// What a change of the slots does under the MMU lock.
  auto updating() noexcept {
    return [this](memslot* going, std::uint64_t generation) noexcept {
      if (going != nullptr) tables_.zap_slot(*going);
      if (generation % shadow_entry::mmio_generations == 0) tables_.zap_mmio();
      tables_.commit();
    };
  }

  // In the order of destruction, last first: tables are taken down while slots and gate are there.
  Provider& provider_;
  const event_set downgrades_;
  const bool eager_split_;
  const bool nx_huge_;
  mmu_counters counters_;
  mmu_window window_;   ///< every bracket
  mmu_window zapping_;  ///< those that take mappings down; for the self-check
  flush_gate gate_;
  memslots slots_;
  shadow_tables tables_;
  table_follower<Provider, Modes> follows_;
  fault_path<Provider, Modes> faults_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
