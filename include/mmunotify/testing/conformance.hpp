// SPDX-License-Identifier: MIT
#pragma once

// The contract, checked on your own driver.
//
//   #include <mmunotify/testing/conformance.hpp>
//   const auto r = mmunotify::testing::conformance([](mmunotify::testing::test_primary& p) {
//     return std::make_unique<my_adapter>(p);                       // adapter.hpp says what it has to have
//   });
//   mmunotify::testing::print(r);  return r ? 0 : 1;
//
// Three stages, each only if the one before found nothing:
//   scenarios   one for each way to break a rule that we know of, and, for faults and brackets, every order of the two
//               that can be forced in one thread (schedule.hpp). The same on every machine and in every run.
//   rounds      random brackets, accesses, registrations from a seed: first in one thread, then in several, against a
//               stage that knows what each page holds.
//   reference   the same in several threads over a reference_mmu.
//
// What it cannot see: a mapping that neither mapped() nor an access shows; an order of steps that no point allows to
// force and no thread happened upon; what goes wrong only after longer than a run. An adapter whose access() loops
// until it succeeds hangs where a bracket is open on purpose.
//
// While it runs, the process's contract handler is the kit's: what the library itself finds is a failure of the
// scenario that was running. One run at a time; others wait.
//
// Context: a thread of its own choice that holds no section and no lock of the adapter. Cost: some tenths of a second.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <mutex>

#include <mmunotify/testing/adapter.hpp>
#include <mmunotify/testing/detail/bracket_scenarios.hpp>
#include <mmunotify/testing/detail/fault_scenarios.hpp>
#include <mmunotify/testing/detail/hook_scenarios.hpp>
#include <mmunotify/testing/detail/interval_scenarios.hpp>
#include <mmunotify/testing/detail/judge.hpp>
#include <mmunotify/testing/detail/random_rounds.hpp>
#include <mmunotify/testing/detail/reference_rounds.hpp>
#include <mmunotify/testing/detail/trial.hpp>
#include <mmunotify/testing/report.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing {

struct options {
  std::uint64_t seed = 1;  ///< of the first round; the next have the next ones
  unsigned rounds = 8;     ///< of each random kind
  unsigned steps = 400;    ///< of each thread, in each round
  unsigned threads = 4;    ///< half of them devices; 0: none, nothing but what one thread can do
  double seconds = 0;      ///< go on with further seeds until they are over; 0: `rounds` decides
  bool scenarios = true;   ///< false: only rounds
  bool reference = true;   ///< false: not over the reference_mmu
};

namespace detail {

template <class Factory>
class suite {
  using adapter_type = adapter_of<Factory>;
  using client_type = typename adapter_type::client_type;
  using on_trial = void (*)(trial<Factory>&) noexcept;
  using on_factory = void (*)(Factory&, judge&) noexcept;
  using told = interval_invalidation;  // what takes less is called, too
  static constexpr bool starts = has_start<client_type, std::uintptr_t, told> ||
                                 has_refusing_start<client_type, std::uintptr_t, told> ||
                                 has_begin<client_type, std::uintptr_t, told>;

 public:
  suite(Factory& factory, const options& o, report& r) noexcept : factory_(factory), options_(o), report_(r) {}

  void run() noexcept {
    if (!fit()) return;
    if (options_.scenarios) {
      if constexpr (starts && is_placed<adapter_type>) {
        with_trial("detached in a bracket", &detached_in_a_bracket<Factory>, false);
        if (!report_.ok()) return;  // all others detach, too
      }
      if constexpr (starts) bracket_scenarios();
      if (report_.ok()) hook_scenarios();
      if constexpr (starts) {
        if (report_.ok()) fault_scenarios();
      }
      if constexpr (starts && is_placed<adapter_type>) {
        if (report_.ok()) interval_scenarios();
      }
    }
    if constexpr (starts) {
      using clock = std::chrono::steady_clock;
      const auto until =
          clock::now() + std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(options_.seconds));
      std::uint64_t seed = options_.seed;
      for (unsigned i = 0; report_.ok() && (i < options_.rounds || clock::now() < until); ++i) round(seed++);
    }
  }

 private:
  /// Whether the kit has the memory to run at all.
  bool fit() noexcept {
    judge j("getting ready", 0);
    const stage s;
    j.that(s.ready(), "access", "no memory for the kit's pages");
    return conclude(j);
  }
  bool conclude(const judge& j) noexcept {
    if (j.failed()) report_.add(j.verdict());
    return !j.failed();
  }
  void with_trial(const char* name, on_trial f, bool attached = true) noexcept {
    report_.note_run();
    judge j(name, 0);
    {
      trial<Factory> t(factory_, j, attached);
      if (!t.failed()) f(t);
    }
    static_cast<void>(conclude(j));
  }
  void with_factory(const char* name, on_factory f) noexcept {
    report_.note_run();
    judge j(name, 0);
    f(factory_, j);
    static_cast<void>(conclude(j));
  }
  template <bool Applies>
  void if_it_applies(const char* name, on_trial f, bool attached = true) noexcept {
    if constexpr (Applies) {
      with_trial(name, f, attached);
    } else {
      report_.note_skip();
    }
  }

  void bracket_scenarios() noexcept {
    with_trial("loads and stores", &loads_and_stores<Factory>);
    if (!report_.ok()) return;  // the device does not even work
    with_trial("nothing is mapped between start and end", &nothing_between_start_and_end<Factory>);
    if_it_applies<claims_precision<adapter_type>>("faults elsewhere go on", &faults_elsewhere_go_on<Factory>);
    with_trial("overlapping brackets", &overlapping_brackets<Factory>);
    with_trial("many brackets at once", &many_brackets<Factory>);
    with_trial("thousands of brackets", &thousands_of_brackets<Factory>);
    with_trial("pages that lose rights, or go", &protect_and_unmap<Factory>);
    with_trial("another client refuses", &refused_by_another<Factory>);
    if_it_applies<can_be_held<adapter_type>>("the adapter refuses", &refuses_and_changes_nothing<Factory>);
    if_it_applies<has_owner_name<adapter_type>>("only own brackets are ignored",
                                                &only_own_brackets_are_ignored<Factory>);
  }

  void hook_scenarios() noexcept {
    with_trial("the space is released", &released<Factory>);
    with_trial("unregistered and registered again", &leaves_and_comes_back<Factory>);
    // Intervals are inserted under brackets without waiting: interval_scenarios.
    if constexpr (!is_placed<adapter_type>) {
      with_trial("not usable before registered", &not_usable_before_registered<Factory>, false);
    }
    if_it_applies<has_test_young<client_type>>("young is what was accessed", &young_is_what_was_accessed<Factory>);
    if constexpr (can_clear_young<Factory>) {
      with_trial("young until cleared", &young_until_cleared<Factory>);
    } else {
      report_.note_skip();
    }
    if_it_applies<has_clear_young<client_type> || has_young_pages<client_type>>("young, a batch",
                                                                                &young_batches<Factory>);
    if_it_applies<has_change_entry<client_type>>("replaced in place", &changes_in_place<Factory>);
    if_it_applies<has_change_entry<client_type>>("replaced in place beside a bracket",
                                                 &changes_in_place_beside<Factory>, false);
    if_it_applies<has_invalidate_secondary_tlbs<client_type>>("the device's TLB", &flushes_the_device<Factory>);
  }

  void fault_scenarios() noexcept {
    with_factory("a bracket in the middle of a fault", &bracket_in_the_middle<Factory>);
    with_factory("a bracket begins in the middle of a fault", &bracket_begins_in_the_middle<Factory>);
    with_factory("a bracket ends in the middle of a fault", &bracket_ends_in_the_middle<Factory>);
    with_factory("rights are withdrawn in the middle of a fault", &rights_withdrawn_in_the_middle<Factory>);
    with_factory("leaving in the middle of a fault", &leaving_in_the_middle<Factory>);
    with_factory("an access in the middle of a bracket", &access_in_the_middle_of_a_bracket<Factory>);
    with_factory("two brackets at once", &two_brackets_at_once<Factory>);
    with_factory("an access in the middle of leaving", &access_in_the_middle_of_leaving<Factory>);
  }

  /// One with a trial of its own, or several, and perhaps nothing to do.
  template <bool Applies>
  void if_it_applies(const char* name, on_factory f) noexcept {
    if constexpr (Applies) {
      with_factory(name, f);
    } else {
      report_.note_skip();
    }
  }
  void interval_scenarios() noexcept {
    using interval_adapter = interval_adapter_of<Factory>;
    with_trial("an interval and a bracket have a part in common", &drops_the_common_part<Factory>, false);
    with_factory("brackets over another interval", &another_interval<Factory>);
    with_factory("inserted under brackets", &inserted_under_brackets<Factory>);
    if_it_applies<can_detach_later<interval_adapter>>("detached without waiting", &detached_later<Factory>);
    if_it_applies<can_resize<interval_adapter>>("resized", &resized<Factory>);
    if_it_applies<can_split<interval_adapter>>("split", &split_in_two<Factory>);
    if_it_applies<can_take_turns<interval_adapter>>("in its turn", &in_turn<Factory>);
  }

  void round(std::uint64_t seed) noexcept {
    report_.note_run();
    {
      judge j("a random round in one thread", seed);
      one_thread<Factory>(factory_, j, seed).run(options_.steps);
      if (!conclude(j) || options_.threads == 0) return;
    }
    report_.note_run();
    {
      judge j("a random round in several threads", seed);
      many_threads<Factory>(factory_, j, seed, options_.threads).run(options_.steps);
      if (!conclude(j) || !options_.reference) return;
    }
    report_.note_run();
    judge j("a random round over a reference_mmu", seed);
    reference_rounds<Factory>(factory_, j, seed, options_.threads).run(options_.steps);
    static_cast<void>(conclude(j));
  }

  Factory& factory_;
  const options& options_;
  report& report_;
};

inline std::mutex one_run;

}  // namespace detail

/// Effects: runs the kit over adapters that the factory makes: factory(test_primary&) returns a pointer to a
/// conformance_adapter, or something like one that owns it. The adapter and its client need not be thread-safe beyond
/// what adapter.hpp says. Returns: what was found.
template <class Factory>
  requires conformance_adapter<detail::adapter_of<Factory>>
report conformance(Factory factory, const options& o = {}) noexcept {
  const std::lock_guard lock{detail::one_run};
  const contract_handler before = set_contract_handler(&detail::judge::on_violation);
  report r;
  detail::suite<Factory>(factory, o, r).run();
  set_contract_handler(before);
  return r;
}

}  // namespace testing
MMUNOTIFY_END_NAMESPACE
