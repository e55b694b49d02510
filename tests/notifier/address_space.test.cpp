// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/address_space.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/domains.hpp"
#include "support/recording_client.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;
using log_type = std::vector<std::string>;

#define EVERY_PRIMARY under_primary, keyed_primary, tracked_primary

TEST_CASE_TEMPLATE("P1: every end seen had a start seen, also around registrations in the middle", P, EVERY_PRIMARY) {
  P primary;
  log_type log;
  logging_client early{log, "early"};
  subscriber<logging_client> node{early};
  {
    const auto reading = primary.lock();
    const auto before = primary.space.invalidate({10, 20}, event::unmap);  // nobody listens
  }
  REQUIRE(primary.join(node) == errc::ok);
  CHECK(log.empty());
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({30, 40}, event::clear);
    CHECK(log == log_type{"early:start[30,40)"});
  }
  CHECK(log == log_type{"early:start[30,40)", "early:end[30,40)"});
  CHECK(primary.space.unregister(node) == errc::ok);
  CHECK(log.back() == "early:release");
}

TEST_CASE("P1: who registers while an armed bracket is in flight does not see its end") {
  tracked_primary primary;
  counting_client old_client;
  counting_client new_client;
  subscriber<counting_client> old_node{old_client};
  subscriber<counting_client> new_node{new_client};
  REQUIRE(primary.join(old_node) == errc::ok);
  std::atomic<bool> open{false};
  std::thread changer([&] {
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    open.store(true, std::memory_order_release);
    while (!new_node.linked()) std::this_thread::yield();  // on the list; its registration waits for this bracket
    let_others_run();
  });
  wait_for(open);
  REQUIRE(primary.join(new_node) == errc::ok);
  changer.join();
  CHECK(old_client.starts.load() == 1);
  CHECK(old_client.ends.load() == 1);
  CHECK(new_client.starts.load() == 0);
  CHECK(new_client.ends.load() == 0);
  for (auto* n : {&old_node, &new_node}) CHECK(primary.space.unregister(*n) == errc::ok);
}

TEST_CASE("P7: a tracked registration waits for every bracket that is in flight") {
  tracked_primary primary;
  counting_client client;
  subscriber<counting_client> node{client};
  std::atomic<bool> open{false};
  std::atomic<bool> registering{false};
  std::atomic<bool> bracket_over{false};
  std::thread changer([&] {
    {
      const auto inv = primary.space.invalidate({0x1000, 0x2000}, event::unmap);
      open.store(true, std::memory_order_release);
      wait_for(registering);
      let_others_run();
      bracket_over.store(true, std::memory_order_relaxed);
    }
  });
  wait_for(open);
  registering.store(true, std::memory_order_release);
  REQUIRE(primary.join(node) == errc::ok);
  CHECK(bracket_over.load(std::memory_order_relaxed));  // P7: usable only now
  changer.join();
  CHECK(client.starts.load() == client.ends.load());
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE("P7: under a lock, registration asks for proof that no bracket is in flight") {
  under_primary primary;
  counting_client client;
  subscriber<counting_client> node{client};
  std::unique_lock held(primary.tables, std::defer_lock);
  CHECK(primary.space.register_subscriber(node, held) == errc::lock_not_held);
  CHECK_FALSE(node.registered());
  CHECK_FALSE(primary.space.armed());
  {
    const std::lock_guard guard(primary.tables);
    CHECK(primary.space.register_subscriber(node, guard) == errc::ok);
  }
  CHECK(primary.space.unregister(node) == errc::ok);
  static_assert(!exclusive_lock_of<std::shared_lock<std::shared_mutex>, std::shared_mutex>);
  static_assert(!exclusive_lock_of<std::unique_lock<std::mutex>, std::shared_mutex>);
}

#if MMUNOTIFY_CHECKED
TEST_CASE("P7: checked builds catch a primary that brackets without its lock") {
  under_primary primary;
  counting_client client;
  subscriber<counting_client> node{client};
  const contract_recorder recorder;
  {
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);  // no lock held
    CHECK(primary.join(node) == errc::bracket_open);
  }
  CHECK(recorder.rules() == log_type{"P7"});
  CHECK_FALSE(node.registered());
  CHECK(primary.join(node) == errc::ok);
  CHECK(primary.space.unregister(node) == errc::ok);
}
#endif

TEST_CASE_TEMPLATE("P2: a bracket in flight delivers its end before unregister returns", P, EVERY_PRIMARY) {
  P primary;
  counting_client client;
  subscriber<counting_client> node{client};
  for (int round = 0; round < 10; ++round) {
    REQUIRE(primary.join(node) == errc::ok);
    std::atomic<bool> open{false};
    std::atomic<bool> leaving{false};
    std::thread changer([&] {
      const auto reading = primary.lock();
      const auto inv = primary.space.invalidate({0, 4096}, event::unmap);
      open.store(true, std::memory_order_release);
      wait_for(leaving);
      let_others_run();
    });
    wait_for(open);
    leaving.store(true, std::memory_order_release);
    CHECK(primary.space.unregister(node) == errc::ok);
    CHECK(client.ends.load() == round + 1);  // L1, P2
    CHECK(client.starts.load() == round + 1);
    changer.join();
    CHECK(client.ends.load() == round + 1);
  }
  CHECK(client.releases.load() == 10);
}

TEST_CASE_TEMPLATE("P5: brackets nest and overlap, each with its own audience", P, EVERY_PRIMARY) {
  P primary;
  log_type log;
  logging_client a{log, "a"};
  subscriber<logging_client> node{a};
  REQUIRE(primary.join(node) == errc::ok);
  {
    const auto reading = primary.lock();
    const auto outer = primary.space.invalidate({0, 10}, event::unmap);
    const auto inner = primary.space.invalidate({5, 15}, event::clear);
    primary.space.bracketed({7, 8}, event::clear, [&] { log.push_back("change"); });
  }
  CHECK(log == log_type{"a:start[0,10)", "a:start[5,15)", "a:start[7,8)", "change", "a:end[7,8)", "a:end[5,15)",
                        "a:end[0,10)"});
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE_TEMPLATE("P5: brackets of one thread may end in any order, and protect until the last has ended", P,
                   EVERY_PRIMARY) {
  for (const bool first_ends_first : {true, false}) {
    P primary;
    counting_client client;
    subscriber<counting_client> node{client};
    REQUIRE(primary.join(node) == errc::ok);
    std::atomic<bool> one_left{false};
    std::atomic<bool> leaving{false};
    std::thread changer([&] {
      const auto reading = primary.lock();
      const auto one = primary.space.invalidate_range_start({{0, 10}, event::unmap});
      const auto two = primary.space.invalidate_range_start({{20, 30}, event::clear});
      primary.space.invalidate_range_end(first_ends_first ? one : two);
      one_left.store(true, std::memory_order_release);
      wait_for(leaving);
      let_others_run();
      primary.space.invalidate_range_end(first_ends_first ? two : one);
    });
    wait_for(one_left);
    leaving.store(true, std::memory_order_release);
    CHECK(primary.space.unregister(node) == errc::ok);
    CHECK(client.starts.load() == 2);
    CHECK(client.ends.load() == 2);  // P2: also the one that was left alone
    changer.join();
    CHECK(client.ends.load() == 2);
  }
}

TEST_CASE_TEMPLATE("O2: subscribers are called newest first, in the same order at start and end", P, EVERY_PRIMARY) {
  P primary;
  log_type log;
  logging_client a{log, "a"};
  logging_client b{log, "b"};
  logging_client c{log, "c"};
  subscriber<logging_client> na{a};
  subscriber<logging_client> nb{b};
  subscriber<logging_client> nc{c};
  for (auto* n : {&na, &nb, &nc}) REQUIRE(primary.join(*n) == errc::ok);
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({1, 2}, event::unmap);
  }
  CHECK(log == log_type{"c:start[1,2)", "b:start[1,2)", "a:start[1,2)", "c:end[1,2)", "b:end[1,2)", "a:end[1,2)"});
  for (auto* n : {&nb, &na, &nc}) CHECK(primary.space.unregister(*n) == errc::ok);
}

TEST_CASE_TEMPLATE("P3: a refused start ends for everybody who got it, and for nobody else", P, EVERY_PRIMARY) {
  P primary;
  log_type log;
  logging_client a{log, "a"};
  logging_client b{log, "b"};
  logging_client c{log, "c"};
  subscriber<logging_client> na{a};
  subscriber<logging_client> nb{b};
  subscriber<logging_client> nc{c};
  for (auto* n : {&na, &nb, &nc}) REQUIRE(primary.join(*n) == errc::ok);
  {
    const auto reading = primary.lock();
    b.refuses = true;
    const auto inv = primary.space.try_invalidate({1, 2}, event::clear);
    CHECK_FALSE(inv);
    CHECK(log == log_type{"c:start[1,2)", "b:start[1,2)", "c:end[1,2)", "b:end[1,2)"});
  }
  CHECK(log.size() == 4);
  log.clear();
  {
    const auto reading = primary.lock();
    b.refuses = false;
    if (const auto inv = primary.space.try_invalidate({1, 2}, event::clear)) log.push_back("change");
  }
  CHECK(log.size() == 7);
  CHECK(log[3] == "change");
  for (auto* n : {&na, &nb, &nc}) CHECK(primary.space.unregister(*n) == errc::ok);
}

TEST_CASE_TEMPLATE("O5: clear-young asks everybody, test-young stops at the first yes", P, EVERY_PRIMARY) {
  P primary;
  log_type log;
  logging_client a{log, "a"};
  logging_client b{log, "b"};
  subscriber<logging_client> na{a};
  subscriber<logging_client> nb{b};
  CHECK_FALSE(primary.space.test_young({0, 1}));
  REQUIRE(primary.join(na) == errc::ok);
  REQUIRE(primary.join(nb) == errc::ok);
  b.young = true;  // the newest, asked first
  const auto reading = primary.lock();
  CHECK(primary.space.test_young({0, 1}));
  CHECK(log == log_type{"b:test_young"});
  CHECK(primary.space.clear_young({0, 1}));
  CHECK(primary.space.clear_flush_young({0, 1}));
  CHECK(log.size() == 5);
  b.young = false;
  CHECK_FALSE(primary.space.clear_young({0, 1}));
  CHECK_FALSE(primary.space.test_young({0, 1}));
  a.young = true;
  CHECK(primary.space.test_young({0, 1}));
  for (auto* n : {&na, &nb}) CHECK(primary.space.unregister(*n) == errc::ok);
}

TEST_CASE_TEMPLATE("D3: when the last subscriber leaves, the space is disarmed again", P, EVERY_PRIMARY) {
  P primary;
  counting_client a;
  counting_client b;
  subscriber<counting_client> na{a};
  subscriber<counting_client> nb{b};
  for (int i = 0; i < 3; ++i) {
    CHECK_FALSE(primary.space.armed());
    REQUIRE(primary.join(na) == errc::ok);
    REQUIRE(primary.join(nb) == errc::ok);
    CHECK(primary.space.armed());
    CHECK(primary.space.unregister(na) == errc::ok);
    CHECK(primary.space.armed());
    CHECK(primary.space.unregister(nb) == errc::ok);
    CHECK_FALSE(primary.space.armed());
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(a.starts.load() == 0);
  }
}

#if !MMUNOTIFY_CHECKED
TEST_CASE("D5: a disarmed address space costs 8 bytes") {
  static_assert(sizeof(address_space<arming::under<std::shared_mutex>>) == 8);
  static_assert(sizeof(address_space<arming::under<std::mutex>, gfn>) == 8);
  // No memory of its own either: the registries of spaces that were armed and are not any more serve others.
  constexpr int spaces = 100;
  std::array<under_primary::space_type, spaces> many;
  std::shared_mutex tables;
  counting_client client;
  subscriber<counting_client> node{client};
  for (auto& space : many) {
    const std::unique_lock held(tables);
    REQUIRE(space.register_subscriber(node, held) == errc::ok);
    CHECK(space.unregister(node) == errc::ok);
  }
  // Take out of the pool what has run grace periods: these served above. There must be some, and few.
  using pool = detail::registry_pool<std::uintptr_t>;
  std::vector<pool::entry*> taken;
  do {
    taken.push_back(pool::take());
  } while (taken.back()->domain().grace_periods() != 0 && taken.size() < spaces);
  const std::size_t registries = taken.size() - 1;
  for (auto* e : taken) pool::give_back(e);
  CHECK(registries >= 1);
  CHECK(registries < 10);
}
#endif

TEST_CASE_TEMPLATE("L6: a refused registration leaves no trace", P, EVERY_PRIMARY) {
  P primary;
  P other;
  counting_client a;
  subscriber<counting_client> na{a};
  CHECK(primary.space.unregister(na) == errc::not_registered);
  REQUIRE(primary.join(na) == errc::ok);
  CHECK(primary.join(na) == errc::already_registered);
  CHECK(other.join(na) == errc::already_registered);
  CHECK(other.space.unregister(na) == errc::not_registered);
  CHECK_FALSE(other.space.armed());
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
  }
  CHECK(a.starts.load() == 1);
  CHECK(primary.space.unregister(na) == errc::ok);
  CHECK(primary.space.release() == errc::ok);
  CHECK(primary.join(na) == errc::released);
  CHECK_FALSE(na.registered());
  CHECK_FALSE(primary.space.armed());
  CHECK(a.releases.load() == 1);
  CHECK(other.join(na) == errc::ok);
  CHECK(other.space.unregister(na) == errc::ok);
}

TEST_CASE_TEMPLATE("L6: a space that is being released takes nobody any more, though subscribers are still there", P,
                   EVERY_PRIMARY) {
  struct lingering_client {
    std::atomic<bool> entered{false};
    std::atomic<bool> may_leave{false};
    void release() noexcept {
      entered.store(true, std::memory_order_release);
      wait_for(may_leave);
    }
  };
  P primary;
  lingering_client lingering;
  counting_client late;
  subscriber<lingering_client> node{lingering};
  subscriber<counting_client> late_node{late};
  REQUIRE(primary.join(node) == errc::ok);
  std::thread releasing([&] { CHECK(primary.space.release() == errc::ok); });
  wait_for(lingering.entered);
  CHECK(primary.space.armed());
  CHECK(primary.join(late_node) == errc::released);
  CHECK_FALSE(late_node.registered());
  lingering.may_leave.store(true, std::memory_order_release);
  releasing.join();
  CHECK(late.releases.load() == 0);
}

TEST_CASE_TEMPLATE("L6: empty ranges concern nobody, reversed ones are a contract failure", P, EVERY_PRIMARY) {
  P primary;
  counting_client a;
  subscriber<counting_client> na{a};
  REQUIRE(primary.join(na) == errc::ok);
  const contract_recorder recorder;
  const auto reading = primary.lock();
  const std::uintptr_t top = ~std::uintptr_t{0};
  { const auto inv = primary.space.invalidate({5, 5}, event::unmap); }
  CHECK(recorder.rules().empty());
  { const auto inv = primary.space.invalidate({6, 5}, event::unmap); }
  { const auto inv = primary.space.invalidate({top - 4095, 0}, event::unmap); }  // wraps
  {
    const auto inv = primary.space.try_invalidate({6, 5}, event::unmap);
    CHECK_FALSE(static_cast<bool>(inv));
  }
  CHECK_FALSE(primary.space.test_young({7, 3}));
  CHECK_FALSE(primary.space.clear_young({3, 3}));
  CHECK(recorder.rules().size() == 4);
  CHECK(a.starts.load() == 0);
  CHECK(a.ends.load() == 0);
  { const auto inv = primary.space.invalidate({0, top}, event::unmap); }
  CHECK(a.starts.load() == 1);
  CHECK(a.ends.load() == 1);
  CHECK(primary.space.unregister(na) == errc::ok);
}

TEST_CASE_TEMPLATE("L9: the same node may be registered again", P, EVERY_PRIMARY) {
  P first;
  P second;
  counting_client a;
  subscriber<counting_client> na{a};
  for (int i = 0; i < 5; ++i) {
    P& p = i % 2 == 0 ? first : second;
    REQUIRE(p.join(na) == errc::ok);
    const auto reading = p.lock();
    { const auto inv = p.space.invalidate({0, 1}, event::unmap); }
    CHECK(a.starts.load() == i + 1);
    CHECK(p.space.unregister(na) == errc::ok);
    CHECK(a.releases.load() == i + 1);
  }
}

namespace {

template <class P>
struct meddling_client {
  P& primary;
  subscriber<counting_client>& other;
  basic_subscriber<std::uintptr_t>* self = nullptr;
  std::vector<errc> answers{};

  void try_everything() {
    answers.push_back(primary.space.unregister(other));
    answers.push_back(primary.space.unregister(*self));
    answers.push_back(primary.space.release());
  }
  void invalidate_range_start(const invalidation&) { try_everything(); }
  void invalidate_range_end(const invalidation&) { try_everything(); }
  void release() { try_everything(); }
};

}  // namespace

TEST_CASE_TEMPLATE("L7: blocking calls inside callbacks and open brackets are refused with a sentence", P,
                   EVERY_PRIMARY) {
  P primary;
  counting_client plain;
  subscriber<counting_client> other{plain};
  meddling_client<P> meddler{primary, other};
  subscriber<meddling_client<P>> node{meddler};
  meddler.self = &node;
  REQUIRE(primary.join(other) == errc::ok);
  REQUIRE(primary.join(node) == errc::ok);
  const contract_recorder recorder;
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(primary.space.unregister(other) == errc::would_deadlock);
    CHECK(primary.space.release() == errc::would_deadlock);
  }
  CHECK(recorder.sentence().find("address_space::") != std::string::npos);
  CHECK(primary.space.unregister(node) == errc::ok);  // its release hook meddles, too
  CHECK(meddler.answers == std::vector<errc>(9, errc::would_deadlock));
  CHECK(recorder.rules() == log_type(11, "L7"));
  CHECK(plain.starts.load() == 1);
  CHECK(plain.ends.load() == 1);
  CHECK(plain.releases.load() == 0);
  CHECK(primary.space.unregister(other) == errc::ok);
}

TEST_CASE("L7: a tracked registration inside an own bracket is refused: it would wait for the bracket") {
  tracked_primary primary;
  counting_client client;
  subscriber<counting_client> node{client};
  const contract_recorder recorder;
  {
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(primary.join(node) == errc::would_deadlock);
  }
  CHECK(recorder.rules() == log_type{"L7"});
  CHECK_FALSE(node.registered());
  CHECK_FALSE(primary.space.armed());
}

TEST_CASE_TEMPLATE("L5: unregister is legal before, during and after the release of the space", P, EVERY_PRIMARY) {
  P primary;
  counting_client a;
  counting_client b;
  subscriber<counting_client> na{a};
  subscriber<counting_client> nb{b};
  REQUIRE(primary.join(na) == errc::ok);
  REQUIRE(primary.join(nb) == errc::ok);
  CHECK(primary.space.unregister(na) == errc::ok);
  CHECK(primary.space.release() == errc::ok);
  CHECK(b.releases.load() == 1);
  CHECK_FALSE(primary.space.armed());
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(b.starts.load() == 0);
  }
  CHECK(primary.space.unregister(nb) == errc::ok);
  CHECK(primary.space.unregister(nb) == errc::not_registered);
  CHECK(primary.space.release() == errc::ok);
  CHECK(b.releases.load() == 1);
}

TEST_CASE_TEMPLATE("L5: unregister during the release of the space waits until the node is free", P, EVERY_PRIMARY) {
  for (int round = 0; round < 200; ++round) {
    P primary;
    counting_client a;
    subscriber<counting_client> node{a};
    REQUIRE(primary.join(node) == errc::ok);
    std::atomic<bool> go{false};
    std::thread releasing([&] {
      go.store(true, std::memory_order_release);
      CHECK(primary.space.release() == errc::ok);
    });
    wait_for(go);
    CHECK(primary.space.unregister(node) == errc::ok);
    CHECK_FALSE(node.registered());
    releasing.join();
    CHECK(a.releases.load() == 1);
    CHECK_FALSE(primary.space.armed());
  }
}

TEST_CASE_TEMPLATE("L5: unregister from a space that has never seen the node, or not lately, is an error value", P,
                   EVERY_PRIMARY) {
  counting_client a;
  subscriber<counting_client> node{a};
  {
    P gone;
    REQUIRE(gone.join(node) == errc::ok);
    CHECK(gone.space.unregister(node) == errc::ok);
  }
  P primary;
  CHECK(primary.space.unregister(node) == errc::not_registered);
  P other;
  REQUIRE(other.join(node) == errc::ok);
  CHECK(primary.space.unregister(node) == errc::not_registered);
  CHECK(other.space.release() == errc::ok);
  CHECK(primary.space.unregister(node) == errc::not_registered);
  CHECK(other.space.unregister(node) == errc::ok);
}

TEST_CASE_TEMPLATE("L7: a release that is refused has changed nothing", P, EVERY_PRIMARY) {
  P primary;
  counting_client a;
  counting_client b;
  subscriber<counting_client> na{a};
  subscriber<counting_client> nb{b};
  REQUIRE(primary.join(na) == errc::ok);
  const contract_recorder recorder;
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(primary.space.release() == errc::would_deadlock);
  }
  CHECK(primary.join(nb) == errc::ok);
  for (auto* n : {&na, &nb}) CHECK(primary.space.unregister(*n) == errc::ok);
}

TEST_CASE("L6: a registration that found no slot leaves no trace, and the next one may succeed") {
  auto all = take_all_slots();
  counting_client a;
  subscriber<counting_client> node{a};
  {
    // Registries that the pool still holds have slots: use them up.
    std::vector<std::unique_ptr<under_primary>> spaces;
    std::vector<std::unique_ptr<subscriber<counting_client>>> nodes;
    errc e = errc::ok;
    while (e == errc::ok) {
      spaces.push_back(std::make_unique<under_primary>());
      nodes.push_back(std::make_unique<subscriber<counting_client>>(a));
      e = spaces.back()->join(*nodes.back());
    }
    CHECK(e == errc::no_slot);
    CHECK_FALSE(nodes.back()->registered());
    CHECK_FALSE(spaces.back()->space.armed());
    for (std::size_t i = 0; i + 1 < nodes.size(); ++i) CHECK(spaces[i]->space.unregister(*nodes[i]) == errc::ok);
    tracked_primary tracked;
    CHECK(tracked.join(node) == errc::no_slot);
    all.clear();
    CHECK(spaces.back()->join(*nodes.back()) == errc::ok);
    CHECK(spaces.back()->space.unregister(*nodes.back()) == errc::ok);
  }
}

TEST_CASE_TEMPLATE("P2: a bracket that is ended twice is reported, and ended once", P, EVERY_PRIMARY) {
  P primary;
  counting_client a;
  subscriber<counting_client> node{a};
  REQUIRE(primary.join(node) == errc::ok);
  const contract_recorder recorder;
  {
    const auto reading = primary.lock();
    const auto ticket = primary.space.invalidate_range_start({{0, 1}, event::unmap});
    primary.space.invalidate_range_end(ticket);
    primary.space.invalidate_range_end(ticket);
  }
  CHECK(recorder.rules() == log_type{"P2"});
  CHECK(a.ends.load() == 1);
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE_TEMPLATE("P3: a client that refuses a start that may block is reported", P, EVERY_PRIMARY) {
  struct stubborn_client {
    int ends = 0;
    bool invalidate_range_start(const invalidation&) noexcept { return false; }
    void invalidate_range_end(const invalidation&) noexcept { ++ends; }
  };
  P primary;
  stubborn_client a;
  subscriber<stubborn_client> node{a};
  REQUIRE(primary.join(node) == errc::ok);
  const contract_recorder recorder;
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    CHECK(static_cast<bool>(inv));
  }
  CHECK(recorder.rules() == log_type{"P3"});
  CHECK(a.ends == 1);
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE_TEMPLATE("a node that the space has released may be destroyed, or registered elsewhere, without unregister",
                   P, EVERY_PRIMARY) {
  const contract_recorder recorder;
  P primary;
  P elsewhere;
  counting_client a;
  {
    subscriber<counting_client> destroyed{a};
    REQUIRE(primary.join(destroyed) == errc::ok);
    CHECK(primary.space.release() == errc::ok);
    CHECK(elsewhere.join(destroyed) == errc::ok);
    CHECK(elsewhere.space.release() == errc::ok);
  }
  CHECK(recorder.rules().empty());
  CHECK(a.releases.load() == 2);
}

namespace {

/// A client whose release hook is slow, and knows whether it runs beside itself.
struct slow_release {
  std::atomic<int> inside{0};
  std::atomic<int> completed{0};
  std::atomic<int> beside_itself{0};
  std::atomic<bool> entered{false};

  void release() noexcept {
    if (inside.fetch_add(1) != 0) beside_itself.fetch_add(1);
    entered.store(true, std::memory_order_release);
    let_others_run();
    inside.fetch_sub(1);
    completed.fetch_add(1);
  }
};

}  // namespace

TEST_CASE_TEMPLATE("L3: release returns only after the hook that a concurrent unregister runs has completed", P,
                   EVERY_PRIMARY) {
  for (int round = 0; round < 20; ++round) {
    P primary;
    slow_release client;
    subscriber<slow_release> node{client};
    REQUIRE(primary.join(node) == errc::ok);
    std::thread leaver([&] { CHECK(primary.space.unregister(node) == errc::ok); });
    wait_for(client.entered);
    CHECK(primary.space.release() == errc::ok);
    CHECK(client.completed.load() == 1);
    leaver.join();
    CHECK(client.completed.load() == 1);
  }
}

TEST_CASE_TEMPLATE("L1: of two threads that unregister a node both return only when it is gone", P, EVERY_PRIMARY) {
  for (int round = 0; round < 20; ++round) {
    P primary;
    slow_release client;
    subscriber<slow_release> node{client};
    REQUIRE(primary.join(node) == errc::ok);
    std::thread first([&] { CHECK(primary.space.unregister(node) == errc::ok); });
    wait_for(client.entered);
    static_cast<void>(primary.space.unregister(node));  // ok, or not_registered if the other one was quick
    CHECK(client.completed.load() == 1);
    CHECK_FALSE(node.registered());
    first.join();
  }
}

TEST_CASE_TEMPLATE("L4: release runs exactly once per registration and never beside itself", P, EVERY_PRIMARY) {
  constexpr int rounds = 60;
  for (int round = 0; round < rounds; ++round) {
    P primary;
    std::array<slow_release, 3> clients;
    std::vector<std::unique_ptr<subscriber<slow_release>>> nodes;
    for (auto& c : clients) {
      nodes.push_back(std::make_unique<subscriber<slow_release>>(c));
      REQUIRE(primary.join(*nodes.back()) == errc::ok);
    }
    std::vector<std::thread> threads;
    for (auto& n : nodes) {
      threads.emplace_back([&] { static_cast<void>(primary.space.unregister(*n)); });
      threads.emplace_back([&] { static_cast<void>(primary.space.unregister(*n)); });
    }
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back([&] {
        CHECK(primary.space.release() == errc::ok);
        for (auto& c : clients) CHECK(c.completed.load() == 1);
      });
    }
    for (auto& t : threads) t.join();
    for (auto& c : clients) {
      CHECK(c.completed.load() == 1);
      CHECK(c.beside_itself.load() == 0);
    }
    for (auto& n : nodes) CHECK_FALSE(n->registered());
    CHECK_FALSE(primary.space.armed());
  }
}

TEST_CASE_TEMPLATE("L1: after unregister returns no callback is running or will run", P, EVERY_PRIMARY) {
  P primary;
  std::atomic<bool> stop{false};
  std::vector<std::thread> changers;
  for (int t = 0; t < 2; ++t) {
    changers.emplace_back([&] {
      while (!stop.load(std::memory_order_relaxed)) {
        const auto reading = primary.lock();
        const auto inv = primary.space.invalidate({0, 4096}, event::unmap);
      }
    });
  }
  for (int i = 0; i < 200; ++i) {
    auto client = std::make_unique<counting_client>();
    auto node = std::make_unique<subscriber<counting_client>>(*client);
    REQUIRE(primary.join(*node) == errc::ok);
    if (i % 2 == 0) std::this_thread::yield();
    REQUIRE(primary.space.unregister(*node) == errc::ok);
    CHECK(client->running.load() == 0);
    CHECK(client->starts.load() == client->ends.load());  // P1, P2
    CHECK(client->releases.load() == 1);
    // The sanitizers see a callback that comes after this.
  }
  stop.store(true);
  for (auto& t : changers) t.join();
  CHECK_FALSE(primary.space.armed());
}

TEST_CASE("L10: registration costs O(1) in what is mapped, and O(1) in who is registered") {
  // The library knows no areas to walk and no list of locks; the cost in subscribers is counted in versions: one step
  // per registration, however many there are.
  tracked_primary primary;
  constexpr std::size_t many = 500;
  std::vector<std::unique_ptr<counting_client>> clients;
  std::vector<std::unique_ptr<subscriber<counting_client>>> nodes;
  for (std::size_t i = 0; i < many; ++i) {
    clients.push_back(std::make_unique<counting_client>());
    nodes.push_back(std::make_unique<subscriber<counting_client>>(*clients.back()));
    REQUIRE(primary.join(*nodes.back()) == errc::ok);
    CHECK(primary.space.observer().total(observe::occurrence::grace_period) == i + 1);
  }
  CHECK(primary.space.observer().total(observe::occurrence::callback) == 0);
  for (auto& n : nodes) CHECK(primary.space.unregister(*n) == errc::ok);
}

TEST_CASE("L1: a space or subscriber that is destroyed while registered is reported") {
  const contract_recorder recorder;
  // Static: the space's word is all that still knows the registry, and leak checkers want to know it, too.
  alignas(under_primary) static std::array<std::byte, sizeof(under_primary)> storage{};
  counting_client client;
  subscriber<counting_client> node{client};
  auto* primary = new (storage.data()) under_primary;
  REQUIRE(primary->join(node) == errc::ok);
  primary->~under_primary();
  CHECK(recorder.rules() == log_type{"L1"});
}

TEST_CASE("an address space is keyed by what its primary counts in") {
  struct frame_client {
    basic_range<gfn> last{};
    void invalidate_range_start(const basic_invalidation<gfn>& i) { last = i.range; }
  };
  address_space<arming::tracked, gfn> space;
  frame_client client;
  subscriber<frame_client, gfn> node{client};
  REQUIRE(space.register_subscriber(node) == errc::ok);
  { const auto inv = space.invalidate({gfn{3}, gfn{7}}, event::unmap); }
  CHECK(client.last == basic_range<gfn>{gfn{3}, gfn{7}});
  CHECK(space.unregister(node) == errc::ok);

  struct address_client {
    basic_range<gva> last{};
    void invalidate_range_start(const basic_invalidation<gva>& i) { last = i.range; }
  };
  address_space<arming::tracked, gva> pages;
  address_client pc;
  subscriber<address_client, gva> pn{pc};
  REQUIRE(pages.register_subscriber(pn) == errc::ok);
  { const auto inv = pages.invalidate_page(gva{0x1234}, event::clear); }
  CHECK(pc.last == basic_range<gva>{gva{0x1000}, gva{0x2000}});
  CHECK(pages.unregister(pn) == errc::ok);
}

TEST_CASE_TEMPLATE("a bracket of one page takes the whole page, also the last one", P, EVERY_PRIMARY) {
  P primary;
  log_type log;
  logging_client a{log, "a"};
  subscriber<logging_client> node{a};
  REQUIRE(primary.join(node) == errc::ok);
  const std::uintptr_t top = ~std::uintptr_t{0};
  {
    const auto reading = primary.lock();
    { const auto inv = primary.space.invalidate_page(0x1fff, event::clear); }
    { const auto inv = primary.space.invalidate_page(top, event::clear); }
  }
  REQUIRE(log.size() == 4);
  CHECK(log[0] == "a:start[4096,8192)");
  CHECK(log[2] == "a:start[" + std::to_string(top - 4095) + "," + std::to_string(top) + ")");
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE_TEMPLATE("the plain calls and the closure form are the same bracket", P, EVERY_PRIMARY) {
  P primary;
  log_type log;
  logging_client a{log, "a"};
  subscriber<logging_client> node{a};
  const auto both_ways = [&] {
    const auto reading = primary.lock();
    const invalidation i{{1, 2}, event::clear};
    const auto ticket = primary.space.invalidate_range_start(i);
    log.push_back("change");
    primary.space.invalidate_range_end(ticket);
    return primary.space.bracketed({3, 4}, event::clear, [&] {
      log.push_back("change");
      return 42;
    });
  };
  CHECK(both_ways() == 42);
  CHECK(log == log_type{"change", "change"});
  log.clear();
  REQUIRE(primary.join(node) == errc::ok);
  CHECK(both_ways() == 42);
  CHECK(log == log_type{"a:start[1,2)", "change", "a:end[1,2)", "a:start[3,4)", "change", "a:end[3,4)"});
  CHECK(primary.space.unregister(node) == errc::ok);
}
