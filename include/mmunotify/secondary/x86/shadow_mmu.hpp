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
// Limits: 4 KiB shadow leaves (larger guest leaves are split); no unsync tables (each guest write to a shadowed table
// is the caller's to emulate); guest tables that the host itself changes behind the MMU's back are not noticed until
// their shadow goes, as on KVM; a fault that collides again and again has no ticket.
//
// References: Linux virt/kvm/kvm_main.c, arch/x86/kvm/mmu (the same problem); Intel SDM vol. 3, 4.10 (TLBs).

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/fault.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>
#include <mmunotify/secondary/x86/vcpu.hpp>
#include <mmunotify/secondary/x86/verify.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

template <frame_provider Provider, shadowed_mode Mode = long_mode_4>
class shadow_mmu {
 public:
  using provider_type = Provider;
  using mode = Mode;

  static constexpr std::size_t default_pages = 4096;

  /// A VM without slots and vCPUs. max_pages: how many shadow pages (9 KiB each) to keep; the oldest go first.
  /// Preconditions: the provider outlives it; provider.data() takes no lock (it is called in guest mode).
  explicit shadow_mmu(Provider& provider, std::size_t max_pages = default_pages) noexcept
      : provider_(provider),
        slots_(gate_.domain()),
        tables_(slots_, gate_, counters_, max_pages),
        faults_({provider, slots_, window_, tables_.lock()}, tables_, counters_) {}
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
  errc add_slot(const memslot_config& c) noexcept { return slots_.add(c, tables_.lock()); }
  /// Effects: takes it away; when it returns nothing maps it. Errors: see memslots::remove.
  errc remove_slot(unsigned id) noexcept {
    return slots_.remove(id, tables_.lock(), [this](memslot& s) noexcept { zap(s); });
  }
  /// Effects: the slot is at another guest-physical address; its mappings are gone. Errors: see memslots::move.
  errc move_slot(unsigned id, gfn base) noexcept {
    return slots_.move(id, base, tables_.lock(), [this](memslot& s) noexcept { zap(s); });
  }
  const memslots& slots() const noexcept { return slots_; }

  /// Effects: writes guest memory on behalf of the guest (emulated instructions, devices); shadows of the table entries
  /// that it hits are gone when it returns. Errors, context: see fault_path::guest_write.
  errc guest_write(gpa where, std::span<const std::byte> bytes) noexcept { return faults_.guest_write(where, bytes); }

  // --- Hooks: for the notifier. Context: under the primary's locks. They take the MMU lock, and sleep in a flush. ----

  /// Effects: no mapping of the range is usable when it returns, and none becomes so before the end. (K3, O1)
  /// Preconditions: not called in guest mode by the vCPU's own thread (it would wait for itself; L7 is reported).
  void invalidate_range_start(const invalidation& i) noexcept {
    const std::lock_guard locked{tables_.lock()};
    window_.start(i.range);
    tables_.zap_host_range(i.range);
    tables_.commit();
  }
  /// Effects: mappings may be made again; faults that looked the page up before retry.
  void invalidate_range_end(const invalidation& i) noexcept {
    const std::lock_guard locked{tables_.lock()};
    window_.end(i.range);
  }
  /// Returns: whether the guest has accessed the range since the last clearing. A vCPU that goes on to use a page sets
  /// its bit again: TLBs are empty.
  bool clear_flush_young(range r) noexcept { return young(r, shadow_tables::ageing::clear_and_flush); }
  /// The same without a flush: what a TLB holds is used without setting the bit again.
  bool clear_young(range r) noexcept { return young(r, shadow_tables::ageing::clear); }
  bool test_young(range r) noexcept { return young(r, shadow_tables::ageing::test); }
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

  /// Returns: the first broken invariant, or nullptr. Progress: blocking; looks at everything. Context: as the hooks.
  const char* verify() noexcept {
    const std::lock_guard locked{tables_.lock()};
    return table_check(tables_, window_).run(Mode::levels);
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
  /// See fault_path::fault.
  outcome fault(vcpu_state& v, gva a, access how) noexcept { return faults_.fault(v, a, how); }

 private:
  void zap(memslot& s) noexcept {
    tables_.zap_slot(s);
    tables_.commit();
  }

  bool young(range r, shadow_tables::ageing how) noexcept {
    const std::lock_guard locked{tables_.lock()};
    const bool any = tables_.young(r, how);
    tables_.commit();
    return any;
  }

  // In the order of destruction, last first: tables are taken down while slots and gate are there.
  Provider& provider_;
  mmu_counters counters_;
  mmu_window window_;
  flush_gate gate_;
  memslots slots_;
  shadow_tables tables_;
  fault_path<Provider, Mode> faults_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
