// SPDX-License-Identifier: MIT
#pragma once

// What a dynamic and a static domain have in common: everything but how a thread finds its word.

#include <algorithm>
#include <array>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <utility>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/grace_period_driver.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// How a domain is made.
struct srcu_options {
  /// The domain's words have a cache line of their own in every thread: for one that is polled or synchronized in a
  /// loop, beside others whose sections must not notice. Costs 64 bytes per thread instead of 16.
  bool isolated = false;
  /// call() answers errc::again while this many callbacks are queued. 0: no bound.
  std::size_t max_backlog = 0;
  /// Who runs the callbacks. Null: the process's worker thread. Otherwise it is asked to see to it that drain() is
  /// called soon, by anybody and outside the domain's sections. It is called in call() and at the end of sections, from
  /// any thread: it must not block, drain, or make and destroy domains.
  void (*schedule)(void* context) noexcept = nullptr;
  void* context = nullptr;
};

namespace detail {

template <class Platform>
class domain_core : public grace_period_driver<Platform> {
  using base = grace_period_driver<Platform>;
  using typename base::home;
  using typename base::progress;

 public:
  using platform = Platform;
  /// A grace period that has not ended when it was named.
  class cookie {
    friend domain_core;
    std::uint64_t target_ = 0;
  };
  /// An open hand-off section.
  class handoff_token {
    friend domain_core;
    std::uint32_t bank_ = 0;
  };

  domain_core(const domain_core&) = delete;
  domain_core& operator=(const domain_core&) = delete;

  /// Returns: ok; no_slot if the process's slots (65 535; isolated ones count four times) or its pthread keys are
  /// exhausted. Sections of such a domain are harmless and protect nothing; to wait for it is a contract failure.
  errc status() const noexcept { return this->slot_ != 0 ? errc::ok : errc::no_slot; }

  /// Effects: does what the thread's first section would do. Returns: ok, or no_memory.
  errc attach_this_thread() noexcept { return this->runtime_->attach() != nullptr ? errc::ok : errc::no_memory; }

  /// Returns: true inside a section of this domain that this thread began (in a callback or an open bracket, for an
  /// address space). Hand-off sections belong to no thread and do not count.
  bool held_by_this_thread() const noexcept {
    const auto view = home::view();
    std::byte* slab = view.slab;
    if (view.attached_to != this->runtime_) [[unlikely]] {
      const auto* const r = this->slot_ != 0 ? this->runtime_->current() : nullptr;
      if (r == nullptr) return false;
      slab = r->slab();
    }
    const std::uint64_t w = thread_record<Platform>::slot_at(slab, this->offset_).word.load(std::memory_order_relaxed);
    if (w == 0 || !this->indirect_) return w != 0;
    return static_slot::is_inside(*static_slot::word_at(w));
  }

  // --- Waiting. -----------------------------------------------------------------------------------------------------

  /// Effects: returns when every section that began before the call has ended. Sections that begin later are not waited
  /// for (S5). Precondition: not inside a section of this domain (L7, always checked: it would wait for itself).
  /// Progress: blocking, bounded by the longest section. Concurrent calls share grace periods and heavy fences.
  void synchronize() noexcept { synchronize("srcu_domain::synchronize", base::patient_spins); }

  /// The same, and spins for about 100 us before it sleeps: for who cares about the latency and not about the
  /// processor.
  void synchronize_expedited() noexcept { synchronize("srcu_domain::synchronize_expedited", base::expedited_spins); }

  /// Effects: synchronize() on each, with one heavy fence for all whose grace periods begin here (32 at a time).
  /// Precondition: inside a section of none of them (L7, checked before anything is done).
  template <std::derived_from<domain_core> Domain>
  static void synchronize_all(std::span<Domain* const> domains) noexcept {
    for (Domain* d : domains) {
      if (!d->may_wait("srcu_domain::synchronize_all")) return;
    }
    constexpr std::size_t at_once = 32;
    for (; !domains.empty(); domains = domains.subspan(std::min(domains.size(), at_once))) {
      std::array<std::uint64_t, at_once> target{};
      std::array<std::uint64_t, at_once> begun{};
      bool any = false;
      const auto some = domains.first(std::min(domains.size(), at_once));
      for (std::size_t i = 0; i < some.size(); ++i) {
        target[i] = some[i]->next_grace_period();
        begun[i] = some[i]->begin_unfenced(target[i]);
        any |= begun[i] != 0;
      }
      if (any) some[0]->runtime_->fence();
      for (std::size_t i = 0; i < some.size(); ++i) {
        some[i]->fenced(begun[i]);
        some[i]->wait_for_grace_period(target[i], base::patient_spins);
      }
    }
  }

  /// Returns: a name for the grace period that a synchronize() now would wait for. Progress: wait-free, one full fence.
  /// Context: anywhere, also inside sections.
  cookie start_poll() const noexcept {
    cookie c;
    c.target_ = this->next_grace_period();
    return c;
  }

  /// Returns: true if every section that began before the cookie was made has ended (S3). Drives the grace period:
  /// the first call makes the heavy fence, each one scans. Progress: never waits; who holds the same cookie or a later
  /// one, and calls often enough, gets true some time after the last section has ended. Context: anywhere but signal
  /// handlers, also inside sections.
  bool poll(cookie c) noexcept {
    if (!check_slot("srcu_domain::poll")) return false;
    const bool before = this->has_ended(c.target_);
    const bool over = before || this->advance(c.target_) == progress::over;
    if (over && !before) this->tell_deferred();
    return over;
  }

  // --- Hand-off. ----------------------------------------------------------------------------------------------------

  /// Effects: begins a section that any thread may end (S6): it goes with its token. Cost: two locked instructions on a
  /// line that all share. A forked child inherits it open. Progress: lock-free (a grace period that begins makes it
  /// retry). Context: anywhere.
  [[nodiscard]] handoff_token down_read() noexcept {
    handoff_token t;
    t.bank_ = this->enter_bank();
    return t;
  }
  /// Effects: ends the section, once.
  void up_read(handoff_token t) noexcept { this->leave_bank(t.bank_); }

  // --- Deferred callbacks. ------------------------------------------------------------------------------------------

  /// Effects: runs function(&head) once, after a grace period, in the worker or in drain(); callbacks of one domain run
  /// in the order in which they were queued. Preconditions: the head is not queued (L6, checked); it stays until then,
  /// and may be gone when the function returns. Returns: ok; again if max_backlog are queued, no_slot: nothing has
  /// happened then. Progress: lock-free; the first one in the process starts the worker. Context: anywhere but signal
  /// handlers, also in sections and callbacks. A callback may sleep, call and synchronize; while it runs, no other
  /// callback of the worker does.
  errc call(srcu_head& head, srcu_callback function) noexcept {
    const std::size_t queued = backlog_.fetch_add(1, std::memory_order_relaxed);
    const errc e = max_backlog_ != 0 && queued >= max_backlog_ ? errc::again : enqueue_checked(head, function);
    if (e != errc::ok) [[unlikely]]
      backlog_.fetch_sub(1, std::memory_order_relaxed);
    return e;
  }
  /// The same whatever the backlog is: for what cannot be taken back any more.
  errc call_unbounded(srcu_head& head, srcu_callback function) noexcept {
    backlog_.fetch_add(1, std::memory_order_relaxed);
    const errc e = enqueue_checked(head, function);
    if (e != errc::ok) [[unlikely]]
      backlog_.fetch_sub(1, std::memory_order_relaxed);
    return e;
  }

  /// Returns: how many callbacks are queued and have not begun to run. May be stale on arrival.
  std::size_t backlog() const noexcept { return backlog_.load(std::memory_order_relaxed); }

  /// Effects: returns when every callback that was queued before the call has run (S4, L8). With an executor of the
  /// user's, the caller drains. Precondition: not inside a section of this domain, nor in a callback (L7, checked).
  /// Progress: blocking.
  void barrier() noexcept {
    if (!check_slot("srcu_domain::barrier")) return;
    if (held_by_this_thread() || runs_callbacks_here()) [[unlikely]] {
      return violated("L7", "srcu_domain::barrier",
                      "called inside a callback or a read section of the domain (slot %u): it would wait for itself",
                      this->slot_);
    }
    if constexpr (mutated(mutation::early_barrier)) return synchronize();
    sentinel s;
    static_cast<void>(call_unbounded(s, [](srcu_head* h) noexcept {
      auto& done = static_cast<sentinel*>(h)->done;
      done.store(1, std::memory_order_release);  // (q4) pairs with (q5)
      Platform::wake(done);                      // by address only: the sentinel may be gone
    }));
    if (schedule_ == nullptr && !this->runtime_->work.start()) return this->runtime_->work.run_here(s.done);
    while (s.done.load(std::memory_order_acquire) == 0) {  // (q5)
      if (schedule_ == nullptr) {
        Platform::wait(s.done, 0);
      } else {
        synchronize();
        if (drain() == 0) Platform::yield();
      }
    }
  }

  /// Effects: runs the callbacks that are due; for a domain with an executor. Returns: how many. When a section holds
  /// callbacks back, the executor is asked again when it ends. Precondition: not inside a section of this domain (L7,
  /// checked). Progress: never waits for readers; returns 0 at once if another thread drains.
  std::size_t drain() noexcept {
    if (schedule_ == nullptr || held_by_this_thread()) [[unlikely]] {
      violated("L7", "srcu_domain::drain",
               schedule_ == nullptr ? "the domain has no executor: the worker runs its callbacks"
                                    : "called inside a read section of the domain");
      return 0;
    }
    std::size_t ran = 0;
    // (q6) acq_rel pairs with itself: who finds somebody draining has queued its callback before that one looks again.
    while (!draining_.exchange(true, std::memory_order_acq_rel)) {
      drainer_.store(Platform::self(), std::memory_order_relaxed);
      const bool stuck = !drain_batches(ran);
      drainer_.store(0, std::memory_order_relaxed);
      draining_.exchange(false, std::memory_order_acq_rel);  // (q6)
      if (stuck || !has_incoming()) break;
    }
    return ran;
  }

 protected:
  constexpr domain_core(home& h, bool indirect) noexcept : base(h, indirect) {}

  /// Takes a slot. Returns: false if there is none.
  bool open(const srcu_options& o) noexcept {
    if (!this->runtime_->prepare()) return false;
    this->isolated_ = o.isolated;
    max_backlog_ = o.max_backlog;
    schedule_ = o.schedule;
    context_ = o.context;
    this->waiter_.store(this->runtime_->asymmetric() ? 0 : base::always, std::memory_order_relaxed);
    this->slot_ = this->runtime_->enlist(*this, o.isolated);
    this->offset_ = this->slot_ * static_cast<std::uint32_t>(sizeof(section_slot));
    return this->slot_ != 0;
  }

  /// Runs the callbacks that are queued, and gives the slot back. Returns: false if a section is open: then the slot is
  /// lost, since its next owner would take the section for one of its own.
  bool close() noexcept {
    if (this->slot_ == 0) return true;
    if (used_.load(std::memory_order_relaxed)) {
      if (backlog() == 0 && schedule_ == nullptr && this->runtime_->work.runs_here()) {
        this->runtime_->work.forget(*this);  // in another domain's callback
      } else {
        barrier();
      }
      if (backlog() != 0) std::abort();  // barrier() was refused, and said why
    }
    const bool clear = this->runtime_->for_each_record(
        [&](auto& r) { return r.at(this->slot_).word.load(std::memory_order_relaxed) == 0; });
    this->runtime_->delist(*this, this->slot_, this->isolated_, clear);
    return clear;
  }

  bool check_slot(const char* function) const noexcept {
    if (this->slot_ != 0) [[likely]]
      return true;
    violated("S1", function, "the domain has no slot; see status()");
    return false;
  }

  bool may_wait(const char* function) const noexcept {
    if (!check_slot(function)) return false;
    if (!held_by_this_thread()) [[likely]]
      return true;
    violated("L7", function, "called inside a read section of the same domain (slot %u): it would wait for itself",
             this->slot_);
    return false;
  }

  void synchronize(const char* function, int spins) noexcept {
    if constexpr (mutated(mutation::no_grace_period)) return;
    if (may_wait(function)) this->wait_for_grace_period(this->next_grace_period(), spins);
  }

 private:
  friend base;
  friend runtime<Platform>;
  friend worker<Platform>;

  struct sentinel : srcu_head {
    std::atomic<std::uint32_t> done{0};
  };

  bool runs_callbacks_here() const noexcept {
    return schedule_ == nullptr ? this->runtime_->work.runs_here()
                                : drainer_.load(std::memory_order_relaxed) == Platform::self();
  }

  errc enqueue_checked(srcu_head& head, srcu_callback function) noexcept {
    if (!check_slot("srcu_domain::call")) return errc::no_slot;
    if (function == nullptr || head.function != nullptr) [[unlikely]] {
      violated("L6", "srcu_domain::call", function == nullptr ? "the callback is null" : "the head is already queued");
      return errc::already_registered;
    }
    enqueue(head, function);
    return errc::ok;
  }

  void enqueue(srcu_head& head, srcu_callback function) noexcept {
    head.function = function;
    srcu_head* newest = incoming_.load(std::memory_order_relaxed);
    do {
      head.next = newest;
      // (q1) release pairs with (q2): what the caller did before happens before the callback.
    } while (!incoming_.compare_exchange_weak(newest, &head, std::memory_order_release, std::memory_order_relaxed));
    if (newest != nullptr) return;  // whoever queued the first one has said so
    used_.store(true, std::memory_order_relaxed);
    resume_callbacks();
  }

  /// There is something to do, or to look at again.
  void resume_callbacks() noexcept {
    if (schedule_ != nullptr) {
      schedule_(context_);
    } else {
      this->runtime_->work.post(*this);
    }
  }

  bool has_incoming() const noexcept { return incoming_.load(std::memory_order_relaxed) != nullptr; }

  // --- The batch that waits for its grace period: for the worker under its mutex, or for who drains. ----------------

  /// Takes what is queued, oldest first, and begins its grace period. Returns: true if that one lacks its fence.
  bool begin_batch() noexcept {
    if (batch_ == nullptr) {
      srcu_head* list = incoming_.exchange(nullptr, std::memory_order_acquire);  // (q2) pairs with (q1)
      while (list != nullptr) batch_ = std::exchange(list, std::exchange(list->next, batch_));
      target_ = this->next_grace_period();
    }
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

  /// The domain may be gone when it returns.
  void run(srcu_head& head) noexcept {
    backlog_.fetch_sub(1, std::memory_order_relaxed);
    std::exchange(head.function, nullptr)(&head);
  }

  /// Returns: false if a section holds callbacks back.
  bool drain_batches(std::size_t& ran) noexcept {
    while (true) {
      begin_batch();
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
      while (srcu_head* const h = batch_) {
        batch_ = h->next;
        run(*h);
        ++ran;
      }
    }
  }

  void after_fork() noexcept {
    this->reset_after_fork();
    if (drainer_.load(std::memory_order_relaxed) != Platform::self()) draining_.store(false, std::memory_order_relaxed);
  }

  // Callbacks, and the lists that the domain is on.
  alignas(64) std::atomic<srcu_head*> incoming_{nullptr};
  std::atomic<std::size_t> backlog_{0};
  std::size_t max_backlog_ = 0;
  std::atomic<bool> used_{false};    ///< there has been a callback
  std::atomic<bool> posted_{false};  ///< on one of the worker's lists
  std::atomic<bool> draining_{false};
  std::atomic<std::uintptr_t> drainer_{0};
  void (*schedule_)(void*) noexcept = nullptr;
  void* context_ = nullptr;

  srcu_head* batch_ = nullptr;
  std::uint64_t target_ = 0;    ///< the grace period that the batch waits for
  std::uint64_t unfenced_ = 0;  ///< the one that the worker is about to fence
  domain_core* next_work_ = nullptr;

  domain_core* next_ = nullptr;  ///< the runtime's list, under its mutex
  domain_core** link_ = nullptr;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
