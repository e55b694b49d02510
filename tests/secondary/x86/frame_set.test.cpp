// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/frame_set.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <random>
#include <set>
#include <thread>

using namespace mmunotify;
using x86::frame_set;

TEST_CASE("a frame set finds the next member, however far away, like an ordered set") {
  for (const std::uint64_t n : {1ULL, 63ULL, 64ULL, 65ULL, 4096ULL, 4097ULL, 300000ULL}) {
    frame_set s;
    REQUIRE(s.make(n));
    std::set<std::uint64_t> reference;
    std::mt19937_64 random(n);
    for (int step = 0; step < 4000; ++step) {
      const std::uint64_t i = random() % n;
      if (random() % 3 == 0) {
        s.insert(i);
        reference.insert(i);
      } else if (!reference.empty()) {
        const auto at = reference.lower_bound(i);
        const std::uint64_t gone = at != reference.end() ? *at : *reference.begin();
        s.erase(gone);
        reference.erase(gone);
      }
      const std::uint64_t from = random() % (n + 2);
      const auto next = reference.lower_bound(from);
      REQUIRE(s.next(from) == (next != reference.end() ? *next : frame_set::none));
      REQUIRE(s.contains(i) == (reference.count(i) != 0));
    }
  }
}

TEST_CASE("members of a range are visited in order, and may be removed on the way") {
  frame_set s;
  REQUIRE(s.make(1 << 20));
  for (std::uint64_t i = 0; i < 1 << 20; i += 5000) s.insert(i);
  std::uint64_t expected = 10000, visits = 0;
  s.for_each_in(5001, 1000001, [&](std::uint64_t i) {
    CHECK(i == expected);
    expected += 5000;
    ++visits;
    s.erase(i);
  });
  CHECK(visits == 199);
  CHECK(s.next(1) == 5000);
  CHECK(s.next(5001) == 1005000);
  s.for_each_in(7, 7, [](std::uint64_t) { FAIL("the range is empty"); });
}

TEST_CASE("a reader finds what stays, while its neighbours come and go") {
  frame_set s;
  REQUIRE(s.make(1 << 18));
  constexpr std::uint64_t stays = 70007;
  s.insert(stays);
  std::atomic<bool> stop{false};
  std::atomic<unsigned> missed{0}, rounds{0};
  std::thread reader([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      bool found = false;
      s.for_each_in(0, 1 << 18, [&](std::uint64_t i) { found = found || i == stays; });
      if (!found) missed.fetch_add(1, std::memory_order_relaxed);
      rounds.fetch_add(1, std::memory_order_relaxed);
    }
  });
  constexpr std::uint64_t others[] = {stays - 1, stays - 64, stays - 4096, 69952, 3};
  for (std::uint64_t round = 0; round < 3000; ++round) {
    for (const std::uint64_t i : others) s.insert(i);
    for (const std::uint64_t i : others) s.erase(i);
  }
  while (rounds.load() == 0) std::this_thread::yield();
  stop.store(true);
  reader.join();
  CHECK(missed.load() == 0);
}
