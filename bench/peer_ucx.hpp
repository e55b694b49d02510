// SPDX-License-Identifier: MIT
#pragma once

// A second peer for intervals, where it is installed: the registration cache of UCX (ucs_rcache), which is told of
// unmapped memory by ucm_vm_munmap. It keeps its regions in a radix tree under a read-write lock; a region that is hit
// leaves the cache, and is registered again by the next one who asks for it.
//
// It asks for no hooks, but libucs patches munmap, madvise and others of the process when it is loaded (1.13), so its
// caches are told of what is really unmapped as well: stacks of threads that end, arenas. The addresses must be others.
// All caches of the process are told of everything, so there is one at a time.

#include <cstdint>
#include <cstdlib>
#include <string>

#include <sys/mman.h>

extern "C" {
#include <ucm/api/ucm.h>
#include <ucs/memory/rcache.h>
}

namespace interval_bench {

class ucx_cache {
 public:
  static constexpr const char* name = "ucx";

  /// n regions, where(i) .. where(i) + length.
  ucx_cache(std::uint64_t n, std::uint64_t (*where)(std::uint64_t), std::uint64_t length)
      : where_(where), length_(length) {
    ucs_rcache_params_t p{};
    p.region_struct_size = sizeof(ucs_rcache_region_t);
    p.alignment = p.max_alignment = length;
    p.ucm_events = UCM_EVENT_VM_UNMAPPED | UCM_EVENT_FLAG_NO_INSTALL;
    p.ucm_event_priority = 1000;
    p.ops = &operations;
    p.context = this;
    p.flags = UCS_RCACHE_FLAG_NO_PFN_CHECK;
    p.max_regions = ~0UL;
    p.max_size = p.max_unreleased = ~std::size_t{0};
    good_ = ucs_rcache_create(&p, "bench", nullptr, &cache_) == UCS_OK;
    for (std::uint64_t i = 0; i < n && good_; ++i) replace(i);
  }
  ucx_cache(const ucx_cache&) = delete;
  ucx_cache& operator=(const ucx_cache&) = delete;
  ~ucx_cache() {
    if (cache_ != nullptr) ucs_rcache_destroy(cache_);
  }

  void tell(std::uint64_t first, std::uint64_t last) { ucm_vm_munmap(pointer(first), last - first); }
  /// The region was hit: it comes back.
  void replace(std::uint64_t i) {
    ucs_rcache_region_t* r = nullptr;
    good_ &= ucs_rcache_get(cache_, pointer(where_(i)), length_, PROT_READ | PROT_WRITE, nullptr, &r) == UCS_OK;
    if (r != nullptr) ucs_rcache_region_put(cache_, r);
  }
  /// Regions that were hit and are gone.
  std::uint64_t calls() const { return calls_; }
  std::string wrong() const { return good_ ? "" : "a registration failed"; }

 private:
  static void* pointer(std::uint64_t a) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(a)); }

  static ucs_status_t add(void*, ucs_rcache_t*, void*, ucs_rcache_region_t*, std::uint16_t) { return UCS_OK; }
  static void drop(void* c, ucs_rcache_t*, ucs_rcache_region_t*) { ++static_cast<ucx_cache*>(c)->calls_; }
  static void describe(void*, ucs_rcache_t*, ucs_rcache_region_t*, char*, std::size_t) {}
  static constexpr ucs_rcache_ops_t operations{.mem_reg = &add, .mem_dereg = &drop, .dump_region = &describe};

  std::uint64_t (*const where_)(std::uint64_t);
  const std::uint64_t length_;
  ucs_rcache_t* cache_ = nullptr;
  std::uint64_t calls_ = 0;
  bool good_ = true;
};

}  // namespace interval_bench
