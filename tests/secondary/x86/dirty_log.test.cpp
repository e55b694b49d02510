// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/dirty_log.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <mutex>
#include <thread>

#include "shadow_fixture.hpp"

using namespace shadow_test;
using x86::dirty_log;
using x86::dirty_tracking;

TEST_CASE("a log has a bit for each frame, and gives each mark once") {
  for (const std::uint64_t n : {1ULL, 63ULL, 64ULL, 65ULL, 1000ULL}) {
    const auto log = dirty_log::make(dirty_tracking::dirty_bits, n);
    REQUIRE(log != nullptr);
    CHECK(log->how() == dirty_tracking::dirty_bits);
    log->mark(n - 1);
    log->mark(n - 1);
    log->mark(0);
    CHECK(log->marked(n - 1));
    std::uint64_t total = 0;
    for (std::uint64_t w = 0; w < dirty_log::words_for(n); ++w) {
      total += static_cast<std::uint64_t>(__builtin_popcountll(log->take(w)));
    }
    CHECK(total == (n == 1 ? 1 : 2));
    CHECK_FALSE(log->marked(0));
  }
}

TEST_CASE("a ring gives frames in the order of their marks, each once, and says when it was full") {
  const auto log = dirty_log::make(dirty_tracking::write_protect, 1000, 4);
  REQUIRE(log != nullptr);
  x86::dirty_ring& ring = *log->ring();
  std::uint64_t f = 0;
  for (int round = 0; round < 3; ++round) {
    CHECK_FALSE(ring.pop(f));
    for (const std::uint64_t i : {7U, 999U, 7U, 0U, 64U}) log->mark(i);
    CHECK_FALSE(ring.overflowed());
    for (const std::uint64_t i : {7U, 999U, 0U, 64U}) {
      REQUIRE(ring.pop(f));
      CHECK(f == i);
      CHECK(log->take_one(f));
      CHECK_FALSE(log->take_one(f));
    }
  }
  for (std::uint64_t i = 10; i < 15; ++i) log->mark(i);
  CHECK(ring.overflowed());
  CHECK(log->take(0) == 0x7c00);  // the bitmap has all five
  ring.reset_overflow();
  CHECK_FALSE(ring.overflowed());
  CHECK(dirty_log::make(dirty_tracking::write_protect, 1000)->ring() == nullptr);
}

TEST_CASE("what several threads push comes out once each") {
  x86::dirty_ring ring(64);
  std::atomic<unsigned> running{2};
  const auto produce = [&](std::uint64_t id) {
    for (std::uint64_t i = 0; i < 20000; ++i) {
      ring.push(2 * i + id);
      if (ring.overflowed()) std::this_thread::yield();
    }
    running.fetch_sub(1);
  };
  std::thread a(produce, 0), b(produce, 1);
  std::array<std::uint64_t, 2> last{};
  std::array<bool, 2> any{};
  std::uint64_t count = 0, wrong = 0;
  const auto drain = [&] {
    for (std::uint64_t f = 0; ring.pop(f); ++count) {
      const auto id = static_cast<std::size_t>(f % 2);
      if (any[id] && f <= last[id]) ++wrong;  // of one producer in order
      last[id] = f;
      any[id] = true;
    }
  };
  while (running.load() != 0) drain();
  a.join();
  b.join();
  drain();
  CHECK(wrong == 0);
  CHECK(count > 64);
  CHECK(count <= 40000);
}

TEST_CASE("no write is lost between a fast upgrade and a harvest on another thread") {
  // The guest counts in a page. If a harvest reports the page clean, nothing was written since the one before returned.
  machine m;
  constexpr gva va{0x400000};
  constexpr gpa page{0x5000};
  m.map(va, page, rwu | used);
  REQUIRE(m.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  std::atomic<bool> stop{false};
  std::atomic<unsigned> odd{0};
  const auto word = [&] {
    return std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(m.host.bytes(m.host_of(page))));
  };
  std::thread guest([&] {
    cpu_type cpu{m.mmu};
    if (cpu.set_cr3(m.root) != errc::ok) odd.fetch_add(1);
    while (!stop.load(std::memory_order_relaxed)) {
      const outcome o = cpu.access(va, access::write, [](std::byte* at) noexcept {
        std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at)).fetch_add(1, std::memory_order_relaxed);
      });
      if (o.what != outcome::done) odd.fetch_add(1);
    }
  });
  std::array<std::uint64_t, 1> dirty{};
  std::uint64_t known = 0, changed = 0, lost = 0;
  for (int i = 0; i < 4000; ++i) {
    // Now and then at once, so that harvests meet upgrades.
    for (int spins = i % 2 * 100; word().load(std::memory_order_relaxed) == known && spins > 0; --spins) {
      std::this_thread::yield();
    }
    const std::uint64_t before = word().load(std::memory_order_relaxed);
    REQUIRE(m.mmu.harvest_writes(1, dirty) == errc::ok);
    const bool reported = (dirty[0] >> 5 & 1) != 0;
    if (!reported && i > 0 && before != known) ++lost;
    if (reported) ++changed;
    known = word().load(std::memory_order_relaxed);
  }
  stop.store(true);
  guest.join();
  CHECK(lost == 0);
  CHECK(odd.load() == 0);
  CHECK(changed > 100);
  CHECK(m.mmu.statistics().fast_writes > 100);
  CHECK(m.mmu.verify() == nullptr);
}
