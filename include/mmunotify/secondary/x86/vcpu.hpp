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
//   CR4.PSE, EFER.NXE         TLB; the root is another one, since they are part of a shadow page's role
//   CR0.PG, CR4.PAE/LA57,
//   EFER.LME                  the same: another paging mode. Roots of the last ones are remembered like address spaces
//   INVLPG                    one TLB entry, and its shadow leaf if the table may be out of step
// All but INVLPG bring shadow tables that are out of step with the guest's up to date (unsync.hpp), as does
// flush_tlb().
//   CPL, EFLAGS.AC, PKRU,
//   PKRS                      nothing: rights are judged at each access, and leaves and TLB entries know their keys
//   CR4.PKE/PKS               TLB
//
// In PAE paging a write of CR3, and of some bits of CR0 and CR4, loads the PDPTEs from guest memory, and can fail.
//
// Context: every member is for the thread that runs the vCPU, outside callbacks and guest mode.
// Limits: whether a change of mode takes the way that the manual prescribes is its writer's business; the registers are
// checked as they are after it.

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
#include <mmunotify/secondary/x86/control_registers.hpp>
#include <mmunotify/secondary/x86/follow.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/shadow_modes.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// What an MMU lets its vCPUs do.
template <class M>
concept vcpu_host = frame_provider<typename M::provider_type> && shadowed_modes<typename M::modes> &&
                    requires(M& m, vcpu_state& s, walk_context& c, gva a, access how) {
                      { m.provider() } noexcept -> std::same_as<typename M::provider_type&>;
                      { m.gate() } noexcept -> std::same_as<flush_gate&>;
                      { m.lock() } noexcept -> std::same_as<std::mutex&>;
                      { m.fault(s, a, how) } noexcept -> std::same_as<outcome>;
                      { m.load_pdptes(c) } noexcept -> std::same_as<errc>;
                      { m.slots() } noexcept -> std::same_as<const memslots&>;
                      { m.counters() } noexcept -> std::same_as<mmu_counters&>;
                      m.synchronise(s);
                      m.invalidate(s, a);
                    };

template <vcpu_host Mmu>
class vcpu {
  using modes = typename Mmu::modes;

 public:
  /// Effects: a vCPU of this VM; from now on flushes reach it. Precondition: the MMU outlives it.
  explicit vcpu(Mmu& mmu) noexcept : mmu_(mmu) {
    state_.mode = first_mode<modes>();
    controls_ = controls_of(state_.context, state_.mode);
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
  const control_registers& controls() const noexcept { return controls_; }
  paging mode() const noexcept { return state_.mode; }

  /// MOV to CR3. Errors: bad_range (bits beyond the physical-address width, or in a PDPTE that it loads: #GP), or those
  /// of reading the PDPTEs (not_mapped, ...); nothing is changed then. Progress: a load retries while invalidations
  /// collide with it.
  errc set_cr3(std::uint64_t value) noexcept {
    control_registers next = controls_;
    next.cr3 = value;
    return take(next, processor_of(state_.context), true);
  }
  void set_wp(bool on) noexcept { set_bit(state_.context.wp, controls_.cr0, cr0::wp, on); }        ///< CR0.WP
  void set_smap(bool on) noexcept { set_bit(state_.context.smap, controls_.cr4, cr4::smap, on); }  ///< CR4.SMAP
  void set_nxe(bool on) noexcept { set_bit(state_.context.nxe, controls_.efer, efer::nxe, on); }   ///< EFER.NXE
  void set_ac(bool on) noexcept { state_.context.ac = on; }                                        ///< EFLAGS.AC
  void set_cpl(unsigned level) noexcept { state_.context.cpl = level & 3; }
  void set_pkru(std::uint32_t rights) noexcept { state_.context.pkru = controls_.pkru = rights; }  ///< WRPKRU
  void set_pkrs(std::uint32_t rights) noexcept { state_.context.pkrs = controls_.pkrs = rights; }  ///< IA32_PKRS
  /// CR4.SMEP, CR4.PSE. Errors: as set_cr3, in PAE paging alone.
  errc set_smep(bool on) noexcept { return set_cr4(cr4::smep, on); }
  errc set_pse(bool on) noexcept { return set_cr4(cr4::pse, on); }

  /// MOV to CR0, CR3, CR4, WRMSR of EFER, or several of them at once; the paging mode may be another one afterwards.
  /// Errors: as set_cr3; bad_range (check_registers), disabled (a mode that the MMU is not for); nothing is changed
  /// then.
  errc set_controls(const control_registers& next) noexcept { return take(next, processor_of(state_.context), false); }
  /// The same for a vCPU that gets a state, and another processor: PDPTEs are loaded in any case.
  errc set_controls(const control_registers& next, const processor& p) noexcept { return take(next, p, true); }

  /// Effects: all registers at once, in the same mode; PDPTEs are loaded and not taken from c. Errors: as set_controls;
  /// bad_range (CPL, or the processor's physical-address width is not 32 to 52) as well; nothing is changed then.
  errc set_registers(const walk_context& c) noexcept {
    if (c.cpl > 3) return errc::bad_range;
    const errc e = take(controls_of(c, state_.mode), processor_of(c), true);
    if (e == errc::ok) {
      state_.context.cpl = c.cpl;
      state_.context.ac = c.ac;
    }
    return e;
  }

  /// INVLPG.
  void invlpg(gva a) noexcept {
    if (!to_linear(a)) return;
    tlb_.drop(a);
    mmu_.invalidate(state_, a);
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
    if (!to_linear(a)) return {.what = outcome::general_protection};
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
    return to_linear(a) ? mmu_.fault(state_, a, how) : outcome{.what = outcome::general_protection};
  }

  /// Returns: whether the access would hit now, in the TLB or the shadow tables, without a fault.
  bool hits(gva a, x86::access how) noexcept {
    const auto nothing = [](std::byte*) noexcept {};
    return to_linear(a) && touch(a, how, nothing).what == outcome::done;
  }

 private:
  /// Effects: a is without the bits that the mode ignores. Returns: whether it can be used at all.
  bool to_linear(gva& a) const noexcept {
    return in_mode<modes>(state_.mode, [&]<class Mode>(std::type_identity<Mode>) noexcept {
      a = shadow_layout<Mode>::linear(a);
      return Mode::canonical(a);
    });
  }

  /// Returns: done; not_mapped, if the frame is known to be in no slot; again: fault first.
  template <class F>
  outcome touch(gva a, x86::access how, F& f) noexcept {
    const guest_mode_section in{mmu_.gate(), state_.port, tlb_};
    const tlb_entry* e = tlb_.find(a);
    if (e == nullptr || !permits(e->allows, e->guest_user, e->key, how)) [[unlikely]] {
      if (const outcome o = walk(a, how); o.what != outcome::done) return o;
      e = tlb_.find(a);
    }
    f(e->host + a.offset());
    return {};
  }

  /// SMEP and SMAP ask for the guest's U, users for ours.
  bool permits(rights allows, bool guest_user, unsigned key, x86::access how) const noexcept {
    if (state_.context.pke || state_.context.pks) [[unlikely]] {
      if (key_forbids(guest_user, key, how)) return false;
    }
    walk_context c = state_.context;
    c.wp = true;
    if (has_mode<modes>(paging::none) && state_.mode == paging::none) c.smep = c.smap = false;  // there is no U
    const bool u = is_user(how, c) ? allows.user() : guest_user;
    const rights seen = changed(allows, u ? rights::user_bit : 0, u ? 0 : rights::user_bit);
    return !contains(forbidden_rights(c, how), seen);
  }

  bool key_forbids(bool guest_user, unsigned key, x86::access how) const noexcept {
    return in_mode<modes>(state_.mode, [&]<class Mode>(std::type_identity<Mode>) noexcept {
      if constexpr (Mode::has_keys && !detail::mutated(detail::mutation::keys_of_the_fault)) {
        return (forbidden_keys(state_.context, how, guest_user) >> 2 * key & 1) != 0;
      } else {
        return false;
      }
    });
  }

  /// Effects: walks the shadow tables and fills the TLB. Returns: as touch. Context: guest mode; lock-free.
  outcome walk(gva a, x86::access how) noexcept {
    shadow_page* p = state_.port.root();
    const unsigned top = in_mode<modes>(
        state_.mode, []<class Mode>(std::type_identity<Mode>) noexcept { return shadow_layout<Mode>::levels; });
    for (unsigned level = top; p != nullptr; --level) {
      const unsigned i = shadow_index(a, level);
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
    if (!good || !permits(e.allows(), e.guest_user(), 0, how)) return {.what = outcome::again};
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
      if (!permits(wanted.allows(), e.guest_user(), e.key(), how)) return false;
      if (wanted == e) break;
      if (update(p, i, e, wanted, upgrade)) {
        e = wanted;
        break;
      }
    }
    // Writes before the dirty bit is set must come here again.
    const std::uint64_t inside = (a.value >> page_shift) & (frames_at(level) - 1);
    tlb_.insert(a, mmu_.provider().data(e.frame() + inside), changed(e.allows(), 0, e.dirty() ? 0 : rights::write_bit),
                e.guest_user(), e.key());
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

  /// A bit that loads no PDPTEs.
  void set_bit(bool& held, std::uint64_t& reg, std::uint64_t mask, bool on) noexcept {
    if (held == on) return;
    held = on;
    reg ^= mask;
    reload();
  }
  errc set_cr4(std::uint64_t mask, bool on) noexcept {
    if (((controls_.cr4 & mask) != 0) == on) return errc::ok;
    control_registers next = controls_;
    next.cr4 ^= mask;
    return take(next, processor_of(state_.context), false);
  }

  /// Effects: these registers count, or nothing is changed. loads: PDPTEs are loaded if there are any, not only where
  /// the change of registers says so.
  errc take(const control_registers& next, const processor& p, bool loads) noexcept {
    const paging m = mode_of(next);
    if (check_registers(next, p) != errc::ok || (next.cr3 & bit_range(p.maxphyaddr, 63)) != 0) return errc::bad_range;
    if (!has_mode<modes>(m)) return errc::disabled;
    walk_context c = context_of(next, p);
    c.ac = state_.context.ac;
    c.cpl = state_.context.cpl;
    c.pdptes = state_.context.pdptes;
    constexpr bool stale = detail::mutated(detail::mutation::stale_pdptes);
    const bool enters = state_.mode != paging::pae;
    if (m == paging::pae && !stale && (loads || enters || reloads_pdptes(controls_, next))) {
      if (const errc e = mmu_.load_pdptes(c); e != errc::ok) return e;
    }
    controls_ = next;
    state_.context = c;
    state_.mode = m;
    reload();
    return errc::ok;
  }
  void reload() noexcept {
    tlb_.clear();
    if (select_root()) mmu_.counters().add(mmu_counters::roots_reused);
    mmu_.synchronise(state_);
  }
  bool select_root() noexcept {
    return in_mode<modes>(state_.mode, [&]<class Mode>(std::type_identity<Mode>) noexcept {
      using layout = shadow_layout<Mode>;
      const walk_context& c = state_.context;
      return state_.port.select({layout::root_frame(c), layout::root_role(c).word(), layout::registers(c)});
    });
  }

  Mmu& mmu_;
  vcpu_state state_;
  control_registers controls_;  ///< MUST be what state_.context and state_.mode follow from
  soft_tlb<> tlb_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
