// SPDX-License-Identifier: MIT

// Asynchronous removal from an address space, and the barrier that waits for it.

#include <mmunotify/notifier/address_space.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/recording_client.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

#define EVERY_PRIMARY under_primary, keyed_primary, tracked_primary

namespace {

/// A client that removes itself when it is called, and frees itself when it is gone.
struct leaver {
  subscriber<leaver> node{*this};
  std::function<errc(basic_subscriber<std::uintptr_t>&, void (*)(basic_subscriber<std::uintptr_t>&) noexcept)> leave;
  static inline std::atomic<int> freed{0};
  static inline std::atomic<int> releases{0};
  std::atomic<int> starts{0};
  std::atomic<int> ends{0};
  errc first = errc::again;
  errc second = errc::again;

  static void free(basic_subscriber<std::uintptr_t>& n) noexcept {
    auto& self = static_cast<subscriber<leaver>&>(n).client();
    CHECK(self.starts.load() == self.ends.load());  // P2
    CHECK_FALSE(n.registered());
    freed.fetch_add(1);
    delete &self;
  }
  void invalidate_range_start(const invalidation&) noexcept {
    starts.fetch_add(1);
    if (!leave) return;
    const auto go = std::exchange(leave, {});
    first = go(node, &leaver::free);
    second = go(node, &leaver::free);
  }
  void invalidate_range_end(const invalidation&) noexcept { ends.fetch_add(1); }
  void release() noexcept { releases.fetch_add(1); }
};

}  // namespace

TEST_CASE_TEMPLATE("L7: a client removes itself in its own callback; it is told when it is free", P, EVERY_PRIMARY) {
  leaver::freed.store(0);
  leaver::releases.store(0);
  P primary;
  auto* const client = new leaver;
  client->leave = [&](auto& n, auto done) { return primary.space.unregister_async(n, done); };
  REQUIRE(primary.join(client->node) == errc::ok);
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(client->first == errc::ok);
    CHECK(client->second == errc::not_registered);  // it is leaving already
    CHECK(client->starts.load() == 1);
    CHECK(leaver::freed.load() == 0);  // its end is to come
  }
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(leaver::freed.load() == 1);
  CHECK(leaver::releases.load() == 1);
  CHECK_FALSE(primary.space.armed());  // D3
}

TEST_CASE("L7: a client removes itself in a callback that comes before its registration has returned") {
  leaver::freed.store(0);
  leaver::releases.store(0);
  tracked_primary primary;
  auto* const client = new leaver;
  std::atomic<bool> asked{false};
  errc first = errc::again;
  errc second = errc::again;
  client->leave = [&](auto& n, auto done) {
    const errc e = primary.space.unregister_async(n, done);
    (asked.exchange(true) ? second : first) = e;
    return e;
  };
  std::atomic<bool> joined{false};
  std::thread newcomer;
  {
    const auto outer = primary.space.invalidate({0, 1}, event::unmap);  // the registration waits for it
    newcomer = std::thread([&] {
      CHECK(primary.join(client->node) == errc::ok);
      joined.store(true);
    });
    while (!asked.load()) const auto inner = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(first == errc::ok);
    CHECK(second == errc::not_registered);
    CHECK_FALSE(joined.load());
    CHECK(leaver::freed.load() == 0);
  }
  newcomer.join();
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(leaver::freed.load() == 1);
  CHECK(leaver::releases.load() == 1);
  CHECK_FALSE(primary.space.armed());
}

TEST_CASE_TEMPLATE("L8: barrier returns after every removal that was asked for before has told its owner", P,
                   EVERY_PRIMARY) {
  leaver::freed.store(0);
  P primary;
  counting_client keeps;
  subscriber<counting_client> other{keeps};
  REQUIRE(primary.join(other) == errc::ok);
  for (int round = 1; round <= 20; ++round) {
    for (int i = 0; i < 5; ++i) {
      auto* const client = new leaver;
      REQUIRE(primary.join(client->node) == errc::ok);
      CHECK(primary.space.unregister_async(client->node, &leaver::free) == errc::ok);
    }
    CHECK(primary.space.barrier() == errc::ok);
    CHECK(leaver::freed.load() == 5 * round);
  }
  CHECK(primary.space.armed());
  CHECK(primary.space.unregister(other) == errc::ok);
  CHECK_FALSE(primary.space.armed());
  CHECK(primary.space.barrier() == errc::ok);  // nobody to wait for
}

TEST_CASE_TEMPLATE("L7: barrier and unregister where they would wait for themselves say so", P, EVERY_PRIMARY) {
  const contract_recorder recorder;
  P primary;
  counting_client client;
  subscriber<counting_client> node{client};
  REQUIRE(primary.join(node) == errc::ok);
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(primary.space.barrier() == errc::would_deadlock);
    CHECK(recorder.rules() == std::vector<std::string>{"L7"});
    CHECK(primary.space.unregister_async(node) == errc::ok);
  }
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(primary.space.unregister(node) == errc::not_registered);
}

TEST_CASE("L7: in a done() barrier would wait for itself, a blocking unregister of another node does not") {
  static tracked_primary* space;
  static subscriber<counting_client>* other_node;
  static errc barrier_answer;
  static errc unregister_answer;
  const contract_recorder recorder;
  tracked_primary primary;
  counting_client client;
  counting_client other;
  subscriber<counting_client> node{client};
  subscriber<counting_client> node_of_other{other};
  space = &primary;
  other_node = &node_of_other;
  REQUIRE(primary.join(node) == errc::ok);
  REQUIRE(primary.join(node_of_other) == errc::ok);
  CHECK(primary.space.unregister_async(node, [](auto&) noexcept {
    barrier_answer = space->space.barrier();
    unregister_answer = space->space.unregister(*other_node);
  }) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(barrier_answer == errc::would_deadlock);
  CHECK(unregister_answer == errc::ok);
  CHECK(recorder.rules() == std::vector<std::string>{"L7"});
  CHECK(other.releases.load() == 1);
}

TEST_CASE_TEMPLATE("L9: done() may register the node again", P, tracked_primary) {
  static P* home;
  static std::atomic<int> rounds;
  P primary;
  counting_client client;
  subscriber<counting_client> node{client};
  home = &primary;
  rounds.store(0);
  REQUIRE(primary.join(node) == errc::ok);
  CHECK(primary.space.unregister_async(node, [](basic_subscriber<std::uintptr_t>& n) noexcept {
    rounds.fetch_add(1);
    CHECK(home->join(static_cast<subscriber<counting_client>&>(n)) == errc::ok);
  }) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(rounds.load() == 1);
  CHECK(node.registered());
  { const auto inv = primary.space.invalidate({0, 1}, event::unmap); }
  CHECK(client.starts.load() == 1);
  CHECK(primary.space.unregister(node) == errc::ok);
  CHECK(client.releases.load() == 2);
}

TEST_CASE_TEMPLATE("L1: an unregister beside an asynchronous removal returns when no callback will run", P,
                   EVERY_PRIMARY) {
  for (int round = 0; round < 50; ++round) {
    P primary;
    counting_client client;
    subscriber<counting_client> node{client};
    REQUIRE(primary.join(node) == errc::ok);
    std::atomic<bool> stop{false};
    std::thread changer([&] {
      while (!stop.load()) {
        const auto reading = primary.lock();
        const auto inv = primary.space.invalidate({0, 1}, event::unmap);
      }
    });
    CHECK(primary.space.unregister_async(node) == errc::ok);
    const errc e = primary.space.unregister(node);
    CHECK((e == errc::ok || e == errc::not_registered));  // the latter if it was gone already
    const int starts = client.starts.load();
    CHECK(client.ends.load() == starts);
    let_others_run();
    CHECK(client.starts.load() == starts);
    CHECK(client.releases.load() == 1);
    stop.store(true);
    changer.join();
  }
}

TEST_CASE_TEMPLATE("L3: the space's release runs the hook of who is leaving, or waits for it; once (L4)", P,
                   EVERY_PRIMARY) {
  for (int round = 0; round < 50; ++round) {
    P primary;
    counting_client client;
    subscriber<counting_client> node{client};
    static std::atomic<int> done;
    done.store(0);
    REQUIRE(primary.join(node) == errc::ok);
    std::thread other([&] {
      CHECK(primary.space.unregister_async(node, [](auto&) noexcept { done.fetch_add(1); }) != errc::would_deadlock);
    });
    CHECK(primary.space.release() == errc::ok);
    CHECK(client.releases.load() == 1);
    other.join();
    CHECK(primary.space.barrier() == errc::ok);
    CHECK(client.releases.load() == 1);
    CHECK(done.load() == 1);
    CHECK_FALSE(primary.space.armed());
  }
}

TEST_CASE_TEMPLATE("L7: an asynchronous removal that finds another at work is told when that one is done", P,
                   EVERY_PRIMARY) {
  for (const bool by_release : {false, true}) {
    static std::atomic<int> done;
    done.store(0);
    P primary;
    struct slow {
      std::atomic<bool> releasing{false};
      std::atomic<bool> go_on{false};
      void invalidate_range_start(const invalidation&) noexcept {}
      void release() noexcept {
        releasing.store(true, std::memory_order_release);
        wait_for(go_on);
      }
    } client;
    subscriber<slow> node{client};
    REQUIRE(primary.join(node) == errc::ok);
    std::thread remover([&] {
      if (by_release) {
        CHECK(primary.space.release() == errc::ok);
      } else {
        CHECK(primary.space.unregister(node) == errc::ok);
      }
    });
    wait_for(client.releasing);
    CHECK(primary.space.unregister_async(node, [](auto& n) noexcept {
      CHECK_FALSE(n.registered());
      done.fetch_add(1);
    }) == errc::ok);
    CHECK(primary.space.unregister_async(node) == errc::not_registered);
    CHECK(done.load() == 0);
    std::thread waiter([&] {
      CHECK(primary.space.barrier() == errc::ok);
      CHECK(done.load() == 1);  // L8
    });
    let_others_run();
    client.go_on.store(true, std::memory_order_release);
    remover.join();
    waiter.join();
    CHECK_FALSE(primary.space.armed());
  }
}

TEST_CASE_TEMPLATE("L5: an asynchronous removal after the release tells at once", P, EVERY_PRIMARY) {
  static int done;
  done = 0;
  P primary;
  counting_client client;
  subscriber<counting_client> node{client};
  CHECK(primary.space.unregister_async(node) == errc::not_registered);  // never registered
  REQUIRE(primary.join(node) == errc::ok);
  CHECK(primary.space.release() == errc::ok);
  CHECK(primary.space.unregister_async(node, [](auto&) noexcept { ++done; }) == errc::ok);
  CHECK(done == 1);
  CHECK(primary.space.unregister_async(node) == errc::not_registered);
}

TEST_CASE_TEMPLATE("a space that goes waits for those who are leaving", P, EVERY_PRIMARY) {
  leaver::freed.store(0);
  for (int round = 0; round < 20; ++round) {
    P primary;
    for (int i = 0; i < 3; ++i) {
      auto* const client = new leaver;
      REQUIRE(primary.join(client->node) == errc::ok);
      CHECK(primary.space.unregister_async(client->node, &leaver::free) == errc::ok);
    }
  }
  CHECK(leaver::freed.load() == 60);
}

TEST_CASE_TEMPLATE("L6: a registration that is refused leaves a node that its space had released as it was", P,
                   EVERY_PRIMARY) {
  static int done;
  done = 0;
  P first;
  P second;
  counting_client client;
  subscriber<counting_client> node{client};
  REQUIRE(first.join(node) == errc::ok);
  CHECK(first.space.release() == errc::ok);
  CHECK(second.space.release() == errc::ok);
  CHECK(second.join(node) == errc::released);
  CHECK(first.space.unregister_async(node, [](auto&) noexcept { ++done; }) == errc::ok);
  CHECK(done == 1);
}

TEST_CASE_TEMPLATE("L7: in a done(), an unregister of a node that another thread removes never waits for itself", P,
                   EVERY_PRIMARY) {
  static P* home;
  static subscriber<counting_client>* being_removed;
  static errc answer;
  for (int round = 0; round < 50; ++round) {
    const contract_recorder recorder;
    P primary;
    counting_client client;
    counting_client other;
    subscriber<counting_client> node{client};
    subscriber<counting_client> other_node{other};
    home = &primary;
    being_removed = &node;
    REQUIRE(primary.join(node) == errc::ok);
    REQUIRE(primary.join(other_node) == errc::ok);
    std::thread remover([&] {
      const errc e = primary.space.unregister(node);
      CHECK((e == errc::ok || e == errc::not_registered));
    });
    CHECK(primary.space.unregister_async(
              other_node, [](auto&) noexcept { answer = home->space.unregister(*being_removed); }) == errc::ok);
    const errc adopted = primary.space.unregister_async(node);
    CHECK((adopted == errc::ok || adopted == errc::not_registered));
    remover.join();
    CHECK(primary.space.barrier() == errc::ok);
    CHECK((answer == errc::would_deadlock || answer == errc::ok || answer == errc::not_registered));
    CHECK(client.releases.load() == 1);
  }
}

TEST_CASE("L7: a release hook may wait for another space's removals while its own node is leaving") {
  static std::atomic<bool> busy;
  static std::atomic<bool> go;
  busy.store(false);
  go.store(false);
  struct waits_elsewhere {
    tracked_primary& other;
    std::atomic<bool> releasing{false};
    void release() noexcept {
      releasing.store(true, std::memory_order_release);
      CHECK(other.space.barrier() == errc::ok);
    }
  };
  srcu_domain domain;
  srcu_head occupied;
  REQUIRE(domain.call(occupied, [](srcu_head*) noexcept {
    busy.store(true);
    wait_for(go);
  }) == errc::ok);
  wait_for(busy);  // the worker has something to do until the hook runs
  tracked_primary other;
  tracked_primary primary;
  waits_elsewhere client{other};
  subscriber<waits_elsewhere> node{client};
  counting_client counting;
  subscriber<counting_client> other_node{counting};
  REQUIRE(other.join(other_node) == errc::ok);
  REQUIRE(primary.join(node) == errc::ok);
  CHECK(other.space.unregister_async(other_node) == errc::ok);
  CHECK(primary.space.unregister_async(node) == errc::ok);
  std::thread releaser([&] { CHECK(primary.space.release() == errc::ok); });
  wait_for(client.releasing);
  go.store(true);
  releaser.join();
  CHECK(primary.space.barrier() == errc::ok);
  CHECK_FALSE(node.registered());
}
