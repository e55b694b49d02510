// SPDX-License-Identifier: MIT
#pragma once

// xenium's epoch schemes. A section is the life of a guard, which is also what loads the pointer.

#include <xenium/reclamation/generic_epoch_based.hpp>

#include "sync_sections.hpp"

namespace sync_bench {

template <class Scheme>
struct xenium_section : kind {
  struct node : Scheme::template enable_concurrent_ptr<node> {
    std::uint64_t value = 1;
  };
  using shared = typename Scheme::template concurrent_ptr<node>;

  static shared& pointer() {
    static shared p{typename shared::marked_ptr(new node)};  // lives as long as the process
    return p;
  }

  shared* protected_by_it = nullptr;

  void begin() { protected_by_it = &pointer(); }
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    typename shared::guard_ptr guard;
    guard.acquire(*protected_by_it, std::memory_order_acquire);
    return guard->value;
  }
};

using xenium_epoch_based = xenium_section<xenium::reclamation::epoch_based<>>;
using xenium_debra = xenium_section<xenium::reclamation::debra<>>;

}  // namespace sync_bench
