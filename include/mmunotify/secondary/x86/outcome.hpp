// SPDX-License-Identifier: MIT
#pragma once

// What a guest access came to, and what the MMU has counted.

#include <atomic>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/entry.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// What a guest access came to; everything but `done` is for the caller to act on.
struct [[nodiscard]] outcome {
  enum kind : std::uint8_t {
    done,                ///< the access happened (of a fault: a mapping is there)
    page_fault,          ///< inject #PF with `code`; CR2 is the address
    general_protection,  ///< inject #GP(0), or #SS(0) for a stack access: the address is not canonical
    write_tracked,       ///< a write to a guest page table that is shadowed: emulate it, write with guest_write
    not_mapped,          ///< no slot there, a read-only one for a write, or the host refuses: MMIO, or an error
    released,            ///< the host address space is gone; nothing is mapped until resume()
    no_memory,           ///< an allocation failed, here or in the host
    again,               ///< a single attempt collided with an invalidation or with the guest; access() retries itself
  };

  kind what = done;
  fault_code code{};  ///< page_fault
  gpa address{};      ///< write_tracked, not_mapped: the guest-physical address (for a table, that of its entry)

  friend constexpr bool operator==(const outcome&, const outcome&) = default;
};

/// The outcome that an error of the host stands for.
constexpr outcome outcome_of(errc e, gpa where) noexcept {
  switch (e) {
    case errc::ok: return {};
    case errc::released: return {.what = outcome::released};
    case errc::no_memory: return {.what = outcome::no_memory};
    case errc::again: return {.what = outcome::again};
    default: return {.what = outcome::not_mapped, .address = where};
  }
}

/// What has happened so far. Each number is right for itself; together they are no snapshot.
struct mmu_statistics {
  std::uint64_t faults = 0;           ///< attempts to install a mapping
  std::uint64_t retries = 0;          ///< of these, those that collided and were undone before they did anything
  std::uint64_t installs = 0;         ///< leaves installed or given other rights
  std::uint64_t zapped = 0;           ///< leaves taken down
  std::uint64_t flushes = 0;          ///< remote TLB flushes
  std::uint64_t write_protected = 0;  ///< leaves that lost write access because their frame became a guest table
  std::uint64_t tracked_writes = 0;   ///< guest_write calls that hit a shadowed table
  std::uint64_t pages_zapped = 0;     ///< shadow pages taken down
  std::uint64_t downgraded = 0;       ///< leaves that lost write access because the primary withdrew it
  std::uint64_t replaced = 0;         ///< leaves that got another frame in place
  std::uint64_t resynced = 0;         ///< lowest-level tables compared with the guest's after it wrote them freely
  std::uint64_t mmio_hits = 0;        ///< accesses that were known to be MMIO without a fault
  std::uint64_t fast_writes = 0;      ///< leaves that were made writable without the MMU lock
  std::uint64_t large = 0;            ///< leaves installed that map 2 MiB or 1 GiB
  std::uint64_t roots_reused = 0;     ///< changes of CR3 or of the role to a root that was still known
  std::uint64_t prefetched = 0;       ///< leaves installed beside the one that a fault was for
  std::uint64_t split = 0;            ///< large leaves replaced by smaller ones that map the same
};

/// The counters behind it. Relaxed: they order nothing.
class mmu_counters {
 public:
  enum counter : unsigned {
    faults,
    retries,
    installs,
    zapped,
    flushes,
    write_protected,
    tracked_writes,
    pages_zapped,
    downgraded,
    replaced,
    resynced,
    mmio_hits,
    fast_writes,
    large,
    roots_reused,
    prefetched,
    split,
    counters
  };

  void add(counter c, std::uint64_t n = 1) noexcept { values_[c].fetch_add(n, std::memory_order_relaxed); }
  mmu_statistics read() const noexcept {
    const auto get = [&](counter c) { return values_[c].load(std::memory_order_relaxed); };
    return {get(faults),          get(retries),        get(installs),     get(zapped),     get(flushes),
            get(write_protected), get(tracked_writes), get(pages_zapped), get(downgraded), get(replaced),
            get(resynced),        get(mmio_hits),      get(fast_writes),  get(large),      get(roots_reused),
            get(prefetched),      get(split)};
  }

 private:
  std::atomic<std::uint64_t> values_[counters] = {};
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
