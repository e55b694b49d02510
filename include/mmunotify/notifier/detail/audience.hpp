// SPDX-License-Identifier: MIT
#pragma once

// Whom the hooks of an armed address space call, and in which order: its read domain, its list, its version.
//
// The audience of a bracket. There is a version; a subscriber has the versions `born` and `dead`. A bracket reads the
// version g once, inside its read section, and calls exactly those with born <= g < dead whose filter lets it through:
// at start, and again at end. Two rules make the two walks agree (P1, P2):
//   R1  a stamp is written before the version moves to its value, so nobody reads a g whose stamps are not visible;
//   R2  a leaving node stays linked until the brackets that may call it have ended (first grace period), is unlinked,
//       and is free after those that may stand on it have ended (second grace period).
// A filter never changes while its node is registered (P6).
//
// Order (O2, O3): at start the intervals, then the subscribers, newest first, then all second passes in the order of
// the first ones; at end the intervals, then the subscribers.
//
// Orderings:
//   (n1) version release / (n2) version acquire: R1.
//   (n14) leaving acquire / (n15) leaving release: R3, see for_each_hearing.
//   (n11) intervals release / (n12) acquire: who finds the table finds what it stands for.
// Everything about the list: lockfree_hlist.hpp, about grace periods: srcu_domain.hpp.

#include <atomic>
#include <concepts>
#include <cstdint>

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

/// How an audience calls the intervals of the space, which it does not know. calls: what the calls of clients are
/// added to.
template <address_key Key>
struct interval_calls {
  using count = std::uint64_t*;
  using batch = typename young_batch_of<Key>::type;
  /// Returns: false if one refused; then those that got the start have got the end, and nothing is pending. memo goes
  /// to end.
  bool (*start)(void* set, const basic_invalidation<Key>&, pending_passes<Key>&, void*& memo, count calls) noexcept;
  void (*end)(void* set, const basic_invalidation<Key>&, void* memo, count calls) noexcept;
  /// In place of end, when a subscriber refused after the intervals had started: everything is as before (P4).
  void (*cancel)(void* set, const basic_invalidation<Key>&, void* memo, count calls) noexcept;
  void (*change_entry)(void* set, const basic_entry_change<Key>&, count calls) noexcept;  ///< null: keys have no pages
  bool (*ask_young)(void* set, young_hook<Key>, basic_range<Key>, bool first_yes, count calls) noexcept;
  void (*ask_young_pages)(void* set, batch&, count calls) noexcept;  ///< null: keys have no pages
  void (*invalidate_secondary_tlbs)(void* set, basic_range<Key>, count calls) noexcept;
};

template <address_key Key>
struct interval_hooks {
  void* set;
  interval_calls<Key> silent;  ///< for observe::none: nothing is counted, and calls is null
  interval_calls<Key> counting;
  /// The audience goes; nothing is registered.
  void (*destroy)(void* set) noexcept;

  template <observe::observer O>
  [[gnu::always_inline]] const interval_calls<Key>& calls() const noexcept {
    if constexpr (std::same_as<O, observe::none>) {
      return silent;
    } else {
      return counting;
    }
  }
};

/// What intervals add their calls to; nothing where nobody counts.
template <observe::observer O>
struct interval_count {
  std::uint64_t value = 0;
  std::uint64_t* to() noexcept { return &value; }
};
template <>
struct interval_count<observe::none> {
  static constexpr std::uint64_t value = 0;
  static constexpr std::uint64_t* to() noexcept { return nullptr; }
};

template <address_key Key, class Platform>
class audience {
 public:
  using node = basic_subscriber<Key>;
  using domain_type = basic_srcu_domain<Platform>;
  using section = basic_read_section<domain_type>;

  domain_type& domain() noexcept { return domain_; }
  bool empty() const noexcept { return list_.empty(); }

  // --- Brackets. Precondition of each: inside a read section of the domain. -----------------------------------------

  /// The version that fixes a bracket's audience. Never 0.
  [[gnu::always_inline]] std::uint64_t version() const noexcept {
    return version_.load(std::memory_order_acquire);
  }  // (n2) pairs with (n1)

  /// Returns: g, or 0 if nobody has to be called at the end.
  template <observe::observer O>
  [[gnu::always_inline]] std::uint64_t call_start(const basic_invalidation<Key>& i, std::uint64_t g, void*& memo,
                                                  O& observer) {
    started s;
    pending_passes<Key> pending;  // its address is given away; s stays in registers
    if (const auto* const first = intervals(); first != nullptr) [[unlikely]] {
      interval_count<O> calls;
      // Nobody refuses what is blockable.
      static_cast<void>(first->template calls<O>().start(first->set, i, pending, memo, calls.to()));
      s.calls += calls.value;
    }
    for_each_hearing(
        g, [&](node & n) __attribute__((always_inline)) {
          if (n.start_ != nullptr) {
            ++s.calls;
            s.heard = true;
            n.start_(n.client_, i);
          } else if (!start_carefully(n, i, pending, s)) [[unlikely]] {
            refused_blockable();
          }
          return true;
        });
    pending.finish_all(i);
    observer.note(observe::occurrence::bracket, 1);
    observer.note(observe::occurrence::callback, s.calls);
    return needs_end(s) ? g : 0;
  }

  /// g: what the start returned. up_to: the last one to be called, null for everybody.
  template <observe::observer O>
  [[gnu::always_inline]] void call_end(const basic_invalidation<Key>& i, std::uint64_t g, void* memo, O& observer,
                                       const node* up_to = nullptr) {
    std::uint64_t calls = 0;
    if (memo != nullptr) [[unlikely]] {
      const auto* const first = intervals();
      interval_count<O> ends;
      first->template calls<O>().end(first->set, i, memo, ends.to());
      observer.note(observe::occurrence::callback, ends.value);
    }
    if (g == 0) return;
    for_each_hearing(
        g, [&](node & n) __attribute__((always_inline)) {
          if (n.end_ != nullptr) {
            ++calls;
            n.end_(n.client_, i);
          } else if (n.operations_->end != nullptr && n.wants(i)) {
            ++calls;
            n.operations_->end(n.client_, i);
          }
          return &n != up_to;
        });
    observer.note(observe::occurrence::callback, calls);
  }

  /// Non-blocking start. Returns: false if a client refused; then everybody who got the start has got the end (P3),
  /// the one who refused included, and everything is as before (P4). g becomes 0 if nobody has to be called at the end.
  template <observe::observer O>
  [[nodiscard]] bool try_call_start(const basic_invalidation<Key>& i, std::uint64_t& g, void*& memo, O& observer) {
    started s;
    pending_passes<Key> pending;  // its address is given away; s stays in registers
    const auto* const first = intervals();
    interval_count<O> calls;
    const bool intervals_refused =
        first != nullptr && !first->template calls<O>().start(first->set, i, pending, memo, calls.to());
    s.calls += calls.value;
    const node* refused = nullptr;
    if (!intervals_refused) {
      for_each_hearing(g, [&](node& n) {
        if (!try_start(n, i, pending, s)) refused = &n;
        return refused == nullptr;
      });
    }
    pending.finish_all(i);  // a refusal, too, finishes what has begun (O3)
    observer.note(observe::occurrence::callback, s.calls);
    if (!intervals_refused && refused == nullptr) {
      if (!needs_end(s)) g = 0;
      observer.note(observe::occurrence::bracket, 1);
      return true;
    }
    observer.note(observe::occurrence::refusal, 1);
    if (refused != nullptr) {
      interval_count<O> ends;
      if (memo != nullptr) first->template calls<O>().cancel(first->set, i, memo, ends.to());
      observer.note(observe::occurrence::callback, ends.value);
      call_end(i, g, nullptr, observer, refused);
    }
    return false;
  }

  /// Tells the clients of the range what its translation is now.
  template <observe::observer O>
  void change_entry(const basic_entry_change<Key>& e, O& observer) {
    interval_count<O> first_calls;
    if (const auto* const first = intervals(); first != nullptr) {
      const auto tell = first->template calls<O>().change_entry;
      if (tell != nullptr) tell(first->set, e, first_calls.to());
    }
    std::uint64_t calls = first_calls.value;
    const std::uint64_t g = version();
    for (node& n : list_) {
      if (n.operations_->change_entry == nullptr || !n.hears(g) || !n.wants(e.range)) continue;
      ++calls;
      n.operations_->change_entry(n.client_, e);
    }
    observer.note(observe::occurrence::callback, calls);
  }

  /// O4: takes no lock and waits for nobody.
  template <observe::observer O>
  [[gnu::always_inline]] void invalidate_secondary_tlbs(basic_range<Key> r, O& observer) {
    std::uint64_t calls = 0;
    if (const auto* const first = intervals(); first != nullptr) {
      interval_count<O> first_calls;
      first->template calls<O>().invalidate_secondary_tlbs(first->set, r, first_calls.to());
      calls = first_calls.value;
    }
    for_each_hearing(
        version(), [&](node & n) __attribute__((always_inline)) {
          if (n.invalidate_secondary_tlbs_ != nullptr) {
            ++calls;
            n.invalidate_secondary_tlbs_(n.client_, r);
          } else if (n.operations_->invalidate_secondary_tlbs != nullptr && n.wants(r)) {
            ++calls;
            n.operations_->invalidate_secondary_tlbs(n.client_, r);
          }
          return true;
        });
    observer.note(observe::occurrence::callback, calls);
  }

  /// Asks the young hook that `hook` selects; stops at the first yes if FirstYes, else asks everybody and ORs (O5).
  template <bool FirstYes, observe::observer O>
  bool ask_young(young_hook<Key> hook, basic_range<Key> r, O& observer) {
    const std::uint64_t g = version();
    bool young = false;
    interval_count<O> first_calls;
    if (const auto* const first = intervals(); first != nullptr)
      young = first->template calls<O>().ask_young(first->set, hook, r, FirstYes, first_calls.to());
    std::uint64_t calls = first_calls.value;
    for (node& n : list_) {
      if (FirstYes && young) break;
      const auto ask = n.operations_->*hook;
      if (ask == nullptr || !n.hears(g) || !n.wants(r)) continue;
      ++calls;
      young |= ask(n.client_, r);
    }
    observer.note(observe::occurrence::callback, calls);
    return young;
  }

  /// Marks the pages that a secondary MMU has accessed. Who cannot answer for a batch is asked for each page.
  template <observe::observer O>
  void ask_young_pages(basic_young_batch<Key>& batch, O& observer)
    requires paged_key<Key>
  {
    interval_count<O> first_calls;
    if (const auto* const first = intervals(); first != nullptr)
      first->template calls<O>().ask_young_pages(first->set, batch, first_calls.to());
    std::uint64_t calls = first_calls.value;
    const std::uint64_t g = version();
    for (node& n : list_) {
      if (!n.hears(g) || !n.wants(batch.range())) continue;
      if (n.operations_->young_pages != nullptr) {
        ++calls;
        n.operations_->young_pages(n.client_, batch);
        continue;
      }
      const auto ask = batch.clear() ? n.operations_->clear_young : n.operations_->test_young;
      if (ask == nullptr) continue;
      mark_page_by_page(batch, [&](basic_range<Key> page) {
        if (!n.wants(page)) return false;
        ++calls;
        return ask(n.client_, page);
      });
    }
    observer.note(observe::occurrence::callback, calls);
  }

  /// Returns: the shared node with this table and number, which has one user more now; null if there is none.
  node* find_shared(const operations<Key>& table, std::uint64_t number) noexcept {
    for (node& n : list_) {
      if (n.share(table, number)) return &n;
    }
    return nullptr;
  }

  /// Null: there are none, and never were.
  [[gnu::always_inline]] const interval_hooks<Key>* intervals() const noexcept {
    return intervals_.load(std::memory_order_acquire);  // (n12) pairs with (n11)
  }
  /// Effects: brackets that start from now on call the intervals, too. Once.
  void set_intervals(const interval_hooks<Key>* hooks) noexcept {
    intervals_.store(hooks, std::memory_order_release);  // (n11) pairs with (n12)
  }

 protected:
  /// What a start has done so far.
  struct started {
    std::uint64_t calls = 0;
    bool heard = false;     ///< somebody without a filter was called
    bool some_end = false;  ///< somebody else whom it concerns has an end hook
  };
  bool needs_end(const started& s) const noexcept {
    // Relaxed: who was called is linked until this bracket has ended, and counted.
    return s.some_end || (s.heard && enders_.load(std::memory_order_relaxed) != 0);
  }

  /// Returns: false if the client refused.
  static bool try_start(node& n, const basic_invalidation<Key>& i, pending_passes<Key>& pending, started& s) {
    if (n.start_ == nullptr) return start_carefully(n, i, pending, s);
    ++s.calls;
    s.heard = true;
    return n.operations_->try_start(n.client_, i);
  }
  /// Who has a filter, two passes, or no start at all. Returns: false if the client refused.
  [[gnu::always_inline]] static bool start_carefully(node& n, const basic_invalidation<Key>& i,
                                                     pending_passes<Key>& pending, started& s) {
    if (!n.wants(i)) return true;
    const auto& o = *n.operations_;
    s.some_end |= o.end != nullptr;
    if (o.try_start != nullptr) {
      ++s.calls;
      return o.try_start(n.client_, i);
    }
    if (o.begin == nullptr) return true;
    ++s.calls;
    const auto pass = o.begin(n.client_, i);
    if (pass.token() != nullptr) pending.add(*pass.token(), o.finish, n.client_);
    return !pass.is_refused();
  }

  /// Calls visit(node) for everybody who hears g, newest first, until it returns false.
  ///
  /// Mostly nobody comes or goes, and then nobody's stamps have to be looked at (R3): a node that hears nothing of g is
  /// one that came after g was read, or one that is leaving. Who comes makes the version odd before it is linked, and
  /// even when its stamps count; so if the version is g, and even, after the head was loaded, what hangs there came
  /// before. Who leaves is counted before its stamp counts, until it is unlinked.
  template <class Visit>
  [[gnu::always_inline]] void for_each_hearing(std::uint64_t g, Visit visit) {
    // (n14) pairs with (n15)
    const bool nobody_leaves = leaving_.load(std::memory_order_acquire) == 0 && !mutated(mutation::audience_by_flag);
    auto at = list_.begin();
    if (nobody_leaves && g % 2 == 0 && version_.load(std::memory_order_relaxed) == g) [[likely]] {
      for (; at != nullptr; ++at) {
        if (!visit(*at)) return;
      }
    } else {
      for (; at != nullptr; ++at) {
        if ((*at).hears(g) && !visit(*at)) return;
      }
    }
  }

  domain_type domain_;
  std::atomic<std::uint64_t> version_{2};
  std::atomic<std::uint64_t> enders_{0};   ///< linked nodes with an end hook
  std::atomic<std::uint64_t> leaving_{0};  ///< linked nodes that may not be heard of any more
  lockfree_hlist<node, domain_type> list_{domain_};

 private:
  std::atomic<const interval_hooks<Key>*> intervals_{nullptr};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
