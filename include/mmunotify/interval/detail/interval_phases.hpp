// SPDX-License-Identifier: MIT
#pragma once

// Whose turn it is with an interval: its phases (interval_notifier.hpp has the picture), and who may take it from one
// to the next. One compare-exchange each; what it finds decides.
//
// Orderings: (in1), (in2) of interval_notifier.hpp.

#include <atomic>
#include <cstdint>
#include <thread>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/interval_context.hpp>
#include <mmunotify/interval/interval_notifier.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// The phases of the intervals of one set, which its context stands for.
template <address_key Key>
class interval_phases {
 protected:
  using interval = basic_interval<Key>;
  using phase = typename interval::phase;

  explicit interval_phases(srcu_domain& domain) noexcept : context_(domain) {}
  ~interval_phases() = default;

  static bool move(interval& n, phase from, phase to) noexcept {
    std::uint8_t expected = from;
    // (in2) acquire pairs with (in1)
    return n.phase_.compare_exchange_strong(expected, to, std::memory_order_acquire, std::memory_order_relaxed);
  }
  static void settle(interval& n, phase p) noexcept {
    if (p == phase::idle) forget(n);
    n.phase_.store(p, std::memory_order_release);  // (in1) pairs with (in2)
  }

  /// Returns: true if n is registered here, and ours to remove. A resize in the way is waited for: it takes no time.
  bool claim_removal(interval& n) noexcept {
    while (true) {
      std::uint8_t found = phase::live;
      const errc e = try_claim(n, phase::leaving, found);
      if (e != errc::again) return e == errc::ok;
      std::this_thread::yield();
    }
  }
  /// The same for a removal that waits for no bracket. Returns: ok, and it is ours to begin, if `ours`; else whoever
  /// inserts n begins it. not_registered.
  errc claim_removal(interval& n, void (*done)(interval&) noexcept, bool& ours) noexcept {
    while (true) {
      std::uint8_t found = phase::live;
      errc e = try_claim(n, phase::leaving, found);
      ours = e == errc::ok;
      if (ours) n.done_ = done;
      if (found == phase::joining) e = recall(n, done);
      if (e != errc::again) return e;
      std::this_thread::yield();
    }
  }
  errc claim(interval& n, phase to) noexcept {
    std::uint8_t found = phase::live;
    return try_claim(n, to, found);
  }

  /// Returns: false if n was recalled: then it is leaving now, and its removal is ours to begin.
  static bool end_joining(interval& n, phase to) noexcept {
    if constexpr (mutated(mutation::interval_recall_lost)) return settle(n, to), true;
    while (true) {
      std::uint8_t found = phase::joining;
      // (in1) release pairs with (in2), and acquire with (in1) of who has recalled it.
      if (n.phase_.compare_exchange_strong(found, to, std::memory_order_release, std::memory_order_acquire))
        return true;
      if (found == phase::recalled) break;
      std::this_thread::yield();  // it is being recalled: two stores
    }
    n.phase_.store(phase::leaving, std::memory_order_relaxed);
    return false;
  }
  /// Nothing has come of the insertion; nobody has found n here, so nobody has recalled it.
  static void give_up(interval& n) noexcept {
    forget(n);
    static_cast<void>(end_joining(n, phase::idle));
  }

  interval_context context_;

 private:
  /// Errors: not_registered, again if another changes it. found: the phase that it is in, if that is not live.
  /// Who is late, and comes to an interval that has moved to another set, is not taken for a removal there: until it is
  /// certain it is `changing`, or `recalling`, and the others look again.
  errc try_claim(interval& n, phase to, std::uint8_t& found) noexcept {
    if (!is_here(n)) return errc::not_registered;
    constexpr bool unseen = mutated(mutation::interval_claim_unseen);
    // (in2) acquire pairs with (in1). What it found decides, and not a second look: it may be live again by then.
    if (!n.phase_.compare_exchange_strong(found, unseen ? to : phase::changing, std::memory_order_acquire,
                                          std::memory_order_acquire)) {
      return found == phase::changing || (found == phase::recalling && !unseen) ? errc::again : errc::not_registered;
    }
    const bool here = is_here(n);
    if (!here || to != phase::changing) n.phase_.store(here ? to : phase::live, std::memory_order_release);  // (in1)
    return here ? errc::ok : errc::not_registered;
  }
  /// A removal that finds n joining. Returns: ok, and its insertion will begin it; again if that has ended just now.
  errc recall(interval& n, void (*done)(interval&) noexcept) noexcept {
    if (!move(n, phase::joining, phase::recalling)) return errc::again;
    const bool here = is_here(n);
    if (here) n.done_ = done;
    n.phase_.store(here ? phase::recalled : phase::joining, std::memory_order_release);  // (in1) pairs with (in2)
    return here ? errc::ok : errc::not_registered;
  }
  bool is_here(const interval& n) const noexcept {
    return n.context_.load(std::memory_order_acquire) == &context_;  // (in2) pairs with (in1)
  }
  static void forget(interval& n) noexcept {
    n.context_.store(nullptr, std::memory_order_relaxed);
    n.set_.store(nullptr, std::memory_order_relaxed);  // it may go before the next insertion says another
  }
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
