// SPDX-License-Identifier: MIT
#pragma once

// Who comes to an audience, and how somebody leaves it.
//
// Leaving: claim the release hook (one winner; a loser waits for it), run it while the node is still linked (brackets
// meanwhile find a client that has nothing left to drop), stamp `dead`, grace period, unlink, grace period. The other
// way round, a bracket could miss a client that still maps. unregister() takes these steps one after the other,
// unregister_async() leaves them to callbacks of the domain; release() runs the hooks of both kinds.
//
// Orderings:
//   (n3) phase release: the hook has run, or the node is free / (n4) phase acquire.
//   (n5)/(n6): who saw the count of joiners fall sees their nodes live.
//   (n7)/(n8), (n9)/(n10): where a node is linked, and with whose registry.
//   Arming (P7): see arming.hpp. The audience rule: audience.hpp.

#include <atomic>
#include <cstdint>
#include <mutex>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/notifier/detail/audience.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// What a registry does to the space that it serves. `gate` is that space's.
template <address_key Key>
struct gate_hooks {
  /// Called with writers() held when the last node has gone. May be null.
  void (*disarm)(void* gate) noexcept;
  /// Called when the last node has gone and nobody is at work here: the registry may serve another space. May be null.
  void (*emptied)(registry<Key>&) noexcept;
  void (*note)(void* gate, observe::occurrence, std::uint64_t) noexcept;
};

template <address_key Key>
class registry : public audience<Key> {
  using base = audience<Key>;
  using base::domain_;
  using base::list_;
  using base::version_;

 public:
  using node = basic_subscriber<Key>;
  using section = read_section;
  using done_hook = void (*)(node&) noexcept;

  registry() = default;
  registry(const gate_hooks<Key>& hooks, void* gate) noexcept { serve(hooks, gate); }
  /// Effects: waits for asynchronous removals. Precondition: nobody else is linked.
  ~registry() {
    bool busy = false;
    {
      const std::lock_guard lock(writers_);
      busy = pins_ != 0;
    }
    if (busy) static_cast<void>(barrier());
  }

  /// Effects: the registry works for this space now. Precondition: for none before, or it is not bound.
  void serve(const gate_hooks<Key>& hooks, void* gate) noexcept {
    hooks_ = &hooks;
    gate_ = gate;
  }
  void* gate() const noexcept { return gate_; }

  /// Guards the stamps, the version, the count, and whoever binds the registry to a space. Held for a few stores.
  std::mutex& writers() noexcept { return writers_; }

  // --- Coming. ------------------------------------------------------------------------------------------------------

  /// First half of a registration: the node is the caller's, and nobody else's. Errors: already_registered, bad_range.
  static errc claim(node& n, const void* home) noexcept {
    if (n.filter().range.has_value() && n.filter().range->empty()) return errc::bad_range;
    std::uint32_t expected = node::idle;
    // (n4) acquire pairs with (n3): the node's last registration is over.
    if (!n.phase_.compare_exchange_strong(expected, node::joining, std::memory_order_acquire,
                                          std::memory_order_relaxed)) {
      if (expected != node::departed ||
          !n.phase_.compare_exchange_strong(expected, node::joining, std::memory_order_acquire,  // (n4)
                                            std::memory_order_relaxed)) {
        return errc::already_registered;
      }
    }
    // (n9) release pairs with (n10): who sees this home sees that the node's last registration is nowhere any more.
    n.home_.store(home, std::memory_order_release);
    return errc::ok;
  }

  /// Takes a claim back; nothing has happened.
  static void unclaim(node& n) noexcept {
    n.phase_.store(node::idle, std::memory_order_release);  // (n3)
  }

  /// Second half: brackets that start from now on call the node. Precondition: claimed; writers() is held.
  void link_locked(node& n) noexcept {
    const std::uint64_t next = version_.load(std::memory_order_relaxed) + 1;
    n.dead_.store(node::never, std::memory_order_relaxed);
    n.born_.store(next, std::memory_order_relaxed);
    static_cast<void>(list_.push_front(n));  // cannot fail: the claim made the node ours
    ++count_;
    n.where_.store(this, std::memory_order_release);  // (n7) pairs with (n8)
    joining_.fetch_add(1, std::memory_order_relaxed);
    version_.store(next, std::memory_order_release);  // (n1) pairs with (n2)
  }

  /// Last step, when the node may be used: it may also leave now.
  void settle(node& n) noexcept {
    n.phase_.store(node::live, std::memory_order_release);  // (n3) pairs with (n4)
    note(observe::occurrence::registration);
    // (n5) release pairs with (n6): whoever saw the count fall sees the node live.
    if (joining_.fetch_sub(1, std::memory_order_release) == 1) linux_platform::wake(joining_);
  }

  /// Effects: hands the node's client what exists already: existing(visit) calls visit(range) for each range. The
  /// client's hook runs as all hooks do, in a section. Precondition: linked, not settled.
  template <class Existing>
  void replay(node& n, Existing&& existing) {
    const section s(domain_);
    existing(basic_range_visitor<Key>(n));
  }

  // --- Leaving. -----------------------------------------------------------------------------------------------------

  /// Effects: the whole of unregister() for a node that where() says is linked here. Returns: also again, if the node
  /// has moved to another registry meanwhile.
  errc leave(node& n, const void* home) {
    const claimed c = claim_release(n, home, node::leaving);
    if (c.error == errc::would_deadlock) {
      violated("L7", "address_space::unregister",
               "called inside a callback or an open bracket of the same address space: it would wait for itself");
    }
    if (c.error != errc::ok) return c.error;
    if (c.phase != node::live) return wait_until_gone(n);
    if constexpr (!mutated(mutation::unlink_before_release)) run_release_hook(n);
    kill(n);
    grace_period();
    unlink(n);
    static_cast<void>(discount());
    domain_.synchronize();
    if constexpr (mutated(mutation::unlink_before_release)) run_release_hook(n);
    finish(n, node::idle);
    unpin();
    return errc::ok;
  }

  /// Effects: the same by callbacks of the domain, of which each waits for a grace period. done(node) may be null.
  errc leave_async(node& n, const void* home, done_hook done) noexcept {
    const claimed c = claim_release(n, home, node::parting);
    if (c.error != errc::ok) return c.error;
    if (c.phase != node::live) return errc::not_registered;  // another thread removes it
    n.removal_.done = done;
    // Not bounded by a backlog: there are only so many nodes. Of the steps' three grace periods the first is not
    // needed, but the hook must not run in the caller's place, which may hold what it takes.
    return domain_.call_unbounded(n.removal_, [](srcu_head* h) noexcept { step_of(h, &registry::part); });
  }

  /// Effects: the registry serves its space until unpin(), though the last node may go. Precondition: writers() is
  /// held.
  void pin_locked() noexcept { ++pins_; }

  /// Effects: runs every release hook that nobody has run, waits for those that others run (L3), lets go of the nodes
  /// that it ran, and unpins. Preconditions: pinned; no registration can begin any more; not inside a section.
  errc release_all() {
    wait_for_joiners();
    node* mine = claim_all();
    for (node* n = mine; n != nullptr; n = n->next_claimed_) kill(*n);
    if (mine != nullptr) grace_period();
    for (node* n = mine; n != nullptr; n = n->next_claimed_) {
      unlink(*n);
      static_cast<void>(discount());
    }
    if (mine != nullptr) domain_.synchronize();
    while (mine != nullptr) {
      node* const n = mine;
      mine = n->next_claimed_;  // read first: a departed node may be gone at once
      finish(*n, node::departed);
    }
    unpin();
    return errc::ok;
  }

  /// Returns: true inside a callback or an open bracket, after saying so (L7).
  bool would_deadlock(const char* function) noexcept {
    if (!domain_.held_by_this_thread()) [[likely]]
      return false;
    violated("L7", function,
             "called inside a callback or an open bracket of the same address space: it would wait for itself");
    return true;
  }

  /// Effects: returns when every asynchronous removal that was asked for before is over, its done() included (L8).
  /// Returns: would_deadlock inside a section or a callback of the domain (L7).
  errc barrier() noexcept {
    if (would_deadlock("address_space::barrier")) return errc::would_deadlock;
    if (domain_.runs_callbacks_here()) {
      violated("L7", "address_space::barrier", "called where removals end: it would wait for itself");
      return errc::would_deadlock;
    }
    for (int step = 0; step < 4; ++step) domain_.barrier();  // a removal's last step comes out of its third
    return errc::ok;
  }

  /// Returns: the registry that the node is linked with, if that is one of the space `home`; null if the node is not.
  /// It may be stale at once; claim_release finds out.
  static registry* where(const node& n, const void* home) noexcept {
    while (true) {
      registry* const r = n.where_.load(std::memory_order_acquire);         // (n8) pairs with (n7)
      if (n.home_.load(std::memory_order_acquire) != home) return nullptr;  // (n10) pairs with (n9)
      // A node that comes is claimed (home) before it is linked (where), one that goes is nowhere before that.
      if (n.where_.load(std::memory_order_acquire) == r) return r;  // (n8)
    }
  }

  /// unregister() of a node that is linked nowhere. Returns: ok if the release() of the space `home` had let go of it.
  static errc depart(node& n, const void* home, done_hook done = nullptr) noexcept {
    if (n.home_.load(std::memory_order_relaxed) != home) return errc::not_registered;
    const errc e = depart(n);
    if (e == errc::ok && done != nullptr) done(n);
    return e;
  }

  void grace_period() {
    domain_.synchronize();
    note(observe::occurrence::grace_period);
  }

 private:
  struct claimed {
    errc error;           ///< ok: `phase` says what the node was found in
    std::uint32_t phase;  ///< live: it is leaving now, by us, and the registry is pinned
  };

  void note(observe::occurrence what) noexcept {
    if (hooks_->note != nullptr) hooks_->note(gate_, what, 1);
  }

  /// One winner (L4), who takes a live node to the phase `to`. Under the writers' mutex nothing moves that identifies a
  /// registration: a node that is linked here cannot leave, and so cannot be linked elsewhere.
  claimed claim_release(node& n, const void* home, std::uint32_t to) noexcept {
    const std::lock_guard lock(writers_);
    if (n.where_.load(std::memory_order_relaxed) != this) return {errc::again, 0};
    if (n.home_.load(std::memory_order_relaxed) != home) return {errc::not_registered, 0};
    const std::uint32_t phase = n.phase_.load(std::memory_order_acquire);  // (n4) pairs with (n3)
    if (phase == node::joining) return {errc::not_registered, phase};
    if (to == node::leaving) {
      // Who waits for a removal that callbacks do must not be one.
      const bool waits_for_callbacks = phase != node::live && n.removal_.node != nullptr;
      if (domain_.held_by_this_thread() || (waits_for_callbacks && domain_.runs_callbacks_here())) {
        return {errc::would_deadlock, phase};
      }
    }
    if (phase == node::live) {
      n.phase_.store(to, std::memory_order_relaxed);
      if (to == node::parting) n.removal_.node = &n;
      pin_locked();
    }
    return {errc::ok, phase};
  }

  void unpin() noexcept {
    bool unused = false;
    {
      const std::lock_guard lock(writers_);
      unused = --pins_ == 0 && count_ == 0;
    }
    if (unused && hooks_->emptied != nullptr) hooks_->emptied(*this);
  }

  /// unregister() after the space's release() is done with the node.
  static errc depart(node& n) noexcept {
    std::uint32_t expected = node::departed;
    if (n.phase_.compare_exchange_strong(expected, node::idle, std::memory_order_acq_rel)) return errc::ok;  // (n3)(n4)
    return errc::not_registered;
  }

  void run_release_hook(node& n) {
    if (n.operations_->release != nullptr) {
      domain_.read_lock_unordered();  // the hook may leave a bracket open that it began
      n.operations_->release(n.client_);
      domain_.read_unlock_unordered();
      note(observe::occurrence::release);
    }
    n.phase_.store(node::released, std::memory_order_release);  // (n3) pairs with (n4)
    linux_platform::wake(n.phase_);
  }

  /// Brackets that start from now on do not call the node.
  void kill(node& n) noexcept {
    const std::lock_guard lock(writers_);
    const std::uint64_t next = version_.load(std::memory_order_relaxed) + 1;
    n.dead_.store(next, std::memory_order_relaxed);
    version_.store(next, std::memory_order_release);  // (n1) pairs with (n2)
  }

  void unlink(node& n) {
    static_cast<void>(list_.mark(n));  // cannot fail: the phase made the removal ours
    const section s(domain_);
    list_.sweep(s);
  }

  /// Returns: true if it was the last one, and the space is disarmed.
  bool discount() {
    const std::lock_guard lock(writers_);
    if (--count_ != 0) return false;
    if (hooks_->disarm != nullptr) hooks_->disarm(gate_);
    return true;
  }

  void finish(node& n, std::uint32_t phase) noexcept {
    list_.retire(n);
    const auto& word = n.phase_;
    {
      const std::lock_guard lock(writers_);
      n.removal_.node = nullptr;
      n.where_.store(nullptr, std::memory_order_relaxed);
      n.phase_.store(phase, std::memory_order_release);  // (n3) pairs with (n4)
    }
    linux_platform::wake(word);  // by address only: the node may already be gone
  }

  // The steps of an asynchronous removal, each a callback of the domain. The space stays armed until the node's owner
  // has been told, so that barrier() finds the registry.

  static void step_of(srcu_head* h, void (registry::*step)(node&) noexcept) noexcept {
    node& n = *static_cast<typename node::removal*>(h)->node;
    (n.where_.load(std::memory_order_relaxed)->*step)(n);
  }
  void part(node& n) noexcept {
    if (claim_for_release(n, node::parting)) {
      run_release_hook(n);
    } else {
      wait_while(n, node::leaving);  // the space's release() runs it
    }
    kill(n);
    static_cast<void>(
        domain_.call_unbounded(n.removal_, [](srcu_head* h) noexcept { step_of(h, &registry::unlink_parting); }));
  }
  void unlink_parting(node& n) noexcept {
    unlink(n);
    static_cast<void>(
        domain_.call_unbounded(n.removal_, [](srcu_head* h) noexcept { step_of(h, &registry::finish_parting); }));
  }
  void finish_parting(node& n) noexcept {
    const done_hook done = n.removal_.done;
    finish(n, node::idle);
    if (done != nullptr) done(n);
    // A bracket may have loaded the address of this registry just before the space was disarmed.
    if (discount() && hooks_->emptied != nullptr) {
      static_cast<void>(
          domain_.call_unbounded(emptying_, [](srcu_head* h) noexcept { static_cast<emptying*>(h)->home->unpin(); }));
    } else {
      unpin();
    }
  }

  /// Registrations that began before the release become live, so that their hooks run. They wait for brackets only.
  void wait_for_joiners() noexcept {
    // (n6) acquire pairs with (n5).
    for (std::uint32_t n = joining_.load(std::memory_order_acquire); n != 0;
         n = joining_.load(std::memory_order_acquire)) {  // (n6)
      linux_platform::wait(joining_, n);
    }
  }

  /// Runs the hooks of all live nodes, and of those that callbacks are to remove; waits for the hooks that others run.
  /// The section keeps the nodes linked; the others' hooks do not wait for it. Returns: those to remove.
  node* claim_all() {
    node* mine = nullptr;
    const section s(domain_);
    for (node& n : list_) {
      if (claim_for_release(n, node::live)) {
        run_release_hook(n);
        n.next_claimed_ = mine;
        mine = &n;
      } else if (claim_for_release(n, node::parting)) {
        run_release_hook(n);
      } else {
        wait_while(n, node::leaving);
      }
    }
    return mine;
  }

  bool claim_for_release(node& n, std::uint32_t from) noexcept {
    const std::lock_guard lock(writers_);
    if (n.phase_.load(std::memory_order_acquire) != from) return false;  // (n4)
    n.phase_.store(node::leaving, std::memory_order_relaxed);
    return true;
  }

  static std::uint32_t wait_while(node& n, std::uint32_t phase) noexcept {
    std::uint32_t seen = n.phase_.load(std::memory_order_acquire);  // (n4) pairs with (n3)
    while (seen == phase) {
      linux_platform::wait(n.phase_, phase);
      seen = n.phase_.load(std::memory_order_acquire);  // (n4)
    }
    return seen;
  }

  /// Another thread is removing the node: L1 holds for this caller, too.
  static errc wait_until_gone(node& n) noexcept {
    wait_while(n, node::parting);
    wait_while(n, node::leaving);
    wait_while(n, node::released);
    static_cast<void>(depart(n));
    return errc::ok;
  }

  struct emptying : srcu_head {
    explicit emptying(registry* r) noexcept : home(r) {}
    registry* home;
  };

  const gate_hooks<Key>* hooks_ = nullptr;
  void* gate_ = nullptr;  ///< the gate that it serves; written while nobody can find it
  std::mutex writers_;
  std::uint64_t count_ = 0;                ///< nodes that keep the space armed; under writers_
  std::uint64_t pins_ = 0;                 ///< removals and releases at work here; under writers_
  std::atomic<std::uint32_t> joining_{0};  ///< linked nodes that are not live yet
  emptying emptying_{this};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
