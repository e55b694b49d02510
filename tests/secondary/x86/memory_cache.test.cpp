// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/memory_cache.hpp>

#include <doctest/doctest.h>

using namespace mmunotify;

namespace {
struct thing {
  int value = 7;
  thing* next_spare = nullptr;
};
}  // namespace

TEST_CASE("a stock fills up to what is asked for and gives everything back") {
  x86::stock<thing> s;
  CHECK(s.size() == 0);
  CHECK(s.fill(3) == errc::ok);
  CHECK(s.size() == 3);
  CHECK(s.fill(2) == errc::ok);
  CHECK(s.size() == 3);
  thing& t = s.pop();
  CHECK(t.value == 7);
  CHECK(t.next_spare == nullptr);
  CHECK(s.size() == 2);
  s.push(t);
  s.trim(1);
  CHECK(s.size() == 1);
}

TEST_CASE("a stock takes from another one what it lacks and what is there") {
  x86::stock<thing> a, b;
  REQUIRE(a.fill(5) == errc::ok);
  b.take_from(a, 2);
  CHECK(a.size() == 3);
  CHECK(b.size() == 2);
  b.take_from(a, 2);
  CHECK(b.size() == 2);
  b.take_from(a, 100);
  CHECK(a.size() == 0);
  CHECK(b.size() == 5);
}
