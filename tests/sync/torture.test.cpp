// SPDX-License-Identifier: MIT

// Torture of the read sections: everything that sync/ offers, at once, at random, in six domains, for as long as asked.
// After the idea of Linux's rcutorture (Documentation/RCU/torture.rst): do not check what the code does, check what its
// user may rely on, and drive it with all that its user may do.
//
// The oracle.
//   Age. An element is found through a table. An updater takes it out and lets it grow older by one with each grace
//   period; after ten of them it is freed. A reader looks at the age at the END of the section in which it found the
//   element: 0 is published, 1 is removed, and 2 or more means that a grace period has ended over the reader's head.
//   Not one is tolerated. `Reader Pipe` is the histogram. Batches. A section overlaps the beginning of one grace period
//   at most: the second waits for the end of the first, and that one for the section. `Reader Batch` is the histogram
//   of how many began; 2 is an error. Payload. Plain data, initialised before publication (S2) and poisoned as soon as
//   the element is freed. A reader checks it at both ends of its section; AddressSanitizer and ThreadSanitizer check it
//   as well. Ledger. A reader says in the element that it comes, and in plain data that it leaves; whoever sees a grace
//   period end, itself or through a cookie that another thread drove, must find them equal. Cookies (S3). One made
//   inside a section is not complete there, in this thread or in the one it was sent to; a later one is not complete
//   before an earlier one; and every one becomes complete. Lists. A node that is on a list all the time is met by a
//   walk, once, and keeps its life (listing.hpp). Callbacks (S4). They are numbered: run once each, in their order,
//   before a barrier that was called after them returns (calling.hpp). Elements that were retired and never come back
//   are counted at the end. Last leavers. A sleeping grace period is woken although nobody comes after (leaving.hpp).
//   Lives (S8). Threads exit behind their last section, domains come and go, children of a fork use every domain.
//   Independence (S7). A section of one domain lasts until another domain has ended grace periods and run callbacks.
//   Progress (S5). What does not end while others complete their work is an error (base.hpp).
//
// What it cannot show: orders that this processor does not break. tests/model/ is for these. The negative controls in
// tests/CMakeLists.txt remove one protection each, and it has to say so.

#include <algorithm>
#include <array>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string_view>
#include <thread>
#include <vector>

#include <mmunotify/sync/static_srcu_domain.hpp>

#include "sync/torture/arena.hpp"
#include "sync/torture/leaving.hpp"
#include "sync/torture/lives.hpp"
#include "sync/torture/phase.hpp"

using namespace torture;

namespace {

using mmunotify::linux_platform;
using mmunotify::srcu_domain;

/// A kernel without membarrier.
struct no_membarrier : linux_platform {
  static bool heavy_available() noexcept { return false; }
  static void heavy() noexcept { fail("a heavy fence without membarrier"); }
};

struct known_at_compile_time;
using static_domain = mmunotify::static_srcu_domain<known_at_compile_time>;
using fenced_domain = mmunotify::basic_srcu_domain<no_membarrier>;
using static_fenced_domain = mmunotify::static_srcu_domain<known_at_compile_time, no_membarrier>;

// --- An executor.
// -------------------------------------------------------------------------------------------------------

/// A thread that drains when it is asked to.
class event_loop {
 public:
  static void schedule(void* context) noexcept {
    auto& posted = static_cast<event_loop*>(context)->posted_;
    posted.fetch_add(1, std::memory_order_release);
    linux_platform::wake(posted);
  }
  void run(srcu_domain& d) {
    while (!quit_.load(std::memory_order_acquire)) {
      const std::uint32_t seen = posted_.load(std::memory_order_acquire);
      if (d.drain() != 0) self->completed.add();
      if (!quit_.load(std::memory_order_relaxed)) linux_platform::wait(posted_, seen);
    }
  }
  void quit() noexcept {
    quit_.store(true, std::memory_order_release);
    schedule(this);
  }

 private:
  std::atomic<std::uint32_t> posted_{0};
  std::atomic<bool> quit_{false};
};

// --- What the threads do.
// -----------------------------------------------------------------------------------------------

std::vector<arena<srcu_domain>*> dynamic_arenas;

/// One element from each dynamic domain, and one call for all of them.
void update_all() {
  std::vector<srcu_domain*> domains;
  std::vector<element<srcu_domain>*> removed;
  for (auto* a : dynamic_arenas) {
    removed.push_back(a->replace());
    domains.push_back(&a->domain());
  }
  {
    const in_flight f("synchronize_all", "the dynamic domains");
    srcu_domain::synchronize_all(std::span<srcu_domain* const>(domains));
    self->note(count::synchronize_all);
  }
  for (std::size_t i = 0; i < removed.size(); ++i) {
    if (removed[i] != nullptr) dynamic_arenas[i]->release(*removed[i]);
  }
}

void read_somewhere() {
  if (handoff_gate.closed.load(std::memory_order_relaxed)) {
    for (any_arena* a : arenas) a->end_handoffs();
  }
  any_arena& outer = some_arena();
  any_arena& inner = some_arena();
  if (&outer == &inner || self->random.below(8) != 0) return outer.read_one();
  outer.inside([&inner] { inner.read_one(); });
}

void sleep_somewhere() {
  // In one order, so that no two sleepers wait for each other.
  const std::size_t i = self->random.below(arenas.size() - 1);
  arenas[i]->sleep_beside(*arenas[i + 1 + self->random.below(arenas.size() - i - 1)]);
}

void parked_reader() {
  for (any_arena* a : arenas) a->end_handoffs();
}

/// The threads, by what they do.
class crew {
 public:
  /// Starts a thread that is attached everywhere, and that signals may interrupt.
  template <class Body>
  void add(const char* name, std::size_t index, Body body) {
    all_.emplace_back([name, index, body, seed = options.seed * 1000 + all_.size()] {
      if (enter(name, index, seed) == nullptr) fail("there are too many threads");
      for (any_arena* a : arenas) a->attach();
      self->takes_signals.store(true, std::memory_order_release);
      body();
      self->takes_signals.store(false, std::memory_order_relaxed);
      leave();
    });
  }
  void join() {
    for (auto& t : all_) t.join();
    all_.clear();
  }

 private:
  std::vector<std::thread> all_;
};

void start_workers(crew& c) {
  for (std::size_t i = 0; i < 2; ++i) {
    c.add("updater", i, [] {
      perform(updaters, [] {
        // One updater alone finds the driver free, and is the faster.
        if (self->index != 0 && current_mood.load(std::memory_order_relaxed) == mood::brisk) std::this_thread::yield();
        if (self->random.below(16) == 0) return update_all();
        some_arena().update_one();
      });
      for (any_arena* a : arenas) a->finish();
    });
    c.add("list", i, [] {
      perform(lists, [] {
        if (self->random.below(3) == 0) return some_arena().walk_list();
        some_arena().change_list();
      });
    });
    c.add("flood", i, [] { perform(floods, [] { some_arena().flood_one(); }); });
  }
  c.add("barrier", 0, [] { perform(barriers, [] { some_arena().barrier_one(); }); });
  c.add("births", no_index, [] {
    visitors v;
    perform(births, [&] { v.one(); });
    v.finish();
  });
  c.add("nomads", no_index, [] { perform(nomads, [] { nomad(); }); });
  c.add("sleeper", no_index, [] { perform(sleepers, [] { sleep_somewhere(); }); });
  if (has_forks) c.add("forks", no_index, [] { perform(forks, [] { fork_one(); }); });
}

/// To be started last, since grace periods look at the newest threads first: so they look soon.
void start_readers(crew& c) {
  for (std::size_t i = 0; i < 3; ++i) {
    c.add("reader", i, [] {
      perform(
          readers, [] { read_somewhere(); }, parked_reader);
    });
  }
}

/// Last leavers, in three domains of their own.
class quiet_corner {
 public:
  void start(crew& c) {
    c.add("last leaver", no_index, [this] {
      perform(quiet, [this] {
        switch (self->random.below(3)) {
          case 0: return dynamic_pair_.leave_last();
          case 1: return static_pair_.leave_last();
          default: return fenced_pair_.leave_last();
        }
      });
      over_.store(true, std::memory_order_release);
    });
    c.add("left behind", no_index, [this] {
      while (!over_.load(std::memory_order_acquire)) {
        if (dynamic_pair_.answer() || static_pair_.answer() || fenced_pair_.answer()) continue;
        if (is_active(quiet)) {
          std::this_thread::yield();
        } else {
          doze();
        }
      }
    });
  }

 private:
  struct tag;
  using static_quiet = mmunotify::static_srcu_domain<tag>;

  srcu_domain dynamic_;
  static_quiet static_;
  fenced_domain fenced_;
  quiet_pair<srcu_domain> dynamic_pair_{dynamic_, "a quiet dynamic domain"};
  quiet_pair<static_quiet> static_pair_{static_, "a quiet static domain"};
  quiet_pair<fenced_domain> fenced_pair_{fenced_, "a quiet domain without membarrier"};
  std::atomic<bool> over_{false};
};

// --- The run.
// -----------------------------------------------------------------------------------------------------------

struct phase {
  std::uint32_t mask;
  mood how;
  std::uint32_t slots;
  std::uint64_t section = any;  ///< most sections
  std::uint64_t update = any;   ///< most updates
  std::uint64_t where = any;    ///< most of everything
};

constexpr std::array first{
    phase{everything, mood::mixed, 8},
    phase{readers | updaters, mood::brisk, 1, plain_section, by_waiting, 0},
    phase{quiet, mood::brisk, 8},
    phase{lists | signals, mood::brisk, 8},
    phase{readers | updaters | third | signals | births, mood::mixed, 2},
    phase{everything & ~(readers | births), mood::mixed, 8},  // nobody reads: the domains are idle
    phase{readers | forks | barriers | floods, mood::drowsy, 8},
    // Without membarrier, whose interrupts would end what makes a section late.
    phase{readers | updaters | signals, mood::brisk, 1, handoff_section, by_waiting, 3},
    phase{births | updaters, mood::drowsy, 4, any, by_waiting, 2},
    phase{everything & ~quiet, mood::drowsy, 4},
};

/// The first few in order, so that a short run has seen them; then at random.
phase choose_phase(std::size_t n, small_random& random) {
  phase p = first[n % first.size()];
  if (options.phase < first.size()) return first[options.phase];
  if (n >= first.size()) {
    p = first[random.below(first.size())];
    if (random.below(2) == 0) p.mask = static_cast<std::uint32_t>(random() & random.below(everything + 1));
    if (random.below(2) == 0) p.how = static_cast<mood>(random.below(3));
    if (random.below(2) == 0) p.slots = static_cast<std::uint32_t>(1 + random.below(8));
    p.section = random.below(2) == 0 ? any : random.below(section_kinds);
    p.update = random.below(2) == 0 ? any : random.below(update_kinds);
    p.where = random.below(2) == 0 ? any : random.below(arenas.size());
  }
  p.mask &= options.activities;
  if (p.mask == 0) p.mask = options.activities;
  return p;
}

void begin_phase(const phase& p) {
  current_mood.store(p.how, std::memory_order_relaxed);
  slots_in_use.store(p.slots, std::memory_order_relaxed);
  taste.section.store(p.section, std::memory_order_relaxed);
  taste.update.store(p.update, std::memory_order_relaxed);
  taste.arena.store(p.where, std::memory_order_relaxed);
  change_active(p.mask);
}

void run_phases() {
  using clock = std::chrono::steady_clock;
  const auto end =
      clock::now() + std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(options.seconds));
  small_random random(options.seed);
  watcher w;
  for (std::size_t n = 0; clock::now() < end; ++n) {
    begin_phase(choose_phase(n, random));
    for (std::uint64_t ticks = 10 + random.below(25); ticks > 0 && clock::now() < end; --ticks) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      w.look();
    }
  }
  stop.store(true, std::memory_order_release);
  change_active(1U << 31);  // no activity's, so that the parked ones find it changed
}

void print_histogram(const char* name, std::array<counter, bins> thread_state::*which) {
  std::printf("%s", name);
  for (std::size_t i = 0; i < bins; ++i) {
    std::uint64_t sum = 0;
    for (auto& t : threads) sum += (t.*which)[i].get();
    std::printf(" %" PRIu64, sum);
  }
  std::printf("\n");
}

void print_statistics() {
  for (std::size_t k = 0; k < count_names.size(); ++k) {
    std::uint64_t sum = 0;
    for (auto& t : threads) sum += t.counts[k].get();
    if (static_cast<count>(k) == count::reinserted) {
      for (any_arena* a : arenas) sum += a->reinserted();
    }
    std::printf("  %-34s %12" PRIu64 "\n", count_names[k], sum);
  }
  for (any_arena* a : arenas) {
    std::printf("  grace periods of %-17s %12" PRIu64 "   backlog %zu\n", a->arena_name(), a->grace_periods(),
                a->backlog());
  }
  print_histogram("Reader Pipe: ", &thread_state::pipe);
  print_histogram("Reader Batch:", &thread_state::batch);
  std::fflush(stdout);
}

void print_state() {
  for (auto& t : threads) {
    const char* const what = t.what.load();
    if (!t.used.load() || what == nullptr) continue;
    std::printf("  %-12s %2zu: %s in %s, for %" PRIu64 " ticks\n", t.name, t.index, what, t.where.load(),
                tick.load() - t.since.load());
  }
  print_statistics();
}

/// Threads in the order in which they may go: whoever sends before whoever receives.
void torture_all(srcu_domain& with_executor, event_loop& loop) {
  enter("main", no_index, options.seed);
  for (any_arena* a : arenas) a->attach();
  crew workers;
  crew sender;
  crew receivers;
  quiet_corner corner;
  std::atomic<bool> no_more_mail{false};
  std::thread executor([&] {
    enter("event loop", no_index, options.seed);
    loop.run(with_executor);
    leave();
  });
  start_workers(workers);
  corner.start(workers);
  sender.add("signals", no_index, [] { perform(signals, [] { send_signal(); }); });
  receivers.add("third", no_index, [&] {
    perform(third, [] {
      for (any_arena* a : arenas) a->receive_one();
      std::this_thread::yield();
    });
    for (bool last = false; !last;) {
      last = no_more_mail.load(std::memory_order_acquire);
      for (any_arena* a : arenas) {
        a->receive_one();
        last &= !a->mail_waits();
      }
      std::this_thread::yield();
    }
  });
  start_readers(workers);

  run_phases();
  // From here on a watcher of its own turns a hang into a sentence.
  std::atomic<bool> closed{false};
  std::thread guard([&] {
    for (watcher w; !closed.load(std::memory_order_acquire); w.look())
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
  });
  sender.join();
  workers.join();
  no_more_mail.store(true, std::memory_order_release);
  receivers.join();
  for (any_arena* a : arenas) a->close();
  closed.store(true, std::memory_order_release);
  guard.join();
  loop.quit();
  executor.join();
  leave();
}

// --- Options.
// -----------------------------------------------------------------------------------------------------------

void print_help() {
  std::printf(
      "usage: torture [--seconds N] [--seed S] [--only a,b,c] [--without a,b,c] [--phase N] [--patience N]\n\n"
      "Tortures the read sections; says ERROR and why, or prints what it has done.\n\n"
      "  --seconds N   how long (default: MMUNOTIFY_TORTURE_SECONDS, or 3)\n"
      "  --seed S      of all random choices (default: MMUNOTIFY_SEED, or drawn; printed)\n"
      "  --only LIST   of the activities, these alone:\n               ");
  for (const char* name : activity_names) std::printf(" %s", name);
  std::printf("\n  --without LIST  all but these\n  --phase N     of the first %zu phases, this one alone\n",
              first.size());
  std::printf("  --patience N  what takes N ticks of at least 10 ms is stuck (default: 3000)\n");
}

/// Returns: the activities in the list; 0 if there is a word in it that is none.
std::uint32_t read_activities(std::string_view list) {
  std::uint32_t mask = 0;
  while (!list.empty()) {
    const std::string_view word = list.substr(0, list.find(','));
    list.remove_prefix(std::min(list.size(), word.size() + 1));
    const auto* const found = std::find(activity_names.begin(), activity_names.end(), word);
    if (found == activity_names.end()) return 0;
    mask |= 1U << (found - activity_names.begin());
  }
  return mask;
}

bool set_activities(std::uint32_t mask) {
  options.activities = mask;
  return mask != 0;
}

/// A number from the whole text. Returns: false if it is none.
template <class Number>
bool read_number(const char* text, Number& value) {
  char* end = nullptr;
  if constexpr (std::is_floating_point_v<Number>) {
    value = std::strtod(text, &end);
  } else {
    value = std::strtoull(text, &end, 0);
  }
  return end != text && *end == '\0' && value >= 0;
}

bool read_options(int argc, char** argv) {
  options.seed = std::random_device{}();
  if (const char* s = std::getenv("MMUNOTIFY_SEED"); s != nullptr && !read_number(s, options.seed)) return false;
  if (const char* s = std::getenv("MMUNOTIFY_TORTURE_SECONDS");
      s != nullptr && *s != '\0' && !read_number(s, options.seconds)) {
    return false;
  }
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string_view name = argv[i];
    const char* const value = argv[i + 1];
    const bool good = name == "--seconds"    ? read_number(value, options.seconds)
                      : name == "--seed"     ? read_number(value, options.seed)
                      : name == "--phase"    ? read_number(value, options.phase)
                      : name == "--patience" ? read_number(value, options.patience)
                      : name == "--only"     ? set_activities(read_activities(value))
                      : name == "--without"
                          ? read_activities(value) != 0 && set_activities(options.activities & ~read_activities(value))
                          : false;
    if (!good) return false;
  }
  if (!has_forks) options.activities &= ~std::uint32_t{forks};
  return argc % 2 == 1 && options.activities != 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "--help") {
    print_help();
    return 0;
  }
  if (!read_options(argc, argv)) {
    std::fprintf(stderr, "torture: bad options; see --help\n");
    return 2;
  }
  std::printf("MMUNOTIFY_SEED=%" PRIu64 " seconds=%g%s\n", options.seed, options.seconds,
              has_forks ? "" : " (a sanitizer: no forks)");
  std::fflush(stdout);
  mmunotify::set_contract_handler([](const mmunotify::contract_violation& v) noexcept {
    fail("contract %s broken in %s: %s", v.rule, v.function, v.sentence);
  });
  install_handlers();

  event_loop loop;
  srcu_domain bounded({.isolated = true, .max_backlog = 200});
  srcu_domain executor({.schedule = &event_loop::schedule, .context = &loop});
  static_domain of_tag;
  fenced_domain fenced;
  static_fenced_domain fenced_tag;
  {
    arena<srcu_domain> a(mmunotify::rcu_default_domain(), "dynamic");
    arena<srcu_domain> b(bounded, "bounded, isolated");
    arena<static_domain> c(of_tag, "static");
    arena<fenced_domain> d(fenced, "no membarrier");
    arena<static_fenced_domain> e(fenced_tag, "static, fenced");
    arena<srcu_domain> f(executor, "executor", false);
    dynamic_arenas = {&a, &b, &f};
    arenas = {&a, &b, &c, &d, &e, &f};
    dump.store(&print_state);
    torture_all(executor, loop);
    print_statistics();
    arenas.clear();
  }
  std::printf("nothing found\n");
  return 0;
}
