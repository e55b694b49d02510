// SPDX-License-Identifier: MIT

#include <mmunotify/primary/statistics.hpp>

#include <doctest/doctest.h>

#include <cstdint>

using namespace mmunotify;

namespace {

TEST_CASE("each counter arrives in the member of its name, and faults are the sum of their kinds") {
  using detail::counter;
  detail::primary_counters counters;
  std::uint64_t n = 1;
  for (const counter c :
       {counter::zero_filled, counter::swapped_in, counter::swapped_out, counter::migrated, counter::moved,
        counter::unmapped, counter::skipped_pinned, counter::brackets, counter::pins, counter::unpins}) {
    counters.add(c, n);
    counters.add(c);
    n *= 10;
  }
  const primary_statistics s = counters.read();
  CHECK(s.zero_filled == 2);
  CHECK(s.swapped_in == 11);
  CHECK(s.faults == 13);
  CHECK(s.swapped_out == 101);
  CHECK(s.migrated == 1001);
  CHECK(s.moved == 10001);
  CHECK(s.unmapped == 100001);
  CHECK(s.skipped_pinned == 1000001);
  CHECK(s.brackets == 10000001);
  CHECK(s.pins == 100000001);
  CHECK(s.unpins == 1000000001);
  CHECK(s.stale_writes == 0);
}

}  // namespace
