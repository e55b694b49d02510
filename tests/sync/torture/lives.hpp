// SPDX-License-Identifier: MIT
#pragma once

// Threads that are born and die, domains that are made and destroyed, processes that fork, and signals (S8).

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <mmunotify/sync/rcu.hpp>

#include "sync/torture/arena.hpp"
#include "sync/torture/phase.hpp"

namespace torture {

inline constexpr std::size_t no_index = 99;  ///< of threads that have no ledger

/// Gives the calling thread its state. Returns: nullptr if all are in use.
inline thread_state* enter(const char* name, std::size_t index, std::uint64_t seed) noexcept {
  for (auto& t : threads) {
    bool expected = false;
    if (!t.used.compare_exchange_strong(expected, true, std::memory_order_acquire)) continue;
    t.name = name;
    t.index = index;
    t.handle = ::pthread_self();
    t.random = small_random(seed);
    t.handler_random = small_random(seed + 1);
    self = &t;
    return &t;
  }
  return nullptr;
}
inline void leave() noexcept {
  self->what.store(nullptr, std::memory_order_relaxed);
  self->used.store(false, std::memory_order_release);
  self = nullptr;
}

// --- Threads.
// -----------------------------------------------------------------------------------------------------------

/// A thread that attaches, reads, and exits at once, right behind its last section: whoever waits for that one is about
/// to look at a word that goes away. Its stack is larger than what glibc keeps, so that it is unmapped.
class visitor {
 public:
  bool start(std::uint64_t seed) noexcept {
    seed_ = seed;
    pthread_attr_t attributes;
    ::pthread_attr_init(&attributes);
    ::pthread_attr_setstacksize(&attributes, std::size_t{64} << 20);
    running_ = ::pthread_create(&thread_, &attributes, &main, this) == 0;
    ::pthread_attr_destroy(&attributes);
    return running_;
  }
  void join() noexcept {
    if (running_) ::pthread_join(thread_, nullptr);
    running_ = false;
  }

 private:
  /// Sections in destructors of thread_local objects.
  struct late {
    any_arena* where = nullptr;
    ~late() {
      if (where == nullptr) return;
      where->read_one();
      for (any_arena* a : arenas) a->end_handoffs();
      leave();
    }
  };

  static void* main(void* argument) {
    auto& v = *static_cast<visitor*>(argument);
    if (enter("visitor", no_index, v.seed_) == nullptr) return nullptr;
    thread_local late last;
    for (std::uint64_t i = self->random.below(6); i > 0; --i) some_arena().read_one();
    if (self->random.below(2) == 0) {
      last.where = &some_arena();
      return nullptr;
    }
    for (any_arena* a : arenas) a->end_handoffs();  // nobody else may be there to do it
    some_arena().read_last();
    leave();
    return nullptr;
  }

  pthread_t thread_{};
  bool running_ = false;
  std::uint64_t seed_ = 0;
};

struct visitors {
  std::array<visitor, 3> all;
  std::size_t next = 0;

  void one() {
    visitor& v = all[next++ % all.size()];
    v.join();
    if (!v.start(self->random())) std::this_thread::yield();
    self->completed.add();
    self->note(count::thread);
  }
  void finish() {
    for (auto& v : all) v.join();
  }
};

// --- Domains.
// -----------------------------------------------------------------------------------------------------------

/// A domain for a moment, in a slot that others have used, with a reader and callbacks that its destructor has to run.
inline void nomad() {
  mmunotify::srcu_options o;
  o.isolated = self->random.below(4) == 0;
  auto d = std::make_unique<mmunotify::srcu_domain>(o);
  if (d->status() != mmunotify::errc::ok) fail("there is no slot for a domain");

  struct object : mmunotify::rcu_obj_base<object> {
    explicit object(std::atomic<std::uint64_t>& d) : dead(d) { alive.fetch_add(1, std::memory_order_relaxed); }
    ~object() { dead.fetch_add(1, std::memory_order_relaxed); }
    std::atomic<std::uint64_t> alive{0};
    std::atomic<std::uint64_t>& dead;
  };
  std::atomic<std::uint64_t> dead{0};
  std::atomic<object*> current{new object(dead)};
  std::atomic<bool> over{false};
  std::thread reader([&, seed = self->random()] {
    small_random random(seed);
    do {
      const mmunotify::read_section s(*d);
      const object* const x = current.load(std::memory_order_acquire);
      if (x->alive.load(std::memory_order_relaxed) != 1)
        fail("S1: a reader of a short-lived domain found a freed object");
      relax(random.below(200));
      if (random.below(4) == 0) std::this_thread::yield();
    } while (!over.load(std::memory_order_relaxed));
  });
  const std::uint64_t rounds = self->random.below(20);
  for (std::uint64_t i = 0; i < rounds; ++i) {
    object* const old = current.exchange(new object(dead), std::memory_order_acq_rel);
    if (self->random.below(4) == 0) {
      d->synchronize();
      delete old;
    } else if (old->retire({}, *d) != mmunotify::errc::ok) {
      fail("retire was refused by a domain without a bound");
    }
  }
  over.store(true, std::memory_order_relaxed);
  reader.join();
  {
    const in_flight f("the destructor of a domain", "nomads");
    d.reset();
  }
  if (dead.load(std::memory_order_relaxed) != rounds)
    fail("S4: a domain was destroyed, and callbacks of it have not run");
  delete current.load(std::memory_order_relaxed);
  self->note(count::nomad);
}

// --- fork.
// --------------------------------------------------------------------------------------------------------------

/// Forks while other threads are inside their sections, and this one, now and then, in one of its own. The child uses
/// every domain and exits. See has_forks.
inline void fork_one() {
  static auto* const step = [] {
    void* const p =
        ::mmap(nullptr, sizeof(std::atomic<std::uint64_t>), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) fail("there is no memory for a page");
    return new (p) std::atomic<std::uint64_t>{0};
  }();
  step->store(0, std::memory_order_relaxed);
  handoff_gate.closed.store(true, std::memory_order_seq_cst);
  while (handoff_gate.open.load(std::memory_order_seq_cst) != 0) std::this_thread::yield();

  pid_t child = -1;
  any_arena& held = some_arena();
  const auto split = [&] {
    child = ::fork();
    if (child != 0) return;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    is_child.store(true, std::memory_order_relaxed);
    for (any_arena* a : arenas) {
      if (a != &held) a->use_in_child(*step);
    }
  };
  if (self->random.below(4) == 0) {
    held.inside(split);
  } else {
    split();
  }
  if (child == 0) {
    held.use_in_child(*step);
    ::_exit(0);
  }
  handoff_gate.closed.store(false, std::memory_order_seq_cst);
  if (child < 0) return std::this_thread::yield();

  in_flight f("a forked child", arenas[0]->arena_name());
  std::uint64_t seen = 0;
  int status = 0;
  for (pid_t p = 0; p != child; p = ::waitpid(child, &status, WNOHANG)) {
    if (p < 0 && errno != EINTR) fail("waitpid failed");
    const std::uint64_t now = step->load(std::memory_order_relaxed);
    if (now != seen)
      f.advance(arenas[std::min<std::size_t>(now / any_arena::steps_in_child, arenas.size() - 1)]->arena_name());
    seen = now;
    doze();
  }
  if (status != 0) fail("S8: a forked child died with status %#x", static_cast<unsigned>(status));
  self->note(count::fork);
}

// --- Signals.
// -----------------------------------------------------------------------------------------------------------

/// A section wherever the thread happens to be; and now and then a long stop there, which no scheduler would make.
inline void on_signal(int) {
  if (self == nullptr) return;
  const int saved = errno;
  auto& random = self->handler_random;
  arenas[random.below(arenas.size())]->read_in_handler_one();
  if (random.below(4) == 0) {
    for (std::uint64_t i = random.below(8); i > 0; --i) ::sched_yield();
  }
  errno = saved;
}

inline void send_signal() noexcept {
  std::array<thread_state*, threads.size()> targets{};
  std::size_t n = 0;
  for (auto& t : threads) {
    if (t.takes_signals.load(std::memory_order_acquire)) targets[n++] = &t;
  }
  if (n == 0) return doze();
  for (int i = 0; i < 16; ++i) {
    ::pthread_kill(targets[self->random.below(n)]->handle, SIGUSR1);
    if (self->random.below(4) == 0) std::this_thread::yield();
  }
  self->completed.add();
  if (self->random.below(4) == 0) doze();
}

/// A broken library may look at memory that is gone.
inline void on_fault(int) {
  fail("S8: a memory fault: somebody looked at the word of a thread that is gone, or at a freed node");
}

inline void install_handlers() noexcept {
  struct sigaction a {};
  a.sa_handler = &on_signal;
  a.sa_flags = SA_RESTART;
  ::sigaction(SIGUSR1, &a, nullptr);
#if !TORTURE_ASAN && !MMUNOTIFY_TSAN
  a.sa_handler = &on_fault;
  ::sigaction(SIGSEGV, &a, nullptr);
  ::sigaction(SIGBUS, &a, nullptr);
#endif
}

}  // namespace torture
