// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/two_pass.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;
using log_type = std::vector<std::string>;

namespace {

/// A device that begins a flush and later waits for it.
struct device {
  log_type& log;
  std::string name;
  bool refuses = false;
  bool has_token = true;
  two_pass_token token{};

  first_pass invalidate_begin(const invalidation& i) noexcept {
    log.push_back(name + ":begin");
    if (refuses && !i.blockable) return first_pass::refused();
    if (!has_token) return first_pass::complete();
    return token;
  }
  void invalidate_finish(two_pass_token& t, const invalidation&) noexcept {
    CHECK(&t == &token);
    CHECK_FALSE(t.in_use());
    log.push_back(name + ":finish");
  }
  void invalidate_range_end(const invalidation&) noexcept { log.push_back(name + ":end"); }
};

struct plain {
  log_type& log;
  void invalidate_range_start(const invalidation&) noexcept { log.emplace_back("plain:start"); }
  void invalidate_range_end(const invalidation&) noexcept { log.emplace_back("plain:end"); }
};

}  // namespace

TEST_CASE_TEMPLATE("O3: all first passes, then all second ones in the order of the first, before start returns", P,
                   under_primary, tracked_primary) {
  P primary;
  log_type log;
  device one{log, "one"};
  device two{log, "two"};
  plain between{log};
  subscriber<device> node_two{two};
  subscriber<plain> node_between{between};
  subscriber<device> node_one{one};
  REQUIRE(primary.join(node_two) == errc::ok);
  REQUIRE(primary.join(node_between) == errc::ok);
  REQUIRE(primary.join(node_one) == errc::ok);
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(log == log_type{"one:begin", "plain:start", "two:begin", "one:finish", "two:finish"});
    log.clear();
  }
  CHECK(log == log_type{"one:end", "plain:end", "two:end"});
  CHECK(primary.space.unregister(node_one) == errc::ok);
  CHECK(primary.space.unregister(node_two) == errc::ok);
  CHECK(primary.space.unregister(node_between) == errc::ok);
}

TEST_CASE_TEMPLATE("O3: a refused start finishes what has begun, then everybody who began gets the end", P,
                   under_primary, tracked_primary) {
  P primary;
  log_type log;
  device first{log, "first"};
  device refusing{log, "refusing", true};
  device never{log, "never"};
  subscriber<device> node_never{never};
  subscriber<device> node_refusing{refusing};
  subscriber<device> node_first{first};
  for (auto* n : {&node_never, &node_refusing, &node_first}) REQUIRE(primary.join(*n) == errc::ok);
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.try_invalidate({0, 1}, event::clear);
    CHECK_FALSE(inv);
  }
  CHECK(log == log_type{"first:begin", "refusing:begin", "first:finish", "first:end", "refusing:end"});
  CHECK_FALSE(first.token.in_use());
  for (auto* n : {&node_never, &node_refusing, &node_first}) CHECK(primary.space.unregister(*n) == errc::ok);
}

TEST_CASE("O3: who has no token left does everything in the first pass") {
  tracked_primary primary;
  log_type log;
  device d{log, "d", false, false};
  subscriber<device> node{d};
  REQUIRE(primary.join(node) == errc::ok);
  { const auto inv = primary.space.invalidate({0, 1}, event::unmap); }
  CHECK(log == log_type{"d:begin", "d:end"});
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE("O3: a token that is handed out twice at the same time is reported, and finished once") {
  struct nesting {
    two_pass_token token{};
    int begins = 0;
    int finishes = 0;
    first_pass invalidate_begin(const invalidation&) noexcept {
      ++begins;
      return token;
    }
    void invalidate_finish(two_pass_token&, const invalidation&) noexcept { ++finishes; }
  };
  struct opener {  // runs inside the first pass of the outer bracket
    tracked_primary& primary;
    bool nested = false;
    void invalidate_range_start(const invalidation&) noexcept {
      if (nested) return;
      nested = true;
      const auto inner = primary.space.invalidate({5, 6}, event::unmap);
    }
  };
  const contract_recorder recorder;
  tracked_primary primary;
  nesting client;
  opener other{primary};
  subscriber<opener> node_other{other};
  subscriber<nesting> node{client};
  REQUIRE(primary.join(node_other) == errc::ok);
  REQUIRE(primary.join(node) == errc::ok);  // newest: its token is pending when the inner bracket begins
  { const auto inv = primary.space.invalidate({0, 1}, event::unmap); }
  CHECK(client.begins == 2);
  CHECK(client.finishes == 1);
  CHECK(recorder.rules() == log_type{"O3"});
  CHECK(primary.space.unregister(node) == errc::ok);
  CHECK(primary.space.unregister(node_other) == errc::ok);
}

TEST_CASE("O3: a token that is destroyed while a bracket has it is reported") {
  const contract_recorder recorder;
  {
    two_pass_token t;
    detail::pending_passes<std::uintptr_t> pending;
    pending.add(
        t, [](void*, two_pass_token&, const invalidation&) noexcept {}, nullptr);
    CHECK(t.in_use());
  }
  CHECK(recorder.rules() == log_type{"O3"});
}

TEST_CASE("O3: brackets of several threads each have their own tokens") {
  struct pool {
    struct fence : two_pass_token {
      std::atomic<bool> taken{false};
    };
    std::array<fence, 4> fences;
    std::atomic<int> begun{0};
    std::atomic<int> finished{0};
    first_pass invalidate_begin(const invalidation&) noexcept {
      begun.fetch_add(1);
      for (fence& f : fences) {
        if (!f.taken.exchange(true)) return f;
      }
      finished.fetch_add(1);
      return first_pass::complete();
    }
    void invalidate_finish(two_pass_token& t, const invalidation&) noexcept {
      finished.fetch_add(1);
      static_cast<fence&>(t).taken.store(false);
    }
    void invalidate_range_end(const invalidation&) noexcept { CHECK(finished.load() > 0); }
  };
  under_primary primary;
  pool client;
  subscriber<pool> node{client};
  REQUIRE(primary.join(node) == errc::ok);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&primary] {
      for (int i = 0; i < 500; ++i) {
        const auto reading = primary.lock();
        const auto inv = primary.space.invalidate({0, 1}, event::unmap);
      }
    });
  }
  for (auto& t : threads) t.join();
  CHECK(client.begun.load() == 1500);
  CHECK(client.finished.load() == 1500);
  CHECK(primary.space.unregister(node) == errc::ok);
}
