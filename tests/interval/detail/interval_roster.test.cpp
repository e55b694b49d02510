// SPDX-License-Identifier: MIT
#include <mmunotify/interval/detail/interval_roster.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <thread>

#include "interval/interval_space.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

constexpr std::uint64_t page = 0x1000;

struct nobody {
  void invalidate_range_start(const invalidation&) noexcept {}
};

/// Removes its interval in the first callback that it gets.
struct leaver {
  interval_space* space = nullptr;
  interval_notifier<leaver>* self = nullptr;
  errc said = errc::ok;
  std::atomic<bool> gone{true};
  void invalidate_range_start(const invalidation&) noexcept {
    if (gone.load()) return;
    said = space->set.remove_async(*self);
    gone.store(true);
  }
};

}  // namespace

TEST_CASE("L7: who changes an interval beside others finds it registered, whatever moment it meets") {
  interval_space space;
  nobody client;
  interval_notifier<nobody> low{client};
  interval_notifier<nobody> high{client};
  REQUIRE(space.set.insert(low, {0, page}) == errc::ok);
  // Not inside the interval: it is claimed, looked at, and let go again.
  const auto try_often = [&](int& wrong) {
    for (int i = 0; i < 200'000; ++i) {
      const errc e = space.set.split(low, 0, high);
      if (e != errc::bad_range && e != errc::again) ++wrong;
    }
  };
  int wrong_here = 0;
  int wrong_there = 0;
  std::thread other([&] { try_often(wrong_there); });
  try_often(wrong_here);
  other.join();
  CHECK(wrong_here == 0);
  CHECK(wrong_there == 0);
  CHECK(space.set.remove(low) == errc::ok);
}

TEST_CASE("L7: a callback that comes before the insertion has returned removes the interval") {
  interval_space space;
  leaver client;
  interval_notifier<leaver> iv{client};
  client.space = &space;
  client.self = &iv;
  std::atomic<bool> over{false};
  std::thread primary([&] {
    while (!over.load()) const auto b = space.invalidate({0, page});
  });
  int missed = 0;
  for (int i = 0; i < 500; ++i) {
    client.gone.store(false);
    REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
    wait_for(client.gone);
    if (client.said != errc::ok) {
      ++missed;
      CHECK(space.set.remove(iv) == errc::ok);
    }
    while (iv.registered()) space.domain.barrier();
  }
  over.store(true);
  primary.join();
  CHECK(missed == 0);
}
