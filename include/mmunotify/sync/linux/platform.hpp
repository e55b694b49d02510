// SPDX-License-Identifier: MIT
#pragma once

// The platform policy of sync/ for Linux: asymmetric fences over membarrier(2), futex sleep, slab memory, thread exit.
//
// Asymmetric fences. A light fence is free: it only stops the compiler. A heavy fence makes every other thread of the
// process execute a full fence somewhere between its start and its return. A light and a heavy fence order each other
// as two sequentially consistent fences would; two light ones order nothing (P1202R5). Readers run light, grace
// periods heavy.
//
// Everything that sync/ needs from outside the C++ memory model goes through this policy, so that a model checker can
// instantiate the very same headers with fences it understands. A platform provides:
//   heavy_available()   may heavy() be used? Decided once. If not, readers use full() instead of light().
//   light() heavy() full() relax()
//   wait(word, value)   sleeps while word == value, may return early; wake(word) wakes all sleepers
//   wait_for(word, value, ns)   the same, for about so long at most, less than a second
//   rest_ns, many       for how long the worker lets callbacks collect, after a round with so many
//   slots, cells        how many domains there can be at a time, and how many open brackets a thread can have
//   spins, expedited_spins   how often a grace period looks, with relax() between, before it sleeps
//   allocate_slab(n)    n zeroed bytes, committed on first touch; nullptr if there are none; never given back
//   clear_slab(p, n)    zeroes it again
//   create_exit_key(f), exit_value(key), set_exit_value(key, v)   a per-thread pointer, and f(v) when the thread exits
//   class signal_guard  blocks signals, so that a handler never sees half an attachment
//   own<Tag, T>()       a variable of the calling thread's own, constant-initialised
//   mutex               lock, try_lock, unlock; constinit; may be made anew over a locked one in a forked child
//   self()              a number that no other living thread has, never 0
//   thread, start_thread(t, f, argument), join(t), yield()
//   at_fork(prepare, parent, child), at_exit(f)   f also when the shared object that asked is unloaded
//
// Cost (2 vCPU Zen 4 guest): light 0, heavy 0.5 us on an idle machine and 4-9 us when other threads run.
// Registration with the kernel takes 13-17 ms once a second thread exists: so it is done in a static initialiser.

#include <atomic>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <mutex>

#include <linux/futex.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

struct linux_platform {
  static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

  /// Read-section slots: the number of domains that can exist at a time in one process.
  static constexpr std::uint32_t slots = 1U << 16;
  static constexpr std::size_t cells = 4096;
  static constexpr int spins = 200;               ///< about 2 us of relax() before a grace period sleeps
  static constexpr int expedited_spins = 10'000;  ///< about 100 us
  static constexpr std::uint32_t rest_ns = 200'000;
  static constexpr std::size_t many = 32;

  /// Returns: true if the kernel grants private expedited membarriers to this process. Registers on the first call.
  static bool heavy_available() noexcept {
    static const bool available = [] {
      const long commands = ::syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
      return commands > 0 && (commands & MEMBARRIER_CMD_PRIVATE_EXPEDITED) != 0 &&
             ::syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0;
    }();
    return available;
  }

  static void light() noexcept { asm volatile("" ::: "memory"); }

  /// Precondition: heavy_available(). A membarrier that fails after it was granted cannot be survived.
  static void heavy() noexcept {
    if (::syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) != 0) [[unlikely]] {
      detail::violated("S1", "linux_platform::heavy", "membarrier failed with errno %d after it was granted", errno);
      std::abort();
    }
  }

  /// An ordinary full fence: (pf1) pairs with itself in other threads, and with heavy().
  static void full() noexcept {
#if defined(__x86_64__)
    // A locked instruction on the own stack: a full fence at a third of the cost of mfence; and gcc refuses
    // atomic_thread_fence under ThreadSanitizer.
    asm volatile("lock; orq $0, -8(%%rsp)" ::: "memory", "cc");
#elif defined(__aarch64__)
    asm volatile("dmb ish" ::: "memory");
#else
    std::atomic_thread_fence(std::memory_order_seq_cst);  // (pf1)
#endif
  }

  static void relax() noexcept {
#if defined(__x86_64__)
    asm volatile("pause" ::: "memory");
#elif defined(__aarch64__)
    asm volatile("yield" ::: "memory");
#endif
  }

  static void wait(const std::atomic<std::uint32_t>& word, std::uint32_t value) noexcept {
    const int saved = errno;
    ::syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
    errno = saved;
  }

  static void wait_for(const std::atomic<std::uint32_t>& word, std::uint32_t value, std::uint32_t ns) noexcept {
    const int saved = errno;
    const timespec most{.tv_sec = 0, .tv_nsec = static_cast<long>(ns)};
    ::syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, &most, nullptr, 0);
    errno = saved;
  }

  static void wake(const std::atomic<std::uint32_t>& word) noexcept {
    const int saved = errno;
    ::syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    errno = saved;
  }

  static std::byte* allocate_slab(std::size_t bytes) noexcept {
    void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    ::madvise(p, bytes, MADV_NOHUGEPAGE);  // one touched word must not commit 2 MiB
    return static_cast<std::byte*>(p);
  }

  /// Whole pages are given back, so a slab that was hardly used costs nothing.
  static void clear_slab(std::byte* slab, std::size_t bytes) noexcept {
    const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
    const auto begin = reinterpret_cast<std::uintptr_t>(slab);
    const std::uintptr_t first = (begin + page - 1) & ~(page - 1);
    const std::uintptr_t last = (begin + bytes) & ~(page - 1);
    if (first < last && ::madvise(slab + (first - begin), last - first, MADV_DONTNEED) == 0) {
      std::memset(slab, 0, first - begin);
      std::memset(slab + (last - begin), 0, begin + bytes - last);
    } else {
      std::memset(slab, 0, bytes);
    }
  }

  using exit_key = pthread_key_t;

  /// pthread keys, because their destructors run after those of thread_local objects, which may still use a section.
  static bool create_exit_key(exit_key& key, void (*at_exit)(void*)) noexcept {
    return ::pthread_key_create(&key, at_exit) == 0;
  }
  static void* exit_value(exit_key key) noexcept { return ::pthread_getspecific(key); }
  static bool set_exit_value(exit_key key, void* value) noexcept { return ::pthread_setspecific(key, value) == 0; }

  class signal_guard {
   public:
    signal_guard() noexcept {
      sigset_t all;
      ::sigfillset(&all);
      // Those that a thread sends to itself by what it does: blocked, they would kill it without its handler.
      for (const int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) ::sigdelset(&all, s);
      ::pthread_sigmask(SIG_SETMASK, &all, &saved_);
    }
    ~signal_guard() { ::pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }
    signal_guard(const signal_guard&) = delete;
    signal_guard& operator=(const signal_guard&) = delete;

   private:
    sigset_t saved_;
  };

  /// A variable of the calling thread's own, one for each tag.
  template <class Tag, class T>
  [[gnu::always_inline]] static T& own() noexcept {
    return own_variable<Tag, T>;
  }

  using mutex = std::mutex;

  static std::uintptr_t self() noexcept { return static_cast<std::uintptr_t>(::pthread_self()); }
  static void yield() noexcept { ::sched_yield(); }

  using thread = pthread_t;

  /// Effects: runs f(argument) in a thread that takes no signals, and inherits neither the caller's priority nor the
  /// processors that the caller was bound to. Returns: false if the system has no thread left.
  static bool start_thread(thread& t, void* (*f)(void*), void* argument) noexcept {
    pthread_attr_t attributes;
    if (::pthread_attr_init(&attributes) != 0) return false;
    ::pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
    cpu_set_t processors;
    if (::sched_getaffinity(::getpid(), sizeof processors, &processors) == 0) {  // those of the main thread
      ::pthread_attr_setaffinity_np(&attributes, sizeof processors, &processors);
    }
    const signal_guard inherited;
    const bool started = ::pthread_create(&t, &attributes, f, argument) == 0;
    ::pthread_attr_destroy(&attributes);
    return started;
  }
  static void join(thread t) noexcept { ::pthread_join(t, nullptr); }

  static bool at_fork(void (*prepare)(), void (*parent)(), void (*child)()) noexcept {
    return ::pthread_atfork(prepare, parent, child) == 0;
  }
  static bool at_exit(void (*f)()) noexcept { return std::atexit(f) == 0; }

 private:
  template <class Tag, class T>
  [[gnu::tls_model("initial-exec")]] static constinit inline thread_local T own_variable{};
};

namespace detail {
/// Registers while the process is most likely single-threaded (see the cost above).
inline const bool membarrier_registered_early = linux_platform::heavy_available();
}  // namespace detail

MMUNOTIFY_END_NAMESPACE
