// SPDX-License-Identifier: MIT
#pragma once

// A virtual CPU in a nested guest: L1, our guest, is a hypervisor and runs L2, through tables (EPT or NPT) that it
// keeps in its own memory and that map L2's physical memory to its own.
//
//   x86::nested_vcpu l2{mmu};                                              // mmu: the shadow_mmu that L1 runs on
//   l2.enter({.what = x86::nested_pointer::ept, .value = eptp});           // L1's VM entry
//   static_cast<void>(l2.set_controls(registers));                         // L2's CR0, CR3, CR4, EFER
//   x86::nested_outcome o = l2.access(a, x86::access::write, [](std::byte* at) noexcept { *at = std::byte{1}; });
//   if (o.to() == x86::nested_outcome::receiver::l1) l2.leave(), ...       // reflect the exit
//
// Problem. Hardware walks one second level, L1's tables are a second one in memory that is virtual itself. So they are
// shadowed: from L2's physical addresses straight to host frames. The shadow is one more kind of shadow tables of L1's
// MMU, told apart by the role, so that all of it holds here too: a bracket of the primary takes down what L2 has mapped
// (K1 to K6), L1's tables are write-protected by L1's frames and followed when L1, or L2, writes them, and L2's writes
// are in L1's dirty log.
//
// An access of L2 to a linear address is what the processor does: L2's tables are walked in guest mode, and each of
// their entries, whose addresses are L2's physical ones, is reached through the shadow as well as the page itself. What
// the shadow does not have is a fault, outside guest mode: L1's tables are walked; if they allow the access it is
// installed and L2's walk starts again, else L1 gets an exit. Entries of L2's tables are read with what L1's tables
// must allow for that: reading; writing as well under NPT, and under EPT with accessed and dirty bits (SDM 29.3.3.2,
// APM 15.25.6). Their own A and D bits are L2's writes.
//
// What L1 changes. With mmu_options::unsync L1 writes its lowest-level tables freely and must INVEPT, as on hardware:
// invept() brings all that is out of step up to date; so does each flush by a vCPU of L1. Without, and in upper tables,
// each write is followed at once. INVVPID is nothing here: no linear address is cached.
//
// Where L0 lends a page read-only (ROM, a table of L1's that is shadowed), and L1's tables allow writing: L2's tables
// are read from it all the same; A and D bits are not set in ROM, and are set in L1's tables by L0, whose shadows
// follow.
//
// Limits: an access needs room for the tables of L2's whole walk: mmu_options::max_pages of 64 at least. L1's memory
// has to be reached by the same MMU. Nested guests of L2 are L1's business. Memory types are not followed.
// Cost: a walk of L2's tables per access, each step a look into the TLB; after that no memory is allocated.
// Context: every member is for the thread that runs the vCPU, outside callbacks and guest mode.
//
// References: Intel SDM vol. 3C, 29.3 (EPT); AMD APM vol. 2, 15.25; Linux arch/x86/kvm/mmu (nested MMU, the same
// problem).

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/control_registers.hpp>
#include <mmunotify/secondary/x86/follow.hpp>
#include <mmunotify/secondary/x86/nested_exchange.hpp>
#include <mmunotify/secondary/x86/nested_modes.hpp>
#include <mmunotify/secondary/x86/nested_outcome.hpp>
#include <mmunotify/secondary/x86/shadow_modes.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>
#include <mmunotify/secondary/x86/vcpu.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Mmu: a shadow_mmu.
template <vcpu_host Mmu>
class nested_vcpu {
 public:
  /// Effects: a vCPU of this VM, in no nested guest. Precondition: the MMU outlives it.
  explicit nested_vcpu(Mmu& mmu, const nested_capabilities& can = {}) noexcept : mmu_(mmu), can_(can) {
    state_.mode = first_mode<typename Mmu::modes>();
    const std::lock_guard locked{mmu_.lock()};
    mmu_.gate().attach_locked(state_.port);
  }
  nested_vcpu(const nested_vcpu&) = delete;
  nested_vcpu& operator=(const nested_vcpu&) = delete;
  ~nested_vcpu() {
    const std::lock_guard locked{mmu_.lock()};
    mmu_.gate().detach_locked(state_.port);
  }

  // --- L1's side. ---------------------------------------------------------------------------------------------------

  /// Effects: VM entry, or VMRUN: L2's physical memory is what these tables say. The last few are remembered, so that
  /// going back to one is no fault. Errors: see check_pointer; nothing is changed then.
  pointer_error enter(const nested_pointer& p) noexcept {
    if (const pointer_error e = check_pointer(p, can_); e != pointer_error::none) return e;
    tables_ = p;
    active_ = true;
    state_.context = context_of(p, can_);
    tlb_.clear();
    const bool known = visit_nested(p, [&]<class Mode>(std::type_identity<Mode>) noexcept {
      using layout = shadow_layout<Mode>;
      const walk_context& c = state_.context;
      return state_.port.select({layout::root_frame(c), layout::root_role(c).word(), layout::registers(c)});
    });
    if (known) mmu_.counters().add(mmu_counters::roots_reused);
    return pointer_error::none;
  }
  /// Effects: accesses are `inactive` until the next enter(); the shadow stays.
  void leave() noexcept { active_ = false; }
  bool active() const noexcept { return active_; }
  const nested_pointer& tables() const noexcept { return tables_; }

  /// INVEPT (AMD: a flush of the ASID, or VMRUN with another one), of one context. Effects: what L1 has written to its
  /// tables before counts. Errors: see check_pointer; nothing is changed then.
  pointer_error invept(const nested_pointer& context) noexcept {
    if (const pointer_error e = check_pointer(context, can_); e != pointer_error::none) return e;
    invept();
    return pointer_error::none;
  }
  /// Of all contexts.
  void invept() noexcept {
    tlb_.clear();
    mmu_.synchronise(state_);
  }

  // --- L2's registers: but for PDPTEs independent of L1's tables, which may be entered before or after. --------------

  const walk_context& registers() const noexcept { return l2_; }
  paging mode() const noexcept { return mode_; }
  void set_cpl(unsigned level) noexcept { l2_.cpl = level & 3; }
  void set_ac(bool on) noexcept { l2_.ac = on; }  ///< EFLAGS.AC
  void set_pkru(std::uint32_t rights) noexcept { l2_.pkru = rights; }
  void set_pkrs(std::uint32_t rights) noexcept { l2_.pkrs = rights; }

  /// Effects: L2 has these registers; in PAE paging under EPT it loads its PDPTEs, whatever has changed. CPL, AC as
  /// before. Returns: done; general_protection (check_registers, a CR3 beyond the width, a reserved bit in a PDPTE); or
  /// why PDPTEs cannot be read (`inactive`: no tables are entered). Nothing is changed then.
  nested_outcome set_controls(const control_registers& next, const processor& p = {}) noexcept {
    if (check_registers(next, p) != errc::ok || (next.cr3 & bit_range(p.maxphyaddr, 63)) != 0) {
      return {.what = nested_outcome::general_protection};
    }
    walk_context c = context_of(next, p);
    c.cpl = l2_.cpl;
    c.ac = l2_.ac;
    if (mode_of(next) == paging::pae && tables_.what == nested_pointer::ept) {
      const nested_outcome o = run(false, [&](view& memory) noexcept -> nested_outcome {
        memory.loads_registers = true;
        const pdpte_load loaded = x86::load_pdptes(memory, c);
        if (loaded == pdpte_load::memory_error) return {.what = nested_outcome::again};
        return {.what = loaded == pdpte_load::ok ? nested_outcome::done : nested_outcome::general_protection};
      });
      if (o.what != nested_outcome::done) return o;
    }
    l2_ = c;
    mode_ = mode_of(next);
    return {};
  }

  // --- Memory. ------------------------------------------------------------------------------------------------------

  /// Effects: as vcpu::access, for a linear address of L2. Returns: done (f was called, once), or whose business it is
  /// (f was not called). Preconditions of f, progress: as there.
  template <class F>
    requires std::is_nothrow_invocable_v<F&, std::byte*>
  nested_outcome access(gva a, x86::access how, F&& f) noexcept {
    return run(true, [&](view& memory) noexcept { return attempt(memory, a, how, f); });
  }
  /// The same for a physical address of L2.
  template <class F>
    requires std::is_nothrow_invocable_v<F&, std::byte*>
  nested_outcome access(l2_gpa a, x86::access how, F&& f) noexcept {
    return run(false, [&](view& memory) noexcept { return reach(memory, a, how, f); });
  }
  /// Returns: whether the access would hit now, without a fault. Effects: L2's A and D bits, as the access sets them.
  template <class Address>
    requires(std::same_as<Address, gva> || std::same_as<Address, l2_gpa>)
  bool hits(Address a, x86::access how) noexcept {
    if (!active_) return false;
    constexpr bool linear = std::same_as<Address, gva>;
    const auto nothing = [](std::byte*) noexcept {};
    remembered_pages known;
    view memory{*this, known, linear};
    const guest_mode_section in{mmu_.gate(), state_.port, tlb_};
    if constexpr (linear) {
      return attempt(memory, a, how, nothing).what == nested_outcome::done;
    } else {
      return reach(memory, a, how, nothing).what == nested_outcome::done;
    }
  }

 private:
  /// Pages of L2's tables of which L1 allows to write and L0 does not; for the length of one access.
  class remembered_pages {
   public:
    /// 0: not known; 1: reads go on; 2: and A and D bits are left alone.
    unsigned find(l2_gpa a) const noexcept {
      unsigned best = 0;
      for (const known& k : known_) best = k.page == a.page() && k.what > best ? k.what : best;
      return best;
    }
    void add(l2_gpa a, bool rom) noexcept { known_[next_++ % known_.size()] = {a.page(), rom ? 2U : 1U}; }

   private:
    struct known {
      l2_gpa page{};
      unsigned what = 0;
    };
    std::array<known, 16> known_{};
    std::size_t next_ = 0;
  };

  /// L2's physical memory as its walker sees it, in guest mode. What it cannot reach is in `missing`.
  struct view {
    nested_vcpu& cpu;
    const remembered_pages& pages;
    bool linear;
    bool loads_registers = false;  ///< PDPTEs: a mere read for EPT
    nested_access missing{};
    tracked_exchange exchange{};  ///< of the missing access, if its size is not 0
    bool mmio = false;            ///< the missing access is known to hit no slot: at `address`
    gpa address{};

    template <class Entry>
    bool read_entry(gpa where, Entry& value) noexcept {
      constexpr bool weak = detail::mutated(detail::mutation::nested_table_as_read);
      const bool npt = cpu.tables_.what == nested_pointer::npt;
      const bool asks = npt || ((cpu.tables_.value & eptp::accessed_dirty) != 0 && !loads_registers);
      nested_access a{.where = {where.value}, .table = true, .linear = linear && !loads_registers};
      a.judged_as_write = asks && !weak;
      std::byte* const at = cpu.find(*this, a);
      if (at == nullptr) return false;
      // (nv1) acquire pairs with (nv2).
      value = std::atomic_ref<Entry>(*reinterpret_cast<Entry*>(at)).load(std::memory_order_acquire);
      return true;
    }
    template <class Entry>
    exchange_result compare_exchange_entry(gpa where, Entry expected, Entry desired) noexcept {
      const l2_gpa a{where.value};
      if (pages.find(a) == 2) return exchange_result::read_only;
      std::byte* const at = cpu.find(*this, {.where = a, .how = access::write, .table = true, .linear = linear});
      if (at == nullptr) {
        exchange = {expected, desired, sizeof(Entry)};
        return exchange_result::failed;
      }
      // (nv2) release pairs with (nv1).
      const bool swapped =
          std::atomic_ref<Entry>(*reinterpret_cast<Entry*>(at))
              .compare_exchange_strong(expected, desired, std::memory_order_release, std::memory_order_relaxed);
      return swapped ? exchange_result::done : exchange_result::changed;
    }
  };

  /// Effects: body(view&) in guest mode, and faults between, until it has an answer.
  template <class Body>
  nested_outcome run(bool linear, Body&& body) noexcept {
    if (!active_) return {.what = nested_outcome::inactive};
    remembered_pages pages;
    while (true) {
      view memory{*this, pages, linear};
      nested_outcome o;
      {
        const guest_mode_section in{mmu_.gate(), state_.port, tlb_};
        o = body(memory);
      }
      if (o.what != nested_outcome::again) return o;
      o = resolve(memory, pages);
      if (o.what == nested_outcome::again) {
        std::this_thread::yield();
      } else if (o.what != nested_outcome::done) {
        return o;
      }
    }
  }

  /// L2's walk, and the page that it leads to. Context: guest mode.
  template <class F>
  nested_outcome attempt(view& memory, gva a, x86::access how, F& f) noexcept {
    const auto walk_in = [&]<class Mode>(std::type_identity<Mode>) noexcept -> nested_outcome {
      const walk_result w = guest_walker<Mode>(l2_).walk(memory, a, how);
      switch (w.status) {
        case walk_status::ok: return reach(memory, {w.address.value}, how, f);
        case walk_status::page_fault: return {.what = nested_outcome::page_fault, .code = w.code};
        case walk_status::general_protection: return {.what = nested_outcome::general_protection};
        case walk_status::memory_error: break;
      }
      return {.what = nested_outcome::again};
    };
    const bool in_memory = mode_ == paging::pae && tables_.what == nested_pointer::npt;
    return in_memory ? walk_in(std::type_identity<pae_under_npt>{}) : visit_mode(mode_, walk_in);
  }
  template <class F>
  nested_outcome reach(view& memory, l2_gpa a, x86::access how, F& f) noexcept {
    const x86::access plain = is_fetch(how) ? access::fetch : is_write(how) ? access::write : access::read;
    std::byte* const at = find(memory, {.where = a, .how = plain, .linear = memory.linear});
    if (at == nullptr) return {.what = nested_outcome::again};
    f(at);
    return {};
  }

  /// Outside guest mode: makes the missing access possible. Returns: done or again: try again.
  nested_outcome resolve(const view& memory, remembered_pages& pages) noexcept {
    const nested_access& m = memory.missing;
    if (memory.mmio && !m.table) return {.what = nested_outcome::not_mapped, .address = memory.address};
    const outcome o = fault(m, m.asked());
    const bool withheld = o.what == outcome::write_tracked || o.what == outcome::not_mapped;
    if (!m.table || !withheld || !is_write(m.asked())) return nested_outcome_of(o, m, tables_);
    // L1's tables allow to write there, and L0 does not.
    if (o.what == outcome::write_tracked && memory.exchange.size != 0) {
      return nested_outcome_of(exchange(m.where, memory.exchange), m, tables_);
    }
    const outcome reading = fault(m, access::read);
    // L1 has changed its tables between the two: the whole access is judged by what they say now.
    if (reading.what == outcome::page_fault) return {.what = nested_outcome::again};
    if (reading.what == outcome::done) pages.add(m.where, o.what == outcome::not_mapped);
    return nested_outcome_of(reading, m, tables_);
  }
  outcome fault(const nested_access& m, x86::access how) noexcept {
    return visit_nested(tables_, [&]<class Mode>(std::type_identity<Mode>) noexcept {
      return mmu_.template nested_fault<Mode>(state_, {m.where.value}, how);
    });
  }
  outcome exchange(l2_gpa where, const tracked_exchange& x) noexcept {
    return visit_nested(tables_, [&]<class Mode>(std::type_identity<Mode>) noexcept {
      return exchange_tracked<Mode>(mmu_.memory(), mmu_.tables(), state_.context, where, x);
    });
  }

  // --- The shadow, as the processor walks it. Context: guest mode; lock-free. ---------------------------------------

  /// Returns: the byte in this process; nullptr: fault first, for what is in memory.missing.
  std::byte* find(view& memory, const nested_access& a) noexcept {
    // What L0 withholds of what L1 allows is no obstacle to reading.
    const bool reads = a.judged_as_write && memory.pages.find(a.where) != 0;
    const x86::access how = reads ? access::read : a.asked();
    const gva key{a.where.value};
    const tlb_entry* e = tlb_.find(key);
    if (e == nullptr || !ept_allows(e->allows, how)) [[unlikely]] {
      if (!walk(memory, a.where, how)) {
        memory.missing = a;
        return nullptr;
      }
      e = tlb_.find(key);
    }
    return e->host + a.where.offset();
  }

  bool walk(view& memory, l2_gpa a, x86::access how) noexcept {
    const unsigned top =
        visit_nested(tables_, []<class Mode>(std::type_identity<Mode>) noexcept { return Mode::levels; });
    if (a.value >> (12 + 9 * top) != 0) return false;
    shadow_page* p = state_.port.root();
    for (unsigned level = top; p != nullptr; --level) {
      const unsigned i = shadow_index({a.value}, level);
      const shadow_entry e = p->load(i);
      if (e.is_mmio()) {
        memory.mmio = e.of_generation(mmu_.slots().current().generation()) && ept_allows(e.allows(), how);
        memory.address = base_of(e.mmio_frame()) + a.offset();
        if (memory.mmio) mmu_.counters().add(mmu_counters::mmio_hits);
        return false;
      }
      if (!e.present()) return false;
      if (e.is_leaf()) return use_leaf(*p, i, level, a, how);
      p = e.child();
    }
    return false;
  }

  /// As vcpu::use_leaf.
  bool use_leaf(shadow_page& p, unsigned i, unsigned level, l2_gpa a, x86::access how) noexcept {
    const std::uint64_t used = shadow_entry::accessed_bit | (is_write(how) ? shadow_entry::dirty_bit : 0);
    shadow_entry e = p.load(i);
    while (true) {
      if (!e.present() || !e.is_leaf()) return false;
      const bool upgrade = is_write(how) && e.may_write() && !e.allows().writable();
      const shadow_entry wanted = e.with(used | (upgrade ? shadow_entry::write_bit : 0));
      if (!ept_allows(wanted.allows(), how)) return false;
      if (wanted == e || p.update(i, e, wanted)) {
        if (upgrade) mark_written(p, i);  // after the upgrade (dirty_log.hpp)
        e = wanted;
        break;
      }
      e = p.load(i);
    }
    const std::uint64_t inside = (a.value >> page_shift) & (frames_at(level) - 1);
    tlb_.insert({a.value}, mmu_.provider().data(e.frame() + inside),
                changed(e.allows(), 0, e.dirty() ? 0 : rights::write_bit), e.guest_user());
    return true;
  }
  void mark_written(const shadow_page& p, unsigned i) noexcept {
    mmu_.counters().add(mmu_counters::fast_writes);
    const gfn f = p.leaf_frame(i);
    if (const memslot* const s = mmu_.slots().current().find(f); s != nullptr) s->mark_dirty(f);
  }

  Mmu& mmu_;
  const nested_capabilities can_;
  vcpu_state state_;
  bool active_ = false;
  nested_pointer tables_{};
  walk_context l2_{};
  paging mode_ = paging::none;
  soft_tlb<> tlb_;  ///< of L2's physical addresses
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
