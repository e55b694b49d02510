// SPDX-License-Identifier: MIT
#pragma once

// What the programs of this folder run sync/ on: the headers are the ones that ship, the platform policy is this one.
//
// Fences. A heavy fence interrupts every other thread and makes it fence. So each thread has a word; a light fence is a
// read-modify-write (acq_rel) of the own word, a heavy one of every thread's. A light and a heavy fence are thereby
// ordered, one way or the other, and two light ones are not. With -DMODEL_FENCES=2 both are seq_cst fences instead:
// stronger, since light ones order each other, and weaker, since seq_cst fences order only through what is read. What
// is right has to be right under both. Sleep is a wait for a wake-up that is counted, so that a sleeper who is lost is
// a finding and no hang. Everything is small.

#include "model.hpp"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

#include <mmunotify/sync/linux/platform.hpp>

namespace model {

/// Threads: how many besides main. Spins: 1, so that a grace period waits; 0, so that it sleeps. Worker: there is one,
/// a thread of the program's that calls run_worker().
template <int Threads, int Spins = 1, bool Worker = false>
struct platform {
  static constexpr std::uint32_t slots = 4;
  static constexpr std::size_t cells = 1;
  static constexpr int spins = Spins;
  static constexpr int expedited_spins = Spins;
  static constexpr std::uint32_t rest_ns = 1;
  static constexpr std::size_t many = 1;

  static bool heavy_available() noexcept { return true; }
  static void light() noexcept {
#if MODEL_FENCES == 2
    full_fence();
#else
    interrupts[me()].fetch_add(1, std::memory_order_acq_rel);
#endif
  }
  static void heavy() noexcept {
    full_fence();
#if MODEL_FENCES != 2
    for (int i = 0; i <= Threads; ++i) {
      if (i != me()) interrupts[i].fetch_add(1, std::memory_order_acq_rel);
    }
    full_fence();
#endif
  }
  static void full() noexcept {
#if MODEL_FENCES != 2
    light();
#endif
    full_fence();
  }
  static void relax() noexcept { wait_a_little(); }
  static void yield() noexcept { wait_a_little(); }

  static void wait(const std::atomic<std::uint32_t>& word, std::uint32_t value) noexcept { sleep_while(word, value); }
  /// As if it were for ever: who depends on the time is lost.
  static void wait_for(const std::atomic<std::uint32_t>& word, std::uint32_t value, std::uint32_t) noexcept {
    sleep_while(word, value);
  }
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
  static void exit_thread() noexcept { at_thread_exit(std::exchange(exit_values[me()], nullptr)); }

  struct signal_guard {
    signal_guard() noexcept {}
    ~signal_guard() {}
  };

  template <class Tag, class T>
  static T& own() noexcept {
    return own_variables<Tag, T>[me()];
  }

  class mutex {
   public:
    constexpr mutex() noexcept = default;
    void lock() noexcept {
      wait_until([this] { return try_lock(); });
    }
    bool try_lock() noexcept {
      bool free = false;
      return locked_.compare_exchange_strong(free, true, std::memory_order_acquire, std::memory_order_relaxed);
    }
    void unlock() noexcept { locked_.store(false, std::memory_order_release); }

   private:
    std::atomic<bool> locked_{false};
  };

  static std::uintptr_t self() noexcept { return static_cast<std::uintptr_t>(me() + 1); }
  using thread = int;
  static bool start_thread(thread&, void* (*f)(void*), void* argument) noexcept {
    if (!Worker) return false;
    worker_main = f;
    worker_argument = argument;
    worker_state.store(1, std::memory_order_release);
    return true;
  }
  static void join(thread) noexcept {
    wait_until([] { return worker_state.load(std::memory_order_acquire) == 2; });
  }
  static void run_worker() noexcept {
    wait_until([] { return worker_state.load(std::memory_order_acquire) == 1; });
    worker_main(worker_argument);
    worker_state.store(2, std::memory_order_release);
  }
  static bool at_fork(void (*)(), void (*)(), void (*)()) noexcept { return true; }
  static bool at_exit(void (*f)()) noexcept {
    at_process_exit = f;
    return true;
  }
  /// What the system does when the process ends.
  static void exit_process() noexcept {
    at_process_exit();
    worker_state.store(0, std::memory_order_relaxed);
  }

 private:
  alignas(64) static inline std::byte slabs[Threads + 1][256];
  static inline std::atomic<int> interrupts[Threads + 1];
  static inline void* exit_values[Threads + 1];
  static inline void (*at_thread_exit)(void*);
  static inline void (*at_process_exit)();
  static inline void* (*worker_main)(void*);
  static inline void* worker_argument;
  static inline std::atomic<int> worker_state{0};  ///< 1: started, 2: ended
  template <class Tag, class T>
  static inline T own_variables[Threads + 1];
};

}  // namespace model
