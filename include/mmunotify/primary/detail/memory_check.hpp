// SPDX-License-Identifier: MIT
#pragma once

// The invariants of a software primary MMU, one by one, each with its sentence.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include <mmunotify/base/range.hpp>
#include <mmunotify/primary/detail/huge.hpp>
#include <mmunotify/primary/paged_memory.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// How many entries point to each frame of a pool, counted through the tables.
class entry_counts {
 public:
  explicit entry_counts(const frame_pool& pool) noexcept
      : pool_(pool), counts_(new(std::nothrow) std::uint32_t[pool.size() + 1]()) {}
  explicit operator bool() const noexcept { return counts_ != nullptr; }
  void add(pfn f) noexcept { counts_[f.value] += 1; }
  /// Whether the frames' own counts agree; with `others`, other tables than those counted may point to them as well.
  bool agree(bool others) const noexcept {
    for (std::size_t f = 0; f < pool_.size(); f += 1) {
      const std::uint64_t maps = pool_.maps({f});
      if (others ? maps < counts_[f] : maps != counts_[f]) return false;
    }
    return true;
  }

 private:
  const frame_pool& pool_;
  std::unique_ptr<std::uint32_t[]> counts_;
};

/// Looks at one address space after the other, then at what they share. Context: the tables of each are held exclusive
/// while it is looked at, and nothing changes between.
class memory_check {
 public:
  explicit memory_check(physical_memory& m) noexcept
      : physical_(m), frames_(m.frames), swap_(m.swap), device_(m.device) {}

  /// Returns: the first broken invariant of this address space, or null.
  const char* look_at(paged_memory& memory) noexcept {
    if (!frames_ || !swap_ || !device_) return "no memory to verify with";
    const char* broken = memory.areas().verify();
    memory.table().for_each(paged_memory::whole(), [&](std::uintptr_t a, page_slot& slot) {
      const char* const found = entry(memory, a, page_entry{slot.load(std::memory_order_relaxed)});
      if (broken == nullptr) broken = found;
    });
    memory.table().for_each_huge(paged_memory::whole(), [&](std::uintptr_t block) {
      const char* const found = huge(memory, block);
      if (broken == nullptr) broken = found;
    });
    spaces_ += 1;
    return broken;
  }

  /// Returns: the first broken invariant of what the address spaces share, or null.
  const char* look_at_shared() noexcept {
    if (const char* broken = physical_.frames.verify(); broken != nullptr) return broken;
    if (const char* broken = physical_.swap.verify(); broken != nullptr) return broken;
    if (const char* broken = physical_.device.verify(); broken != nullptr) return broken;
    const bool others = physical_.users() > spaces_;
    if (!frames_.agree(others)) return "a frame's count and the entries that point to it disagree";
    if (!swap_.agree(others)) return "a swap slot's count and the entries that point to it disagree";
    if (!device_.agree(others)) return "a device page's count and the entries that point to it disagree";
    return nullptr;
  }

 private:
  const char* entry(paged_memory& memory, std::uintptr_t a, page_entry e) noexcept {
    if ((e.bits & page_entry::lock_bit) != 0) return "an entry is locked and nobody is inside";
    if (e.none()) return "an empty entry has bits set";
    if (int{e.present()} + int{e.swapped()} + int{e.device()} + int{e.exclusive()} != 1) {
      return "a page is in two places: present, swapped out, with a device or exclusive";
    }
    const area* const covering = memory.areas().find(a);
    if (covering == nullptr) return "a page lies in no area";
    const frame_pool& pool = e.has_frame() ? memory.frames() : e.device() ? memory.device() : memory.swap();
    if (!pool.contains(e.frame())) return "an entry points outside the pool";
    if (!pool.mapped(e.frame())) return "an entry points to a frame that does not count it";
    (e.has_frame() ? frames_ : e.device() ? device_ : swap_).add(e.frame());
    return rights(pool, *covering, e);
  }

  static const char* rights(const frame_pool& pool, const area& covering, page_entry e) noexcept {
    if (e.writable() && !e.present()) return "a page is writable and not present";
    if (e.writable() && covering.allows != protection::read_write) return "a page is writable and its area is not";
    if (e.writable() && !e.soft_dirty()) return "a page is writable and not soft-dirty";
    if (e.writable() && !pool.sole(e.frame())) return "a shared frame is writable";
    const bool owned = e.device() || e.exclusive();
    if (owned && !pool.sole(e.frame())) return "a page that a device has is shared";
    if (owned != (pool.owner(e.frame()) != nullptr)) return "a page has an owner and no device has it, or the reverse";
    return nullptr;
  }

  static const char* huge(paged_memory& memory, std::uintptr_t block) noexcept {
    const area* const covering = memory.areas().find(block);
    const bool inside = covering != nullptr && covering->range.contains(page_table::block_of(block));
    if (!inside) return "a huge page is not in one area";
    return is_block(memory.table(), block) ? nullptr : "a huge page is not one block of frames with the same rights";
  }

  physical_memory& physical_;
  entry_counts frames_;
  entry_counts swap_;
  entry_counts device_;
  std::size_t spaces_ = 0;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
