// SPDX-License-Identifier: MIT
#pragma once

// The kinds of read section that sync.cpp compares, and the loops around them.
//
// A kind is a small value: begin() and end() are called by each thread before and after its loops, read(i) is the
// section: it reads what the section protects and returns it. The loops take the kind by value, so that what it holds
// stays in registers across the sections' compiler barriers, and add up in a register. Kinds that are written in C
// bring their loops along.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <vector>

#include <mmunotify/sync/srcu_domain.hpp>
#include <mmunotify/sync/static_srcu_domain.hpp>

#include "peers.h"
#include "ratios.hpp"

#define MMUNOTIFY_BENCH_INLINE [[gnu::always_inline]] inline

namespace sync_bench {

using namespace mmunotify;

MMUNOTIFY_BENCH_INLINE std::uint64_t read_payload() {
  const bench_payload* const p = std::atomic_ref(bench_shared).load(std::memory_order_acquire);
  return std::atomic_ref(const_cast<bench_payload*>(p)->value).load(std::memory_order_relaxed);
}

inline srcu_domain& the_domain() {
  static srcu_domain domain;
  return domain;
}

struct kind {
  void begin() {}
  void end() {}
};

struct no_section : kind {
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) { return read_payload(); }
};

/// The limit: what has to be stored to be seen, and nothing else.
struct two_stores : kind {
  struct alignas(64) line {
    std::atomic<std::uint64_t> word{0};
  };
  line* own = nullptr;

  void begin() { own = new line; }
  void end() { delete own; }
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    own->word.store(1, std::memory_order_relaxed);
    linux_platform::light();
    const std::uint64_t value = read_payload();
    linux_platform::light();
    own->word.store(0, std::memory_order_relaxed);
    return value;
  }
};

/// What a section costs at least where readers have to order themselves: one exchange and one store.
struct one_exchange : two_stores {
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    own->word.exchange(1, std::memory_order_seq_cst);
    const std::uint64_t value = read_payload();
    own->word.store(0, std::memory_order_release);
    return value;
  }
};

struct of_domain : kind {
  srcu_domain* domain = nullptr;
  void begin() { domain = &the_domain(); }
  void synchronize() { domain->synchronize(); }
};

struct dynamic_section : of_domain {
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    const read_section s(*domain);
    return read_payload();
  }
};

/// A section inside another of the same domain. The outer one is not the loop's: a kind of more than two words would be
/// passed in memory.
struct dynamic_nested : dynamic_section {
  static inline thread_local srcu_domain::section_token outer;
  void begin() {
    dynamic_section::begin();
    outer = domain->read_lock();
  }
  void end() { domain->read_unlock(outer); }
};

struct unordered_section : of_domain {
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    domain->read_lock_unordered();
    const std::uint64_t value = read_payload();
    domain->read_unlock_unordered();
    return value;
  }
};

/// A domain that is a type.
struct static_tag;
struct static_section : kind {
  using domain_type = static_srcu_domain<static_tag>;
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    domain_type domain;
    const basic_read_section<domain_type> s(domain);
    return read_payload();
  }
  void synchronize() { domain_type::synchronize(); }
};

struct static_nested : static_section {
  static inline thread_local domain_type::section_token outer;
  void begin() { outer = domain_type::read_lock(); }
  void end() { domain_type::read_unlock(outer); }
};

/// A section that may end in another thread.
struct handoff_section : of_domain {
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    const auto token = domain->down_read();
    const std::uint64_t value = read_payload();
    domain->up_read(token);
    return value;
  }
};

/// 64 domains in turn: the words of one thread share lines, the domains do not.
struct rotating_section : kind {
  static constexpr std::size_t count = 64;
  using all = std::array<srcu_domain, count>;
  all* domains = nullptr;

  void begin() {
    static all those;
    domains = &those;
  }
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t i) {
    const read_section s((*domains)[i % count]);
    return read_payload();
  }
};

struct shared_mutex_section : kind {
  std::shared_mutex* mutex = nullptr;
  void begin() {
    static std::shared_mutex that;
    mutex = &that;
  }
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    const std::shared_lock lock(*mutex);
    return read_payload();
  }
};

template <class Kind, std::uint64_t placement>
[[gnu::noinline, gnu::aligned(64)]] std::uint64_t placed_sections(Kind k, std::uint64_t n) {
  std::uint64_t sum = 0;
  BENCH_PLACE(placement);
  for (std::uint64_t i = 0; i < n; ++i) sum += k.read(i);
  return sum;
}
template <class Kind>
std::uint64_t sections(Kind k, std::uint64_t placement, std::uint64_t n) {
  static_assert(bench_placements == 4);
  static constexpr std::uint64_t (*all[])(Kind, std::uint64_t) = {placed_sections<Kind, 0>, placed_sections<Kind, 1>,
                                                                  placed_sections<Kind, 2>, placed_sections<Kind, 3>};
  return all[placement](k, n);
}

/// Each section after a store that misses the cache.
template <class Kind>
[[gnu::noinline]] std::uint64_t amid(Kind k, std::uint64_t* words, std::uint64_t* random, std::uint64_t n) {
  std::uint64_t x = *random;
  std::uint64_t sum = 0;
  for (std::uint64_t i = 0; i < n; ++i) {
    x = bench_next_random(x);
    words[x % bench_store_words] = x;
    sum += k.read(i);
  }
  *random = x;
  return sum;
}

#if MMUNOTIFY_BENCH_URCU
struct urcu_section : kind {
  void begin() { bench_urcu_attach(); }
  void end() { bench_urcu_detach(); }
  void synchronize() { bench_urcu_synchronize(); }
};
struct urcu_nested : urcu_section {};
inline std::uint64_t sections(urcu_section, std::uint64_t placement, std::uint64_t n) {
  return bench_urcu_sections(placement, n);
}
inline std::uint64_t sections(urcu_nested, std::uint64_t placement, std::uint64_t n) {
  return bench_urcu_nested(placement, n);
}
inline std::uint64_t amid(urcu_section, std::uint64_t* words, std::uint64_t* random, std::uint64_t n) {
  return bench_urcu_amid(words, random, n);
}
#endif

#if MMUNOTIFY_BENCH_CK
struct ck_section : kind {
  void* record = nullptr;
  void begin() { record = bench_ck_attach(); }
  void end() { bench_ck_detach(record); }
  void synchronize() { bench_ck_synchronize(record); }
};
inline std::uint64_t sections(ck_section k, std::uint64_t placement, std::uint64_t n) {
  return bench_ck_sections(k.record, placement, n);
}
inline std::uint64_t amid(ck_section k, std::uint64_t* words, std::uint64_t* random, std::uint64_t n) {
  return bench_ck_amid(k.record, words, random, n);
}
#endif

constexpr std::uint64_t batch = 1024;

/// Calls loop(batch) as long as it takes; every section must have read 1.
template <class Loop>
void measure_loop(benchmark::State& state, Loop loop) {
  std::uint64_t sum = 0;
  std::uint64_t count = 0;
  while (state.KeepRunningBatch(batch)) {
    sum += loop(batch);
    count += batch;
  }
  if (sum != count) state.SkipWithError("a section did not read what was published");
}

/// Each repetition has another placement; the figure is the median over all.
template <class Kind>
void measure_sections(benchmark::State& state) {
  static std::atomic<std::uint64_t> calls{0};
  const std::uint64_t placement = calls.fetch_add(1, std::memory_order_relaxed) % bench_placements;
  Kind k;
  k.begin();
  measure_loop(state, [k, placement](std::uint64_t n) { return sections(k, placement, n); });
  k.end();
}

template <class Kind>
void measure_amid(benchmark::State& state) {
  std::vector<std::uint64_t> words(bench_store_words);
  std::uint64_t random = 88172645463325252U;
  const std::uint64_t first = random;
  std::uint64_t steps = 0;
  Kind k;
  k.begin();
  measure_loop(state, [&, k](std::uint64_t n) {
    steps += n;
    return amid(k, words.data(), &random, n);
  });
  k.end();
  if (steps != 0 && (random == first || words[random % bench_store_words] != random)) {
    state.SkipWithError("the last store is not there");
  }
}

/// The same kinds for one thread and for two at once.
template <class Kind>
void add_sections(const std::string& variant) {
  ratios::add("section/" + variant, measure_sections<Kind>);
  ratios::add("section_2_threads/" + variant, measure_sections<Kind>)->Threads(2);
}

}  // namespace sync_bench
