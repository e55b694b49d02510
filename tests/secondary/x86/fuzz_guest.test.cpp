// SPDX-License-Identifier: MIT

// Guests made of seeded bytes: the same demands as under libFuzzer (fuzz_guest.cpp), with every compiler.

#include <doctest/doctest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "fuzz_guest.hpp"

TEST_CASE("whatever a guest's bytes are, its accesses come out as the manual has them") {
  std::mt19937_64 random(fuzz::seed());
  fuzz::tally seen;
  for (unsigned round = 0; round < 80; ++round) {
    std::vector<std::uint8_t> bytes(random() % 6000);
    for (auto& b : bytes) b = static_cast<std::uint8_t>(random());
    if (bytes.size() > 2) {
      bytes[0] = static_cast<std::uint8_t>(round % 5);
      bytes[1] = static_cast<std::uint8_t>(round / 5 ^ (round % 2 == 0 ? 16 : 0));
    }
    fuzz::try_bytes(bytes, seen);
  }
  MESSAGE("steps ", seen.steps, " done ", seen.done, " faulted ", seen.faulted, " tracked ", seen.tracked,
          " prefetched ", seen.prefetched, " split ", seen.split);
  CHECK(seen.steps > 2000);
  CHECK(seen.done > 200);
  CHECK(seen.faulted > 100);
  CHECK(seen.prefetched > 20);
}

TEST_CASE("bytes that are too few for a guest are none") {
  fuzz::tally seen;
  const std::uint8_t few[] = {3, 7};
  fuzz::try_bytes({few, 0}, seen);
  fuzz::try_bytes(few, seen);
  CHECK(seen.steps == 0);
}
