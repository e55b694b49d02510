// SPDX-License-Identifier: MIT
#pragma once

// The links of an intrusive list whose nodes are deleted by a mark: the algorithm of lockfree_hlist.hpp, where it is
// explained, over any word that serves as a head. For structures with many heads and an owner for each node's life.
//
// Rules H1 and H2 of lockfree_hlist.hpp hold here, and are the caller's to keep: sweep() inside a read section of the
// domain that protects the nodes, insertion at the head only, no node again before a grace period after its sweep.

#include <atomic>
#include <cstddef>
#include <cstdint>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

class marked_list;

/// One link; 8 bytes.
class marked_node {
  friend class marked_list;
  std::atomic<std::uintptr_t> next_{0};  ///< the next node's address; bit 0: this node is deleted
};

class marked_list {
  static constexpr std::uintptr_t deleted = 1;

 public:
  using head = std::atomic<std::uintptr_t>;  ///< 0: empty

  /// Returns: true if nothing is linked.
  /// Ordering: (h4) acquire pairs with (h6): who finds it empty comes after what the owners of removed nodes did
  /// before.
  static bool empty(const head& h) noexcept { return h.load(std::memory_order_acquire) == 0; }

  /// Progress: lock-free.
  static void push_front(head& h, marked_node& n) noexcept {
    std::uintptr_t first = h.load(std::memory_order_relaxed);
    do {
      n.next_.store(first, std::memory_order_relaxed);
      // (h3) release pairs with (h4): the node is initialised for whoever finds it (S2).
    } while (!h.compare_exchange_weak(first, address(n), std::memory_order_release, std::memory_order_relaxed));
  }

  /// Readers skip the node from now on. Precondition: linked; by one caller.
  static void mark(marked_node& n) noexcept {
    // (h5) release pairs with (h4): what was done before the deletion is visible to whoever sees the mark.
    n.next_.fetch_or(deleted, std::memory_order_release);
  }

  /// Unlinks every marked node, and calls unlinked(node) for those that it unlinks: each is told of once, by whoever
  /// did it. Progress: lock-free.
  template <class Unlinked>
  static void sweep(head& h, Unlinked unlinked) noexcept {
    while (!sweep_once(h, unlinked)) {
    }
  }
  static void sweep(head& h) noexcept {
    sweep(h, [](marked_node&) {});
  }

  /// Returns: true if fewer than n nodes are linked, deleted ones included. May be stale. Inside a section.
  static bool shorter_than(const head& h, unsigned n) noexcept {
    std::uintptr_t here = h.load(std::memory_order_acquire);  // (h4) pairs with (h3), (h5), (h6)
    for (; here != 0 && n != 0; --n) here = node_at(here)->next_.load(std::memory_order_acquire) & ~deleted;  // (h4)
    return n != 0;
  }

  /// Walks the nodes that are not deleted, newest first.
  template <class Node>
  class iterator {
   public:
    [[gnu::always_inline]] explicit iterator(std::uintptr_t link) noexcept { settle(link); }
    [[gnu::always_inline]] Node& operator*() const noexcept { return static_cast<Node&>(*here_); }
    [[gnu::always_inline]] iterator& operator++() noexcept {
      settle(next_);
      return *this;
    }
    [[gnu::always_inline]] bool operator==(std::nullptr_t) const noexcept { return here_ == nullptr; }

   private:
    /// Goes to the first node from `link` on that is not deleted.
    [[gnu::always_inline]] void settle(std::uintptr_t link) noexcept {
      for (; link != 0; link = next_ & ~deleted) {
        here_ = node_at(link);
        next_ = here_->next_.load(std::memory_order_acquire);  // (h4)
        if ((next_ & deleted) == 0) [[likely]]
          return;
      }
      here_ = nullptr;
    }
    marked_node* here_ = nullptr;
    std::uintptr_t next_ = 0;  ///< read when the walk came here, so a node that is deleted under it is left behind
  };

 private:
  static std::uintptr_t address(marked_node& n) noexcept { return reinterpret_cast<std::uintptr_t>(&n); }
  static marked_node* node_at(std::uintptr_t link) noexcept { return reinterpret_cast<marked_node*>(link); }

  /// One walk. Returns: false if a neighbour changed under it and it must be repeated.
  template <class Unlinked>
  static bool sweep_once(head& h, Unlinked& unlinked) noexcept {
    std::atomic<std::uintptr_t>* link = &h;
    std::uintptr_t here = link->load(std::memory_order_acquire);  // (h4)
    while (here != 0) {
      // A predecessor that was deleted meanwhile shows its mark in the link: the walk must start anew.
      if ((here & deleted) != 0) return false;
      marked_node* const n = node_at(here);
      const std::uintptr_t next = n->next_.load(std::memory_order_acquire);  // (h4)
      if ((next & deleted) == 0) {
        link = &n->next_;
        here = next;
        continue;
      }
      const std::uintptr_t after = next & ~deleted;
      // (h6) release pairs with (h4): `after` was read with acquire; passing it on keeps its initialisation visible.
      if (!link->compare_exchange_strong(here, after, std::memory_order_release, std::memory_order_relaxed)) {
        return false;
      }
      unlinked(*n);
      here = after;
    }
    return true;
  }
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
