// SPDX-License-Identifier: MIT
#pragma once

// Which intervals overlap [a, b)? An index that is read, and changed, without locks.
//
// An interval with a length in (2^(k-1), 2^k] is of class k, and lies in the bucket (first >> k) of that class: so it
// reaches into the next bucket at most, and a question looks at the buckets (a >> k) - 1 .. (b - 1) >> k of each class
// that is in use. The buckets of a class are the leaves of a radix trie with 64 ways; a bucket is a list
// (sync/marked_list.hpp). A node has a bit for each slot that was ever used, so that a wide question skips what
// is empty.
//
// The life of a node. `population` counts the children, or the intervals, of a node, and whoever is about to add one.
// Who takes the last one freezes the node (0 -> frozen), which is final; it is then unlinked by whoever meets it, and
// freed after a grace period. Hence:
//   T1  who has raised the population of a node that was not frozen has a node that stays linked, with all above it;
//   T2  a frozen node has no children, and gets none;
//   T3  exactly one unlinks it: the one whose compare-exchange takes it from its parent's slot, who then owes the
//       parent's population one, and the node a grace period.
//
// Orderings:
//   (bt1) release of a link / (bt2) acquire: the child is initialised for whoever finds it.
//   (bt3) acq_rel on the population, both ends: who freezes a node comes after all that were done with it; who meets it
//   frozen may unlink it.
//
// Cost: 576 bytes a node. A look-up of one page of 4 KiB walks nine nodes, of which all but the last two are always in
// the first cache. Insertion allocates the nodes that are missing on its path.

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <new>

#include <mmunotify/config.hpp>
#include <mmunotify/sync/marked_list.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// Where an interval lies. Keys are numbers here, [first, last).
struct bucket_place {
  static constexpr unsigned classes = 64;

  unsigned size_class;
  std::uint64_t bucket;

  static constexpr bucket_place of(std::uint64_t first, std::uint64_t last) noexcept {
    // Longer than 2^63 is of class 63, too: that has two buckets, which are neighbours.
    const auto k = std::min(static_cast<unsigned>(std::bit_width(last - first - 1)), classes - 1);
    return {k, first >> k};
  }
  /// The buckets of class k that can hold something that overlaps [first, last).
  static constexpr std::uint64_t lowest(unsigned k, std::uint64_t first) noexcept {
    const std::uint64_t own = first >> k;
    if constexpr (mutated(mutation::interval_neighbour_forgotten)) return own;
    return own == 0 ? 0 : own - 1;
  }
  static constexpr std::uint64_t highest(unsigned k, std::uint64_t last) noexcept { return (last - 1) >> k; }
};

/// Entry derives from marked_node. Every function but the constructor is called inside a read section of the domain.
template <class Entry, class Domain = srcu_domain>
class bucket_trie {
  static constexpr unsigned bits = 6;
  static constexpr unsigned ways = 1U << bits;
  static constexpr std::uint32_t frozen = ~std::uint32_t{0};

 public:
  using head = marked_list::head;

  /// A node: of inner ones each slot is a child, of leaves a list.
  struct alignas(64) node : srcu_head {
    node(node* above, unsigned index_in_parent, unsigned level_shift) noexcept
        : parent(above), index(index_in_parent), shift(level_shift) {}

    std::atomic<std::uint64_t> used{0};  ///< slots that were ever used
    std::atomic<std::uint32_t> population{1};
    node* const parent;
    const unsigned index;
    const unsigned shift;  ///< of a bucket's number, before its lower bits are this node's index; 0: a leaf
    std::atomic<std::uintptr_t> slots[ways]{};

    head& list(std::uint64_t bucket) noexcept { return slots[bucket & (ways - 1)]; }
  };

  explicit bucket_trie(Domain& domain) noexcept : domain_(domain) {}
  bucket_trie(const bucket_trie&) = delete;
  bucket_trie& operator=(const bucket_trie&) = delete;
  ~bucket_trie() = default;

  /// Returns: true if no node is left. May be stale on arrival.
  bool empty() const noexcept { return top_.population.load(std::memory_order_acquire) == 1; }  // (bt3)

  /// Effects: the place's leaf exists, and stays until unpin. Returns: nullptr if there is no memory; then nothing has
  /// changed. Progress: lock-free, but for the allocator.
  [[nodiscard]] node* pin_leaf(bucket_place p) noexcept {
    while (true) {
      bool out_of_memory = false;
      node* const leaf = descend(p, out_of_memory);
      if (leaf != nullptr || out_of_memory) return leaf;
    }
  }

  /// Effects: the node stays until unpin (T1). Returns: false if it is frozen (T2).
  [[nodiscard]] static bool pin(node* n) noexcept {
    std::uint32_t p = n->population.load(std::memory_order_relaxed);
    while (p != frozen || mutated(mutation::interval_frozen_is_pinned)) {
      // (bt3) pairs with itself
      if (n->population.compare_exchange_weak(p, p + 1, std::memory_order_acq_rel, std::memory_order_relaxed)) {
        return true;
      }
    }
    return false;
  }

  /// Effects: gives up what pin_leaf gave; a node that is empty then goes, with those above it that become empty.
  void unpin(node* n) noexcept {
    while (n->population.fetch_sub(1, std::memory_order_acq_rel) == 1) {  // (bt3) pairs with itself
      std::uint32_t none = 0;
      if (!n->population.compare_exchange_strong(none, frozen, std::memory_order_acq_rel,  // (bt3)
                                                 std::memory_order_relaxed)) {
        return;
      }
      node* const above = take_from_parent(n);
      if (above == nullptr) return;
      n = above;
    }
  }

  /// The slot was used. Before the version that makes the entry known.
  static void mark_used(node* leaf, std::uint64_t bucket) noexcept {
    note_use(leaf, static_cast<unsigned>(bucket) & (ways - 1));
  }

  /// Calls f(entry) for every entry in the buckets that may overlap [first, last), by class and bucket, newest first in
  /// each, until it says false. Returns: false if it did. Precondition: first < last. Progress: wait-free.
  template <class F>
  [[gnu::always_inline]] bool walk(std::uint64_t first, std::uint64_t last, F&& f) {
    // (bt2) acquire pairs with (bt1).
    for (std::uint64_t classes = top_.used.load(std::memory_order_acquire); classes != 0; classes &= classes - 1) {
      const auto k = static_cast<unsigned>(std::countr_zero(classes));
      const std::uintptr_t root = top_.slots[k].load(std::memory_order_acquire);  // (bt2)
      if (root == 0) continue;
      if (!walk_node(node_at(root), bucket_place::lowest(k, first), bucket_place::highest(k, last), f)) return false;
    }
    return true;
  }

 private:
  static node* node_at(std::uintptr_t link) noexcept { return reinterpret_cast<node*>(link); }
  static std::uintptr_t address(node* n) noexcept { return reinterpret_cast<std::uintptr_t>(n); }
  /// The shift of the root of class k, whose buckets have 64 - k bits.
  static constexpr unsigned root_shift(unsigned k) noexcept { return (64 - k - 1) / bits * bits; }

  static void note_use(node* n, unsigned index) noexcept {
    const std::uint64_t bit = std::uint64_t{1} << index;
    if ((n->used.load(std::memory_order_relaxed) & bit) == 0) {
      n->used.fetch_or(bit, std::memory_order_release);  // (bt1) pairs with (bt2)
    }
  }

  /// T3. Precondition: frozen. Returns: the parent, whose population the caller owes one; nullptr if another did it.
  [[nodiscard]] node* take_from_parent(node* n) noexcept {
    node* const above = n->parent;
    std::uintptr_t link = address(n);
    // (bt1) pairs with (bt2): a new child in this slot comes after this one.
    if (!above->slots[n->index].compare_exchange_strong(link, 0, std::memory_order_acq_rel,
                                                        std::memory_order_relaxed)) {
      return nullptr;
    }
    // Unbounded: it cannot be put back. No error either: insertion has found the domain working.
    static_cast<void>(domain_.call_unbounded(*n, [](srcu_head* h) noexcept { delete static_cast<node*>(h); }));
    return above;
  }

  /// Returns: the pinned leaf; nullptr without memory, or when the path went away under it and it must try again.
  node* descend(bucket_place p, bool& out_of_memory) noexcept {
    node* n = &top_;
    unsigned index = p.size_class;
    unsigned below = root_shift(p.size_class);  // the shift of the child
    bool pinned = false;                        // n is, by us
    while (true) {
      std::uintptr_t child = n->slots[index].load(std::memory_order_acquire);  // (bt2) pairs with (bt1)
      if (child == 0) {
        if (!pinned && !pin(n)) return retreat(n);
        // From here on the pin is the child's, if it is ours.
        auto* const fresh = new (std::nothrow) node(n, index, below);
        if (fresh == nullptr) {
          out_of_memory = true;
          unpin(n);
          return nullptr;
        }
        note_use(n, index);
        // (bt1) pairs with (bt2)
        pinned = n->slots[index].compare_exchange_strong(child, address(fresh), std::memory_order_acq_rel,
                                                         std::memory_order_acquire);
        if (pinned) {
          child = address(fresh);  // with a population of 1: us
        } else {
          delete fresh;
          unpin(n);
        }
      } else if (pinned) {
        unpin(n);
        pinned = false;
      }
      n = node_at(child);
      if (n->shift == 0) break;
      index = static_cast<unsigned>(p.bucket >> n->shift) & (ways - 1);
      below = n->shift - bits;
    }
    if (!pinned && !pin(n)) return retreat(n);
    return n;
  }

  /// The node is frozen: helps to unlink it, so that the next attempt gets further.
  node* retreat(node* n) noexcept {
    if (node* const above = take_from_parent(n); above != nullptr) unpin(above);
    return nullptr;
  }

  /// lowest, highest: of the buckets' numbers, the part that is below this node.
  template <class F>
  static bool walk_node(node* n, std::uint64_t lowest, std::uint64_t highest, F& f) {
    // The part of the path that all buckets share.
    while (n->shift != 0 && (lowest >> n->shift) == (highest >> n->shift)) {
      const std::uintptr_t child =
          n->slots[(lowest >> n->shift) & (ways - 1)].load(std::memory_order_acquire);  // (bt2)
      if (child == 0) return true;
      n = node_at(child);
    }
    const auto from = static_cast<unsigned>(lowest >> n->shift) & (ways - 1);
    const auto to = static_cast<unsigned>(highest >> n->shift) & (ways - 1);
    if (n->shift == 0 && to - from < 8) {  // few lists: looking at them is cheaper than at the bits
      for (unsigned i = from; i <= to; ++i) fetch_early(n->slots[i]);
      for (unsigned i = from; i <= to; ++i) {
        if (!walk_list(n->slots[i], f)) return false;
      }
      return true;
    }
    const std::uint64_t wanted = (~std::uint64_t{0} >> (ways - 1 - to)) & (~std::uint64_t{0} << from);
    std::uint64_t used = n->used.load(std::memory_order_acquire) & wanted;  // (bt2) pairs with (bt1)
    for (; used != 0; used &= used - 1) {
      const auto i = static_cast<unsigned>(std::countr_zero(used));
      if (n->shift == 0) {
        if (!walk_list(n->slots[i], f)) return false;
        continue;
      }
      const std::uintptr_t child = n->slots[i].load(std::memory_order_acquire);  // (bt2)
      if (child == 0) continue;
      const std::uint64_t all = (std::uint64_t{1} << n->shift) - 1;
      if (!walk_node(node_at(child), i == from ? lowest & all : 0, i == to ? highest & all : all, f)) return false;
    }
    return true;
  }

  /// The entry, and what lies behind it: two misses at a time instead of one after the other.
  [[gnu::always_inline]] static void fetch_early(const head& h) noexcept {
    const std::uintptr_t first = h.load(std::memory_order_relaxed);
    if (first == 0) return;
    __builtin_prefetch(reinterpret_cast<const void*>(first));
    __builtin_prefetch(reinterpret_cast<const void*>(first + 64));
  }

  template <class F>
  [[gnu::always_inline]] static bool walk_list(const head& h, F& f) {
    marked_list::iterator<Entry> it(h.load(std::memory_order_acquire));  // (h4), see marked_list.hpp
    for (; it != nullptr; ++it) {
      if (!f(*it)) return false;
    }
    return true;
  }

  Domain& domain_;
  node top_{nullptr, 0, 0};  ///< its slots are the classes; never frozen
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
