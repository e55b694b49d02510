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
#include <mmunotify/sync/marked_list.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// Derive from it to become a list element. 16 bytes. A linked node must not be destroyed (contract failure L1).
class hlist_node : public detail::marked_node {
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
  /// Ordering: who finds it empty comes after what the owners of removed nodes did before.
  bool empty() const noexcept { return detail::marked_list::empty(head_); }

  /// Effects: inserts at the head. Errors: already_registered, on any list. Progress: lock-free.
  errc push_front(Node& node) noexcept {
    hlist_node& n = node;
    auto idle = hlist_node::state::idle;
    // (h1) acquire pairs with (h2): the last life's readers are gone before the links are written.
    if (!n.state_.compare_exchange_strong(idle, hlist_node::state::inserting, std::memory_order_acquire,
                                          std::memory_order_relaxed)) {
      return errc::already_registered;
    }
    detail::marked_list::push_front(head_, n);
    // (h7) release pairs with (h8): who marks the node finds it linked.
    n.state_.store(hlist_node::state::live, std::memory_order_release);
    return errc::ok;
  }

  /// Effects: marks the node as deleted; readers skip it from now on. Returns: true for the one caller who did it, and
  /// who now owes sweep(), a grace period and retire(). Progress: lock-free.
  [[nodiscard]] bool mark(Node& node) noexcept {
    if (!claim(node)) return false;
    detail::marked_list::mark(node);
    return true;
  }

  /// Effects: unlinks every marked node. When it returns, none that was marked before the call can be reached from the
  /// head. The section is the witness of rule H1. Progress: lock-free.
  void sweep(const section&) noexcept { detail::marked_list::sweep(head_); }

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
    detail::marked_list::mark(node);
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
  using iterator = detail::marked_list::iterator<Node>;

  /// Precondition of a walk: inside a read section of the domain, which a bracket may hold without an object.
  /// Progress: wait-free. Context: whoever walks may sleep, insert, and mark; but not wait for the domain.
  [[gnu::always_inline]] iterator begin() const noexcept {
    // (h4) acquire pairs with (h3), (h5), (h6), which are in marked_list.hpp.
    return iterator(head_.load(std::memory_order_acquire));
  }
  static constexpr std::nullptr_t end() noexcept { return nullptr; }

 private:
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

  /// Rule H1.
  void unlink() noexcept {
    if constexpr (detail::mutated(detail::mutation::sweep_outside_section)) {
      detail::marked_list::sweep(head_);
    } else {
      const section s(domain_);
      sweep(s);
    }
  }

  Domain& domain_;
  detail::marked_list::head head_{0};
};

MMUNOTIFY_END_NAMESPACE
