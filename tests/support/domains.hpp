// SPDX-License-Identifier: MIT
#pragma once

// The read-section domains that a typed test runs over, and platforms that lack something.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <doctest/doctest.h>

#include <mmunotify/sync/srcu_domain.hpp>
#include <mmunotify/sync/static_srcu_domain.hpp>

/// A kernel without membarrier.
struct no_membarrier : mmunotify::linux_platform {
  static bool heavy_available() noexcept { return false; }
  static void heavy() noexcept { FAIL("a heavy fence without membarrier"); }
};

/// Room for one domain: slot 0 is nobody's.
struct one_slot : mmunotify::linux_platform {
  static constexpr std::uint32_t slots = 2;
};

/// Counts heavy fences. Each test takes a tag of its own, and so a runtime of its own.
template <class Tag>
struct counted_fences : mmunotify::linux_platform {
  static inline std::atomic<std::uint64_t> fences{0};
  static void heavy() noexcept {
    fences.fetch_add(1, std::memory_order_relaxed);
    mmunotify::linux_platform::heavy();
  }
};

/// Effects: no domain can get a slot while what it returns lives.
inline std::vector<std::unique_ptr<mmunotify::srcu_domain>> take_all_slots() {
  std::vector<std::unique_ptr<mmunotify::srcu_domain>> all;
  do {
    all.push_back(std::make_unique<mmunotify::srcu_domain>());
  } while (all.back()->status() == mmunotify::errc::ok);
  return all;
}

struct isolated_domain : mmunotify::srcu_domain {
  isolated_domain() noexcept : mmunotify::srcu_domain(mmunotify::srcu_options{.isolated = true}) {}
};

/// Every kind of domain, for TEST_CASE_TEMPLATE. Static ones are shared by the test cases of a program.
#define MMUNOTIFY_ALL_DOMAINS                                                           \
  mmunotify::srcu_domain, mmunotify::basic_srcu_domain<no_membarrier>, isolated_domain, \
      mmunotify::static_srcu_domain<struct tested_static>,                              \
      mmunotify::static_srcu_domain<struct tested_static, no_membarrier>
