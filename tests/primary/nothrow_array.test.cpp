// SPDX-License-Identifier: MIT

#include <mmunotify/primary/nothrow_array.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <numeric>

using namespace mmunotify;

namespace {

TEST_CASE("values are kept in order, in the object and on the heap") {
  for (const std::size_t n : {0U, 1U, 4U, 5U, 100U}) {
    nothrow_array<std::uint64_t, 4> values;
    REQUIRE(values.reserve(n));
    for (std::size_t i = 0; i < n; ++i) values.push_back(i * i);
    CHECK(values.size() == n);
    CHECK(values.empty() == (n == 0));
    CHECK(values.full() == (n >= 4));
    for (std::size_t i = 0; i < n; ++i) REQUIRE(values[i] == i * i);
    CHECK(std::accumulate(values.begin(), values.end(), std::uint64_t{0}) ==
          (n == 0 ? 0 : (n - 1) * n * (2 * n - 1) / 6));
  }
}

TEST_CASE("room that cannot be had is refused, and what was there stays usable") {
  nothrow_array<std::uint64_t, 4> values;
  CHECK_FALSE(values.reserve(SIZE_MAX / 8));
  CHECK_FALSE(values.reserve(SIZE_MAX));
  values.push_back(3);
  CHECK(values[0] == 3);
}

}  // namespace
