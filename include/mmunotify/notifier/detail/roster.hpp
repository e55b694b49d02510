// SPDX-License-Identifier: MIT
#pragma once

// Who belongs to an audience: coming, being found, and the single steps of leaving.
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
template <address_key Key, class Platform>
struct gate_hooks {
  /// Called with writers() held when the last node has gone. May be null.
  void (*disarm)(void* gate) noexcept;
  /// Called when the last node has gone and nobody is at work here: the registry may serve another space. May be null.
  void (*emptied)(registry<Key, Platform>&) noexcept;
  void (*note)(void* gate, observe::occurrence, std::uint64_t) noexcept;
};

template <address_key Key, class Platform>
class roster : public audience<Key, Platform> {
  using base = audience<Key, Platform>;

 public:
  using node = basic_subscriber<Key>;
  using section = typename base::section;
  using done_hook = void (*)(node&) noexcept;
  using mutex = typename Platform::mutex;

  /// Effects: the registry works for this space now. Precondition: for none before, or it is not bound.
  void serve(const gate_hooks<Key, Platform>& hooks, void* gate) noexcept {
    hooks_ = &hooks;
    gate_ = gate;
  }
  void* gate() const noexcept { return gate_; }

  /// Guards the stamps, the version, the count, and whoever binds the registry to a space. Held for a few stores.
  mutex& writers() noexcept { return writers_; }

  // --- Coming. ------------------------------------------------------------------------------------------------------

  /// What a node was before a claim.
  struct former {
    const void* home = nullptr;
    std::uint32_t phase = node::idle;
  };

  /// First half of a registration: the node is the caller's, and nobody else's. Errors: already_registered, bad_range.
  static errc claim(node& n, const void* home, former& before) noexcept {
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
    before = {n.home_.load(std::memory_order_relaxed), expected};
    // (n9) release pairs with (n10): who sees this home sees that the node's last registration is nowhere any more.
    n.home_.store(home, std::memory_order_release);
    return errc::ok;
  }

  /// Takes a claim back; nothing has happened (L6).
  static void unclaim(node& n, const former& before) noexcept {
    n.home_.store(before.home, std::memory_order_release);    // (n9)
    n.phase_.store(before.phase, std::memory_order_release);  // (n3)
  }

  /// Second half: brackets that start from now on call the node. Precondition: claimed; writers() is held.
  void link_locked(node& n) noexcept {
    const std::uint64_t next = version_.load(std::memory_order_relaxed) + 2;
    n.dead_.store(node::never, std::memory_order_relaxed);
    n.born_.store(next, std::memory_order_relaxed);
    if (n.operations_->end != nullptr) enders_.fetch_add(1, std::memory_order_relaxed);
    // R3: who finds the node at the head, which push_front stores with release, finds this, too. (n1) release pairs
    // with (n2): a bracket may take the odd version, too, and has to see the stamps before it.
    if constexpr (!mutated(mutation::version_never_odd)) {
      version_.store(next - 1, order(std::memory_order_release, mutation::odd_version_relaxed));
    }
    static_cast<void>(list_.push_front(n));  // cannot fail: the claim made the node ours
    ++count_;
    n.where_.store(static_cast<registry<Key, Platform>*>(this), std::memory_order_release);  // (n7) pairs with (n8)
    joining_.fetch_add(1, std::memory_order_relaxed);
    version_.store(next, std::memory_order_release);  // (n1) pairs with (n2)
  }

  /// Effects: hands the node's client what exists already: existing(visit) calls visit(range) for each range. The
  /// client's hook runs as all hooks do, in a section. Precondition: linked, not settled.
  template <class Existing>
  void replay(node& n, Existing&& existing) {
    const section s(domain_);
    existing(basic_range_visitor<Key>(*n.operations_, n.client_, n.filter_.range));
  }

  // --- Being found. -------------------------------------------------------------------------------------------------

  /// Returns: the registry that the node is linked with, if that is one of the space `home`; null if the node is not.
  /// It may be stale at once; claim_release finds out.
  static registry<Key, Platform>* where(const node& n, const void* home) noexcept {
    while (true) {
      void* const r = n.where_.load(std::memory_order_acquire);             // (n8) pairs with (n7)
      if (n.home_.load(std::memory_order_acquire) != home) return nullptr;  // (n10) pairs with (n9)
      // A node that comes is claimed (home) before it is linked (where), one that goes is nowhere before that.
      if (n.where_.load(std::memory_order_acquire) == r) return static_cast<registry<Key, Platform>*>(r);  // (n8)
    }
  }

  /// unregister() of a node that is linked nowhere. Returns: ok if the release() of the space `home` had let go of it.
  static errc depart(node& n, const void* home, done_hook done = nullptr) noexcept {
    if (n.home_.load(std::memory_order_relaxed) != home) return errc::not_registered;
    // (n4) finish() says "nowhere" before it says what the node is now. It holds the mutex: soon.
    while (n.phase_.load(std::memory_order_acquire) == node::released) Platform::wait(n.phase_, node::released);
    const errc e = take_departed(n);
    if (e == errc::ok && done != nullptr) done(n);
    return e;
  }

  /// Effects: waits for the brackets in flight.
  void grace_period() {
    domain_.synchronize();
    note(observe::occurrence::grace_period);
  }

  /// Effects: the registry serves its space until unpin(), though the last node may go. Precondition: writers() is
  /// held.
  void pin_locked() noexcept { ++pins_; }

 protected:
  using base::domain_;
  using base::enders_;
  using base::leaving_;
  using base::list_;
  using base::version_;

  // --- Steps of leaving. --------------------------------------------------------------------------------------------

  void note(observe::occurrence what) noexcept {
    if (hooks_->note != nullptr) hooks_->note(gate_, what, 1);
  }

  /// unregister() after the space's release() is done with the node.
  static errc take_departed(node& n) noexcept {
    std::uint32_t expected = node::departed;
    if (n.phase_.compare_exchange_strong(expected, node::idle, std::memory_order_acq_rel)) return errc::ok;  // (n3)(n4)
    return errc::not_registered;
  }

  /// Brackets that start from now on do not call the node.
  void kill(node& n) noexcept {
    const std::lock_guard lock(writers_);
    const std::uint64_t next = version_.load(std::memory_order_relaxed) + 2;
    n.dead_.store(next, std::memory_order_relaxed);
    // R3. Relaxed: who reads the version finds it.
    if constexpr (!mutated(mutation::leaving_not_counted)) leaving_.fetch_add(1, std::memory_order_relaxed);
    version_.store(next, std::memory_order_release);  // (n1) pairs with (n2)
  }

  void unlink(node& n) {
    static_cast<void>(list_.mark(n));  // cannot fail: the phase made the removal ours
    {
      const section s(domain_);
      list_.sweep(s);
    }
    // (n15) pairs with (n14): who finds it gone does not reach the node.
    if constexpr (!mutated(mutation::leaving_not_counted)) leaving_.fetch_sub(1, std::memory_order_release);
    if (n.operations_->end != nullptr) enders_.fetch_sub(1, std::memory_order_relaxed);
  }

  /// Returns: true if it was the last one, and the space is disarmed.
  bool discount() {
    const std::lock_guard lock(writers_);
    if (--count_ != 0) return false;
    if (hooks_->disarm != nullptr) hooks_->disarm(gate_);
    return true;
  }

  /// Returns: false if an asynchronous removal has to end it: then that is what the node is in now.
  [[nodiscard]] bool finish(node& n, std::uint32_t phase) noexcept {
    const auto& word = n.phase_;
    {
      const std::lock_guard lock(writers_);
      if (n.removal_.adopted) {
        n.removal_.adopted = false;
        n.removal_.node = &n;
        return false;
      }
      list_.retire(n);
      n.removal_.node = nullptr;
      n.where_.store(nullptr, std::memory_order_release);  // (n7) pairs with (n8): what the node was before
      n.phase_.store(phase, std::memory_order_release);    // (n3) pairs with (n4)
    }
    Platform::wake(word);  // by address only: the node may already be gone
    return true;
  }

  void unpin() noexcept {
    bool unused = false;
    {
      const std::lock_guard lock(writers_);
      unused = --pins_ == 0 && count_ == 0;
    }
    if (unused && hooks_->emptied != nullptr) hooks_->emptied(static_cast<registry<Key, Platform>&>(*this));
  }

  const gate_hooks<Key, Platform>* hooks_ = nullptr;
  void* gate_ = nullptr;  ///< the gate that it serves; written while nobody can find it
  mutex writers_;
  std::uint64_t count_ = 0;                ///< nodes that keep the space armed; under writers_
  std::uint64_t pins_ = 0;                 ///< removals and releases at work here; under writers_
  std::atomic<std::uint32_t> joining_{0};  ///< linked nodes that are not live yet
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
