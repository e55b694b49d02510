// SPDX-License-Identifier: MIT
#pragma once

// The TLB of a virtual CPU, and the flush that reaches it on another thread.
//
// Hardware: a CPU walks and caches translations while it runs guest code; who changes the tables sends an interrupt
// and waits for every CPU to acknowledge. Software: a vCPU touches guest memory only inside a *guest-mode section*,
// which is a read section of the VM's own srcu_domain; a flush asks every vCPU to empty its TLB and then waits for a
// grace period. When that ends, each section that began before has left, and each later one has seen the request.
//
//   section:  enter; request? then empty the TLB; look up or walk; touch memory; leave
//   flush:    change the tables; set every vCPU's request; grace period
//
// The same grace period protects what a flush's caller frees next: shadow pages that sections may be walking.
//
// Orderings, for a vCPU V and a flush F:
//   * V's section began before F's grace period: the grace period waits for it; what it did happens before F returns.
//     If it filled the TLB from an old entry, the request is still set when the *next* section begins: V takes requests
//     only at a section's begin.
//   * V's section began later: by the contract of the domain (S1, S2) it sees what F stored before the grace period:
//     the request, and the changed entries.
//   * (tlb1) release at the request / (tlb2) acquire when it is taken: a section that takes a request before F's grace
//     period has begun sees the changed entries as well. Otherwise it could empty its TLB, refill it from the old
//     entry, and have no request left to tell the next section.
// A flush makes progress whatever vCPUs do, as long as sections end: a section takes no lock, does not fault, does not
// sleep. It leaves, faults, enters again and retries.
//
// Cost: a section is a read section and one load (about 1 ns, Zen 4); a flush is a grace period.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

struct shadow_page;

/// One cached translation.
struct tlb_entry {
  std::uint64_t tag = 0;      ///< guest virtual page number + 1; 0: empty
  std::byte* host = nullptr;  ///< the page's first byte in this process
  rights allows{0};           ///< write only if the shadow leaf is dirty already
  bool guest_user = false;    ///< U in the guest (see shadow_entry)
  std::uint8_t key = 0;       ///< the page's protection key
};

/// Direct-mapped by guest virtual page, tagged by nothing else: whatever changes the meaning of an address empties it.
/// Context: the owner thread, inside a guest-mode section (insert, find) or outside (clear, drop).
template <std::size_t Entries = 64>
class soft_tlb {
  static_assert(Entries > 0 && (Entries & (Entries - 1)) == 0, "mmunotify: a soft_tlb has 2^n entries");

 public:
  /// Returns: the page's entry, or nullptr. Valid until the section ends.
  const tlb_entry* find(gva a) const noexcept {
    const tlb_entry& e = entries_[slot(a)];
    return e.tag == tag(a) ? &e : nullptr;
  }
  void insert(gva a, std::byte* host, rights allows, bool guest_user, unsigned key = 0) noexcept {
    entries_[slot(a)] = {tag(a), host, allows, guest_user, static_cast<std::uint8_t>(key)};
  }
  /// Effects: forgets one page (INVLPG).
  void drop(gva a) noexcept {
    if (tlb_entry& e = entries_[slot(a)]; e.tag == tag(a)) e = {};
  }
  void clear() noexcept { entries_ = {}; }

 private:
  static constexpr std::uint64_t tag(gva a) noexcept { return (a.value >> page_shift) + 1; }
  static constexpr std::size_t slot(gva a) noexcept {
    return static_cast<std::size_t>(a.value >> page_shift) & (Entries - 1);
  }
  std::array<tlb_entry, Entries> entries_{};
};

/// What a root is remembered by: the guest's top table, how it is read, and the registers that are read in its place.
struct root_key {
  gfn table{};
  std::uint32_t role = 0;
  std::array<std::uint64_t, 4> registers{};

  friend constexpr bool operator==(const root_key&, const root_key&) = default;
};

/// What the MMU knows of a vCPU: the part that other threads touch.
///
/// A guest switches between a few address spaces all the time, so the roots of the last ones are kept (Linux:
/// prev_roots). Which one is in use is the owner's alone; that a root's page goes, anybody's who holds the MMU lock.
class vcpu_port {
 public:
  /// Roots that are remembered, the one in use among them.
  static constexpr unsigned remembered = 4;

  vcpu_port() = default;
  vcpu_port(const vcpu_port&) = delete;
  vcpu_port& operator=(const vcpu_port&) = delete;

  /// The top shadow table, or nullptr: fault first.
  /// Context: the owner thread, inside a guest-mode section or under the MMU lock.
  shadow_page* root() const noexcept {
    return roots_[current_].page.load(std::memory_order_acquire);  // (tlb3) pairs with (tlb4)
  }
  /// Context: the owner thread, under the MMU lock.
  void set_root(shadow_page* p) noexcept {
    roots_[current_].page.store(p, std::memory_order_release);  // (tlb4) pairs with (tlb3)
  }

  /// Effects: this root is in use from now on; the least recently used one makes room.
  /// Returns: whether its page is known. Context: the owner thread, outside guest mode; takes no lock.
  bool select(const root_key& k) noexcept {
    unsigned found = 0;
    for (unsigned i = 0; i < remembered; ++i) {
      if (roots_[i].used != 0 && matches(roots_[i].key, k)) {
        found = i;
        break;
      }
      if (roots_[i].used < roots_[found].used) found = i;
    }
    remembered_root& r = roots_[found];
    if (r.used == 0 || !matches(r.key, k)) {
      r.key = k;
      r.page.store(nullptr, std::memory_order_relaxed);
    }
    r.used = ++clock_;
    current_ = found;
    return r.page.load(std::memory_order_relaxed) != nullptr;
  }

  /// Effects: the page is no root any more. Context: MMU lock; the page is freed after a flush.
  void forget_root(const shadow_page& p) noexcept {
    for (remembered_root& r : roots_) {
      if (r.page.load(std::memory_order_relaxed) == &p) r.page.store(nullptr, std::memory_order_relaxed);
    }
  }
  /// Context: MMU lock.
  void forget_roots() noexcept {
    for (remembered_root& r : roots_) r.page.store(nullptr, std::memory_order_relaxed);
  }
  /// Calls f(const shadow_page&) for each root. Context: MMU lock.
  template <class F>
  void for_each_root(F&& f) const {
    for (const remembered_root& r : roots_) {
      if (const shadow_page* const p = r.page.load(std::memory_order_relaxed); p != nullptr) f(*p);
    }
  }

 private:
  friend class flush_gate;
  friend class guest_mode_section;

  struct remembered_root {
    std::atomic<shadow_page*> page{nullptr};
    root_key key{};          ///< the owner's
    std::uint64_t used = 0;  ///< the owner's: when it was selected last; 0: never
  };

  static constexpr bool matches(const root_key& a, const root_key& b) noexcept {
    if constexpr (detail::mutated(detail::mutation::wide_root_key)) return a.table == b.table;
    return a == b;
  }

  std::atomic<bool> flush_requested_{false};
  std::array<remembered_root, remembered> roots_{};
  unsigned current_ = 0;
  std::uint64_t clock_ = 0;
  vcpu_port* next_ = nullptr;  ///< under the MMU lock
};

/// The vCPUs of a VM, and the flush of all of them.
class flush_gate {
 public:
  flush_gate() = default;
  flush_gate(const flush_gate&) = delete;
  flush_gate& operator=(const flush_gate&) = delete;

  srcu_domain& domain() noexcept { return domain_; }
  bool empty() const noexcept { return ports_ == nullptr; }
  /// Returns: flushes that have run. Context: MMU lock.
  std::uint64_t flushes() const noexcept { return flushes_; }

  void attach_locked(vcpu_port& p) noexcept {
    p.next_ = ports_;
    ports_ = &p;
  }
  /// Precondition: attached.
  void detach_locked(vcpu_port& p) noexcept {
    vcpu_port** link = &ports_;
    while (*link != &p) link = &(*link)->next_;
    *link = p.next_;
  }
  template <class F>
  void for_each_locked(F&& f) {
    for (vcpu_port* p = ports_; p != nullptr; p = p->next_) f(*p);
  }

  /// Effects: when it returns, no vCPU uses or has cached a translation that was gone from the tables before the call.
  /// Progress: blocking, for as long as guest-mode sections last. Context: MMU lock, which is what makes flushes one at
  /// a time; not inside a guest-mode section (it would wait for itself; the domain reports it, L7).
  void flush_locked() noexcept {
    for_each_locked([](vcpu_port& p) {
      p.flush_requested_.store(true, std::memory_order_release);  // (tlb1) pairs with (tlb2)
    });
    domain_.synchronize();
    ++flushes_;
  }

 private:
  srcu_domain domain_;
  vcpu_port* ports_ = nullptr;
  std::uint64_t flushes_ = 0;
};

/// The vCPU is in guest mode for this scope: translations that it finds are good, memory that they name is there.
/// Precondition: the owner thread; not nested. Inside: no locks, no faults, no calls of the MMU or of its primary.
class [[nodiscard]] guest_mode_section {
 public:
  template <class Tlb>
  guest_mode_section(flush_gate& gate, vcpu_port& port, Tlb& tlb) noexcept : reading_(gate.domain()) {
    if (port.flush_requested_.load(std::memory_order_relaxed)) [[unlikely]] {
      // (tlb2) acquire pairs with (tlb1).
      static_cast<void>(port.flush_requested_.exchange(false, std::memory_order_acquire));
      tlb.clear();
    }
  }
  guest_mode_section(const guest_mode_section&) = delete;
  guest_mode_section& operator=(const guest_mode_section&) = delete;

 private:
  read_section reading_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
