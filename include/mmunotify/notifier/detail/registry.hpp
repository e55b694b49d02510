// SPDX-License-Identifier: MIT
#pragma once

// Everything that an armed address space consists of: its read domain, its list of subscribers, its version.
//
// The audience of a bracket. The registry has a version; a subscriber has the versions `born` and `dead`. A bracket
// reads the version g once, inside its read section, and calls exactly those with born <= g < dead: at start, and again
// at end. Two rules make the two walks agree (P1, P2):
//   R1  a stamp is written before the version moves to its value, so nobody reads a g whose stamps are not visible;
//   R2  a leaving node stays linked until the brackets that may call it have ended (first grace period), is unlinked,
//       and is free after those that may stand on it have ended (second grace period).
//
// Orderings:
//   (n1) version release / (n2) version acquire: R1.
//   (n3) phase release: the hook has run, or the node is free / (n4) phase acquire.
//   Arming (P7): see arming.hpp. Everything about the list: lockfree_hlist.hpp, about grace periods: srcu_domain.hpp.
//
// Leaving: claim the release hook (one winner; a loser waits for it), run it while the node is still linked (brackets
// meanwhile find a client that has nothing left to drop), stamp `dead`, grace period, unlink, grace period. The other
// way round, a bracket could miss a client that still maps.

#include <atomic>
#include <cstdint>
#include <mutex>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/notifier/subscriber.hpp>
#include <mmunotify/observe/observe.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// Armed hooks refuse what is no range. Returns: false for an empty one, which concerns nobody, and for a reversed or
/// wrapping one, which is a contract failure as well.
template <address_key Key>
bool is_valid(basic_range<Key> r) noexcept {
  if (r.last < r.first) [[unlikely]] {
    violated("bad input", "address_space", "a range is reversed or wraps: its last is below its first");
  }
  return !r.empty();
}

template <address_key Key>
class registry {
 public:
  using node = basic_subscriber<Key>;
  using section = read_section;

  srcu_domain& domain() noexcept { return domain_; }
  /// Guards the stamps, the version, the count, and whoever binds the registry to a space. Held for a few stores.
  std::mutex& writers() noexcept { return writers_; }
  bool empty() const noexcept { return list_.empty(); }

  // --- Brackets. Precondition of each: inside a read section of the domain. -------------------------------------

  /// The version that fixes a bracket's audience. Never 0.
  [[gnu::always_inline]] std::uint64_t version() const noexcept {
    return version_.load(std::memory_order_acquire);
  }  // (n2) pairs with (n1)

  template <observe::observer O>
  [[gnu::always_inline]] void call_start(const basic_invalidation<Key>& i, std::uint64_t g, O& observer) {
    std::uint64_t calls = 0;
    for (node& n : list_) {
      if (n.operations_->start == nullptr || !n.hears(g)) continue;
      ++calls;
      if (!n.operations_->start(n.client_, i)) [[unlikely]] {
        violated("P3", "invalidate_range_start", "a client refused a start that is blockable; it counts as done");
      }
    }
    observer.note(observe::occurrence::bracket, 1);
    observer.note(observe::occurrence::callback, calls);
  }

  /// up_to: the last one to be called, null for everybody.
  template <observe::observer O>
  [[gnu::always_inline]] void call_end(const basic_invalidation<Key>& i, std::uint64_t g, O& observer,
                                       const node* up_to = nullptr) {
    std::uint64_t calls = 0;
    for (node& n : list_) {
      if (n.operations_->end != nullptr && n.hears(g)) {
        ++calls;
        n.operations_->end(n.client_, i);
      }
      if (&n == up_to) break;
    }
    observer.note(observe::occurrence::callback, calls);
  }

  /// Non-blocking start. Returns: false if a client refused; then everybody who got the start has got the end (P3),
  /// the one who refused included.
  template <observe::observer O>
  [[nodiscard]] bool try_call_start(const basic_invalidation<Key>& i, std::uint64_t g, O& observer) {
    std::uint64_t calls = 0;
    const node* refused = nullptr;
    for (node& n : list_) {
      if (n.operations_->start == nullptr || !n.hears(g)) continue;
      ++calls;
      if (n.operations_->start(n.client_, i)) continue;
      refused = &n;
      break;
    }
    observer.note(observe::occurrence::callback, calls);
    if (refused == nullptr) {
      observer.note(observe::occurrence::bracket, 1);
      return true;
    }
    observer.note(observe::occurrence::refusal, 1);
    call_end(i, g, observer, refused);
    return false;
  }

  /// Asks the young hook that `hook` selects; stops at the first yes if FirstYes, else asks everybody and ORs (O5).
  template <bool FirstYes, observe::observer O>
  bool ask_young(young_hook<Key> hook, basic_range<Key> r, O& observer) {
    const std::uint64_t g = version();
    bool young = false;
    std::uint64_t calls = 0;
    for (node& n : list_) {
      const auto ask = n.operations_->*hook;
      if (ask == nullptr || !n.hears(g)) continue;
      ++calls;
      young |= ask(n.client_, r);
      if (FirstYes && young) break;
    }
    observer.note(observe::occurrence::callback, calls);
    return young;
  }

  // --- Registration. ----------------------------------------------------------------------------------------------

  /// First half of a registration: the node is the caller's, and nobody else's. Errors: already_registered.
  static errc claim(node& n, const void* home) noexcept {
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
  template <observe::observer O>
  void settle(node& n, O& observer) noexcept {
    n.phase_.store(node::live, std::memory_order_release);  // (n3) pairs with (n4)
    observer.note(observe::occurrence::registration, 1);
    // (n5) release pairs with (n6): whoever saw the count fall sees the node live.
    if (joining_.fetch_sub(1, std::memory_order_release) == 1) linux_platform::wake(joining_);
  }

  /// Effects: the whole of unregister() for a node that where() says is linked here. `disarm()` is called with
  /// writers() held when the last node has been unlinked, `emptied()` when nobody is at work here any more either.
  /// Returns: also again, if the node has moved to another registry meanwhile.
  template <observe::observer O, class Disarm, class Emptied>
  errc leave(node& n, const void* home, O& observer, Disarm&& disarm, Emptied&& emptied) {
    const claimed c = claim_release(n, home);
    if (c.error == errc::would_deadlock) {
      violated("L7", "address_space::unregister",
               "called inside a callback or an open bracket of the same address space: it would wait for itself");
    }
    if (c.error != errc::ok) return c.error;
    if (c.phase != node::live) return wait_until_gone(n);
    if constexpr (!mutated(mutation::unlink_before_release)) run_release_hook(n, observer);
    kill(n);
    grace_period(observer);
    unlink(n, disarm);
    grace_period(observer);
    if constexpr (mutated(mutation::unlink_before_release)) run_release_hook(n, observer);
    finish(n, node::idle);
    if (unpin()) emptied();
    return errc::ok;
  }

  /// Effects: the registry serves its space until unpin(), though the last node may go. Precondition: writers() is
  /// held.
  void pin_locked() noexcept { ++pins_; }

  /// Effects: runs every release hook that nobody has run, waits for those that others run (L3), lets go of the nodes
  /// that it ran, and unpins. Preconditions: pinned; no registration can begin any more; not inside a section.
  template <observe::observer O, class Disarm, class Emptied>
  errc release_all(O& observer, Disarm&& disarm, Emptied&& emptied) {
    wait_for_joiners();
    node* mine = claim_all(observer);
    for (node* n = mine; n != nullptr; n = n->next_claimed_) kill(*n);
    if (mine != nullptr) grace_period(observer);
    for (node* n = mine; n != nullptr; n = n->next_claimed_) unlink(*n, disarm);
    if (mine != nullptr) grace_period(observer);
    while (mine != nullptr) {
      node* const n = mine;
      mine = n->next_claimed_;  // read first: a departed node may be gone at once
      finish(*n, node::departed);
    }
    if (unpin()) emptied();
    return errc::ok;
  }

  /// Returns: true inside a callback or an open bracket, after saying so (L7).
  bool release_would_deadlock() noexcept {
    if (!domain_.held_by_this_thread()) [[likely]]
      return false;
    violated("L7", "address_space::release",
             "called inside a callback or an open bracket of the same address space: it would wait for itself");
    return true;
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
  static errc depart(node& n, const void* home) noexcept {
    return n.home_.load(std::memory_order_relaxed) == home ? depart(n) : errc::not_registered;
  }

  template <observe::observer O>
  void grace_period(O& observer) {
    domain_.synchronize();
    observer.note(observe::occurrence::grace_period, 1);
  }

 private:
  struct claimed {
    errc error;           ///< ok: `phase` says what the node was found in
    std::uint32_t phase;  ///< live: it is leaving now, by us, and the registry is pinned
  };

  /// One winner (L4). Under the writers' mutex nothing moves that identifies a registration: a node that is linked here
  /// cannot leave, and so cannot be linked elsewhere.
  claimed claim_release(node& n, const void* home) noexcept {
    const std::lock_guard lock(writers_);
    if (n.where_.load(std::memory_order_relaxed) != this) return {errc::again, 0};
    if (n.home_.load(std::memory_order_relaxed) != home) return {errc::not_registered, 0};
    const std::uint32_t phase = n.phase_.load(std::memory_order_acquire);  // (n4) pairs with (n3)
    if (phase == node::joining) return {errc::not_registered, phase};
    if (domain_.held_by_this_thread()) return {errc::would_deadlock, phase};
    if (phase == node::live) {
      n.phase_.store(node::leaving, std::memory_order_relaxed);
      pin_locked();
    }
    return {errc::ok, phase};
  }

  /// Returns: true if nobody is linked or at work here any more, and the caller was the last to know.
  [[nodiscard]] bool unpin() noexcept {
    const std::lock_guard lock(writers_);
    return --pins_ == 0 && count_ == 0;
  }

  /// unregister() after the space's release() is done with the node.
  static errc depart(node& n) noexcept {
    std::uint32_t expected = node::departed;
    if (n.phase_.compare_exchange_strong(expected, node::idle, std::memory_order_acq_rel)) return errc::ok;  // (n3)(n4)
    return errc::not_registered;
  }

  template <observe::observer O>
  void run_release_hook(node& n, O& observer) {
    if (n.operations_->release != nullptr) {
      domain_.read_lock_unordered();  // the hook may leave a bracket open that it began
      n.operations_->release(n.client_);
      domain_.read_unlock_unordered();
      observer.note(observe::occurrence::release, 1);
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

  /// Calls disarm() if it was the last one.
  template <class Disarm>
  void unlink(node& n, Disarm& disarm) {
    static_cast<void>(list_.mark(n));  // cannot fail: the phase made the removal ours
    {
      const section s(domain_);
      list_.sweep(s);
    }
    const std::lock_guard lock(writers_);
    if (--count_ == 0) disarm();
  }

  void finish(node& n, std::uint32_t phase) noexcept {
    list_.retire(n);
    const auto& word = n.phase_;
    {
      const std::lock_guard lock(writers_);
      n.where_.store(nullptr, std::memory_order_relaxed);
      n.phase_.store(phase, std::memory_order_release);  // (n3) pairs with (n4)
    }
    linux_platform::wake(word);  // by address only: the node may already be gone
  }

  /// Registrations that began before the release become live, so that their hooks run. They wait for brackets only.
  void wait_for_joiners() noexcept {
    // (n6) acquire pairs with (n5).
    for (std::uint32_t n = joining_.load(std::memory_order_acquire); n != 0;
         n = joining_.load(std::memory_order_acquire)) {  // (n6)
      linux_platform::wait(joining_, n);
    }
  }

  /// Runs the hooks of all live nodes and waits for the hooks that others run. The section keeps the nodes linked; the
  /// others' hooks do not wait for it.
  template <observe::observer O>
  node* claim_all(O& observer) {
    node* mine = nullptr;
    const section s(domain_);
    for (node& n : list_) {
      if (claim_for_release(n)) {
        run_release_hook(n, observer);
        n.next_claimed_ = mine;
        mine = &n;
      } else {
        wait_while(n, node::leaving);
      }
    }
    return mine;
  }

  bool claim_for_release(node& n) noexcept {
    const std::lock_guard lock(writers_);
    if (n.phase_.load(std::memory_order_acquire) != node::live) return false;  // (n4)
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
    wait_while(n, node::leaving);
    wait_while(n, node::released);
    static_cast<void>(depart(n));
    return errc::ok;
  }

  srcu_domain domain_;
  std::atomic<std::uint64_t> version_{1};
  lockfree_hlist<node> list_{domain_};
  std::mutex writers_;
  std::uint64_t count_ = 0;                ///< linked nodes; under writers_
  std::uint64_t pins_ = 0;                 ///< threads that unregister or release here; under writers_
  std::atomic<std::uint32_t> joining_{0};  ///< linked nodes that are not live yet
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
