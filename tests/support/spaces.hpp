// SPDX-License-Identifier: MIT
#pragma once

// One face for the armable address spaces, so that a test runs over every arming policy.

#include <mutex>
#include <shared_mutex>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/notifier/keyed.hpp>

/// A primary MMU reduced to its lock and its address space.
template <class Arming>
struct locking_primary {
  using space_type = mmunotify::address_space<Arming, mmunotify::observe::counters>;
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
};

using under_primary = locking_primary<mmunotify::arming::under<std::shared_mutex>>;
using keyed_primary = locking_primary<mmunotify::arming::keyed<std::shared_mutex>>;

struct tracked_primary {
  using space_type = mmunotify::address_space<mmunotify::arming::tracked, mmunotify::observe::counters>;
  struct reading {
    ~reading() {}  // stands for a lock
  };

  space_type space;

  static reading lock() { return {}; }
  template <class Client>
  mmunotify::errc join(mmunotify::subscriber<Client>& node) {
    return space.register_subscriber(node);
  }
};
