// SPDX-License-Identifier: MIT
#include <mmunotify/sync/lockfree_hlist.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

struct element : hlist_node {
  int name = 0;
  std::atomic<bool> usable{false};
};

template <class List>
std::vector<int> names(srcu_domain& domain, const List& list) {
  const read_section s(domain);
  std::vector<int> found;
  for (element& e : list) found.push_back(e.name);
  return found;
}

}  // namespace

TEST_CASE("O2: a walk meets every element, newest first, and may stop anywhere") {
  srcu_domain domain;
  lockfree_hlist<element> list(domain);
  CHECK(list.empty());
  std::array<element, 4> e;
  for (int i = 0; i < 4; ++i) {
    e[static_cast<std::size_t>(i)].name = i;
    CHECK(list.push_front(e[static_cast<std::size_t>(i)]) == errc::ok);
  }
  CHECK(names(domain, list) == std::vector<int>{3, 2, 1, 0});
  int visited = 0;
  {
    const read_section s(domain);
    for (element& x : list) {
      ++visited;
      if (x.name == 2) break;
    }
  }
  CHECK(visited == 2);
  // Every order of removal.
  for (const int i : {1, 3, 0, 2}) CHECK(list.remove(e[static_cast<std::size_t>(i)]) == errc::ok);
  CHECK(list.empty());
}

TEST_CASE("L9: a node is on one list at a time, and comes back after its removal") {
  srcu_domain domain;
  lockfree_hlist<element> list(domain);
  lockfree_hlist<element> other(domain);
  element e;
  CHECK_FALSE(e.linked());
  for (int i = 0; i < 3; ++i) {
    CHECK(list.push_front(e) == errc::ok);
    CHECK(e.linked());
    CHECK(list.push_front(e) == errc::already_registered);
    CHECK(other.push_front(e) == errc::already_registered);
    CHECK(other.empty());
    CHECK(list.remove(e) == errc::ok);
    CHECK_FALSE(e.linked());
    CHECK(list.remove(e) == errc::not_registered);
    CHECK(names(domain, list).empty());
  }
}

TEST_CASE("L7: removal inside a section is refused and changes nothing") {
  srcu_domain domain;
  lockfree_hlist<element> list(domain);
  element e;
  REQUIRE(list.push_front(e) == errc::ok);
  {
    const read_section s(domain);
    CHECK(list.remove(e) == errc::would_deadlock);
  }
  CHECK(names(domain, list).size() == 1);
  CHECK(list.remove(e) == errc::ok);
}

TEST_CASE("a walker that stands on a removed node walks on") {
  srcu_domain domain;
  lockfree_hlist<element> list(domain);
  std::array<element, 3> e;
  for (int i = 0; i < 3; ++i) {
    e[static_cast<std::size_t>(i)].name = i;
    REQUIRE(list.push_front(e[static_cast<std::size_t>(i)]) == errc::ok);
  }
  std::vector<int> seen;
  {
    const read_section s(domain);
    for (element& x : list) {
      seen.push_back(x.name);
      if (x.name == 1) {  // remove the node under the walker and the one before it
        CHECK(list.mark(e[1]));
        CHECK(list.mark(e[2]));
        CHECK_FALSE(list.mark(e[1]));
        list.sweep(s);
      }
    }
  }
  CHECK(seen == std::vector<int>{2, 1, 0});
  CHECK(names(domain, list) == std::vector<int>{0});
  domain.synchronize();
  list.retire(e[1]);
  list.retire(e[2]);
  CHECK(list.remove(e[0]) == errc::ok);
}

TEST_CASE("L1: a removal returns only when nobody stands on the node any more") {
  srcu_domain domain;
  lockfree_hlist<element> list(domain);
  element e;
  REQUIRE(list.push_front(e) == errc::ok);
  std::atomic<bool> standing{false};
  std::atomic<bool> removing{false};
  std::atomic<bool> left{false};
  std::thread walker([&] {
    const read_section s(domain);
    for (element& x : list) {
      CHECK(&x == &e);
      standing.store(true, std::memory_order_release);
      wait_for(removing);
      let_others_run();
      left.store(true, std::memory_order_relaxed);
    }
  });
  wait_for(standing);
  removing.store(true, std::memory_order_release);
  CHECK(list.remove(e) == errc::ok);
  CHECK(left.load(std::memory_order_relaxed));
  walker.join();
}

TEST_CASE("L1: a node or list that is destroyed while linked is reported") {
  const contract_recorder recorder;
  srcu_domain domain;
  alignas(element) std::array<std::byte, sizeof(element)> storage{};
  {
    lockfree_hlist<element> list(domain);
    auto* e = new (storage.data()) element;
    REQUIRE(list.push_front(*e) == errc::ok);
    e->~element();
    CHECK(recorder.rules() == std::vector<std::string>{"L1"});
  }
  CHECK(recorder.rules() == std::vector<std::string>{"L1", "L1"});
}

TEST_CASE("S2: many writers, re-insertion and walkers: nothing lost, nothing seen after its grace period") {
  constexpr std::size_t writers = 3;
  constexpr std::size_t per_writer = 4;
  constexpr int rounds = 300;
  srcu_domain domain;
  lockfree_hlist<element> list(domain);
  element resident;  // is on the list all the time
  resident.name = -1;
  resident.usable.store(true);
  REQUIRE(list.push_front(resident) == errc::ok);
  std::array<std::array<element, per_writer>, writers> all;
  std::atomic<bool> stop{false};
  std::atomic<int> unusable{0};
  std::atomic<int> resident_missed{0};
  std::vector<std::thread> threads;
  for (std::size_t w = 0; w < writers; ++w) {
    threads.emplace_back([&, w] {
      small_random random(w + 7);
      for (int i = 0; i < rounds; ++i) {
        auto& e = all[w][random.below(per_writer)];
        if (!e.linked()) {
          e.usable.store(true, std::memory_order_relaxed);
          if (list.push_front(e) != errc::ok) unusable.fetch_add(1);
        } else {
          if (list.remove(e) != errc::ok) unusable.fetch_add(1);
          e.usable.store(false, std::memory_order_relaxed);
        }
      }
      for (auto& e : all[w]) {
        if (e.linked() && list.remove(e) != errc::ok) unusable.fetch_add(1);
      }
    });
  }
  std::thread walker([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      const read_section s(domain);
      bool met = false;
      for (element& e : list) {
        if (!e.usable.load(std::memory_order_relaxed)) unusable.fetch_add(1);
        met |= &e == &resident;
      }
      if (!met) resident_missed.fetch_add(1);
    }
  });
  for (auto& t : threads) t.join();
  stop.store(true);
  walker.join();
  CHECK(unusable.load() == 0);
  CHECK(resident_missed.load() == 0);
  CHECK(names(domain, list) == std::vector<int>{-1});
  CHECK(list.remove(resident) == errc::ok);
}
