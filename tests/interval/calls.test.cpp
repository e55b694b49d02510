// SPDX-License-Identifier: MIT

// What intervals are told besides brackets: in-place changes, young pages in batches, what exists already. And what the
// space's observer counts of them.

#include <mmunotify/interval/interval_notifier.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "interval/interval_space.hpp"
#include "support/contract_recorder.hpp"
#include "support/recording_client.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;
using ranges = std::vector<mmunotify::range>;

#define EVERY_PRIMARY under_primary, keyed_primary, tracked_primary

namespace {

constexpr std::uintptr_t page = page_size;

/// Keeps its mappings in brackets in place.
struct keeper {
  std::vector<entry_change> changes;
  int zaps = 0;
  int ends = 0;
  void invalidate_range_start(const invalidation& i) noexcept { zaps += i.in_place ? 0 : 1; }
  void invalidate_range_end(const invalidation&) noexcept { ++ends; }
  void change_entry(const entry_change& c) { changes.push_back(c); }
};

/// Answers for many pages at once: those at `accessed`.
struct by_batch {
  std::vector<std::uintptr_t> accessed;
  ranges asked{};
  void young_pages(young_batch& b) {
    asked.push_back(b.range());
    for (const auto a : accessed) b.mark(a);
  }
};
struct by_page {
  std::vector<std::uintptr_t> accessed;
  ranges asked{};
  int cleared = 0;
  bool test_young(mmunotify::range r) {
    asked.push_back(r);
    for (const auto a : accessed) {
      if (r.contains(a)) return true;
    }
    return false;
  }
  bool clear_young(mmunotify::range r) {
    ++cleared;
    return test_young(r);
  }
};

struct replayed {
  ranges existing;
  std::atomic<int> starts{0};
  std::atomic<int> releases{0};
  void existing_range(mmunotify::range r) { existing.push_back(r); }
  void invalidate_range_start(const invalidation&) noexcept { starts.fetch_add(1); }
  void release() noexcept { releases.fetch_add(1); }
};

}  // namespace

TEST_CASE_TEMPLATE("C10: change_entry tells an interval its part, and a start in place says that it will", P,
                   EVERY_PRIMARY) {
  P primary;
  keeper low;
  keeper high;
  keeper away;
  counting_client simple;
  interval_notifier<keeper> a{low};
  interval_notifier<keeper> b{high};
  interval_notifier<keeper> c{away};
  interval_notifier<counting_client> d{simple};
  REQUIRE(primary.insert(a, {0, 4 * page}) == errc::ok);
  REQUIRE(primary.insert(b, {4 * page, 8 * page}) == errc::ok);
  REQUIRE(primary.insert(c, {8 * page, 9 * page}) == errc::ok);
  REQUIRE(primary.insert(d, {0, 9 * page}) == errc::ok);
  {
    const auto reading = primary.lock();
    const auto seq = a.read_begin();
    const auto inv = primary.space.invalidate_in_place({2 * page, 7 * page}, event::clear);
    CHECK(a.read_retry(seq));
    primary.space.change_entry({{2 * page, 7 * page}, pfn{100}, true});
    primary.space.change_entry({{6 * page, 7 * page}, pfn{50}, false});
  }
  REQUIRE(low.changes.size() == 1);
  CHECK(low.changes[0].range == mmunotify::range{2 * page, 4 * page});
  CHECK(low.changes[0].frame == pfn{100});
  CHECK(low.changes[0].writable);
  REQUIRE(high.changes.size() == 2);
  CHECK(high.changes[0].range == mmunotify::range{4 * page, 7 * page});
  CHECK(high.changes[0].frame == pfn{102});
  CHECK(high.changes[1].frame == pfn{50});
  CHECK_FALSE(high.changes[1].writable);
  CHECK(away.changes.empty());
  CHECK(low.zaps + high.zaps == 0);
  CHECK(low.ends + high.ends == 2);
  CHECK(simple.starts.load() == 1);  // who lacks it lets go
  { const auto inv = primary.space.invalidate({2 * page, 7 * page}, event::clear); }
  CHECK(low.zaps == 1);
  CHECK(primary.space.release() == errc::ok);
  for (auto* n : std::initializer_list<basic_interval<std::uintptr_t>*>{&a, &b, &c, &d})
    CHECK(primary.space.remove(*n) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE("C6: a change in place goes to whoever covers the address when it comes") {
  tracked_primary primary;
  keeper below;
  keeper above;
  keeper gone;
  interval_notifier<keeper> iv{below};
  interval_notifier<keeper> upper{above};
  interval_notifier<keeper> leaver{gone};
  REQUIRE(primary.insert(iv, {0, 8 * page}) == errc::ok);
  REQUIRE(primary.insert(leaver, {0, 8 * page}) == errc::ok);
  {
    const auto inv = primary.space.invalidate_in_place({0, 8 * page}, event::clear);
    REQUIRE(primary.space.split(iv, 4 * page, upper) == errc::ok);
    CHECK(primary.space.remove_async(leaver) == errc::ok);
    primary.space.change_entry({{5 * page, 6 * page}, pfn{7}, true});
    CHECK(below.changes.empty());
    CHECK(above.changes.size() == 1);
    REQUIRE(primary.space.resize(iv, {0, 6 * page}) == errc::ok);
    primary.space.change_entry({{5 * page, 6 * page}, pfn{8}, true});
    CHECK(below.changes.size() == 1);
    CHECK(above.changes.size() == 2);
  }
  CHECK(gone.changes.empty());
  CHECK(gone.ends == 1);   // P2
  CHECK(above.ends == 0);  // P1
  CHECK(primary.space.remove(iv) == errc::ok);
  CHECK(primary.space.remove(upper) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE_TEMPLATE("O5: young pages: an interval answers for its part of a batch, with the right bits", P,
                   EVERY_PRIMARY) {
  P primary;
  const auto at = [](std::uintptr_t p) { return 0x100000 + p * page; };
  by_batch far{{at(3), at(66) + 5, at(80), at(200)}};
  by_batch crooked{{at(90) + 20}};
  by_page slow{{at(2), at(70), at(71)}};
  by_page whole{{at(99)}};
  interval_notifier<by_batch> a{far};
  interval_notifier<by_batch> b{crooked};
  interval_notifier<by_page> c{slow};
  subscriber<by_page> d{whole};
  REQUIRE(primary.insert(a, {at(60), at(75)}) == errc::ok);
  REQUIRE(primary.insert(b, {at(90) + 16, at(91) + 16}) == errc::ok);
  REQUIRE(primary.insert(c, {at(68), at(71) + 1}) == errc::ok);
  REQUIRE(primary.join(d) == errc::ok);
  using bits = std::array<std::uint64_t, 2>;
  const bits young{0, 1U << 2 | 1U << 6 | 1U << 7 | 1U << 26 | std::uint64_t{1} << 35};
  bits seen{};
  {
    const auto reading = primary.lock();
    CHECK(primary.space.young_pages({at(0), at(100)}, seen, false) == errc::ok);
    CHECK(seen == young);
    CHECK(far.asked == ranges{{at(60), at(75)}});
    CHECK(crooked.asked == ranges{{at(90), at(92)}});  // whole pages
    CHECK(slow.asked == ranges{{at(68), at(69)}, {at(69), at(70)}, {at(70), at(71)}, {at(71), at(71) + 1}});
    CHECK(whole.asked.size() == 96);  // after the intervals (O2), and not where they have said yes
    seen = {};
    CHECK(primary.space.young_pages({at(0), at(100)}, seen, true) == errc::ok);
    CHECK(seen == young);
    CHECK(slow.cleared == 4);
    CHECK(whole.cleared == 100);
    std::array<std::uint64_t, 1> few{1};
    CHECK(primary.space.young_pages({at(72), at(88)}, few, false) == errc::ok);  // the end of a; nobody is young
    CHECK(few[0] == 1);
    REQUIRE_FALSE(far.asked.empty());
    CHECK(far.asked.back() == mmunotify::range{at(72), at(75)});
  }
  CHECK(primary.space.unregister(d) == errc::ok);
  for (auto* n : std::initializer_list<basic_interval<std::uintptr_t>*>{&a, &b, &c})
    CHECK(primary.space.remove(*n) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE_TEMPLATE("P7: an interval is handed what exists in it, clipped, when brackets call it already", P,
                   EVERY_PRIMARY) {
  P primary;
  replayed client;
  replayed other;
  counting_client deaf;
  interval_notifier<replayed> iv{client};
  interval_notifier<replayed> second{other};
  interval_notifier<counting_client> third{deaf};
  const auto walk = [&](auto&& visit) {
    for (const mmunotify::range r : ranges{{0x1000, 0x3000}, {0x4000, 0x9000}, {0xa000, 0xb000}, {5, 5}}) visit(r);
  };
  int walks = 0;
  const auto first_walk = [&](auto&& visit) {
    ++walks;
    CHECK(iv.registered());
    CHECK(primary.space.resize(iv, {0, 1}) == errc::not_registered);
    CHECK_FALSE(iv.read_retry(iv.try_read_begin()));
    walk(visit);
  };
  REQUIRE(primary.insert(iv, {0x2000, 0x5000}, first_walk) == errc::ok);
  CHECK(primary.insert(iv, {0x2000, 0x5000}, first_walk) == errc::already_registered);
  CHECK(primary.insert(second, {0x2000, 0x2000}, first_walk) == errc::bad_range);
  CHECK(walks == 1);
  CHECK(client.existing == ranges{{0x2000, 0x3000}, {0x4000, 0x5000}});
  REQUIRE(primary.insert(second, {0x8000, 0x10000}, walk) == errc::ok);  // the space is armed now
  CHECK(other.existing == ranges{{0x8000, 0x9000}, {0xa000, 0xb000}});
  REQUIRE(primary.insert(third, {0, 0x10000}, walk) == errc::ok);
  {
    const auto reading = primary.lock();
    const auto inv = primary.space.invalidate({0x4000, 0x4001}, event::unmap);
  }
  CHECK(client.starts.load() == 1);
  CHECK(primary.space.remove(second) == errc::ok);
  CHECK(primary.space.release() == errc::ok);
  CHECK(primary.insert(second, {0x8000, 0x10000}, walk) == errc::released);
  CHECK(other.existing.size() == 2);
  CHECK(primary.space.remove(iv) == errc::ok);
  CHECK(primary.space.remove(third) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE_TEMPLATE("L7: an interval that is removed while it is handed what exists goes when that is done", P,
                   EVERY_PRIMARY) {
  P primary;
  replayed client;
  interval_notifier<replayed> iv{client};
  const auto walk = [&](auto&& visit) {
    CHECK(primary.space.remove_async(iv) == errc::ok);
    CHECK(primary.space.remove_async(iv) == errc::not_registered);
    visit(mmunotify::range{0, page});
    CHECK(iv.registered());
  };
  for (int i = 1; i <= 3; ++i) {
    REQUIRE(primary.insert(iv, {0, page}, walk) == errc::ok);
    CHECK(primary.space.barrier() == errc::ok);
    CHECK_FALSE(iv.registered());
    CHECK(client.existing.size() == static_cast<std::size_t>(i));
    CHECK_FALSE(primary.space.armed());
  }
}

TEST_CASE("P7: under a lock, what exists is handed out only to who shows that no bracket is in flight") {
  under_primary primary;
  replayed client;
  interval_notifier<replayed> iv{client};
  const auto walk = [](auto&& visit) { visit(mmunotify::range{0, page}); };
  std::unique_lock held(primary.tables, std::defer_lock);
  CHECK(primary.space.insert(iv, {0, page}, held, walk) == errc::lock_not_held);
  CHECK(client.existing.empty());
  CHECK_FALSE(iv.registered());
  // Its first fault waits for nothing, as nothing can be in flight, and so the hook may use the interval.
  REQUIRE(primary.insert(iv, {0, page}, [&](auto&& visit) {
    CHECK_FALSE(iv.read_retry(iv.try_read_begin()));
    walk(visit);
  }) == errc::ok);
  CHECK(client.existing.size() == 1);
  CHECK(primary.space.remove(iv) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE("P7: a tracked insertion waits for the brackets that overlap before it hands out what exists") {
  for (const bool armed : {false, true}) {
    tracked_primary primary;
    replayed client;
    counting_client early;
    interval_notifier<replayed> iv{client};
    interval_notifier<counting_client> before{early};
    if (armed) {
      REQUIRE(primary.insert(before, {0x9000, 0xa000}) == errc::ok);
      CHECK(primary.space.barrier() == errc::ok);
    }
    std::atomic<bool> over{false};
    std::optional<std::thread> comer;
    {
      const auto inv = primary.space.invalidate({0x1000, 0x2000}, event::unmap);
      comer.emplace([&] {
        CHECK(primary.insert(iv, {0, 0x4000}, [&](auto&& visit) {
          CHECK(over.load());
          visit(mmunotify::range{0x1000, 0x2000});
        }) == errc::ok);
      });
      while (!iv.registered()) std::this_thread::yield();
      let_others_run();
      over.store(true);
    }
    comer->join();
    CHECK(client.existing.size() == 1);
    CHECK(client.starts.load() == 0);
    CHECK(primary.space.remove(iv) == errc::ok);
    if (armed) CHECK(primary.space.remove(before) == errc::ok);
    CHECK(primary.space.barrier() == errc::ok);
  }
}

TEST_CASE("C2: such an insertion does not wait for brackets elsewhere") {
  tracked_primary primary;
  replayed client;
  counting_client early;
  interval_notifier<replayed> iv{client};
  interval_notifier<counting_client> before{early};
  REQUIRE(primary.insert(before, {0x9000, 0xa000}) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
  std::atomic<bool> open{false};
  std::atomic<bool> inserted{false};
  std::thread changer([&] {
    const auto inv = primary.space.invalidate({0x4000, 0xa000}, event::unmap);
    open.store(true);
    wait_for(inserted);
  });
  wait_for(open);
  CHECK(primary.insert(iv, {0, 0x4000}, [](auto&& visit) { visit(mmunotify::range{0, 1}); }) == errc::ok);
  inserted.store(true);
  changer.join();
  CHECK(client.existing.size() == 1);
  CHECK(primary.space.remove(iv) == errc::ok);
  CHECK(primary.space.remove(before) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE("O1: brackets beside existing() call the interval: what it hands out late fails its sequence") {
  tracked_primary primary;
  replayed client;
  interval_notifier<replayed> iv{client};
  REQUIRE(primary.insert(iv, {0, 0x4000}, [&](auto&& visit) {
    const auto seq = iv.try_read_begin();
    CHECK_FALSE(iv.read_retry(seq));
    std::thread([&] { const auto inv = primary.space.invalidate({0x1000, 0x2000}, event::unmap); }).join();
    CHECK(client.starts.load() == 1);
    CHECK(iv.read_retry(seq));
    visit(mmunotify::range{0x1000, 0x2000});
  }) == errc::ok);
  CHECK(primary.space.remove(iv) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE("L7: a tracked insertion with existing ranges is refused where it would wait for itself") {
  tracked_primary primary;
  replayed client;
  interval_notifier<replayed> iv{client};
  const auto walk = [](auto&& visit) { visit(mmunotify::range{0, page}); };
  const contract_recorder violations;
  {
    const auto inv = primary.space.invalidate({0x9000, 0xa000}, event::unmap);
    CHECK(primary.space.insert(iv, {0, page}, walk) == errc::would_deadlock);
  }
  CHECK(violations.rules() == std::vector<std::string>{"L7"});
  CHECK(client.existing.empty());
  CHECK_FALSE(iv.registered());
  CHECK_FALSE(primary.space.armed());
  CHECK(primary.space.insert(iv, {0, page}, walk) == errc::ok);
  CHECK(primary.space.remove(iv) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE("L3: a space that is released while an insertion waits hands out nothing any more, and tells it") {
  tracked_primary primary;
  replayed client;
  interval_notifier<replayed> iv{client};
  counting_client other;
  subscriber<counting_client> node{other};
  REQUIRE(primary.join(node) == errc::ok);
  std::atomic<bool> open{false};
  std::atomic<bool> go_on{false};
  std::thread changer([&] {
    const auto inv = primary.space.invalidate({0, page}, event::unmap);
    open.store(true);
    wait_for(go_on);
  });
  wait_for(open);
  bool walked = false;
  std::thread comer([&] { CHECK(primary.insert(iv, {0, page}, [&](auto&&) { walked = true; }) == errc::ok); });
  while (!iv.registered()) std::this_thread::yield();
  std::thread releaser([&] { CHECK(primary.space.release() == errc::ok); });
  while (client.releases.load() == 0) std::this_thread::yield();  // told, though the bracket is open
  go_on.store(true);
  changer.join();
  comer.join();
  releaser.join();
  CHECK_FALSE(walked);
  CHECK(client.releases.load() == 1);
  CHECK(primary.space.unregister(node) == errc::ok);
  CHECK(primary.space.remove(iv) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE_TEMPLATE("the space's observer counts the calls of intervals as those of subscribers", P, EVERY_PRIMARY) {
  P primary;
  std::vector<std::string> log;
  logging_client part{log, "part"};
  logging_client all{log, "all"};
  keeper in_place;
  by_batch batches{{}};
  interval_notifier<logging_client> a{part};
  interval_notifier<keeper> b{in_place};
  interval_notifier<by_batch> c{batches};
  subscriber<logging_client> node{all};
  REQUIRE(primary.insert(a, {0, page}) == errc::ok);
  REQUIRE(primary.insert(b, {page, 2 * page}) == errc::ok);
  REQUIRE(primary.insert(c, {page, 2 * page}) == errc::ok);
  REQUIRE(primary.join(node) == errc::ok);
  auto calls = [&, before = std::uint64_t{0}]() mutable {
    const std::uint64_t now = primary.space.observer().total(observe::occurrence::callback);
    return now - std::exchange(before, now);
  };
  {
    const auto reading = primary.lock();
    CHECK(calls() == 0);
    { const auto inv = primary.space.invalidate({0, page}, event::unmap); }
    CHECK(calls() == 4);  // a and node, start and end
    { const auto inv = primary.space.invalidate({0, 2 * page}, event::unmap); }
    CHECK(calls() == 6);
    part.refuses = true;
    CHECK_FALSE(static_cast<bool>(primary.space.try_invalidate({0, page}, event::unmap)));
    CHECK(calls() == 2);
    part.refuses = false;
    all.refuses = true;
    CHECK_FALSE(static_cast<bool>(primary.space.try_invalidate({0, page}, event::unmap)));
    CHECK(calls() == 4);
    CHECK(primary.space.observer().total(observe::occurrence::refusal) == 2);
    static_cast<void>(primary.space.clear_young({0, page}));
    CHECK(calls() == 2);
    part.young = true;
    static_cast<void>(primary.space.test_young({0, page}));
    CHECK(calls() == 1);
    std::array<std::uint64_t, 1> bits{};
    CHECK(primary.space.young_pages({0, 2 * page}, bits, false) == errc::ok);
    CHECK(calls() == 3);  // a for its page, c for its batch, node for the page that is left
    {
      const auto inv = primary.space.invalidate_in_place({page, 2 * page}, event::clear);
      CHECK(calls() == 2);
      primary.space.change_entry({{page, 2 * page}, pfn{1}, true});
      CHECK(calls() == 1);
    }
    CHECK(calls() == 2);
    primary.space.invalidate_secondary_tlbs({0, 2 * page});
    CHECK(calls() == 0);
  }
  CHECK(primary.space.unregister(node) == errc::ok);
  for (auto* n : std::initializer_list<basic_interval<std::uintptr_t>*>{&a, &b, &c})
    CHECK(primary.space.remove(*n) == errc::ok);
  CHECK(primary.space.barrier() == errc::ok);
}

TEST_CASE("L4: an interval that one release has told is told by the next one, too, if a split brings it back") {
  replayed client;
  replayed other;
  interval_notifier<replayed> upper{client};
  interval_notifier<replayed> iv{other};
  for (int i = 1; i <= 2; ++i) {
    tracked_primary primary;
    REQUIRE(primary.insert(iv, {0, 2 * page}) == errc::ok);
    REQUIRE(primary.space.split(iv, page, upper) == errc::ok);
    CHECK(primary.space.release() == errc::ok);
    CHECK(client.releases.load() == i);
    CHECK(other.releases.load() == i);
    CHECK(primary.space.remove(upper) == errc::ok);
    CHECK(primary.space.remove(iv) == errc::ok);
    CHECK(primary.space.barrier() == errc::ok);
  }
}
