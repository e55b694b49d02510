// SPDX-License-Identifier: MIT

// The kit over drivers whose mirrors are intervals: two that are right, and a catalogue of mistakes, each of which must
// be named by the rule that it breaks.

#include <mmunotify/testing/interval_conformance.hpp>

#include <memory>

#include <doctest/doctest.h>

#include "testing/adapters/interval_mirror.hpp"
#include "testing/adapters/interval_regions.hpp"
#include "testing/verdicts.hpp"

using namespace mmunotify;
using adapters::interval_mistake;

namespace {

template <class Adapter, class... Mistake>
testing::report examine(const testing::options& o, Mistake... m) {
  return testing::interval_conformance([=](testing::test_primary& p) { return std::make_unique<Adapter>(p, m...); }, o);
}

template <class Adapter>
void passes(unsigned rounds) {
  verdicts::right(examine<Adapter>({.seed = verdicts::seed(), .rounds = rounds}));
}

#define BREAKS(m, rule) \
  verdicts::broken(#m, rule, examine<adapters::interval_mirror>(testing::options{.rounds = 0}, interval_mistake::m))

}  // namespace

TEST_CASE("O1: a correct mirror of one interval passes") { passes<adapters::interval_mirror>(8); }
TEST_CASE("O1: a correct mirror of several intervals, in two passes, passes") { passes<adapters::interval_regions>(8); }

TEST_CASE("C1: whoever uses the sequence otherwise than it is meant is caught") {
  BREAKS(ignores_read_retry, "O1");
  BREAKS(looks_up_before_read_begin, "C1");
  BREAKS(checks_retry_before_the_lock, "C1");
  BREAKS(maps_outside_the_lock, "C1");
  BREAKS(takes_no_lock_in_start, "C1");
  BREAKS(keeps_its_first_sequence, "C2");
}

TEST_CASE("C10: whoever drops a part of the common range, or more than that, or too late, is caught") {
  BREAKS(drops_only_the_first_page, "O1");
  BREAKS(forgets_the_last_page, "O1");
  BREAKS(drops_all_of_the_interval, "C10");
  BREAKS(drops_at_the_end, "O1");
}

TEST_CASE("O1: whoever does not take its part of a change in place is caught") {
  BREAKS(drops_in_place_and_misses_the_change, "O1");
  BREAKS(keeps_the_first_frame_of_a_change, "O1");
}

TEST_CASE("P4: whoever refuses when it must not, or leaves traces of a refusal, is caught") {
  BREAKS(refuses_blockable, "P3");
  BREAKS(refuses_half_way, "P4");
}

TEST_CASE("L7: whoever waits in a callback is caught") {
  BREAKS(removes_in_a_callback, "L7");
  BREAKS(faults_in_a_callback, "L7");
}

TEST_CASE("L1: whoever goes too early, or leaves something behind, is caught") {
  BREAKS(removes_without_waiting, "L1");
  BREAKS(keeps_its_mappings_when_removed, "L1");
  BREAKS(maps_while_it_is_removed, "L1");
}

TEST_CASE("C5: whoever maps because it was inserted is caught") { BREAKS(maps_when_inserted, "C5"); }

TEST_CASE("C6: whoever has what its interval does not cover any more is caught") {
  BREAKS(keeps_what_it_shrinks_from, "C6");
  BREAKS(faults_where_it_no_longer_is, "C6");
  BREAKS(keeps_the_upper_half, "C6");
}

TEST_CASE("O1: random rounds alone find what scenarios find") {
  const testing::options threads_alone{.rounds = 40, .threads = 6, .scenarios = false, .reference = false};
  for (const auto m : {interval_mistake::forgets_the_last_page, interval_mistake::looks_up_before_read_begin,
                       interval_mistake::maps_outside_the_lock}) {
    verdicts::broken("a mistake", "O1", examine<adapters::interval_mirror>(threads_alone, m));
  }
}

TEST_CASE("C8: whoever takes no turn, or not for long enough, is caught") {
  BREAKS(takes_no_turn, "C8");
  BREAKS(takes_its_turn_too_late, "C8");
  BREAKS(gives_its_turn_back_early, "C8");
}
