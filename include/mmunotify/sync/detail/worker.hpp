// SPDX-License-Identifier: MIT
#pragma once

// The thread that runs deferred callbacks: one for each runtime, started when the first callback is queued, stopped
// when the process exits or the copy of the library that owns the runtime is unloaded.
//
// It works in rounds. A round takes what was queued in every domain that has work, begins their grace periods, makes
// one heavy fence for all of them, and runs the callbacks of those whose readers have left. A domain whose readers have
// not is marked; the last of them wakes the worker (domain_core, ordering w). So a sleeper in one domain does not delay
// another (S7); a callback that takes long does, and a user whose callbacks do names an executor of their own.
//
// Callbacks that come one at a time are run at once. Where they come in numbers the worker collects: after a round that
// takes many, and after a few rounds in any case, it rests (detail/rest.hpp). Who calls meanwhile wakes nobody, and
// domains whose readers have not left are not marked: most will have when the worker looks again, and their sections
// pay nothing. A round that is not followed by a rest leaves nothing unmarked; so the worker never sleeps but for marks
// and kicks.
//
// Queues of domains: `pending_`, pushed to without a lock, and `active_`, `ready_`, under the mutex. A domain is in at
// most one of them, and says so in `posted_`. Before the last callbacks of a domain run, it is in none: whoever waits
// for them may destroy it. The mutex is not held while a callback runs. What is being run is kept in `running_`, not in
// the thread, so that a forked child can go on where the parent's worker was.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>

#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/callback.hpp>
#include <mmunotify/sync/detail/rest.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

namespace detail {

template <class Platform>
class domain_core;
template <class Platform>
class runtime;

template <class Platform>
class worker {
  using core = domain_core<Platform>;
  using home_type = runtime<Platform>;

 public:
  /// Called once, by the copy of the library that owns the runtime: the code that is run is its own.
  void own() noexcept { start_ = &start_own; }

  /// Effects: sees to it that the domain's callbacks are run. Progress: lock-free but for the start of the thread.
  void post(core& d) noexcept {
    // (k1) acq_rel pairs with (k2): who finds the domain posted has its callback queued before the worker looks.
    if (!d.posted_.exchange(true, std::memory_order_acq_rel)) {
      core* first = pending_.load(std::memory_order_relaxed);
      do {
        d.next_work_ = first;
        // (k3) release pairs with (k4).
      } while (!pending_.compare_exchange_weak(first, &d, std::memory_order_release, std::memory_order_relaxed));
    }
    kick();
    static_cast<void>(start());
  }

  /// Effects: the worker does another round. Context: anywhere, also at the end of a section.
  void kick() noexcept {
    // Dekker: the round's number, then a look whether the worker sleeps; it says that it sleeps, then looks at the
    // number.
    rounds_.fetch_add(1, std::memory_order_seq_cst);                       // (k5) pairs with (k8)
    if (asleep_.load(std::memory_order_seq_cst)) Platform::wake(rounds_);  // (k6) pairs with (k7)
  }

  /// Who waits for callbacks hurries until it has them; who finds many says so.
  rest<Platform>& rests() noexcept { return rests_; }

  /// Returns: true once there is a thread; false if the system has none left, or somebody stands in for it.
  bool start() noexcept {
    // (k9) acquire pairs with (k10).
    return state_.load(std::memory_order_acquire) == state::thread || start_(*this);
  }

  /// Returns: true in the thread that runs callbacks, inside one.
  bool runs_here() const noexcept { return runner_.load(std::memory_order_relaxed) == Platform::self(); }

  /// Returns: true while there is a thread that runs callbacks.
  bool runs_somewhere() const noexcept {
    return state_.load(std::memory_order_seq_cst) == state::thread;  // (q7) pairs with (q8)
  }

  /// Effects: starts the thread; while none can be had, the caller stands in for it, until done() says true.
  template <class Done>
  void start_or(Done done) noexcept {
    while (!done() && !start()) {
      if (!stand_in()) {
        Platform::yield();
        continue;
      }
      while (!done()) {
        if (round() != next::at_once) Platform::yield();
      }
      runner_.store(0, std::memory_order_relaxed);
      state_.store(state::absent, std::memory_order_release);  // (k10) pairs with (k9)
    }
  }

  /// Returns: what was taken of a domain's callbacks and has not begun to run. For a forked child.
  const srcu_head* taken_of(const core& d) const noexcept { return running_of_ == &d ? running_ : nullptr; }
  bool runs_callback_of(const core& d) const noexcept { return runs_here() && running_of_ == &d; }

  /// Effects: takes a domain off the lists that has nothing queued: somebody may have posted it all the same.
  void forget(core& d) noexcept {
    const std::lock_guard lock(mutex_);
    adopt_pending();
    for (core** list : {&active_, &ready_}) {
      while (*list != nullptr && *list != &d) list = &(*list)->next_work_;
      if (*list == &d) *list = d.next_work_;
    }
    d.posted_.store(false, std::memory_order_relaxed);
  }

  void before_fork() noexcept { mutex_.lock(); }
  void after_fork_parent() noexcept { mutex_.unlock(); }
  /// The child has no worker, unless it was the worker that forked, in a callback. The lists are made anew, since a
  /// thread that the child does not have may have been about to post.
  void after_fork_child(core* domains) noexcept {
    rests_.after_fork(runs_here() && state_.load(std::memory_order_relaxed) == state::stand_in);  // in a barrier
    if (!runs_here()) {
      runner_.store(0, std::memory_order_relaxed);
      state_.store(state::absent, std::memory_order_relaxed);
      asleep_.store(false, std::memory_order_relaxed);
      stopping_.store(false, std::memory_order_relaxed);
    }
    pending_.store(nullptr, std::memory_order_relaxed);
    active_ = ready_ = nullptr;
    for (core* d = domains; d != nullptr; d = d->next_) {
      const bool work = d->after_fork();
      d->posted_.store(work, std::memory_order_relaxed);
      if (work) d->next_work_ = std::exchange(active_, d);
    }
    mutex_.unlock();
  }

 private:
  enum class state : std::uint32_t {
    absent,
    thread,    ///< there is a worker thread
    stand_in,  ///< somebody in a barrier does its work
  };

  static home_type& home() noexcept { return home_type::own(); }

  bool stand_in() noexcept {
    const std::lock_guard lock(mutex_);
    if (state_.load(std::memory_order_acquire) != state::absent) return false;  // (k9)
    runner_.store(Platform::self(), std::memory_order_relaxed);
    state_.store(state::stand_in, std::memory_order_relaxed);
    return true;
  }

  static bool start_own(worker& w) noexcept {
    const std::lock_guard lock(w.mutex_);
    // (k9) acquire pairs with (k10): what the one before left is complete.
    const state now = w.state_.load(std::memory_order_acquire);
    if (now != state::absent) return now == state::thread;
    if (!w.stop_at_exit_) w.stop_at_exit_ = Platform::at_exit(&stop);
    if (!w.stop_at_exit_ || !Platform::start_thread(w.thread_, &main, &w)) return false;
    w.state_.store(state::thread, std::memory_order_release);  // (k10)
    return true;
  }

  /// At exit. What is still queued then is run only if somebody waits for it, who will start another worker.
  static void stop() noexcept {
    worker& w = home().work;
    {
      const std::lock_guard lock(w.mutex_);
      w.stop_at_exit_ = false;
      if (w.state_.load(std::memory_order_acquire) != state::thread || w.runs_here()) return;  // (k9)
      w.stopping_.store(true, std::memory_order_relaxed);
    }
    w.kick();
    w.rests_.hurry();
    Platform::join(w.thread_);
    w.rests_.calm();
    {
      const std::lock_guard lock(w.mutex_);
      w.stopping_.store(false, std::memory_order_relaxed);
      w.state_.store(state::absent, std::memory_order_seq_cst);  // (k10), (q8) pairs with (q7)
    }
    home().for_each_domain([](core& d) { d.nobody_works(); });
  }

  static void* main(void* argument) noexcept {
    auto& w = *static_cast<worker*>(argument);
    w.runner_.store(Platform::self(), std::memory_order_relaxed);
    while (true) {
      // Before the look whether it shall stop, and at everything else that a kick may be about.
      const std::uint32_t seen = w.rounds_.load(std::memory_order_acquire);  // (k8) pairs with (k5)
      if (w.stopping_.load(std::memory_order_relaxed)) break;
      const next then = w.round();
      if (then == next::rest) {
        w.rests_.take();
        w.prompt_ = prompt_rounds;
      }
      if (then != next::sleep) continue;
      w.asleep_.store(true, std::memory_order_seq_cst);         // (k7) pairs with (k6)
      if (w.rounds_.load(std::memory_order_seq_cst) == seen) {  // (k8) pairs with (k5)
        Platform::wait(w.rounds_, seen);
      }
      w.asleep_.store(false, std::memory_order_relaxed);
    }
    w.runner_.store(0, std::memory_order_relaxed);
    return nullptr;
  }

  enum class next : std::uint8_t {
    at_once,  ///< another round may find something to do
    rest,     ///< it may, after a rest
    sleep,    ///< somebody will kick
  };

  next round() noexcept {
    bool busy = false;
    bool collects = false;
    bool open = false;
    {
      const std::lock_guard lock(mutex_);
      adopt_pending();
      collects = begin_batches();
      busy = sort_out();
      if (!collects && mark_stuck()) busy = sort_out();
      open = active_ != nullptr;
    }
    const bool ran = run_ready();
    if (collects && (ran || open)) return mutated(mutation::rests_asleep) ? next::sleep : next::rest;
    if (busy && !ran) Platform::yield();  // to who drives
    return busy || ran ? next::at_once : next::sleep;
  }

  /// In the order in which they came.
  void adopt_pending() noexcept {
    core* list = pending_.exchange(nullptr, std::memory_order_acquire);  // (k4) pairs with (k3)
    core* reversed = nullptr;
    while (list != nullptr) reversed = std::exchange(list, std::exchange(list->next_work_, reversed));
    core** end = &active_;
    while (*end != nullptr) end = &(*end)->next_work_;
    *end = reversed;
  }

  /// One fence for all grace periods that begin. Returns: true if a rest shall follow.
  bool begin_batches() noexcept {
    std::size_t taken = 0;
    bool any = false;
    for (core* d = active_; d != nullptr; d = d->next_work_) any |= d->begin_batch(taken);
    if (any) {
      home_of(*active_).fence();
      for (core* d = active_; d != nullptr; d = d->next_work_) d->batch_fenced();
    }
    if (taken == 0 || rests_.hurried()) return false;
    if (taken >= Platform::many || prompt_ == 0) return true;
    --prompt_;
    return false;
  }

  /// Moves the domains whose grace period is over to ready_. Returns: true if somebody else drives one just now.
  bool sort_out() noexcept {
    bool busy = false;
    core** end = &ready_;
    while (*end != nullptr) end = &(*end)->next_work_;
    for (core** link = &active_; *link != nullptr;) {
      core* const d = *link;
      const auto found = d->advance_batch();
      busy |= found == core::progress::busy;
      if (found != core::progress::over) {
        link = &d->next_work_;
        continue;
      }
      *link = std::exchange(d->next_work_, nullptr);
      *end = d;
      end = &d->next_work_;
    }
    return busy;
  }

  /// Whoever leaves a section that a marked domain waits for kicks the worker. Returns: true if one was marked now.
  bool mark_stuck() noexcept {
    bool any = false;
    for (core* d = active_; d != nullptr; d = d->next_work_) any |= d->await_leavers();
    if (any) home_of(*active_).fence();
    return any;
  }

  /// Returns: true if callbacks were run.
  bool run_ready() noexcept {
    bool any = false;
    while (core* const d = next_ready()) {
      any = true;
      while (srcu_head* const h = running_) {
        running_ = h->next;
        fetch_early(running_);
        d->run(*h);
      }
    }
    return any;
  }

  /// A head, and what lies behind it: most likely what its callback looks at. They were queued long ago, elsewhere.
  static void fetch_early(const srcu_head* h) noexcept {
    __builtin_prefetch(h);
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(h) + 64));
  }

  /// Takes the callbacks of one domain, or what a worker left that a fork has taken away. Returns: the domain, or null.
  core* next_ready() noexcept {
    const std::lock_guard lock(mutex_);
    if (running_ != nullptr) return running_of_;
    core* const d = running_of_ = ready_;
    if (d == nullptr) return nullptr;
    ready_ = std::exchange(d->next_work_, nullptr);
    running_ = d->take_batch();
    // (k2) acq_rel pairs with (k1). Whoever has queued a callback meanwhile and found the domain posted is seen here.
    d->posted_.exchange(false, std::memory_order_acq_rel);
    if (d->has_incoming() && !d->posted_.exchange(true, std::memory_order_acq_rel)) {  // (k1)
      d->next_work_ = std::exchange(active_, d);
    }
    return d;
  }

  static home_type& home_of(core& d) noexcept { return *d.runtime_; }

  std::atomic<core*> pending_{nullptr};
  std::atomic<std::uint32_t> rounds_{0};
  std::atomic<bool> asleep_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<state> state_{state::absent};
  std::atomic<std::uintptr_t> runner_{0};  ///< Platform::self() of whoever runs callbacks
  rest<Platform> rests_;
  bool (*start_)(worker&) noexcept = nullptr;

  typename Platform::mutex mutex_;  ///< guards what follows; a leaf but for the domains' drivers, which it only tries
  core* active_ = nullptr;
  core* ready_ = nullptr;
  bool stop_at_exit_ = false;
  typename Platform::thread thread_{};

  // The worker's own.
  static constexpr unsigned prompt_rounds = 4;
  unsigned prompt_ = prompt_rounds;  ///< rounds of few callbacks before the next rest
  srcu_head* running_ = nullptr;
  core* running_of_ = nullptr;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
