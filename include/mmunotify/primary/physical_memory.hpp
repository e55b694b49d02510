// SPDX-License-Identifier: MIT
#pragma once

// What several address spaces of one machine share: frames, swap slots, and the memory of a device.
//
//   physical_memory ram{4096, 1024};
//   reference_mmu<> parent{ram}, child{ram};
//   parent.fork(child);
//
// A reference_mmu that is made from numbers has one of its own; others are made to share it by `memory()`. Whoever owns
// it lets it live longer than all its users.

#include <atomic>
#include <cstddef>

#include <mmunotify/config.hpp>
#include <mmunotify/primary/frame_pool.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// Pages that have lost their last entry and wait for the end of a bracket.
struct withdrawn_pages {
  frame_chain frames;
  frame_chain device;
};

class physical_memory {
 public:
  /// When memory for one of them cannot be had, there are none of it, and what needs one answers errc::no_memory.
  physical_memory(std::size_t frame_count, std::size_t swap_slots, std::size_t device_pages = 0) noexcept
      : frames(frame_count), swap(swap_slots), device(device_pages) {}
  physical_memory(const physical_memory&) = delete;
  physical_memory& operator=(const physical_memory&) = delete;
  /// Preconditions: no address space uses it (checked always).
  ~physical_memory() {
    const std::size_t n = users();
    if (n != 0) {
      detail::violated("bad input", "physical_memory::~physical_memory", "%zu address spaces still use it", n);
    }
  }

  /// How many address spaces use it; stale on arrival.
  std::size_t users() const noexcept { return users_.load(std::memory_order_relaxed); }
  void add_user() noexcept { users_.fetch_add(1, std::memory_order_relaxed); }
  void remove_user() noexcept { users_.fetch_sub(1, std::memory_order_relaxed); }

  frame_pool frames;
  frame_pool swap;    ///< slots, which nobody pins
  frame_pool device;  ///< pages that the processor cannot reach

 private:
  std::atomic<std::size_t> users_{0};
};

MMUNOTIFY_END_NAMESPACE
