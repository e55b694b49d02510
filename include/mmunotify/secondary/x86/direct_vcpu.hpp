// SPDX-License-Identifier: MIT
#pragma once

// A virtual CPU of a direct MMU: its TLB, and how it touches guest-physical memory. See vcpu.hpp, which it is the
// simpler sister of: no registers, no rights but write, and to execute what is not large.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/direct_mmu.hpp>
#include <mmunotify/secondary/x86/direct_tables.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// A vCPU of it: the guest's own paging is off, or is the hardware's business; addresses are guest-physical.
/// Context: every member is for the thread that runs it, outside callbacks and guest mode.
template <class Mmu>
class direct_vcpu {
  using format = typename Mmu::format;

 public:
  explicit direct_vcpu(Mmu& mmu) noexcept : mmu_(mmu) {
    const std::lock_guard locked{mmu_.lock()};
    mmu_.gate().attach_locked(port_);
  }
  direct_vcpu(const direct_vcpu&) = delete;
  direct_vcpu& operator=(const direct_vcpu&) = delete;
  ~direct_vcpu() {
    const std::lock_guard locked{mmu_.lock()};
    mmu_.gate().detach_locked(port_);
  }

  /// As vcpu::access.
  template <class F>
    requires std::is_nothrow_invocable_v<F&, std::byte*>
  outcome access(gpa a, x86::access how, F&& f) noexcept {
    while (!touch(a, how, f)) {
      const outcome o = prefault(a, how);
      if (o.what == outcome::again) {
        std::this_thread::yield();
      } else if (o.what != outcome::done) {
        return o;
      }
    }
    return {};
  }
  /// Effects: one attempt to install what the access needs. Nothing is touched.
  outcome prefault(gpa a, x86::access how) noexcept { return mmu_.fault(stock_, a, is_write(how), is_fetch(how)); }
  /// Returns: whether the access would hit now, without a fault.
  bool hits(gpa a, x86::access how) noexcept {
    const auto nothing = [](std::byte*) noexcept {};
    return touch(a, how, nothing);
  }

 private:
  template <class F>
  bool touch(gpa a, x86::access how, F&& f) noexcept {
    const guest_mode_section in{mmu_.gate(), port_, tlb_};
    const gva key{a.value};
    const tlb_entry* e = tlb_.find(key);
    const bool write = is_write(how), fetch = is_fetch(how);
    if (e == nullptr || (write && !e->allows.writable()) || (fetch && !e->allows.executable())) [[unlikely]] {
      if (!walk(a, write, fetch)) return false;
      e = tlb_.find(key);
    }
    f(e->host + a.offset());
    return true;
  }

  /// Effects: walks the tables as hardware would, sets accessed and dirty bits, fills the TLB. A leaf that is read-only
  /// for nothing but a dirty log is made writable and marked, in this order (dirty_log.hpp).
  bool walk(gpa a, bool write, bool fetch) noexcept {
    const gfn f = frame_of(a);
    if (f.value >= direct_tables<format>::frame_limit) return false;
    const auto at = mmu_.find(f);
    std::uint64_t e = at.value, wanted = 0;
    bool upgrade = false;
    do {
      if (!format::present(e) || !format::maps(e, at.level)) return false;
      if (fetch && !executable<format>(e)) return false;
      upgrade = write && (e & format::write_bit) == 0;
      if (upgrade && (e & direct_may_write_bit) == 0) return false;
      wanted = e | format::accessed_bit | (write ? format::dirty_bit | format::write_bit : 0);
      // (dt4) acquire pairs with (dt3).
    } while (wanted != e && !at.entry->compare_exchange_weak(e, wanted, std::memory_order_acquire));
    if (upgrade) {
      mmu_.counters().add(mmu_counters::fast_writes);
      if (const memslot* const s = mmu_.slots().current().find(f); s != nullptr) s->mark_dirty(f);
    }
    const bool writes = (wanted & format::write_bit) != 0 && (wanted & format::dirty_bit) != 0;
    const pfn frame = format::frame(wanted) + (f.value & (frames_at(at.level) - 1));
    const bool fetches = executable<format>(wanted);
    const auto allows = static_cast<std::uint8_t>(rights::user_bit | (fetches ? rights::execute_bit : 0) |
                                                  (writes ? rights::write_bit : 0));
    tlb_.insert(gva{a.value}, mmu_.provider().data(frame), rights{allows}, true);
    return true;
  }

  Mmu& mmu_;
  vcpu_port port_;
  table_stock stock_;
  soft_tlb<> tlb_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
