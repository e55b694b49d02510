// SPDX-License-Identifier: MIT

// What read sections and grace periods cost, beside what a user would take instead.
//
// The peers are measured in the same run, where the machine has them; CMake says which. Each kind of section protects
// the same body, two dependent loads whose result is added up in a register, in a loop of its own of the same shape.
// The limits are measured, too: no section at all; two plain stores to a line of the thread's own; one membarrier.
//
// A thread is parked for the whole run: in a process of one thread the kernel's membarrier does nothing.

#include "peers.h"
#include "ratios.hpp"
#include "sync_grace_periods.hpp"
#include "sync_memory.hpp"
#include "sync_sections.hpp"
#include "sync_walks.hpp"

#if MMUNOTIFY_BENCH_CDS
#include "peers_cds.hpp"
#endif
#if MMUNOTIFY_BENCH_XENIUM
#include "peers_xenium.hpp"
#endif

namespace {
bench_payload first_payload{1};
}
bench_payload* bench_shared = &first_payload;

namespace {

using namespace sync_bench;

void section_cases() {
  add_sections<no_section>("empty");
  add_sections<no_section>("empty_again");
  add_sections<two_stores>("two_plain_stores");
  add_sections<one_exchange>("one_exchange");
  add_sections<dynamic_section>("dynamic");
  add_sections<static_section>("static");
  add_sections<dynamic_nested>("dynamic_nested");
  add_sections<static_nested>("static_nested");
  add_sections<unordered_section>("unordered");
  add_sections<handoff_section>("handoff");
  add_sections<rotating_section>("64_domains_in_turn");
#if MMUNOTIFY_BENCH_URCU
  add_sections<urcu_section>("urcu_memb");
  add_sections<urcu_nested>("urcu_memb_nested");
#endif
#if MMUNOTIFY_BENCH_CK
  add_sections<ck_section>("ck_epoch");
#endif
#if MMUNOTIFY_BENCH_XENIUM
  add_sections<xenium_epoch_based>("xenium_epoch_based");
  add_sections<xenium_debra>("xenium_debra");
#endif
#if MMUNOTIFY_BENCH_CDS
  add_sections<cds_section>("cds_general_buffered");
#endif
  add_sections<shared_mutex_section>("shared_mutex");
}

void amid_cases() {
  ratios::add("amid_misses/stores_alone", measure_amid<no_section>);
  ratios::add("amid_misses/two_plain_stores", measure_amid<two_stores>);
  ratios::add("amid_misses/one_exchange", measure_amid<one_exchange>);
  ratios::add("amid_misses/dynamic", measure_amid<dynamic_section>);
  ratios::add("amid_misses/static", measure_amid<static_section>);
#if MMUNOTIFY_BENCH_URCU
  ratios::add("amid_misses/urcu_memb", measure_amid<urcu_section>);
#endif
#if MMUNOTIFY_BENCH_CK
  ratios::add("amid_misses/ck_epoch", measure_amid<ck_section>);
#endif
#if MMUNOTIFY_BENCH_XENIUM
  ratios::add("amid_misses/xenium_epoch_based", measure_amid<xenium_epoch_based>);
#endif
#if MMUNOTIFY_BENCH_CDS
  ratios::add("amid_misses/cds_general_buffered", measure_amid<cds_section>);
#endif
}

template <class Kind>
void add_idle(const std::string& variant) {
  ratios::add("grace_period_idle/" + variant, measure_idle<Kind>)->UseRealTime();
}
/// Beside sections of the same kind.
template <class Kind>
void add_busy(const std::string& variant) {
  ratios::add("grace_period_busy/" + variant, measure_busy<Kind, Kind, true>)->UseRealTime();
}
template <class Kind>
void add_crowd(const std::string& variant) {
  ratios::add("grace_period_64_threads/" + variant, measure_crowd<Kind, 64>)->UseRealTime();
}
template <class Kind>
void add_together(const std::string& variant) {
  ratios::add("grace_period_4_callers/" + variant, measure_together<Kind>)->Threads(4)->UseRealTime();
}

void grace_period_cases() {
  add_idle<bare_membarrier>("membarrier");
  add_idle<bare_membarrier>("membarrier_again");
  add_idle<dynamic_section>("synchronize");
  add_idle<expedited>("synchronize_expedited");
  add_idle<polled>("poll");
  add_idle<static_section>("static_synchronize");
  ratios::add("grace_period_busy/membarrier", measure_busy<bare_membarrier, dynamic_section, false>)->UseRealTime();
  add_busy<dynamic_section>("synchronize");
  add_busy<expedited>("synchronize_expedited");
  add_busy<polled>("poll");
  add_crowd<bare_membarrier>("membarrier");
  add_crowd<crowd_section>("synchronize");
  add_together<bare_membarrier>("membarrier");
  add_together<dynamic_section>("synchronize");
#if MMUNOTIFY_BENCH_URCU
  add_idle<urcu_section>("urcu_memb");
  add_busy<urcu_section>("urcu_memb");
  add_crowd<urcu_section>("urcu_memb");
  add_together<urcu_section>("urcu_memb");
#endif
#if MMUNOTIFY_BENCH_CK
  add_idle<ck_section>("ck_epoch");
  add_busy<ck_section>("ck_epoch");
#endif
#if MMUNOTIFY_BENCH_CDS
  add_idle<cds_section>("cds_general_buffered");
  add_busy<cds_section>("cds_general_buffered");
#endif
  ratios::add("eight_domains/one_by_one", measure_together<one_by_one>)->UseRealTime();
  ratios::add("eight_domains/synchronize_all", measure_together<all_at_once>)->UseRealTime();
}

void call_cases() {
  ratios::add("call_and_barrier/ours", measure_call_and_barrier<domain_calls>)->UseRealTime();
  ratios::add("call/ours", measure_call<domain_calls>)->UseManualTime()->Iterations(16 * batch);
#if MMUNOTIFY_BENCH_URCU
  ratios::add("call_and_barrier/urcu_memb", measure_call_and_barrier<urcu_calls>)->UseRealTime();
  ratios::add("call/urcu_memb", measure_call<urcu_calls>)->UseManualTime()->Iterations(16 * batch);
#endif
}

void print_goals() {
  ratios::print_goals({
      {"a section of a dynamic domain / liburcu memb, inline, C", "section/dynamic", 1.0, "section/urcu_memb"},
      {"a section of a static domain / the same", "section/static", 0.65, "section/urcu_memb"},
      {"a nested section, dynamic domain, ns", "section/dynamic_nested", 0.7, ""},
      {"a nested section, static domain, ns", "section/static_nested", 0.7, ""},
      {"a section of a dynamic domain / ck_epoch", "section/dynamic", 0.5, "section/ck_epoch"},
      {"a section of a dynamic domain / xenium epoch_based", "section/dynamic", 0.5, "section/xenium_epoch_based"},
      {"a section of a dynamic domain / xenium debra", "section/dynamic", 0.5, "section/xenium_debra"},
      {"an idle grace period / one membarrier", "grace_period_idle/synchronize", 1.15, "grace_period_idle/membarrier"},
      {"an idle grace period / liburcu memb", "grace_period_idle/synchronize", 0.6, "grace_period_idle/urcu_memb"},
      {"a grace period beside a busy reader / liburcu memb", "grace_period_busy/synchronize", 0.5,
       "grace_period_busy/urcu_memb"},
      {"a grace period with 64 idle threads, ns", "grace_period_64_threads/synchronize", 1000, ""},
      {"call() and barrier(), ns", "call_and_barrier/ours", 200'000, ""},
      {"bytes per thread and domain, computed", bytes_computed, 16, ""},
      {"bytes per thread and domain, measured (a tenth more: pages)", bytes_measured, 17.6, ""},
  });
}

}  // namespace

int main(int argc, char** argv) {
  section_cases();
  amid_cases();
  grace_period_cases();
  call_cases();
  for (const std::size_t length : {1U, 8U, 64U}) add_walks(length);
  int status = 0;
  {
    const parked_threads<no_section> other(1);
    status = ratios::run(argc, argv);
  }
  report_memory();
  print_goals();
  return status;
}
