// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/outcome.hpp>

#include <doctest/doctest.h>

using namespace mmunotify;
using x86::mmu_counters;
using x86::outcome;
using x86::outcome_of;

TEST_CASE("an error of the host becomes the outcome that the caller can act on") {
  CHECK(outcome_of(errc::ok, {5}) == outcome{});
  CHECK(outcome_of(errc::released, {5}).what == outcome::released);
  CHECK(outcome_of(errc::no_memory, {5}).what == outcome::no_memory);
  CHECK(outcome_of(errc::again, {5}).what == outcome::again);
  for (const errc e : {errc::not_mapped, errc::access_denied, errc::bad_range, errc::would_deadlock}) {
    CHECK(outcome_of(e, {5}) == outcome{.what = outcome::not_mapped, .address = {5}});
  }
}

TEST_CASE("counters are read back under their names") {
  mmu_counters c;
  c.add(mmu_counters::faults, 1);
  c.add(mmu_counters::retries, 2);
  c.add(mmu_counters::installs, 3);
  c.add(mmu_counters::zapped, 4);
  c.add(mmu_counters::flushes, 5);
  c.add(mmu_counters::write_protected, 6);
  c.add(mmu_counters::tracked_writes, 7);
  c.add(mmu_counters::pages_zapped, 8);
  const x86::mmu_statistics s = c.read();
  CHECK(s.faults == 1);
  CHECK(s.retries == 2);
  CHECK(s.installs == 3);
  CHECK(s.zapped == 4);
  CHECK(s.flushes == 5);
  CHECK(s.write_protected == 6);
  CHECK(s.tracked_writes == 7);
  CHECK(s.pages_zapped == 8);
}
