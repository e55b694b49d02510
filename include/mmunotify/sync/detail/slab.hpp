// SPDX-License-Identifier: MIT
#pragma once

// A thread's memory for its read sections.
//
//   thread A  -> [record A] slab A: [slot 0][slot 1][slot 2] ... [cells]
//   thread B  -> [record B] slab B: [slot 0][slot 1][slot 2] ... [cells]
//
// A slab belongs to one thread, which alone stores to it; a domain is an index (its slot) into every slab. So a domain
// costs a thread 16 bytes, and two threads never store to the same cache line. An isolated domain takes a whole line of
// every slab: for one that others poll or synchronize in a loop, whose scans would slow its neighbours' sections.
// Slabs are reserved address space; a page of one is committed when its thread first enters a section of one of the
// page's 256 domains.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// What a slab holds for one domain.
struct section_slot {
  /// 0 outside of the domain's sections, else the domain's sequence at the entry of the outermost. Written by the
  /// owner. Of a static domain: the address of the thread_local word that stands for it, 0 if the thread has none.
  std::atomic<std::uint64_t> word;
  /// Open sections of the unordered kind besides the outermost; the owner's alone. Of a static domain: how many look at
  /// the thread_local word just now, so that it must not go away.
  std::atomic<std::uint64_t> count;
};
static_assert(sizeof(section_slot) == 16);

/// A thread's word in a static domain, thread_local. Constant-initialised: not attached.
struct static_slot {
  static constexpr std::uint64_t unattached = ~std::uint64_t{0};  ///< counts as outside, for every grace period

  std::atomic<std::uint64_t> word{unattached};
  std::uint64_t count = 0;      ///< open sections of the unordered kind besides the outermost
  static_slot* next = nullptr;  ///< of the same thread
  std::uint32_t slot = 0;       ///< the domain's; 0: not attached

  /// After the thread's exit handler has run (a later one may still begin sections) nothing of the thread's may be
  /// published any more: its sections are hand-off ones, this many of them in this bank.
  std::uint32_t handed_off = 0;
  std::uint32_t bank = 0;

  static bool is_inside(const std::atomic<std::uint64_t>& w) noexcept {
    const std::uint64_t seen = w.load(std::memory_order_relaxed);
    return seen != 0 && !is_unattached(seen);
  }
  /// By its sign: sequences do not get there. One comparison with 0 answers this and whether it is 0.
  static constexpr bool is_unattached(std::uint64_t seen) noexcept { return static_cast<std::int64_t>(seen) < 0; }
  /// What a slab's slot says of it.
  static std::uint64_t address_of(const std::atomic<std::uint64_t>& w) noexcept {
    return reinterpret_cast<std::uintptr_t>(&w);
  }
  static const std::atomic<std::uint64_t>* word_at(std::uint64_t address) noexcept {
    return reinterpret_cast<const std::atomic<std::uint64_t>*>(static_cast<std::uintptr_t>(address));
  }
};

/// Fixed-size cells of a thread's own, in its slab: what an armed bracket has to remember from its start to its end.
/// Taking one is two loads and a store and allocates nothing (the pages of the slab are committed on first touch). Not
/// for signal handlers: sections may begin there, brackets may not.
template <std::size_t Count>
struct alignas(64) thread_cells {
  struct alignas(64) cell {
    cell* next;
    std::byte rest[56];
  };
  static constexpr std::size_t count = Count;

  cell* free;
  std::size_t used;  ///< cells from here on were never taken

  /// Returns: nullptr when all are taken.
  [[gnu::always_inline]] void* take() noexcept {
    if (cell* const c = free; c != nullptr) [[likely]] {
      free = c->next;
      return c;
    }
    if (used == count) return nullptr;
    return reinterpret_cast<cell*>(this + 1) + used++;
  }
  [[gnu::always_inline]] void give_back(void* p) noexcept {
    auto* const c = static_cast<cell*>(p);
    c->next = free;
    free = c;
  }
};

template <class Platform>
class runtime;
/// A thread's slab: the record, which is immortal and recycled, then the slots, then the cells.
template <class Platform>
struct alignas(64) thread_record {
  using cells = thread_cells<Platform::cells>;

  runtime<Platform>* home = nullptr;
  static_slot* static_slots = nullptr;  ///< the owner's thread_local ones; the owner's alone
  std::atomic<bool> in_use{true};
  thread_record* next = nullptr;  ///< never changes once the record is on the list

  static constexpr std::size_t slots_size = (std::size_t{Platform::slots} * sizeof(section_slot) + 63) / 64 * 64;
  static constexpr std::size_t memory_size =
      64 + slots_size + sizeof(cells) + cells::count * sizeof(typename cells::cell);

  static_assert(slots_size <= std::size_t{1} << 20, "mmunotify: runtime::key has room for 20 bits of offset");

  // The slab is zeroed memory of the right size and alignment, and all zeros are valid slots and cells.
  [[gnu::always_inline]] static section_slot& slot_at(std::byte* slab, std::size_t offset) noexcept {
    return *std::launder(reinterpret_cast<section_slot*>(slab + offset));
  }
  [[gnu::always_inline]] static cells& cells_in(std::byte* slab) noexcept {
    return *std::launder(reinterpret_cast<cells*>(slab + slots_size));
  }

  std::byte* slab() const noexcept { return reinterpret_cast<std::byte*>(const_cast<thread_record*>(this + 1)); }
  section_slot& at(std::uint32_t slot) const noexcept {
    return slot_at(slab(), std::size_t{slot} * sizeof(section_slot));
  }
  /// Everything but the record itself is as it was when the memory was new.
  void clear() noexcept { Platform::clear_slab(slab(), memory_size - sizeof *this); }
};

/// The slots of one process, taken and given back in O(1). The caller serialises.
template <std::uint32_t Slots>
class slot_allocator {
  static constexpr std::uint32_t per_line = 64 / sizeof(section_slot);

 public:
  /// Returns: 0, which is nobody's slot, when all are in use. `isolated`: the slot has a cache line for itself.
  std::uint32_t take(bool isolated) noexcept {
    if (isolated) {
      if (free_lines_ != 0) return lines_[--free_lines_];
      while (used_ < Slots && used_ % per_line != 0) singles_[free_singles_++] = static_cast<std::uint16_t>(used_++);
      if (used_ + per_line > Slots) return 0;
      used_ += per_line;
      return used_ - per_line;
    }
    if (free_singles_ != 0) return singles_[--free_singles_];
    return used_ == Slots ? 0 : used_++;
  }
  void give_back(std::uint32_t slot, bool isolated) noexcept {
    if (isolated) {
      lines_[free_lines_++] = static_cast<std::uint16_t>(slot);
    } else {
      singles_[free_singles_++] = static_cast<std::uint16_t>(slot);
    }
  }
  /// All slots that were ever taken lie below.
  std::uint32_t end() const noexcept { return used_; }

 private:
  std::uint32_t used_ = 1;
  std::uint32_t free_singles_ = 0;
  std::uint32_t free_lines_ = 0;
  std::uint16_t singles_[Slots] = {};
  std::uint16_t lines_[Slots / per_line + 1] = {};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
