// SPDX-License-Identifier: MIT
#pragma once

// Runs a small program with threads: every execution of it under the model checker, many with random pauses as an
// ordinary test. See README.md.
//
// A program is a class:
//   static constexpr int threads, rounds;     threads besides main; rounds of an ordinary test
//   void prepare();                           by main, before the threads start
//   void thread(int i);                       i = 1 .. threads, one thread each; 0: main's part, at the same time
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
#include <cstdio>
#include <cstdlib>
#endif

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include <pthread.h>

#if MODEL_CHECKER
#include <genmc.h>
#else
#include <sched.h>

#include "support/threads.hpp"
#endif

namespace model {

#if MODEL_CHECKER

/// The checker must not see which object this is, or it tries to run memset on it, and fails.
[[clang::optnone, gnu::noinline]] inline void* hide(void* p) { return p; }

inline thread_local int pretended = -1;
/// The calling thread: 0 is main.
inline int me() { return pretended >= 0 ? pretended : static_cast<int>(pthread_self()); }

inline void assume(bool condition) { __VERIFIER_assume(condition); }
inline void check(bool condition, const char* what) {
  if (!condition) __VERIFIER_assert_fail(what, "", 0);
}
inline void pause() {}

/// Cuts off the executions in which the condition does not hold.
template <class Condition>
void wait_until(Condition condition) {
  assume(condition());
}

#else

inline thread_local small_random pauses{0};

inline void check(bool condition, const char* what) {
  if (condition) return;
  std::printf("ERROR: it is wrong that %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

/// Nothing, often; sometimes up to some hundred cycles.
inline void pause() {
  const std::uint64_t n = pauses.below(8);
  if (n < 5) return;
  for (std::uint64_t i = pauses.below(1U << (2 * n - 6)); i != 0; --i) asm volatile("" ::: "memory");
}

template <class Condition>
void wait_until(Condition condition) {
  for (int i = 0; !condition(); ++i) {
    if (i > 100) ::sched_yield();
  }
}

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

/// True if a thread sleeps whom nobody has woken. Precondition: no other thread is left that could.
inline bool lost() {
  return slept.load(std::memory_order_acquire) == wakes.load(std::memory_order_relaxed) + 1;
}

/// Something that a grace period protects: plain memory, so that a race on it is one. The reads and the destruction are
/// functions of their own, or the compiler could move them.
class object {
 public:
  [[gnu::noinline]] bool alive() const { return value_ == 1; }
  [[gnu::noinline]] void destroy() { value_ = 2; }
  [[gnu::noinline]] void renew() { value_ = 1; }

 private:
  int value_ = 1;
};

template <class Program>
constexpr int joined() {
  if constexpr (requires { Program::joined; }) {
    return Program::joined;
  } else {
    return Program::threads;
  }
}

#if MODEL_CHECKER

/// Attaches threads 0 .. n to a domain before they exist: so that what follows is about the domain, and not about
/// attaching.
template <class Domain>
void attach_all(Domain& d, int n) {
  for (int i = 0; i <= n; ++i) {
    pretended = i;
    static_cast<void>(d.attach_this_thread());
  }
  pretended = -1;
}

template <class Program>
inline Program* running;
template <class Program, int I>
void* thread_main(void*) {
  running<Program>->thread(I);
  return nullptr;
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
  if constexpr (joined<Program>() != Program::threads) check(!lost(), "a sleeper is woken");
  p.finish();
  return 0;
}

#else

template <class Domain>
void attach_all(Domain&, int) {}

/// Rounds: main makes a program, everybody runs their part, main looks at the outcome.
template <class Program>
class rounds {
 public:
  int run() {
    const char* const given = std::getenv("MMUNOTIFY_SEED");
    seed_ = given != nullptr ? std::strtoull(given, nullptr, 0) : 1;
    std::printf("MMUNOTIFY_SEED=%llu\n", static_cast<unsigned long long>(seed_));
    pthread_t threads[Program::threads];
    for (pthread_t& t : threads) {
      if (::pthread_create(&t, nullptr, &thread_main, this) != 0) return 1;
    }
    pauses = small_random(seed_);
    const int n = MMUNOTIFY_TSAN ? Program::rounds / 10 : Program::rounds;
    for (int i = 0; i < n; ++i) {
      Program* const p = new (memory_) Program;
      p->prepare();
      arrived_.store(0, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
      p->thread(0);
      wait_until([&] {
        const int arrived = arrived_.load(std::memory_order_acquire);
        if (arrived >= joined<Program>() && arrived < Program::threads) check(!lost(), "a sleeper is woken");
        return arrived == Program::threads;
      });
      p->finish();
      p->~Program();
    }
    stopping_.store(true, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    for (pthread_t t : threads) ::pthread_join(t, nullptr);
    std::printf("%d rounds\n", n);
    return 0;
  }

 private:
  static void* thread_main(void* argument) {
    auto& all = *static_cast<rounds*>(argument);
    const int index = all.next_index_.fetch_add(1, std::memory_order_relaxed);
    pauses = small_random(all.seed_ + static_cast<std::uint64_t>(index));
    for (std::uint32_t round = 1;; ++round) {
      wait_until([&] { return all.round_.load(std::memory_order_acquire) == round; });
      if (all.stopping_.load(std::memory_order_relaxed)) return nullptr;
      pause();
      std::launder(reinterpret_cast<Program*>(all.memory_))->thread(index);
      all.arrived_.fetch_add(1, std::memory_order_release);
    }
  }

  std::uint64_t seed_ = 1;
  std::atomic<int> next_index_{1};
  std::atomic<std::uint32_t> round_{0};
  std::atomic<int> arrived_{0};
  std::atomic<bool> stopping_{false};
  alignas(Program) unsigned char memory_[sizeof(Program)];
};

template <class Program>
int run() {
  static rounds<Program> all;
  return all.run();
}

#endif

}  // namespace model
