// SPDX-License-Identifier: MIT
#pragma once

// An intrusive singly linked list: lock-free writers, wait-free readers, nodes that come back.
//
// Contract: a reader inside a read section of the list's domain sees every node that is on the list for the whole of
// its walk, each once; new nodes come first. A node may be inserted again after its removal is complete.
//
// How (after T. Harris, "A pragmatic implementation of non-blocking linked-lists", DISC 2001): the low bit of a node's
// `next` marks the node as deleted. Whoever sets it owns the removal. A marked node's `next` never changes again, so a
// reader that stands on it walks on. The owner unlinks every marked node that it meets, from the head, until it reaches
// the end without having met one; then a grace period; then the node is free.
//
// Rule H1: whoever unlinks does so inside a read section. Without one, a delayed compare-exchange can succeed after its
// target was removed, waited for and inserted again, and drop a live node (a model checker finds it with three nodes).
// Rule H2: insertion is at the head only, so an unlinked node cannot become reachable again through a node that is.
//
// Cost: 1.4 ns per node and indirect call, the same as a plain list; removal is O(n).

#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// Derive from it to become a list element. 16 bytes. A linked node must not be destroyed (contract failure L1).
class hlist_node {
 public:
  hlist_node() = default;
  hlist_node(const hlist_node&) = delete;
  hlist_node& operator=(const hlist_node&) = delete;
  ~hlist_node() {
    // Relaxed: whoever destroys a node has synchronised with its removal.
    if (state_.load(std::memory_order_relaxed) != state::idle) [[unlikely]] {
      detail::violated("L1", "~hlist_node", "the node is still on a list");
    }
  }

  /// Returns: true from a successful insertion to the end of the removal's grace period. May be stale on arrival.
  bool linked() const noexcept { return state_.load(std::memory_order_relaxed) != state::idle; }

 private:
  template <std::derived_from<hlist_node> Node, class Domain>
  friend class lockfree_hlist;

  enum class state : std::uint8_t { idle, inserting, live, dying };

  std::atomic<std::uintptr_t> next_{0};  ///< the next hlist_node's address; bit 0: this node is deleted
  std::atomic<state> state_{state::idle};
};

/// What remove_async needs until the removal is complete; a member of the element, or anywhere else that lives on.
template <class Node>
struct hlist_removal : srcu_head {
  Node* node = nullptr;
  void (*done)(Node&) noexcept = nullptr;
};

template <std::derived_from<hlist_node> Node, class Domain = srcu_domain>
class lockfree_hlist {
 public:
  using section = basic_read_section<Domain>;

  explicit lockfree_hlist(Domain& domain) noexcept : domain_(domain) {}
  ~lockfree_hlist() {
    if (!empty()) detail::violated("L1", "~lockfree_hlist", "nodes are still on the list");
  }
  lockfree_hlist(const lockfree_hlist&) = delete;
  lockfree_hlist& operator=(const lockfree_hlist&) = delete;

  /// Returns: true if nothing is linked. May be stale on arrival. Progress: wait-free, one load.
  /// Ordering: (h4) acquire pairs with (h6): who finds it empty comes after what the owners of removed nodes did
  /// before.
  bool empty() const noexcept { return head_.load(std::memory_order_acquire) == 0; }

  /// Effects: inserts at the head. Errors: already_registered, on any list. Progress: lock-free.
  errc push_front(Node& node) noexcept {
    hlist_node& n = node;
    auto idle = hlist_node::state::idle;
    // (h1) acquire pairs with (h2): the last life's readers are gone before the links are written.
    if (!n.state_.compare_exchange_strong(idle, hlist_node::state::inserting, std::memory_order_acquire,
                                          std::memory_order_relaxed)) {
      return errc::already_registered;
    }
    std::uintptr_t first = head_.load(std::memory_order_relaxed);
    do {
      n.next_.store(first, std::memory_order_relaxed);
      // (h3) release pairs with (h4): the node is initialised for whoever finds it (S2).
    } while (!head_.compare_exchange_weak(first, address(n), std::memory_order_release, std::memory_order_relaxed));
    // (h7) release pairs with (h8): who marks the node finds it linked.
    n.state_.store(hlist_node::state::live, std::memory_order_release);
    return errc::ok;
  }

  /// Effects: marks the node as deleted; readers skip it from now on. Returns: true for the one caller who did it, and
  /// who now owes sweep(), a grace period and retire(). Progress: lock-free.
  [[nodiscard]] bool mark(Node& node) noexcept {
    if (!claim(node)) return false;
    mark_claimed(node);
    return true;
  }

  /// Effects: unlinks every marked node. When it returns, none that was marked before the call can be reached from the
  /// head. The section is the witness of rule H1. Progress: lock-free.
  void sweep(const section&) noexcept {
    while (!sweep_once()) {
    }
  }

  /// Effects: declares the removal complete; the node may be inserted again or destroyed. Precondition: mark() said
  /// true, sweep() has returned, and a grace period of the domain has passed since.
  static void retire(Node& node) noexcept {
    static_cast<hlist_node&>(node).state_.store(hlist_node::state::idle, std::memory_order_release);  // (h2)
  }

  /// Effects: the whole removal: mark, sweep, grace period, retire. Errors: not_registered (or another thread removes
  /// it); no_slot; would_deadlock inside a section of the domain (L7), nothing done. Progress: blocking.
  errc remove(Node& node) noexcept {
    if (const errc e = domain_.status(); e != errc::ok) return e;
    if (domain_.held_by_this_thread()) return errc::would_deadlock;
    if (!mark(node)) return errc::not_registered;
    unlink();
    if constexpr (!detail::mutated(detail::mutation::reuse_before_grace_period)) domain_.synchronize();
    retire(node);
    return errc::ok;
  }

  /// Effects: the same, without waiting: done(node) is called as a callback of the domain when the node is free again;
  /// it may insert it anew, or destroy it and `r`. Null: nobody is told. Preconditions: `r` is not in use (L6,
  /// checked); node and `r` stay until then. Errors: not_registered (or another thread removes it); no_slot. Progress:
  /// lock-free. Context: anywhere, also inside sections, walks and callbacks (L7).
  errc remove_async(Node& node, hlist_removal<Node>& r, void (*done)(Node&) noexcept = nullptr) noexcept {
    if (const errc e = domain_.status(); e != errc::ok) return e;
    if (!claim(node)) return errc::not_registered;
    if (r.function != nullptr) [[unlikely]] {  // only the owner of the removal may look
      unclaim(node);
      detail::violated("L6", "lockfree_hlist::remove_async", "the removal object is in use");
      return errc::already_registered;
    }
    mark_claimed(node);
    unlink();
    r.node = &node;
    r.done = done;
    // Not bounded by the domain's backlog: what is marked cannot be taken back, and there are only so many nodes.
    return domain_.call_unbounded(r, [](srcu_head* h) noexcept {
      const auto& finished = *static_cast<hlist_removal<Node>*>(h);
      Node& free = *finished.node;
      const auto tell = finished.done;
      retire(free);
      if (tell != nullptr) tell(free);
    });
  }

  /// Walks the nodes that are not deleted, newest first: `for (Node& n : list)`.
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
    hlist_node* here_ = nullptr;
    std::uintptr_t next_ = 0;  ///< read when the walk came here, so a node that is deleted under it is left behind
  };

  /// Precondition of a walk: inside a read section of the domain, which a bracket may hold without an object.
  /// Progress: wait-free. Context: whoever walks may sleep, insert, and mark; but not wait for the domain.
  [[gnu::always_inline]] iterator begin() const noexcept {
    return iterator(head_.load(std::memory_order_acquire));  // (h4) pairs with (h3), (h5), (h6)
  }
  static constexpr std::nullptr_t end() noexcept { return nullptr; }

 private:
  static constexpr std::uintptr_t deleted = 1;

  static std::uintptr_t address(hlist_node& n) noexcept { return reinterpret_cast<std::uintptr_t>(&n); }
  static hlist_node* node_at(std::uintptr_t link) noexcept { return reinterpret_cast<hlist_node*>(link); }

  /// Returns: true for the one caller who may mark the node, or take that back.
  static bool claim(hlist_node& n) noexcept {
    auto live = hlist_node::state::live;
    // (h8) acquire pairs with (h7).
    return n.state_.compare_exchange_strong(live, hlist_node::state::dying, std::memory_order_acquire,
                                            std::memory_order_relaxed);
  }
  static void unclaim(hlist_node& n) noexcept {
    n.state_.store(hlist_node::state::live, std::memory_order_release);  // (h7) pairs with (h8)
  }
  static void mark_claimed(hlist_node& n) noexcept {
    // (h5) release pairs with (h4): what was done before the deletion is visible to whoever sees the mark.
    n.next_.fetch_or(deleted, std::memory_order_release);
  }

  /// Rule H1.
  void unlink() noexcept {
    if constexpr (detail::mutated(detail::mutation::sweep_outside_section)) {
      while (!sweep_once()) {
      }
    } else {
      const section s(domain_);
      sweep(s);
    }
  }

  /// One walk. Returns: false if a neighbour changed under it and it must be repeated.
  bool sweep_once() noexcept {
    std::atomic<std::uintptr_t>* link = &head_;
    std::uintptr_t here = link->load(std::memory_order_acquire);  // (h4)
    while (here != 0) {
      // A predecessor that was deleted meanwhile shows its mark in the link: the walk must start anew.
      if ((here & deleted) != 0) return false;
      hlist_node* n = node_at(here);
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
      here = after;
    }
    return true;
  }

  Domain& domain_;
  std::atomic<std::uintptr_t> head_{0};
};

MMUNOTIFY_END_NAMESPACE
