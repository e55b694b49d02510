// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/bracket.hpp>

#include <doctest/doctest.h>

#include <string>
#include <type_traits>
#include <vector>

#include "support/recording_client.hpp"
#include "support/spaces.hpp"

using namespace mmunotify;

TEST_CASE_TEMPLATE("P2: a bracket ends once, at the end of its scope, with the values of its start", P, under_primary,
                   tracked_primary) {
  using bracket_type = typename P::space_type::bracket_type;
  static_assert(!std::is_copy_constructible_v<bracket_type> && !std::is_move_constructible_v<bracket_type>);
  struct client {
    std::vector<invalidation> seen{};
    void invalidate_range_start(const invalidation& i) { seen.push_back(i); }
    void invalidate_range_end(const invalidation& i) { seen.push_back(i); }
  };
  P primary;
  client c;
  subscriber<client> node{c};
  REQUIRE(primary.join(node) == errc::ok);
  int me = 0;
  {
    const auto reading = primary.lock();
    const bracket_type b = primary.space.invalidate({3, 9}, event::migrate, &me);
    CHECK(static_cast<bool>(b));
    CHECK(c.seen.size() == 1);
  }
  { const bracket_type b = primary.space.try_invalidate({4, 5}, event::soft_dirty); }
  REQUIRE(c.seen.size() == 4);
  for (const std::size_t i : {0U, 1U}) {
    CHECK(c.seen[i].range == mmunotify::range{3, 9});
    CHECK(c.seen[i].event == event::migrate);
    CHECK(c.seen[i].owner == &me);
    CHECK(c.seen[i].blockable);
  }
  for (const std::size_t i : {2U, 3U}) {
    CHECK(c.seen[i].event == event::soft_dirty);
    CHECK(c.seen[i].owner == nullptr);
    CHECK_FALSE(c.seen[i].blockable);
  }
  CHECK(primary.space.unregister(node) == errc::ok);
}
