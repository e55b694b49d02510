// SPDX-License-Identifier: MIT
#pragma once

// What an owner of an x86 MMU, shadow or direct, may want otherwise.

#include <cstddef>

#include <mmunotify/base/event.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

struct mmu_options {
  /// How many shadow pages (9 KiB each) to keep; the oldest go first. Of a shadow_mmu.
  std::size_t max_pages = 4096;
  /// Brackets with these events withdraw write access and nothing else: frames stay where they are, reads stay allowed.
  /// So Linux raises them (copy on write, write-back, soft-dirty). An mprotect may forbid reads as well: a primary that
  /// never does that may add protection_vma.
  event_set downgrades{event::protection_page, event::soft_dirty};
  /// The guest writes its lowest-level tables freely, and their shadows follow when it flushes: see unsync.hpp. Else
  /// each write to one comes back as outcome::write_tracked. Of a shadow_mmu.
  bool unsync = false;
  /// A fault fills the empty places beside its own as well: see prefetch.hpp. Means something where the provider can
  /// be asked without waiting. Halves the cost of pages that are touched in order, and triples that of one in eight
  /// (bench/README.md); the exit from the guest, which it saves, is not counted in that.
  bool prefetch = false;
  /// When a log of writes begins, large leaves are split at once, not zapped and faulted in again by 4 KiB: see
  /// split.hpp.
  bool eager_split = false;
  /// Large leaves may not be executed; a fetch from one makes it small, and what is small, also of an eager split, is
  /// executed as ever. Some processors stop when a page that is being
  /// executed changes its size under an instruction TLB (iTLB multihit, CVE-2018-12207), and a guest can have that
  /// done.
  bool nx_huge = false;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
