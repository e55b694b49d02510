// SPDX-License-Identifier: MIT

// What a hook costs that nobody listens to, and what a bracket costs when somebody does.
//
// Two bodies. "store" is the floor: one store to a table, one to four cycles; what is added to it is the hook's
// absolute cost, and its ratio says little. "zap" is what a primary MMU does to take one page away: walk four levels,
// exchange the entry atomically (as every MMU must, because the hardware sets its bits), count. Each is measured bare,
// and with each arming policy around it, disarmed, as the scope form and as the closure form.
//
// Every case computes a checksum of what its body did and compares it with the expected one.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <random>
#include <shared_mutex>
#include <string>
#include <vector>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/notifier/keyed.hpp>

#include "ratios.hpp"

namespace {

using namespace mmunotify;

using none = address_space<disabled>;
using under = address_space<arming::under<std::shared_mutex>>;
using keyed = address_space<arming::keyed<std::shared_mutex>>;
using tracked = address_space<arming::tracked>;

constexpr std::size_t fanout = 16;

/// A four-level table of small nodes; all of it stays in the first-level cache.
struct tables {
  struct node {
    std::array<node*, fanout> down{};
    std::array<std::uint64_t, fanout> leaf{};
  };
  std::vector<std::unique_ptr<node>> all;
  node* root = nullptr;
  std::uint64_t zapped = 0;  ///< sum of what was in the leaves

  tables() { root = grow(3); }
  node* grow(int levels) {
    all.push_back(std::make_unique<node>());
    node* n = all.back().get();
    for (auto& d : n->down) d = levels > 0 && d == nullptr ? (&d == &n->down[0] ? grow(levels - 1) : n->down[0]) : d;
    return n;
  }
};

struct store_body {
  static void run(tables& t, std::uintptr_t a) { t.root->leaf[a % fanout] += a; }
};
struct zap_body {
  static void run(tables& t, std::uintptr_t a) {
    tables::node* n = t.root;
    for (int level = 0; level < 3; ++level) n = n->down[(a >> (4 * level)) % fanout];
    t.zapped += std::atomic_ref(n->leaf[a % fanout]).exchange(a, std::memory_order_acq_rel);
  }
};

// Two places for a hook: in a small function of its own, which is called ("call": the hook's registers and branches are
// all that the function has), and inlined into the loop of a primary that changes many entries ("loop").

template <class Body>
[[gnu::noinline]] void bare(tables& t, std::uintptr_t a) {
  Body::run(t, a);
}
template <class Body, class Space>
[[gnu::noinline]] void scope(Space& space, tables& t, std::uintptr_t a) {
  const auto inv = space.invalidate({a, a + 4096}, event::unmap);
  Body::run(t, a);
}
template <class Body, class Space>
[[gnu::noinline]] void closure(Space& space, tables& t, std::uintptr_t a) {
  space.bracketed({a, a + 4096}, event::unmap, [&t, a] { Body::run(t, a); });
}

constexpr std::uintptr_t batch = 1024;

template <class Body>
[[gnu::noinline]] void bare_loop(tables& t) {
  for (std::uintptr_t a = 0; a < batch; ++a) Body::run(t, a);
}
template <class Body, class Space>
[[gnu::noinline]] void scope_loop(Space& space, tables& t) {
  for (std::uintptr_t a = 0; a < batch; ++a) {
    const auto inv = space.invalidate({a, a + 4096}, event::unmap);
    Body::run(t, a);
  }
}
template <class Body, class Space>
[[gnu::noinline]] void closure_loop(Space& space, tables& t) {
  for (std::uintptr_t a = 0; a < batch; ++a) {
    space.bracketed({a, a + 4096}, event::unmap, [&t, a] { Body::run(t, a); });
  }
}

/// The sum of what one batch adds to the leaves.
constexpr std::uint64_t batch_sum() {
  std::uint64_t s = 0;
  for (std::uintptr_t i = 0; i < batch; ++i) s += i;
  return s;
}

/// Everything that was ever stored to a leaf.
std::uint64_t leaf_sum(const tables& t) {
  std::uint64_t s = t.zapped;
  for (const auto& n : t.all) {
    for (const auto l : n->leaf) s += l;
  }
  return s;
}

/// change_batch(t): changes entries 0 .. batch - 1.
template <class Batch>
void measure(benchmark::State& state, Batch change_batch) {
  tables t;
  std::uint64_t batches = 0;
  while (state.KeepRunningBatch(batch)) {
    change_batch(t);
    ++batches;
  }
  if (leaf_sum(t) != batches * batch_sum()) state.SkipWithError("the tables do not hold what the body stored");
}
template <class Call>
auto calls(Call call) {
  return [call](tables& t) {
    for (std::uintptr_t a = 0; a < batch; ++a) call(t, a);
  };
}

template <class Body, class Space>
void add_policy(const std::string& group, const std::string& name) {
  ratios::add(group + "_call/" + name + "_scope", [](benchmark::State& s) {
    Space space;
    measure(s, calls([&](tables& t, std::uintptr_t a) { scope<Body>(space, t, a); }));
  });
  ratios::add(group + "_call/" + name + "_closure", [](benchmark::State& s) {
    Space space;
    measure(s, calls([&](tables& t, std::uintptr_t a) { closure<Body>(space, t, a); }));
  });
  ratios::add(group + "_loop/" + name + "_scope", [](benchmark::State& s) {
    Space space;
    measure(s, [&](tables& t) { scope_loop<Body>(space, t); });
  });
  ratios::add(group + "_loop/" + name + "_closure", [](benchmark::State& s) {
    Space space;
    measure(s, [&](tables& t) { closure_loop<Body>(space, t); });
  });
}

template <class Body>
void add_disarmed(const std::string& group) {
  for (const char* again : {"", "_again"}) {  // twice: what this machine calls "the same" today
    ratios::add(group + "_call/bare" + again,
                [](benchmark::State& s) { measure(s, calls([](tables& t, std::uintptr_t a) { bare<Body>(t, a); })); });
    ratios::add(group + "_loop/bare" + again,
                [](benchmark::State& s) { measure(s, [](tables& t) { bare_loop<Body>(t); }); });
  }
  add_policy<Body, none>(group, "disabled");
  add_policy<Body, under>(group, "under");
  add_policy<Body, keyed>(group, "keyed");
  add_policy<Body, tracked>(group, "tracked");
}

/// A client whose calls count, and cannot be inlined: they go through the operations table.
struct client {
  std::uint64_t starts = 0;
  std::uint64_t ends = 0;
  void invalidate_range_start(const invalidation&) noexcept { ++starts; }
  void invalidate_range_end(const invalidation&) noexcept { ++ends; }
};

template <class Space>
errc join(Space& space, subscriber<client>& node) {
  if constexpr (requires { space.register_subscriber(node); }) {
    return space.register_subscriber(node);
  } else {
    static std::shared_mutex lock;
    const std::unique_lock held(lock);
    return space.register_subscriber(node, held);
  }
}

template <class Space>
void armed(benchmark::State& state, std::size_t subscribers) {
  Space space;
  std::vector<client> clients(subscribers);
  std::vector<std::unique_ptr<subscriber<client>>> nodes;
  for (auto& c : clients) {
    nodes.push_back(std::make_unique<subscriber<client>>(c));
    if (join(space, *nodes.back()) != errc::ok) return state.SkipWithError("a registration failed");
  }
  tables t;
  std::uint64_t brackets = 0;
  while (state.KeepRunningBatch(batch)) {
    for (std::uintptr_t i = 0; i < batch; ++i) scope<store_body>(space, t, i);
    brackets += batch;
  }
  for (auto& n : nodes) {
    if (space.unregister(*n) != errc::ok) state.SkipWithError("an unregistration failed");
  }
  for (const auto& c : clients) {
    if (c.starts != brackets || c.ends != brackets) state.SkipWithError("a client was not called once per bracket");
  }
}

/// The first subscriber of a space comes, and goes again: the space is armed and disarmed. Nothing else runs.
template <class Space>
void registration(benchmark::State& state) {
  Space space;
  client c;
  subscriber<client> node{c};
  for ([[maybe_unused]] auto _ : state) {
    if (join(space, node) != errc::ok || space.unregister(node) != errc::ok) {
      return state.SkipWithError("a registration failed");
    }
  }
}

/// A bare loop of indirect calls over as many clients: what no framework can beat.
void indirect_calls(benchmark::State& state, std::size_t subscribers) {
  struct entry {
    void (*start)(void*, const invalidation&);
    void (*end)(void*, const invalidation&);
    void* client;
  };
  std::vector<client> clients(subscribers);
  std::vector<entry> entries;
  for (auto& c : clients) {
    entries.push_back({[](void* p, const invalidation& i) { static_cast<client*>(p)->invalidate_range_start(i); },
                       [](void* p, const invalidation& i) { static_cast<client*>(p)->invalidate_range_end(i); }, &c});
  }
  benchmark::DoNotOptimize(entries.data());
  tables t;
  std::uint64_t brackets = 0;
  while (state.KeepRunningBatch(batch)) {
    for (std::uintptr_t i = 0; i < batch; ++i) {
      const invalidation inv{{i, i + 4096}};
      for (const auto& e : entries) e.start(e.client, inv);
      bare<store_body>(t, i);
      for (const auto& e : entries) e.end(e.client, inv);
    }
    brackets += batch;
  }
  for (const auto& c : clients) {
    if (c.starts != brackets || c.ends != brackets) state.SkipWithError("a client was not called once per bracket");
  }
}

/// A million primaries in random order, each on a cache line of its own with the word of its space: every step misses.
template <class Space>
struct alignas(64) cold_primary {
  std::uint64_t entry = 0;
  [[no_unique_address]] Space space;
};
struct no_space {};

constexpr std::size_t cold_count = 1'000'000;

const std::vector<std::uint32_t>& shuffled() {
  static const std::vector<std::uint32_t> order = [] {
    std::vector<std::uint32_t> v(cold_count);
    for (std::size_t i = 0; i < cold_count; ++i) v[i] = static_cast<std::uint32_t>(i);
    std::shuffle(v.begin(), v.end(), std::mt19937(42));
    return v;
  }();
  return order;
}

template <class Space>
[[gnu::noinline]] void touch(cold_primary<Space>& p) {
  if constexpr (std::is_same_v<Space, no_space>) {
    ++p.entry;
  } else {
    const auto inv = p.space.invalidate({0, 4096}, event::unmap);
    ++p.entry;
  }
}

template <class Space>
void cold(benchmark::State& state) {
  const auto& order = shuffled();
  const auto all = std::make_unique<cold_primary<Space>[]>(cold_count);
  std::size_t at = 0;
  std::uint64_t steps = 0;
  while (state.KeepRunningBatch(batch)) {
    for (std::uintptr_t i = 0; i < batch; ++i) {
      touch(all[order[at]]);
      if (++at == cold_count) at = 0;
    }
    steps += batch;
  }
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < cold_count; ++i) sum += all[i].entry;
  if (sum != steps) state.SkipWithError("a step was lost");
}

}  // namespace

int main(int argc, char** argv) {
  add_disarmed<store_body>("disarmed_store");
  add_disarmed<zap_body>("disarmed_zap");
  for (const std::size_t n : {1U, 8U, 64U}) {
    const std::string group = "armed_" + std::to_string(n);
    ratios::add(group + "/indirect_calls", [n](benchmark::State& s) { indirect_calls(s, n); });
    ratios::add(group + "/under", [n](benchmark::State& s) { armed<under>(s, n); });
    ratios::add(group + "/keyed", [n](benchmark::State& s) { armed<keyed>(s, n); });
    ratios::add(group + "/tracked", [n](benchmark::State& s) { armed<tracked>(s, n); });
  }
  ratios::add("cold_million/bare", [](benchmark::State& s) { cold<no_space>(s); });
  ratios::add("cold_million/disabled", [](benchmark::State& s) { cold<none>(s); });
  ratios::add("cold_million/under", [](benchmark::State& s) { cold<under>(s); });
  ratios::add("cold_million/keyed", [](benchmark::State& s) { cold<keyed>(s); });
  ratios::add("registration/under", [](benchmark::State& s) { registration<under>(s); });
  ratios::add("registration/keyed", [](benchmark::State& s) { registration<keyed>(s); });
  return ratios::run(argc, argv);
}
