// SPDX-License-Identifier: MIT

// Intervals of an address space, whatever its policy.

#include <doctest/doctest.h>

#include <atomic>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include <mmunotify/interval/interval_notifier.hpp>

#include "interval/interval_space.hpp"
#include "support/contract_recorder.hpp"
#include "support/recording_client.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

constexpr std::uint64_t page = 0x1000;

// Spaces that nobody observes.
using under_primary_of_none = locking_primary<arming::under<std::shared_mutex>, observe::none>;
using keyed_primary_of_none = locking_primary<arming::keyed<std::shared_mutex>, observe::none>;
using tracked_primary_of_none = basic_tracked_primary<observe::none>;
#define EVERY_PRIMARY tracked_primary_of_none, under_primary_of_none, keyed_primary_of_none

using notifier_of = interval_notifier<counting_client>;

}  // namespace

TEST_CASE_TEMPLATE("D3: the first interval arms the space, the last one disarms it, however it goes", P,
                   EVERY_PRIMARY) {
  P w;
  counting_client c;
  notifier_of a{c};
  notifier_of b{c};
  for (int i = 0; i < 4; ++i) {
    CHECK_FALSE(w.space.armed());
    REQUIRE(w.insert(a, {0, page}) == errc::ok);
    CHECK(w.space.armed());
    REQUIRE(w.space.insert(b, {page, 2 * page}) == errc::ok);  // armed: no witness is needed
    { const auto bracket = w.space.invalidate({0, 2 * page}, event::unmap); }
    CHECK(c.starts == 2 * i + 2);
    CHECK(c.ends == 2 * i + 2);
    CHECK(w.space.remove(a) == errc::ok);
    if (i % 2 == 0) {
      CHECK(w.space.remove(b) == errc::ok);
    } else {
      CHECK(w.space.remove_async(b) == errc::ok);
    }
    CHECK(w.space.barrier() == errc::ok);
  }
  CHECK_FALSE(w.space.armed());
}

TEST_CASE_TEMPLATE("D3: an interval that comes and goes without a pause is called while it is there", P,
                   EVERY_PRIMARY) {
  P w;
  counting_client c;
  notifier_of iv{c};
  for (int i = 0; i < 200; ++i) {
    REQUIRE(w.insert(iv, {0, page}) == errc::ok);
    const int before = c.starts.load();
    { const auto bracket = w.space.invalidate({0, 1}, event::unmap); }
    CHECK(c.starts.load() == before + 1);
    CHECK(w.space.remove(iv) == errc::ok);
  }
  CHECK(w.space.barrier() == errc::ok);
  CHECK_FALSE(w.space.armed());
}

TEST_CASE("P7: a space that is disarmed and has a lock wants to see it") {
  under_primary_of_none w;
  counting_client c;
  notifier_of iv{c};
  std::unique_lock<std::shared_mutex> not_held(w.tables, std::defer_lock);
  CHECK(w.space.insert(iv, {0, page}, not_held) == errc::lock_not_held);
  CHECK_FALSE(iv.registered());
  CHECK_FALSE(w.space.armed());
  CHECK(w.insert(iv, {page, page}) == errc::bad_range);
  CHECK_FALSE(w.space.armed());
  {
    const std::unique_lock held(w.tables);
    CHECK(w.space.insert(iv, {0, page}) == errc::ok);  // the caller has it, and does not show it
  }
  CHECK(w.space.armed());
  CHECK(w.space.remove(iv) == errc::ok);
  CHECK(w.space.barrier() == errc::ok);
  CHECK_FALSE(w.space.armed());
}

TEST_CASE("C5: brackets that began before there was an interval are waited for by its first fault") {
  address_space<arming::tracked> space;
  counting_client c;
  notifier_of iv{c};
  std::optional<beside_fault> fault;
  {
    const auto bracket = space.invalidate({0, page}, event::unmap);  // nobody is there
    REQUIRE(space.insert(iv, {0, page}) == errc::ok);
    fault.emplace(iv);
    CHECK(fault->waits());
  }
  CHECK(fault->succeeds());
  CHECK(c.starts == 0);
  CHECK(space.remove(iv) == errc::ok);
  CHECK(space.barrier() == errc::ok);
}

TEST_CASE_TEMPLATE("O2: intervals come before whole-space subscribers, at start and at end", P, EVERY_PRIMARY) {
  P w;
  std::vector<std::string> log;
  logging_client whole{log, "whole"};
  logging_client part{log, "part", true};
  subscriber<logging_client> node{whole};
  interval_notifier<logging_client> iv{part};
  REQUIRE(w.insert(iv, {0, 16}) == errc::ok);
  REQUIRE(w.join(node) == errc::ok);
  { const auto b = w.space.invalidate({8, 32}, event::unmap); }
  CHECK(log == std::vector<std::string>{"part:start[8,16)", "whole:start[8,32)", "part:end[8,16)", "whole:end[8,32)"});
  log.clear();
  CHECK(w.space.test_young({0, 8}));  // O5: the interval says yes, and nobody else is asked
  CHECK(w.space.clear_young({0, 8}));
  CHECK(log == std::vector<std::string>{"part:test_young", "part:clear_young", "whole:clear_young"});
  CHECK(w.space.unregister(node) == errc::ok);
  CHECK(w.space.remove(iv) == errc::ok);
  CHECK(w.space.barrier() == errc::ok);
}

TEST_CASE_TEMPLATE("P4: when a subscriber behind the intervals refuses, every interval is as before", P,
                   EVERY_PRIMARY) {
  P w;
  std::vector<std::string> log;
  logging_client whole{log, "whole", false, true};
  logging_client part{log, "part"};
  subscriber<logging_client> node{whole};
  interval_notifier<logging_client> iv{part};
  REQUIRE(w.insert(iv, {0, page}) == errc::ok);
  REQUIRE(w.join(node) == errc::ok);
  const auto s = iv.read_begin();
  const std::uint64_t before = interval_probe::word(iv);
  CHECK_FALSE(static_cast<bool>(w.space.try_invalidate({0, 8}, event::unmap)));
  CHECK(log == std::vector<std::string>{"part:start[0,8)", "whole:start[0,8)", "part:end[0,8)", "whole:end[0,8)"});
  CHECK(interval_probe::word(iv) == before);
  CHECK_FALSE(iv.read_retry(s));
  whole.refuses = false;
  CHECK(static_cast<bool>(w.space.try_invalidate({0, 8}, event::unmap)));
  CHECK(iv.read_retry(s));
  CHECK(w.space.unregister(node) == errc::ok);
  CHECK(w.space.remove(iv) == errc::ok);
  CHECK(w.space.barrier() == errc::ok);
}

TEST_CASE_TEMPLATE("L4: release() tells every interval once; L5: they are removed afterwards", P, EVERY_PRIMARY) {
  counting_client c;
  notifier_of a{c};
  notifier_of b{c};
  notifier_of late{c};
  {
    P w;
    REQUIRE(w.insert(a, {0, page}) == errc::ok);
    REQUIRE(w.insert(b, {page, 3 * page}) == errc::ok);
    REQUIRE(w.space.resize(b, {page, 2 * page}) == errc::ok);  // two entries for a while
    CHECK(w.space.release() == errc::ok);
    CHECK(c.releases == 2);
    CHECK(w.insert(late, {0, page}) == errc::released);
    CHECK(w.space.insert(late, {0, page}) == errc::released);
    CHECK_FALSE(late.registered());
    { const auto bracket = w.space.invalidate({0, page}, event::unmap); }
    CHECK(c.starts == 0);
    CHECK(w.space.release() == errc::ok);
    CHECK(w.space.remove(a) == errc::ok);
    CHECK(w.space.remove_async(b) == errc::ok);
    while (b.registered()) std::this_thread::yield();
    CHECK(w.space.remove(b) == errc::not_registered);
    CHECK(c.releases == 2);
  }
  P next;  // on the same registry, where there is one
  REQUIRE(next.insert(a, {0, page}) == errc::ok);
  { const auto bracket = next.space.invalidate({0, page}, event::unmap); }
  CHECK(c.starts == 1);
  CHECK(next.space.remove(a) == errc::ok);
  CHECK(next.space.barrier() == errc::ok);
  CHECK_FALSE(next.space.armed());
}

TEST_CASE_TEMPLATE("L6: an interval belongs to one space, and others do not know it", P, EVERY_PRIMARY) {
  P w;
  P other;
  counting_client c;
  notifier_of iv{c};
  notifier_of upper{c};
  CHECK(w.space.remove(iv) == errc::not_registered);
  CHECK(w.space.split(iv, 8, upper) == errc::not_registered);
  REQUIRE(w.insert(iv, {0, page}) == errc::ok);
  CHECK(other.insert(iv, {0, page}) == errc::already_registered);
  CHECK(other.space.barrier() == errc::ok);
  CHECK_FALSE(other.space.armed());
  CHECK(other.space.remove(iv) == errc::not_registered);
  CHECK(other.space.remove_async(iv) == errc::not_registered);
  CHECK(other.space.resize(iv, {0, 8}) == errc::not_registered);
  REQUIRE(w.space.split(iv, 8, upper) == errc::ok);
  {
    const contract_recorder violations;
    const auto b = w.space.invalidate({0, page}, event::unmap);
    CHECK(w.space.remove(iv) == errc::would_deadlock);
    CHECK(violations.rules() == std::vector<std::string>{"L7"});
  }
  CHECK(c.starts == 2);
  CHECK(w.space.remove(iv) == errc::ok);
  CHECK(w.space.armed());
  CHECK(w.space.remove(upper) == errc::ok);
  CHECK(w.space.barrier() == errc::ok);
  CHECK_FALSE(w.space.armed());
}

TEST_CASE("L9: an interval forgets a space that it has left, also while it is being inserted into the next") {
  counting_client c;
  notifier_of iv{c};
  address_space<arming::tracked> lasting;
  std::atomic<int> round{0};
  std::atomic<bool> inserted{false};
  std::thread remover([&] {
    for (int mine = 1; mine <= 300; ++mine) {
      while (round.load() != mine) std::this_thread::yield();
      while (lasting.remove_async(iv) != errc::ok && !inserted.load()) {
      }
      round.store(-mine);
    }
  });
  for (int i = 1; i <= 300; ++i) {
    {
      address_space<arming::tracked> brief;
      REQUIRE(brief.insert(iv, {0, page}) == errc::ok);
      REQUIRE(brief.remove(iv) == errc::ok);
    }
    inserted.store(false);
    round.store(i);
    REQUIRE(lasting.insert(iv, {0, page << (i % 8)}) == errc::ok);
    inserted.store(true);
    while (round.load() != -i) std::this_thread::yield();
    static_cast<void>(lasting.remove(iv));
    CHECK(lasting.barrier() == errc::ok);
    REQUIRE_FALSE(iv.registered());
  }
  remover.join();
}

TEST_CASE("D2: a space that is compiled out has no intervals") {
  address_space<disabled> none;
  counting_client c;
  notifier_of iv{c};
  notifier_of upper{c};
  CHECK(none.insert(iv, {0, page}) == errc::disabled);
  CHECK(none.resize(iv, {0, page}) == errc::not_registered);
  CHECK(none.split(iv, 1, upper) == errc::not_registered);
  CHECK(none.remove_async(iv) == errc::not_registered);
  CHECK(none.remove(iv) == errc::not_registered);
}

TEST_CASE_TEMPLATE("D3: threads that insert and remove beside brackets leave the space disarmed", P,
                   tracked_primary_of_none, under_primary_of_none) {
  P w;
  std::atomic<int> missed{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      const std::uint64_t mine = static_cast<std::uint64_t>(t) * 16 * page;
      for (int i = 0; i < 300; ++i) {
        counting_client c;
        notifier_of iv{c};
        if (w.insert(iv, {mine, mine + page}) != errc::ok) missed.fetch_add(1);
        {
          const auto reading = w.lock();
          const auto b = w.space.invalidate({mine, mine + 1}, event::unmap);
          if (c.starts != 1) missed.fetch_add(1);
        }
        if (c.ends != 1) missed.fetch_add(1);
        if (i % 3 == 0) {
          if (w.space.remove_async(iv) != errc::ok) missed.fetch_add(1);
          while (iv.registered()) std::this_thread::yield();
        } else if (w.space.remove(iv) != errc::ok) {
          missed.fetch_add(1);
        }
      }
    });
  }
  for (auto& t : threads) t.join();
  CHECK(missed.load() == 0);
  CHECK(w.space.barrier() == errc::ok);
  CHECK_FALSE(w.space.armed());
}

TEST_CASE_TEMPLATE("L8: barrier waits for intervals that leave a released space", P, EVERY_PRIMARY) {
  for (const bool released_first : {true, false}) {
    static std::atomic<bool> done;
    done.store(false);
    P w;
    counting_client c;
    notifier_of iv{c};
    REQUIRE(w.insert(iv, {0, page}) == errc::ok);
    const auto leave = [&] { return w.space.remove_async(iv, [](auto&) noexcept { done.store(true); }); };
    if (released_first) CHECK(w.space.release() == errc::ok);
    CHECK(leave() == errc::ok);
    if (!released_first) CHECK(w.space.release() == errc::ok);
    CHECK(w.space.barrier() == errc::ok);
    CHECK(done.load());
    CHECK_FALSE(iv.registered());
    CHECK_FALSE(w.space.armed());
  }
}

TEST_CASE_TEMPLATE("L6: nothing comes to a released space, by a split either", P, EVERY_PRIMARY) {
  P w;
  counting_client c;
  counting_client d;
  notifier_of iv{c};
  notifier_of upper{d};
  REQUIRE(w.insert(iv, {0, 4 * page}) == errc::ok);
  CHECK(w.space.release() == errc::ok);
  CHECK(c.releases.load() == 1);
  CHECK(w.space.split(iv, 2 * page, upper) == errc::released);
  CHECK_FALSE(upper.registered());
  CHECK(w.insert(upper, {0, page}) == errc::released);
  CHECK(w.space.remove(iv) == errc::ok);
  CHECK(w.space.barrier() == errc::ok);
}

TEST_CASE("L3: no interval is called after the space's release, though the space is still armed") {
  static std::atomic<bool> go;
  static std::atomic<bool> busy;
  go.store(false);
  busy.store(false);
  srcu_domain other;
  srcu_head occupied;
  REQUIRE(other.call(occupied, [](srcu_head*) noexcept {
    busy.store(true);
    wait_for(go);
  }) == errc::ok);
  wait_for(busy);  // the worker has something else to do: who leaves does not get away
  address_space<arming::tracked> space;
  counting_client c;
  counting_client d;
  notifier_of gone{c};
  notifier_of iv{d};
  REQUIRE(space.insert(gone, {0, page}) == errc::ok);
  CHECK(space.remove(gone) == errc::ok);
  REQUIRE(space.insert(iv, {0, page}) == errc::ok);
  CHECK(space.release() == errc::ok);
  CHECK(d.releases.load() == 1);
  { const auto bracket = space.invalidate({0, page}, event::unmap); }
  CHECK_FALSE(space.test_young({0, page}));
  CHECK(d.starts.load() == 0);
  go.store(true);
  CHECK(space.remove(iv) == errc::ok);
  CHECK(space.barrier() == errc::ok);
}

TEST_CASE("C8: with a turn a fault succeeds at the first try, in the first interval of a space as well") {
  address_space<arming::tracked> space;
  counting_client c;
  notifier_of iv{c};
  REQUIRE(space.insert(iv, {0, page}) == errc::ok);
  {
    const auto turn = iv.take_turn();
    REQUIRE(static_cast<bool>(turn));
    CHECK_FALSE(iv.read_retry(iv.read_begin()));
  }
  CHECK(space.remove(iv) == errc::ok);
}
