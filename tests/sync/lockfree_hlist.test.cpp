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
#include "support/domains.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

struct element : hlist_node {
  int name = 0;
  std::atomic<bool> usable{false};
};

template <class Domain, class List>
std::vector<int> names(Domain& domain, const List& list) {
  const basic_read_section s(domain);
  std::vector<int> found;
  for (element& e : list) found.push_back(e.name);
  return found;
}

}  // namespace

TEST_CASE_TEMPLATE("O2: a walk meets every element, newest first, and may stop anywhere", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  lockfree_hlist<element, Domain> list(domain);
  CHECK(list.empty());
  std::array<element, 4> e;
  for (int i = 0; i < 4; ++i) {
    e[static_cast<std::size_t>(i)].name = i;
    CHECK(list.push_front(e[static_cast<std::size_t>(i)]) == errc::ok);
  }
  CHECK(names(domain, list) == std::vector<int>{3, 2, 1, 0});
  int visited = 0;
  {
    const basic_read_section s(domain);
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

TEST_CASE_TEMPLATE("L9: a node is on one list at a time, and comes back after its removal", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  lockfree_hlist<element, Domain> list(domain);
  lockfree_hlist<element, Domain> other(domain);
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

TEST_CASE_TEMPLATE("L7: removal inside a section is refused and changes nothing", Domain, MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  lockfree_hlist<element, Domain> list(domain);
  element e;
  REQUIRE(list.push_front(e) == errc::ok);
  {
    const basic_read_section s(domain);
    CHECK(list.remove(e) == errc::would_deadlock);
  }
  CHECK(names(domain, list).size() == 1);
  CHECK(list.remove(e) == errc::ok);
}

TEST_CASE_TEMPLATE("a walker that stands on a removed node walks on", Domain, MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  lockfree_hlist<element, Domain> list(domain);
  std::array<element, 3> e;
  for (int i = 0; i < 3; ++i) {
    e[static_cast<std::size_t>(i)].name = i;
    REQUIRE(list.push_front(e[static_cast<std::size_t>(i)]) == errc::ok);
  }
  std::vector<int> seen;
  {
    const basic_read_section s(domain);
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

TEST_CASE_TEMPLATE("L1: a removal returns only when nobody stands on the node any more", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  lockfree_hlist<element, Domain> list(domain);
  element e;
  REQUIRE(list.push_front(e) == errc::ok);
  std::atomic<bool> standing{false};
  std::atomic<bool> removing{false};
  std::atomic<bool> left{false};
  std::thread walker([&] {
    const basic_read_section s(domain);
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

TEST_CASE_TEMPLATE("S2: many writers, re-insertion and walkers: nothing lost, nothing seen after its grace period",
                   Domain, MMUNOTIFY_ALL_DOMAINS) {
  constexpr std::size_t writers = 3;
  constexpr std::size_t per_writer = 4;
  constexpr int rounds = 300;
  Domain domain;
  lockfree_hlist<element, Domain> list(domain);
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
      const basic_read_section s(domain);
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

namespace {

struct removable : hlist_node {
  hlist_removal<removable> removal;
  std::atomic<int> removed{0};
  std::atomic<bool> usable{true};
};

}  // namespace

TEST_CASE_TEMPLATE("L7: an asynchronous removal is legal in a walk, and tells when the node is free", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  lockfree_hlist<removable, Domain> list(domain);
  std::array<removable, 3> e;
  for (auto& x : e) REQUIRE(list.push_front(x) == errc::ok);
  {
    const basic_read_section s(domain);
    int met = 0;
    for (removable& x : list) {
      ++met;
      CHECK(list.remove_async(x, x.removal, [](removable& y) noexcept { y.removed.fetch_add(1); }) == errc::ok);
      CHECK(list.remove_async(x, x.removal) == errc::not_registered);
      CHECK(list.remove(x) == errc::would_deadlock);
      CHECK(x.linked());
    }
    CHECK(met == 3);
    CHECK(list.empty());
    for (auto& x : e) CHECK(x.removed == 0);
  }
  CHECK(list.remove(e[0]) == errc::not_registered);
  domain.barrier();
  for (auto& x : e) {
    CHECK(x.removed == 1);
    CHECK_FALSE(x.linked());
    CHECK(list.push_front(x) == errc::ok);
    CHECK(list.remove_async(x, x.removal) == errc::ok);
  }
  domain.barrier();
  CHECK(list.empty());
}

TEST_CASE_TEMPLATE("L9: a node that is inserted again by its own removal's callback, under walkers", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  static std::atomic<int> left;
  static std::atomic<int> failures;
  static lockfree_hlist<removable, Domain>* shared = nullptr;
  constexpr int rounds = 500;
  left = 3 * rounds;
  failures = 0;
  Domain domain;
  lockfree_hlist<removable, Domain> list(domain);
  shared = &list;
  std::array<removable, 3> e;
  struct again {
    static void removed(removable& x) noexcept {
      x.usable.store(false, std::memory_order_relaxed);
      if (left.fetch_sub(1) <= 0) return;
      x.usable.store(true, std::memory_order_relaxed);
      if (shared->push_front(x) != errc::ok) failures.fetch_add(1);
    }
  };
  for (auto& x : e) REQUIRE(list.push_front(x) == errc::ok);
  std::vector<std::thread> walkers;
  for (int t = 0; t < 2; ++t) {
    walkers.emplace_back([&] {
      while (left.load(std::memory_order_relaxed) > 0) {
        const basic_read_section s(domain);
        for (removable& x : list) {
          if (!x.usable.load(std::memory_order_relaxed)) failures.fetch_add(1);
          static_cast<void>(list.remove_async(x, x.removal, &again::removed));
        }
      }
    });
  }
  for (auto& w : walkers) w.join();
  for (auto& x : e) static_cast<void>(list.remove_async(x, x.removal));
  domain.barrier();
  for (auto& x : e) static_cast<void>(list.remove_async(x, x.removal));  // one that came back in between
  domain.barrier();
  CHECK(failures.load() == 0);
  CHECK(list.empty());
}

TEST_CASE("L6: a removal object that is in use is refused, and the node stays") {
  const contract_recorder recorder;
  srcu_domain domain;
  lockfree_hlist<removable> list(domain);
  std::array<removable, 2> e;
  for (auto& x : e) REQUIRE(list.push_front(x) == errc::ok);
  {
    const read_section s(domain);
    CHECK(list.remove_async(e[0], e[0].removal) == errc::ok);
    CHECK(list.remove_async(e[1], e[0].removal) == errc::already_registered);
  }
  domain.barrier();
  CHECK(recorder.rules() == std::vector<std::string>{"L6"});
  CHECK_FALSE(e[0].linked());
  CHECK(list.remove(e[1]) == errc::ok);
}

TEST_CASE("a list in a domain without a slot removes nothing, and says so") {
  basic_srcu_domain<one_slot> only;
  basic_srcu_domain<one_slot> none;
  REQUIRE(none.status() == errc::no_slot);
  removable e;
  {
    lockfree_hlist<removable, basic_srcu_domain<one_slot>> list(none);
    REQUIRE(list.push_front(e) == errc::ok);
    CHECK(list.remove(e) == errc::no_slot);
    CHECK(list.remove_async(e, e.removal) == errc::no_slot);
    CHECK(e.linked());
    // What the user would do: there are no readers, and no grace periods.
    CHECK(list.mark(e));
    list.sweep(basic_read_section(none));
    list.retire(e);
  }
}
