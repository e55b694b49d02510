// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/rmap.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

using namespace mmunotify;
using x86::entry_list;
using x86::entry_place;
using x86::rmap_chunk;

TEST_CASE("an entry list of one takes no chunk") {
  const auto page = std::make_unique<x86::shadow_page>();
  x86::stock<rmap_chunk> none;
  entry_list l;
  CHECK(sizeof l == sizeof(void*));
  CHECK(l.empty());
  for (const unsigned i : {0U, 1U, 2U, 3U, 511U}) {  // the bits beside an index are the list's own elsewhere
    l.add({page.get(), i}, none);
    CHECK(l.first() == entry_place{page.get(), i});
    CHECK(l.count() == 1);
    CHECK(l.contains({page.get(), i}));
    CHECK_FALSE(l.remove({page.get(), i ^ 1}, none));
    CHECK(l.remove({page.get(), i}, none));
    CHECK(l.empty());
    CHECK_FALSE(l.remove({page.get(), i}, none));
  }
  CHECK(none.size() == 0);
}

TEST_CASE("an entry list gives back every chunk, whatever the order of removal") {
  const auto a = std::make_unique<x86::shadow_page>();
  const auto b = std::make_unique<x86::shadow_page>();
  const std::array<entry_place, 4> all{{{a.get(), 0}, {a.get(), 1}, {b.get(), 2}, {b.get(), 511}}};
  std::array<unsigned, 4> order{0, 1, 2, 3};
  do {
    x86::stock<rmap_chunk> chunks;
    REQUIRE(chunks.fill(1) == errc::ok);
    entry_list l;
    for (const entry_place& p : all) l.add(p, chunks);
    CHECK(chunks.size() == 0);
    std::vector<entry_place> left(all.begin(), all.end());
    for (const unsigned i : order) {
      CHECK(l.contains(all[i]));
      CHECK(l.remove(all[i], chunks));
      CHECK_FALSE(l.contains(all[i]));
      left.erase(std::find(left.begin(), left.end(), all[i]));
      CHECK(l.count() == left.size());
      for (const entry_place& p : left) CHECK(l.contains(p));
      CHECK(chunks.size() == (left.size() > 1 ? 0 : 1));
    }
    CHECK(l.empty());
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST_CASE("a long list keeps every entry while others come and go, in few chunks") {
  const auto page = std::make_unique<x86::shadow_page>();
  x86::stock<rmap_chunk> chunks;
  REQUIRE(chunks.fill(64) == errc::ok);
  entry_list l;
  std::vector<bool> in(512, false);
  std::size_t n = 0;
  std::uint64_t x = 12345;
  for (int step = 0; step < 20000; ++step) {
    x = x * 6364136223846793005ULL + 1442695040888963407ULL;
    const auto i = static_cast<unsigned>(x >> 40) % 512;
    if (in[i]) {
      REQUIRE(l.remove({page.get(), i}, chunks));
      --n;
    } else {
      l.add({page.get(), i}, chunks);
      ++n;
    }
    in[i] = !in[i];
    REQUIRE(l.count() == n);
    REQUIRE(64 - chunks.size() == (n < 2 ? 0 : (n + rmap_chunk::capacity - 1) / rmap_chunk::capacity));
  }
  std::size_t seen = 0;
  l.for_each([&](entry_place p) { seen += in[p.index] ? 1 : 0; });
  CHECK(seen == n);
  while (!l.empty()) REQUIRE(l.remove(l.first(), chunks));
  CHECK(chunks.size() == 64);
}

TEST_CASE("who looks without the MMU lock sees every entry that stays, while others come and go") {
  const auto page = std::make_unique<x86::shadow_page>();
  x86::stock<rmap_chunk> chunks;
  REQUIRE(chunks.fill(8) == errc::ok);
  entry_list l;
  l.add({page.get(), 5}, chunks);
  std::atomic<bool> stop{false};
  std::atomic<unsigned> wrong{0}, rounds{0};
  std::thread looker([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      unsigned found = 0, other = 0;
      l.for_each_unlocked([&](entry_place p) noexcept {
        found += p.index == 5 ? 1 : 0;
        other += p.page != page.get() || p.index > 40 ? 1 : 0;
      });
      if (found != 1 || other != 0) wrong.fetch_add(1, std::memory_order_relaxed);
      rounds.fetch_add(1, std::memory_order_relaxed);
    }
  });
  for (int round = 0; round < 400; ++round) {
    for (unsigned i = 10; i < 40; ++i) l.add({page.get(), i}, chunks);
    for (unsigned i = 10; i < 40; ++i) REQUIRE(l.remove({page.get(), i}, chunks));
    for (const unsigned seen = rounds.load(); rounds.load() == seen;) std::this_thread::yield();
  }
  stop.store(true);
  looker.join();
  CHECK(wrong.load() == 0);
}
