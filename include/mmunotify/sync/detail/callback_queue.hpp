// SPDX-License-Identifier: MIT
#pragma once

// The callbacks of one domain: a stack that anybody pushes to, and a batch that waits for its grace period.
//
//   call() -> incoming_ --take all, oldest first--> batch_ --grace period--> run
//
// The first push on an empty stack tells whoever runs the callbacks (the worker, or the user's executor), so none is
// forgotten: the stack is emptied by one exchange. One thread at a time has to do with the batch: the worker, under its
// mutex, or whoever drains.
//
// Callbacks are counted before they are pushed, and again when they have run, in the same order. So a barrier reads the
// first count and waits for the second to reach it: whatever was pushed before has a place in the order that is not
// above the count. It puts nothing of its own into the queue, least of all something on a stack that a forked child
// does not have any more. The second count is the last that the worker touches of a domain, in one step with the look
// whether somebody waits: who sees it may destroy the domain.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/callback.hpp>
#include <mmunotify/sync/detail/grace_period_driver.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

namespace detail {

template <class Platform>
class callback_queue : public grace_period_driver<Platform> {
  using driver = grace_period_driver<Platform>;
  friend driver;

 protected:
  using typename driver::progress;

  constexpr callback_queue(runtime<Platform>& h, bool indirect) noexcept : driver(h, indirect) {}

  void configure(const srcu_options& o) noexcept {
    max_backlog_ = o.max_backlog;
    enough_ = rest<Platform>::too_many;
    if (max_backlog_ != 0) enough_ = std::min(enough_, (max_backlog_ + 1) / 2);
    schedule_ = o.schedule;
    context_ = o.context;
  }

  /// bound: of the backlog; 0: none.
  errc enqueue(srcu_head& head, srcu_callback function, std::size_t bound) noexcept {
    if (!this->check_slot("srcu_domain::call")) return errc::no_slot;
    if (function == nullptr || head.function != nullptr) [[unlikely]] {
      violated("L6", "srcu_domain::call", function == nullptr ? "the callback is null" : "the head is already queued");
      return errc::already_registered;
    }
    const std::size_t count = count_one(bound == 0 || bound > max_count ? max_count : bound);
    if (schedule_ == nullptr && (count == 0 || count >= enough_)) [[unlikely]]
      this->runtime_->work.rests().enough();
    if (count == 0) return errc::again;
    if (!used_.load(std::memory_order_relaxed)) used_.store(true, std::memory_order_relaxed);
    // (q1) acq_rel pairs with (q2): what the caller did before happens before the callback; and with itself, also
    // through (q2): who pushes later has counted later, as far as a barrier after it can tell.
    constexpr auto pushed =
        mutated(mutation::push_release_only) ? std::memory_order_release : std::memory_order_acq_rel;  // (q1)
    head.function = function;
    srcu_head* newest = incoming_.load(std::memory_order_relaxed);
    do {
      head.next = newest;
    } while (!incoming_.compare_exchange_weak(newest, &head, pushed, std::memory_order_relaxed));
    if (newest == nullptr) {  // otherwise whoever queued the first one has said so
      if (schedule_ != nullptr) {
        schedule_(context_);
      } else {
        this->runtime_->work.post(*static_cast<domain_core<Platform>*>(this));
      }
    }
    return errc::ok;
  }

  // --- The counts. They wrap; what is queued at a time is bounded, so that differences mean something. --------------

  /// Returns: how many are queued or run now, with this one; 0: there are `bound` without it.
  std::size_t count_one(std::size_t bound) noexcept {
    while (true) {
      const std::uint32_t before = ran();  // first: the difference must not be negative
      std::uint32_t counted = queued_.load(std::memory_order_relaxed);
      const std::size_t count = (counted - before) / one;
      if (count >= bound) return 0;
      if (queued_.compare_exchange_weak(counted, counted + one, std::memory_order_relaxed)) return count + 1;
    }
  }
  // (q5) acquire pairs with (q4): what the callbacks did.
  std::uint32_t ran() const noexcept { return ran_.load(std::memory_order_acquire) & ~somebody_waits; }

  /// Returns: how many callbacks are queued or run just now.
  std::size_t outstanding() const noexcept {
    const std::uint32_t before = ran();  // first, as above
    return (queued_.load(std::memory_order_relaxed) - before) / one;
  }

  /// Returns: true if all that the first count says have run.
  bool has_run(std::uint32_t counted) const noexcept { return static_cast<std::int32_t>(ran() - counted) >= 0; }

  /// Sleeps until something has run, or whoever was at work has stopped, if somebody_works() says that there is one.
  template <class SomebodyWorks>
  void wait_until_run(std::uint32_t counted, SomebodyWorks somebody_works) noexcept {
    // Dekker: says that it waits, then looks for somebody at work; who stops says so, then looks for who waits.
    const std::uint32_t seen = ran_.fetch_or(somebody_waits, std::memory_order_seq_cst) | somebody_waits;  // (q7) (q8)
    if (!has_run(counted) && somebody_works()) Platform::wait(ran_, seen);
  }
  void nobody_works() noexcept {
    const std::uint32_t was = ran_.fetch_and(~somebody_waits, std::memory_order_seq_cst);  // (q8) pairs with (q7)
    if ((was & somebody_waits) != 0) Platform::wake(ran_);
  }

  /// A section or a grace period has ended. Context: anywhere.
  void look_again() noexcept {
    if (schedule_ != nullptr) {
      schedule_(context_);
    } else {
      this->runtime_->work.kick();
    }
  }

  bool has_incoming() const noexcept { return incoming_.load(std::memory_order_relaxed) != nullptr; }

  // --- The batch that waits for its grace period: for the worker under its mutex, or for who drains. ----------------

  /// Takes what is queued, oldest first, and begins its grace period. taken: grows by how many. Returns: true if that
  /// one lacks its fence.
  bool begin_batch(std::size_t& taken) noexcept {
    if (batch_ == nullptr) taken += take_incoming();
    unfenced_ = batch_ != nullptr ? this->begin_unfenced(target_) : 0;
    return unfenced_ != 0;
  }
  void batch_fenced() noexcept { this->fenced(unfenced_); }

  progress advance_batch() noexcept {
    if (batch_ == nullptr || mutated(mutation::early_callbacks)) return progress::over;
    return this->advance(target_);
  }

  /// Returns: true if there was no mark: the caller owes a fence and another look.
  bool await_leavers() noexcept { return this->mark_for_leavers(); }

  srcu_head* take_batch() noexcept { return std::exchange(batch_, nullptr); }

  /// The domain may be gone when it returns, if nobody drains it.
  void run(srcu_head& head) noexcept {
    std::exchange(head.function, nullptr)(&head);
    std::uint32_t before = ran_.load(std::memory_order_relaxed);
    // (q4) release pairs with (q5).
    while (!ran_.compare_exchange_weak(before, (before & ~somebody_waits) + one, std::memory_order_release,
                                       std::memory_order_relaxed)) {
    }
    if ((before & somebody_waits) != 0) Platform::wake(ran_);  // by address only
  }

  /// Returns: false if a section holds callbacks back, and a mark for it has been left.
  bool drain_batches(std::size_t& ran) noexcept {
    while (true) {
      std::size_t taken = 0;
      begin_batch(taken);
      if (batch_ == nullptr) return true;
      if (advance_batch() != progress::over) {
        await_leavers();
        this->runtime_->fence();
        progress p = advance_batch();
        while (p == progress::busy) {
          Platform::yield();
          p = advance_batch();
        }
        if (p != progress::over) return false;
      }
      ran += run_batch();
    }
  }

  std::size_t run_batch() noexcept {
    std::size_t n = 0;
    while (srcu_head* const h = batch_) {
      batch_ = h->next;
      run(*h);
      ++n;
    }
    return n;
  }

  /// Takes what is queued, oldest first, behind the batch. Returns: how many.
  std::size_t take_incoming() noexcept {
    srcu_head* list = incoming_.exchange(nullptr, std::memory_order_acquire);  // (q2) pairs with (q1)
    srcu_head* oldest_first = nullptr;
    std::size_t taken = 0;
    for (; list != nullptr; ++taken) oldest_first = std::exchange(list, std::exchange(list->next, oldest_first));
    srcu_head** end = &batch_;
    while (*end != nullptr) end = &(*end)->next;
    *end = oldest_first;
    target_ = this->next_grace_period();
    return taken;
  }

  bool drains_here() const noexcept { return drainer_.load(std::memory_order_relaxed) == Platform::self(); }

  /// In a forked child. What other threads were about to push or to run is lost; `taken`: what the worker has taken.
  /// Everything else is one batch now, so that the next call() finds nobody before it and sees to it that it is run;
  /// unless this thread drains, and goes on to do so.
  void reset_queue_after_fork(const srcu_head* taken, bool in_callback) noexcept {
    if (drains_here()) {
      in_callback = true;
    } else {
      take_incoming();
      drainer_.store(0, std::memory_order_relaxed);
      draining_.store(false, std::memory_order_relaxed);
    }
    std::uint32_t left = in_callback ? one : 0;
    for (const srcu_head* list : {taken, static_cast<const srcu_head*>(batch_),
                                  static_cast<const srcu_head*>(incoming_.load(std::memory_order_relaxed))}) {
      for (; list != nullptr; list = list->next) left += one;
    }
    ran_.store(0, std::memory_order_relaxed);
    queued_.store(left, std::memory_order_relaxed);
  }

  // The counts go in steps of two: bit 0 of the second says that somebody waits.
  static constexpr std::uint32_t one = 2;
  static constexpr std::uint32_t somebody_waits = 1;
  static constexpr std::size_t max_count = std::size_t{1} << 29;

  alignas(64) std::atomic<srcu_head*> incoming_{nullptr};
  std::atomic<std::uint32_t> queued_{0};  ///< the first count
  std::atomic<std::uint32_t> ran_{0};     ///< the second, and whether somebody waits
  std::size_t max_backlog_ = 0;
  std::size_t enough_ = 0;         ///< callbacks for which the worker does not rest any longer
  std::atomic<bool> used_{false};  ///< there has been a callback
  std::atomic<bool> draining_{false};
  std::atomic<std::uintptr_t> drainer_{0};
  void (*schedule_)(void*) noexcept = nullptr;
  void* context_ = nullptr;

  srcu_head* batch_ = nullptr;
  std::uint64_t target_ = 0;    ///< the grace period that the batch waits for
  std::uint64_t unfenced_ = 0;  ///< the one that the worker is about to fence
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
