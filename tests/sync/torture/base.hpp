// SPDX-License-Identifier: MIT
#pragma once

// What every part of the torture needs: how it fails, what it counts, and how a hang becomes a sentence.
//
// Progress. Whoever does something that has to end says so (in_flight). A watcher counts ticks, and only such ticks in
// which somebody completed something: an operation that is still in flight after `patience` of them is stuck while
// everything else goes on. If nobody completes anything for as long, everything is stuck. Neither depends on how fast
// the machine is; the tick of 10 ms only paces the watcher.

#include <array>
#include <atomic>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <thread>

#include <pthread.h>
#include <unistd.h>

#include <mmunotify/config.hpp>

#include "support/threads.hpp"

#if defined(__SANITIZE_ADDRESS__)
#define TORTURE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TORTURE_ASAN 1
#endif
#endif
#ifndef TORTURE_ASAN
#define TORTURE_ASAN 0
#endif

namespace torture {

/// Sanitizers do not survive a fork beside threads: AddressSanitizer's allocator is left locked in the child, and
/// ThreadSanitizer starts no threads there.
inline constexpr bool has_forks = !TORTURE_ASAN && !MMUNOTIFY_TSAN;

/// What can be switched on and off, --only's words.
enum activity : std::uint32_t {
  readers = 1 << 0,
  updaters = 1 << 1,
  third = 1 << 2,
  lists = 1 << 3,
  barriers = 1 << 4,
  floods = 1 << 5,
  signals = 1 << 6,
  births = 1 << 7,
  forks = 1 << 8,
  nomads = 1 << 9,
  sleepers = 1 << 10,
  quiet = 1 << 11,
  everything = (1 << 12) - 1,
};
inline constexpr std::array<const char*, 12> activity_names{"readers",  "updaters", "third",    "lists",
                                                            "barriers", "floods",   "signals",  "births",
                                                            "forks",    "nomads",   "sleepers", "quiet"};

/// What is counted, and printed at the end.
enum class count : std::uint32_t {
  plain,
  nested,
  unordered,
  handed_over,
  ledger,
  slept,
  two_domains,
  in_handler,
  walk,
  synchronize,
  expedited,
  synchronize_all,
  polled,
  called,
  retired,
  retired_plain,
  mailed,
  cookie_in_section,
  called_again,
  refused,
  barrier,
  flooded,
  remove,
  remove_async,
  reinserted,
  thread,
  fork,
  nomad,
  sleeper,
  last_leaver,
  count,
};
inline constexpr std::array<const char*, static_cast<std::size_t>(count::count)> count_names{
    "plain sections",
    "nested sections",
    "unordered sections",
    "sections handed over",
    "sections with a ledger",
    "sections that slept",
    "sections in two domains",
    "sections in signal handlers",
    "list walks",
    "synchronize",
    "synchronize_expedited",
    "synchronize_all",
    "cookies polled",
    "callbacks",
    "rcu_obj_base::retire",
    "rcu_retire",
    "cookies to a third thread",
    "cookies from inside a section",
    "callbacks that called again",
    "calls refused (backlog)",
    "barriers",
    "callbacks in floods",
    "list removals",
    "asynchronous removals",
    "nodes reinserted by a callback",
    "threads born and gone",
    "forks",
    "domains born and gone",
    "sleepers",
    "last leavers"};

inline constexpr std::size_t stages = 10;  ///< an element is freed after so many grace periods
inline constexpr std::size_t bins = stages + 2;

/// A statistic of one thread, which others may read.
class counter {
 public:
  void add(std::uint64_t n = 1) noexcept { value_.store(get() + n, std::memory_order_relaxed); }
  std::uint64_t get() const noexcept { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

/// A thread of the torture.
struct alignas(128) thread_state {
  std::atomic<bool> used{false};
  std::atomic<bool> takes_signals{false};
  const char* name = "";
  std::size_t index = 0;  ///< among its kind
  pthread_t handle{};
  small_random random{0};
  small_random handler_random{0};  ///< the signal handler's own

  std::atomic<const char*> what{nullptr};  ///< what is in flight
  std::atomic<const char*> where{nullptr};
  std::atomic<std::uint64_t> since{0};
  counter completed;

  std::array<counter, static_cast<std::size_t>(count::count)> counts{};
  std::array<counter, bins> pipe{};   ///< how old an element was at the end of a section
  std::array<counter, bins> batch{};  ///< how many grace periods began inside a section

  void note(count c, std::uint64_t n = 1) noexcept { counts[static_cast<std::size_t>(c)].add(n); }
};

inline std::array<thread_state, 96> threads;
inline thread_local constinit thread_state* self = nullptr;

struct {
  std::uint64_t seed = 0;
  double seconds = 3;
  std::uint64_t patience = 3000;
  std::uint32_t activities = everything;
  std::uint64_t phase = ~std::uint64_t{0};  ///< the only one; past the end: all
} inline options;

inline std::atomic<std::uint64_t> tick{1};
inline std::atomic<bool> stop{false};
inline std::atomic<bool> is_child{false};
inline std::atomic<void (*)()> dump{nullptr};

/// Says what is wrong, shows the state, and ends the process. Context: anywhere; the first one wins.
[[noreturn, gnu::cold, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) noexcept {
  static std::atomic<bool> failing{false};
  if (failing.exchange(true)) {
    while (true) ::pause();
  }
  std::array<char, 600> text{};
  int n = std::snprintf(text.data(), text.size(), "ERROR: %s", is_child.load() ? "in a forked child: " : "");
  va_list arguments;
  va_start(arguments, format);
  n += std::vsnprintf(text.data() + n, text.size() - static_cast<std::size_t>(n) - 2, format, arguments);
  va_end(arguments);
  if (static_cast<std::size_t>(n) > text.size() - 2) n = static_cast<int>(text.size()) - 2;
  text[static_cast<std::size_t>(n)] = '\n';
  if (::write(STDERR_FILENO, text.data(), static_cast<std::size_t>(n) + 1) < 0) ::_exit(2);
  if (auto* const f = dump.load(); f != nullptr && !is_child.load()) f();
  ::_exit(1);
}

/// Something that must end.
class in_flight {
 public:
  in_flight(const char* what, const char* where) noexcept
      : what_(self->what.load(std::memory_order_relaxed)), where_(self->where.load(std::memory_order_relaxed)) {
    set(what, where);
  }
  /// It has come nearer to its end.
  void advance(const char* where) noexcept { set(self->what.load(std::memory_order_relaxed), where); }
  ~in_flight() {
    self->completed.add();
    set(what_, where_);
  }
  in_flight(const in_flight&) = delete;
  in_flight& operator=(const in_flight&) = delete;

 private:
  static void set(const char* what, const char* where) noexcept {
    self->since.store(tick.load(std::memory_order_relaxed), std::memory_order_relaxed);
    self->where.store(where, std::memory_order_relaxed);
    self->what.store(what, std::memory_order_relaxed);
  }
  const char* what_;
  const char* where_;
};

/// Turns a hang into a sentence. For one thread, every 10 ms.
class watcher {
 public:
  void look() noexcept {
    std::uint64_t completed = 0;
    for (auto& t : threads) completed += t.completed.get();
    if (completed == last_) {
      if (++idle_ > options.patience)
        fail("S5: nobody has completed anything for %lu ticks", static_cast<unsigned long>(idle_));
    } else {
      idle_ = 0;
      tick.fetch_add(1, std::memory_order_relaxed);
    }
    last_ = completed;
    const std::uint64_t now = tick.load(std::memory_order_relaxed);
    for (auto& t : threads) {
      const char* const what = t.what.load(std::memory_order_relaxed);
      const std::uint64_t since = t.since.load(std::memory_order_relaxed);
      if (what == nullptr || since + options.patience > now || t.what.load(std::memory_order_relaxed) != what) continue;
      if (t.since.load(std::memory_order_relaxed) != since) continue;
      fail("S5, S7: %s in %s does not end, though others complete their work (%lu ticks)", what,
           t.where.load(std::memory_order_relaxed), static_cast<unsigned long>(now - since));
    }
  }

 private:
  std::uint64_t last_ = 0;
  std::uint64_t idle_ = 0;
};

/// How the sections of the phase pass their time.
enum class mood : std::uint32_t { brisk, mixed, drowsy };
inline std::atomic<mood> current_mood{mood::mixed};

inline void relax(std::uint64_t n) noexcept {
  for (std::uint64_t i = 0; i < n; ++i) {
#if defined(__x86_64__)
    asm volatile("pause" ::: "memory");
#else
    asm volatile("" ::: "memory");
#endif
  }
}

/// A sleep that nothing depends on.
inline void doze() noexcept {
  const timespec t{0, 50'000};
  ::nanosleep(&t, nullptr);
}

/// Stores to memory that is far away. A processor keeps its stores in order and lets loads overtake them: what is
/// stored next becomes visible late, and what a fence should have held back is seen early.
inline void fill_store_buffer(small_random& random) noexcept {
  constexpr std::size_t lines = std::size_t{1} << 20;
  struct alignas(64) line {
    std::uint32_t word;
  };
  static std::array<line, lines> far_away{};
  for (int i = 0; i < 56; ++i) std::atomic_ref(far_away[random() % lines].word).store(1, std::memory_order_relaxed);
}

inline void dwell(small_random& random) noexcept {
  const auto m = current_mood.load(std::memory_order_relaxed);
  const std::uint64_t x = random() % (m == mood::brisk ? 1024 : m == mood::mixed ? 64 : 16);
  if (x == 0) {
    if (random.below(4) == 0) {
      doze();
      self->note(count::slept);
    }
    for (std::uint64_t i = random.below(6); i > 0; --i) std::this_thread::yield();
  } else if (m == mood::brisk) {
    relax(x / 16);
  } else if (x < 8) {
    relax(random.below(400));
  }
}

}  // namespace torture
