// SPDX-License-Identifier: MIT
#pragma once

// The page table of a software primary MMU: a radix tree of 64-bit entries, one per 4 KiB page, with a lock in each.
//
// Five levels of 512, as in hardware. Nodes appear while the primary's lock is held shared (two threads that fault
// beside each other both may add one: the loser of the compare-exchange frees its own), and disappear only while it
// is held exclusive; so a pointer to an entry stays good for as long as the primary's lock is held in any way.
//
// An entry changes only under its lock bit. The lock is a leaf: who has one may take the frame pool's lock and no
// other, never a second entry's, and never runs a callback. So holders are done after the time of a page copy at most,
// and waiters spin, then yield.
//
// Huge pages. A slot of the second level is one 2 MiB mapping when its huge mark is set: all 512 entries below are
// present, their frames are a block, and all are writable or none is. The entries stay, as Linux deposits a page table
// under each huge entry: so splitting is one store that cannot fail, and bits per small page (young, soft-dirty) lose
// nothing. The mark is set while the primary's lock is held exclusive, and cleared before an entry below changes alone.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/range.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// One entry's value without its lock: nothing (all zero); a frame that the processor may use, or one that a device has
/// for itself (exclusive); a page of device memory; or a swap slot.
struct page_entry {
  std::uint64_t bits = 0;

  static constexpr std::uint64_t present_bit = 1;
  static constexpr std::uint64_t swapped_bit = 2;
  static constexpr std::uint64_t young_bit = 4;
  static constexpr std::uint64_t lock_bit = 8;
  static constexpr std::uint64_t writable_bit = 16;  ///< of a present one only: writes need no fault
  static constexpr std::uint64_t soft_dirty_bit =
      32;                                          ///< written, or made, since clear_soft_dirty; writable implies it
  static constexpr std::uint64_t device_bit = 64;  ///< the contents are in the device's memory
  static constexpr std::uint64_t exclusive_bit = 128;  ///< a frame that its owner alone may use

  static constexpr page_entry mapping(pfn f, bool young) noexcept {
    return {f.value << page_shift | present_bit | (young ? young_bit : 0)};
  }
  static constexpr page_entry swapped_to(pfn slot) noexcept { return {slot.value << page_shift | swapped_bit}; }

  static constexpr page_entry on_device(pfn page) noexcept { return {page.value << page_shift | device_bit}; }
  /// The same bits for another frame.
  constexpr page_entry at(pfn f) const noexcept { return {f.value << page_shift | (bits & page_mask)}; }
  constexpr page_entry with(std::uint64_t set) const noexcept { return {bits | set}; }
  constexpr page_entry without(std::uint64_t cleared) const noexcept { return {bits & ~cleared}; }

  constexpr bool none() const noexcept {
    return (bits & (present_bit | swapped_bit | device_bit | exclusive_bit)) == 0;
  }
  constexpr bool present() const noexcept { return (bits & present_bit) != 0; }
  constexpr bool swapped() const noexcept { return (bits & swapped_bit) != 0; }
  constexpr bool young() const noexcept { return (bits & young_bit) != 0; }
  constexpr bool writable() const noexcept { return (bits & writable_bit) != 0; }
  constexpr bool soft_dirty() const noexcept { return (bits & soft_dirty_bit) != 0; }
  constexpr bool device() const noexcept { return (bits & device_bit) != 0; }
  constexpr bool exclusive() const noexcept { return (bits & exclusive_bit) != 0; }
  /// It holds on to a frame of the memory.
  constexpr bool has_frame() const noexcept { return present() || exclusive(); }
  /// The frame, the device's page, or the swap slot.
  constexpr pfn frame() const noexcept { return {bits >> page_shift}; }
};

/// Where an entry lives.
using page_slot = std::atomic<std::uint64_t>;

/// An entry, locked for as long as this object lives. Its value is read and changed here, and written back with the
/// unlocking. Progress: blocking, for the holder's time.
class locked_entry {
 public:
  explicit locked_entry(page_slot& slot) noexcept : locked_entry(slot, std::try_to_lock) {
    for (unsigned tries = 1; !locked_; tries += 1) {
      if (tries % 64 == 0) std::this_thread::yield();
      try_lock();
    }
  }
  /// The same without waiting: whether the entry is locked is what the object converts to.
  locked_entry(page_slot& slot, std::try_to_lock_t) noexcept : slot_(slot) { try_lock(); }
  locked_entry(const locked_entry&) = delete;
  locked_entry& operator=(const locked_entry&) = delete;
  ~locked_entry() {
    // (pt2) release pairs with (pt1).
    if (locked_) slot_.store(value.bits & ~page_entry::lock_bit, std::memory_order_release);
  }

  explicit operator bool() const noexcept { return locked_; }

  page_entry value;

 private:
  void try_lock() noexcept {
    std::uint64_t bits = slot_.load(std::memory_order_relaxed);
    // (pt1) acquire pairs with (pt2): the previous holder's changes to the entry and to the frame behind it.
    locked_ = (bits & page_entry::lock_bit) == 0 &&
              slot_.compare_exchange_strong(bits, bits | page_entry::lock_bit, std::memory_order_acquire,
                                            std::memory_order_relaxed);
    if (locked_) value.bits = bits;
  }

  page_slot& slot_;
  bool locked_ = false;
};

class page_table {
 public:
  /// What a huge page maps.
  static constexpr std::uint64_t block_size = page_size * 512;
  /// Addresses from here on have no entry: 57 bits, as five levels have in hardware.
  static constexpr std::uint64_t address_limit = std::uint64_t{1} << 57;

  page_table() = default;
  page_table(const page_table&) = delete;
  page_table& operator=(const page_table&) = delete;
  ~page_table() { prune({0, address_limit}, true); }

  /// The entry's value now; stale on arrival unless the primary's lock is held exclusive.
  /// Preconditions: a < address_limit; the primary's lock is held. Progress: wait-free.
  page_entry peek(std::uintptr_t a) const noexcept {
    const node* n = &root_;
    for (unsigned level = top; level != 0; level -= 1) {
      n = child(n->slots[index(a, level)]);
      if (n == nullptr) return {};
    }
    return {n->slots[index(a, 0)].load(std::memory_order_relaxed) & ~page_entry::lock_bit};
  }

  /// The entry's place, made if need be. Returns: null when memory ran out.
  /// Preconditions: a < address_limit; the primary's lock is held, shared or exclusive. Progress: lock-free.
  page_slot* reach(std::uintptr_t a) noexcept {
    node* n = &root_;
    for (unsigned level = top; level != 0; level -= 1) {
      page_slot& slot = n->slots[index(a, level)];
      n = child(slot);
      if (n == nullptr) n = add_child(slot);
      if (n == nullptr) return nullptr;
    }
    return &n->slots[index(a, 0)];
  }

  /// Calls f(address of the page, its page_slot&) for the entries of r that are not empty, in order of address.
  /// Preconditions: r is page-aligned and ends at address_limit or before; the primary's lock is held.
  template <class Function>
  void for_each(const range& r, Function f) noexcept {
    walk(root_, top, 0, r, f);
  }

  /// The entry's place, or null: there is none yet. Preconditions: as peek. Progress: wait-free.
  page_slot* find(std::uintptr_t a) noexcept {
    node* n = &root_;
    for (unsigned level = top; n != nullptr && level != 0; level -= 1) n = child(n->slots[index(a, level)]);
    return n == nullptr ? nullptr : &n->slots[index(a, 0)];
  }

  /// The 2 MiB around an address.
  static constexpr range block_of(std::uint64_t a) noexcept {
    const std::uint64_t first = a & ~(block_size - 1);
    return {first, first + block_size};
  }

  /// The block around a is one mapping. Preconditions: as peek. Progress: wait-free.
  bool huge(std::uintptr_t a) const noexcept {
    const page_slot* const slot = block_slot(a);
    return slot != nullptr && (slot->load(std::memory_order_relaxed) & huge_mark) != 0;
  }
  /// Preconditions: as peek; all entries of the block exist; to mark, the primary's lock is held exclusive.
  void set_huge(std::uintptr_t a) noexcept { block_slot(a)->fetch_or(huge_mark, std::memory_order_relaxed); }
  /// Returns: whether it was marked, of several threads to one. Preconditions: as peek.
  bool clear_huge(std::uintptr_t a) noexcept {
    page_slot* const slot = block_slot(a);
    return slot != nullptr && (slot->fetch_and(~huge_mark, std::memory_order_relaxed) & huge_mark) != 0;
  }

  /// Calls f(the block's address, whether it is huge) for the blocks that have entries and that r touches, in order.
  /// Preconditions: as for_each.
  template <class Function>
  void for_each_block(const range& r, Function f) noexcept {
    walk_blocks(root_, top, 0, r, f);
  }
  /// The same for huge ones: f(the block's address).
  template <class Function>
  void for_each_huge(const range& r, Function f) noexcept {
    for_each_block(r, [&](std::uintptr_t first, bool is_huge) {
      if (is_huge) f(first);
    });
  }

  /// Frees the nodes below which r has only empty entries.
  /// Preconditions: as for_each; the primary's lock is held exclusive.
  void prune(const range& r) noexcept { prune(r, false); }

  /// How many nodes there are besides the root.
  std::size_t nodes() const noexcept { return nodes_.load(std::memory_order_relaxed); }

 private:
  static constexpr unsigned index_bits = 9;
  static constexpr std::size_t fan_out = std::size_t{1} << index_bits;
  static constexpr unsigned top = 4;
  static constexpr std::uint64_t huge_mark = 1;  ///< beside the pointer in a slot of level 1

  struct node {
    page_slot slots[fan_out] = {};  ///< at level 0 page entries, above them pointers to nodes or null
  };

  static constexpr std::uint64_t bytes_per_slot(unsigned level) noexcept { return page_size << (index_bits * level); }
  static constexpr std::size_t index(std::uint64_t a, unsigned level) noexcept {
    return static_cast<std::size_t>(a / bytes_per_slot(level)) % fan_out;
  }
  static node* child(const page_slot& slot) noexcept {
    // (pt3) acquire pairs with (pt4): the node's entries are initialised.
    return reinterpret_cast<node*>(static_cast<std::uintptr_t>(slot.load(std::memory_order_acquire) & ~huge_mark));
  }

  /// The slot of level 1 above a's entry; null if there is none.
  const page_slot* block_slot(std::uintptr_t a) const noexcept {
    const node* n = &root_;
    for (unsigned level = top; level != 1; level -= 1) {
      n = child(n->slots[index(a, level)]);
      if (n == nullptr) return nullptr;
    }
    return child(n->slots[index(a, 1)]) != nullptr ? &n->slots[index(a, 1)] : nullptr;
  }
  page_slot* block_slot(std::uintptr_t a) noexcept {
    return const_cast<page_slot*>(static_cast<const page_table&>(*this).block_slot(a));
  }

  node* add_child(page_slot& slot) noexcept {
    node* made = new (std::nothrow) node;
    if (made == nullptr) return nullptr;
    std::uint64_t found = 0;
    // (pt4) release pairs with (pt3); acquire pairs with (pt4) of the thread that was faster.
    if (slot.compare_exchange_strong(found, reinterpret_cast<std::uintptr_t>(made), std::memory_order_acq_rel,
                                     std::memory_order_acquire)) {
      nodes_.fetch_add(1, std::memory_order_relaxed);
      return made;
    }
    delete made;
    return reinterpret_cast<node*>(static_cast<std::uintptr_t>(found & ~huge_mark));
  }

  /// The addresses that a slot of the node that begins at `base` stands for.
  static constexpr range slot_range(std::uint64_t base, unsigned level, std::size_t i) noexcept {
    return {base + i * bytes_per_slot(level), base + (i + 1) * bytes_per_slot(level)};
  }

  /// Calls visit(slot, its range) for those slots of a node that r touches and that are not empty.
  template <class Visit>
  static void each_slot(node& n, unsigned level, std::uint64_t base, const range& r, Visit visit) noexcept {
    const range part = r.clipped_to({base, base + fan_out * bytes_per_slot(level)});
    if (part.empty()) return;
    const std::size_t last = index(part.last - 1, level);
    for (std::size_t i = index(part.first, level); i <= last; i += 1) {
      if (n.slots[i].load(std::memory_order_relaxed) != 0) visit(n.slots[i], slot_range(base, level, i));
    }
  }

  template <class Function>
  static void walk(node& n, unsigned level, std::uint64_t base, const range& r, Function& f) noexcept {
    each_slot(n, level, base, r, [&](page_slot& slot, const range& covered) {
      if (level == 0) {
        f(covered.first, slot);
      } else {
        walk(*child(slot), level - 1, covered.first, r, f);
      }
    });
  }

  template <class Function>
  static void walk_blocks(node& n, unsigned level, std::uint64_t base, const range& r, Function& f) noexcept {
    each_slot(n, level, base, r, [&](page_slot& slot, const range& covered) {
      if (level != 1) {
        walk_blocks(*child(slot), level - 1, covered.first, r, f);
      } else {
        f(covered.first, (slot.load(std::memory_order_relaxed) & huge_mark) != 0);
      }
    });
  }

  void prune(const range& r, bool everything) noexcept { prune_below(root_, top, 0, r, everything); }

  void prune_below(node& n, unsigned level, std::uint64_t base, const range& r, bool everything) noexcept {
    if (level == 0) return;
    each_slot(n, level, base, r, [&](page_slot& slot, const range& covered) {
      node* below = child(slot);
      prune_below(*below, level - 1, covered.first, r, everything);
      if (!everything && !empty(*below)) return;
      slot.store(0, std::memory_order_relaxed);  // nobody else is in the tree
      nodes_.fetch_sub(1, std::memory_order_relaxed);
      delete below;
    });
  }

  static bool empty(const node& n) noexcept {
    for (const page_slot& slot : n.slots) {
      if (slot.load(std::memory_order_relaxed) != 0) return false;
    }
    return true;
  }

  node root_;
  std::atomic<std::size_t> nodes_{0};
};

MMUNOTIFY_END_NAMESPACE
