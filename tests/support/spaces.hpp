// SPDX-License-Identifier: MIT
#pragma once

// One face for the armable address spaces, so that a test runs over every arming policy.

#include <mutex>
#include <shared_mutex>

#include <mmunotify/interval/interval_notifier.hpp>
#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/notifier/keyed.hpp>

/// A primary MMU reduced to its lock and its address space.
template <class Arming, class Observer = mmunotify::observe::counters>
struct locking_primary {
  using space_type = mmunotify::address_space<Arming, Observer>;
  using reading = std::shared_lock<std::shared_mutex>;

  std::shared_mutex tables;
  space_type space;

  /// What a bracket is opened under.
  reading lock() { return reading(tables); }
  template <class Client>
  mmunotify::errc join(mmunotify::subscriber<Client>& node) {
    const std::unique_lock held(tables);
    return space.register_subscriber(node, held);
  }
  /// With what exists, if that is given.
  template <class Interval, class... Existing>
  mmunotify::errc insert(Interval& n, mmunotify::range r, const Existing&... existing) {
    const std::unique_lock held(tables);
    return space.insert(n, r, held, existing...);
  }
};

using under_primary = locking_primary<mmunotify::arming::under<std::shared_mutex>>;
using keyed_primary = locking_primary<mmunotify::arming::keyed<std::shared_mutex>>;

template <class Observer>
struct basic_tracked_primary {
  using space_type = mmunotify::address_space<mmunotify::arming::tracked, Observer>;
  struct reading {
    ~reading() {}  // stands for a lock
  };

  space_type space;

  static reading lock() { return {}; }
  template <class Client>
  mmunotify::errc join(mmunotify::subscriber<Client>& node) {
    return space.register_subscriber(node);
  }
  template <class Interval, class... Existing>
  mmunotify::errc insert(Interval& n, mmunotify::range r, const Existing&... existing) {
    return space.insert(n, r, existing...);
  }
};

using tracked_primary = basic_tracked_primary<mmunotify::observe::counters>;
