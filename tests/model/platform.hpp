// SPDX-License-Identifier: MIT
#pragma once

// What the programs of this folder run sync/ on. The headers are the ones that ship; the platform policy is one of two.
//
// Under the model checker: fences, threads and memory that it understands, and everything small.
//   Fences. A heavy fence interrupts every other thread and makes it fence. So each thread has a word; a light fence
//   is a read-modify-write (acq_rel) of the own word, a heavy one of every thread's. A light and a heavy fence are
//   thereby ordered, one way or the other, and two light ones are not. With -DMODEL_FENCES=2 both are seq_cst fences
//   instead: stronger, since light ones order each other, and weaker, since seq_cst fences order only through what is
//   read. What is right has to be right under both.
//   Waiting. relax() and yield() cut off the executions in which there is something to wait for: the others, in which
//   the wait was over at the first look, stand for them.
//
// As an ordinary test: the platform for Linux with fewer slots, and random pauses where threads meet.
//
// In both, a sleep is a wait for a wake-up that is counted, so that a sleeper who is lost is a finding and no hang.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <pthread.h>

#include <mmunotify/config.hpp>
#include <mmunotify/sync/linux/platform.hpp>

#include "model.hpp"

namespace model {

#if MODEL_CHECKER

/// Threads: how many besides main. Spins: 1, so that a grace period waits; 0, so that it sleeps.
template <int Threads, int Spins = 1>
struct platform {
  static constexpr std::uint32_t slots = 4;
  static constexpr std::size_t cells = 1;
  static constexpr int spins = Spins;

  static bool heavy_available() noexcept { return true; }
  static void light() noexcept {
#if MODEL_FENCES == 2
    std::atomic_thread_fence(std::memory_order_seq_cst);
#else
    interrupts[me()].fetch_add(1, std::memory_order_acq_rel);
#endif
  }
  static void heavy() noexcept {
    std::atomic_thread_fence(std::memory_order_seq_cst);
#if MODEL_FENCES != 2
    for (int i = 0; i <= Threads; ++i) {
      if (i != me()) interrupts[i].fetch_add(1, std::memory_order_acq_rel);
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
  }
  static void full() noexcept {
#if MODEL_FENCES != 2
    light();
#endif
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }
  static void relax() noexcept { assume(false); }
  static void yield() noexcept { assume(false); }

  static void wait(const std::atomic<std::uint32_t>& word, std::uint32_t value) noexcept { sleep_while(word, value); }
  static void wake(const std::atomic<std::uint32_t>&) noexcept { wake_all(); }

  static std::byte* allocate_slab(std::size_t bytes) noexcept {
    check(bytes <= sizeof slabs[0], "a slab fits");
    return slabs[me()];
  }
  static void clear_slab(std::byte*, std::size_t) noexcept {}

  using exit_key = int;
  static bool create_exit_key(exit_key&, void (*f)(void*)) noexcept {
    at_thread_exit = f;
    return true;
  }
  static void* exit_value(exit_key) noexcept { return exit_values[me()]; }
  static bool set_exit_value(exit_key, void* value) noexcept {
    exit_values[me()] = value;
    return true;
  }
  /// What the system does when a thread ends.
  static void exit_thread() noexcept { at_thread_exit(exit_values[me()]); }

  struct signal_guard {
    signal_guard() noexcept {}
    ~signal_guard() {}
  };

  template <class Tag, class T>
  static T& own() noexcept {
    return own_variables<Tag, T>[me()];
  }

  /// Not pthread's, whose try_lock crashes the checker.
  class mutex {
   public:
    constexpr mutex() noexcept = default;
    void lock() noexcept { assume(try_lock()); }
    bool try_lock() noexcept {
      bool free = false;
      return locked_.compare_exchange_strong(free, true, std::memory_order_acquire, std::memory_order_relaxed);
    }
    void unlock() noexcept { locked_.store(false, std::memory_order_release); }

   private:
    std::atomic<bool> locked_{false};
  };

  static std::uintptr_t self() noexcept { return static_cast<std::uintptr_t>(me() + 1); }
  using thread = pthread_t;
  static bool start_thread(thread&, void* (*)(void*), void*) noexcept { return false; }
  static void join(thread) noexcept {}
  static bool at_fork(void (*)(), void (*)(), void (*)()) noexcept { return true; }
  static bool at_exit(void (*)()) noexcept { return true; }

 private:
  alignas(64) static inline std::byte slabs[Threads + 1][256];
  static inline std::atomic<int> interrupts[Threads + 1];
  static inline void* exit_values[Threads + 1];
  static inline void (*at_thread_exit)(void*);
  template <class Tag, class T>
  static inline T own_variables[Threads + 1];
};

#else

template <int Threads, int Spins = 1>
struct platform : mmunotify::linux_platform {
  static constexpr std::uint32_t slots = 8;
  static constexpr std::size_t cells = 1;
  static constexpr int spins = Spins != 0 ? 100 : 0;

  static void full() noexcept {
    linux_platform::full();
    pause();
  }
  static void wait(const std::atomic<std::uint32_t>& word, std::uint32_t value) noexcept { sleep_while(word, value); }
  static void wake(const std::atomic<std::uint32_t>&) noexcept { wake_all(); }
  static void exit_thread() noexcept {}
};

#endif

}  // namespace model
