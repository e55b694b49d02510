// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/invalidation_window.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

TEST_CASE("C9: a fault retries only if a bracket since its snapshot overlapped its key") {
  invalidation_window<> w;
  const auto before = w.read_begin();
  CHECK_FALSE(w.retry(before, {0x1000, 0x2000}));
  w.start({0x1000, 0x2000});
  CHECK(w.open() == 1);
  CHECK(w.retry(before, {0x1fff, 0x3000}));        // C4: one byte
  CHECK_FALSE(w.retry(before, {0x2000, 0x3000}));  // C4: ranges that touch
  CHECK_FALSE(w.retry(before, {0x0, 0x1000}));
  CHECK(w.check_retry(before, {0x1000, 0x1001}));
  w.end({0x1000, 0x2000});
  CHECK(w.retry(before, {0x1000, 0x2000}));
  CHECK(w.check_retry(before, {0x1000, 0x2000}));
  CHECK_FALSE(w.retry(before, {0x2000, 0x3000}));
  const auto after = w.read_begin();
  CHECK_FALSE(w.retry(after, {0x1000, 0x2000}));
  CHECK_FALSE(w.check_retry(after, {0x1000, 0x2000}));
}

TEST_CASE("C9: a bracket that was open at the snapshot and ended since collides") {
  invalidation_window<> w;
  w.start({0, 10});
  const auto s = w.read_begin();
  w.end({0, 10});
  CHECK(w.retry(s, {9, 12}));
  CHECK_FALSE(w.retry(s, {10, 12}));
}

TEST_CASE("C9: when the history has overflowed a fault retries to be safe") {
  invalidation_window<std::uintptr_t, 2, 4> w;
  const auto s = w.read_begin();
  for (int i = 0; i < 4; ++i) {
    w.start({100, 200});
    w.end({100, 200});
    CHECK_FALSE(w.retry(s, {0, 100}));
  }
  w.start({100, 200});
  w.end({100, 200});
  CHECK(w.retry(s, {0, 100}));
  CHECK_FALSE(w.retry(w.read_begin(), {0, 1000}));
}

TEST_CASE("C9: more open brackets than there is room for become their hull, until the last of these has ended") {
  invalidation_window<std::uintptr_t, 1, 16> w;
  w.start({0, 10});
  w.start({20, 30});
  w.start({50, 60});
  const auto s = w.read_begin();
  CHECK(w.open() == 3);
  CHECK_FALSE(w.retry(s, {10, 20}));
  CHECK(w.retry(s, {35, 36}));  // inside the hull: to be safe
  w.end({20, 30});
  CHECK(w.retry(s, {55, 56}));
  w.end({50, 60});
  CHECK_FALSE(w.retry(s, {35, 36}));
  w.end({0, 10});
  CHECK(w.open() == 0);
}

TEST_CASE("C9: a client that was deaf for a while forgets: every older snapshot collides, newer ones do not") {
  invalidation_window<> w;
  const auto before = w.read_begin();
  w.forget();
  CHECK(w.retry(before, {0, 1}));
  CHECK(w.check_retry(before, {0, 1}));
  const auto after = w.read_begin();
  CHECK_FALSE(w.retry(after, {0, 1}));
  w.start({5, 6});
  w.end({5, 6});
  CHECK_FALSE(w.retry(after, {0, 5}));
  CHECK(w.retry(after, {5, 6}));
}

TEST_CASE("P1: an end without its start is reported and changes nothing") {
  const contract_recorder recorder;
  invalidation_window<> w;
  const auto s = w.read_begin();
  w.end({0, 10});
  CHECK(recorder.rules() == std::vector<std::string>{"P1"});
  CHECK(w.read_begin() == s);
}

TEST_CASE("C9: against a naive reference, every history over a small universe of random operations") {
  struct reference {
    std::vector<mmunotify::range> open;
    std::vector<mmunotify::range> finished;
    bool collides(std::size_t since, mmunotify::range r) const {
      for (const auto& o : open) {
        if (o.overlaps(r)) return true;
      }
      for (std::size_t i = since; i < finished.size(); ++i) {
        if (finished[i].overlaps(r)) return true;
      }
      return false;
    }
  };
  for (std::uint64_t seed = 1; seed <= 200; ++seed) {
    CAPTURE(seed);
    small_random random(seed);
    invalidation_window<std::uintptr_t, 8, 256> w;  // nothing overflows here: exact both ways
    reference ref;
    std::deque<std::pair<std::uint64_t, std::size_t>> snapshots{{w.read_begin(), 0}};
    const auto some_range = [&] {
      const std::uintptr_t a = random.below(16);
      return mmunotify::range{a, a + random.below(5)};
    };
    for (int step = 0; step < 100; ++step) {
      switch (random.below(4)) {
        case 0:
          if (ref.open.size() < 8) {
            ref.open.push_back(some_range());
            w.start(ref.open.back());
          }
          break;
        case 1:
          if (!ref.open.empty()) {
            const auto at = static_cast<std::ptrdiff_t>(random.below(ref.open.size()));
            w.end(ref.open[static_cast<std::size_t>(at)]);
            ref.finished.push_back(ref.open[static_cast<std::size_t>(at)]);
            ref.open.erase(ref.open.begin() + at);
          }
          break;
        case 2: snapshots.emplace_back(w.read_begin(), ref.finished.size()); break;
        default: {
          const auto& s = snapshots[random.below(snapshots.size())];
          const auto r = some_range();
          REQUIRE(w.retry(s.first, r) == ref.collides(s.second, r));
          REQUIRE(w.check_retry(s.first, r) == ref.collides(s.second, r));  // nobody else is here: exact, too
        }
      }
    }
  }
}

TEST_CASE("C3: a lock-free true is final, with a writer beside it") {
  // The writer's two ranges do not touch the key; half of one and half of the other would. So a true is right only if
  // the history has overflowed meanwhile.
  constexpr mmunotify::range key{32, 36};
  constexpr std::size_t history = 8;
  invalidation_window<std::uintptr_t, 1, history> w;
  std::atomic<bool> stop{false};
  std::thread writer([&] {  // the only one, so it needs no lock
    for (int i = 0; i < 2000000; ++i) {
      const mmunotify::range r = i % 2 == 0 ? mmunotify::range{0, 4} : mmunotify::range{60, 64};
      w.start(r);
      w.end(r);
    }
    stop.store(true, std::memory_order_release);
  });
  int wrong = 0;
  while (!stop.load(std::memory_order_acquire)) {
    const auto s = w.read_begin();
    if (w.check_retry(s, key) && w.read_begin() - s <= history) ++wrong;
  }
  writer.join();
  CHECK(wrong == 0);
}
