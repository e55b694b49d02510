// SPDX-License-Identifier: MIT
#include <mmunotify/interval/interval_invalidation.hpp>

#include <doctest/doctest.h>

using namespace mmunotify;

TEST_CASE("C10: clipping keeps everything but the range, and that as well") {
  int owner = 0;
  const invalidation i{.range = {10, 30}, .event = event::migrate, .owner = &owner, .blockable = false};
  for (std::uintptr_t first = 0; first < 40; ++first) {
    for (std::uintptr_t last = first + 1; last <= 40; ++last) {
      const range interval{first, last};
      if (!interval.overlaps(i.range)) continue;
      const interval_invalidation c = detail::clipped(i, interval);
      CHECK(c.unclipped == i.range);
      CHECK(c.event == event::migrate);
      CHECK(c.owner == &owner);
      CHECK_FALSE(c.blockable);
      for (std::uintptr_t k = 0; k < 40; ++k) {
        CHECK(c.range.contains(k) == (interval.contains(k) && i.range.contains(k)));
      }
    }
  }
}
