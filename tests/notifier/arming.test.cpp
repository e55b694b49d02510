// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/arming.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <thread>
#include <vector>

#include "support/recording_client.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

TEST_CASE("a witness owns its mutex now") {
  std::mutex m;
  std::unique_lock held(m, std::defer_lock);
  CHECK_FALSE(detail::owns(held));
  held.lock();
  CHECK(detail::owns(held));
  held.unlock();
  const std::lock_guard guard(m);
  CHECK(detail::owns(guard));
}

TEST_CASE("P7: spaces that arm and disarm all the time share registries and never each other's subscribers") {
  // The late bracket: it has loaded the address of a registry that is detached and serves another space meanwhile.
  constexpr std::size_t spaces = 3;
  constexpr int rounds = 1500;
  struct owner_check {
    std::atomic<int>* foreign;
    std::uintptr_t mine;
    void invalidate_range_start(const invalidation& i) noexcept {
      if (i.range.first != mine) foreign->fetch_add(1);
    }
    void invalidate_range_end(const invalidation& i) noexcept {
      if (i.range.first != mine) foreign->fetch_add(1);
    }
  };
  std::array<under_primary, spaces> primaries;
  std::atomic<int> foreign{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> changers;
  for (std::size_t t = 0; t < 4; ++t) {
    changers.emplace_back([&, t] {
      small_random random(t + 3);
      while (!stop.load(std::memory_order_relaxed)) {
        const std::size_t at = random.below(spaces);
        const auto reading = primaries[at].lock();
        const auto inv = primaries[at].space.invalidate({at + 1, 4096}, event::unmap);
      }
    });
  }
  std::vector<std::thread> drivers;
  for (std::size_t at = 0; at < spaces; ++at) {
    drivers.emplace_back([&, at] {
      owner_check client{&foreign, at + 1};
      for (int i = 0; i < rounds; ++i) {
        subscriber<owner_check> node{client};
        REQUIRE(primaries[at].join(node) == errc::ok);
        REQUIRE(primaries[at].space.unregister(node) == errc::ok);
      }
    });
  }
  for (auto& d : drivers) d.join();
  stop.store(true);
  for (auto& c : changers) c.join();
  CHECK(foreign.load() == 0);
  for (auto& p : primaries) CHECK_FALSE(p.space.armed());
}
