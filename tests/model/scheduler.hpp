// SPDX-License-Identifier: MIT
#pragma once

// Runs threads as fibers of one, one operation at a time, in an order drawn from a seed, with a weak memory; so that a
// run can be replayed, and does not depend on the machine or its load.
//
// The library's headers use std::atomic. Here, after the standard headers, that name stands for a type of ours whose
// operations ask the scheduler. A location remembers its stores. A load may return an old one, unless the thread knows
// of a later one: by having read or written it, or because it happened before. What happens before what is kept in
// vector clocks, as in a race detector. So a missing release or acquire is seen as a race, and a missing fence as an
// old value.
//
// Stronger than C++: a store never becomes older than another that was executed before it; seq_cst operations and
// fences synchronize with each other. What is noticed is wrong; what is not may be wrong all the same (README.md).

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <climits>
#include <concepts>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <mutex>
#include <new>
#include <span>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include <pthread.h>
#include <sched.h>
#include <ucontext.h>
#include <unistd.h>

#include "support/threads.hpp"

namespace model {

class scheduler {
 public:
  /// The one of the process.
  static scheduler& all() {
    static scheduler one;
    return one;
  }

  static constexpr int max_threads = 4;
  static constexpr int max_steps = 20'000;  ///< of one round; then somebody waits for ever

  int me() const { return me_; }
  /// main's preparations: as if it were thread i.
  void pretend(int i) { me_ = i; }
  /// Of all rounds; so that a program that does nothing is seen.
  std::uint64_t operations() const { return operations_; }

  [[noreturn]] void fail(const char* what) const {
    std::printf("ERROR: it is wrong that %s (MMUNOTIFY_SEED=%llu, round %u)\n", what,
                static_cast<unsigned long long>(seed_), round_);
    std::fflush(stdout);
    std::_Exit(1);
  }

  /// Runs f(i) as thread i = 0 .. threads until all have ended.
  template <class F>
  void run_round(std::uint64_t seed, unsigned round, int threads, F f) {
    seed_ = seed;
    round_ = round;
    random_ = small_random(seed * 1'000'003 + round);
    switch_odds_ = std::uint64_t{2} << random_.below(5);
    steps_ = 0;
    alive_ = threads + 1;
    sequentially_consistent_ = {};
    body_ = [](void* context, int i) { (*static_cast<F*>(context))(i); };
    context_ = &f;
    for (int i = 0; i < alive_; ++i) {
      threads_[i] = thread{};
      ::getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks_[i];
      contexts_[i].uc_stack.ss_size = sizeof stacks_[i];
      contexts_[i].uc_link = &home_;
      ::makecontext(&contexts_[i], &fiber_main, 0);
    }
    running_ = true;
    for (int left = alive_; left != 0; --left) {
      me_ = other();
      ::swapcontext(&home_, &contexts_[me_]);  // comes back when a fiber has ended
    }
    running_ = false;
    me_ = 0;
    operations_ += static_cast<std::uint64_t>(steps_);
  }

  /// An operation follows: somebody else may have theirs first.
  void step() {
    if (running_ && (++steps_ > max_steps || random_.below(switch_odds_) == 0)) yield();
  }
  void yield() {
    if (!running_) return;
    if (++steps_ > max_steps) fail("nobody waits for ever");
    const int from = me_;
    me_ = other();
    if (me_ != from) ::swapcontext(&contexts_[from], &contexts_[me_]);
  }

  // --- The memory. Values are bit patterns of up to 8 bytes; a location itself holds the latest. ---------------------

  std::uint64_t load(const void* where, std::size_t size, std::memory_order order) {
    step();
    if (!running_) return latest(where, size);
    location& l = at(where, size);
    begin(order);
    const std::size_t newest = l.stores.size() - 1;
    const std::size_t oldest = oldest_visible(l);
    return read(l, random_.below(2) == 0 ? newest : oldest + random_.below(newest - oldest + 1), order);
  }

  void store(void* where, std::size_t size, std::uint64_t value, std::memory_order order) {
    step();
    if (running_) {
      location& l = at(where, size);
      begin(order);
      write(l, value, released_by(order), order);
    }
    set(where, size, value);
  }

  /// change(value) changes it, and returns whether it is to be stored. Returns: the old value.
  template <class Change>
  std::uint64_t modify(void* where, std::size_t size, std::memory_order order, Change change) {
    step();
    std::uint64_t old = latest(where, size);
    std::uint64_t value = old;
    if (!running_) {
      if (change(value)) set(where, size, value);
      return old;
    }
    location& l = at(where, size);
    begin(order);
    if (!change(value)) {
      read(l, l.stores.size() - 1, std::memory_order_relaxed);
      return old;
    }
    clock released = l.stores.back().released;  // a release sequence goes on
    read(l, l.stores.size() - 1, order);
    join(released, released_by(order));
    write(l, value, released, order);
    set(where, size, value);
    return old;
  }

  /// The location's memory goes away, until the round ends.
  void bury(const void* where) {
    step();
    locations_[where].buried = round_ + 1;
  }

  void fence() {
    step();
    if (!running_) return;
    thread& t = threads_[me_];
    join(t.now, t.unfenced);
    join(t.now, sequentially_consistent_);
    sequentially_consistent_ = t.fenced = t.now;
  }

  // --- Plain memory: an object of the tests. ------------------------------------------------------------------------

  struct accesses {
    std::array<std::uint32_t, max_threads> read{};
    std::array<std::uint32_t, max_threads> written{};
  };
  void access(accesses& a, bool write) {
    step();
    if (!running_) return;
    const clock& now = threads_[me_].now;
    for (std::size_t i = 0; i < max_threads; ++i) {
      if (a.written[i] > now[i] || (write && a.read[i] > now[i])) fail("nobody races for an object");
    }
    (write ? a.written : a.read)[static_cast<std::size_t>(me_)] = tick();
  }

 private:
  using clock = std::array<std::uint32_t, max_threads>;

  struct thread {
    clock now{};       ///< what happened before
    clock unfenced{};  ///< what would have, had a fence followed the loads
    clock fenced{};    ///< at the last fence
    bool ended = false;
  };
  struct stored {
    std::uint64_t value = 0;
    clock released{};
  };
  struct reading {
    std::uint32_t time;
    std::size_t index;
  };
  struct location {
    unsigned round = 0;
    unsigned buried = 0;  ///< the round in which its memory went away
    std::vector<stored> stores;
    std::array<std::vector<reading>, max_threads> known;  ///< to each thread: which store it wrote or read, and when
  };

  static bool acquires(std::memory_order o) {
    return o == std::memory_order_acquire || o == std::memory_order_acq_rel || o == std::memory_order_seq_cst;
  }
  static bool releases(std::memory_order o) {
    return o == std::memory_order_release || o == std::memory_order_acq_rel || o == std::memory_order_seq_cst;
  }
  static void join(clock& a, const clock& b) {
    for (std::size_t i = 0; i < max_threads; ++i) a[i] = std::max(a[i], b[i]);
  }
  std::uint32_t tick() { return ++threads_[me_].now[static_cast<std::size_t>(me_)]; }
  static std::uint64_t latest(const void* where, std::size_t size) {
    std::uint64_t value = 0;
    std::memcpy(&value, where, size);
    return value;
  }
  static void set(void* where, std::size_t size, std::uint64_t value) { std::memcpy(where, &value, size); }

  location& at(const void* where, std::size_t size) {
    location& l = locations_[where];
    if (l.buried == round_ + 1) fail("nobody touches memory that is gone");
    if (l.round != round_ + 1) {
      l.round = round_ + 1;
      l.stores.assign(1, stored{latest(where, size), {}});
      for (auto& k : l.known) k.clear();
    }
    return l;
  }

  void begin(std::memory_order order) {
    if (order == std::memory_order_seq_cst) join(threads_[me_].now, sequentially_consistent_);
  }
  clock released_by(std::memory_order order) {
    thread& t = threads_[me_];
    if (!releases(order)) return t.fenced;
    tick();
    return t.now;
  }

  /// What a thread has stored or read hides what is older from everybody whom it happened before.
  std::size_t oldest_visible(const location& l) const {
    std::size_t oldest = 0;
    for (std::size_t t = 0; t < max_threads; ++t) {
      for (std::size_t i = l.known[t].size(); i-- != 0;) {
        if (l.known[t][i].time > threads_[me_].now[t]) continue;
        oldest = std::max(oldest, l.known[t][i].index);
        break;
      }
    }
    return oldest;
  }

  std::uint64_t read(location& l, std::size_t i, std::memory_order order) {
    thread& t = threads_[me_];
    join(acquires(order) ? t.now : t.unfenced, l.stores[i].released);
    l.known[static_cast<std::size_t>(me_)].push_back({tick(), i});
    if (order == std::memory_order_seq_cst) join(sequentially_consistent_, t.now);
    return l.stores[i].value;
  }

  void write(location& l, std::uint64_t value, const clock& released, std::memory_order order) {
    // The store happens at the time that it releases, so that who acquires it knows it.
    const std::uint32_t time = threads_[me_].now[static_cast<std::size_t>(me_)];
    l.known[static_cast<std::size_t>(me_)].push_back({time, l.stores.size()});
    l.stores.push_back({value, released});
    tick();
    if (order == std::memory_order_seq_cst) join(sequentially_consistent_, threads_[me_].now);
  }

  int other() {
    std::array<int, max_threads> candidates{};
    std::size_t n = 0;
    for (int i = 0; i < alive_; ++i) {
      if (!threads_[i].ended) candidates[n++] = i;
    }
    return candidates[random_.below(n)];
  }

  static void fiber_main() {
    scheduler& s = all();
    const int i = s.me_;
    s.body_(s.context_, i);
    s.threads_[i].ended = true;
  }

  std::uint64_t seed_ = 0;
  unsigned round_ = 0;  ///< of a program; a location's is one more
  small_random random_{0};
  std::uint64_t switch_odds_ = 2;
  int steps_ = 0;
  std::uint64_t operations_ = 0;
  bool running_ = false;
  int me_ = 0;
  int alive_ = 0;
  thread threads_[max_threads];
  clock sequentially_consistent_{};
  std::unordered_map<const void*, location> locations_;

  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  ucontext_t home_;
  ucontext_t contexts_[max_threads];
  alignas(64) unsigned char stacks_[max_threads][1 << 17];
};

}  // namespace model

namespace std {

/// What the library's headers get when they say std::atomic. As large as T, and valid in zeroed memory.
template <class T>
class model_atomic {
  static_assert(sizeof(T) <= sizeof(uint64_t) && is_trivially_copyable_v<T>);

 public:
  static constexpr bool is_always_lock_free = true;

  constexpr model_atomic() noexcept : value_() {}
  constexpr model_atomic(T value) noexcept : value_(value) {}
  model_atomic(const model_atomic&) = delete;
  model_atomic& operator=(const model_atomic&) = delete;

  T load(memory_order o) const noexcept { return typed(all().load(&value_, sizeof(T), o)); }
  void store(T value, memory_order o) noexcept { all().store(&value_, sizeof(T), bits(value), o); }
  T exchange(T value, memory_order o) noexcept {
    return change([&](T) { return value; }, o);
  }
  T fetch_add(T n, memory_order o) noexcept {
    return change([&](T old) { return static_cast<T>(old + n); }, o);
  }
  T fetch_sub(T n, memory_order o) noexcept {
    return change([&](T old) { return static_cast<T>(old - n); }, o);
  }
  T fetch_or(T n, memory_order o) noexcept {
    return change([&](T old) { return static_cast<T>(old | n); }, o);
  }
  T fetch_and(T n, memory_order o) noexcept {
    return change([&](T old) { return static_cast<T>(old & n); }, o);
  }
  bool compare_exchange_strong(T& expected, T value, memory_order o, memory_order = memory_order_relaxed) noexcept {
    const uint64_t wanted = bits(expected);
    const uint64_t old =
        all().modify(&value_, sizeof(T), o, [&](uint64_t& v) { return v == wanted && (v = bits(value), true); });
    expected = typed(old);
    return old == wanted;
  }
  bool compare_exchange_weak(T& expected, T value, memory_order o, memory_order f = memory_order_relaxed) noexcept {
    return compare_exchange_strong(expected, value, o, f);
  }

 private:
  static model::scheduler& all() noexcept { return model::scheduler::all(); }
  static uint64_t bits(T value) noexcept {
    uint64_t b = 0;
    memcpy(&b, &value, sizeof(T));
    return b;
  }
  static T typed(uint64_t b) noexcept {
    T value;
    memcpy(&value, &b, sizeof(T));
    return value;
  }
  template <class F>
  T change(F f, memory_order o) noexcept {
    return typed(all().modify(&value_, sizeof(T), o, [&](uint64_t& v) {
      v = bits(f(typed(v)));
      return true;
    }));
  }

  T value_;
};

}  // namespace std

#define atomic model_atomic

/// std::this_thread::yield() lets another fiber run, not another program of a busy machine.
extern "C" inline int sched_yield() noexcept {
  model::scheduler::all().yield();
  return 0;
}
