// SPDX-License-Identifier: MIT
#pragma once

// Huge pages: 2 MiB that are mapped as one (Linux: hugetlb's mmap, and khugepaged's collapse).

#include <cstddef>
#include <cstdint>

#include <mmunotify/base/event.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/nothrow_array.hpp>
#include <mmunotify/primary/paged_memory.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// The entries of the block are what those of a huge page must be. Preconditions: as page_table::peek.
inline bool is_block(const page_table& table, std::uintptr_t block) noexcept {
  const page_entry first = table.peek(block);
  bool whole = first.present() && first.frame().value % frame_pool::block_frames == 0;
  for (std::size_t i = 1; whole && i < frame_pool::block_frames; i += 1) {
    const page_entry e = table.peek(block + i * page_size);
    whole = e.present() && e.frame() == first.frame() + i && e.writable() == first.writable();
  }
  return whole;
}

/// Blocks of frames for blocks of addresses.
struct block_job {
  std::uintptr_t at;
  pfn target;  ///< frame_pool::none when used
};
using block_jobs = nothrow_array<block_job>;

inline void give_back(block_jobs& jobs, frame_pool& pool) noexcept {
  for (const block_job& job : jobs) {
    if (job.target == frame_pool::none) continue;
    for (std::size_t i = 0; i < frame_pool::block_frames; i += 1) pool.drop(job.target + i);
  }
}

/// Adds a block of frames for the addresses. Returns: false when there is none. Preconditions: the jobs have room.
inline bool add_block(block_jobs& jobs, std::uintptr_t at, frame_pool& pool) noexcept {
  const pfn target = pool.allocate_block();
  if (target != frame_pool::none) jobs.push_back({at, target});
  return target != frame_pool::none;
}

/// Maps fresh frames, filled with zeros, at the block of addresses. Context: tables exclusive; the entries are reached.
inline void install_zeros(paged_memory& memory, block_job& job, bool writable) noexcept {
  for (std::size_t i = 0; i < frame_pool::block_frames; i += 1) {
    const pfn f = job.target + i;
    fill_page(memory.frames().data(f), std::byte{0});
    memory.frames().install(f);
    const page_entry e = page_entry::mapping(f, false).with(page_entry::soft_dirty_bit);
    memory.table()
        .reach(job.at + i * page_size)
        ->store(e.with(writable ? page_entry::writable_bit : 0).bits, std::memory_order_relaxed);
  }
  memory.table().set_huge(job.at);
  job.target = frame_pool::none;
}

/// map_huge after its checks. Errors: no_memory; nothing has changed then. Context: tables exclusive.
inline errc map_blocks(paged_memory& memory, const range& r, protection allows, area_list& next) noexcept {
  const std::size_t n = (r.last - r.first) / page_table::block_size;
  block_jobs jobs;
  bool enough = n <= memory.frames().size() / frame_pool::block_frames && jobs.reserve(n);
  for (std::uintptr_t at = r.first; enough && at != r.last; at += page_table::block_size) {
    enough = memory.table().reach(at) != nullptr && add_block(jobs, at, memory.frames());
  }
  if (!enough) {
    give_back(jobs, memory.frames());
    memory.prune(r);
    return errc::no_memory;
  }
  for (block_job& job : jobs) install_zeros(memory, job, allows == protection::read_write);
  memory.areas().swap(next);
  return errc::ok;
}

/// Collapsing: blocks of small pages get a block of frames, and become huge pages.
template <class Core>
class collapsing {
 public:
  /// Context: tables exclusive.
  explicit collapsing(Core& core) noexcept : core_(core), memory_(core.memory) {}

  /// Errors: no_memory; nothing has changed then.
  errc run(const range& r) noexcept {
    std::size_t n = 0;
    memory_.table().for_each_block(r, [&](std::uintptr_t block, bool huge) { n += fits(block, huge, r) ? 1U : 0U; });
    block_jobs jobs;
    bool enough = jobs.reserve(n);
    memory_.table().for_each_block(r, [&](std::uintptr_t block, bool huge) {
      if (fits(block, huge, r)) enough = enough && add_block(jobs, block, memory_.frames());
    });
    for (block_job& job : jobs) {
      if (!enough) break;
      core_.change(page_table::block_of(job.at), event::clear, nullptr,
                   [&](withdrawn_pages& gone) { collapse(job, gone); });
    }
    give_back(jobs, memory_.frames());
    return enough ? errc::ok : errc::no_memory;
  }

 private:
  /// One area, some page, and none that a device has.
  bool fits(std::uintptr_t block, bool huge, const range& r) noexcept {
    const range whole = page_table::block_of(block);
    const area* const covering = memory_.areas().find(block);
    if (huge || !r.contains(whole) || covering == nullptr || !covering->range.contains(whole)) return false;
    bool any = false;
    bool plain = covering->allows != protection::none;
    memory_.table().for_each(whole, [&](std::uintptr_t, page_slot& slot) {
      const page_entry e{slot.load(std::memory_order_relaxed)};
      any = true;
      plain = plain && !e.device() && !e.exclusive();
    });
    return any && plain;
  }

  bool on_loan(std::uintptr_t block) noexcept {
    bool any = false;
    memory_.table().for_each(page_table::block_of(block), [&](std::uintptr_t, page_slot& slot) {
      const page_entry e{slot.load(std::memory_order_relaxed)};
      any = any || (e.present() && memory_.frames().on_loan(e.frame()));
    });
    return any && !mutated(mutation::collapse_despite_loans);
  }

  void collapse(block_job& job, withdrawn_pages& gone) noexcept {
    if (on_loan(job.at)) {
      memory_.counters().add(counter::skipped_pinned);
      return;
    }
    const area& covering = *memory_.areas().find(job.at);
    bool writable = covering.allows == protection::read_write;
    for (std::size_t i = 0; i < frame_pool::block_frames; i += 1) {
      locked_entry entry{*memory_.table().reach(job.at + i * page_size)};
      entry.value = replaced(entry.value, job.target + i, covering.soft_dirty, gone);
      writable = writable && entry.value.soft_dirty();
    }
    memory_.table().set_huge(job.at);
    if (writable) memory_.allow_writes(page_table::block_of(job.at));
    memory_.counters().add(counter::collapsed);
    job.target = frame_pool::none;
  }

  /// The contents go to f, from wherever they are. Returns: the new entry, not writable.
  page_entry replaced(page_entry old, pfn f, bool fresh, withdrawn_pages& gone) noexcept {
    std::byte* const to = memory_.frames().data(f);
    if (old.present()) {
      copy_page(to, memory_.frames().data(old.frame()));
      memory_.withdraw(memory_.frames(), old.frame(), gone);
    } else if (old.swapped()) {
      copy_page(to, memory_.swap().data(old.frame()));
      memory_.free_slot(old.frame());
    } else {
      fill_page(to, std::byte{0});
    }
    memory_.frames().install(f);
    return page_entry::mapping(f, old.young()).with(fresh || old.soft_dirty() ? page_entry::soft_dirty_bit : 0);
  }

  Core& core_;
  paged_memory& memory_;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
