// SPDX-License-Identifier: MIT
#pragma once

// Reverse mappings: from a guest frame to every shadow entry that maps it, and from a shadow page to every entry that
// links it.
//
// An invalidation names addresses, the shadow tables are indexed by guest virtual ones; without a way back each bracket
// would be a walk of everything. Most frames are mapped once, so a list of one costs one word and no memory besides:
//   0                        nothing
//   page | index << 1        one entry (shadow pages are aligned to 1 KiB, so ten bits are free)
//   chunk | 1                two or more, in chunks of 14 (128 bytes); only the first chunk may have room
// Adding takes at most one chunk from a stock, removing gives back at most one; neither allocates.
//
// Who may do what. Changes: under the MMU lock. Looking without it, to age: for_each_unlocked. Chunks are used again at
// once, so bit 1 of a word that names a chunk is a lock, which the writer takes as well; a list of one needs none,
// because a shadow page keeps its memory until the flush domain's grace period. Held for a few loads each.
//   (rm1) release at the publication and unlock / (rm2) acquire at the load and lock.
//
// Limits: an entry is searched chunk by chunk. A frame with `recycle_at` entries has its whole list zapped before it
// gets another one (shadow_tables::map), as in Linux, so that no list grows without bound.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/memory_cache.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

struct shadow_page;

/// What a shadow page is aligned to: nine bits for the index of an entry, one to tell lists from entries.
inline constexpr std::size_t shadow_page_alignment = 1024;

/// One entry of one shadow page.
struct entry_place {
  shadow_page* page = nullptr;
  unsigned index = 0;

  friend constexpr bool operator==(const entry_place&, const entry_place&) = default;
};

/// A part of a list of two or more.
struct rmap_chunk {
  static constexpr std::uint32_t capacity = 14;

  rmap_chunk* next_spare = nullptr;  ///< in a list: the next chunk, which is full
  std::uint32_t used = 0;
  std::uint32_t below = 0;  ///< entries in all the chunks after this one
  std::array<std::uintptr_t, capacity> entries;
};
static_assert(sizeof(rmap_chunk) == 128 && alignof(rmap_chunk) >= 4);

/// A set of entry places.
class entry_list {
 public:
  /// The length at which a frame's list is zapped instead of growing.
  static constexpr std::size_t recycle_at = 1000;

  bool empty() const noexcept { return word_.load(std::memory_order_relaxed) == 0; }

  /// Effects: adds the place. Preconditions: it is not in the list; the stock is not empty.
  void add(entry_place place, stock<rmap_chunk>& chunks) noexcept {
    const std::uintptr_t w = lock();
    if (w == 0) return unlock(pack(place));
    if (is_chunk(w) && chunk(w).used < rmap_chunk::capacity) {
      rmap_chunk& head = chunk(w);
      head.entries[head.used++] = pack(place);
      return unlock(w);
    }
    rmap_chunk& fresh = chunks.pop();
    fresh.used = 0;
    fresh.below = 0;
    if (is_chunk(w)) {
      fresh.next_spare = &chunk(w);
      fresh.below = chunk(w).used + chunk(w).below;
    } else {
      fresh.entries[fresh.used++] = w;
    }
    fresh.entries[fresh.used++] = pack(place);
    unlock(pack(fresh));
  }

  /// Effects: takes the place out; a chunk that is not needed any more goes to the stock. Returns: whether it was
  /// there.
  bool remove(entry_place place, stock<rmap_chunk>& chunks) noexcept {
    const std::uintptr_t w = lock(), wanted = pack(place);
    if (!is_chunk(w)) {
      unlock(w == wanted ? 0 : w);
      return w == wanted;
    }
    rmap_chunk& head = chunk(w);
    std::uintptr_t* const found = find(head, wanted);
    if (found == nullptr) {
      unlock(w);
      return false;
    }
    *found = head.entries[--head.used];
    unlock(shrunk(head, chunks));
    return true;
  }

  /// Precondition: not empty. Context: MMU lock.
  entry_place first() const noexcept {
    const std::uintptr_t w = unlocked(word_.load(std::memory_order_relaxed));
    return unpack(is_chunk(w) ? chunk(w).entries[chunk(w).used - 1] : w);
  }

  /// Calls f(entry_place) for each; f must not change the list. Context: MMU lock.
  template <class F>
  void for_each(F&& f) const {
    visit(unlocked(word_.load(std::memory_order_relaxed)), f);
  }

  /// The same without the MMU lock. f must be short: it runs while the list is locked.
  /// Context: inside a section of the flush domain.
  template <class F>
  void for_each_unlocked(F&& f) {
    const std::uintptr_t w = lock();
    visit(w, f);
    if (is_chunk(w)) unlock(w);
  }

  std::size_t count() const noexcept {
    const std::uintptr_t w = unlocked(word_.load(std::memory_order_relaxed));
    if (is_chunk(w)) return chunk(w).used + chunk(w).below;
    return w != 0 ? 1 : 0;
  }

  bool contains(entry_place place) const noexcept {
    bool found = false;
    for_each([&](entry_place p) { found = found || p == place; });
    return found;
  }

 private:
  static constexpr std::uintptr_t chunk_bit = 1, lock_bit = 2;

  // The lowest bit says what the others are: only beside it is bit 1 a lock, else it belongs to an index.
  static bool is_chunk(std::uintptr_t w) noexcept { return (w & chunk_bit) != 0; }
  static std::uintptr_t unlocked(std::uintptr_t w) noexcept { return is_chunk(w) ? w & ~lock_bit : w; }
  static rmap_chunk& chunk(std::uintptr_t w) noexcept {
    return *reinterpret_cast<rmap_chunk*>(w & ~(chunk_bit | lock_bit));
  }
  static std::uintptr_t pack(rmap_chunk& c) noexcept { return reinterpret_cast<std::uintptr_t>(&c) | chunk_bit; }
  static std::uintptr_t pack(entry_place p) noexcept {
    return reinterpret_cast<std::uintptr_t>(p.page) | std::uintptr_t{p.index} << 1;
  }
  static entry_place unpack(std::uintptr_t w) noexcept {
    constexpr std::uintptr_t low = shadow_page_alignment - 1;
    return {reinterpret_cast<shadow_page*>(w & ~low), static_cast<unsigned>((w & low) >> 1)};
  }

  /// Returns: the word, locked if it names a chunk.
  std::uintptr_t lock() noexcept {
    while (true) {
      std::uintptr_t w = word_.load(std::memory_order_acquire);  // (rm2) pairs with (rm1)
      if (!is_chunk(w)) return w;
      if ((w & lock_bit) != 0) continue;
      // (rm2) acquire pairs with (rm1).
      if (word_.compare_exchange_weak(w, w | lock_bit, std::memory_order_acquire, std::memory_order_relaxed)) return w;
    }
  }
  void unlock(std::uintptr_t w) noexcept { word_.store(w, std::memory_order_release); }  // (rm1) pairs with (rm2)

  static std::uintptr_t* find(rmap_chunk& head, std::uintptr_t wanted) noexcept {
    for (rmap_chunk* c = &head; c != nullptr; c = c->next_spare) {
      for (std::uint32_t i = 0; i < c->used; ++i) {
        if (c->entries[i] == wanted) return &c->entries[i];
      }
    }
    return nullptr;
  }

  /// Returns: the word for a list whose head has lost an entry.
  static std::uintptr_t shrunk(rmap_chunk& head, stock<rmap_chunk>& chunks) noexcept {
    std::uintptr_t w = pack(head);
    if (head.used == 0) {
      w = pack(*head.next_spare);  // it is full
      chunks.push(head);
    } else if (head.used == 1 && head.next_spare == nullptr) {
      w = head.entries[0];
      chunks.push(head);
    }
    return w;
  }

  template <class F>
  static void visit(std::uintptr_t w, F& f) {
    if (!is_chunk(w)) {
      if (w != 0) f(unpack(w));
      return;
    }
    for (const rmap_chunk* c = &chunk(w); c != nullptr; c = c->next_spare) {
      for (std::uint32_t i = 0; i < c->used; ++i) f(unpack(c->entries[i]));
    }
  }

  std::atomic<std::uintptr_t> word_{0};
};

static_assert(sizeof(entry_list) == sizeof(void*));

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
