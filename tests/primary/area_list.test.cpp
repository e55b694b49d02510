// SPDX-License-Identifier: MIT

#include <mmunotify/primary/area_list.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <span>
#include <vector>

using namespace mmunotify;

namespace {

constexpr std::uintptr_t universe = 6;
using cells = std::array<int, universe>;  // -1: nothing mapped, otherwise the protection

cells cells_of(const area_list& list) {
  cells c;
  c.fill(-1);
  for (const area& a : list.items()) {
    for (std::uintptr_t i = a.range.first; i < a.range.last; ++i) c[i] = static_cast<int>(a.allows);
  }
  return c;
}

void build(area_list& list, const cells& c) {
  area_list empty;
  list.swap(empty);
  for (std::uintptr_t i = 0; i < universe; ++i) {
    if (c[i] < 0) continue;
    const area made{{i, i + 1}, static_cast<protection>(c[i])};
    REQUIRE(list.replaced(made.range, {&made, 1}, list));
  }
}

/// Every list over six addresses with two protections and holes: 729 of them.
template <class Function>
void for_each_list(Function f) {
  cells c;
  c.fill(-1);
  for (int n = 0; n < 729; ++n) {
    int rest = n;
    for (int& cell : c) {
      cell = rest % 3 == 0 ? -1 : rest % 3;
      rest /= 3;
    }
    area_list list;
    build(list, c);
    f(list, c);
  }
}

template <class Function>
void for_each_range(Function f) {
  for (std::uintptr_t first = 0; first < universe; ++first) {
    for (std::uintptr_t last = first + 1; last <= universe; ++last) f(range{first, last});
  }
}

TEST_CASE("a list is sorted, disjoint, and merges neighbours that agree") {
  for_each_list([](const area_list& list, const cells& c) {
    CHECK(cells_of(list) == c);
    CHECK(list.verify() == nullptr);
    for (std::size_t i = 1; i < list.items().size(); ++i) {
      const area& a = list.items()[i - 1];
      const area& b = list.items()[i];
      CHECK((a.range.last < b.range.first || a.allows != b.allows));
    }
  });
}

TEST_CASE("looking up agrees with the cells, for every list and every range") {
  for_each_list([](const area_list& list, const cells& c) {
    for (std::uintptr_t a = 0; a < universe; ++a) {
      const area* found = list.find(a);
      CHECK((found == nullptr ? -1 : static_cast<int>(found->allows)) == c[a]);
    }
    CHECK(list.find(universe) == nullptr);
    for_each_range([&](const range& r) {
      bool any = false;
      errc reads = errc::ok;
      errc writes = errc::ok;
      for (std::uintptr_t a = r.first; a < r.last; ++a) {
        any = any || c[a] >= 0;
        if (reads == errc::ok && c[a] < 1) reads = errc::not_mapped;
        if (writes == errc::ok && c[a] < 2) writes = c[a] < 0 ? errc::not_mapped : errc::access_denied;
      }
      CHECK(list.overlaps(r) == any);
      CHECK(list.covers(r) == (reads == errc::ok));
      CHECK(list.allows(r, protection::read) == reads);
      CHECK(list.allows(r, protection::read_write) == writes);
    });
  });
}

TEST_CASE("cutting a hole and filling it changes what is in the hole and nothing else") {
  for_each_list([](const area_list& list, const cells& c) {
    for_each_range([&](const range& hole) {
      for (int filling = -1; filling <= 2; ++filling) {
        const area made{hole, static_cast<protection>(filling < 0 ? 0 : filling)};
        area_list out;
        REQUIRE(list.replaced(hole, {&made, filling < 0 ? 0U : 1U}, out));
        cells expected = c;
        for (std::uintptr_t a = hole.first; a < hole.last; ++a) expected[a] = filling;
        CHECK(cells_of(out) == expected);
        CHECK(out.verify() == nullptr);
        CHECK(cells_of(list) == c);
      }
    });
  });
}

TEST_CASE("shifting moves what lies in the range, clipped") {
  for_each_list([](const area_list& list, const cells& c) {
    for_each_range([&](const range& r) {
      area_list out;
      REQUIRE(list.shifted(r, 0, out));
      cells expected;
      expected.fill(-1);
      for (std::uintptr_t a = r.first; a < r.last; ++a) expected[a - r.first] = c[a];
      CHECK(cells_of(out) == expected);
    });
  });
}

TEST_CASE("the highest addresses are not lost") {
  const area top{{UINTPTR_MAX - 10, UINTPTR_MAX}, protection::read};
  area_list list;
  area_list out;
  REQUIRE(list.replaced(top.range, {&top, 1}, list));
  REQUIRE(list.replaced({UINTPTR_MAX - 5, UINTPTR_MAX - 4}, {}, out));
  REQUIRE(out.items().size() == 2);
  CHECK(out.items()[1].range == range{UINTPTR_MAX - 4, UINTPTR_MAX});
}

TEST_CASE("changing what areas say touches exactly the range, for every list and every range") {
  for_each_list([](const area_list& list, const cells& before) {
    for_each_range([&](const range& r) {
      area_list next;
      REQUIRE(list.changed(
          r, [](area& a) { a.allows = protection::none; }, next));
      cells expected = before;
      for (std::uintptr_t i = r.first; i < r.last; ++i) expected[i] = before[i] < 0 ? -1 : 0;
      REQUIRE(cells_of(next) == expected);
      REQUIRE(next.verify() == nullptr);
      REQUIRE(cells_of(list) == before);
    });
  });
}

TEST_CASE("areas that differ in soft-dirty stay apart until they agree, and a move makes them dirty") {
  area_list list;
  const area made{{0, 6}, protection::read};
  REQUIRE(list.replaced(made.range, {&made, 1}, list));
  REQUIRE(list.changed(
      {2, 4}, [](area& a) { a.soft_dirty = false; }, list));
  REQUIRE(list.items().size() == 3);
  CHECK_FALSE(list.find(3)->soft_dirty);
  CHECK(list.find(4)->soft_dirty);
  area_list moved;
  REQUIRE(list.shifted({1, 5}, 11, moved));
  CHECK(moved.items().size() == 1);
  CHECK(moved.items()[0] == area{{11, 15}, protection::read, true});
  REQUIRE(list.changed(
      {0, 6}, [](area& a) { a.soft_dirty = false; }, list));
  CHECK(list.items().size() == 1);
}

}  // namespace
