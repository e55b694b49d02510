// SPDX-License-Identifier: MIT
#pragma once

// A virtual CPU: its control registers, its TLB, and how it touches guest memory.
//
// One access is: enter guest mode, look into the TLB, else walk the shadow tables without a lock, else leave guest
// mode, fault, and start again. The shadow walk sets accessed bits, and dirty ones for writes, as hardware would.
// Shadow leaves are judged as with CR0.WP=1: where WP=0 lets the supervisor write more, the fault path has made the
// leaf writable (fault.hpp). A leaf that is read-only for nothing but a dirty log is made writable on the way, by
// compare-exchange; one that remembers MMIO answers for the frame that is in no slot.
//
// Which change of state empties what:
//   CR3                       TLB (global pages too, which the architecture allows); the roots of the last few address
//                             spaces are remembered, so that a switch back is no fault
//   CR0.WP, CR4.SMEP/SMAP,
//   EFER.NXE                  TLB; the root is another one, since they are part of a shadow page's role
//   INVLPG                    one TLB entry, and its shadow leaf if the table may be out of step
// All but INVLPG bring shadow tables that are out of step with the guest's up to date (unsync.hpp), as does
// flush_tlb().
//   CPL, EFLAGS.AC            nothing: rights are judged at each access
//
// Context: every member is for the thread that runs the vCPU, outside callbacks and guest mode.
// Limits: no protection keys (CR4.PKE and CR4.PKS are refused).

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/fault.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// What an MMU lets its vCPUs do.
template <class M>
concept vcpu_host = frame_provider<typename M::provider_type> && shadowed_mode<typename M::mode> &&
                    requires(M& m, vcpu_state& s, gva a, access how) {
                      { m.provider() } noexcept -> std::same_as<typename M::provider_type&>;
                      { m.gate() } noexcept -> std::same_as<flush_gate&>;
                      { m.lock() } noexcept -> std::same_as<std::mutex&>;
                      { m.fault(s, a, how) } noexcept -> std::same_as<outcome>;
                      { m.root_role(s.context) } noexcept -> std::same_as<page_role>;
                      { m.slots() } noexcept -> std::same_as<const memslots&>;
                      { m.counters() } noexcept -> std::same_as<mmu_counters&>;
                      m.synchronise(s);
                      m.invalidate(s, a);
                    };

template <vcpu_host Mmu>
class vcpu {
  using mode = typename Mmu::mode;

 public:
  /// Effects: a vCPU of this VM; from now on flushes reach it. Precondition: the MMU outlives it.
  explicit vcpu(Mmu& mmu) noexcept : mmu_(mmu) {
    select_root();
    const std::lock_guard locked{mmu_.lock()};
    mmu_.gate().attach_locked(state_.port);
  }
  vcpu(const vcpu&) = delete;
  vcpu& operator=(const vcpu&) = delete;
  ~vcpu() {
    const std::lock_guard locked{mmu_.lock()};
    mmu_.gate().detach_locked(state_.port);
  }

  // --- Registers. ---------------------------------------------------------------------------------------------------

  const walk_context& registers() const noexcept { return state_.context; }

  /// MOV to CR3. Errors: bad_range (bits beyond the physical-address width: #GP), nothing is changed then.
  errc set_cr3(std::uint64_t value) noexcept {
    if ((value & bit_range(state_.context.maxphyaddr, 63)) != 0) return errc::bad_range;
    state_.context.cr3 = value;
    reload();
    return errc::ok;
  }
  void set_wp(bool on) noexcept { set_role_bit(state_.context.wp, on); }      ///< CR0.WP
  void set_smep(bool on) noexcept { set_role_bit(state_.context.smep, on); }  ///< CR4.SMEP
  void set_smap(bool on) noexcept { set_role_bit(state_.context.smap, on); }  ///< CR4.SMAP
  void set_nxe(bool on) noexcept { set_role_bit(state_.context.nxe, on); }    ///< EFER.NXE
  void set_ac(bool on) noexcept { state_.context.ac = on; }                   ///< EFLAGS.AC
  void set_cpl(unsigned level) noexcept { state_.context.cpl = level & 3; }

  /// Effects: all registers at once. Errors: access_denied (protection keys), bad_range (CR3, CPL, or the processor's
  /// physical-address width is not 32 to 52); nothing is changed then.
  errc set_registers(const walk_context& c) noexcept {
    if (c.pke || c.pks) return errc::access_denied;
    if (c.maxphyaddr < 32 || c.maxphyaddr > 52 || c.cpl > 3) return errc::bad_range;
    if ((c.cr3 & bit_range(c.maxphyaddr, 63)) != 0) return errc::bad_range;
    state_.context = c;
    reload();
    return errc::ok;
  }

  /// INVLPG.
  void invlpg(gva a) noexcept {
    tlb_.drop(a);
    if (mode::canonical(a)) mmu_.invalidate(state_, a);
  }
  /// Effects: empties the TLB; the shadow tables stay, as far as they follow from the guest's.
  void flush_tlb() noexcept {
    tlb_.clear();
    mmu_.synchronise(state_);
  }

  // --- Memory. ------------------------------------------------------------------------------------------------------

  /// Effects: if the guest may do this access, calls f(std::byte*) with the host address of the byte, in guest mode:
  /// until f returns no bracket over the page gets past its start. Returns: done (f was called, once), or what to do
  /// instead (f was not called). Preconditions: f touches nothing beyond the 4 KiB page; takes no lock; calls neither
  /// the MMU, nor the primary, nor this vCPU. Progress: retries while invalidations collide with it.
  template <class F>
    requires std::is_nothrow_invocable_v<F&, std::byte*>
  outcome access(gva a, x86::access how, F&& f) noexcept {
    if (!mode::canonical(a)) return {.what = outcome::general_protection};
    while (true) {
      outcome o = touch(a, how, f);
      if (o.what != outcome::again) return o;
      o = mmu_.fault(state_, a, how);
      if (o.what == outcome::again) {
        std::this_thread::yield();
      } else if (o.what != outcome::done) {
        return o;
      }
    }
  }

  /// Effects: one attempt to install what the access needs, which may collide (outcome::again). Nothing is touched.
  outcome prefault(gva a, x86::access how) noexcept {
    return mode::canonical(a) ? mmu_.fault(state_, a, how) : outcome{.what = outcome::general_protection};
  }

  /// Returns: whether the access would hit now, in the TLB or the shadow tables, without a fault.
  bool hits(gva a, x86::access how) noexcept {
    const auto nothing = [](std::byte*) noexcept {};
    return mode::canonical(a) && touch(a, how, nothing).what == outcome::done;
  }

 private:
  /// Returns: done; not_mapped, if the frame is known to be in no slot; again: fault first.
  template <class F>
  outcome touch(gva a, x86::access how, F& f) noexcept {
    const guest_mode_section in{mmu_.gate(), state_.port, tlb_};
    const tlb_entry* e = tlb_.find(a);
    if (e == nullptr || !permits(e->allows, e->guest_user, how)) [[unlikely]] {
      if (const outcome o = walk(a, how); o.what != outcome::done) return o;
      e = tlb_.find(a);
    }
    f(e->host + a.offset());
    return {};
  }

  /// SMEP and SMAP ask for the guest's U, users for ours.
  bool permits(rights allows, bool guest_user, x86::access how) const noexcept {
    walk_context c = state_.context;
    c.wp = true;
    const bool u = is_user(how, c) ? allows.user() : guest_user;
    const rights seen = changed(allows, u ? rights::user_bit : 0, u ? 0 : rights::user_bit);
    return !contains(forbidden_rights(c, how), seen);
  }

  /// Effects: walks the shadow tables and fills the TLB. Returns: as touch. Context: guest mode; lock-free.
  outcome walk(gva a, x86::access how) noexcept {
    shadow_page* p = state_.port.root();
    for (unsigned level = mode::levels; p != nullptr; --level) {
      const auto i = static_cast<unsigned>(mode::index(a, level));
      const shadow_entry e = p->load(i);
      if (e.is_mmio()) return use_mmio(e, a, how);
      if (!e.present()) break;
      if (e.is_leaf()) return use_leaf(*p, i, level, a, how) ? outcome{} : outcome{.what = outcome::again};
      p = e.child();
    }
    return {.what = outcome::again};
  }

  outcome use_mmio(shadow_entry e, gva a, x86::access how) noexcept {
    const bool good = e.of_generation(mmu_.slots().current().generation());
    if (!good || !permits(e.allows(), e.guest_user(), how)) return {.what = outcome::again};
    mmu_.counters().add(mmu_counters::mmio_hits);
    return {.what = outcome::not_mapped, .address = base_of(e.mmio_frame()) + a.offset()};
  }

  /// Precondition: entry i of p, a page of this level, was a leaf.
  bool use_leaf(shadow_page& p, unsigned i, unsigned level, gva a, x86::access how) noexcept {
    const std::uint64_t used = shadow_entry::accessed_bit | (is_write(how) ? shadow_entry::dirty_bit : 0);
    shadow_entry e;
    while (true) {
      e = p.load(i);
      if (!e.present() || !e.is_leaf()) return false;
      const bool upgrade = is_write(how) && e.may_write() && !e.allows().writable();
      const shadow_entry wanted = e.with(used | (upgrade ? shadow_entry::write_bit : 0));
      if (!permits(wanted.allows(), e.guest_user(), how)) return false;
      if (wanted == e) break;
      if (update(p, i, e, wanted, upgrade)) {
        e = wanted;
        break;
      }
    }
    // Writes before the dirty bit is set must come here again.
    const std::uint64_t inside = (a.value >> page_shift) & (frames_at(level) - 1);
    tlb_.insert(a, mmu_.provider().data(e.frame() + inside), changed(e.allows(), 0, e.dirty() ? 0 : rights::write_bit),
                e.guest_user());
    return true;
  }

  /// Effects: the compare-exchange, and the mark in the dirty log of what it made writable: after it (dirty_log.hpp).
  bool update(shadow_page& p, unsigned i, shadow_entry e, shadow_entry wanted, bool upgrade) noexcept {
    constexpr bool early = detail::mutated(detail::mutation::mark_before_upgrade);
    if (early && upgrade) {
      mark_written(p, i);
      std::this_thread::yield();
    }
    if (!p.update(i, e, wanted)) return false;
    if (upgrade) {
      mmu_.counters().add(mmu_counters::fast_writes);
      if (!early) mark_written(p, i);
    }
    return true;
  }

  void mark_written(const shadow_page& p, unsigned i) noexcept {
    const gfn f = p.leaf_frame(i);
    if (const memslot* const s = mmu_.slots().current().find(f); s != nullptr) s->mark_dirty(f);
  }

  void set_role_bit(bool& held, bool on) noexcept {
    if (held == on) return;
    held = on;
    reload();
  }
  void reload() noexcept {
    tlb_.clear();
    if (select_root()) mmu_.counters().add(mmu_counters::roots_reused);
    mmu_.synchronise(state_);
  }
  bool select_root() noexcept {
    return state_.port.select({frame_of(mode::root(state_.context.cr3)), mmu_.root_role(state_.context).word()});
  }

  Mmu& mmu_;
  vcpu_state state_;
  soft_tlb<> tlb_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
