// SPDX-License-Identifier: MIT

// What intervals cost: 1 000, 100 000 and 1 000 000 disjoint intervals of 4 KiB, every second page of a stretch.
//
// "ours" is a whole bracket, start and end. The peer is an augmented red-black tree under a std::shared_mutex, which
// is held while callbacks run, and which is told once (peer_rbtree.hpp). Callbacks count, and the counts are checked.
// Pages are drawn at random from a table, so that nothing but luck is in the cache.
//
//   near_miss   a page between two intervals            far_miss   a page far from all of them
//   one_hit     a page of an interval                   again      the same, then removed and inserted anew
//   all         one call over everything                pair       near misses and hits by two threads, on two halves
//   look_up, change   one near miss, or one insertion and removal, that begins while a call over everything is under
//               way in another thread; the time is real, and a busy machine adds what it takes away
//
// The favourable choice: disjoint intervals of one size have one size class. "mixed" has eight sizes, nested.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <mmunotify/interval/detail/interval_set.hpp>

#include "peer_rbtree.hpp"
#include "ratios.hpp"

namespace {

using namespace mmunotify;
using namespace interval_bench;

constexpr std::uint64_t page = 4096;
constexpr std::uint64_t base = 0x7f00'0000'0000;
constexpr std::size_t draws = 1 << 16;

struct counter {
  std::atomic<std::uint64_t> calls{0};
  void invalidate_range_start(const invalidation&) noexcept {
    calls.store(calls.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }
};

/// Random numbers below n, always the same.
const std::vector<std::uint32_t>& drawn(std::uint64_t n) {
  static std::map<std::uint64_t, std::vector<std::uint32_t>> all;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  auto& v = all[n];
  if (v.empty()) {
    std::mt19937_64 random(n);
    for (std::size_t i = 0; i < draws; ++i) v.push_back(static_cast<std::uint32_t>(random() % n));
  }
  return v;
}

constexpr std::uint64_t address(std::uint64_t i) { return base + i * 2 * page; }

/// Ours. Drains: what was removed is given back by the thread itself, now and then, as an event loop does; else by the
/// library's worker, at once.
template <bool Drains>
class ours_with {
  using node = interval_notifier<counter>;

 public:
  static constexpr const char* name = Drains ? "ours_event_loop" : "ours";

  explicit ours_with(std::uint64_t n) : nodes_(n + spares), at_(n) {
    for (auto& m : nodes_) m.emplace(counter_);
    for (std::uint64_t i = 0; i < n; ++i) {
      at_[i] = &*nodes_[i];
      good_ &= set_.insert(*at_[i], {address(i), address(i) + page}) == errc::ok;
    }
    for (std::size_t i = 0; i < spares; ++i) spare_.push_back(&*nodes_[n + i]);
  }
  ~ours_with() {
    for (auto& m : nodes_) {
      if (m->registered()) static_cast<void>(set_.remove_async(*m));
    }
    for (auto& m : nodes_) {
      while (m->registered()) domain_.barrier();
    }
  }

  void tell(std::uint64_t first, std::uint64_t last) {
    domain_.read_lock_unordered();
    const invalidation i{.range = {first, last}};
    detail::flight_memo memo;
    detail::pending_passes<std::uintptr_t> passes;
    if (set_.start(i, memo, passes, none_)) set_.end(i, memo, none_);
    domain_.read_unlock_unordered();
  }
  /// Interval i goes, another one comes in its place.
  void replace(std::uint64_t i) {
    node* const old = at_[i];
    good_ &= set_.remove_async(*old) == errc::ok;
    node* const fresh = spare_[next_];
    spare_[next_] = old;
    next_ = (next_ + 1) % spares;
    while (fresh->registered()) give_back();
    good_ &= set_.insert(*fresh, {address(i), address(i) + page}) == errc::ok;
    at_[i] = fresh;
    if (Drains && next_ % 512 == 0) give_back();
  }
  /// An interval comes behind all others and goes.
  void come_and_go() {
    node* const fresh = spare_[next_];
    next_ = (next_ + 1) % spares;
    while (fresh->registered()) give_back();
    good_ &= set_.insert(*fresh, {base - 8 * page, base - 7 * page}) == errc::ok;
    good_ &= set_.remove_async(*fresh) == errc::ok;
  }
  std::uint64_t calls() const { return counter_.calls.load(std::memory_order_relaxed); }
  bool good() const { return good_; }

 private:
  static constexpr std::size_t spares = 16384;

  void give_back() {
    if (Drains) {
      domain_.synchronize();
      domain_.drain();
    } else {
      std::this_thread::yield();
    }
  }
  static srcu_options options() {
    srcu_options o;
    if (Drains) o.schedule = [](void*) noexcept {};
    return o;
  }

  srcu_domain domain_{options()};
  detail::interval_set<std::uintptr_t> set_{domain_};
  observe::none none_;
  counter counter_;
  std::deque<std::optional<node>> nodes_;
  std::vector<node*> at_;
  std::vector<node*> spare_;
  std::size_t next_ = 0;
  bool good_ = true;
};

using ours = ours_with<false>;
using ours_event_loop = ours_with<true>;

/// The peer.
class tree {
 public:
  static constexpr const char* name = "rbtree";

  explicit tree(std::uint64_t n) : nodes_(n) {
    for (std::uint64_t i = 0; i < n; ++i) {
      nodes_[i].first = address(i);
      nodes_[i].last = address(i) + page;
      nodes_[i].call = &count;
    }
    // In a random order, as registrations come.
    std::vector<std::uint64_t> order(n);
    for (std::uint64_t i = 0; i < n; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::mt19937_64(n));
    for (const std::uint64_t i : order) tree_.insert(nodes_[i]);
    extra_.first = base - 8 * page;
    extra_.last = base - 7 * page;
  }
  void tell(std::uint64_t first, std::uint64_t last) { tree_.notify(first, last); }
  void replace(std::uint64_t i) {
    tree_.erase(nodes_[i]);
    tree_.insert(nodes_[i]);
  }
  void come_and_go() {
    tree_.insert(extra_);
    tree_.erase(extra_);
  }
  static std::uint64_t calls() { return calls_.load(std::memory_order_relaxed); }
  static bool good() { return true; }

 private:
  static void count(rb_node&) { calls_.store(calls() + 1, std::memory_order_relaxed); }
  static inline std::atomic<std::uint64_t> calls_{0};

  locked_rb_tree tree_;
  std::vector<rb_node> nodes_;
  rb_node extra_;
};

/// One of each kind and size, made when it is first used.
template <class Kind>
Kind& made(std::uint64_t n) {
  static std::map<std::uint64_t, std::unique_ptr<Kind>> all;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  auto& k = all[n];
  if (k == nullptr) k = std::make_unique<Kind>(n);
  return *k;
}

template <class Kind>
void near_miss(benchmark::State& state, std::uint64_t n) {
  Kind& k = made<Kind>(n);
  const auto& where = drawn(n);
  const std::uint64_t before = k.calls();
  std::size_t d = 0;
  for (auto _ : state) {
    const std::uint64_t a = address(where[d++ % draws]) + page;
    k.tell(a, a + page);
  }
  if (k.calls() != before) state.SkipWithError("a miss has called somebody");
}

template <class Kind>
void far_miss(benchmark::State& state, std::uint64_t n) {
  Kind& k = made<Kind>(n);
  const auto& where = drawn(n);
  const std::uint64_t before = k.calls();
  std::size_t d = 0;
  for (auto _ : state) {
    const std::uint64_t a = where[d++ % draws] * page;
    k.tell(a, a + page);
  }
  if (k.calls() != before) state.SkipWithError("a miss has called somebody");
}

template <class Kind>
void one_hit(benchmark::State& state, std::uint64_t n) {
  Kind& k = made<Kind>(n);
  const auto& where = drawn(n);
  const std::uint64_t before = k.calls();
  std::size_t d = 0;
  for (auto _ : state) {
    const std::uint64_t a = address(where[d++ % draws]);
    k.tell(a, a + page);
  }
  if (k.calls() != before + static_cast<std::uint64_t>(state.iterations()))
    state.SkipWithError("a hit has not called exactly one");
}

template <class Kind>
void again(benchmark::State& state, std::uint64_t n) {
  Kind& k = made<Kind>(n);
  const auto& where = drawn(n);
  const std::uint64_t before = k.calls();
  std::size_t d = 0;
  for (auto _ : state) {
    const std::uint64_t i = where[d++ % draws];
    k.tell(address(i), address(i) + page);
    k.replace(i);
  }
  if (k.calls() != before + static_cast<std::uint64_t>(state.iterations()) || !k.good())
    state.SkipWithError("a hit has not called exactly one");
}

template <class Kind>
void everything(benchmark::State& state, std::uint64_t n) {
  Kind& k = made<Kind>(n);
  const std::uint64_t before = k.calls();
  for (auto _ : state) k.tell(base, address(n));
  if (k.calls() != before + n * static_cast<std::uint64_t>(state.iterations()))
    state.SkipWithError("not everybody was called once");
}

/// Each thread has a half of the pages: near misses.
template <class Kind>
void pair(benchmark::State& state, std::uint64_t n) {
  Kind& k = made<Kind>(n);
  const auto& where = drawn(n / 2);
  const std::uint64_t own = static_cast<std::uint64_t>(state.thread_index()) * (n / 2);
  std::size_t d = 0;
  for (auto _ : state) {
    const std::uint64_t a = address(own + where[d++ % draws]) + page;
    k.tell(a, a + page);
  }
}

/// How long one operation takes that begins inside a call over everything.
template <class Kind, class Operation>
void amid(benchmark::State& state, std::uint64_t n, Operation operation) {
  Kind& k = made<Kind>(n);
  std::atomic<std::uint64_t> begun{0};
  std::atomic<bool> stop{false};
  std::thread big([&] {
    while (!stop.load()) {
      begun.fetch_add(1);
      k.tell(base, address(n));
    }
  });
  while (begun.load() == 0) std::this_thread::yield();
  for (auto _ : state) {
    const std::uint64_t seen = begun.load();
    while (begun.load() == seen) benchmark::ClobberMemory();
    const auto start = std::chrono::steady_clock::now();
    operation(k);
    const auto end = std::chrono::steady_clock::now();
    state.SetIterationTime(std::chrono::duration<double>(end - start).count());
  }
  stop.store(true);
  big.join();
}

template <class Kind>
void add(const std::string& size, std::uint64_t n) {
  const std::string me = std::string("/") + Kind::name;
  ratios::add("near_miss/" + size + me, [n](benchmark::State& s) { near_miss<Kind>(s, n); });
  ratios::add("far_miss/" + size + me, [n](benchmark::State& s) { far_miss<Kind>(s, n); });
  ratios::add("one_hit/" + size + me, [n](benchmark::State& s) { one_hit<Kind>(s, n); });
  ratios::add("again/" + size + me, [n](benchmark::State& s) { again<Kind>(s, n); });
  ratios::add("all/" + size + me, [n](benchmark::State& s) { everything<Kind>(s, n); });
}

template <class Kind>
void add_threads(std::uint64_t n) {
  const std::string me = Kind::name;
  ratios::add("pair/" + me + "_one", [n](benchmark::State& s) { pair<Kind>(s, n); });
  ratios::add("pair/" + me + "_two", [n](benchmark::State& s) { pair<Kind>(s, n); })->Threads(2);
  ratios::add("look_up/" + me,
              [n](benchmark::State& s) { amid<Kind>(s, n, [](Kind& k) { k.tell(base - page, base); }); })
      ->UseManualTime()
      ->Iterations(5);
  ratios::add("change/" + me, [n](benchmark::State& s) { amid<Kind>(s, n, [](Kind& k) { k.come_and_go(); }); })
      ->UseManualTime()
      ->Iterations(5);
}

void print_goals() {
  ratios::print_goals({
      {"a near miss among 1 000 000 / the tree's", "near_miss/1M/ours", 0.5, "near_miss/1M/rbtree"},
      {"a near miss among 1 000 000, ns (UCX, elsewhere: 393)", "near_miss/1M/ours", 393, ""},
      {"a hit, removed and inserted again, among 1 000 000 / the tree's", "again/1M/ours", 0.5, "again/1M/rbtree"},
      {"two threads, time of one operation / one thread's (1.7 times as many)", "pair/ours_two", 2 / 1.7,
       "pair/ours_one"},
      {"a look-up beside a call over 1 000 000, ns", "look_up/ours", 20'000, ""},
      {"an insertion and removal beside it / the tree's", "change/ours", 0.01, "change/rbtree"},
  });
}

}  // namespace

int main(int argc, char** argv) {
  for (const auto& [size, n] :
       {std::pair<const char*, std::uint64_t>{"1k", 1000}, {"100k", 100'000}, {"1M", 1'000'000}}) {
    add<tree>(size, n);
    add<ours>(size, n);
    ratios::add("again/" + std::string(size) + "/ours_event_loop",
                [n = n](benchmark::State& s) { again<ours_event_loop>(s, n); });
  }
  add_threads<tree>(1'000'000);
  add_threads<ours>(1'000'000);
  const int status = ratios::run(argc, argv);
  print_goals();
  return status;
}
