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

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/callback_queue.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

namespace detail {

template <class Platform>
class domain_core : public callback_queue<Platform> {
  using base = callback_queue<Platform>;
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
    std::uint32_t generation_ = 0;  ///< the process that it was begun in
  };

  domain_core(const domain_core&) = delete;
  domain_core& operator=(const domain_core&) = delete;

  /// Returns: ok; no_slot if the process's slots (65 535; isolated ones count four times) or its pthread keys are
  /// exhausted. Sections of such a domain are harmless and protect nothing; to wait for it is a contract failure.
  errc status() const noexcept { return this->slot_ != 0 ? errc::ok : errc::no_slot; }

  /// Effects: does what the thread's first section would do. Returns: ok, no_slot (see status()) or no_memory.
  errc attach_this_thread() noexcept {
    if (const errc e = status(); e != errc::ok) return e;
    return this->runtime_->attach() != nullptr ? errc::ok : errc::no_memory;
  }

  /// Returns: true inside a section of this domain that this thread began (in a callback or an open bracket, for an
  /// address space). Hand-off sections belong to no thread and do not count.
  [[nodiscard]] bool held_by_this_thread() const noexcept {
    std::byte* slab = home::slab();
    if (this->runtime_ != &home::own() || slab == nullptr) [[unlikely]] {
      const auto* const r = this->slot_ != 0 ? this->runtime_->current() : nullptr;
      if (r == nullptr) return false;
      slab = r->slab();
    }
    const std::uint64_t w = slot_in(slab).word.load(std::memory_order_relaxed);
    if (w == 0 || !this->indirect_) return w != 0;
    return static_slot::is_inside(*static_slot::word_at(w));
  }

  /// Returns: true in a callback of this domain, or of another whose callbacks the same thread runs: there, waiting for
  /// callbacks would wait for itself.
  [[nodiscard]] bool runs_callbacks_here() const noexcept {
    return this->schedule_ == nullptr ? this->runtime_->work.runs_here() : this->drains_here();
  }

  // --- Waiting. -----------------------------------------------------------------------------------------------------

  /// Effects: returns when every section that began before the call has ended. Sections that begin later are not waited
  /// for (S5). Precondition: not inside a section of this domain (L7, always checked: it would wait for itself).
  /// Progress: blocking, bounded by the longest section. Concurrent calls share grace periods and heavy fences.
  void synchronize() noexcept { synchronize("srcu_domain::synchronize", Platform::spins); }

  /// The same, and spins for about 100 us before it sleeps: for who cares about the latency and not about the
  /// processor.
  void synchronize_expedited() noexcept {
    synchronize("srcu_domain::synchronize_expedited", Platform::expedited_spins);
  }

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
        some[i]->wait_for_grace_period(target[i], Platform::spins);
      }
    }
  }

  /// Returns: a name for the grace period that a synchronize() now would wait for. Progress: wait-free where a
  /// read-modify-write is.
  /// Context: anywhere, also inside sections.
  [[nodiscard]] cookie start_poll() const noexcept {
    cookie c;
    c.target_ = this->next_grace_period();
    return c;
  }

  /// Returns: true if every section that began before the cookie was made has ended (S3). Drives the grace period:
  /// the first call makes the heavy fence, each one scans. Progress: never waits; who holds the same cookie or a later
  /// one, and calls often enough, gets true some time after the last section has ended. Context: anywhere but signal
  /// handlers, also inside sections.
  bool poll(cookie c) noexcept {
    if (!this->check_slot("srcu_domain::poll")) return false;
    const bool before = this->has_ended(c.target_);
    const bool over = before || this->advance(c.target_) == progress::over;
    if (over && !before) this->tell_deferred();
    return over;
  }

  // --- Hand-off. ----------------------------------------------------------------------------------------------------

  /// Effects: begins a section that any thread may end (S6): it goes with its token. Cost: two locked instructions on a
  /// line that all share. It does not survive a fork: in the child it has ended, since whoever was to end it may be
  /// gone; to end it there does nothing. Progress: lock-free (a grace period that begins makes it retry). Context:
  /// anywhere.
  [[nodiscard]] handoff_token down_read() noexcept {
    handoff_token t;
    t.generation_ = this->runtime_->generation();
    t.bank_ = this->enter_bank();
    return t;
  }
  /// Effects: ends the section, once.
  void up_read(handoff_token t) noexcept {
    if (t.generation_ == this->runtime_->generation()) [[likely]]
      this->leave_bank(t.bank_);
  }

  // --- Deferred callbacks. ------------------------------------------------------------------------------------------

  /// Effects: runs function(&head) once, after a grace period, in the worker or in drain(); callbacks of one domain run
  /// in the order in which they were queued. Where they come in numbers the worker lets them collect for some 200 us,
  /// unless somebody waits in barrier(). Preconditions: the head is not queued (L6, checked); it stays until then,
  /// and may be gone when the function returns. A forked child runs what is queued when it next calls or has a barrier,
  /// so a head must not lie on the stack of a thread that it does not have. Returns: ok; again if max_backlog are
  /// queued, no_slot: nothing has happened then. Progress: lock-free; the first one in the process starts the worker.
  /// Context: anywhere but signal handlers, also in sections and callbacks. A callback may sleep, call and synchronize;
  /// while it runs, no other callback of the worker does.
  errc call(srcu_head& head, srcu_callback function) noexcept {
    return this->enqueue(head, function, this->max_backlog_);
  }
  /// The same whatever the backlog is: for what cannot be taken back any more.
  errc call_unbounded(srcu_head& head, srcu_callback function) noexcept { return this->enqueue(head, function, 0); }

  /// Returns: how many callbacks are queued or run just now. May be stale on arrival. Ordering: who finds none comes
  /// after what those that have run did.
  std::size_t backlog() const noexcept { return this->outstanding(); }

  /// Effects: returns when every callback that was queued before the call has run (S4, L8). With an executor of the
  /// user's, the caller drains. Precondition: not inside a section of this domain, nor in a callback (L7, checked).
  /// Progress: blocking.
  void barrier() noexcept {
    if (!this->check_slot("srcu_domain::barrier")) return;
    if (held_by_this_thread() || runs_callbacks_here()) [[unlikely]] {
      return violated("L7", "srcu_domain::barrier",
                      "called inside a callback or a read section of the domain (slot %u): it would wait for itself",
                      this->slot_);
    }
    if constexpr (mutated(mutation::early_barrier)) return synchronize();
    const std::uint32_t counted = this->queued_.load(std::memory_order_relaxed);
    if (this->has_run(counted)) return;
    if (this->schedule_ == nullptr) return wait_for_worker(counted);
    do {
      synchronize();
      drain();
      // Only while another thread drains: it may be held up by a callback.
      this->wait_until_run(counted, [&] { return this->draining_.load(std::memory_order_seq_cst); });  // (q7)
    } while (!this->has_run(counted));
  }

  /// Effects: runs the callbacks that are due; for a domain with an executor. Returns: how many. When a section holds
  /// callbacks back, the executor is asked again when it ends. Precondition: not inside a section of this domain (L7,
  /// checked). Progress: never waits for readers; returns 0 at once if another thread drains.
  std::size_t drain() noexcept {
    if (this->schedule_ == nullptr || held_by_this_thread()) [[unlikely]] {
      violated("L7", "srcu_domain::drain",
               this->schedule_ == nullptr ? "the domain has no executor: the worker runs its callbacks"
                                          : "called inside a read section of the domain");
      return 0;
    }
    std::size_t ran = 0;
    // (q6) seq_cst pairs with itself: who finds somebody draining has queued its callback, or taken the mark, before
    // that one looks again; and with (q7).
    while (!this->draining_.exchange(true, std::memory_order_seq_cst)) {
      this->drainer_.store(Platform::self(), std::memory_order_relaxed);
      const bool held_back = !this->drain_batches(ran);
      this->drainer_.store(0, std::memory_order_relaxed);
      this->draining_.exchange(false, std::memory_order_seq_cst);  // (q6)
      this->nobody_works();
      if (held_back ? this->marked_for_leavers() : !this->has_incoming()) break;
    }
    return ran;
  }

 protected:
  constexpr domain_core(home& h, bool indirect) noexcept : base(h, indirect) {}

  /// Takes a slot, unless there is one. Returns: false if none is left.
  bool open(const srcu_options& o) noexcept { return this->runtime_->prepare() && this->runtime_->enlist(*this, o); }

  /// Runs the callbacks that are queued, and gives the slot back. Returns: false if a section is open: then a thread's
  /// word keeps the slot, since its next owner would take the section for one of its own.
  bool close() noexcept {
    if (this->slot_ == 0) return true;
    if (this->used_.load(std::memory_order_relaxed)) {
      auto& work = this->runtime_->work;
      if (this->schedule_ == nullptr && work.runs_here() && !work.runs_callback_of(*this)) {
        run_in_place();
      } else if (backlog() != 0) {
        barrier();
      }
      if (backlog() != 0) std::abort();  // barrier() was refused, and said why
      if (this->schedule_ == nullptr) work.forget(*this);
    }
    const bool clear = this->runtime_->for_each_record(
        [&](auto& r) { return r.at(this->slot_).word.load(std::memory_order_relaxed) == 0; });
    this->runtime_->delist(*this, this->slot_, this->isolated_, clear);
    return clear && this->banks_empty();
  }

  /// True once the domain has a slot, for whoever may be the first to use it.
  bool ready() const noexcept { return ready_.load(std::memory_order_acquire); }  // (t1) pairs with (t2)

  section_slot& slot_in(std::byte* slab) const noexcept {
    return thread_record<Platform>::slot_at(slab, this->slot_ * sizeof(section_slot));
  }

  bool may_wait(const char* function) const noexcept {
    if (!this->check_slot(function)) return false;
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
  friend grace_period_driver<Platform>;
  friend base;
  friend runtime<Platform>;
  friend worker<Platform>;

  /// Returns when all that the first count said have run; the domain may be gone then.
  void wait_for_worker(std::uint32_t counted) noexcept {
    auto& work = this->runtime_->work;
    work.rests().hurry();
    do {
      work.start_or([&] { return this->has_run(counted); });
      this->wait_until_run(counted, [&] { return work.runs_somewhere(); });
    } while (!this->has_run(counted));
    work.rests().calm();
  }

  /// The worker's own thread cannot wait for the worker: in another domain's callback.
  void run_in_place() noexcept {
    while (true) {
      this->runtime_->work.forget(*this);
      static_cast<void>(this->take_incoming());
      if (this->batch_ == nullptr) return;
      this->wait_for_grace_period(this->target_, Platform::spins);
      this->run_batch();
    }
  }

  /// Under the runtime's mutex.
  void begin_life(std::uint32_t slot, const srcu_options& o) noexcept {
    this->isolated_ = o.isolated;
    this->configure(o);
    this->waiter_.store(this->runtime_->asymmetric() ? 0 : this->always, std::memory_order_relaxed);
    this->slot_ = slot;
    this->place_ = this->runtime_->key() + slot * sizeof(section_slot);
    ready_.store(true, std::memory_order_release);  // (t2) pairs with (t1)
  }

  /// Returns: true if there is something for the worker.
  bool after_fork() noexcept {
    this->reset_after_fork();
    const auto& w = this->runtime_->work;
    this->reset_queue_after_fork(w.taken_of(*this), w.runs_callback_of(*this));
    return this->schedule_ == nullptr && this->batch_ != nullptr;
  }

  std::atomic<bool> ready_{false};

  // The lists that the domain is on.
  std::atomic<bool> posted_{false};  ///< on one of the worker's
  domain_core* next_work_ = nullptr;

  domain_core* next_ = nullptr;  ///< the runtime's list, under its mutex
  domain_core** link_ = nullptr;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
