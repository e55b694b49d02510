// SPDX-License-Identifier: MIT

// The kit passes what is right and catches what is wrong: adapters/ has one correct mirror of each kind, and the
// catalogue of mistakes, each of which must be named by the rule that it breaks.

#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include <doctest/doctest.h>

#include <mmunotify/testing/conformance.hpp>

#include "testing/adapters/gpu.hpp"
#include "testing/adapters/mirror.hpp"
#include "testing/adapters/rdma.hpp"
#include "testing/adapters/shadow.hpp"
#include "testing/verdicts.hpp"

using namespace mmunotify;
using adapters::gpu_mistake;
using adapters::mistake;
using testing::conformance;

// Tells the kit of every allocation. (Not inlined: gcc would take malloc and delete for a mismatch.)
[[gnu::noinline]] void* operator new(std::size_t n, const std::nothrow_t&) noexcept {
  testing::note_allocation();
  return std::malloc(n != 0 ? n : 1);
}
[[gnu::noinline]] void* operator new(std::size_t n) {
  if (void* const p = operator new(n, std::nothrow); p != nullptr) return p;
  std::abort();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace {

template <class Adapter, class... Mistake>
testing::report examine(const testing::options& o, Mistake... m) {
  return conformance([=](testing::test_primary& p) { return std::make_unique<Adapter>(p, m...); }, o);
}

template <class Adapter>
void passes(unsigned rounds) {
  verdicts::right(examine<Adapter>({.seed = verdicts::seed(), .rounds = rounds}));
}

const testing::options scenarios_alone{.rounds = 0};
const testing::options threads_alone{.rounds = 40, .threads = 6, .scenarios = false, .reference = false};

#define MIRROR(m, rule) verdicts::broken(#m, rule, examine<adapters::mirror>(scenarios_alone, mistake::m))
#define MIRROR_RANDOM(m, rule) verdicts::broken(#m, rule, examine<adapters::mirror>(threads_alone, mistake::m))
#define GPU(m, rule) verdicts::broken(#m, rule, examine<adapters::gpu>(scenarios_alone, gpu_mistake::m))
#define GPU_RANDOM(m, rule) verdicts::broken(#m, rule, examine<adapters::gpu>(threads_alone, gpu_mistake::m))

}  // namespace

TEST_CASE("O1: a correct mirror passes") { passes<adapters::mirror>(12); }
TEST_CASE("O1: a correct two-pass mirror passes") { passes<adapters::gpu>(12); }
TEST_CASE("O1: a correct mirror of a region passes") { passes<adapters::rdma>(12); }
TEST_CASE("O1: the x86 shadow MMU passes") { passes<adapters::shadow>(4); }

TEST_CASE("O1: whoever does not drop all of the range, or more than that, is caught") {
  MIRROR(forgets_last_page, "O1");
  MIRROR(off_by_one_first, "O1");
  MIRROR(one_page_of_a_huge_range, "O1");
  MIRROR(rounds_crooked_edges_inwards, "O1");
  MIRROR(ignores_soft_dirty, "O1");
  MIRROR(ignores_all_migrations, "O1");
  MIRROR(device_keeps_its_translation, "O1");
  MIRROR(clears_other_ranges, "C4");
}

TEST_CASE("O1: whoever drops at the wrong time, or miscounts brackets, is caught") {
  MIRROR(zaps_at_the_end, "O1");
  MIRROR(zaps_at_the_next_access, "O1");
  MIRROR(zaps_before_it_records, "O1");
  MIRROR(opens_before_it_has_ended_all, "P5");
  MIRROR(remembers_one_bracket, "P5");
  MIRROR(remembers_four_brackets, "P5");
}

TEST_CASE("C1: whoever retries too little, or too much, is caught") {
  MIRROR(no_retry_check, "O1");
  MIRROR(ignores_open_brackets, "O1");
  MIRROR(ignores_ended_brackets, "C1");
  MIRROR(end_forgets_history, "C1");
  MIRROR(snapshot_too_late, "C1");
  MIRROR(checks_retry_before_lock, "C1");
  MIRROR(drops_the_lock_after_the_check, "C1");
  MIRROR(retries_for_any_bracket, "C9");
  MIRROR(retries_for_ever_after_many, "C2");
  MIRROR(maps_read_only_pages_writable, "O1");
}

TEST_CASE("P4: whoever refuses when it must not, or leaves traces of a refusal, is caught") {
  MIRROR(refuses_blockable, "P3");
  MIRROR(refuses_without_reason, "P3");
  MIRROR(half_done_refusal, "P4");
  MIRROR(refuses_unrecorded, "P1");
}

TEST_CASE("O5: whoever answers untruly about accesses is caught") {
  MIRROR(young_always_false, "O5");
  MIRROR(young_always_true, "O5");
  MIRROR(test_clears_young, "O5");
  MIRROR(clearing_leaves_young, "O5");
  MIRROR(clearing_clears_all, "O5");
  MIRROR(no_young_after_clearing, "O5");
}

TEST_CASE("L3: whoever lives on after its time, or before it, is caught") {
  MIRROR(keeps_mappings_on_release, "L3");
  MIRROR(maps_after_release, "L3");
  MIRROR(maps_before_registered, "P7");
  MIRROR(usable_while_registering, "P7");
  MIRROR(does_not_forget_when_it_returns, "L9");
  MIRROR(registers_on_a_released_space, "L6");
}

TEST_CASE("L7: whoever does in a callback what it must not is caught") {
  MIRROR(pins_in_a_callback, "L7");
  MIRROR(locks_twice, "L7");
  MIRROR(allocates_in_a_callback, "L7");
}

TEST_CASE("K4: whoever does not give its frames back, or too often, is caught") {
  MIRROR(keeps_a_pin_after_a_collision, "K4");
  MIRROR(unpins_twice, "K4");
}

TEST_CASE("O4: a flush that misses the case of everything is caught") { MIRROR(flush_of_everything_overflows, "O4"); }

TEST_CASE("O3: whoever does not finish what it began is caught") {
  GPU(finish_not_waited, "O1");
  GPU(begin_does_not_record, "O1");
  GPU(own_and_others_migrations, "O1");
  GPU(own_bracket_any_event, "O1");
}

TEST_CASE("O1: whoever does not take a replacement as it is told is caught") {
  GPU(change_entry_keeps_old, "O1");
  GPU(change_entry_keeps_write, "O1");
  GPU(change_entry_only_first, "O1");
  GPU(change_entry_not_flushed, "O1");
  GPU(change_entry_maps_unmapped, "O1");
  GPU(change_entry_revives, "O1");
}

TEST_CASE("O3: two brackets at once with one token are caught") { GPU(one_token_for_all, "O3"); }

TEST_CASE("O3: what only threads can show is shown by them") { GPU_RANDOM(no_flush_without_token, "O1"); }

TEST_CASE("O1: random rounds alone find what scenarios find") {
  MIRROR_RANDOM(forgets_last_page, "O1");
  MIRROR_RANDOM(zaps_before_it_records, "O1");
  MIRROR_RANDOM(snapshot_too_late, "O1");
  MIRROR_RANDOM(drops_the_lock_after_the_check, "O1");
  MIRROR_RANDOM(remembers_four_brackets, "O1");
  GPU_RANDOM(one_token_for_all, "O3");
}

TEST_CASE("a failure of one thread is the same when its seed is run again") {
  const testing::options one_thread{.seed = 77, .rounds = 20, .threads = 0, .scenarios = false};
  const testing::report first = examine<adapters::mirror>(one_thread, mistake::snapshot_too_late);
  REQUIRE_FALSE(first.ok());
  const testing::failure found = first.failures()[0];
  testing::options again = one_thread;
  again.seed = found.seed;
  again.rounds = 1;
  const testing::report second = examine<adapters::mirror>(again, mistake::snapshot_too_late);
  REQUIRE_FALSE(second.ok());
  CHECK(std::string(second.failures()[0].sentence) == found.sentence);
  CHECK(second.failures()[0].seed == found.seed);
}

TEST_CASE("options leave parts out, and the contract handler is given back") {
  static int handled = 0;
  const contract_handler before = set_contract_handler([](const contract_violation&) noexcept { handled += 1; });
  const testing::report rounds = examine<adapters::mirror>({.rounds = 3, .threads = 0, .scenarios = false});
  CHECK(rounds.ok());
  CHECK(rounds.ran() == 3);
  const testing::report threads =
      examine<adapters::mirror>({.rounds = 2, .threads = 1, .scenarios = false, .reference = false});
  CHECK(threads.ok());
  CHECK(threads.ran() == 4);
  const testing::report timed =
      examine<adapters::mirror>({.rounds = 0, .threads = 0, .seconds = 0.001, .scenarios = false});
  CHECK(timed.ok());
  CHECK_FALSE(examine<adapters::mirror>(scenarios_alone, mistake::locks_twice).ok());
  CHECK(handled == 0);
  detail::violated("L7", "here", "this one is not the kit's");
  CHECK(handled == 1);
  static_cast<void>(set_contract_handler(before));
}
