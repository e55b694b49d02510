// SPDX-License-Identifier: MIT

#include <mmunotify/base/address.hpp>

#include <doctest/doctest.h>

#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <unordered_set>

using namespace mmunotify;

namespace {

constexpr std::uint64_t top = std::numeric_limits<std::uint64_t>::max();

template <class A, class B>
concept comparable = requires(A a, B b) { a == b; };

template <class A, class B>
concept ordered_with = requires(A a, B b) { a < b; };

template <class A, class B>
concept subtractable = requires(A a, B b) { a - b; };

template <class A, class B>
concept addable = requires(A a, B b) { a + b; };

// Nothing converts by accident.
static_assert(!std::is_convertible_v<gva, gpa> && !std::is_constructible_v<gpa, gva>);
static_assert(!std::is_convertible_v<gpa, hva> && !std::is_constructible_v<hva, gpa>);
static_assert(!std::is_convertible_v<gfn, pfn> && !std::is_constructible_v<pfn, gfn>);
static_assert(!std::is_convertible_v<gpa, gfn> && !std::is_convertible_v<gfn, gpa>);
static_assert(!std::is_convertible_v<std::uint64_t, gva> && !std::is_convertible_v<gva, std::uint64_t>);
static_assert(!comparable<gva, gpa> && !comparable<gpa, hva> && !comparable<gfn, pfn> && !comparable<gpa, gfn>);
static_assert(!ordered_with<gva, gpa> && !subtractable<gva, gpa> && !subtractable<gfn, pfn>);
static_assert(!comparable<gva, std::uint64_t>);
static_assert(!addable<gva, gva> && !addable<gfn, gfn> && !addable<gva, gfn>);

// What they can do with their own kind.
static_assert(comparable<gva, gva> && ordered_with<gfn, gfn> && subtractable<gva, gva>);
static_assert(std::totally_ordered<gva> && std::totally_ordered<gfn>);

// They cost what the number costs.
static_assert(sizeof(gva) == 8 && sizeof(pfn) == 8);
static_assert(std::is_trivially_copyable_v<gva> && std::is_trivially_copyable_v<pfn>);
static_assert(std::is_standard_layout_v<gva> && std::is_standard_layout_v<pfn>);

}  // namespace

TEST_CASE("a default address and a default frame are zero") {
  CHECK(gva{}.value == 0);
  CHECK(gfn{}.value == 0);
}

TEST_CASE("addresses move by bytes, differ in bytes, and wrap modulo 2^64") {
  const gva a{0x1000};
  CHECK(a + 0x234 == gva{0x1234});
  CHECK(a - 1 == gva{0xfff});
  CHECK(gva{0x3000} - a == 0x2000);
  CHECK(gva{top} + 1 == gva{0});
  CHECK(gva{0} - 1 == gva{top});
  CHECK(gva{0} - gva{1} == top);
  for (const std::uint64_t base : {std::uint64_t{0}, std::uint64_t{1}, top / 2, top - 1, top}) {
    for (const std::uint64_t step : {std::uint64_t{0}, std::uint64_t{1}, page_size, top}) {
      CHECK((hva{base} + step) - hva{base} == step);
      CHECK((hva{base} + step) - step == hva{base});
    }
  }
}

TEST_CASE("frames move and differ by frames") {
  CHECK(gfn{7} + 3 == gfn{10});
  CHECK(gfn{10} - gfn{7} == 3);
}

TEST_CASE("addresses and frames are ordered as their numbers, unsigned") {
  CHECK(gva{1} < gva{2});
  CHECK(gva{0} < gva{top});
  CHECK(gva{top / 2} < gva{top / 2 + 1});
  CHECK(pfn{3} > pfn{2});
  CHECK(pfn{3} >= pfn{3});
}

TEST_CASE("an address is its page and its offset, at every offset of a page") {
  for (const std::uint64_t base : {std::uint64_t{0}, page_size, top - page_mask}) {
    for (std::uint64_t offset = 0; offset < page_size; ++offset) {
      const gpa a{base + offset};
      REQUIRE(a.page() == gpa{base});
      REQUIRE(a.offset() == offset);
      REQUIRE(a.page() + a.offset() == a);
    }
  }
}

TEST_CASE("a page's frame is the same for all its bytes, and the frame's base is the page") {
  for (const std::uint64_t page : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{0xfffff}, top >> page_shift}) {
    const gpa first{page << page_shift};
    CHECK(frame_of(first) == gfn{page});
    CHECK(frame_of(first + page_mask) == gfn{page});
    CHECK(base_of(gfn{page}) == first);
    CHECK(base_of(frame_of(first + 5)) == (first + 5).page());
  }
  static_assert(std::same_as<decltype(frame_of(gpa{})), gfn>);
  static_assert(std::same_as<decltype(frame_of(address<host_physical>{})), pfn>);
  static_assert(std::same_as<decltype(base_of(gfn{})), gpa>);
}

TEST_CASE("the page constants agree with each other") {
  CHECK(page_size == 4096);
  CHECK(page_size == std::uint64_t{1} << page_shift);
  CHECK(page_mask == page_size - 1);
}

TEST_CASE("addresses and frames are hashed by value") {
  std::unordered_set<gva> addresses;
  std::unordered_set<gfn> frames;
  for (std::uint64_t i = 0; i < 64; ++i) {
    addresses.insert(gva{i * page_size});
    addresses.insert(gva{i * page_size});
    frames.insert(gfn{i});
  }
  CHECK(addresses.size() == 64);
  CHECK(frames.size() == 64);
  CHECK(addresses.contains(gva{63 * page_size}));
  CHECK_FALSE(addresses.contains(gva{64 * page_size}));
  CHECK(frames.contains(gfn{63}));
  CHECK_FALSE(frames.contains(gfn{64}));
}

TEST_CASE("everything works at compile time") {
  static_assert(frame_of(gpa{0x12345}) == gfn{0x12});
  static_assert((gva{0x12345}.page() + 0x345) - gva{0x12345} == 0);
}
