// SPDX-License-Identifier: MIT

// What intervals cost: 1 000, 100 000 and 1 000 000 disjoint intervals of 4 KiB, every second page of a stretch.
//
// "ours" is a whole bracket, start and end. The peer is an augmented red-black tree under a std::shared_mutex, which
// is held while callbacks run, and which is told once (peer_rbtree.hpp); where UCX is installed, its registration cache
// is another (peer_ucx.hpp). Callbacks count, and say whom they have hit; the counts are checked. Pages are drawn at
// random from a table, so that nothing but luck is in the cache.
//
//   near_miss   a page between two intervals            far_miss   a page far from all of them
//   one_hit     a page of an interval                   again      the same, then removed and inserted anew
//   all         one call over everything                pair       near misses by two threads, on two halves: among
//   all,
//               and among few, which the caches hold
//   look_up, change   one near miss, or one insertion and removal, that begins while a call over everything is under
//               way in another thread; the time is real, and a busy machine adds what it takes away
//   churn       insertions and removals: by one thread, by two on two halves, and beside one that calls over everything
//               all the time; real time, too
//
// The favourable choice: disjoint intervals of one size have one size class. What is to the tree's favour: it erases
// and inserts the very node that it has just hit; ours comes back after a few grace periods, and another one takes its
// place.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <mmunotify/interval/detail/interval_set.hpp>

#include "peer_rbtree.hpp"
#if MMUNOTIFY_BENCH_UCX
#include "peer_ucx.hpp"
#endif
#include "ratios.hpp"

namespace {

using namespace mmunotify;
using namespace interval_bench;

constexpr std::uint64_t page = 4096;
/// Where the system maps nothing: UCX is told of what is really unmapped.
constexpr std::uint64_t base = 0x2000'0000'0000;
constexpr std::size_t draws = 1 << 16;

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

struct half;

/// A client and its node in one, as drivers have them.
struct region : interval_notifier<region> {
  explicit region(half& h) noexcept : interval_notifier(*this), home(h) {}
  void invalidate_range_start(const invalidation&) noexcept {
    ++calls;
    hit = this;
  }

  static inline thread_local std::uint64_t calls = 0;
  static inline thread_local region* hit = nullptr;  ///< the last one

  half& home;
};

/// What one half of the pages has: at a time one thread comes and goes there, and one gives back. What was given back
/// last is taken first, as from an allocator.
struct alignas(64) half {
  static constexpr std::size_t most = 65536;  ///< removed and not given back: the worker may be kept waiting
  static constexpr std::size_t ring_size = 2 * most;

  static void give_back(basic_interval<std::uintptr_t>& i) noexcept {
    auto& r = static_cast<region&>(i);
    half& h = r.home;
    const std::size_t n = h.given_back.load(std::memory_order_relaxed);
    h.ring[n % ring_size] = &r;
    h.given_back.store(n + 1, std::memory_order_release);
  }
  /// Returns: nullptr if all are in use. The next one is fetched early, as slab allocators do.
  region* take() noexcept {
    if (const std::size_t n = given_back.load(std::memory_order_acquire); taken != n) {
      region* const r = ring[taken++ % ring_size];
      if (taken != n) fetch_early(ring[taken % ring_size]);
      return r;
    }
    return spares != 0 ? spare[--spares] : nullptr;
  }

  static void fetch_early(const region* r) noexcept {
    for (std::uintptr_t line = 0; line < 192; line += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(r) + line), 1);
    }
  }

  std::size_t taken = 0;
  std::size_t spares = 0;
  unsigned removed = 0;
  alignas(64) std::atomic<std::size_t> given_back{0};
  region* ring[ring_size];
  region* spare[most];
};

/// Ours. Drains: what was removed is given back by the thread itself, now and then, as an event loop does; else by the
/// library's worker.
template <bool Drains>
class ours_with {
 public:
  static constexpr const char* name = Drains ? "ours_event_loop" : "ours";

  explicit ours_with(std::uint64_t n) : n_(n), memory_(n + 2 * half::most) {
    for (std::uint64_t i = 0; i < memory_.size(); ++i) {
      half& h = i < n ? half_of(i) : halves_[i & 1];
      auto* const r = new (memory_[i].bytes) region(h);
      if (i < n) {
        expect_ok(set_.insert(*r, {address(i), address(i) + page}));
      } else {
        h.spare[h.spares++] = r;
      }
    }
  }
  ours_with(const ours_with&) = delete;
  ours_with& operator=(const ours_with&) = delete;
  ~ours_with() {
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if (at(i).registered()) static_cast<void>(set_.remove_async(at(i)));
    }
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      while (at(i).registered()) domain_.barrier();
      at(i).~region();
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
  /// Interval i, which was hit last, goes, another one comes in its place.
  void replace(std::uint64_t i) {
    half& h = half_of(i);
    remove(h, *region::hit);
    insert(h, address(i));
  }
  /// An interval comes behind interval i, and goes.
  void come_and_go(std::uint64_t i) {
    half& h = half_of(i);
    remove(h, insert(h, address(i) + page));
  }
  static std::uint64_t calls() { return region::calls; }  // by this thread
  /// Returns: what the first operation that went wrong said.
  std::string wrong() const {
    const errc e = error_.load(std::memory_order_relaxed);
    return e == errc::ok ? "" : to_string(e);
  }

 private:
  struct place {
    alignas(region) std::byte bytes[sizeof(region)];
  };

  region& at(std::size_t i) { return *std::launder(reinterpret_cast<region*>(memory_[i].bytes)); }
  half& half_of(std::uint64_t i) { return halves_[i < n_ / 2 ? 0 : 1]; }
  void expect_ok(errc e) {
    errc none = errc::ok;
    if (e != errc::ok) error_.compare_exchange_strong(none, e, std::memory_order_relaxed);
  }

  region& insert(half& h, std::uint64_t where) {
    region* r = h.take();
    for (; r == nullptr; r = h.take()) give_back();
    expect_ok(set_.insert(*r, {where, where + page}));
    return *r;
  }
  void remove(half& h, region& r) {
    expect_ok(set_.remove_async(r, &half::give_back));
    if (Drains && ++h.removed % 512 == 0) give_back();
  }
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
  const std::uint64_t n_;
  half halves_[2];
  std::vector<place> memory_;
  std::atomic<errc> error_{errc::ok};
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
    for (rb_node& e : extra_) e.call = &count_nothing;
  }
  void tell(std::uint64_t first, std::uint64_t last) { tree_.notify(first, last); }
  void replace(std::uint64_t i) {
    tree_.erase(nodes_[i]);
    tree_.insert(nodes_[i]);
  }
  void come_and_go(std::uint64_t i) {
    rb_node& extra = extra_[i < nodes_.size() / 2 ? 0 : 1];
    extra.first = address(i) + page;
    extra.last = extra.first + page;
    tree_.insert(extra);
    tree_.erase(extra);
  }
  static std::uint64_t calls() { return calls_.load(std::memory_order_relaxed); }
  static std::string wrong() { return {}; }

 private:
  static void count(rb_node&) { calls_.store(calls() + 1, std::memory_order_relaxed); }
  static void count_nothing(rb_node&) {}
  static inline std::atomic<std::uint64_t> calls_{0};

  locked_rb_tree tree_;
  std::vector<rb_node> nodes_;
  rb_node extra_[2];
};

#if MMUNOTIFY_BENCH_UCX
/// The other peer.
struct ucx : ucx_cache {
  explicit ucx(std::uint64_t n) : ucx_cache(n, &address, page) {}
};
#endif

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

/// A hit calls exactly one, a miss nobody, a call over everything each once.
void expect_calls(benchmark::State& state, std::uint64_t were, std::uint64_t should_be) {
  const std::string text = std::to_string(were) + " calls, where " + std::to_string(should_be) + " are right";
  if (were != should_be) state.SkipWithError(text.c_str());
}
template <class Kind>
void expect_success(benchmark::State& state, const Kind& k) {
  const std::string text = k.wrong();
  if (!text.empty()) state.SkipWithError(text.c_str());
}

/// A page at a time, drawn at random: where(i) is its address, calls says how many it calls, then(k, i) follows.
template <class Kind, class Where, class Then>
void one_page(benchmark::State& state, std::uint64_t n, std::uint64_t calls, Where where, Then then) {
  Kind& k = made<Kind>(n);
  const auto& numbers = drawn(n);
  const std::uint64_t before = k.calls();
  std::size_t d = 0;
  for (auto _ : state) {
    const std::uint64_t i = numbers[d++ % draws];
    const std::uint64_t a = where(i);
    k.tell(a, a + page);
    then(k, i);
  }
  expect_calls(state, k.calls() - before, calls * static_cast<std::uint64_t>(state.iterations()));
  expect_success(state, k);
}

template <class Kind>
void near_miss(benchmark::State& state, std::uint64_t n) {
  one_page<Kind>(
      state, n, 0, [](std::uint64_t i) { return address(i) + page; }, [](Kind&, std::uint64_t) {});
}
template <class Kind>
void far_miss(benchmark::State& state, std::uint64_t n) {
  one_page<Kind>(
      state, n, 0, [](std::uint64_t i) { return i * page; }, [](Kind&, std::uint64_t) {});
}
template <class Kind>
void one_hit(benchmark::State& state, std::uint64_t n) {
  one_page<Kind>(state, n, 1, &address, [](Kind&, std::uint64_t) {});
}
template <class Kind>
void again(benchmark::State& state, std::uint64_t n) {
  one_page<Kind>(state, n, 1, &address, [](Kind& k, std::uint64_t i) { k.replace(i); });
}

template <class Kind>
void everything(benchmark::State& state, std::uint64_t n) {
  Kind& k = made<Kind>(n);
  const std::uint64_t before = k.calls();
  for (auto _ : state) k.tell(base, address(n));
  expect_calls(state, k.calls() - before, n * static_cast<std::uint64_t>(state.iterations()));
}

/// Each thread has a half of the pages, and calls operation(k, i) for those that it draws.
template <class Kind, class Operation>
void halves(benchmark::State& state, std::uint64_t n, Operation operation) {
  Kind& k = made<Kind>(n);
  const auto& numbers = drawn(n / 2);
  const std::uint64_t own = static_cast<std::uint64_t>(state.thread_index()) * (n / 2);
  std::size_t d = 0;
  for (auto _ : state) operation(k, own + numbers[d++ % draws]);
  expect_success(state, k);
}
template <class Kind>
void pair(benchmark::State& state, std::uint64_t n) {
  halves<Kind>(state, n, [](Kind& k, std::uint64_t i) { k.tell(address(i) + page, address(i) + 2 * page); });
}
template <class Kind>
void churn(benchmark::State& state, std::uint64_t n) {
  halves<Kind>(state, n, [](Kind& k, std::uint64_t i) { k.come_and_go(i); });
}

/// Calls over everything, one after the other, in a thread of its own.
template <class Kind>
class caller_over_all {
 public:
  explicit caller_over_all(std::uint64_t n)
      : thread_([this, n] {
          while (!stop_.load()) {
            begun_.fetch_add(1);
            made<Kind>(n).tell(base, address(n));
          }
        }) {
    while (begun_.load() == 0) std::this_thread::yield();
  }
  ~caller_over_all() {
    stop_.store(true);
    thread_.join();
  }
  void wait_for_begin() const {
    const std::uint64_t seen = begun_.load();
    while (begun_.load() == seen) benchmark::ClobberMemory();
  }

 private:
  std::atomic<std::uint64_t> begun_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

template <class Kind>
void churn_beside(benchmark::State& state, std::uint64_t n) {
  made<Kind>(n);
  const caller_over_all<Kind> big(n);
  churn<Kind>(state, n);
}

/// How long one operation takes that begins inside a call over everything.
template <class Kind, class Operation>
void amid(benchmark::State& state, std::uint64_t n, Operation operation) {
  Kind& k = made<Kind>(n);
  const caller_over_all<Kind> big(n);
  for (auto _ : state) {
    big.wait_for_begin();
    const auto start = std::chrono::steady_clock::now();
    operation(k);
    const auto end = std::chrono::steady_clock::now();
    state.SetIterationTime(std::chrono::duration<double>(end - start).count());
  }
}

template <class Kind>
void add(const std::string& size, std::uint64_t n) {
  const std::string me = std::string("/") + Kind::name;
  ratios::add("near_miss/" + size + me, [n](benchmark::State& s) { near_miss<Kind>(s, n); });
  ratios::add("far_miss/" + size + me, [n](benchmark::State& s) { far_miss<Kind>(s, n); });
  ratios::add("again/" + size + me, [n](benchmark::State& s) { again<Kind>(s, n); });
}
template <class Kind>
void add_all(const std::string& size, std::uint64_t n) {
  const std::string me = std::string("/") + Kind::name;
  add<Kind>(size, n);
  ratios::add("one_hit/" + size + me, [n](benchmark::State& s) { one_hit<Kind>(s, n); });
  ratios::add("all/" + size + me, [n](benchmark::State& s) { everything<Kind>(s, n); });
}

template <class Kind>
void add_threads(std::uint64_t n) {
  const std::string me = Kind::name;
  for (const auto& [name, some] : {std::pair<std::string, std::uint64_t>{"", n}, {"_1k", 1000}}) {
    const auto run = [some = some](benchmark::State& s) { pair<Kind>(s, some); };
    ratios::add("pair_" + me + name + "/one", run);
    ratios::add("pair_" + me + name + "/two", run)->Threads(2);
  }
  ratios::add("churn_" + me + "/one", [n](benchmark::State& s) { churn<Kind>(s, n); })->UseRealTime();
  ratios::add("churn_" + me + "/two", [n](benchmark::State& s) { churn<Kind>(s, n); })->UseRealTime()->Threads(2);
  ratios::add("churn_" + me + "/beside", [n](benchmark::State& s) { churn_beside<Kind>(s, n); })->UseRealTime();
  ratios::add("look_up/" + me,
              [n](benchmark::State& s) { amid<Kind>(s, n, [](Kind& k) { k.tell(base - page, base); }); })
      ->UseManualTime()
      ->Iterations(5);
  ratios::add("change/" + me, [n](benchmark::State& s) { amid<Kind>(s, n, [](Kind& k) { k.come_and_go(0); }); })
      ->UseManualTime()
      ->Iterations(5);
}

void print_goals() {
  ratios::print_goals({
      {"a near miss among 1 000 000 / the tree's", "near_miss/1M/ours", 0.5, "near_miss/1M/rbtree"},
      {"a near miss among 1 000 000 / UCX's", "near_miss/1M/ours", 1, "near_miss/1M/ucx"},
      {"a hit, removed and inserted again, among 1 000 000 / the tree's", "again/1M/ours", 0.5, "again/1M/rbtree"},
      {"two threads, time of one operation / one thread's (1.7 times as many)", "pair_ours/two", 2 / 1.7,
       "pair_ours/one"},
      {"a look-up beside a call over 1 000 000, ns", "look_up/ours", 20'000, ""},
      {"an insertion and removal beside it / the tree's", "change/ours", 0.01, "change/rbtree"},
  });
}

}  // namespace

int main(int argc, char** argv) {
  for (const auto& [size, n] :
       {std::pair<const char*, std::uint64_t>{"1k", 1000}, {"100k", 100'000}, {"1M", 1'000'000}}) {
    add_all<tree>(size, n);
    add_all<ours>(size, n);
    ratios::add("again/" + std::string(size) + "/ours_event_loop",
                [n = n](benchmark::State& s) { again<ours_event_loop>(s, n); });
  }
#if MMUNOTIFY_BENCH_UCX
  add<ucx>("1M", 1'000'000);
#endif
  add_threads<tree>(1'000'000);
  add_threads<ours>(1'000'000);
  const int status = ratios::run(argc, argv);
  print_goals();
  return status;
}
