// SPDX-License-Identifier: MIT
#include <mmunotify/interval/interval_invalidation.hpp>

#include <doctest/doctest.h>

#include <mmunotify/base/address.hpp>

using namespace mmunotify;

TEST_CASE("C10: clipping keeps everything but the range, and that as well") {
  int owner = 0;
  const invalidation i{
      .range = {10, 30}, .event = event::migrate, .owner = &owner, .blockable = false, .in_place = true};
  for (std::uintptr_t first = 0; first < 40; ++first) {
    for (std::uintptr_t last = first + 1; last <= 40; ++last) {
      const range interval{first, last};
      if (!interval.overlaps(i.range)) continue;
      const interval_invalidation c = detail::clipped(i, interval);
      CHECK(c.unclipped == i.range);
      CHECK(c.event == event::migrate);
      CHECK(c.owner == &owner);
      CHECK_FALSE(c.blockable);
      CHECK(c.in_place);
      for (std::uintptr_t k = 0; k < 40; ++k) {
        CHECK(c.range.contains(k) == (interval.contains(k) && i.range.contains(k)));
      }
    }
  }
}

TEST_CASE("C10: a part of a change has the frame of its own first page, also where the edges are inside pages") {
  constexpr std::uintptr_t p = page_size;
  const entry_change whole{{4 * p, 9 * p}, pfn{100}, true};
  const auto frame = [&](range interval) { return detail::clipped(whole, interval).frame.value; };
  CHECK(frame({0, 20 * p}) == 100);
  CHECK(frame({6 * p, 7 * p}) == 102);
  CHECK(frame({6 * p + 1, 7 * p}) == 102);
  CHECK(frame({7 * p - 1, 7 * p}) == 102);
  CHECK(frame({8 * p, 20 * p}) == 104);
  const entry_change part = detail::clipped(whole, {6 * p + 1, 8 * p + 1});
  CHECK(part.range == range{6 * p + 1, 8 * p + 1});
  CHECK(part.writable);
  const entry_change crooked{{4 * p + 5, 9 * p}, pfn{100}, false};
  CHECK(detail::clipped(crooked, {5 * p, 6 * p}).frame == pfn{101});
  const basic_entry_change<gfn> frames{{gfn{10}, gfn{20}}, pfn{7}, true};
  CHECK(detail::clipped(frames, {gfn{13}, gfn{14}}).frame == pfn{10});
  const basic_entry_change<gpa> bytes{{gpa{0x10000}, gpa{0x14000}}, pfn{7}, true};
  CHECK(detail::clipped(bytes, {gpa{0x12000}, gpa{0x13000}}).frame == pfn{9});
}
