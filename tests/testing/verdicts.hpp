// SPDX-License-Identifier: MIT
#pragma once

// What the kit has to say of an adapter that is right, and of one that is broken.

#include <cstdint>
#include <cstdlib>
#include <string>

#include <doctest/doctest.h>

#include <mmunotify/testing/report.hpp>

namespace verdicts {

/// Of the correct ones: what is to be caught is caught in every run.
inline std::uint64_t seed() {
  const char* given = std::getenv("MMUNOTIFY_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 1;
}

inline std::string text(const mmunotify::testing::report& r) {
  std::string all;
  for (const auto& f : r.failures()) all += std::string(f.rule) + ", " + f.scenario + ": " + f.sentence + "\n";
  return all;
}

inline void right(const mmunotify::testing::report& r) {
  INFO(text(r));
  CHECK(r.ok());
  MESSAGE(r.ran(), " scenarios, ", r.skipped(), " left out");
}

/// The failure is named by the rule that is broken.
inline void broken(const std::string& name, const std::string& rule, const mmunotify::testing::report& r) {
  INFO(name, " breaks ", rule, ", and the kit says: ", text(r));
  CHECK(r.names(rule.c_str()));
}

}  // namespace verdicts
