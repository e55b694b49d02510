// SPDX-License-Identifier: MIT

#include <mmunotify/testing/report.hpp>

#include <cstdio>
#include <string>

#include <doctest/doctest.h>

using namespace mmunotify::testing;

namespace {

failure one(const char* rule) {
  failure f;
  std::snprintf(f.rule, sizeof f.rule, "%s", rule);
  std::snprintf(f.scenario, sizeof f.scenario, "a scenario");
  std::snprintf(f.sentence, sizeof f.sentence, "page 3 is still mapped");
  f.seed = 7;
  return f;
}

std::string printed(const report& r) {
  std::FILE* const to = std::tmpfile();
  REQUIRE(to != nullptr);
  print(r, to);
  std::rewind(to);
  std::string all(1000, '\0');
  all.resize(std::fread(all.data(), 1, all.size(), to));
  std::fclose(to);
  return all;
}

}  // namespace

TEST_CASE("a report is fine until a failure is added, and names the broken rules") {
  report r;
  CHECK(r.ok());
  CHECK(static_cast<bool>(r));
  CHECK_FALSE(r.names("O1"));
  r.add(one("O1"));
  CHECK_FALSE(r.ok());
  CHECK(r.names("O1"));
  CHECK_FALSE(r.names("O"));
  CHECK(r.failures().size() == 1);
}

TEST_CASE("a report that is full keeps the first failures and is no less a failure") {
  report r;
  for (std::size_t i = 0; i < report::capacity; ++i) r.add(one("O1"));
  r.add(one("P4"));
  CHECK(r.failures().size() == report::capacity);
  CHECK_FALSE(r.names("P4"));
  CHECK_FALSE(r.ok());
}

TEST_CASE("a report prints rule, scenario, seed and sentence of each failure") {
  report r;
  r.note_run();
  r.note_run();
  r.note_skip();
  CHECK(printed(r) == "2 scenarios, 1 left out, 0 failed\n");
  r.add(one("O1"));
  CHECK(printed(r) == "O1 broken, a scenario (seed 7): page 3 is still mapped\n2 scenarios, 1 left out, 1 failed\n");
}
