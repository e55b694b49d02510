// SPDX-License-Identifier: MIT
#pragma once

// Reverse mappings: from a guest frame to every shadow entry that maps it, and from a shadow page to every entry that
// links it.
//
// An invalidation names addresses, the shadow tables are indexed by guest virtual ones; without a way back each bracket
// would be a walk of everything. Most frames are mapped once, so a list of one costs one word and no node: the word is
//   0                        nothing
//   page | index << 1        one entry (shadow pages are aligned to 1 KiB, so ten bits are free)
//   node | 1                 a node: one entry, and the rest of the list, which is such a word again
// Adding to a list that is not empty takes exactly one node from a stock, removing from one of two or more gives one
// back; neither allocates.
//
// Not synchronised: everything here happens under the MMU lock.
//
// Limits: a list is searched from its head; a frame that thousands of entries map is slow to unmap one by one.

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

/// A list's second and further entries. See above.
struct rmap_node {
  std::uintptr_t entry = 0;
  std::uintptr_t rest = 0;
  rmap_node* next_spare = nullptr;
};

/// A set of entry places.
class entry_list {
 public:
  bool empty() const noexcept { return word_ == 0; }

  /// Effects: adds the place. Preconditions: it is not in the list; the stock is not empty unless the list is.
  void add(entry_place place, stock<rmap_node>& nodes) noexcept {
    if (word_ == 0) {
      word_ = pack(place);
      return;
    }
    rmap_node& n = nodes.pop();
    n.entry = pack(place);
    n.rest = word_;
    word_ = pack(n);
  }

  /// Effects: takes the place out; a node that is not needed any more goes to the stock. Returns: whether it was there.
  bool remove(entry_place place, stock<rmap_node>& nodes) noexcept {
    const std::uintptr_t wanted = pack(place);
    std::uintptr_t* link = &word_;
    std::uintptr_t* before = nullptr;  // the link to the node whose `rest` is *link
    while (is_node(*link)) {
      rmap_node& n = node(*link);
      if (n.entry == wanted) {
        *link = n.rest;
        nodes.push(n);
        return true;
      }
      before = link;
      link = &n.rest;
    }
    if (*link != wanted) return false;
    if (before == nullptr) {
      word_ = 0;
      return true;
    }
    rmap_node& n = node(*before);  // the last node: its entry becomes the last word
    *before = n.entry;
    nodes.push(n);
    return true;
  }

  /// Precondition: not empty.
  entry_place first() const noexcept { return unpack(is_node(word_) ? node(word_).entry : word_); }

  /// Calls f(entry_place) for each; f must not change the list.
  template <class F>
  void for_each(F&& f) const {
    std::uintptr_t w = word_;
    for (; is_node(w); w = node(w).rest) f(unpack(node(w).entry));
    if (w != 0) f(unpack(w));
  }

  std::size_t count() const noexcept {
    std::size_t n = 0;
    for_each([&](entry_place) { ++n; });
    return n;
  }

  bool contains(entry_place place) const noexcept {
    bool found = false;
    for_each([&](entry_place p) { found = found || p == place; });
    return found;
  }

 private:
  static bool is_node(std::uintptr_t w) noexcept { return (w & 1) != 0; }
  static rmap_node& node(std::uintptr_t w) noexcept { return *reinterpret_cast<rmap_node*>(w - 1); }
  static std::uintptr_t pack(rmap_node& n) noexcept { return reinterpret_cast<std::uintptr_t>(&n) | 1; }
  static std::uintptr_t pack(entry_place p) noexcept {
    return reinterpret_cast<std::uintptr_t>(p.page) | std::uintptr_t{p.index} << 1;
  }
  static entry_place unpack(std::uintptr_t w) noexcept {
    constexpr std::uintptr_t low = shadow_page_alignment - 1;
    return {reinterpret_cast<shadow_page*>(w & ~low), static_cast<unsigned>((w & low) >> 1)};
  }

  std::uintptr_t word_ = 0;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
