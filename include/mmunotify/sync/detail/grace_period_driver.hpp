// SPDX-License-Identifier: MIT
#pragma once

// The grace periods of one domain: the sequence, who drives it, and how it waits. The protocol, its orderings (d1..d8)
// and why it is right are told in srcu_domain.hpp.
//
// One grace period runs at a time. Whoever holds the driver's mutex may begin the next one when none is running (add
// one to the sequence, then a heavy fence), look whether the sections that it waits for are over, and end it. So a
// blocking synchronize, a poll that never waits and the worker drive the same grace periods, and serve each other's
// requests.

#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/runtime.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <class Platform>
class grace_period_driver {
 protected:
  using word = std::atomic<std::uint64_t>;
  using home = runtime<Platform>;

 public:
  /// Returns: how many grace periods have begun; for statistics. May be stale on arrival.
  std::uint64_t grace_periods() const noexcept { return sequence_.load(std::memory_order_relaxed) - first_sequence; }

 protected:
  static constexpr std::uint64_t first_sequence = 1;

  // waiter_: why a leaver must take the cold path.
  static constexpr std::uint32_t always = 1;    ///< there are no heavy fences
  static constexpr std::uint32_t sleeper = 2;   ///< a grace period sleeps
  static constexpr std::uint32_t deferred = 4;  ///< callbacks wait for leavers

  constexpr explicit grace_period_driver(home& h, bool indirect) noexcept : runtime_(&h), indirect_(indirect) {}

  bool check_slot(const char* function) const noexcept {
    if (this->slot_ != 0) [[likely]]
      return true;
    violated("S1", function, "the domain has no slot; see status()");
    return false;
  }

  // --- Requests. --------------------------------------------------------------------------------------------------

  /// Returns: the grace period that a caller needs: the first that begins from now on.
  std::uint64_t next_grace_period() const noexcept {
    // (d8) acq_rel pairs with itself: what the caller did before happens before the step to the next one, and so before
    // sections read S + 1, and before its heavy fence.
    return begun_.fetch_add(0, order(std::memory_order_acq_rel, mutation::request_relaxed)) +
           (mutated(mutation::early_cookie) ? 0 : 1);
  }

  /// Blocks until the grace period has ended.
  void wait_for_grace_period(std::uint64_t target, int spins) noexcept {
    {
      const std::lock_guard lock(driver_);
      while (completed_.load(std::memory_order_relaxed) < target) {
        const std::uint64_t now = begin_if_idle();
        fence_once(now);
        wait_for_sections(now, spins);
        completed_.store(now, std::memory_order_release);  // (d6) pairs with (d7)
      }
    }
    tell_deferred();
  }

  enum class progress : std::uint8_t {
    over,  ///< the grace period has ended
    open,  ///< a section is open
    busy,  ///< somebody else drives just now, and does not sleep
  };

  /// Never waits: at most a heavy fence for each grace period that it begins, and a scan.
  progress advance(std::uint64_t target) noexcept {
    if (has_ended(target)) return progress::over;
    if (!driver_.try_lock()) {
      if (has_ended(target)) return progress::over;
      return (waiter_.load(std::memory_order_relaxed) & sleeper) != 0 ? progress::open : progress::busy;
    }
    const std::lock_guard lock(driver_, std::adopt_lock);
    while (completed_.load(std::memory_order_relaxed) < target) {
      const std::uint64_t now = begin_if_idle();
      fence_once(now);
      if (!sections_over(now)) return progress::open;
      completed_.store(now, std::memory_order_release);  // (d6)
    }
    return progress::over;
  }

  bool has_ended(std::uint64_t target) const noexcept {
    return completed_.load(std::memory_order_acquire) >= target;  // (d7) pairs with (d6)
  }

  // A fence for many: begin in each domain, fence once, say so in each.

  /// Returns: the grace period that now runs and has not been fenced yet; 0 if there is nothing to fence, or somebody
  /// else drives.
  std::uint64_t begin_unfenced(std::uint64_t target) noexcept {
    if (has_ended(target) || !driver_.try_lock()) return 0;
    const std::lock_guard lock(driver_, std::adopt_lock);
    const std::uint64_t now = begin_if_idle();
    return fenced_ < now ? now : 0;
  }
  void fenced(std::uint64_t begun) noexcept {
    if (begun == 0 || !driver_.try_lock()) return;  // who drives fences for itself
    const std::lock_guard lock(driver_, std::adopt_lock);
    if (fenced_ < begun) fenced_ = begun;
  }

  // --- Hand-off sections: counters that all threads share, two of them, used in turn. ------------------------------

  std::uint32_t enter_bank() noexcept {
    while (true) {
      const std::uint64_t s = sequence_.load(std::memory_order_acquire);  // (d2) pairs with (d1)
      const std::uint32_t bank = s & 1;
      // Dekker: count, then look at S again; a grace period adds to S, fences, then looks at the count. So a section
      // that grace period S + 1 does not see finds S + 1, and counts in the other bank.
      banks_[bank].fetch_add(1, std::memory_order_seq_cst);  // (b1) pairs with (b2)
      if (mutated(mutation::no_handoff_recheck) || sequence_.load(std::memory_order_seq_cst) == s) {  // (b1)
        reader_fence();
        return bank;
      }
      leave_bank(bank);
    }
  }

  bool banks_empty() const noexcept {
    return banks_[0].load(std::memory_order_relaxed) + banks_[1].load(std::memory_order_relaxed) == 0;
  }

  void leave_bank(std::uint32_t bank) noexcept {
    banks_[bank].fetch_sub(1, std::memory_order_release);  // (d4) pairs with (d3)
    after_leaving();
  }

  // --- For readers. -----------------------------------------------------------------------------------------------

  /// After a section has ended, looks for somebody who waits for that.
  [[gnu::always_inline]] void after_leaving() noexcept {
    if constexpr (!mutated(mutation::no_leaver_fence)) Platform::light();  // (w1) pairs with (w2)
    if (waiter_.load(std::memory_order_relaxed) != 0) [[unlikely]]
      leave_cold();
  }

  MMUNOTIFY_COLD void leave_cold() noexcept {
    // Stands for the light fence where heavy ones do not exist; otherwise it orders nothing that is not ordered.
    if constexpr (!mutated(mutation::no_leaver_fence)) Platform::full();  // (w1)
    constexpr std::uint32_t someone = sleeper | deferred;
    if ((waiter_.load(std::memory_order_relaxed) & someone) == 0) return;
    // The change of value, not the wake alone, is what a sleeper between its scan and its futex call cannot miss.
    const std::uint32_t was = waiter_.fetch_and(~someone, std::memory_order_relaxed);
    if ((was & sleeper) != 0) Platform::wake(waiter_);
    if ((was & deferred) != 0) leavers_gone();
  }

  /// A reader's own fence where it cannot rely on heavy ones.
  void reader_fence() const noexcept {
    if (runtime_->asymmetric()) {
      Platform::light();
    } else {
      Platform::full();
    }
  }

  /// After a mark for leavers and a fence, a section that was seen open finds the mark when it ends.
  /// Returns: false if the mark was there.
  bool mark_for_leavers() noexcept { return (waiter_.fetch_or(deferred, std::memory_order_relaxed) & deferred) == 0; }
  bool marked_for_leavers() const noexcept { return (waiter_.load(std::memory_order_relaxed) & deferred) != 0; }

  /// A grace period has ended: callbacks may be due that found the driver busy.
  void tell_deferred() noexcept {
    Platform::full();  // (w3) the driver's unlock, then the look at the mark; await_leavers marks, then tries the lock
    if ((waiter_.load(std::memory_order_relaxed) & deferred) == 0) [[likely]]
      return;
    if ((waiter_.fetch_and(~deferred, std::memory_order_relaxed) & deferred) != 0) leavers_gone();
  }

  // --- fork. --------------------------------------------------------------------------------------------------------

  /// In a forked child, where the other threads' sections are gone.
  void reset_after_fork() noexcept {
    new (&driver_) typename Platform::mutex;
    begun_.store(sequence_.load(std::memory_order_relaxed), std::memory_order_relaxed);  // one store may be missing
    for (word& b : banks_) b.store(0, std::memory_order_relaxed);
    if (indirect_) {  // who looked at the words is gone
      runtime_->for_each_record([&](auto& r) {
        r.at(slot_).count.store(0, std::memory_order_relaxed);
        return true;
      });
    }
    waiter_.store(runtime_->asymmetric() ? 0 : always, std::memory_order_relaxed);
  }

  // Read by every section, written once in a grace period.
  alignas(64) std::uintptr_t place_ = 0;  ///< the runtime's key + the offset of the domain's slot in every slab
  std::atomic<std::uint32_t> waiter_{0};
  word sequence_{first_sequence};
  home* runtime_;
  std::uint32_t slot_ = 0;  ///< 0: none
  bool indirect_;           ///< the words are thread_local ones, and the slots hold their addresses
  bool isolated_ = false;

  alignas(64) word banks_[2] = {};

  // Grace periods only.
  alignas(64) typename Platform::mutex driver_;
  mutable word begun_{first_sequence};     ///< the sequence, for requests: sections do not read this one
  word completed_{first_sequence};         ///< the last grace period that has ended
  std::uint64_t fenced_ = first_sequence;  ///< under driver_: the last grace period whose fence is done

 private:
  /// Tells the domain's owner of callbacks that a section or a grace period has ended; defined by domain_core.
  void leavers_gone() noexcept { static_cast<domain_core<Platform>*>(this)->look_again(); }

  /// Returns: the grace period that now runs. Precondition: driver_ is held, as for the next three.
  std::uint64_t begin_if_idle() noexcept {
    std::uint64_t now = sequence_.load(std::memory_order_relaxed);
    if (completed_.load(std::memory_order_relaxed) == now) {
      now = begun_.fetch_add(1, std::memory_order_acq_rel) + 1;                            // (d8)
      sequence_.store(now, order(std::memory_order_release, mutation::sequence_relaxed));  // (d1) pairs with (d2)
    }
    return now;
  }

  void fence_once(std::uint64_t now) noexcept {
    if (fenced_ >= now) return;
    runtime_->fence();
    fenced_ = now;
  }

  /// True if no section that began before `now` is open.
  bool sections_over(std::uint64_t now) const noexcept {
    return for_each_word([&](const word& w) { return passed(w, now); }) && bank_empty(now);
  }

  void wait_for_sections(std::uint64_t now, int spins) noexcept {
    for_each_word([&](const word& w) {
      wait_until([&] { return passed(w, now); }, spins);
      return true;
    });
    wait_until([&] { return bank_empty(now); }, spins);
  }

  static bool passed(const word& w, std::uint64_t now) noexcept {
    // (d3) pairs with (d4), (d5) and with (r5).
    const std::uint64_t seen = w.load(order(std::memory_order_acquire, mutation::scan_relaxed));
    return seen == 0 || seen >= now;
  }

  /// The sections of the grace period before; those of `now` itself are in the other bank.
  bool bank_empty(std::uint64_t now) const noexcept {
    if constexpr (mutated(mutation::no_handoff_scan)) return true;
    // (b2) pairs with (b1); (d3) pairs with (d4).
    return banks_[(now - 1) & 1].load(order(std::memory_order_acquire, mutation::handoff_scan_relaxed)) == 0;
  }

  /// Calls f(word) for the word of every thread, until it returns false.
  template <class F>
  bool for_each_word(F f) const noexcept {
    return runtime_->for_each_record([&](const auto& record) {
      section_slot& s = record.at(slot_);
      if (!indirect_) return f(s.word);
      // The thread may exit, and its thread_local word with it: a pin keeps it.
      s.count.fetch_add(1, std::memory_order_seq_cst);                                     // (p2) pairs with (p1)
      const auto* const w = static_slot::word_at(s.word.load(std::memory_order_seq_cst));  // (p2)
      const bool go_on = w == nullptr || f(*w);
      s.count.fetch_sub(1, std::memory_order_release);  // (p4) pairs with (p3)
      return go_on;
    });
  }

  template <class Condition>
  void wait_until(Condition over, int spins) noexcept {
    for (int i = 0; i < spins; ++i) {
      if (over()) return;
      Platform::relax();
    }
    while (true) {
      const std::uint32_t seen = waiter_.fetch_or(sleeper, std::memory_order_relaxed) | sleeper;
      // (w2) pairs with (w1): the mark, then one more look; a leaver ends its section, then looks for the mark.
      if constexpr (!mutated(mutation::no_sleeper_fence)) runtime_->fence();
      if (over()) break;
      Platform::wait(waiter_, seen);
      if (over()) break;
    }
    waiter_.fetch_and(~sleeper, std::memory_order_relaxed);
  }
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
