// SPDX-License-Identifier: MIT

// What it costs to tell N subscribers: against a bare loop of indirect calls, which no framework can beat, and against
// peers that the system has.
//
// One notification is one walk that calls every subscriber once: here invalidate_secondary_tlbs, for peers a signal. A
// bracket is two, start and end. Subscribers whose filter lets nothing through cost their place in the walk. Every case
// counts the calls.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <type_traits>
#include <vector>

#include <mmunotify/notifier/address_space.hpp>

#if MMUNOTIFY_BENCH_BOOST
#include <boost/signals2/signal.hpp>
#endif

#include "ratios.hpp"

namespace {

using namespace mmunotify;

using under = address_space<arming::under<std::shared_mutex>>;
using tracked = address_space<arming::tracked>;

constexpr std::size_t batch = 256;

/// A counter for each thread: what is measured is the framework, not a line that threads take from each other.
struct alignas(64) own_count {
  std::uint64_t value = 0;
};
thread_local constinit own_count calls;

/// Told by one walk.
struct listener {
  void invalidate_secondary_tlbs(mmunotify::range) noexcept { ++calls.value; }
};
/// Told by a bracket's start, and by its end.
struct starter {
  void invalidate_range_start(const invalidation&) noexcept { ++calls.value; }
};
struct bracketer {
  void invalidate_range_start(const invalidation&) noexcept { ++calls.value; }
  void invalidate_range_end(const invalidation&) noexcept { ++calls.value; }
};

template <class Client, class Space>
errc join(Space& space, subscriber<Client>& node) {
  if constexpr (std::is_same_v<Space, tracked>) {
    return space.register_subscriber(node);
  } else {
    std::shared_mutex tables;
    const std::unique_lock held(tables);
    return space.register_subscriber(node, held);
  }
}

/// N subscribers of one space, shared by the threads of a case.
template <class Client, class Space>
struct audience {
  Space space;
  std::vector<Client> clients;
  std::vector<std::unique_ptr<subscriber<Client>>> nodes;
  bool complete = true;

  explicit audience(std::size_t n, const subscriber_filter& filter = {}) : clients(n) {
    for (auto& c : clients) {
      nodes.push_back(std::make_unique<subscriber<Client>>(c, filter));
      complete &= join(space, *nodes.back()) == errc::ok;
    }
  }
  ~audience() {
    for (auto& n : nodes) complete &= space.unregister(*n) == errc::ok;
  }
};

template <class Space>
[[gnu::noinline]] void notify(Space& space, std::uintptr_t a) {
  space.invalidate_secondary_tlbs({a, a + 4096});
}
template <class Space>
[[gnu::noinline]] void open_and_close(Space& space, std::uintptr_t a) {
  const auto inv = space.invalidate({a, a + 4096}, event::clear);
}

/// Runs one(i) and checks that it was heard `expected` times each.
template <class One>
void measure(benchmark::State& state, std::uint64_t expected, One one) {
  calls.value = 0;
  std::uint64_t told = 0;
  while (state.KeepRunningBatch(batch)) {
    for (std::uintptr_t i = 0; i < batch; ++i) one(i);
    told += batch;
  }
  if (calls.value != told * expected) state.SkipWithError("a subscriber was not called once per notification");
}

// --- The floors.
// ------------------------------------------------------------------------------------------------------

void load_and_branch(benchmark::State& state) {
  std::atomic<std::uintptr_t> word{0};
  benchmark::DoNotOptimize(word);
  std::uint64_t seen = 0;
  const auto look = [&]() __attribute__((noinline)) {
    if (word.load(std::memory_order_relaxed) != 0) ++seen;
  };
  measure(state, 0, [&](std::uintptr_t) { look(); });
  if (seen != 0) state.SkipWithError("nothing was to be seen");
}

/// What a table of listeners is at the least.
class bare_listeners {
 public:
  explicit bare_listeners(std::size_t n) : clients_(n) {
    for (auto& c : clients_) {
      entries_.push_back(
          {[](void* p, const mmunotify::range& r) { static_cast<listener*>(p)->invalidate_secondary_tlbs(r); }, &c});
    }
    benchmark::DoNotOptimize(entries_.data());
  }
  [[gnu::noinline]] void notify(std::uintptr_t a) {
    const mmunotify::range r{a, a + 4096};
    for (const auto& e : entries_) e.function(e.client, r);
  }

 private:
  struct entry {
    void (*function)(void*, const mmunotify::range&);
    void* client;
  };
  std::vector<listener> clients_;
  std::vector<entry> entries_;
};

// --- Cases.
// -----------------------------------------------------------------------------------------------------------

void bare_loop(benchmark::State& state, std::size_t n) {
  bare_listeners all(n);
  measure(state, n, [&](std::uintptr_t i) { all.notify(i); });
}
void two_bare_loops(benchmark::State& state, std::size_t n) {
  bare_listeners all(n);
  measure(state, 2 * n, [&](std::uintptr_t i) {
    all.notify(i);
    all.notify(i);
  });
}

template <class Space>
void one_walk(benchmark::State& state, std::size_t n, const subscriber_filter& filter, bool heard) {
  audience<listener, Space> all(n, filter);
  if (!all.complete) return state.SkipWithError("a registration failed");
  measure(state, heard ? n : 0, [&](std::uintptr_t i) { notify(all.space, i); });
}

template <class Client, class Space>
void bracket_case(benchmark::State& state, std::size_t n, const subscriber_filter& filter, std::uint64_t heard) {
  audience<Client, Space> all(n, filter);
  if (!all.complete) return state.SkipWithError("a registration failed");
  measure(state, heard, [&](std::uintptr_t i) { open_and_close(all.space, i); });
}

/// The threads of one case tell the same subscribers.
template <class Space>
void shared_walk(benchmark::State& state, std::size_t n) {
  static std::unique_ptr<audience<listener, Space>> all;
  if (state.thread_index() == 0) all = std::make_unique<audience<listener, Space>>(n);
  // KeepRunningBatch waits for all threads before its first round.
  calls.value = 0;
  std::uint64_t told = 0;
  while (state.KeepRunningBatch(batch)) {
    for (std::uintptr_t i = 0; i < batch; ++i) notify(all->space, i);
    told += batch;
  }
  if (calls.value != told * n) state.SkipWithError("a subscriber was not called once per notification");
  if (state.thread_index() == 0) all.reset();
}

/// A subscriber comes and goes while another keeps the space armed, or not.
template <class Space>
void come_and_go(benchmark::State& state, std::size_t others) {
  audience<bracketer, Space> all(others);
  bracketer client;
  subscriber<bracketer> node{client};
  for ([[maybe_unused]] auto _ : state) {
    if (join(all.space, node) != errc::ok || all.space.unregister(node) != errc::ok) {
      return state.SkipWithError("a registration failed");
    }
  }
}

#if MMUNOTIFY_BENCH_BOOST
struct boost_signal {
  boost::signals2::signal<void(const mmunotify::range&)> signal;
  std::vector<listener> clients;

  explicit boost_signal(std::size_t n) : clients(n) {
    for (auto& c : clients) signal.connect([&c](const mmunotify::range& r) { c.invalidate_secondary_tlbs(r); });
  }
  [[gnu::noinline]] void notify(std::uintptr_t a) { signal({a, a + 4096}); }
};
void boost_walk(benchmark::State& state, std::size_t n) {
  boost_signal all(n);
  measure(state, n, [&](std::uintptr_t i) { all.notify(i); });
}
void boost_shared_walk(benchmark::State& state, std::size_t n) {
  static std::unique_ptr<boost_signal> all;
  if (state.thread_index() == 0) all = std::make_unique<boost_signal>(n);
  while (state.KeepRunningBatch(batch)) {
    for (std::uintptr_t i = 0; i < batch; ++i) all->notify(i);
  }
  if (state.thread_index() == 0) all.reset();
}
#endif

const subscriber_filter other_event{.events = {event::soft_dirty}};
const subscriber_filter other_range{.range = mmunotify::range{std::uintptr_t{1} << 40, std::uintptr_t{1} << 41}};

/// What one of n subscribers adds to a case, ns: (the case - the case with none) / n.
void per_subscriber(const std::string& figure, const std::string& with, const std::string& without, std::size_t n) {
  const auto& all = ratios::figures();
  if (all.count(with) == 0 || all.count(without) == 0) return;
  ratios::figure(figure, (ratios::median(all.at(with)) - ratios::median(all.at(without))) / static_cast<double>(n));
}
/// How much longer than 1.15 times the bare loop, ns.
std::string above(const std::string& name, const std::string& bare) {
  const std::string figure = name + "/above";
  const auto& all = ratios::figures();
  if (all.count(name) != 0 && all.count(bare) != 0) {
    ratios::figure(figure, ratios::median(all.at(name)) - 1.15 * ratios::median(all.at(bare)));
  }
  return figure;
}

void print_goals() {
  std::vector<ratios::goal> goals;
  goals.push_back({"disarmed / a load and a branch", "notify_0/under", 1.05, "notify_0/load_and_branch"});
  for (const char* n : {"1", "8", "64"}) {
    const std::string group = std::string("notify_") + n;
    const std::string to = std::string(" ") + n + " subscribers";
    goals.push_back(
        {"one walk over" + to + " - 1.15 x a bare loop, ns", above(group + "/under", group + "/bare_loop"), 2, ""});
    goals.push_back({"a boost::signals2 signal to" + to + " / one walk: at least 10, inverse", group + "/under", 0.1,
                     group + "/boost_signals2"});
    const std::string both = std::string("bracket_") + n;
    goals.push_back({"a bracket (two walks) over" + to + " - 1.15 x two bare loops, ns",
                     above(both + "/under", both + "/two_bare_loops"), 4, ""});
  }
  per_subscriber("unmatched/event", "unmatched_64/event", "unmatched_64/one_that_matches", 64);
  per_subscriber("unmatched/range", "unmatched_64/range", "unmatched_64/one_that_matches", 64);
  goals.push_back({"a subscriber whose event set does not match, ns", "unmatched/event", 1, ""});
  goals.push_back({"a subscriber whose range does not match, ns", "unmatched/range", 1, ""});
  goals.push_back({"two threads / one", "threads_2/under", 1.2, "threads_1/under"});
  goals.push_back({"register and unregister, idle, armed, ns", "registration/tracked_armed", 4000, ""});
  goals.push_back({"register and unregister, idle, first and last, ns", "registration/under", 4000, ""});
  ratios::print_goals(goals);
}

}  // namespace

int main(int argc, char** argv) {
  ratios::add("notify_0/load_and_branch", load_and_branch);
  ratios::add("notify_0/under", [](benchmark::State& s) { one_walk<under>(s, 0, {}, true); });
  ratios::add("notify_0/tracked", [](benchmark::State& s) { one_walk<tracked>(s, 0, {}, true); });
  for (const std::size_t n : {1U, 8U, 64U}) {
    const std::string one = "notify_" + std::to_string(n);
    ratios::add(one + "/bare_loop", [n](benchmark::State& s) { bare_loop(s, n); });
    ratios::add(one + "/under", [n](benchmark::State& s) { one_walk<under>(s, n, {}, true); });
    ratios::add(one + "/tracked", [n](benchmark::State& s) { one_walk<tracked>(s, n, {}, true); });
#if MMUNOTIFY_BENCH_BOOST
    ratios::add(one + "/boost_signals2", [n](benchmark::State& s) { boost_walk(s, n); });
#endif
    const std::string both = "bracket_" + std::to_string(n);
    ratios::add(both + "/two_bare_loops", [n](benchmark::State& s) { two_bare_loops(s, n); });
    ratios::add(both + "/under", [n](benchmark::State& s) { bracket_case<bracketer, under>(s, n, {}, 2 * n); });
    ratios::add(both + "/tracked", [n](benchmark::State& s) { bracket_case<bracketer, tracked>(s, n, {}, 2 * n); });
    ratios::add(both + "/under_start_only", [n](benchmark::State& s) { bracket_case<starter, under>(s, n, {}, n); });
  }
  ratios::add("unmatched_64/one_that_matches", [](benchmark::State& s) { bracket_case<starter, under>(s, 1, {}, 1); });
  ratios::add("unmatched_64/event", [](benchmark::State& s) { bracket_case<bracketer, under>(s, 64, other_event, 0); });
  ratios::add("unmatched_64/range", [](benchmark::State& s) { bracket_case<bracketer, under>(s, 64, other_range, 0); });
  for (const int threads : {1, 2}) {
    const std::string group = "threads_" + std::to_string(threads);
    ratios::add(group + "/under", [](benchmark::State& s) { shared_walk<under>(s, 8); })->Threads(threads);
    ratios::add(group + "/tracked", [](benchmark::State& s) { shared_walk<tracked>(s, 8); })->Threads(threads);
#if MMUNOTIFY_BENCH_BOOST
    ratios::add(group + "/boost_signals2", [](benchmark::State& s) { boost_shared_walk(s, 8); })->Threads(threads);
#endif
  }
  ratios::add("registration/under", [](benchmark::State& s) { come_and_go<under>(s, 0); });
  ratios::add("registration/under_armed", [](benchmark::State& s) { come_and_go<under>(s, 1); });
  ratios::add("registration/tracked", [](benchmark::State& s) { come_and_go<tracked>(s, 0); });
  ratios::add("registration/tracked_armed", [](benchmark::State& s) { come_and_go<tracked>(s, 1); });
  const int status = ratios::run(argc, argv);
  print_goals();
  return status;
}
