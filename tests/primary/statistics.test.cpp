// SPDX-License-Identifier: MIT

#include <mmunotify/primary/statistics.hpp>

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>

using namespace mmunotify;

namespace {

TEST_CASE("each counter arrives in the member of its name, and faults are the sum of their kinds") {
  using detail::counter;
  detail::primary_counters counters;
  for (std::size_t c = 0; c < static_cast<std::size_t>(counter::count); ++c) {
    counters.add(static_cast<counter>(c), c * 10);
    counters.add(static_cast<counter>(c));
  }
  const primary_statistics s = counters.read();
  const auto expected = [](counter c) { return static_cast<std::uint64_t>(c) * 10 + 1; };
  CHECK(s.zero_filled == expected(counter::zero_filled));
  CHECK(s.swapped_in == expected(counter::swapped_in));
  CHECK(s.swapped_out == expected(counter::swapped_out));
  CHECK(s.migrated == expected(counter::migrated));
  CHECK(s.moved == expected(counter::moved));
  CHECK(s.unmapped == expected(counter::unmapped));
  CHECK(s.skipped_pinned == expected(counter::skipped_pinned));
  CHECK(s.copied == expected(counter::copied));
  CHECK(s.forked == expected(counter::forked));
  CHECK(s.merged == expected(counter::merged));
  CHECK(s.collapsed == expected(counter::collapsed));
  CHECK(s.split == expected(counter::split));
  CHECK(s.to_device == expected(counter::to_device));
  CHECK(s.from_device == expected(counter::from_device));
  CHECK(s.made_exclusive == expected(counter::made_exclusive));
  CHECK(s.revoked == expected(counter::revoked));
  CHECK(s.reaped == expected(counter::reaped));
  CHECK(s.brackets == expected(counter::brackets));
  CHECK(s.pins == expected(counter::pins));
  CHECK(s.unpins == expected(counter::unpins));
  CHECK(s.faults == s.zero_filled + s.swapped_in);
  CHECK(s.stale_writes == 0);
}

}  // namespace
