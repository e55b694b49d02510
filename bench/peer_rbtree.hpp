// SPDX-License-Identifier: MIT
#pragma once

// What intervals are measured against: a red-black tree with the greatest end below each node, as kernels and
// registration caches keep them, under one std::shared_mutex, held while the callbacks run.

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <shared_mutex>

namespace interval_bench {

struct rb_node {
  std::uint64_t first = 0;
  std::uint64_t last = 0;
  std::uint64_t greatest = 0;  ///< end below and here
  rb_node* parent = nullptr;
  rb_node* child[2] = {nullptr, nullptr};
  bool red = false;
  void (*call)(rb_node&) = nullptr;
};

/// By the algorithms of Cormen et al., Introduction to Algorithms, chapter 13, with the mirrored cases folded.
class rb_tree {
 public:
  void insert(rb_node& n) {
    rb_node* above = nullptr;
    rb_node** link = &root_;
    while (*link != nullptr) {
      above = *link;
      above->greatest = std::max(above->greatest, n.last);
      link = &above->child[n.first >= above->first];
    }
    n.parent = above;
    n.child[0] = n.child[1] = nullptr;
    n.red = true;
    n.greatest = n.last;
    *link = &n;
    balance_after_insert(&n);
  }

  void erase(rb_node& n) {
    rb_node* out = &n;  // leaves its place in the tree
    if (n.child[0] != nullptr && n.child[1] != nullptr) {
      out = n.child[1];
      while (out->child[0] != nullptr) out = out->child[0];
    }
    rb_node* below = out->child[0] != nullptr ? out->child[0] : out->child[1];
    rb_node* above = out->parent;
    const bool was_red = out->red;
    replace(out, below);
    if (out != &n) {  // takes the place of n
      if (above == &n) above = out;
      replace(&n, out);
      out->red = n.red;
      for (int i = 0; i < 2; ++i) {
        out->child[i] = n.child[i];
        if (out->child[i] != nullptr) out->child[i]->parent = out;
      }
    }
    for (rb_node* p = above; p != nullptr; p = p->parent) update(p);
    if (!was_red) balance_after_erase(below, above);
  }

  /// Calls f(node) for those that overlap [first, last), in order.
  template <class F>
  void overlapping(std::uint64_t first, std::uint64_t last, F& f) const {
    visit(root_, first, last, f);
  }

 private:
  template <class F>
  static void visit(rb_node* n, std::uint64_t first, std::uint64_t last, F& f) {
    while (n != nullptr && n->greatest > first) {
      if (n->child[0] != nullptr && n->child[0]->greatest > first) visit(n->child[0], first, last, f);
      if (n->first >= last) return;
      if (n->last > first) f(*n);
      n = n->child[1];
    }
  }

  static bool is_red(const rb_node* n) { return n != nullptr && n->red; }
  static void update(rb_node* n) {
    n->greatest = n->last;
    for (const rb_node* c : n->child) {
      if (c != nullptr) n->greatest = std::max(n->greatest, c->greatest);
    }
  }
  void replace(rb_node* n, rb_node* by) {
    rb_node* const above = n->parent;
    (above == nullptr ? root_ : above->child[n == above->child[1]]) = by;
    if (by != nullptr) by->parent = above;
  }
  /// n goes down to the side.
  void rotate(rb_node* n, int side) {
    rb_node* const up = n->child[1 - side];
    n->child[1 - side] = up->child[side];
    if (up->child[side] != nullptr) up->child[side]->parent = n;
    replace(n, up);
    up->child[side] = n;
    n->parent = up;
    update(n);
    update(up);
  }

  void balance_after_insert(rb_node* n) {
    while (is_red(n->parent)) {
      rb_node* const grand = n->parent->parent;
      const int side = n->parent == grand->child[1];
      rb_node* const uncle = grand->child[1 - side];
      if (is_red(uncle)) {
        n->parent->red = uncle->red = false;
        grand->red = true;
        n = grand;
        continue;
      }
      if (n == n->parent->child[1 - side]) {
        n = n->parent;
        rotate(n, side);
      }
      n->parent->red = false;
      grand->red = true;
      rotate(grand, 1 - side);
    }
    root_->red = false;
  }

  void balance_after_erase(rb_node* n, rb_node* above) {
    while (n != root_ && !is_red(n)) {
      const int side = n == above->child[1];
      rb_node* other = above->child[1 - side];
      if (is_red(other)) {
        other->red = false;
        above->red = true;
        rotate(above, side);
        other = above->child[1 - side];
      }
      if (!is_red(other->child[0]) && !is_red(other->child[1])) {
        other->red = true;
        n = above;
        above = n->parent;
        continue;
      }
      if (!is_red(other->child[1 - side])) {
        other->child[side]->red = false;
        other->red = true;
        rotate(other, 1 - side);
        other = above->child[1 - side];
      }
      other->red = above->red;
      above->red = false;
      other->child[1 - side]->red = false;
      rotate(above, side);
      n = root_;
    }
    if (n != nullptr) n->red = false;
  }

  rb_node* root_ = nullptr;
};

/// Notifies under the shared lock, changes under the exclusive one.
class locked_rb_tree {
 public:
  void insert(rb_node& n) {
    const std::lock_guard lock(mutex_);
    tree_.insert(n);
  }
  void erase(rb_node& n) {
    const std::lock_guard lock(mutex_);
    tree_.erase(n);
  }
  void notify(std::uint64_t first, std::uint64_t last) {
    const std::shared_lock lock(mutex_);
    auto call = [](rb_node& n) { n.call(n); };
    tree_.overlapping(first, last, call);
  }

 private:
  std::shared_mutex mutex_;
  rb_tree tree_;
};

}  // namespace interval_bench
