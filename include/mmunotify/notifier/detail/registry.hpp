// SPDX-License-Identifier: MIT
#pragma once

// How somebody leaves an audience, and how a whole space is released.
//
// Leaving: claim the release hook (one winner; a loser waits for it), run it while the node is still linked (brackets
// meanwhile find a client that has nothing left to drop), stamp `dead`, grace period, unlink, grace period. The other
// way round, a bracket could miss a client that still maps. unregister() takes these steps one after the other,
// unregister_async() leaves them to callbacks of the domain; release() runs the hooks of both kinds.
//
// The orderings are those of roster.hpp.

#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/notifier/detail/roster.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <address_key Key, class Platform = linux_platform>
class registry : public roster<Key, Platform> {
  using base = roster<Key, Platform>;
  using base::count_;
  using base::discount;
  using base::domain_;
  using base::finish;
  using base::gate_;
  using base::hooks_;
  using base::joining_;
  using base::kill;
  using base::list_;
  using base::note;
  using base::pins_;
  using base::unlink;
  using base::writers_;

 public:
  using node = basic_subscriber<Key>;
  using section = typename base::section;
  using base::grace_period;
  using base::pin_locked;
  using base::unpin;
  using typename base::done_hook;

  registry() = default;
  registry(const gate_hooks<Key, Platform>& hooks, void* gate) noexcept { this->serve(hooks, gate); }
  /// Effects: waits for asynchronous removals. Precondition: nobody else is linked.
  ~registry() {
    bool busy = false;
    {
      const std::lock_guard lock(writers_);
      busy = pins_ != 0;
    }
    if (busy) static_cast<void>(barrier());
    if (const auto* const i = this->intervals(); i != nullptr) i->destroy(i->set);
  }

  /// Last step of a registration: the node may leave now, and does if a callback has asked for that already.
  void settle(node& n) noexcept {
    const std::lock_guard lock(writers_);
    settle_locked(n);
  }
  void settle_locked(node& n) noexcept {
    note(observe::occurrence::registration);  // first: whoever may leave may be the last, and the space may go
    const bool leaves = std::exchange(n.removal_.adopted, false);
    n.phase_.store(leaves ? node::parting : node::live, std::memory_order_release);  // (n3) pairs with (n4)
    if (leaves) {
      n.removal_.node = &n;
      part_later(n);
      hand_over();
    }
    // (n5) release pairs with (n6): whoever saw the count fall sees the node live.
    if (joining_.fetch_sub(1, std::memory_order_release) == 1) Platform::wake(joining_);
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
    if constexpr (!mutated(mutation::no_leaving_grace_period)) grace_period();
    unlink(n);
    grace_period();
    if constexpr (mutated(mutation::unlink_before_release)) run_release_hook(n);
    conclude(n, node::idle);
    go(1);
    return errc::ok;
  }

  /// Effects: the same by callbacks of the domain, of which each waits for a grace period. done(node) may be null.
  errc leave_async(node& n, const void* home, done_hook done) noexcept {
    const claimed c = claim_release(n, home, node::parting, done);
    if (c.error != errc::ok || c.phase != node::live) return c.error;
    // Not bounded by a backlog: there are only so many nodes. Of the steps' three grace periods the first is not
    // needed, but the hook must not run in the caller's place, which may hold what it takes.
    part_later(n);
    return errc::ok;
  }

  /// Effects: runs every release hook that nobody has run, waits for those that others run (L3), lets go of the nodes
  /// that it ran, and unpins. Preconditions: pinned; no registration can begin any more; not inside a section.
  errc release_all() {
    wait_for_joiners();
    node* mine = claim_all();
    for (node* n = mine; n != nullptr; n = n->next_claimed_) kill(*n);
    if (mine != nullptr) grace_period();
    for (node* n = mine; n != nullptr; n = n->next_claimed_) unlink(*n);
    if (mine != nullptr) grace_period();
    std::uint64_t departed = 0;
    for (; mine != nullptr; ++departed) {
      node* const n = mine;
      mine = n->next_claimed_;  // read first: a departed node may be gone at once
      conclude(*n, node::departed);
    }
    go(departed);
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
    wait_for_zero(adopted_);
    // A removal's last step comes out of its third, and the first may come twice. After an interval's three, its
    // anchor may leave.
    const int steps = this->intervals() != nullptr ? 14 : 5;
    for (int step = 0; step < steps; ++step) domain_.barrier();
    return errc::ok;
  }

  /// Effects: the space stays armed until let_go(). Precondition: writers() is held, and it is armed.
  void keep_armed_locked() noexcept { ++count_; }
  /// Effects: takes that back, and a pin. Progress: never waits.
  void let_go() noexcept {
    // A bracket may have loaded the address of this registry just before the space was disarmed.
    if (discount() && hooks_->emptied != nullptr) {
      static_cast<void>(
          domain_.call_unbounded(emptying_, [](srcu_head* h) noexcept { static_cast<emptying*>(h)->home->unpin(); }));
    } else {
      unpin();
    }
  }

 private:
  struct claimed {
    errc error;           ///< ok: `phase` says what the node was found in
    std::uint32_t phase;  ///< live: it is leaving now, by us, and the registry is pinned for us
  };

  /// One winner (L4), who takes a live node to the phase `to`. Under the writers' mutex nothing moves that identifies a
  /// registration: a node that is linked here cannot leave, and so cannot be linked elsewhere. An asynchronous removal
  /// that finds the node leaving, or coming, is adopted by whoever removes or registers it.
  claimed claim_release(node& n, const void* home, std::uint32_t to, done_hook done = nullptr) noexcept {
    const std::lock_guard lock(writers_);
    if (n.where_.load(std::memory_order_relaxed) != this) return {errc::again, 0};
    if (n.home_.load(std::memory_order_relaxed) != home) return {errc::not_registered, 0};
    const std::uint32_t phase = n.phase_.load(std::memory_order_acquire);  // (n4) pairs with (n3)
    if (to == node::leaving) {
      if (phase == node::joining) return {errc::not_registered, phase};
      // Who waits for a removal that callbacks do, or may come to do, must not be one.
      const bool waits_for_callbacks = phase != node::live;
      if (domain_.held_by_this_thread() || (waits_for_callbacks && domain_.runs_callbacks_here())) {
        return {errc::would_deadlock, phase};
      }
    }
    if (to == node::parting) {
      if (n.removal_.node != nullptr || n.removal_.adopted) return {errc::not_registered, phase};
      n.removal_.done = done;
      n.removal_.node = phase == node::live ? &n : nullptr;
      n.removal_.adopted = phase != node::live;
      if (n.removal_.adopted) adopted_.fetch_add(1, std::memory_order_relaxed);
      if (n.removal_.adopted && phase != node::joining) ++count_;  // the space stays armed until done() has returned
      pin_locked();
    } else if (phase == node::live) {
      pin_locked();
    }
    if (phase == node::live) n.phase_.store(to, std::memory_order_relaxed);
    return {errc::ok, phase};
  }

  void run_release_hook(node& n) {
    if (n.operations_->release != nullptr) {
      domain_.read_lock_unordered();  // the hook may leave a bracket open that it began
      n.operations_->release(n.client_);
      domain_.read_unlock_unordered();
      note(observe::occurrence::release);
    }
    n.phase_.store(node::released, std::memory_order_release);  // (n3) pairs with (n4)
    Platform::wake(n.phase_);
  }

  // The steps of an asynchronous removal, each a callback of the domain. The space stays armed until the node's owner
  // has been told, so that barrier() finds the registry.

  static void step_of(srcu_head* h, void (registry::*step)(node&) noexcept) noexcept {
    node& n = *static_cast<typename node::removal*>(h)->node;
    (static_cast<registry*>(n.where_.load(std::memory_order_relaxed))->*step)(n);
  }
  void part_later(node& n) noexcept {
    static_cast<void>(domain_.call_unbounded(n.removal_, [](srcu_head* h) noexcept { step_of(h, &registry::part); }));
  }
  void part(node& n) noexcept {
    if (claim_for_release(n, node::parting)) {
      run_release_hook(n);
    } else if (n.phase_.load(std::memory_order_acquire) == node::leaving) {  // (n4)
      // The space's release() runs it, in a section: so this comes after it. The worker must not wait for a hook.
      return part_later(n);
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
    static_cast<void>(finish(n, node::idle));
    if (done != nullptr) done(n);
    let_go();
  }

  /// The end of a removal that waited: the node is free, or is handed to the asynchronous removal that was adopted.
  void conclude(node& n, std::uint32_t phase) noexcept {
    if (finish(n, phase)) return;
    static_cast<void>(
        domain_.call_unbounded(n.removal_, [](srcu_head* h) noexcept { step_of(h, &registry::finish_parting); }));
    hand_over();
  }
  /// An adopted removal has its callback.
  void hand_over() noexcept {
    // (n16) release pairs with (n17): who sees the count fall has its barrier behind the callback.
    if (adopted_.fetch_sub(1, std::memory_order_release) == 1) Platform::wake(adopted_);
  }

  /// As many nodes as that are gone, and so is whoever removed them.
  void go(std::uint64_t nodes) {
    bool last = false;
    for (; nodes != 0; --nodes) last = discount();
    // A bracket may have loaded the address of this registry just before the space was disarmed.
    if (last && hooks_->emptied != nullptr) domain_.synchronize();  // the space's observer may be gone
    unpin();
  }

  static void wait_for_zero(const std::atomic<std::uint32_t>& count) noexcept {
    // (n6) acquire pairs with (n5); (n17) acquire pairs with (n16).
    for (std::uint32_t n = count.load(std::memory_order_acquire); n != 0;
         n = count.load(std::memory_order_acquire)) {  // (n6), (n17)
      Platform::wait(count, n);
    }
  }

  /// Registrations that began before the release become live, so that their hooks run. They wait for brackets only.
  void wait_for_joiners() noexcept { wait_for_zero(joining_); }

  /// Runs the hooks of all live nodes, and of those that callbacks are to remove; waits for the hooks that others run.
  /// The section keeps the nodes linked; the others' hooks do not wait for it. Returns: those to remove.
  node* claim_all() {
    node* mine = nullptr;
    domain_.read_lock_unordered();  // a hook may leave a bracket open that it began
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
    domain_.read_unlock_unordered();
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
      Platform::wait(n.phase_, phase);
      seen = n.phase_.load(std::memory_order_acquire);  // (n4)
    }
    return seen;
  }

  /// Another thread is removing the node: L1 holds for this caller, too.
  static errc wait_until_gone(node& n) noexcept {
    wait_while(n, node::parting);
    wait_while(n, node::leaving);
    wait_while(n, node::released);
    static_cast<void>(base::take_departed(n));
    return errc::ok;
  }

  struct emptying : srcu_head {
    explicit emptying(registry* r) noexcept : home(r) {}
    registry* home;
  };

  std::atomic<std::uint32_t> adopted_{
      0};  ///< asynchronous removals that wait for one that waits, or for a registration
  emptying emptying_{this};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
