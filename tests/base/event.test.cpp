// SPDX-License-Identifier: MIT

#include <mmunotify/base/event.hpp>

#include <doctest/doctest.h>

#include <iterator>
#include <set>
#include <string>
#include <type_traits>

using namespace mmunotify;

namespace {

constexpr event every[] = {event::unmap,      event::clear,   event::protection_vma, event::protection_page,
                           event::soft_dirty, event::release, event::migrate,        event::exclusive};
static_assert(std::size(every) == event_count);

static_assert(sizeof(event) == 1 && sizeof(event_set) == 1);
static_assert(std::is_trivially_copyable_v<event_set>);

}  // namespace

TEST_CASE("the events are numbered from zero without a gap") {
  for (unsigned i = 0; i < event_count; ++i) CHECK(static_cast<unsigned>(every[i]) == i);
}

TEST_CASE("every event has a name of its own, the enumerator's") {
  CHECK(std::string{to_string(event::unmap)} == "unmap");
  CHECK(std::string{to_string(event::clear)} == "clear");
  CHECK(std::string{to_string(event::protection_vma)} == "protection_vma");
  CHECK(std::string{to_string(event::protection_page)} == "protection_page");
  CHECK(std::string{to_string(event::soft_dirty)} == "soft_dirty");
  CHECK(std::string{to_string(event::release)} == "release");
  CHECK(std::string{to_string(event::migrate)} == "migrate");
  CHECK(std::string{to_string(event::exclusive)} == "exclusive");
  std::set<std::string> names;
  for (const event e : every) names.insert(to_string(e));
  CHECK(names.size() == event_count);
}

TEST_CASE("a number that is no event has a name too") {
  CHECK(std::string{to_string(static_cast<event>(event_count))} == "unknown");
  CHECK(std::string{to_string(static_cast<event>(255))} == "unknown");
}

TEST_CASE("the empty set contains nothing and the full one everything") {
  for (const event e : every) {
    CHECK_FALSE(event_set{}.contains(e));
    CHECK(event_set::all().contains(e));
  }
  CHECK(event_set{} != event_set::all());
}

TEST_CASE("a set contains exactly the events that it was made of, for every pair and triple") {
  for (const event a : every) {
    for (const event b : every) {
      for (const event c : every) {
        const event_set s{a, b, c};
        for (const event e : every) REQUIRE(s.contains(e) == (e == a || e == b || e == c));
        REQUIRE(s == event_set{c, b, a});
        REQUIRE(s == event_set{a, a, b, c});
      }
    }
  }
}

TEST_CASE("all events by name are the full set") {
  CHECK(event_set{event::unmap, event::clear, event::protection_vma, event::protection_page, event::soft_dirty,
                  event::release, event::migrate, event::exclusive} == event_set::all());
}

TEST_CASE("sets work at compile time") {
  constexpr event_set s{event::unmap, event::exclusive};
  static_assert(s.contains(event::unmap) && s.contains(event::exclusive) && !s.contains(event::clear));
}
