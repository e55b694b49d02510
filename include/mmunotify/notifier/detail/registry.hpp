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

/// Armed brackets refuse what is no range. Returns: false for an empty one, which concerns nobody, and for a reversed
/// or wrapping one, which is a contract failure as well.
template <address_key Key>
bool is_valid(basic_range<Key> r) noexcept {
  if (r.last < r.first) [[unlikely]] {
    violated("bad input", "address_space::invalidate", "the range is reversed or wraps: its last is below its first");
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
      n.operations_->start(n.client_, i);
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
    n.home_.store(home, std::memory_order_relaxed);
    return errc::ok;
  }

  /// Takes a claim back; nothing has happened.
  static void unclaim(node& n) noexcept {
    n.home_.store(nullptr, std::memory_order_relaxed);
    n.phase_.store(node::idle, std::memory_order_release);  // (n3)
  }

  /// Second half: brackets that start from now on call the node. Precondition: claimed; writers() is held.
  void link_locked(node& n) noexcept {
    const std::uint64_t next = version_.load(std::memory_order_relaxed) + 1;
    n.dead_.store(node::never, std::memory_order_relaxed);
    n.born_.store(next, std::memory_order_relaxed);
    static_cast<void>(list_.push_front(n));  // cannot fail: the claim made the node ours
    ++count_;
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

  /// Effects: the whole of unregister() for a node whose home is `home`. `disarm()` is called with writers() held when
  /// the last node has been unlinked; `emptied()` after the second grace period of that removal.
  template <observe::observer O, class Disarm, class Emptied>
  errc leave(node& n, O& observer, Disarm&& disarm, Emptied&& emptied) {
    if (domain_.held_by_this_thread()) [[unlikely]] {
      violated("L7", "address_space::unregister",
               "called inside a callback or an open bracket of the same address space: it would wait for itself");
      return errc::would_deadlock;
    }
    std::uint32_t expected = node::live;
    if (!n.phase_.compare_exchange_strong(expected, node::leaving, std::memory_order_acquire,  // (n4) pairs with (n3)
                                          std::memory_order_acquire)) {
      return wait_until_gone(n, expected);
    }
    if constexpr (!mutated(mutation::unlink_before_release)) run_release_hook(n, observer);
    kill(n);
    const bool last = unlink_after_grace_period(n, observer, disarm);
    if constexpr (mutated(mutation::unlink_before_release)) run_release_hook(n, observer);
    finish(n, node::idle);
    if (last) emptied();
    return errc::ok;
  }

  /// Effects: runs every release hook that nobody has run, waits for those that others run (L3), and lets go of the
  /// nodes that it ran. Precondition: no registration can begin any more.
  template <observe::observer O, class Disarm, class Emptied>
  errc release_all(O& observer, Disarm&& disarm, Emptied&& emptied) {
    if (domain_.held_by_this_thread()) [[unlikely]] {
      violated("L7", "address_space::release",
               "called inside a callback or an open bracket of the same address space: it would wait for itself");
      return errc::would_deadlock;
    }
    wait_for_joiners();
    node* mine = claim_all(observer);
    bool last = false;
    for (node* n = mine; n != nullptr; n = n->next_claimed_) kill(*n);
    if (mine != nullptr) grace_period(observer);
    for (node* n = mine; n != nullptr; n = n->next_claimed_) last |= unlink(*n, disarm);
    if (mine != nullptr) grace_period(observer);
    while (mine != nullptr) {
      node* const n = mine;
      mine = n->next_claimed_;  // read first: a departed node may be gone at once
      finish(*n, node::departed);
    }
    if (last) emptied();
    return errc::ok;
  }

  /// unregister() of a node that is not live here. Returns: ok if it was departed, else why not.
  static errc depart(node& n) noexcept {
    std::uint32_t expected = node::departed;
    if (n.phase_.compare_exchange_strong(expected, node::idle, std::memory_order_acq_rel)) return errc::ok;  // (n3)(n4)
    return errc::not_registered;
  }

  /// Returns: the space that the node is registered with, null if none.
  static const void* home_of(const node& n) noexcept { return n.home_.load(std::memory_order_relaxed); }
  static bool departed(const node& n) noexcept { return n.phase_.load(std::memory_order_relaxed) == node::departed; }

  template <observe::observer O>
  void grace_period(O& observer) {
    domain_.synchronize();
    observer.note(observe::occurrence::grace_period, 1);
  }

 private:
  template <observe::observer O>
  void run_release_hook(node& n, O& observer) {
    if (n.operations_->release != nullptr) {
      const section s(domain_);
      n.operations_->release(n.client_);
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

  /// Returns: true if it was the last one; then disarm() has been called.
  template <class Disarm>
  bool unlink(node& n, Disarm& disarm) {
    static_cast<void>(list_.mark(n));  // cannot fail: the phase made the removal ours
    {
      const section s(domain_);
      list_.sweep(s);
    }
    const std::lock_guard lock(writers_);
    if (--count_ != 0) return false;
    disarm();
    return true;
  }

  template <observe::observer O, class Disarm>
  bool unlink_after_grace_period(node& n, O& observer, Disarm& disarm) {
    grace_period(observer);
    const bool last = unlink(n, disarm);
    grace_period(observer);
    return last;
  }

  void finish(node& n, std::uint32_t phase) noexcept {
    list_.retire(n);
    n.home_.store(nullptr, std::memory_order_relaxed);
    const auto& word = n.phase_;
    n.phase_.store(phase, std::memory_order_release);  // (n3) pairs with (n4)
    linux_platform::wake(word);                        // by address only: the node may already be gone
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
      std::uint32_t expected = node::live;
      if (n.phase_.compare_exchange_strong(expected, node::leaving, std::memory_order_acquire,  // (n4)
                                           std::memory_order_acquire)) {
        run_release_hook(n, observer);
        n.next_claimed_ = mine;
        mine = &n;
      } else {
        wait_while(n, node::leaving);
      }
    }
    return mine;
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
  static errc wait_until_gone(node& n, std::uint32_t phase) noexcept {
    if (phase == node::idle || phase == node::joining) return errc::not_registered;
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
  std::atomic<std::uint32_t> joining_{0};  ///< linked nodes that are not live yet
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
