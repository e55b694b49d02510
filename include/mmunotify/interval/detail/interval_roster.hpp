// SPDX-License-Identifier: MIT
#pragma once

// The intervals of one space: how they come, change and go, while brackets run. No lock anywhere.
//
// insert:  pin the leaf; link; settle born; look for brackets in flight that overlap and do not know it: then the
//          interval is pending (C5).
// remove:  settle dead; grace period (those who call it have ended); mark and sweep; unpin the leaf; grace period.
// resize:  a second entry for the new range, and when it is linked and born, the first one dies. In between a bracket
//          calls both: an address that stays covered is covered all the time (C6). The entry that an interval was
//          inserted with lies in it, and is unlinked only with it; others are allocated, and freed after grace periods.
//
// Orderings: (in1), (in2) of interval_notifier.hpp; those of the parts.

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>
#include <utility>

#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/bucket_trie.hpp>
#include <mmunotify/interval/detail/interval_entry.hpp>
#include <mmunotify/interval/detail/interval_phases.hpp>
#include <mmunotify/interval/interval_notifier.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <address_key Key>
class interval_roster : protected interval_phases<Key> {
  using base = interval_phases<Key>;
  using base::claim;
  using base::claim_removal;
  using base::end_joining;
  using base::give_up;
  using base::move;
  using base::settle;
  using typename base::phase;

 protected:
  using entry = interval_entry<Key>;

 public:
  using interval = basic_interval<Key>;
  using range_type = basic_range<Key>;

  /// The domain outlives the set. Brackets hold a section of it from before start to after end.
  /// gone: called when an asynchronous removal is over, after done(). Then the set lives on until it returns.
  explicit interval_roster(srcu_domain& domain, void (*gone)(interval_roster&) noexcept = nullptr) noexcept
      : base(domain), index_(domain), gone_(gone) {}
  /// Preconditions: nothing is registered (L1, checked); not inside a section or callback of the domain if intervals
  /// have been removed asynchronously: it waits for that.
  ~interval_roster() {
    for (int step = 0; step < 2 && !index_.empty(); ++step) context_.domain.barrier();
    if (!index_.empty()) violated("L1", "~interval_set", "intervals are still registered");
  }
  interval_roster(const interval_roster&) = delete;
  interval_roster& operator=(const interval_roster&) = delete;

  /// Returns: the set that it is registered with; nullptr if it is not.
  static interval_roster* of(const interval& n) noexcept {
    return n.registered() ? n.set_.load(std::memory_order_acquire) : nullptr;  // (in2): it may not have settled yet
  }

  /// Returns: true if nothing is linked. May be stale on arrival.
  bool empty() const noexcept { return index_.empty(); }

  /// Effects: brackets that start from now on, and overlap r, call n; those in flight that overlap r keep n's faults
  /// waiting (C5). Errors: bad_range (empty or reversed), already_registered, no_memory, no_slot: nothing has changed.
  /// Progress: lock-free, but for the allocator. Context: anywhere but signal handlers, also in callbacks (C6).
  errc insert(interval& n, range_type r) noexcept {
    const errc e = join(n, r);
    if (e == errc::ok) open(n);
    return e;
  }
  /// Effects: the same in two halves. In between n cannot be changed; the second half begins a removal that came.
  errc join(interval& n, range_type r) noexcept {
    if (const errc e = may_change(r); e != errc::ok) return e;
    // All three lines of it are about to be changed: one miss instead of three.
    __builtin_prefetch(&n.first_entry_, 1);
    __builtin_prefetch(&n.word_, 1);
    if (!move(n, phase::idle, phase::joining)) return errc::already_registered;
    n.told_release_.store(false, std::memory_order_relaxed);
    const read_section s(context_.domain);
    if (const errc e = prepare(n.first_entry_, n, r); e != errc::ok) {
      give_up(n);
      return e;
    }
    become_current(n, n.first_entry_);
    publish(n, n.first_entry_);
    return errc::ok;
  }
  /// The second half. Callbacks may have come before it, and may have asked for the removal: that begins here.
  void open(interval& n) noexcept {
    if (!end_joining(n, phase::live)) begin_removal(n);
  }

  /// Effects: waits for the brackets in flight that overlap n and do not know it. may_wait: there may be some; else the
  /// caller knows that there are none. Preconditions: between join and open; outside of sections, if it may wait.
  void outwait_strangers(interval& n, bool may_wait) noexcept {
    if (!may_wait) n.beside_overflow_.store(0, std::memory_order_release);  // (in5)
    bool go_on = true;
    for (std::uint64_t v = n.word_.load(); go_on && collision_word::is_pending(v); v = n.word_.load()) {
      go_on = n.wait_for_strangers(context_, v, may_wait);
    }
  }
  /// What hands existing ranges to n's client, clipped.
  static basic_range_visitor<Key> visitor_of(const interval& n, const range_type& r) noexcept {
    return {*n.operations_, n.client_, r};
  }

  /// Effects: no bracket that starts from now on calls n; those in flight end first. Returns: ok, and no callback of n
  /// is running or will run (L1), and it may be inserted again, or destroyed; not_registered (here, or another removes
  /// it); would_deadlock in a callback or an open bracket of the space (L7). Progress: blocking, two grace periods.
  errc remove(interval& n) noexcept {
    if (context_.domain.held_by_this_thread()) return errc::would_deadlock;
    if (!claim_removal(n)) return errc::not_registered;
    kill_all(n);
    if constexpr (!mutated(mutation::interval_unlink_at_once)) context_.domain.synchronize();
    mark_all(n);
    unlink_all(n);
    context_.domain.synchronize();
    settle(n, phase::idle);
    return errc::ok;
  }

  /// Effects: the same, without waiting: done(n), if it is not null, is called as a callback of the domain when n is
  /// free; it may insert or destroy it. An insertion that has not returned, of which a callback may come first, goes
  /// through, and begins the removal. Errors: not_registered. Progress: lock-free. Context: anywhere but signal
  /// handlers, also in callbacks, n's own too.
  errc remove_async(interval& n, void (*done)(interval&) noexcept = nullptr) noexcept {
    bool ours = false;
    const errc e = claim_removal(n, done, ours);
    if (ours) begin_removal(n);
    return e;
  }

  /// Effects: n covers r from now on. Addresses in both ranges are covered all the time; a bracket over them may call n
  /// twice (each with its clip, and as many ends). Faults that have begun retry. The
  /// old range costs brackets over it a look until two grace periods have passed. Errors: bad_range, not_registered,
  /// no_memory; again if another resizes it at the same time: nothing has changed. Progress, context: as insert.
  errc resize(interval& n, range_type r) noexcept {
    if (const errc e = may_change(r); e != errc::ok) return e;
    if (const errc e = claim(n, phase::changing); e != errc::ok) return e;
    const read_section s(context_.domain);
    auto* const next = new_entry(n, r);
    if (next != nullptr) replace(n, *next);
    settle(n, phase::live);
    return next != nullptr ? errc::ok : errc::no_memory;
  }

  /// Effects: n keeps what is below `at`, `upper` gets the rest. No address is uncovered in between. Errors: as resize,
  /// bad_range also if `at` is not strictly inside n, already_registered for `upper`: nothing has changed.
  errc split(interval& n, Key at, interval& upper) noexcept {
    if (const errc e = context_.domain.attach_this_thread(); e != errc::ok) return e;
    if (const errc e = claim(n, phase::changing); e != errc::ok) return e;
    const read_section s(context_.domain);
    const errc e = split_claimed(n, at, upper);
    settle(n, phase::live);
    return e;
  }

 protected:
  /// Brackets may be in flight that have not looked for this set.
  void set_unknown(bool b) noexcept { unknown_.store(b, std::memory_order_release); }  // (id3) pairs with (id4)

  using base::context_;
  bucket_trie<entry> index_;

 private:
  void (*const gone_)(interval_roster&) noexcept;
  std::atomic<bool> unknown_{false};

  // --- Steps. -----------------------------------------------------------------------------------------------------

  errc may_change(const range_type& r) noexcept {
    return r.empty() ? errc::bad_range : context_.domain.attach_this_thread();
  }

  /// Precondition: leaving, by us, without waiting.
  void begin_removal(interval& n) noexcept {
    kill_all(n);
    if constexpr (mutated(mutation::interval_unlink_at_once)) return mark_later(&n);
    static_cast<void>(context_.domain.call_unbounded(n, &mark_later));
  }
  /// The entry's place exists and stays.
  errc prepare(entry& e, interval& n, const range_type& r) noexcept {
    e.renew(n, r);
    e.place = index_.pin_leaf(e.bucket());
    return e.place != nullptr ? errc::ok : errc::no_memory;
  }
  void become_current(interval& n, entry& e) noexcept {
    if (n.set_.load(std::memory_order_relaxed) != this) n.set_.store(this, std::memory_order_release);  // (in1)
    n.current_.store(&e, std::memory_order_release);         // (in1) pairs with (in2)
    n.context_.store(&context_, std::memory_order_release);  // (in1)
  }

  /// Links a prepared entry; when it returns, every bracket that overlaps it calls it or keeps its faults waiting.
  void publish(interval& n, entry& e) noexcept {
    const std::uint64_t bucket = e.bucket().bucket;
    index_.mark_used(e.place, bucket);
    marked_list::push_front(e.place->list(bucket), e);
    const std::uint64_t born = e.bear(context_.clock);  // (if3)
    if constexpr (mutated(mutation::interval_no_look_in_flight)) return;
    // (id4) pairs with (id3)
    const bool overflows = context_.flights.overflows() || unknown_.load(std::memory_order_acquire);
    if (overflows) n.beside_overflow_.store(born, std::memory_order_release);  // (in5) pairs with (in6)
    flight_slot* slot = nullptr;
    std::uint32_t life = 0;
    if (overflows || interval::find_stranger(context_, e, slot, life)) {
      n.word_.set_pending();
    } else {
      n.word_.move_on();
    }
  }

  void kill_all(interval& n) noexcept { n.current_.load(std::memory_order_relaxed)->kill(context_.clock); }

  /// Preconditions: marked; inside a section.
  void unlink(entry& e) noexcept {
    e.sweep();
    index_.unpin(e.place);
  }

  /// The two that an interval may have in the index: the one that it was inserted with, and the current one.
  static void mark_all(interval& n) noexcept {
    entry* const current = n.current_.load(std::memory_order_relaxed);
    n.first_entry_.mark();
    if (current != &n.first_entry_) current->mark();
  }
  void unlink_all(interval& n) noexcept {
    const read_section s(context_.domain);  // H1
    entry* const current = n.current_.load(std::memory_order_relaxed);
    if (current != &n.first_entry_) {
      n.current_.store(&n.first_entry_, std::memory_order_release);  // (in1): faults that look now do not meet it
      retire(static_cast<spare_entry&>(*current));
    }
    unlink(n.first_entry_);
    n.context_.store(nullptr, std::memory_order_relaxed);  // before the last grace period: see basic_interval::is_in
  }

  // The steps of an asynchronous removal, each a callback of the domain. Marking and sweeping are two, so that one
  // sweep serves all that leave a bucket at a time.

  static void mark_later(srcu_head* h) noexcept {
    auto& n = *static_cast<interval*>(h);
    mark_all(n);
    if (n.current_.load(std::memory_order_relaxed) == &n.first_entry_) {
      const read_section s(n.set_.load(std::memory_order_relaxed)->context_.domain);
      if (n.first_entry_.has_short_list()) return unlink_later(h);
    }
    static_cast<void>(n.set_.load(std::memory_order_relaxed)->context_.domain.call_unbounded(n, &unlink_later));
  }
  static void unlink_later(srcu_head* h) noexcept {
    auto& n = *static_cast<interval*>(h);
    interval_roster& home = *n.set_.load(std::memory_order_relaxed);
    srcu_domain& domain = home.context_.domain;
    interval_roster* const told = home.gone_ != nullptr ? &home : nullptr;
    home.unlink_all(n);                             // with the last one the set may go
    n.set_.store(told, std::memory_order_release);  // (in1)
    static_cast<void>(domain.call_unbounded(n, [](srcu_head* last) noexcept {
      auto& over = *static_cast<interval*>(last);
      const auto done = over.done_;
      interval_roster* const set = over.set_.exchange(nullptr, std::memory_order_relaxed);
      settle(over, phase::idle);
      if (done != nullptr) done(over);
      if (set != nullptr) set->gone_(*set);
    }));
  }

  // --- Resizing. --------------------------------------------------------------------------------------------------

  /// An entry that is not part of its interval.
  struct spare_entry : entry, srcu_head {
    interval_roster* set = nullptr;
  };

  /// Returns: a prepared entry; nullptr without memory.
  spare_entry* new_entry(interval& n, const range_type& r) noexcept {
    auto* const e = new (std::nothrow) spare_entry;
    if (e == nullptr) return nullptr;
    e->set = this;
    if (prepare(*e, n, r) == errc::ok) return e;
    delete e;
    return nullptr;
  }
  void abandon(spare_entry& e) noexcept {
    index_.unpin(e.place);
    delete &e;
  }

  /// The interval's current entry is `next` from now on.
  void replace(interval& n, spare_entry& next) noexcept {
    entry& old = *n.current_.load(std::memory_order_relaxed);
    if constexpr (mutated(mutation::interval_shrinks_first)) old.kill(context_.clock);
    become_current(n, next);
    publish(n, next);
    if constexpr (!mutated(mutation::interval_shrinks_first)) old.kill(context_.clock);
    if (&old == &n.first_entry_) return;
    // Brackets that call it may be in flight. The steps are those of a removal.
    static_cast<void>(context_.domain.call_unbounded(static_cast<spare_entry&>(old), [](srcu_head* h) noexcept {
      auto& e = *static_cast<spare_entry*>(h);
      e.mark();
      static_cast<void>(e.set->context_.domain.call_unbounded(e, [](srcu_head* again) noexcept {
        auto& marked = *static_cast<spare_entry*>(again);
        const read_section s(marked.set->context_.domain);  // H1
        marked.set->retire(marked);
      }));
    }));
  }
  /// Unlinks a marked entry, and frees it when nobody stands on it. Inside a section.
  void retire(spare_entry& e) noexcept {
    srcu_domain& domain = context_.domain;
    unlink(e);  // with the last one the set may go
    static_cast<void>(domain.call_unbounded(e, [](srcu_head* h) noexcept { delete static_cast<spare_entry*>(h); }));
  }

  errc split_claimed(interval& n, Key at, interval& upper) noexcept {
    const range_type whole = n.current_.load(std::memory_order_relaxed)->range;
    const range_type low{whole.first, at};
    const range_type high{at, whole.last};
    if (low.empty() || high.empty()) return errc::bad_range;
    if (!move(upper, phase::idle, phase::joining)) return errc::already_registered;
    spare_entry* const shorter = new_entry(n, low);
    if (shorter == nullptr || prepare(upper.first_entry_, upper, high) != errc::ok) {
      if (shorter != nullptr) abandon(*shorter);
      give_up(upper);
      return errc::no_memory;
    }
    upper.told_release_.store(false, std::memory_order_relaxed);
    become_current(upper, upper.first_entry_);
    publish(upper, upper.first_entry_);
    open(upper);
    replace(n, *shorter);
    return errc::ok;
  }
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
