// SPDX-License-Identifier: MIT
#include <mmunotify/interval/detail/interval_entry.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

#include <mmunotify/interval/interval_notifier.hpp>

#include "support/threads.hpp"

using namespace mmunotify;

namespace {

struct client {
  void invalidate_range_start(const invalidation&) noexcept {}
};
using entry = detail::interval_entry<std::uintptr_t>;

}  // namespace

TEST_CASE("P1: a slow bracket that settles an entry does not give it to a faster one that has missed it") {
  client c;
  interval_notifier<client> iv{c};
  detail::version_clock clock;
  const std::uint64_t slow = clock.read();
  clock.advance();
  clock.advance();
  const std::uint64_t fast = clock.read();  // its start has walked by
  entry e;
  e.renew(iv, {0, 1});                // and now the entry is linked, by somebody who stops here
  CHECK_FALSE(e.hears(slow, clock));  // the slow one settles it
  CHECK_FALSE(e.hears(fast, clock));  // at its end
  const std::uint64_t born = e.bear(clock);
  CHECK(born > fast);
  CHECK_FALSE(e.hears(born - 1, clock));
  CHECK(e.hears(born, clock));
}

TEST_CASE("P2: who leaves is called by exactly those that began before") {
  client c;
  interval_notifier<client> iv{c};
  detail::version_clock clock;
  entry e;
  e.renew(iv, {0, 1});
  const std::uint64_t born = e.bear(clock);
  const std::uint64_t before = clock.read();
  CHECK(e.hears(before, clock));
  e.kill(clock);
  CHECK(e.hears(before, clock));
  CHECK(e.hears(born, clock));
  CHECK_FALSE(e.hears(clock.read(), clock));
}

TEST_CASE("P1: whoever asks twice gets the same answer, while the entry comes and goes") {
  for (int round = 0; round < 2000; ++round) {
    client c;
    interval_notifier<client> iv{c};
    detail::version_clock clock;
    entry e;
    e.renew(iv, {0, 1});
    std::atomic<bool> go{false};
    std::atomic<int> wrong{0};
    std::thread asks([&] {
      wait_for(go);
      bool heard_before = false;
      for (int i = 0; i < 8; ++i) {
        const std::uint64_t g = clock.read();
        const bool first = e.hears(g, clock);
        if (e.hears(g, clock) != first) wrong.fetch_add(1);
        if (heard_before && !first && e.hears(clock.read(), clock)) wrong.fetch_add(1);  // dead stays dead
        heard_before |= first;
      }
    });
    go.store(true);
    e.bear(clock);
    e.kill(clock);
    asks.join();
    CHECK(wrong.load() == 0);
  }
}
