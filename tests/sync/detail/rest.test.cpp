// SPDX-License-Identifier: MIT

// The worker's rests. Here they have no end of their own, so that a test does not depend on the time, and hangs where
// it would otherwise only be slow.
#include <mmunotify/sync/detail/rest.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include <mmunotify/sync/srcu_domain.hpp>

#include "support/threads.hpp"

using namespace mmunotify;

namespace {

/// Says what a rest asks the system for.
struct scripted : linux_platform {
  static void wait_for(const std::atomic<std::uint32_t>& word, std::uint32_t value, std::uint32_t) noexcept {
    ++sleeps;
    CHECK(word.load(std::memory_order_relaxed) == value);
    if (meanwhile) meanwhile();
  }
  static void wake(const std::atomic<std::uint32_t>&) noexcept { ++wakes; }
  static void reset() {
    sleeps = wakes = 0;
    meanwhile = nullptr;
  }

  static inline int sleeps = 0;
  static inline int wakes = 0;
  static inline std::function<void()> meanwhile;
};
using scripted_rest = detail::rest<scripted>;

/// Each round is followed by a rest that only ends when somebody ends it. One for each test, with a worker of its own.
template <class Test>
struct endless : linux_platform {
  static constexpr std::size_t many = 1;
  static void wait_for(const std::atomic<std::uint32_t>& word, std::uint32_t value, std::uint32_t) noexcept {
    rests.fetch_add(1, std::memory_order_release);
    while (word.load(std::memory_order_acquire) == value) linux_platform::wait(word, value);
  }
  static void wake(const std::atomic<std::uint32_t>& word) noexcept {
    wakes.fetch_add(1, std::memory_order_relaxed);
    linux_platform::wake(word);
  }

  static inline std::atomic<int> rests{0};
  static inline std::atomic<int> wakes{0};
};

/// Rests that are over at once.
struct brief : linux_platform {
  static constexpr std::size_t many = 1;
  static void wait_for(const std::atomic<std::uint32_t>&, std::uint32_t, std::uint32_t) noexcept { yield(); }
};

struct counting : srcu_head {
  static void run(srcu_head* h) noexcept { static_cast<counting*>(h)->ran.fetch_add(1, std::memory_order_relaxed); }
  std::atomic<int> ran{0};
};

template <class Domain>
void wait_until_run(Domain& domain) {
  while (domain.backlog() != 0) std::this_thread::yield();
}

}  // namespace

TEST_CASE("the worker rests while nobody waits, and not while somebody does") {
  scripted::reset();
  scripted_rest r;
  r.take();
  CHECK(scripted::sleeps == 1);
  r.hurry();
  r.hurry();
  CHECK(r.hurried());
  r.take();
  r.calm();
  r.take();
  CHECK(scripted::sleeps == 1);
  r.calm();
  CHECK_FALSE(r.hurried());
  r.take();
  CHECK(scripted::sleeps == 2);
  CHECK(scripted::wakes == 0);  // nobody came while it rested
}

TEST_CASE("who waits, or finds many, wakes the worker from its rest only, and a backlog once") {
  scripted::reset();
  scripted_rest r;
  r.enough();  // no rest
  r.take();
  CHECK(scripted::sleeps == 1);
  scripted::meanwhile = [&] { r.hurry(); };
  r.take();
  CHECK(scripted::wakes == 1);
  r.calm();
  scripted::meanwhile = [&] {
    r.enough();
    r.enough();
  };
  r.take();
  CHECK(scripted::wakes == 2);
  r.take();  // the backlog has been seen to
  CHECK(scripted::sleeps == 4);
}

TEST_CASE("S8: of those who wait a forked child has the one that forked, if it does") {
  scripted::reset();
  scripted_rest r;
  r.hurry();
  r.hurry();
  r.after_fork(false);
  r.take();
  CHECK(scripted::sleeps == 1);
  r.after_fork(true);
  r.take();
  CHECK(scripted::sleeps == 1);
  r.calm();
  r.take();
  CHECK(scripted::sleeps == 2);
}

TEST_CASE("S4: a barrier does not wait for the end of the worker's rest") {
  using platform = endless<struct waits>;
  basic_srcu_domain<platform> domain;
  counting c;
  for (int i = 1; i <= 1000; ++i) {
    CHECK(domain.call(c, &counting::run) == errc::ok);
    if (i % 3 == 0) std::this_thread::yield();
    domain.barrier();
    CHECK(c.ran.load(std::memory_order_relaxed) == i);
  }
}

TEST_CASE("S4: barriers beside others who only call, with rests between: none waits for a rest") {
  using platform = endless<struct beside>;
  basic_srcu_domain<platform> domain;
  std::atomic<bool> stop{false};
  std::thread caller([&] {
    std::array<counting, 64> all;
    for (std::size_t i = 0; !stop.load(std::memory_order_relaxed); ++i) {
      if (all[i % 64].function == nullptr) static_cast<void>(domain.call(all[i % 64], &counting::run));
      if (i % 64 == 63) domain.barrier();
    }
    domain.barrier();
  });
  counting c;
  for (int i = 1; i <= 1000; ++i) {
    CHECK(domain.call(c, &counting::run) == errc::ok);
    domain.barrier();
    CHECK(c.ran.load(std::memory_order_relaxed) == i);
  }
  stop.store(true, std::memory_order_relaxed);
  caller.join();
}

TEST_CASE("what is queued while the worker rests wakes nobody, and shares one grace period") {
  using platform = endless<struct shares>;
  basic_srcu_domain<platform> domain;
  counting first;
  CHECK(domain.call(first, &counting::run) == errc::ok);
  wait_until_run(domain);
  while (platform::rests.load(std::memory_order_acquire) != 1) std::this_thread::yield();
  const std::uint64_t before = domain.grace_periods();
  const int wakes = platform::wakes.load();
  std::vector<counting> all(1000);
  for (counting& c : all) CHECK(domain.call(c, &counting::run) == errc::ok);
  CHECK(platform::wakes.load() == wakes);
  CHECK(domain.backlog() == 1000);
  CHECK(domain.grace_periods() == before);
  domain.barrier();
  for (const counting& c : all) CHECK(c.ran.load() == 1);
  CHECK(domain.grace_periods() == before + 1);
}

TEST_CASE("a section that ends while the worker rests wakes nobody") {
  using platform = endless<struct unmarked>;
  basic_srcu_domain<platform> domain;
  counting c;
  int wakes = 0;
  {
    const basic_read_section s(domain);
    CHECK(domain.call(c, &counting::run) == errc::ok);
    while (platform::rests.load(std::memory_order_acquire) != 1) std::this_thread::yield();
    wakes = platform::wakes.load();
  }
  CHECK(platform::wakes.load() == wakes);
  CHECK(c.ran.load() == 0);
  domain.barrier();
  CHECK(c.ran.load() == 1);
}

TEST_CASE("a section that outlasts a rest holds its callbacks back, and its end lets them run, though nobody waits") {
  basic_srcu_domain<brief> domain;
  counting c;
  for (int i = 1; i <= 200; ++i) {
    {
      const basic_read_section s(domain);
      CHECK(domain.call(c, &counting::run) == errc::ok);
      if (i % 2 == 0) let_others_run();
      CHECK(c.ran.load() == i - 1);
    }
    wait_until_run(domain);
    CHECK(c.ran.load() == i);
  }
}

TEST_CASE("a backlog that has grown enough, or is full, ends the worker's rest") {
  using platform = endless<struct full>;
  for (const std::size_t bound : {std::size_t{0}, std::size_t{1}, std::size_t{2}, std::size_t{7}, std::size_t{64}}) {
    CAPTURE(bound);
    basic_srcu_domain<platform> domain(srcu_options{.max_backlog = bound});
    std::vector<counting> all(10'000);
    for (counting& c : all) {
      while (domain.call(c, &counting::run) != errc::ok) std::this_thread::yield();
    }
    // Nobody has waited; what is left is less than what would be too much. (All may have come just before the rest: the
    // next one ends it.)
    std::deque<counting> more;
    while (domain.backlog() > detail::rest<platform>::too_many) {
      static_cast<void>(domain.call(more.emplace_back(), &counting::run));
      std::this_thread::yield();
    }
    domain.barrier();
    for (const counting& c : all) CHECK(c.ran.load() == 1);
  }
}
