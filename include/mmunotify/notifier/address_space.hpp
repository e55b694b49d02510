// SPDX-License-Identifier: MIT
#pragma once

// The address space: where a primary MMU brackets its changes and secondary MMUs register (Linux: mm_struct's
// notifier_subscriptions, mmu_notifier_invalidate_range_start and friends).
//
//   std::shared_mutex tables;                                            // the primary's own lock
//   address_space<arming::under<std::shared_mutex>> space;
//   ...
//   std::shared_lock reading{tables};
//   auto inv = space.invalidate({first, last}, event::unmap);            // start: everybody lets go
//   ... change the tables ...                                            // end at the end of the scope
//
// The pages behind the range may be freed after the end.
//
// Parameters: an arming policy (arming.hpp), then in any order at most one key type (default std::uintptr_t) and at
// most one observer (default observe::none).
//
// Cost, per bracket (Zen 4): compiled out 0; disarmed `under` one load, compare and branch, `tracked` 1 ns more;
// armed with one subscriber about 6 ns. Size, disarmed: `under` 8 bytes.

#include <concepts>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include <mmunotify/base/address.hpp>
#include <mmunotify/notifier/arming.hpp>
#include <mmunotify/notifier/bracket.hpp>
#include <mmunotify/notifier/detail/space_parameters.hpp>
#include <mmunotify/notifier/subscriber.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <address_key Key>
class basic_interval;
namespace detail {
/// How a space reaches its intervals; defined with them (interval/detail/interval_door.hpp).
template <address_key Key, class Interval>
struct interval_door;
}  // namespace detail

template <class Arming, class... Options>
class address_space {
  static_assert(sizeof...(Options) <= 2, "mmunotify: address_space takes an arming policy, one key and one observer");

 public:
  using key = typename detail::key_among<std::uintptr_t, Options...>::type;
  using observer_type = typename detail::observer_among<observe::none, Options...>::type;
  using range_type = basic_range<key>;
  using invalidation_type = basic_invalidation<key>;

 private:
  using gate = typename detail::gate_of<Arming, key, observer_type>::type;

 public:
  using bracket_type = bracket<gate, key>;
  /// What the plain start hands to the plain end.
  using ticket = typename gate::ticket;

  address_space() = default;
  address_space(const address_space&) = delete;
  address_space& operator=(const address_space&) = delete;
  /// Precondition (L1): nobody is registered; checked.
  ~address_space() = default;

  // --- For the primary MMU. With arming::under, all of these are called with the primary's lock held. ------------

  /// Returns: true if a subscriber is registered. A hint, unless the caller excludes registration.
  [[gnu::always_inline]] bool armed() const noexcept { return gate_.armed(); }

  /// Effects: start now, end when the bracket goes: between the two no subscriber has a usable mapping in the range.
  /// Change the tables strictly between, and free pages only after. A range that is empty calls nobody; one that is
  /// reversed is a contract failure. Context: may sleep (callbacks do); brackets nest, overlap and run in parallel.
  [[gnu::always_inline]] bracket_type invalidate(range_type r, event e, const void* owner = nullptr) noexcept {
    return {typename bracket_type::blocking{}, gate_, r, e, owner};
  }

  /// Effects: the bracket of the page that holds the address.
  [[gnu::always_inline]] bracket_type invalidate_page(key address, event e, const void* owner = nullptr) noexcept
    requires byte_key<key>
  {
    return invalidate(detail::page_at(address), e, owner);
  }

  /// Effects: as invalidate, but the callbacks are told not to sleep, and may refuse. Returns: a bracket that is false
  /// if one refused: then everybody who got the start has got the end (P3), and the tables must not be touched.
  [[gnu::always_inline]] bracket_type try_invalidate(range_type r, event e, const void* owner = nullptr) noexcept {
    return {typename bracket_type::nonblocking{}, gate_, r, e, owner};
  }

  /// Effects: f() inside a bracket. Returns: what f returns. f is taken by value: capture values, and the disarmed path
  /// is a load, a compare and a branch with no store at all.
  template <std::invocable F>
  [[gnu::always_inline]] decltype(auto) bracketed(range_type r, event e, F f) {
    if constexpr (!gate::closure_out_of_line) {
      const bracket_type b = invalidate(r, e);
      return f();
    } else {
      if (!armed()) [[likely]]
        return f();
      return bracketed_armed(std::move(f), *this, r.first, r.last, e);
    }
  }

  /// The plain calls, for code that cannot use a scope. Precondition: invalidate_range_end gets the ticket of its
  /// start, in the same thread, exactly once. i.blockable is taken as true, i.in_place as false.
  [[nodiscard, gnu::always_inline]] ticket invalidate_range_start(const invalidation_type& i) noexcept {
    return gate_.start(i.range, i.event, i.owner);
  }
  [[gnu::always_inline]] void invalidate_range_end(ticket t) noexcept { gate_.end(t); }

  /// Effects: a bracket in which translations are replaced, one for one: a page becomes another with the same contents,
  /// or is writable from now on. Tell each new one with change_entry before the bracket ends, and free the old page
  /// after. Clients that have change_entry keep their mappings and only let nobody fault; the others let go.
  [[gnu::always_inline]] bracket_type invalidate_in_place(range_type r, event e, const void* owner = nullptr) noexcept {
    return {typename bracket_type::in_place{}, gate_, r, e, owner};
  }
  /// Effects: clients map change.range to change.frame instead. Returns when none uses the old translation any more.
  /// Precondition (O1): inside a bracket of this thread that invalidate_in_place opened and that covers the range (that
  /// a bracket is open is checked in checked builds). Context: may sleep.
  [[gnu::always_inline]] void change_entry(const basic_entry_change<key>& change) noexcept {
    if (armed()) [[unlikely]]
      change_entry_armed(*this, change);
  }

  /// Effects: devices that walk the primary's own tables forget what they cached of the range; up to the last key means
  /// everything. Progress: takes no lock and waits for nobody (O4). Context: also under page-table locks.
  [[gnu::always_inline]] void invalidate_secondary_tlbs(range_type r) noexcept {
    if (armed()) [[unlikely]]
      invalidate_secondary_tlbs_armed(*this, r.first, r.last);
  }

  /// Effects: tests and clears "accessed" in every secondary MMU, and flushes. Returns: true if any had it. Asks all.
  [[gnu::always_inline]] bool clear_flush_young(range_type r) noexcept {
    return ask_young<false>(&detail::operations<key>::clear_flush_young, r);
  }
  /// Effects: the same without a flush.
  [[gnu::always_inline]] bool clear_young(range_type r) noexcept {
    return ask_young<false>(&detail::operations<key>::clear_young, r);
  }
  /// Returns: true if any secondary MMU has accessed the range; stops at the first that says so.
  [[gnu::always_inline]] bool test_young(range_type r) noexcept {
    return ask_young<true>(&detail::operations<key>::test_young, r);
  }
  /// Effects: sets the bits of the pages of the range that a secondary MMU has accessed, and leaves the others: bit
  /// n % 64 of word n / 64 for page n. With `clear`, "accessed" is cleared as well, without a flush. Returns: bad_range
  /// if the range is empty or not whole pages, or has more of them than there are bits; then nothing has happened.
  errc young_pages(range_type r, std::span<std::uint64_t> bits, bool clear) noexcept
    requires paged_key<key>
  {
    if (r.last < r.first || !basic_young_batch<key>::fits(r, bits)) return errc::bad_range;
    gate_.ask([&](auto& audience, auto& observer) {
      basic_young_batch<key> batch(r, bits, clear);
      audience.ask_young_pages(batch, observer);
      return true;
    });
    return errc::ok;
  }

  /// Effects: the address space dies. Every subscriber's release hook runs, once (L4); nobody can register any more.
  /// Returns: ok after all release hooks have completed, also those that a concurrent unregister runs (L3), and no
  /// callback of those released here is running or will run, but that one which leaves by unregister_async may be
  /// called until its done(); would_deadlock inside a callback or an open bracket (L7). Calling it again is harmless.
  /// Progress: blocking. Context: without locks that callbacks take.
  errc release() noexcept { return gate_.release(); }

  /// Effects: returns when every unregister_async() that was called before is over and its done() has returned (L8);
  /// also those behind shared subscriptions. Returns: would_deadlock inside a callback, an open bracket or a done()
  /// (L7). Progress: blocking.
  errc barrier() noexcept { return gate_.barrier(); }

  // --- For secondary MMUs. ----------------------------------------------------------------------------------------

  /// Effects: brackets that start from now on call the subscriber. `held` is the witness that the caller excludes every
  /// bracket: a lock that owns the primary's mutex exclusively. O(1); allocates when the space becomes armed.
  /// Returns: ok; already_registered, released, lock_not_held, no_memory, no_slot, bad_range (an empty or reversed one
  /// in its filter), bracket_open (checked builds): then nothing has changed. Context: may be called inside callbacks
  /// of other spaces.
  template <class Client, class Lock>
    requires detail::is_under<Arming>
  errc register_subscriber(subscriber<Client, key>& node, const Lock& held) noexcept {
    return register_subscriber(node, held, [](const basic_range_visitor<key>&) noexcept {});
  }
  /// The same, and hands the client what is mapped already, atomically: existing(visit) is called once, while no
  /// bracket is in flight, and calls visit(range) for each range that the primary has. The client's existing_range gets
  /// what its filter lets through, clipped; brackets call it for everything that changes afterwards.
  template <class Client, class Lock, std::invocable<basic_range_visitor<key>> Existing>
    requires detail::is_under<Arming>
  errc register_subscriber(subscriber<Client, key>& node, const Lock& held, Existing&& existing) noexcept {
    static_assert(
        exclusive_lock_of<Lock, typename Arming::mutex>,
        "mmunotify: register_subscriber needs a std::unique_lock, lock_guard or scoped_lock of the very mutex "
        "type that arming::under names: a shared lock does not exclude brackets");
    if (!detail::owns(held)) return errc::lock_not_held;
    return gate_.join(node, this, existing);
  }

  /// Effects: as above for arming::tracked; waits for one grace period. Returns: also would_deadlock (L7).
  template <class Client>
    requires std::same_as<Arming, arming::tracked>
  errc register_subscriber(subscriber<Client, key>& node) noexcept {
    return gate_.join(node, this, [](const basic_range_visitor<key>&) noexcept {});
  }
  /// The same with what exists. Brackets may run beside existing(), and they call the client: what it is handed may be
  /// gone as soon as a bracket of its says so, and what comes later it has to fault in, like everybody.
  template <class Client, std::invocable<basic_range_visitor<key>> Existing>
    requires std::same_as<Arming, arming::tracked>
  errc register_subscriber(subscriber<Client, key>& node, Existing&& existing) noexcept {
    return gate_.join(node, this, existing);
  }

  /// Effects: runs the release hook if nobody has, then removes the subscriber; its brackets in flight get their end
  /// first (P2). Returns: ok, and no callback of it is running or will run (L1); not_registered; would_deadlock inside
  /// a callback or an open bracket of this space, or for a node that leaves by unregister_async, inside a done() (L7).
  /// Legal before, during and after release() (L5). Progress: blocking, two grace periods. Context: without locks that
  /// callbacks take. If an unregister_async() of the node came meanwhile, the node is free when its done() is called.
  errc unregister(basic_subscriber<key>& node) noexcept { return gate_.leave(node, this); }

  /// What unregister_async calls when the node is free: it may register it anew, or destroy it and its client. In the
  /// worker of the library, outside of all sections; may sleep.
  using done_hook = typename gate::done_hook;

  /// Effects: the same without waiting: the worker runs the release hook, waits, and calls done(node) if it is not null
  /// (before the call returns, if the space's release() is done with the node already). Until then the node is called.
  /// A removal that is under way already, by unregister() or release(), calls done(node) as well; a registration that
  /// has not returned, of which a callback may come first, goes through and is followed by the removal. Returns: ok;
  /// not_registered, also if another unregister_async() was called before. Progress: never waits. Context: anywhere,
  /// also in callbacks and brackets of this space (L7). Before the space goes: barrier().
  errc unregister_async(basic_subscriber<key>& node, done_hook done = nullptr) noexcept {
    return gate_.leave_async(node, this, done);
  }

  // --- For secondary MMUs that hear of one range. Include <mmunotify/interval/interval_notifier.hpp>. ---------------

  /// Effects: brackets that start from now on, and overlap r, call n; those in flight that overlap r keep n's faults
  /// waiting (C5). Precondition (P7): a space that is disarmed and has a lock to offer is armed by this, so the caller
  /// excludes brackets, as for register_subscriber; the form with the witness makes sure. An armed space may be
  /// bracketing. Errors: bad_range, already_registered, released, no_memory, no_slot, bracket_open (checked builds):
  /// nothing has changed. Context: anywhere, also in callbacks (C6). Progress: lock-free but for the allocator, beside
  /// other intervals; the first one takes a mutex that is never held for long, and waits where it arms the space.
  template <class Interval>
  errc insert(Interval& n, range_type r) noexcept {
    return detail::interval_door<key, Interval>::insert(gate_, this, n, r);
  }
  /// The same. `held` is the witness: a lock that owns the primary's mutex exclusively. Errors: also lock_not_held.
  template <class Interval, class Lock>
    requires detail::is_under<Arming>
  errc insert(Interval& n, range_type r, const Lock& held) noexcept {
    static_assert(exclusive_lock_of<Lock, typename Arming::mutex>,
                  "mmunotify: insert needs a std::unique_lock, lock_guard or scoped_lock of the very mutex type that "
                  "arming::under names: a shared lock does not exclude brackets");
    if (!detail::owns(held)) return errc::lock_not_held;
    return insert(n, r);
  }
  /// The same, and hands n's client what is mapped already, as register_subscriber does: existing(visit) is called
  /// once, while no bracket is in flight, and the client's existing_range gets what lies in r, clipped. Until the call
  /// returns, n can be neither changed nor removed (not_registered), but by remove_async, which lets it go through, and
  /// takes n away then. A resize or split hands out nothing.
  template <class Interval, class Lock, std::invocable<basic_range_visitor<key>> Existing>
    requires detail::is_under<Arming>
  errc insert(Interval& n, range_type r, const Lock& held, Existing&& existing) noexcept {
    static_assert(exclusive_lock_of<Lock, typename Arming::mutex>,
                  "mmunotify: insert needs a lock that owns the mutex type that arming::under names exclusively");
    if (!detail::owns(held)) return errc::lock_not_held;
    return detail::interval_door<key, Interval>::template insert<false>(gate_, this, n, r, existing);
  }
  /// The same for arming::tracked. Waits for the brackets in flight that overlap r, and calls existing() then; later
  /// ones may run beside it, and they call n: what is handed may be gone when it arrives, so take a sequence
  /// (try_read_begin) before looking, and map under the client's lock unless it fails. Errors: also would_deadlock
  /// (L7).
  template <class Interval, std::invocable<basic_range_visitor<key>> Existing>
    requires std::same_as<Arming, arming::tracked>
  errc insert(Interval& n, range_type r, Existing&& existing) noexcept {
    return detail::interval_door<key, Interval>::template insert<true>(gate_, this, n, r, existing);
  }
  /// Effects: no bracket calls n any more. Returns: ok, and no callback of it is running or will run (L1);
  /// not_registered; would_deadlock inside a callback or an open bracket of this space (L7). Progress: blocking. A
  /// space without anybody else is disarmed a few grace periods later (D3); barrier() waits for that.
  template <class Interval>
  errc remove(Interval& n) noexcept {
    return detail::interval_door<key, Interval>::remove(this, n);
  }
  /// Effects: the same without waiting; done(n), if it is not null, is called when n is free, in the library's worker:
  /// it may insert or destroy n. An insertion that has not returned goes through, and begins the removal. Errors:
  /// not_registered. Context: anywhere, also in n's own callbacks. Before the space goes: barrier().
  template <class Interval>
  errc remove_async(Interval& n, void (*done)(basic_interval<key>&) noexcept = nullptr) noexcept {
    return detail::interval_door<key, Interval>::remove_async(this, n, done);
  }
  /// Effects: n covers r from now on; what stays covered is covered all the time, and brackets may call n twice (C6).
  /// Errors: bad_range, not_registered, no_memory; again if another changes it at the same time.
  template <class Interval>
  errc resize(Interval& n, range_type r) noexcept {
    return detail::interval_door<key, Interval>::resize(this, n, r);
  }
  /// Effects: n keeps what is below `at`, `upper` gets the rest, nothing is uncovered in between. Errors: as resize,
  /// and already_registered for upper.
  template <class Interval>
  errc split(Interval& n, key at, Interval& upper) noexcept {
    return detail::interval_door<key, Interval>::split(this, n, at, upper);
  }

  observer_type& observer() noexcept { return gate_.observer(); }

 private:
  template <class, class>
  friend class shared_subscription;

  basic_subscriber<key>* find_shared(const detail::operations<key>& table, std::uint64_t number) noexcept {
    return gate_.ask([&table, number](auto& audience, auto&) { return audience.find_shared(table, number); });
  }
  /// Returns: what keeps two from making one client. Where registration has a witness, that does it already.
  auto sharing(errc& e) noexcept { return gate_.sharing(e); }

  /// The closure comes first, so that a small one travels in registers and never needs a place on the stack.
  template <class F>
  MMUNOTIFY_COLD static decltype(auto) bracketed_armed(F f, address_space& space, key first, key last, event e) {
    const bracket_type b = space.invalidate({first, last}, e);
    return f();
  }

  template <bool FirstYes>
  [[gnu::always_inline]] bool ask_young(detail::young_hook<key> hook, range_type r) noexcept {
    if (!armed()) [[likely]]
      return false;
    return ask_young_armed<FirstYes>(*this, hook, r.first, r.last);
  }

  // What the calls do when somebody listens. Static, with values that travel in registers, for the callers' sake.

  template <bool FirstYes>
  MMUNOTIFY_COLD static bool ask_young_armed(address_space& space, detail::young_hook<key> hook, key first,
                                             key last) noexcept {
    return young_walk<FirstYes>(space, hook, first, last);
  }
  template <bool FirstYes>
  MMUNOTIFY_ARMED static bool young_walk(address_space& space, detail::young_hook<key> hook, key first,
                                         key last) noexcept {
    const range_type r{first, last};
    return detail::is_valid(r) && space.gate_.ask([&](auto& audience, auto& observer) {
      return audience.template ask_young<FirstYes>(hook, r, observer);
    });
  }
  MMUNOTIFY_COLD static void invalidate_secondary_tlbs_armed(address_space& space, key first, key last) noexcept {
    tlb_walk(space, first, last);
  }
  MMUNOTIFY_ARMED static void tlb_walk(address_space& space, key first, key last) noexcept {
    const range_type r{first, last};
    if (!detail::is_valid(r)) return;
    space.gate_.ask([&](auto& audience, auto& observer) __attribute__((always_inline)) {
      audience.invalidate_secondary_tlbs(r, observer);
      return true;
    });
  }
  MMUNOTIFY_COLD static void change_entry_armed(address_space& space, const basic_entry_change<key>& change) noexcept {
    if (MMUNOTIFY_CHECKED && !space.gate_.may_be_inside()) {
      return detail::violated("O1", "address_space::change_entry", "called outside of a bracket of this thread");
    }
    if (!detail::is_valid(change.range)) return;
    space.gate_.ask([&](auto& audience, auto& observer) {
      audience.change_entry(change, observer);
      return true;
    });
  }

  [[no_unique_address]] gate gate_;
};

MMUNOTIFY_END_NAMESPACE

#include <mmunotify/notifier/disabled.hpp>
