// SPDX-License-Identifier: MIT
#include <mmunotify/interval/interval_notifier.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <mmunotify/base/address.hpp>

#include "interval/interval_space.hpp"
#include "support/contract_recorder.hpp"
#include "support/recording_client.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

using notifier_of = interval_notifier<struct recorder>;
constexpr std::uint64_t page = 0x1000;

/// Writes down what it is told.
struct recorder {
  std::vector<std::string>* log = nullptr;
  std::string name{};
  bool refuses = false;
  bool young = false;
  int starts = 0;
  int ends = 0;
  range last{};
  range unclipped{};

  void note(const char* what) {
    if (log != nullptr) log->push_back(name + what);
  }
  bool invalidate_range_start(const interval_invalidation& i) noexcept {
    ++starts;
    last = i.range;
    unclipped = i.unclipped;
    note("+");
    return i.blockable || !refuses;
  }
  void invalidate_range_end(const interval_invalidation& i) noexcept {
    ++ends;
    CHECK(i.range == last);
    note("-");
  }
  bool clear_flush_young(range r) noexcept { return ask(r, "f"); }
  bool clear_young(range r) noexcept { return ask(r, "c"); }
  bool test_young(range r) noexcept { return ask(r, "t"); }
  void invalidate_secondary_tlbs(range r) noexcept { ask(r, "s"); }
  bool ask(range r, const char* what) {
    last = r;
    note(what);
    return young;
  }
};

using counter = counting_client;
using notifier_of_counter = interval_notifier<counter>;

}  // namespace

TEST_CASE("C4: one byte of overlap hits, ranges that touch do not") {
  interval_space space;
  recorder r;
  notifier_of iv{r};
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  const auto hits = [&](range q) {
    const int before = r.starts;
    { const auto b = space.invalidate(q); }
    CHECK(r.starts == r.ends);
    return r.starts != before;
  };
  CHECK_FALSE(hits({0x1000, 0x2000}));
  CHECK(hits({0x1000, 0x2001}));
  CHECK(hits({0x3fff, 0x4000}));
  CHECK_FALSE(hits({0x4000, 0x5000}));
  CHECK(hits({0x2800, 0x2801}));
  CHECK(hits({0, ~std::uintptr_t{0}}));
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C10: a callback gets the range clipped to its interval, and the bracket's") {
  interval_space space;
  recorder r;
  notifier_of iv{r};
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  { const auto b = space.invalidate({0x1000, 0x3000}); }
  CHECK(r.last == range{0x2000, 0x3000});
  CHECK(r.unclipped == range{0x1000, 0x3000});
  CHECK_FALSE(
      space.set.ask_young<false>(&detail::operations<std::uintptr_t>::clear_young, {0x3000, 0x9000}, space.seen));
  CHECK(r.last == range{0x3000, 0x4000});
  space.set.invalidate_secondary_tlbs({0, ~std::uintptr_t{0}}, space.seen);
  CHECK(r.last == range{0x2000, 0x4000});
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C10: a client that takes the plain invalidation gets the clipped range, too") {
  struct plain {
    range last{};
    void invalidate_range_start(const invalidation& i) noexcept { last = i.range; }
  } client;
  interval_space space;
  interval_notifier<plain> iv{client};
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  { const auto b = space.invalidate({0x3000, 0x9000}); }
  CHECK(client.last == range{0x3000, 0x4000});
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C1: a bracket that overlaps between read_begin and read_retry makes it retry, open or over") {
  interval_space space;
  recorder r;
  notifier_of iv{r};
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  const auto s = iv.read_begin();
  CHECK_FALSE(iv.read_retry(s));
  {
    const auto b = space.invalidate({0x3000, 0x3001});
    CHECK(iv.read_retry(s));
    CHECK(iv.check_retry(s));
  }
  CHECK(iv.read_retry(s));
  const auto later = iv.read_begin();
  CHECK_FALSE(iv.read_retry(later));
  CHECK(iv.read_retry(interval_sequence{}));
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C2: brackets elsewhere neither cause a retry nor are waited for") {
  interval_space space;
  recorder r;
  notifier_of iv{r};
  recorder other;
  notifier_of beside{other};
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  REQUIRE(space.set.insert(beside, {0x4000, 0x6000}) == errc::ok);
  auto s = iv.read_begin();
  {
    const auto b = space.invalidate({0x4000, 0x5000});  // hits the neighbour
    CHECK_FALSE(iv.read_retry(s));
    s = iv.read_begin();  // returns though it is open
    const auto c = space.invalidate({0x1000, 0x2000});
    CHECK_FALSE(iv.check_retry(s));
  }
  CHECK_FALSE(iv.read_retry(s));
  CHECK(other.starts == 1);
  CHECK(space.set.remove(iv) == errc::ok);
  CHECK(space.set.remove(beside) == errc::ok);
}

TEST_CASE("C1: read_begin waits for the brackets that overlap, all of them") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  std::optional<beside_fault> fault;
  {
    const auto a = space.invalidate({0x2000, 0x2001});
    {
      const auto b = space.invalidate({0x3000, 0x9000});
      fault.emplace(iv);
      CHECK(fault->waits());
    }
    CHECK(fault->waits());
  }
  CHECK(fault->succeeds());
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C1: a sequence that is taken without waiting fails while a bracket overlaps, and after it") {
  interval_space space;
  recorder r;
  notifier_of iv{r};
  CHECK(iv.read_retry(iv.try_read_begin()) == false);  // not registered: nobody will change it
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  const auto quiet = iv.try_read_begin();
  CHECK_FALSE(iv.read_retry(quiet));
  interval_sequence inside;
  {
    const auto b = space.invalidate({0x3000, 0x5000});
    CHECK(iv.read_retry(quiet));
    inside = iv.try_read_begin();
    CHECK(iv.read_retry(inside));
  }
  CHECK(iv.read_retry(inside));
  CHECK_FALSE(iv.read_retry(iv.try_read_begin()));
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C3: check_retry is true from the start of an overlapping bracket on") {
  interval_space space;
  struct looks {
    interval_notifier<looks>* iv = nullptr;
    interval_sequence before{};
    bool seen = false;
    void invalidate_range_start(const invalidation&) noexcept { seen = iv->check_retry(before); }
  } client;
  interval_notifier<looks> iv{client};
  client.iv = &iv;
  REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
  client.before = iv.read_begin();
  { const auto b = space.invalidate({0, 1}); }
  CHECK(client.seen);
  CHECK(iv.read_retry(client.before));
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C5: an interval inserted under a bracket counts as being invalidated by it, and by no other") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  std::optional<beside_fault> fault;
  {
    const auto elsewhere = space.invalidate({0x9000, 0xa000});
    {
      const auto b = space.invalidate({0x3000, 0x5000});
      REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
      fault.emplace(iv);
      CHECK(fault->waits());
    }
    CHECK(fault->succeeds());  // though `elsewhere` is open
  }
  CHECK(c.starts.load() == 0);  // P1: neither start nor end of a bracket that was there before
  CHECK(c.ends.load() == 0);
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C5: an interval that grows into a bracket in flight waits for it") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  REQUIRE(space.set.insert(iv, {0x2000, 0x3000}) == errc::ok);
  const auto before = iv.read_begin();
  std::optional<beside_fault> fault;
  {
    const auto b = space.invalidate({0x8000, 0x9000});
    CHECK_FALSE(iv.read_retry(before));
    REQUIRE(space.set.resize(iv, {0x2000, 0xa000}) == errc::ok);
    CHECK(iv.read_retry(before));
    fault.emplace(iv);
    CHECK(fault->waits());
  }
  CHECK(fault->succeeds());
  CHECK(iv.read_retry(before));
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C5: brackets beyond the slots are waited for as well") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  std::deque<interval_space::bracket> open;
  for (unsigned i = 0; i < detail::flight_table::size; ++i) {
    open.emplace_back(space, invalidation{.range = {0x9000, 0xa000}});
  }
  std::optional<beside_fault> fault;
  {
    const auto b = space.invalidate({0x2000, 0x3000});  // counted only
    open.clear();
    REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
    fault.emplace(iv);
    CHECK(fault->waits());
  }
  CHECK(fault->succeeds());
  CHECK(c.starts.load() == 0);
  CHECK(c.ends.load() == 0);
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C6: intervals come, grow, split and go while brackets elsewhere are open, and from callbacks") {
  interval_space space;
  recorder r;
  recorder above;
  notifier_of iv{r};
  notifier_of upper{above};
  auto elsewhere = space.invalidate({0x100000, 0x200000});
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  CHECK(space.set.resize(iv, {0x2000, 0x8000}) == errc::ok);
  CHECK(space.set.split(iv, 0x5000, upper) == errc::ok);
  CHECK(iv.range() == range{0x2000, 0x5000});
  CHECK(upper.range() == range{0x5000, 0x8000});
  { const auto b = space.invalidate({0x4000, 0x6000}); }
  CHECK(r.starts == 1);
  CHECK(above.starts == 1);
  CHECK(space.set.remove_async(iv) == errc::ok);
  CHECK(space.set.remove_async(upper) == errc::ok);
  CHECK(space.set.remove_async(upper) == errc::not_registered);
  { const auto b = space.invalidate({0x4000, 0x6000}); }
  CHECK(r.starts == 1);
  CHECK(above.starts == 1);
  CHECK(iv.registered());  // its memory is in use while `elsewhere` is open
  elsewhere.end();
  while (iv.registered() || upper.registered()) space.domain.barrier();
  CHECK(space.set.empty());
}

TEST_CASE("C6: a callback removes its own interval, and inserts another") {
  struct moves {
    interval_space* space = nullptr;
    interval_notifier<moves>* self = nullptr;
    interval_notifier<moves>* next = nullptr;
    int starts = 0;
    int ends = 0;
    void invalidate_range_start(const invalidation&) noexcept {
      ++starts;
      if (next == nullptr) return;
      CHECK(space->set.remove_async(*self) == errc::ok);
      CHECK(space->set.insert(*next, {0, page}) == errc::ok);
      next = nullptr;
    }
    void invalidate_range_end(const invalidation&) noexcept { ++ends; }
  } client;
  interval_space space;
  interval_notifier<moves> first{client};
  interval_notifier<moves> second{client};
  client = {&space, &first, &second};
  REQUIRE(space.set.insert(first, {0, page}) == errc::ok);
  { const auto b = space.invalidate({0, 1}); }
  CHECK(client.starts == 1);  // the second was born after the bracket
  CHECK(client.ends == 1);    // and the first got its end (P2)
  while (first.registered()) space.domain.barrier();
  { const auto b = space.invalidate({0, 1}); }
  CHECK(client.starts == 2);
  CHECK(space.set.remove(second) == errc::ok);
}

TEST_CASE("C6: what stays covered while an interval is resized is hit by every bracket") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  REQUIRE(space.set.insert(iv, {0x10000, 0x20000}) == errc::ok);
  std::atomic<bool> stop{false};
  std::atomic<int> missed{0};
  std::atomic<int> brackets{0};
  std::thread primary([&] {
    while (!stop.load()) {
      const int before = c.starts.load();
      {
        const auto b = space.invalidate({0x18000, 0x18001});
        if (c.starts.load() == before) missed.fetch_add(1);
      }
      brackets.fetch_add(1);
    }
  });
  notifier_of_counter upper{c};
  for (int i = 0; i < 300 || brackets.load() < 2000; ++i) {
    CHECK(space.set.resize(iv, {0x18000, 0x19000}) == errc::ok);
    CHECK(space.set.resize(iv, {0x10000, 0x20000}) == errc::ok);
    CHECK(space.set.split(iv, 0x18000, upper) == errc::ok);  // the address goes to the other
    CHECK(space.set.resize(iv, {0x10000, 0x20000}) == errc::ok);
    CHECK(space.set.remove(upper) == errc::ok);
  }
  for (int i = 0; i < 50'000 || brackets.load() < 100'000; ++i) {
    if (i % 32 == 0) space.domain.barrier();  // what was resized away goes
    if (space.set.resize(iv, {0x18000, 0x19000 + page * static_cast<unsigned>(i % 2)}) != errc::ok) missed.fetch_add(1);
  }
  stop.store(true);
  primary.join();
  CHECK(missed.load() == 0);
  CHECK(c.starts.load() == c.ends.load());
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C6: every version of a bracket calls the old range or the new one, or both, of what is resized or split") {
  for (const bool splits : {false, true}) {
    interval_space space;
    recorder r;
    notifier_of iv{r};
    notifier_of upper{r};
    REQUIRE(space.set.insert(iv, {0, 2 * page}) == errc::ok);
    const std::uint64_t before = interval_probe::version(iv);
    REQUIRE((splits ? space.set.split(iv, page, upper) : space.set.resize(iv, {page, 3 * page})) == errc::ok);
    CHECK(interval_probe::version(iv) > before);
    for (std::uint64_t g = before; g <= interval_probe::version(iv); ++g) CHECK(interval_probe::hears(iv, g));
    CHECK(space.set.remove(iv) == errc::ok);
    if (splits) CHECK(space.set.remove(upper) == errc::ok);
  }
}

TEST_CASE("C7: the sequence wraps, and nothing notices") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  interval_probe::start_at(iv, ~std::uint64_t{0} - 1);  // two brackets before the end of the numbers
  REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
  auto s = iv.read_begin();
  for (int i = 0; i < 5; ++i) {
    CHECK_FALSE(iv.read_retry(s));
    {
      const auto b = space.invalidate({0, 1});
      CHECK(iv.read_retry(s));
    }
    CHECK(iv.read_retry(s));
    s = iv.read_begin();
  }
  CHECK(interval_probe::word(iv) < 8 * detail::collision_word::step);
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C8: brackets over the interval wait for a fault's turn, others do not, non-blocking ones are refused") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  std::atomic<bool> began{false};
  std::optional<std::thread> primary;
  {
    const auto turn = iv.take_turn();
    REQUIRE(turn);
    const auto s = iv.read_begin();
    primary.emplace([&] {
      const auto b = space.invalidate({0x3000, 0x5000});
      began.store(true);
    });
    let_others_run();
    CHECK_FALSE(began.load());
    { const auto b = space.invalidate({0x4000, 0x5000}); }
    CHECK_FALSE(static_cast<bool>(space.try_invalidate({0x3000, 0x5000})));
    CHECK_FALSE(iv.read_retry(s));
    CHECK(c.starts.load() == 0);
  }
  primary->join();
  CHECK(c.starts.load() == 1);
  CHECK(c.ends.load() == 1);
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C8: a turn waits for the brackets before it, and those behind it queue") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  std::atomic<bool> granted{false};
  std::atomic<bool> give_back{false};
  std::atomic<bool> second{false};
  std::optional<std::thread> fault;
  std::optional<std::thread> primary;
  {
    const auto first = space.invalidate({0x3000, 0x5000});
    fault.emplace([&] {
      const auto turn = iv.take_turn();
      granted.store(true);
      wait_for(give_back);
    });
    let_others_run();
    CHECK_FALSE(granted.load());
    // A bracket inside another one of its thread does not queue behind a turn that waits for the outer one.
    { const auto inner = space.invalidate({0x2000, 0x2001}); }
    CHECK(c.starts.load() == 2);
    primary.emplace([&] {
      const auto b = space.invalidate({0x3000, 0x3001});
      second.store(true);
    });
    let_others_run();
  }
  wait_for(granted);
  let_others_run();
  CHECK_FALSE((second.load() && !granted.load()));
  give_back.store(true);
  fault->join();
  primary->join();
  CHECK(c.starts.load() == c.ends.load());
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C8: faults get their turn although brackets never pause, and brackets although faults do not") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  std::atomic<int> turns{0};
  std::atomic<int> brackets{0};
  const auto both = [&] { return turns.load() >= 300 && brackets.load() >= 300; };
  std::vector<std::thread> all;
  for (int i = 0; i < 2; ++i) {
    all.emplace_back([&] {
      while (!both()) {
        const auto b = space.invalidate({0x3000, 0x5000});
        brackets.fetch_add(1);
      }
    });
    all.emplace_back([&] {
      while (!both()) {
        const auto turn = iv.take_turn();
        const auto s = iv.read_begin();
        std::this_thread::yield();
        CHECK_FALSE(iv.read_retry(s));
        turns.fetch_add(1);
      }
    });
  }
  for (auto& t : all) t.join();
  CHECK(c.starts.load() == c.ends.load());
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("C8: turns that would wait for themselves are refused with a sentence") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  CHECK_FALSE(iv.take_turn());  // not registered
  REQUIRE(space.set.insert(iv, {0x2000, 0x4000}) == errc::ok);
  const contract_recorder violations;
  {
    const auto b = space.invalidate({0x9000, 0xa000});
    CHECK_FALSE(iv.take_turn());
    CHECK(violations.rules() == std::vector<std::string>{"L7"});
  }
  const auto turn = iv.take_turn();
  CHECK(turn);
  CHECK_FALSE(iv.take_turn());
  { const auto b = space.invalidate({0x2000, 0x3000}); }
  CHECK(violations.rules() == std::vector<std::string>{"L7", "C8", "C8"});
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("O2: the order is by class and address, and the same at start and end") {
  interval_space space;
  std::vector<std::string> log;
  std::deque<recorder> clients;
  std::deque<notifier_of> nodes;
  const auto add = [&](const char* name, range r) {
    clients.push_back({&log, name});
    nodes.emplace_back(clients.back());
    REQUIRE(space.set.insert(nodes.back(), r) == errc::ok);
  };
  add("big", {0, 0x100000});
  add("c", {0x5000, 0x6000});
  add("a", {0x1000, 0x2000});
  add("b", {0x3000, 0x4000});
  add("old", {0x7000, 0x8000});
  add("new", {0x7000, 0x8000});
  { const auto b = space.invalidate({0, 0x10000}); }
  CHECK(log ==
        std::vector<std::string>{"a+", "b+", "c+", "new+", "old+", "big+", "a-", "b-", "c-", "new-", "old-", "big-"});
  for (auto& n : nodes) CHECK(space.set.remove(n) == errc::ok);
}

TEST_CASE("P3: a refused start is taken back from exactly those who got it, and P4: every field is as before") {
  interval_space space;
  std::vector<std::string> log;
  std::deque<recorder> clients;
  std::deque<notifier_of> nodes;
  for (std::uintptr_t i = 0; i < 4; ++i) {
    clients.push_back({&log, std::string(1, static_cast<char>('a' + i))});
    nodes.emplace_back(clients.back());
    REQUIRE(space.set.insert(nodes.back(), {i * page, (i + 1) * page}) == errc::ok);
  }
  clients[2].refuses = true;
  std::vector<std::uint64_t> before;
  std::vector<interval_sequence> sequences;
  for (auto& n : nodes) {
    before.push_back(interval_probe::word(n));
    sequences.push_back(n.read_begin());
  }
  CHECK_FALSE(static_cast<bool>(space.try_invalidate({0, 4 * page})));
  CHECK(log == std::vector<std::string>{"a+", "b+", "c+", "a-", "b-", "c-"});
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(interval_probe::word(nodes[i]) == before[i]);
    CHECK_FALSE(nodes[i].read_retry(sequences[i]));
  }
  {  // the same if somebody behind the intervals refuses
    auto b = space.try_invalidate({0, 2 * page});
    REQUIRE(b);
    CHECK(nodes[0].read_retry(sequences[0]));
    b.cancel();
  }
  for (std::size_t i = 0; i < 4; ++i) CHECK(interval_probe::word(nodes[i]) == before[i]);
  {  // nothing is in flight any more that a new interval would have to wait for
    recorder r;
    notifier_of late{r};
    REQUIRE(space.set.insert(late, {0, 4 * page}) == errc::ok);
    static_cast<void>(late.read_begin());
    CHECK(space.set.remove(late) == errc::ok);
  }
  CHECK(static_cast<bool>(space.try_invalidate({0, 2 * page})));
  for (auto& n : nodes) CHECK(space.set.remove(n) == errc::ok);
}

TEST_CASE("P3: a client that refuses a blockable start is told so, and the start counts") {
  struct refuses_all {
    int ends = 0;
    bool invalidate_range_start(const invalidation&) noexcept { return false; }
    void invalidate_range_end(const invalidation&) noexcept { ++ends; }
  } client;
  interval_space space;
  interval_notifier<refuses_all> iv{client};
  REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
  const contract_recorder violations;
  CHECK(static_cast<bool>(space.invalidate({0, page})));
  CHECK(violations.rules() == std::vector<std::string>{"P3"});
  CHECK(client.ends == 1);
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("P6: events and owner that are not wanted are told neither at start nor at end, and cause no retry") {
  interval_space space;
  recorder r;
  int me = 0;
  notifier_of iv{r, {.events = {event::unmap, event::migrate}, .owner = &me}};
  REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
  const auto s = iv.read_begin();
  { const auto b = space.invalidate({0, 1}, event::clear); }
  {
    const auto b = space.invalidate({0, 1}, event::migrate, &me);
    static_cast<void>(iv.read_begin());  // does not wait for it
  }
  CHECK(r.starts == 0);
  CHECK_FALSE(iv.read_retry(s));
  { const auto b = space.invalidate({0, 1}, event::migrate, &space); }
  { const auto b = space.invalidate({0, 1}); }
  CHECK(r.starts == 2);
  CHECK(r.ends == 2);
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("O3: first all first passes, then all second ones in their order, each with its clipped range") {
  struct device {
    two_pass_token token{};
    std::vector<std::string>& log;
    std::string name;
    bool refuses = false;
    device(std::vector<std::string>& l, const char* n) : log(l), name(n) {}
    first_pass invalidate_begin(const interval_invalidation& i) noexcept {
      log.push_back(name + " begins " + std::to_string(i.range.first));
      if (refuses && !i.blockable) return first_pass::refused();
      return token;
    }
    void invalidate_finish(two_pass_token& t, const interval_invalidation& i) noexcept {
      CHECK(&t == &token);
      log.push_back(name + " finishes " + std::to_string(i.range.first));
    }
    void invalidate_range_end(const invalidation&) noexcept { log.push_back(name + " ends"); }
  };
  interval_space space;
  std::vector<std::string> log;
  device a(log, "a");
  device b(log, "b");
  interval_notifier<device> first{a};
  interval_notifier<device> second{b};
  REQUIRE(space.set.insert(first, {0, 16}) == errc::ok);
  REQUIRE(space.set.insert(second, {16, 32}) == errc::ok);
  {
    const auto bracket = space.invalidate({5, 30});
    CHECK(log == std::vector<std::string>{"a begins 5", "b begins 16", "a finishes 5", "b finishes 16"});
  }
  log.clear();
  b.refuses = true;
  CHECK_FALSE(static_cast<bool>(space.try_invalidate({0, 20})));
  CHECK(log == std::vector<std::string>{"a begins 0", "b begins 16", "a finishes 0", "a ends", "b ends"});
  CHECK(space.set.remove(first) == errc::ok);
  CHECK(space.set.remove(second) == errc::ok);
}

TEST_CASE("O5: clear-young asks all and ORs, test-young stops at the first yes; O4: flushes reach those in the range") {
  interval_space space;
  std::vector<std::string> log;
  std::deque<recorder> clients;
  std::deque<notifier_of> nodes;
  for (std::uintptr_t i = 0; i < 3; ++i) {
    clients.push_back({&log, std::string(1, static_cast<char>('a' + i)), false, i == 1});
    nodes.emplace_back(clients.back());
    REQUIRE(space.set.insert(nodes.back(), {i * page, (i + 1) * page}) == errc::ok);
  }
  using operations = detail::operations<std::uintptr_t>;
  CHECK(space.set.ask_young<false>(&operations::clear_flush_young, {0, 3 * page}, space.seen));
  CHECK(space.set.ask_young<true>(&operations::test_young, {0, 3 * page}, space.seen));
  CHECK_FALSE(space.set.ask_young<false>(&operations::clear_young, {2 * page, 3 * page}, space.seen));
  CHECK_FALSE(space.set.ask_young<false>(&operations::clear_young, {page, page}, space.seen));
  space.set.invalidate_secondary_tlbs({page, 2 * page}, space.seen);
  CHECK(log == std::vector<std::string>{"af", "bf", "cf", "at", "bt", "cc", "bs"});
  CHECK(space.seen.total(observe::occurrence::callback) == log.size());
  for (auto& n : nodes) CHECK(space.set.remove(n) == errc::ok);
}

TEST_CASE("L1: an interval that is removed under an open bracket gets its end, once, and is not free before") {
  interval_space space;
  counter c;
  notifier_of_counter iv{c};
  counter beside;  // a bracket over one interval only does not look for it again
  notifier_of_counter other{beside};
  REQUIRE(space.set.insert(other, {0, page}) == errc::ok);
  REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
  auto open = space.invalidate({0, 1});
  CHECK(space.set.remove_async(iv) == errc::ok);
  { const auto later = space.invalidate({0, 1}); }
  CHECK(c.starts.load() == 1);
  CHECK(c.ends.load() == 0);
  CHECK(iv.registered());
  open.end();
  CHECK(c.ends.load() == 1);  // P2
  while (iv.registered()) space.domain.barrier();
  { const auto later = space.invalidate({0, 1}); }
  CHECK(c.starts.load() == 1);
  CHECK(c.ends.load() == 1);
  CHECK(beside.starts.load() == 3);
  CHECK(beside.ends.load() == 3);
  CHECK(space.set.remove(other) == errc::ok);
}

TEST_CASE("L1: after remove returns no callback runs; P2: a bracket in flight gets its end first") {
  interval_space space;
  struct slow {
    std::atomic<bool> inside{false};
    std::atomic<bool> go_on{false};
    std::atomic<int> ends{0};
    void invalidate_range_start(const invalidation&) noexcept {
      inside.store(true);
      wait_for(go_on);
    }
    void invalidate_range_end(const invalidation&) noexcept { ends.fetch_add(1); }
  } client;
  recorder second;  // a bracket over one interval only does not look for it again
  notifier_of other{second};
  std::optional<interval_notifier<slow>> iv;
  iv.emplace(client);
  REQUIRE(space.set.insert(other, {0, page}) == errc::ok);
  REQUIRE(space.set.insert(*iv, {0, page}) == errc::ok);
  std::thread primary([&] { const auto b = space.invalidate({0, 1}); });
  wait_for(client.inside);
  std::atomic<bool> removed{false};
  std::thread remover([&] {
    CHECK(space.set.remove(*iv) == errc::ok);
    CHECK(client.ends.load() == 1);
    removed.store(true);
    iv.reset();
  });
  let_others_run();
  CHECK_FALSE(removed.load());
  client.go_on.store(true);
  primary.join();
  remover.join();
  { const auto b = space.invalidate({0, 1}); }
  CHECK(client.ends.load() == 1);
  CHECK(second.starts == 2);
  CHECK(space.set.remove(other) == errc::ok);
}

TEST_CASE("L1: destroying an interval before its removal is over is a contract failure") {
  interval_space space;
  recorder r;
  alignas(notifier_of) std::byte memory[sizeof(notifier_of)];
  auto* const iv = new (memory) notifier_of(r);
  REQUIRE(space.set.insert(*iv, {0, page}) == errc::ok);
  const contract_recorder violations;
  {
    const read_section held(space.domain);
    CHECK(space.set.remove_async(*iv) == errc::ok);
    iv->~notifier_of();
  }
  CHECK(violations.rules() == std::vector<std::string>{"L1"});
  while (!space.set.empty()) space.domain.barrier();
  space.domain.barrier();
}

TEST_CASE("L6: bad ranges and registered nodes are refused, and leave no trace") {
  interval_space space;
  recorder r;
  notifier_of iv{r};
  CHECK(space.set.insert(iv, {page, page}) == errc::bad_range);
  CHECK(space.set.insert(iv, {2 * page, page}) == errc::bad_range);
  CHECK_FALSE(iv.registered());
  CHECK(space.set.remove(iv) == errc::not_registered);
  CHECK(space.set.remove_async(iv) == errc::not_registered);
  CHECK(space.set.resize(iv, {0, page}) == errc::not_registered);
  notifier_of upper{r};
  CHECK(space.set.split(iv, 1, upper) == errc::not_registered);
  REQUIRE(space.set.insert(iv, {page, 2 * page}) == errc::ok);
  CHECK(space.set.insert(iv, {0, page}) == errc::already_registered);
  interval_space other;
  CHECK(other.set.insert(iv, {0, page}) == errc::already_registered);
  CHECK(other.set.remove(iv) == errc::not_registered);
  CHECK(other.set.empty());
  CHECK(space.set.resize(iv, {page, page}) == errc::bad_range);
  CHECK(space.set.split(iv, page, upper) == errc::bad_range);
  CHECK(space.set.split(iv, 2 * page, upper) == errc::bad_range);
  CHECK(space.set.split(iv, page + 1, iv) == errc::already_registered);
  CHECK_FALSE(upper.registered());
  CHECK(iv.range() == range{page, 2 * page});
  { const auto b = space.invalidate({0, 4 * page}); }
  CHECK(r.starts == 1);
  CHECK(space.set.remove(iv) == errc::ok);
  CHECK(space.set.empty());
}

TEST_CASE("L7: what would wait for itself is refused inside a callback and an open bracket") {
  interval_space space;
  recorder r;
  notifier_of iv{r};
  REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
  const contract_recorder violations;
  {
    const auto b = space.invalidate({0, 1});
    CHECK(space.set.remove(iv) == errc::would_deadlock);
    CHECK(violations.rules().empty());
    const auto s = iv.read_begin();
    CHECK(violations.rules() == std::vector<std::string>{"L7"});
    CHECK(iv.read_retry(s));
  }
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("L9: the same node is inserted again, elsewhere, after a removal of either kind") {
  interval_space space;
  recorder r;
  notifier_of iv{r};
  for (std::uintptr_t i = 0; i < 6; ++i) {
    const range where{i * 0x123456, i * 0x123456 + (page << i)};
    REQUIRE(space.set.insert(iv, where) == errc::ok);
    if (i % 3 == 0) CHECK(space.set.resize(iv, {where.first, where.last + page}) == errc::ok);
    { const auto b = space.invalidate({where.first, where.first + 1}); }
    CHECK(r.starts == static_cast<int>(i) + 1);
    if (i % 2 == 0) {
      CHECK(space.set.remove(iv) == errc::ok);
    } else {
      space.remove_later(iv);
    }
    CHECK_FALSE(iv.registered());
  }
  CHECK(space.set.empty());
}

TEST_CASE("C6: remove_async tells when the node is free; it may be inserted there again") {
  static interval_space* where;
  static std::atomic<int> told;
  interval_space space;
  where = &space;
  told.store(0);
  recorder r;
  notifier_of iv{r};
  REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
  CHECK(space.set.remove_async(iv, [](basic_interval<std::uintptr_t>& n) noexcept {
    CHECK(where->set.insert(n, {page, 2 * page}) == errc::ok);
    told.fetch_add(1);
  }) == errc::ok);
  while (told.load() == 0) space.domain.barrier();
  CHECK(iv.range() == range{page, 2 * page});
  CHECK(space.set.remove(iv) == errc::ok);
}

TEST_CASE("Intervals work over strong addresses, small keys, and the ends of the key space") {
  SUBCASE("guest frames") {
    struct client {
      basic_range<gfn> last{};
      void invalidate_range_start(const basic_invalidation<gfn>& i) noexcept { last = i.range; }
    } c;
    basic_interval_space<gfn> space;
    interval_notifier<client, gfn> iv{c};
    REQUIRE(space.set.insert(iv, {gfn{7}, gfn{9}}) == errc::ok);
    { const auto b = space.invalidate({gfn{8}, gfn{100}}); }
    CHECK(c.last == basic_range<gfn>{gfn{8}, gfn{9}});
    CHECK(space.set.remove(iv) == errc::ok);
  }
  SUBCASE("the whole key space, and its last byte") {
    interval_space space;
    recorder all;
    recorder end;
    notifier_of whole{all};
    notifier_of top{end};
    constexpr std::uintptr_t max = ~std::uintptr_t{0};
    REQUIRE(space.set.insert(whole, {0, max}) == errc::ok);
    REQUIRE(space.set.insert(top, {max - 1, max}) == errc::ok);
    { const auto b = space.invalidate({max - 1, max}); }
    { const auto b = space.invalidate({0, 1}); }
    CHECK(all.starts == 2);
    CHECK(end.starts == 1);
    CHECK(space.set.remove(whole) == errc::ok);
    CHECK(space.set.remove(top) == errc::ok);
  }
}
