// SPDX-License-Identifier: MIT
#pragma once

// Runs a small program with threads: every execution of it under the model checker, many random ones as an ordinary
// test. See README.md.
//
// A program is a class:
//   static constexpr int threads;             besides main
//   void prepare();                           by main, before the threads start
//   void thread(int i);                       i = 1 .. threads, one thread each; 0: main's part, at the same time
//   static constexpr unsigned rounds;         optional: of an ordinary test
//   static constexpr int joined;              optional: the threads behind 1 .. joined may sleep, and when the others
//                                             have ended, none may do so for ever
//   void finish();                            by main, after the threads
// and main() is `return model::run<program>();`.

// The checker's headers lack some names that config.hpp and the standard library want.
#if defined(__CONFIG_GENMC_INODE_DATA_SIZE)
#define MODEL_CHECKER 1
#include <cstdio>
#include <cstdlib>

using std::stderr;
extern "C" int snprintf(char*, unsigned long, const char*, ...);
namespace std {
using ::snprintf;
int rand();
}  // namespace std

// It cannot run these where it does not see what is copied. All that is copied here consists of words.
extern "C" [[gnu::used, clang::optnone, gnu::noinline]] inline void* memcpy(void* to, const void* from,
                                                                            unsigned long size) {
  for (unsigned long i = 0; i < size / 8; ++i)
    static_cast<unsigned long*>(to)[i] = static_cast<const unsigned long*>(from)[i];
  return to;
}
extern "C" [[gnu::used, clang::optnone, gnu::noinline]] inline void* memset(void* to, int, unsigned long size) {
  for (unsigned long i = 0; i < size / 8; ++i) static_cast<unsigned long*>(to)[i] = 0;
  return to;
}
#else
#define MODEL_CHECKER 0
#endif

#if MODEL_CHECKER
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include <genmc.h>
#include <pthread.h>
#else
#include "scheduler.hpp"
#endif

#include <mmunotify/config.hpp>

namespace model {

#if MODEL_CHECKER

/// The checker must not see which object this is, or it tries to run memset on it, and fails.
[[clang::optnone, gnu::noinline]] inline void* hide(void* p) { return p; }

inline thread_local int pretended = -1;
/// The calling thread: 0 is main.
inline int me() { return pretended >= 0 ? pretended : static_cast<int>(pthread_self()); }
inline void pretend(int i) { pretended = i; }

inline void full_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void check(bool condition, const char* what) {
  if (!condition) __VERIFIER_assert_fail(what, "", 0);
}

/// Cuts off the executions in which the condition does not hold at the first look: the others stand for them.
template <class Condition>
void wait_until(Condition condition) {
  __VERIFIER_assume(condition());
}
inline void wait_a_little() { __VERIFIER_assume(false); }
/// The variable's memory goes away: for the checker, a plain store to it, which races with whoever looks at it still.
template <class T>
void bury(std::atomic<T>& variable) {
  reinterpret_cast<T&>(variable) = T{};
}

/// Something that a grace period protects: plain memory, so that a race for it is one.
class object {
 public:
  bool alive() const { return value_ == 1; }
  void destroy() { value_ = 2; }
  void renew() { value_ = 1; }

 private:
  int value_ = 1;
};

#else

inline int me() { return scheduler::all().me(); }
inline void pretend(int i) { scheduler::all().pretend(i < 0 ? 0 : i); }

inline void full_fence() { scheduler::all().fence(); }
inline void check(bool condition, const char* what) {
  if (!condition) scheduler::all().fail(what);
}

template <class Condition>
void wait_until(Condition condition) {
  while (!condition()) scheduler::all().yield();
}
inline void wait_a_little() { scheduler::all().yield(); }
template <class T>
void bury(std::atomic<T>& variable) {
  scheduler::all().bury(&variable);
}

class object {
 public:
  bool alive() const {
    scheduler::all().access(accesses_, false);
    return value_ == 1;
  }
  void destroy() { set(2); }
  void renew() { set(1); }

 private:
  void set(int value) {
    scheduler::all().access(accesses_, true);
    value_ = value;
  }
  int value_ = 1;
  mutable scheduler::accesses accesses_;
};

#endif

/// Wake-ups so far, and one more than their number when a thread went to sleep for the next one.
inline std::atomic<std::uint32_t> wakes{0};
inline std::atomic<std::uint32_t> slept{0};

inline void sleep_while(const std::atomic<std::uint32_t>& word, std::uint32_t value) {
  // The kernel compares and goes to sleep at once; a wake-up between the two ends this sleep, too.
  const std::uint32_t seen = wakes.load(std::memory_order_acquire);
  if (word.load(std::memory_order_relaxed) != value) return;
  slept.store(seen + 1, std::memory_order_release);
  wait_until([seen] { return wakes.load(std::memory_order_acquire) != seen; });
}
inline void wake_all() { wakes.fetch_add(1, std::memory_order_release); }

/// Attaches threads 0 .. n to a domain before they run, so that what follows is about the domain and not about
/// attaching.
template <class Domain>
void attach_all(Domain& d, int n) {
  for (int i = 0; i <= n; ++i) {
    pretend(i);
    static_cast<void>(d.attach_this_thread());
  }
  pretend(-1);
}

#if MODEL_CHECKER

template <class Program>
inline Program* running;
template <class Program, int I>
void* thread_main(void*) {
  running<Program>->thread(I);
  return nullptr;
}

template <class Program>
constexpr int joined() {
  if constexpr (requires { Program::joined; }) {
    return Program::joined;
  } else {
    return Program::threads;
  }
}

template <class Program>
int run() {
  alignas(Program) static unsigned char memory[sizeof(Program)];
  Program& p = *new (hide(memory)) Program;
  running<Program> = &p;
  p.prepare();
  pthread_t threads[4];
  static_assert(Program::threads <= 3);
  pthread_create(&threads[1], nullptr, &thread_main<Program, 1>, nullptr);
  if constexpr (Program::threads >= 2) pthread_create(&threads[2], nullptr, &thread_main<Program, 2>, nullptr);
  if constexpr (Program::threads >= 3) pthread_create(&threads[3], nullptr, &thread_main<Program, 3>, nullptr);
  p.thread(0);
  if constexpr (joined<Program>() >= 1) pthread_join(threads[1], nullptr);
  if constexpr (joined<Program>() >= 2) pthread_join(threads[2], nullptr);
  if constexpr (joined<Program>() >= 3) pthread_join(threads[3], nullptr);
  if constexpr (joined<Program>() != Program::threads) {
    check(slept.load(std::memory_order_acquire) != wakes.load(std::memory_order_relaxed) + 1, "a sleeper is woken");
  }
  p.finish();
  return 0;
}

#else

/// MMUNOTIFY_SEED: the seed. MODEL_ROUNDS: how many rounds.
template <class Program>
int run() {
  const auto number = [](const char* name, std::uint64_t otherwise) {
    const char* const given = std::getenv(name);
    return given != nullptr ? std::strtoull(given, nullptr, 0) : otherwise;
  };
  const std::uint64_t seed = number("MMUNOTIFY_SEED", 1);
  unsigned rounds = 30'000;
  if constexpr (requires { Program::rounds; }) rounds = Program::rounds;
  rounds = static_cast<unsigned>(number("MODEL_ROUNDS", rounds));
  for (unsigned round = 0; round < rounds; ++round) {
    Program p;
    p.prepare();
    scheduler::all().run_round(seed, round, Program::threads, [&](int i) { p.thread(i); });
    p.finish();
  }
  std::printf("%u rounds, %llu operations, MMUNOTIFY_SEED=%llu\n", rounds,
              static_cast<unsigned long long>(scheduler::all().operations()), static_cast<unsigned long long>(seed));
  return 0;
}

#endif

}  // namespace model
