// SPDX-License-Identifier: MIT
#include <mmunotify/sync/static_srcu_domain.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <climits>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include <pthread.h>

#include "support/contract_recorder.hpp"
#include "support/domains.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

// What is common to all domains is tested in srcu_domain.test.cpp, callbacks.test.cpp and lockfree_hlist.test.cpp.

TEST_CASE("a static domain is an empty object, and every object of a type is the same domain") {
  using domain = static_srcu_domain<struct same>;
  static_assert(std::is_empty_v<domain>);
  domain a;
  domain b;
  const basic_read_section s(a);
  CHECK(b.held_by_this_thread());
  CHECK_FALSE(static_srcu_domain<struct another>::held_by_this_thread());
  CHECK(domain::status() == errc::ok);
}

TEST_CASE("a static domain may be used before it has been: by a grace period, a cookie, a callback, a hand-off") {
  static_srcu_domain<struct by_synchronize>::synchronize();
  using polled = static_srcu_domain<struct by_poll>;
  CHECK(polled::poll(polled::start_poll()));
  using called = static_srcu_domain<struct by_call>;
  srcu_head head;
  CHECK(called::call(head, [](srcu_head*) noexcept {}) == errc::ok);
  called::barrier();
  using handed = static_srcu_domain<struct by_handoff>;
  handed::up_read(handed::down_read());
  CHECK(handed::grace_periods() == 0);
  static_srcu_domain<struct by_barrier>::barrier();
  CHECK(static_srcu_domain<struct by_attach>::attach_this_thread() == errc::ok);
}

TEST_CASE_TEMPLATE("S8: threads of a static domain come and go while grace periods look at their words", Platform,
                   linux_platform, no_membarrier) {
  using domain = static_srcu_domain<struct churn, Platform>;
  std::atomic<bool> stop{false};
  std::atomic<int> dead_seen{0};
  std::array<std::atomic<int>, 4> alive{};
  alive[0] = 1;
  std::atomic<std::size_t> current{0};
  std::vector<std::thread> breeders;
  for (int t = 0; t < 2; ++t) {
    breeders.emplace_back([&] {
      while (!stop.load(std::memory_order_relaxed)) {
        std::thread([&] {
          for (int i = 0; i < 20; ++i) {
            domain d;
            const basic_read_section s(d);
            const std::size_t c = current.load(std::memory_order_acquire);
            if (alive[c].load(std::memory_order_relaxed) == 0) dead_seen.fetch_add(1);
          }
        }).join();
      }
    });
  }
  for (int i = 1; i <= 2000; ++i) {
    const std::size_t next = static_cast<std::size_t>(i) % alive.size();
    alive[next].store(1, std::memory_order_relaxed);
    const std::size_t old = current.exchange(next, std::memory_order_acq_rel);
    domain::synchronize();
    alive[old].store(0, std::memory_order_relaxed);
  }
  stop.store(true);
  for (auto& b : breeders) b.join();
  CHECK(dead_seen.load() == 0);
}

TEST_CASE_TEMPLATE("S8: a thread that exits inside a section of a static domain is reported, and wakes who waits",
                   Platform, linux_platform, no_membarrier) {
  using domain = static_srcu_domain<struct left_open, Platform>;
  const contract_recorder recorder;
  std::atomic<bool> inside{false};
  std::thread reader([&] {
    static_cast<void>(domain::read_lock());
    inside.store(true, std::memory_order_release);
    let_others_run();
  });
  wait_for(inside);
  domain::synchronize();
  reader.join();
  CHECK(recorder.rules() == std::vector<std::string>{"S8"});
}

TEST_CASE("S8: sections of a static domain work in thread_local destructors and in later key destructors") {
  using domain = static_srcu_domain<struct late>;
  struct last {
    ~last() {
      domain d;
      const basic_read_section s(d);
    }
  };
  const contract_recorder recorder;
  for (int i = 0; i < 10; ++i) {
    std::thread([] {
      thread_local last object;
      domain d;
      const basic_read_section s(d);
      static_cast<void>(&object);
    }).join();
  }
  domain::synchronize();
  CHECK(recorder.rules().empty());
}

TEST_CASE("exhausted memory and exhausted slots are error values") {
  struct no_slabs : linux_platform {
    static std::byte* allocate_slab(std::size_t) noexcept { return nullptr; }
  };
  CHECK(static_srcu_domain<struct poor, no_slabs>::attach_this_thread() == errc::no_memory);
  CHECK(static_srcu_domain<struct first, one_slot>::status() == errc::ok);
  using none = static_srcu_domain<struct second, one_slot>;
  CHECK(none::status() == errc::no_slot);
  const contract_recorder recorder;
  {
    none d;
    const basic_read_section s(d);  // harmless
  }
  none::synchronize();
  CHECK(recorder.rules() == std::vector<std::string>{"S1"});
}

TEST_CASE("S1: a static domain that had no slot waits for everybody once it has one") {
  struct platform : one_slot {};
  using late = static_srcu_domain<struct latecomer, platform>;
  std::optional<basic_srcu_domain<platform>> only(std::in_place);
  CHECK(late::status() == errc::no_slot);
  std::atomic<int> phase{0};
  std::thread reader([&] {
    late d;
    { const std::scoped_lock s(d); }  // harmless
    { const basic_read_section s(d); }
    phase.store(1);
    while (phase.load() < 2) std::this_thread::yield();
    const std::scoped_lock s(d);
    phase.store(3);
    while (phase.load() < 4) std::this_thread::yield();
  });
  while (phase.load() < 1) std::this_thread::yield();
  only.reset();
  CHECK(late::status() == errc::ok);
  phase.store(2);
  while (phase.load() < 3) std::this_thread::yield();
  CHECK_FALSE(late::poll(late::start_poll()));
  phase.store(4);
  late::synchronize();
  reader.join();
}

TEST_CASE_TEMPLATE("S8: sections that begin after the thread's exit handler has run protect, and leave nothing behind",
                   Platform, linux_platform, no_membarrier) {
  using domain = static_srcu_domain<struct afterlife, Platform>;
  // ThreadSanitizer does not outlive the last iteration.
  static constexpr std::uintptr_t iterations = MMUNOTIFY_TSAN ? 2 : PTHREAD_DESTRUCTOR_ITERATIONS;
  static pthread_key_t key;
  static std::atomic<int> protects;
  protects = 0;
  REQUIRE(::pthread_key_create(&key, [](void* round) {
            domain d;
            {
              const basic_read_section outer(d);
              const basic_read_section inner(d);
              const std::scoped_lock unordered(d);
              if (domain::held_by_this_thread() && !domain::poll(domain::start_poll())) protects.fetch_add(1);
            }
            if (domain::held_by_this_thread()) protects.store(-100);
            const auto n = reinterpret_cast<std::uintptr_t>(round);
            if (n < iterations) ::pthread_setspecific(key, reinterpret_cast<void*>(n + 1));
          }) == 0);
  for (int i = 0; i < 5; ++i) {
    std::thread([] {
      domain d;
      const basic_read_section s(d);
      ::pthread_setspecific(key, reinterpret_cast<void*>(std::uintptr_t{1}));
    }).join();
    domain::synchronize();  // would look at words of a thread that is gone
  }
  ::pthread_key_delete(key);
  CHECK(protects.load() == 5 * static_cast<int>(iterations));
}
