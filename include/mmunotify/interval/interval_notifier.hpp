// SPDX-License-Identifier: MIT
#pragma once

// The node by which a client hears of one range only, and the retry protocol of its faults (Linux: struct
// mmu_interval_notifier, mmu_interval_read_begin, mmu_interval_read_retry).
//
//   interval_notifier<driver> iv{d};
//   space.insert(iv, {first, last});
//   ...
//   do {                                   // a fault
//     auto seq = iv.read_begin();          // waits while a bracket overlaps the interval
//     page = look_up(address);             // in the primary's tables; may sleep
//     std::lock_guard lock{d.mutex};       // which d's start takes, too
//     if (iv.read_retry(seq)) continue;    // a bracket came in between: throw it away
//     d.map(address, page);
//     break;
//   } while (true);
//   space.remove(iv);
//
// Each interval has a sequence of its own (detail/collision_word.hpp): a fault waits for, and retries after, brackets
// that overlap its interval, and no others (C1, C2). An interval that is inserted under brackets in flight counts as
// being invalidated by those that overlap it (C5): read_begin waits for them, by name. Of brackets
// that start later, those that the filter keeps from the client do not count.
//
// Callbacks get a basic_interval_invalidation: the range clipped to the interval, and the bracket's (C10). The hooks
// are those of notifier/hooks.hpp, all of them, clipped alike:
//   change_entry    gets its part of the change, with the frame of that part's first page. It goes to whoever covers
//                   the address at the moment: so an interval that is removed, or shrinks, inside a bracket in place
//                   drops what it no longer covers first, as before any removal. What another bracket, open now, has
//                   dropped stays dropped.
//   young_pages     gets a batch of the pages that the interval has a byte of.
//   existing_range  is called where insert() is told what exists.
//   release         is called once, if the space is released while the interval is registered; a removal does not.
// When a start hook is called the interval counts as being invalidated; when the last end hook is, it does not any
// more. The space's observer counts the calls of intervals as those of subscribers.
//
// Cost (Zen 4, a million intervals): a bracket that misses 230 ns, one that hits 530 ns, most of it cache misses; 192
// bytes an interval, 20 and a few of its nodes; see bench/README.md.

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <utility>

#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/collision_word.hpp>
#include <mmunotify/interval/detail/interval_context.hpp>
#include <mmunotify/interval/detail/interval_entry.hpp>
#include <mmunotify/interval/interval_invalidation.hpp>
#include <mmunotify/notifier/filter.hpp>
#include <mmunotify/notifier/hooks.hpp>
#include <mmunotify/notifier/subscriber.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {
template <address_key Key>
class interval_phases;
template <address_key Key>
class interval_roster;
template <address_key Key>
class interval_set;
}  // namespace detail

/// What read_begin returns. One that was not returned by it is never good.
class interval_sequence {
 public:
  constexpr interval_sequence() noexcept = default;

 private:
  template <address_key Key>
  friend class basic_interval;
  explicit constexpr interval_sequence(std::uint64_t v) noexcept : value_(v) {}
  std::uint64_t value_ = detail::collision_word::no_value;
};

/// A fault's turn: while it lives, no bracket over the interval is between start and end. See take_turn.
class [[nodiscard]] interval_turn {
 public:
  interval_turn(interval_turn&& o) noexcept : table_(std::exchange(o.table_, nullptr)), place_(o.place_) {}
  interval_turn& operator=(interval_turn&&) = delete;
  ~interval_turn() {
    if (table_ != nullptr) table_->give_back(*place_);
  }
  /// Returns: false if it was refused.
  explicit operator bool() const noexcept { return table_ != nullptr; }

 private:
  template <address_key Key>
  friend class basic_interval;
  interval_turn() noexcept = default;
  interval_turn(detail::turn_table& t, detail::turn_table::place& p) noexcept : table_(&t), place_(&p) {}

  detail::turn_table* table_ = nullptr;
  detail::turn_table::place* place_ = nullptr;
};

// Orderings: (in1) release of the node's state / (in2) acquire: the registration is complete, or the last one is over.
// (in3) release of a wake-up / (in4) acquire. (in5) release of the mark / (in6) acquire: it is set before the word says
// that something is pending.

/// The part of an interval that does not depend on the client's type. The address is its identity: it does not move.
///
///   idle --insert--> joining --------------------------------------> live --remove, remove_async--> leaving --> idle
///                       \--remove_async--> recalling --> recalled --insert's last step--> leaving
///                                                                    live <--resize, split--> changing
template <address_key Key>
class basic_interval : srcu_head {  // for remove_async
 public:
  basic_interval(const basic_interval&) = delete;
  basic_interval& operator=(const basic_interval&) = delete;
  /// Precondition (L1): not registered; checked always.
  ~basic_interval() {
    if (registered()) [[unlikely]] {
      detail::violated("L1", "~interval_notifier", "the interval is still registered; remove it first");
    }
  }

  /// Returns: true while it belongs to a space. May be stale on arrival when others insert or remove it.
  bool registered() const noexcept { return phase_.load(std::memory_order_acquire) != idle; }  // (in2) pairs with (in1)

  /// Effects: waits while a bracket overlaps the interval. Returns: what read_retry compares with. Preconditions:
  /// registered (it may be removed, resized, or inserted anew meanwhile); not inside a callback or an open
  /// bracket of the space, for which it might wait: that is a contract failure (L7) if it has to wait, and the result
  /// is one that always fails. Progress: wait-free if none overlaps, else blocking; it does not wait for brackets
  /// elsewhere (C2).
  interval_sequence read_begin() noexcept {
    const std::uint64_t v = word_.load();
    if (detail::collision_word::is_quiet(v)) [[likely]]
      return interval_sequence(v);
    return wait_until_quiet();
  }

  /// The same without waiting, for callbacks and existing(): while a bracket overlaps the interval, the result is one
  /// that always fails. Progress: wait-free.
  interval_sequence try_read_begin() const noexcept {
    const std::uint64_t v = word_.load();
    return detail::collision_word::is_quiet(v) ? interval_sequence(v) : interval_sequence();
  }

  /// Returns: true if a bracket that overlaps the interval started since, whether it has ended or not: throw the work
  /// away. Exact if the caller holds the lock that the client's start takes. Progress: wait-free, one load.
  bool read_retry(interval_sequence s) const noexcept { return word_.has_moved(s.value_); }

  /// The same without the lock, between the two: true is final (only a bracket that is refused afterwards may have been
  /// a false alarm), false is a hint (C3).
  bool check_retry(interval_sequence s) const noexcept { return word_.has_moved(s.value_); }

  /// Effects: for a fault that has collided a few times (C8). Waits until the brackets over the interval that came
  /// first have ended; those that come later wait for the turn to end, non-blocking ones are refused. So read_begin
  /// does not wait and read_retry is false until then. First come, first served, brackets and turns alike, eight turns
  /// of a space at a time. Lock order: the primary's lock that brackets are run under (shared), the turn, the client's
  /// lock. Who has a turn must not wait for what brackets hold, or take another turn; its read_begin does not wait, and
  /// fails if somebody has resized the interval under it. Preconditions as read_begin; at most one turn per thread.
  /// Returns: false, after a contract failure, otherwise (L7, C8). Limit: brackets beyond the first 64 in flight at a
  /// time do not queue. Progress: blocking.
  interval_turn take_turn() noexcept {
    detail::interval_context* const c = context_.load(std::memory_order_acquire);  // (in2) pairs with (in1)
    if (c == nullptr || would_wait_for_itself(*c, "interval_notifier::take_turn")) return {};
    if (c->turns.is_held_by(linux_platform::self())) {
      detail::violated("C8", "interval_notifier::take_turn", "the thread has a turn already");
      return {};
    }
    // With the turn read_begin must not wait: what it would wait a grace period for, goes now.
    if (std::uint64_t mark = beside_overflow_.load(std::memory_order_acquire); mark != 0) {  // (in6)
      c->domain.synchronize();
      beside_overflow_.compare_exchange_strong(mark, 0, std::memory_order_acq_rel);  // (in5), (in6)
    }
    const basic_range<Key> r = range();
    return {c->turns, c->turns.take(detail::number_of(r.first), detail::number_of(r.last), c->flights)};
  }

  /// Returns: where it is. Precondition: registered. May be stale when others resize it.
  basic_range<Key> range() const noexcept {
    detail::interval_context* const c = context_.load(std::memory_order_acquire);  // (in2)
    if (c == nullptr) return {};
    const read_section s(c->domain);
    return is_in(*c) ? current_.load(std::memory_order_acquire)->range : basic_range<Key>{};  // (in2) pairs with (in1)
  }

  /// What it is told of; the range of it is not used.
  const basic_filter<Key>& filter() const noexcept { return filter_; }

 protected:
  basic_interval(const detail::operations<Key>& operations, void* client, const basic_filter<Key>& told) noexcept
      : operations_(&operations), client_(client), filter_(told) {}
  void* client_pointer() const noexcept { return client_; }

 private:
  friend class detail::interval_phases<Key>;
  friend class detail::interval_roster<Key>;
  friend class detail::interval_set<Key>;
  friend struct interval_probe;  // tests

  using entry = detail::interval_entry<Key>;
  enum phase : std::uint8_t { idle, joining, recalling, recalled, live, changing, leaving };

  /// Whether the filter lets the bracket through (P6). Neither the filter nor the bracket changes.
  [[gnu::always_inline]] bool wants(const basic_invalidation<Key>& i) const noexcept {
    return filter_.events.contains(i.event) &&
           !(filter_.owner != nullptr && filter_.owner == i.owner && has_owner(i.event));
  }

  static bool would_wait_for_itself(detail::interval_context& c, const char* function) noexcept {
    if (!c.domain.held_by_this_thread()) [[likely]]
      return false;
    detail::violated("L7", function,
                     "called inside a callback or an open bracket of the same space: it might wait for itself");
    return true;
  }

  MMUNOTIFY_COLD interval_sequence wait_until_quiet() noexcept {
    detail::interval_context* const c = context_.load(std::memory_order_acquire);  // (in2) pairs with (in1)
    if (c == nullptr || would_wait_for_itself(*c, "interval_notifier::read_begin")) return {};
    // With a turn nothing is worth waiting for: the range has changed since, and brackets may wait for the turn.
    const bool may_wait = !c->turns.any() || !c->turns.is_held_by(linux_platform::self());
    while (true) {
      const std::uint64_t v = word_.load();
      if (detail::collision_word::is_quiet(v)) return interval_sequence(v);
      if (detail::collision_word::is_pending(v)) {
        if (!wait_for_strangers(*c, v, may_wait)) return {};
      } else {
        if (!may_wait) return {};
        wait_for_end();
      }
    }
  }

  /// The last bracket over the interval wakes us.
  void wait_for_end() noexcept {
    const std::uint32_t seen = wakes_.load(std::memory_order_acquire);  // (in4) pairs with (in3)
    if (word_.announce_sleeper()) linux_platform::wait(wakes_, seen);
  }
  void wake() noexcept {
    wakes_.fetch_add(1, std::memory_order_release);  // (in3) pairs with (in4)
    linux_platform::wake(wakes_);
  }

  /// Inside a section of the domain. Returns: true if it is registered there, and then its range stays until the
  /// section ends: a removal takes the context back before its last grace period, and only then may it be inserted
  /// anew.
  bool is_in(const detail::interval_context& c) const noexcept {
    return context_.load(std::memory_order_acquire) == &c;  // (in2) pairs with (in1)
  }

  /// Waits for one of the brackets that overlap the interval and do not know it; if there is none, says so. seen: the
  /// word before. Returns: false if it must not wait and would have to, or
  /// if the interval has been removed.
  bool wait_for_strangers(detail::interval_context& c, std::uint64_t seen, bool may_wait) noexcept {
    std::uint64_t mark = beside_overflow_.load(std::memory_order_acquire);  // (in6) pairs with (in5)
    if (mark != 0) {
      if (!may_wait) return false;
      c.domain.synchronize();                                                        // every bracket is a section
      beside_overflow_.compare_exchange_strong(mark, 0, std::memory_order_acq_rel);  // (in5), (in6)
      return true;
    }
    detail::flight_slot* slot = nullptr;
    std::uint32_t life = 0;
    {
      const read_section s(c.domain);
      if (!is_in(c)) return false;
      const entry& e = *current_.load(std::memory_order_acquire);  // (in2) pairs with (in1)
      if (!find_stranger(c, e, slot, life)) word_.clear_pending(seen);
    }
    if (slot == nullptr) return true;
    if (may_wait) slot->life.wait(life);
    return may_wait;
  }
  static bool find_stranger(detail::interval_context& c, const entry& e, detail::flight_slot*& slot,
                            std::uint32_t& life) noexcept {
    const std::uint64_t first = detail::number_of(e.range.first);
    const std::uint64_t last = detail::number_of(e.range.last);
    const std::uint64_t born = e.born();
    return c.flights.any([&](detail::flight_slot& s, std::uint32_t l, const detail::flight& f) {
      if (f.version >= born || !f.overlaps(first, last)) return false;
      slot = &s;
      life = l;
      return true;
    });
  }

  // One cache line for who comes and goes, one for who passes by, one for who is hit.
  std::atomic<std::uint8_t> phase_{idle};
  std::atomic<bool> told_release_{false};
  std::atomic<std::uint32_t> wakes_{0};
  std::atomic<entry*> current_{nullptr};
  std::atomic<detail::interval_context*> context_{nullptr};
  std::atomic<std::uint64_t> beside_overflow_{0};  ///< born beside brackets that have no slot: the version; else 0
  std::atomic<detail::interval_roster<Key>*> set_{nullptr};  ///< that it is registered with
  void (*done_)(basic_interval&) noexcept = nullptr;

  alignas(64) entry first_entry_{};  ///< the range it was inserted with

  alignas(64) detail::collision_word word_{};
  const detail::operations<Key>* operations_;
  void* client_;
  const basic_filter<Key> filter_;
};

/// A registration of `Client` for one range. Fails to compile, with one sentence, if Client has no hook or one of a
/// wrong signature.
template <class Client, address_key Key = std::uintptr_t>
class interval_notifier : public basic_interval<Key> {
  static_assert(detail::numbered_key<Key>,
                "mmunotify: intervals need keys that are unsigned integers, or have one as their `value`");
  using invalidation_type = basic_interval_invalidation<Key>;

 public:
  /// Precondition: the client outlives every registration of this node.
  explicit interval_notifier(Client& client, const basic_filter<Key>& told = {}) noexcept
      : basic_interval<Key>(detail::operations_for<Client, Key, invalidation_type>, &client,
                            detail::filter_for<Client, Key>(told)) {
    static_assert(!std::is_const_v<Client>, "mmunotify: an interval's client must not be const");
    static_assert(detail::check_client<Client, Key, invalidation_type>());
    static_assert(!has_change_entry<Client, Key> || paged_key<Key>,
                  "mmunotify: an interval's change_entry gets a part of the change: the keys must have pages");
  }

  Client& client() const noexcept { return *static_cast<Client*>(this->client_pointer()); }
};

MMUNOTIFY_END_NAMESPACE

#include <mmunotify/interval/detail/interval_door.hpp>
