// SPDX-License-Identifier: MIT
#pragma once

// Walks of a list of N nodes, a call through a pointer for each, as sync.cpp compares them.

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include <mmunotify/sync/lockfree_hlist.hpp>

#include "sync_sections.hpp"

namespace sync_bench {

struct visited : hlist_node {
  void (*function)(visited&) = [](visited& v) { ++v.calls; };
  std::uint64_t calls = 0;
  visited* next = nullptr;  ///< for the plain list
};

struct our_list {
  srcu_domain domain;
  lockfree_hlist<visited> list{domain};

  void add(visited& v) { (void)list.push_front(v); }
  void remove(visited& v) { (void)list.remove(v); }
  MMUNOTIFY_BENCH_INLINE void walk() {
    const read_section s(domain);
    for (visited& v : list) v.function(v);
  }
};

/// No protection at all.
struct plain_list {
  visited* head = nullptr;

  void add(visited& v) {
    v.next = head;
    head = &v;
  }
  void remove(visited&) {}
  MMUNOTIFY_BENCH_INLINE void walk() {
    for (visited* v = head; v != nullptr; v = v->next) v->function(*v);
  }
};

struct locked_vector {
  std::shared_mutex mutex;
  std::vector<visited*> all;

  void add(visited& v) { all.push_back(&v); }
  void remove(visited&) {}
  MMUNOTIFY_BENCH_INLINE void walk() {
    const std::shared_lock lock(mutex);
    for (visited* v : all) v->function(*v);
  }
};

template <class List>
[[gnu::noinline]] void walks(List& list, std::uint64_t n) {
  for (std::uint64_t i = 0; i < n; ++i) list.walk();
}

constexpr std::uint64_t walk_batch = 64;

template <class List>
void measure_walks(benchmark::State& state, std::size_t length) {
  List list;
  std::vector<visited> nodes(length);
  for (visited& v : nodes) list.add(v);
  std::uint64_t count = 0;
  while (state.KeepRunningBatch(walk_batch)) {
    walks(list, walk_batch);
    count += walk_batch;
  }
  for (visited& v : nodes) {
    list.remove(v);
    if (v.calls != count) state.SkipWithError("a node was not visited once per walk");
  }
}

#if MMUNOTIFY_BENCH_URCU
template <void (*walk)(std::uint64_t)>
void measure_urcu_walks(benchmark::State& state, std::size_t length) {
  bench_urcu_attach();
  bench_urcu_build(length);
  std::uint64_t count = 0;
  while (state.KeepRunningBatch(walk_batch)) {
    walk(walk_batch);
    count += walk_batch;
  }
  if (bench_urcu_visits() != count * length) state.SkipWithError("a node was not visited once per walk");
  bench_urcu_detach();
}
#endif

inline void add_walks(std::size_t length) {
  const std::string group = "walk_" + std::to_string(length) + "/";
  ratios::add(group + "plain_list", [length](benchmark::State& s) { measure_walks<plain_list>(s, length); });
  ratios::add(group + "lockfree_hlist", [length](benchmark::State& s) { measure_walks<our_list>(s, length); });
#if MMUNOTIFY_BENCH_URCU
  ratios::add(group + "urcu_cds_list",
              [length](benchmark::State& s) { measure_urcu_walks<bench_urcu_walk_list>(s, length); });
  ratios::add(group + "urcu_cds_hlist",
              [length](benchmark::State& s) { measure_urcu_walks<bench_urcu_walk_hlist>(s, length); });
#endif
  ratios::add(group + "shared_mutex_vector",
              [length](benchmark::State& s) { measure_walks<locked_vector>(s, length); });
}

}  // namespace sync_bench
