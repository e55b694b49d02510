// SPDX-License-Identifier: MIT

#include <mmunotify/base/range.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <mmunotify/base/address.hpp>

using namespace mmunotify;

namespace {

static_assert(address_key<std::uint64_t> && address_key<int> && address_key<gva> && address_key<gfn>);
static_assert(address_key<const char*>);
static_assert(!address_key<std::string>);                              // not trivially copyable
static_assert(sizeof(long double) <= 8 || !address_key<long double>);  // wider than a word
struct unordered {
  int x;
};
static_assert(!address_key<unordered>);

/// The small universe: keys 0 .. universe-1 may be in a range, a range's ends lie in 0 .. universe.
constexpr unsigned universe = 9;

using small = basic_range<unsigned>;

/// The naive model: the set of the keys in the range, a bit for each.
unsigned keys_of(const small& r) {
  unsigned bits = 0;
  for (unsigned k = 0; k < universe; ++k) {
    if (k >= r.first && k < r.last) bits |= 1U << k;
  }
  return bits;
}

/// Every range of the universe, the empty and the reversed ones too.
std::vector<small> all_ranges() {
  std::vector<small> ranges;
  for (unsigned first = 0; first <= universe; ++first) {
    for (unsigned last = 0; last <= universe; ++last) ranges.push_back({first, last});
  }
  return ranges;
}

}  // namespace

TEST_CASE("C4: one byte of overlap hits and ranges that touch do not") {
  const std::vector<small> ranges = all_ranges();
  for (const small& a : ranges) {
    for (const small& b : ranges) {
      CAPTURE(a.first);
      CAPTURE(a.last);
      CAPTURE(b.first);
      CAPTURE(b.last);
      REQUIRE(a.overlaps(b) == ((keys_of(a) & keys_of(b)) != 0));
      REQUIRE(a.overlaps(b) == b.overlaps(a));
    }
  }
}

TEST_CASE("C4: overlap is exact at the ends of the key space") {
  constexpr std::uintptr_t top = std::numeric_limits<std::uintptr_t>::max();
  const range last_byte{top - 1, top};
  CHECK(last_byte.overlaps({0, top}));
  CHECK(last_byte.overlaps({top - 1, top}));
  CHECK_FALSE(last_byte.overlaps({0, top - 1}));
  CHECK_FALSE(last_byte.overlaps({top, top}));
  const range first_byte{0, 1};
  CHECK(first_byte.overlaps({0, top}));
  CHECK_FALSE(first_byte.overlaps({1, top}));
  // A range that wraps is reversed: it is empty, and does not stand for both of its sides.
  const range wrapping{top - 10, 10};
  CHECK(wrapping.empty());
  CHECK_FALSE(wrapping.overlaps({0, top}));
  CHECK_FALSE(wrapping.overlaps({5, 6}));
}

TEST_CASE("a range is empty exactly if no key is in it") {
  for (const small& r : all_ranges()) REQUIRE(r.empty() == (keys_of(r) == 0));
  CHECK(small{}.empty());
}

TEST_CASE("a range contains exactly its keys") {
  for (const small& r : all_ranges()) {
    for (unsigned k = 0; k < universe; ++k) REQUIRE(r.contains(k) == ((keys_of(r) >> k & 1U) != 0));
  }
}

TEST_CASE("a range contains another one that is not empty exactly if it contains all its keys") {
  for (const small& outer : all_ranges()) {
    for (const small& inner : all_ranges()) {
      if (inner.empty()) continue;
      REQUIRE(outer.contains(inner) == ((keys_of(inner) & ~keys_of(outer)) == 0));
    }
  }
}

TEST_CASE("clipping leaves the common keys and never adds one") {
  for (const small& a : all_ranges()) {
    for (const small& b : all_ranges()) {
      REQUIRE(keys_of(a.clipped_to(b)) == (keys_of(a) & keys_of(b)));
      REQUIRE(a.clipped_to(b) == b.clipped_to(a));
    }
  }
}

TEST_CASE("the hull of two ranges that are not empty is the smallest range around both") {
  for (const small& a : all_ranges()) {
    for (const small& b : all_ranges()) {
      if (a.empty() || b.empty()) continue;
      const small hull = a.hull_with(b);
      REQUIRE(hull.contains(a));
      REQUIRE(hull.contains(b));
      for (const small& other : all_ranges()) {
        if (other.contains(a) && other.contains(b)) REQUIRE(other.contains(hull));
      }
    }
  }
}

TEST_CASE("ranges are equal if both ends are, even when both are empty") {
  CHECK(small{1, 2} == small{1, 2});
  CHECK(small{1, 2} != small{1, 3});
  CHECK(small{1, 1} != small{2, 2});
}

TEST_CASE("a strong address can be the key") {
  const basic_range<gva> r{gva{0x1000}, gva{0x3000}};
  CHECK(r.contains(gva{0x2fff}));
  CHECK_FALSE(r.contains(gva{0x3000}));
  CHECK(r.overlaps({gva{0x2fff}, gva{0x4000}}));
  CHECK_FALSE(r.overlaps({gva{0x3000}, gva{0x4000}}));
}

TEST_CASE("signed keys are ordered as signed") {
  const basic_range<int> r{-5, 5};
  CHECK(r.contains(-5));
  CHECK(r.contains(0));
  CHECK_FALSE(r.contains(5));
  CHECK(r.overlaps({-100, -4}));
  CHECK_FALSE(r.overlaps({-100, -5}));
}

TEST_CASE("ranges work at compile time") {
  static_assert(range{0, 2}.overlaps({1, 3}) && !range{0, 2}.overlaps({2, 3}));
  static_assert(range{0, 4}.clipped_to({2, 9}) == range{2, 4});
  static_assert(range{0, 1}.hull_with({8, 9}) == range{0, 9});
}
