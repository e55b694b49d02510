// SPDX-License-Identifier: MIT
#pragma once

// A guest whose every decision is a byte of somebody's: what it writes to its tables and registers, what it touches and
// when it flushes, and what its host and owner do meanwhile (random_guest.hpp). Whatever the bytes are, each access
// must have the outcome of a walk made anew and of the manual's rules, and the tables must pass the self-check. Called
// by libFuzzer (fuzz_guest.cpp) and by a seeded generator (fuzz_guest.test.cpp).

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "random_guest.hpp"

namespace fuzz {

using namespace shadow_test;

/// Numbers from bytes: as few as the range needs; zeros when there are no more.
class byte_dice {
 public:
  explicit byte_dice(std::span<const std::uint8_t> bytes) : left_(bytes) {}

  bool empty() const { return left_.empty(); }
  std::uint64_t operator()() { return take(8); }
  std::uint64_t below(std::uint64_t n) { return take(n <= 0x100 ? 1 : n <= 0x10000 ? 2 : 8) % n; }

 private:
  std::uint64_t take(unsigned n) {
    std::uint64_t value = 0;
    for (; n > 0 && !left_.empty(); --n, left_ = left_.subspan(1)) value = value << 8 | left_.front();
    return value;
  }
  std::span<const std::uint8_t> left_;
};

/// What all guests together have come across.
struct tally {
  std::uint64_t steps = 0, done = 0, faulted = 0, tracked = 0, prefetched = 0, split = 0;
};

template <class Mode>
void run(byte_dice dice, const x86::mmu_options& o, tally& seen) {
  random_guest<Mode, prefetching_host, byte_dice> g(dice, o);
  for (int i = 0; i < 2000 && !g.random.empty(); ++i) {
    // While neighbours are looked up the host changes one of them, or any page. (With no bytes left, no fault would
    // end.)
    if (o.prefetch && g.chance(30)) {
      g.m.host.during_try = [&g, last = std::uint64_t{0}](hva a) mutable {
        if (!g.random.empty() && g.chance(30)) g.host_changes(last != 0 && g.chance(70) ? last : g.some_frame());
        last = (a - ram_base) >> page_shift;
      };
    }
    g.step();
    g.m.host.during_try = nullptr;
    ++seen.steps;
    if (i % 16 == 0) REQUIRE(g.m.broken() == "");
  }
  REQUIRE(g.m.broken() == "");
  REQUIRE(g.m.host.on_loan() == 0);
  const x86::mmu_statistics s = g.m.mmu.statistics();
  seen.done += g.done;
  seen.faulted += g.faulted;
  seen.tracked += g.tracked;
  seen.prefetched += s.prefetched;
  seen.split += s.split;
}

/// The first two bytes are the mode and the options.
inline void try_bytes(std::span<const std::uint8_t> bytes, tally& seen) {
  if (bytes.size() < 3) return;
  const unsigned how = bytes[1];
  const x86::mmu_options o{.max_pages = (how & 8) != 0 ? 24U : 4096U,
                           .unsync = (how & 1) != 0,
                           .prefetch = (how & 2) != 0,
                           .eager_split = (how & 4) != 0,
                           .nx_huge = (how & 16) != 0};
  const byte_dice dice(bytes.subspan(2));
  switch (bytes[0] % 5) {
    case 0: return run<x86::no_paging>(dice, o, seen);
    case 1: return run<x86::two_level>(dice, o, seen);
    case 2: return run<x86::pae>(dice, o, seen);
    case 3: return run<x86::long_mode_4>(dice, o, seen);
    default: return run<x86::long_mode_5>(dice, o, seen);
  }
}

}  // namespace fuzz
