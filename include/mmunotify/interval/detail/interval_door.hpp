// SPDX-License-Identifier: MIT
#pragma once

// How an address space gets its intervals: the set that belongs to a registry, and who keeps the space armed.
//
// A registry gets its set, for good, when the first interval is inserted. While there are intervals an anchor is
// registered with it, a subscriber without a hook: so the space is armed, and is disarmed when the last interval has
// gone (D3). Anchors leave asynchronously, which takes grace periods, and intervals may come meanwhile: there are two,
// and one of them is always free. An anchor pins the registry, too, for the intervals of a space that was released.
//
// When the anchor comes, brackets may be in flight that have not looked for a set. Until a grace period has passed,
// every interval that is inserted waits for one before its first fault (C5), as beside brackets without a slot.
//
// Users of a set: its intervals, and who is about to insert one. Only the first and the last take the writers' mutex.
//
// Orderings: (id1) release of the count of users / (id2) acquire: who finds one finds the anchor registered; the last
// one comes after all others. (id3) release / (id4) acquire of a flag: what it says has happened before.

#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <optional>
#include <utility>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/interval_forwarding.hpp>
#include <mmunotify/interval/detail/interval_set.hpp>
#include <mmunotify/interval/interval_notifier.hpp>
#include <mmunotify/notifier/address_space.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <address_key Key>
class interval_home : public interval_set<Key> {
  using set_type = interval_set<Key>;
  using node = basic_subscriber<Key>;

 public:
  using registry_type = registry<Key, linux_platform>;

  /// Precondition: the registry's writers' mutex is held. Returns: nullptr without memory.
  static interval_home* of_locked(registry_type& r) noexcept {
    if (interval_home* const there = of(r); there != nullptr) return there;
    auto* const fresh = new (std::nothrow) interval_home(r);
    if (fresh != nullptr) r.set_intervals(&fresh->hooks_);
    return fresh;
  }
  /// Returns: the registry's set; nullptr if it never had one.
  static interval_home* of(registry_type& r) noexcept {
    const auto* const hooks = r.intervals();
    return hooks != nullptr ? static_cast<interval_home*>(hooks->set) : nullptr;
  }
  /// Returns: the set that the interval belongs to, if that serves the space; else nullptr.
  static interval_home* of(const basic_interval<Key>& n, const void* space) noexcept {
    auto* const h = static_cast<interval_home*>(set_type::of(n));
    return h != nullptr && h->space_.load(std::memory_order_relaxed) == space ? h : nullptr;
  }

  /// One user more. Returns: false if there is none.
  [[nodiscard]] bool hold() noexcept {
    std::uint64_t n = users_.load(std::memory_order_relaxed);
    while (n != 0) {
      // (id2) pairs with (id1)
      if (users_.compare_exchange_weak(n, n + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
    }
    return false;
  }
  /// One user more, the first perhaps. Precondition: the writers' mutex is held, and the space is armed or may be.
  void hold_locked(const void* space) noexcept {
    if (users_.load(std::memory_order_relaxed) == 0) {
      space_.store(space, std::memory_order_relaxed);
      released_.store(false, std::memory_order_relaxed);
      if (!on_) join_locked(space);
    }
    users_.fetch_add(1, std::memory_order_release);  // (id1) pairs with (id2)
  }
  /// One user less.
  void drop() noexcept {
    std::uint64_t n = users_.load(std::memory_order_relaxed);
    while (n > 1) {
      if (users_.compare_exchange_weak(n, n - 1, std::memory_order_release, std::memory_order_relaxed))
        return;  // (id1)
    }
    std::unique_lock lock(registry_.writers());
    if (users_.fetch_sub(1, std::memory_order_acq_rel) == 1) leave_if_unused(lock);  // (id1), (id2)
  }

  /// Returns: true if the space's release() calls the intervals' hooks, or has. seq_cst: Dekker with the version of the
  /// walk that calls them: it finds the interval, or the interval finds the flag.
  bool released() const noexcept { return released_.load(std::memory_order_seq_cst); }  // (id4) pairs with (id3)

  /// f() inserts `fresh`. One section, which release() waits for (L3), and a removal (L1).
  template <class F>
  errc beside_release(F f, basic_interval<Key>& fresh) noexcept {
    const read_section s(registry_.domain());
    if (released()) return errc::released;
    const errc e = f();
    if (e == errc::ok && released()) this->release_one(fresh);  // the walk may have missed it
    return e;
  }

  /// The same, and existing(visit) when the brackets in flight that do not know `fresh` are over. released() after that
  /// is looked at inside the section: release() waits for the replay, or there is none.
  template <bool MayWait, class Existing>
  errc insert_and_tell(basic_interval<Key>& fresh, basic_range<Key> r, Existing& existing) noexcept {
    const errc e = beside_release([&] { return this->join(fresh, r); }, fresh);
    if (e != errc::ok) return e;
    this->outwait_strangers(fresh, MayWait);
    {
      const read_section s(registry_.domain());
      if (!released()) existing(set_type::visitor_of(fresh, r));
    }
    this->open(fresh);
    return errc::ok;
  }

 private:
  struct anchor : node {
    explicit anchor(interval_home& h) noexcept : node(table, this, basic_filter<Key>{}), home(h) {}
    static constexpr operations<Key> table{.release = [](void* a) noexcept {
      auto& mine = *static_cast<anchor*>(a);
      mine.home.space_released(mine);
    }};
    interval_home& home;
    /// Under the writers' mutex. What a release() took with it does not say when it has parted.
    bool is_parting() const noexcept { return parting && this->registered(); }
    bool parting = false;
  };
  struct settling : srcu_head {
    explicit settling(interval_home& h) noexcept : home(h) {}
    interval_home& home;
    std::uint64_t generation = 0;
    bool queued = false;
  };

  explicit interval_home(registry_type& r) noexcept : set_type(r.domain(), &gone), registry_(r) {}
  ~interval_home() {
    bool queued = false;
    {
      const std::lock_guard lock(registry_.writers());
      queued = settling_.queued;
    }
    if (queued) registry_.domain().barrier();
  }

  template <class Home, address_key K>
  friend interval_hooks<K> hooks_of(Home&) noexcept;

  static void gone(interval_roster<Key>& set) noexcept { static_cast<interval_home&>(set).drop(); }

  // --- Anchors. All with the writers' mutex held. -------------------------------------------------------------------

  void join_locked(const void* space) noexcept {
    anchor& a = anchors_[current_];
    a.parting = false;
    typename registry_type::former before;
    static_cast<void>(registry_type::claim(a, space, before));  // cannot fail: it is free
    registry_.link_locked(a);
    registry_.pin_locked();
    registry_.settle_locked(a);
    on_ = true;
    this->set_unknown(true);
    ++joined_;
    if (!settling_.queued) settle_later();
  }
  void settle_later() noexcept {
    settling_.queued = true;
    settling_.generation = joined_;
    static_cast<void>(registry_.domain().call_unbounded(settling_, [](srcu_head* h) noexcept {
      auto& s = *static_cast<settling*>(h);
      const std::lock_guard lock(s.home.registry_.writers());
      if (s.generation != s.home.joined_) return s.home.settle_later();
      s.home.set_unknown(false);
      s.queued = false;
    }));
  }

  /// Nobody uses the set: the anchor leaves, unless the other one is still about to. Gives the mutex up.
  void leave_if_unused(std::unique_lock<linux_platform::mutex>& lock) noexcept {
    anchor& a = anchors_[current_];
    if (!on_ || users_.load(std::memory_order_relaxed) != 0 || anchors_[1 - current_].is_parting()) return;
    on_ = false;
    a.parting = true;
    current_ = 1 - current_;
    const void* const space = space_.load(std::memory_order_relaxed);
    const bool kept = std::exchange(kept_, false);
    lock.unlock();
    const auto parted = [](node& n) noexcept {
      auto& mine = static_cast<anchor&>(n);
      std::unique_lock again(mine.home.registry_.writers());
      mine.parting = false;
      mine.home.leave_if_unused(again);
    };
    // Not linked any more if the space was released.
    if (registry_.leave_async(a, space, parted) != errc::ok) {
      static_cast<void>(registry_type::depart(a, space, parted));
    }
    if (kept) {
      registry_.let_go();
    } else {
      registry_.unpin();
    }
  }

  /// Runs inside a section, without the mutex.
  void space_released(const anchor& a) noexcept {
    {
      const std::lock_guard lock(registry_.writers());
      if (!on_ || &a != &anchors_[current_]) return;  // it leaves because nobody is there
      registry_.keep_armed_locked();                  // until the last interval has gone: barrier() finds it (L8)
      kept_ = true;
      released_.store(true, std::memory_order_seq_cst);  // (id3) pairs with (id4)
    }
    this->release_all();
  }

  registry_type& registry_;
  const interval_hooks<Key> hooks_ = hooks_of<interval_home, Key>(*this);
  std::atomic<const void*> space_{nullptr};  ///< compared, never followed
  alignas(64) std::atomic<std::uint64_t> users_{0};
  std::atomic<bool> released_{false};
  // Under the writers' mutex:
  anchor anchors_[2] = {anchor(*this), anchor(*this)};
  settling settling_{*this};
  std::uint64_t joined_ = 0;
  unsigned current_ = 0;
  bool kept_ = false;  ///< the space was released, and is kept armed for those that are left
  bool on_ = false;    ///< the current anchor is registered
};

/// What address_space::insert and the others do.
template <address_key Key, class Interval>
struct interval_door {
  using home = interval_home<Key>;
  using registry_type = typename home::registry_type;
  using range_type = basic_range<Key>;

  /// A space that is disarmed, and has a lock to offer, is armed: no bracket is in flight then.
  template <class Gate>
  static errc insert(Gate& gate, const void* space, Interval& n, range_type r) noexcept {
    return insert_by(gate, space, r,
                     [&](home& h) noexcept { return h.beside_release([&] { return h.insert(n, r); }, n); });
  }
  /// MayWait: brackets may be in flight.
  template <bool MayWait, class Gate, class Existing>
  static errc insert(Gate& gate, const void* space, Interval& n, range_type r, Existing& existing) noexcept {
    if constexpr (MayWait) {
      if (gate.may_be_inside()) {
        violated("L7", "address_space::insert",
                 "called with existing ranges inside a callback or an open bracket of the same address space: it would "
                 "wait for itself");
        return errc::would_deadlock;
      }
    }
    return insert_by(gate, space, r,
                     [&](home& h) noexcept { return h.template insert_and_tell<MayWait>(n, r, existing); });
  }
  static errc remove(const void* space, Interval& n) noexcept {
    home* const h = home::of(n, space);
    if (h == nullptr) return errc::not_registered;
    const errc e = h->remove(n);
    if (e == errc::would_deadlock) {
      violated("L7", "address_space::remove",
               "called inside a callback or an open bracket of the same address space: it would wait for itself");
    }
    if (e == errc::ok) h->drop();
    return e;
  }
  static errc remove_async(const void* space, Interval& n, void (*done)(basic_interval<Key>&) noexcept) noexcept {
    home* const h = home::of(n, space);
    return h != nullptr ? h->remove_async(n, done) : errc::not_registered;
  }
  static errc resize(const void* space, Interval& n, range_type r) noexcept {
    home* const h = home::of(n, space);
    return h != nullptr ? h->resize(n, r) : errc::not_registered;
  }
  static errc split(const void* space, Interval& n, Key at, Interval& upper) noexcept {
    home* const h = home::of(n, space);
    if (h == nullptr || !h->hold()) return errc::not_registered;
    const errc e = h->beside_release([&] { return h->split(n, at, upper); }, upper);
    if (e != errc::ok) h->drop();
    return e;
  }

 private:
  /// put(home) inserts.
  template <class Gate, class Put>
  static errc insert_by(Gate& gate, const void* space, const range_type& r, Put put) noexcept {
    if (r.empty()) return errc::bad_range;
    if (const errc e = insert_into_armed(gate, space, put); e != errc::lock_not_held) return e;
    starter first;
    if (const errc e = gate.join(first, space, [](const auto&) noexcept {}); e != errc::ok) return e;
    const errc e = insert_into_armed(gate, space, put);
    static_cast<void>(gate.leave(first, space));
    return e;
  }

  template <class Gate, class Put>
  static errc insert_into_armed(Gate& gate, const void* space, Put& put) noexcept {
    home* h = gate.ask([](auto& registry, auto&) noexcept -> home* {
      home* const there = home::of(registry);
      return there != nullptr && there->hold() ? there : nullptr;
    });
    if (h == nullptr) {
      const errc e = gate.while_armed([&](registry_type& registry) noexcept {
        h = home::of_locked(registry);
        if (h == nullptr) return errc::no_memory;
        h->hold_locked(space);
        return errc::ok;
      });
      if (e != errc::ok) return e;
    }
    const errc e = put(*h);
    if (e != errc::ok) h->drop();
    return e;
  }

  /// Arms a space until the anchor does.
  struct starter : basic_subscriber<Key> {
    static constexpr operations<Key> table{};
    starter() noexcept : basic_subscriber<Key>(table, nullptr, basic_filter<Key>{}) {}
  };
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
