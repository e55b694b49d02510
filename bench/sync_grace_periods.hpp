// SPDX-License-Identifier: MIT
#pragma once

// Grace periods and deferred calls, as sync.cpp compares them.
//
// Every grace period is one of an update: publish a payload, wait, retire the other one (its value becomes 0). A reader
// that runs beside it adds up what it reads, and must never have read a retired payload. Times are wall times.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include <sched.h>

#include "sync_sections.hpp"

namespace sync_bench {

/// Threads that enter one section each, and then wait until the object is destroyed.
template <class Kind>
class parked_threads {
 public:
  explicit parked_threads(std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) threads_.emplace_back([this] { park(); });
    while (ready_.load(std::memory_order_acquire) != n) std::this_thread::yield();
  }
  ~parked_threads() {
    released_.store(true, std::memory_order_release);
    released_.notify_all();
    for (std::thread& t : threads_) t.join();
  }
  parked_threads(const parked_threads&) = delete;
  parked_threads& operator=(const parked_threads&) = delete;

 private:
  void park() {
    Kind k;
    k.begin();
    sections(k, 0, 1);
    ready_.fetch_add(1, std::memory_order_release);
    released_.wait(false, std::memory_order_acquire);
    k.end();
  }

  std::atomic<std::size_t> ready_{0};
  std::atomic<bool> released_{false};
  std::vector<std::thread> threads_;
};

/// Keeps the calling thread on one processor, and a thread that asks on the other, while it lives. Left alone, the
/// scheduler puts both on the same one at times, and then a membarrier interrupts nobody.
class two_processors {
 public:
  two_processors() {
    ::sched_getaffinity(0, sizeof allowed_, &allowed_);
    pin(0);
  }
  ~two_processors() { ::sched_setaffinity(0, sizeof allowed_, &allowed_); }
  two_processors(const two_processors&) = delete;
  two_processors& operator=(const two_processors&) = delete;

  /// Effects: puts the calling thread on the i-th processor that the process may use, if there are so many.
  void pin(int i) const {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed_) || i-- != 0) continue;
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(cpu, &one);
      ::sched_setaffinity(0, sizeof one, &one);
      return;
    }
  }

 private:
  cpu_set_t allowed_;
};

/// A thread that runs short sections all the time, on the second processor.
template <class Kind>
class busy_reader {
 public:
  busy_reader() : thread_([this] { run(); }) {
    while (count_.load(std::memory_order_acquire) == 0) std::this_thread::yield();
  }
  ~busy_reader() {
    if (thread_.joinable()) stop();
  }
  busy_reader(const busy_reader&) = delete;
  busy_reader& operator=(const busy_reader&) = delete;

  /// Returns: true if every section read a live payload.
  bool stop() {
    stopped_.store(true, std::memory_order_relaxed);
    thread_.join();
    return sum_ == count_.load(std::memory_order_relaxed);
  }

 private:
  static constexpr std::uint64_t some = 64;

  void run() {
    processors_.pin(1);
    Kind k;
    k.begin();
    while (!stopped_.load(std::memory_order_relaxed)) {
      sum_ += sections(k, 0, some);
      count_.store(count_.load(std::memory_order_relaxed) + some, std::memory_order_release);
    }
    k.end();
  }

  const two_processors processors_;
  std::atomic<bool> stopped_{false};
  std::atomic<std::uint64_t> count_{0};
  std::uint64_t sum_ = 0;
  std::thread thread_;
};

/// Publishes and retires two payloads in turn.
class updater {
 public:
  updater() : first_(bench_shared) { publish(&payloads_[0]); }
  /// Precondition: no reader is left.
  ~updater() { publish(first_); }
  updater(const updater&) = delete;
  updater& operator=(const updater&) = delete;

  template <class Synchronize>
  void update(Synchronize& synchronize) {
    bench_payload& old = payloads_[current_];
    current_ ^= 1;
    set(payloads_[current_], 1);
    publish(&payloads_[current_]);
    synchronize();
    set(old, 0);
  }

 private:
  static void publish(bench_payload* p) { std::atomic_ref(bench_shared).store(p, std::memory_order_release); }
  static void set(bench_payload& p, std::uint64_t v) { std::atomic_ref(p.value).store(v, std::memory_order_relaxed); }

  bench_payload payloads_[2] = {{1}, {1}};
  std::size_t current_ = 0;
  bench_payload* first_;
};

/// A thread's own way to wait for a grace period: synchronize() of the kind.
struct bare_membarrier : no_section {
  void synchronize() { linux_platform::heavy(); }
};
struct expedited : dynamic_section {
  void synchronize() { domain->synchronize_expedited(); }
};
struct polled : dynamic_section {
  void synchronize() {
    const auto cookie = domain->start_poll();
    while (!domain->poll(cookie)) linux_platform::relax();
  }
};

template <class Kind>
void measure_idle(benchmark::State& state) {
  Kind k;
  k.begin();
  {
    updater u;
    auto synchronize = [&k] { k.synchronize(); };
    while (state.KeepRunning()) u.update(synchronize);
  }
  k.end();
}

/// checked: the kind's synchronize() is a grace period for the sections of Reader.
template <class Kind, class Reader, bool checked>
void measure_busy(benchmark::State& state) {
  Kind k;
  k.begin();
  {
    updater u;
    busy_reader<Reader> reader;
    auto synchronize = [&k] { k.synchronize(); };
    while (state.KeepRunning()) u.update(synchronize);
    if (!reader.stop() && checked) state.SkipWithError("a section read a retired payload");
  }
  k.end();
}

template <class Kind, std::size_t threads>
void measure_crowd(benchmark::State& state) {
  const parked_threads<Kind> crowd(threads);
  measure_idle<Kind>(state);
}

template <class Kind>
void measure_together(benchmark::State& state) {
  Kind k;
  k.begin();
  while (state.KeepRunning()) k.synchronize();
  k.end();
}

/// A domain of a runtime of its own: its threads are not found by the grace periods of the other cases.
struct crowd_platform : linux_platform {};
struct crowd_section : kind {
  using domain_type = basic_srcu_domain<crowd_platform>;
  domain_type* domain = nullptr;
  void begin() {
    static domain_type that;
    domain = &that;
  }
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    const basic_read_section<domain_type> s(*domain);
    return read_payload();
  }
  void synchronize() { domain->synchronize(); }
};

/// Eight domains: a grace period of each.
struct eight_domains : kind {
  std::vector<srcu_domain*> domains;
  void begin() {
    static srcu_domain those[8];
    for (srcu_domain& d : those) domains.push_back(&d);
  }
};
struct one_by_one : eight_domains {
  void synchronize() {
    for (srcu_domain* d : domains) d->synchronize();
  }
};
struct all_at_once : eight_domains {
  void synchronize() { srcu_domain::synchronize_all(std::span<srcu_domain* const>(domains)); }
};

/// A deferred call and the barrier after it. Calls: call(n), n <= batch; barrier(); called().
struct domain_calls : of_domain {
  static inline std::atomic<std::uint64_t> count{0};
  std::vector<srcu_head> heads{batch};

  void call(std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
      (void)domain->call(heads[i], [](srcu_head*) noexcept {
        count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
      });
    }
  }
  void barrier() { domain->barrier(); }
  static std::uint64_t called() { return count.load(std::memory_order_relaxed); }
};
#if MMUNOTIFY_BENCH_URCU
struct urcu_calls : urcu_section {
  static_assert(bench_urcu_heads >= batch);
  void call(std::uint64_t n) { bench_urcu_call(n); }
  void barrier() { bench_urcu_barrier(); }
  static std::uint64_t called() { return bench_urcu_called(); }
};
#endif

template <class Calls>
void measure_call_and_barrier(benchmark::State& state) {
  Calls c;
  c.begin();
  c.call(1);  // whatever is set up by the first call is not measured
  c.barrier();
  const std::uint64_t before = Calls::called();
  std::uint64_t count = 0;
  while (state.KeepRunning()) {
    c.call(1);
    c.barrier();
    ++count;
  }
  if (Calls::called() - before != count) state.SkipWithError("a callback had not run after the barrier");
  c.end();
}

/// The enqueueing alone: the barriers between the batches are not timed.
template <class Calls>
void measure_call(benchmark::State& state) {
  Calls c;
  c.begin();
  c.call(1);
  c.barrier();
  const std::uint64_t before = Calls::called();
  std::uint64_t count = 0;
  while (state.KeepRunningBatch(batch)) {
    const auto started = std::chrono::steady_clock::now();
    c.call(batch);
    state.SetIterationTime(std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
    c.barrier();
    count += batch;
  }
  if (Calls::called() - before != count) state.SkipWithError("a callback had not run after the barrier");
  c.end();
}

}  // namespace sync_bench
