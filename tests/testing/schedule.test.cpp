// SPDX-License-Identifier: MIT

#include <mmunotify/testing/schedule.hpp>

#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include "support/contract_recorder.hpp"

using namespace mmunotify;
using testing::interject;
using testing::point;

TEST_CASE("a script runs once, at the point with its number, and not if there are fewer") {
  for (unsigned n = 0; n < 5; ++n) {
    std::vector<int> log;
    const bool ran = interject(
        n, [&] { log.push_back(-1); },
        [&] {
          for (int i = 0; i < 3; ++i) {
            point();
            log.push_back(i);
          }
        });
    CHECK(ran == (n < 3));
    std::vector<int> wanted{0, 1, 2};
    if (n < 3) wanted.insert(wanted.begin() + static_cast<int>(n), -1);
    CHECK(log == wanted);
  }
}

TEST_CASE("points inside a script, outside of any, and in other threads are nobody's") {
  point();
  int runs = 0;
  CHECK(interject(
      0,
      [&] {
        runs += 1;
        point();
      },
      [] {
        std::thread([] { point(); }).join();
        point();
        point();
      }));
  CHECK(runs == 1);
  CHECK_FALSE(interject(
      0, [&] { runs += 1; }, [] { std::thread([] { point(); }).join(); }));
  CHECK(runs == 1);
}

TEST_CASE("a mutex has a point before it locks and one after it unlocks, and none in between") {
  testing::mutex m, other;
  std::vector<bool> held;
  for (unsigned n = 0; n < 8; ++n) {
    const bool ran = interject(
        n, [&] { held.push_back(!m.try_lock() || (m.unlock(), false)); },
        [&] {
          const std::lock_guard outer{m};
          point();
          const std::lock_guard inner{other};
        });
    CHECK(ran == (n < 2));
  }
  CHECK(held == std::vector<bool>{false, false});
}

TEST_CASE("L7: a thread that locks a mutex twice is reported and goes on") {
  const contract_recorder recorder;
  testing::mutex m;
  m.lock();
  CHECK_FALSE(m.try_lock());
  CHECK(recorder.rules().empty());
  m.lock();
  CHECK(recorder.rules() == std::vector<std::string>{"L7"});
  m.unlock();
  m.unlock();
  bool taken = false;
  std::thread([&] {
    taken = m.try_lock();
    if (taken) m.unlock();
  }).join();
  CHECK(taken);
}

TEST_CASE("a mutex excludes other threads") {
  testing::mutex m;
  int n = 0;
  const auto add = [&] {
    testing::detail::current_schedule.restless = 1;
    for (int i = 0; i < 1000; ++i) {
      const std::lock_guard locked{m};
      n += 1;
    }
  };
  std::thread a(add), b(add);
  a.join();
  b.join();
  CHECK(n == 2000);
}

TEST_CASE("L7: an allocation is reported inside a hook only") {
  const contract_recorder recorder;
  testing::note_allocation();
  CHECK(recorder.rules().empty());
  const testing::detail::inside_callbacks inside;
  testing::note_allocation();
  CHECK(recorder.rules() == std::vector<std::string>{"L7"});
}
