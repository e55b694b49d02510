// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/filter.hpp>

#include <doctest/doctest.h>

#include <array>
#include <limits>
#include <string>
#include <vector>

#include "support/recording_client.hpp"
#include "support/spaces.hpp"

using namespace mmunotify;
using log_type = std::vector<std::string>;

namespace {

constexpr std::array all_events{event::unmap,      event::clear,   event::protection_vma, event::protection_page,
                                event::soft_dirty, event::release, event::migrate,        event::exclusive};

struct only_unmap {
  static constexpr event_set events{event::unmap, event::migrate};
  int starts = 0;
  int ends = 0;
  void invalidate_range_start(const invalidation&) noexcept { ++starts; }
  void invalidate_range_end(const invalidation&) noexcept { ++ends; }
};

}  // namespace

TEST_CASE_TEMPLATE("P6: the filter that decided about start decides about end: every event set of a client type", P,
                   under_primary, keyed_primary, tracked_primary) {
  P primary;
  only_unmap client;
  subscriber<only_unmap> node{client};
  REQUIRE(primary.join(node) == errc::ok);
  for (const event e : all_events) {
    const int before = client.starts;
    const auto reading = primary.lock();
    {
      const auto inv = primary.space.invalidate({0, 1}, e);
      CHECK((client.starts != before) == only_unmap::events.contains(e));
      CHECK(client.ends == before);
    }
    CHECK(client.ends == client.starts);
  }
  CHECK(client.starts == 2);
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE("P6: the type's events and the filter's: what both allow") {
  tracked_primary primary;
  only_unmap client;
  subscriber<only_unmap> node{client, {.events = {event::unmap, event::clear}}};
  CHECK(node.filter().events == event_set{event::unmap});
  REQUIRE(primary.join(node) == errc::ok);
  for (const event e : all_events) const auto inv = primary.space.invalidate({0, 1}, e);
  CHECK(client.starts == 1);
  CHECK(client.ends == 1);
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE_TEMPLATE("P6: a range filter: one byte of overlap is told, at start and end; ranges that touch are not", P,
                   under_primary, tracked_primary) {
  P primary;
  log_type log;
  logging_client client{log, "c"};
  subscriber<logging_client> node{client, {.range = mmunotify::range{10, 20}}};
  REQUIRE(primary.join(node) == errc::ok);
  const auto reading = primary.lock();
  for (std::uintptr_t first = 0; first < 25; ++first) {
    for (std::uintptr_t last = first + 1; last < 26; ++last) {
      log.clear();
      { const auto inv = primary.space.invalidate({first, last}, event::unmap); }
      CHECK(log.size() == (first < 20 && last > 10 ? 2U : 0U));
    }
  }
  log.clear();
  CHECK_FALSE(primary.space.test_young({0, 10}));
  CHECK_FALSE(primary.space.clear_young({20, 30}));
  CHECK_FALSE(primary.space.clear_flush_young({20, 30}));
  CHECK(log.empty());
  CHECK_FALSE(primary.space.test_young({0, 11}));
  CHECK(log == log_type{"c:test_young"});
  CHECK(primary.space.unregister(node) == errc::ok);  // the release hook has no range
  CHECK(log.back() == "c:release");
}

TEST_CASE("P6: an initiator does not hear of its own migrations and exclusive accesses, everybody else does") {
  tracked_primary primary;
  log_type log;
  const int me = 0;
  logging_client initiator{log, "initiator"};
  logging_client other{log, "other"};
  subscriber<logging_client> node_other{other};
  subscriber<logging_client> node{initiator, {.owner = &me}};
  REQUIRE(primary.join(node_other) == errc::ok);
  REQUIRE(primary.join(node) == errc::ok);
  for (const event e : {event::migrate, event::exclusive}) {
    log.clear();
    { const auto inv = primary.space.invalidate({0, 1}, e, &me); }
    CHECK(log == log_type{"other:start[0,1)", "other:end[0,1)"});
    { const auto inv = primary.space.invalidate({0, 1}, e, &log); }
    { const auto inv = primary.space.invalidate({0, 1}, e); }
    CHECK(log.size() == 10);
  }
  log.clear();
  { const auto inv = primary.space.invalidate({0, 1}, event::unmap, &me); }  // an unmap concerns everybody
  CHECK(log.size() == 4);
  CHECK(primary.space.unregister(node) == errc::ok);
  CHECK(primary.space.unregister(node_other) == errc::ok);
}

TEST_CASE("P6: who filters a bracket out cannot refuse it") {
  tracked_primary primary;
  log_type log;
  logging_client refusing{log, "r", false, true};
  subscriber<logging_client> node{refusing, {.events = {event::clear}}};
  REQUIRE(primary.join(node) == errc::ok);
  CHECK(static_cast<bool>(primary.space.try_invalidate({0, 1}, event::unmap)));
  CHECK_FALSE(static_cast<bool>(primary.space.try_invalidate({0, 1}, event::clear)));
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE_TEMPLATE("L6: a filter with an empty or reversed range is refused and leaves no trace", P, under_primary,
                   tracked_primary) {
  P primary;
  log_type log;
  logging_client client{log, "c"};
  constexpr auto top = std::numeric_limits<std::uintptr_t>::max();
  for (const mmunotify::range r : {mmunotify::range{5, 5}, mmunotify::range{6, 5}, mmunotify::range{top, 0}}) {
    subscriber<logging_client> node{client, {.range = r}};
    CHECK(primary.join(node) == errc::bad_range);
    CHECK_FALSE(node.registered());
    CHECK_FALSE(primary.space.armed());
    CHECK(primary.space.unregister(node) == errc::not_registered);
  }
  CHECK(log.empty());
}
