// SPDX-License-Identifier: MIT
#pragma once

// A lockfree_hlist whose few nodes come and go all the time, by every kind of removal.
//
// Oracle: a node has a stamp, {life, state}. A walk that finds the same life linked before and after must have met the
// node, once; and what is written between two lives (plain data) does not change while a walk that met it is in its
// section.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include <mmunotify/sync/lockfree_hlist.hpp>

#include "sync/torture/base.hpp"

namespace torture {

template <class Domain>
class list_torture {
  struct node;
  using list = mmunotify::lockfree_hlist<node, Domain>;
  using section = typename list::section;

 public:
  static constexpr std::size_t size = 5;

  list_torture(Domain& d, const char* name) : domain_(d), name_(name), list_(d) {
    for (std::size_t i = 0; i < size; ++i) {
      nodes_[i].index = i;
      nodes_[i].home = this;
    }
  }

  void change() {
    node& n = nodes_[self->random.below(size)];
    std::uint64_t s = n.stamp.load(std::memory_order_relaxed);
    switch (s % states) {
      case is_free:
        // (l1) acquire pairs with (l2): the last life is over.
        if (n.stamp.compare_exchange_strong(s, s - is_free + is_busy, std::memory_order_acquire)) insert(n);
        return;
      case is_linked:
        if (self->random.below(2) == 0) return remove(n, s);
        if (self->random.below(2) == 0) return static_cast<void>(remove_async(n, s));
        {
          const section inside(domain_);
          if (list_.remove(n) != mmunotify::errc::would_deadlock)
            fail("L7: remove inside a section of %s was not refused", name_);
          static_cast<void>(remove_async(n, s));
        }
        return;
      default: return;
    }
  }

  /// Also removes now and then what it stands on.
  void walk() {
    std::array<std::uint64_t, size> before{};
    std::array<std::uint64_t, size> met{};
    for (std::size_t i = 0; i < size; ++i)
      before[i] = nodes_[i].stamp.load(std::memory_order_acquire);  // (l3) and (l4)
    const section inside(domain_);
    for (node& n : list_) {
      const std::uint64_t life = n.life;
      if (n.check != ~life) fail("S2: a walk over the list of %s met a node that is not initialised", name_);
      if (met[n.index] != 0) fail("S1: a walk over the list of %s met the same node twice", name_);
      met[n.index] = life;
      if (self->random.below(8) == 0) dwell(self->random);
      if (self->random.below(32) == 0) static_cast<void>(remove_async(n, n.stamp.load(std::memory_order_relaxed)));
    }
    for (std::size_t i = 0; i < size; ++i) {
      const node& n = nodes_[i];
      if (before[i] % states == is_linked && met[i] == 0 &&
          n.stamp.load(std::memory_order_acquire) == before[i]) {  // (l3)
        fail("S1, H1: a node that is on the list of %s all the time was not met", name_);
      }
      if (met[i] != 0 && (n.life != met[i] || n.check != ~met[i])) {
        fail("S1: a node of the list of %s that a walk has met came back before the walk's section ended", name_);
      }
    }
    self->note(count::walk);
  }

  /// After the last change, and a barrier.
  void close() {
    for (node& n : nodes_) {
      const std::uint64_t s = n.stamp.load(std::memory_order_relaxed);
      if (s % states == is_linked) remove(n, s);
    }
    if (!list_.empty()) fail("H2: all nodes of the list of %s were removed, and it is not empty", name_);
  }

 private:
  static constexpr std::uint64_t states = 4;
  static constexpr std::uint64_t is_free = 0;
  static constexpr std::uint64_t is_linked = 1;
  static constexpr std::uint64_t is_leaving = 2;
  static constexpr std::uint64_t is_busy = 3;

  struct node : mmunotify::hlist_node {
    std::atomic<std::uint64_t> stamp{states + is_free};
    std::uint64_t life = 0;
    std::uint64_t check = 0;
    std::size_t index = 0;
    list_torture* home = nullptr;
    mmunotify::hlist_removal<node> removal;
  };

  /// Precondition: the caller has made it busy.
  void insert(node& n) noexcept {
    const std::uint64_t life = n.stamp.load(std::memory_order_relaxed) / states;
    n.life = life;
    n.check = ~life;
    if (list_.push_front(n) != mmunotify::errc::ok)
      fail("L9: a node of %s could not be inserted again after its removal", name_);
    n.stamp.store(life * states + is_linked, std::memory_order_release);  // (l4) pairs with (l3)
  }

  bool claim(node& n, std::uint64_t s) noexcept {
    return s % states == is_linked &&
           n.stamp.compare_exchange_strong(s, s - is_linked + is_leaving, std::memory_order_acquire);  // (l3)
  }

  /// Nobody can see it any more.
  static void spoil(node& n) noexcept { n.check = n.life = 0; }
  static void set_free(node& n) noexcept {
    const std::uint64_t life = n.stamp.load(std::memory_order_relaxed) / states;
    n.stamp.store((life + 1) * states + is_free, std::memory_order_release);  // (l2) pairs with (l1)
  }

  void remove(node& n, std::uint64_t s) {
    if (!claim(n, s)) return;
    const in_flight f("remove", name_);
    if (list_.remove(n) != mmunotify::errc::ok) fail("L1: a node that is on the list of %s cannot be removed", name_);
    spoil(n);
    set_free(n);
    self->note(count::remove);
  }

  bool remove_async(node& n, std::uint64_t s) noexcept {
    if (!claim(n, s)) return false;
    // What says that the callback comes back: each node is awaited by close().
    if (list_.remove_async(n, n.removal, &on_removed) != mmunotify::errc::ok)
      fail("L1: a node that is on the list of %s cannot be removed", name_);
    self->note(count::remove_async);
    return true;
  }

  static void on_removed(node& n) noexcept {
    spoil(n);
    list_torture& l = *n.home;
    const std::uint64_t life = n.stamp.load(std::memory_order_relaxed) / states;
    if (life % 2 == 0 || stop.load(std::memory_order_relaxed)) return set_free(n);
    n.stamp.store((life + 1) * states + is_busy, std::memory_order_relaxed);
    l.insert(n);
    l.reinserted_.fetch_add(1, std::memory_order_relaxed);
  }

 public:
  std::uint64_t reinserted() const noexcept { return reinserted_.load(std::memory_order_relaxed); }

 private:
  Domain& domain_;
  const char* name_;
  list list_;
  std::array<node, size> nodes_;
  std::atomic<std::uint64_t> reinserted_{0};
};

}  // namespace torture
