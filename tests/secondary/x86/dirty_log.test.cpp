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
