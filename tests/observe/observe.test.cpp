// SPDX-License-Identifier: MIT
#include <mmunotify/observe/observe.hpp>

#include <doctest/doctest.h>

#include <thread>
#include <type_traits>
#include <vector>

#include "support/recording_client.hpp"
#include "support/spaces.hpp"

using namespace mmunotify;

TEST_CASE("counters add up over threads, and nobody's counts mix") {
  observe::counters c;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) c.note(observe::occurrence::callback, 2);
    });
  }
  for (auto& t : threads) t.join();
  CHECK(c.total(observe::occurrence::callback) == 8000);
  CHECK(c.total(observe::occurrence::bracket) == 0);
  static_assert(std::is_empty_v<observe::none>);
}

TEST_CASE("a space tells its observer what happens while it is armed") {
  tracked_primary primary;
  auto& seen = primary.space.observer();
  counting_client client;
  subscriber<counting_client> node{client};
  { const auto inv = primary.space.invalidate({0, 1}, event::unmap); }
  CHECK(seen.total(observe::occurrence::bracket) == 0);
  REQUIRE(primary.join(node) == errc::ok);
  { const auto inv = primary.space.invalidate({0, 1}, event::unmap); }
  CHECK(primary.space.unregister(node) == errc::ok);
  CHECK(seen.total(observe::occurrence::bracket) == 1);
  CHECK(seen.total(observe::occurrence::callback) == 2);
  CHECK(seen.total(observe::occurrence::registration) == 1);
  CHECK(seen.total(observe::occurrence::release) == 1);
  CHECK(seen.total(observe::occurrence::grace_period) == 3);
}
