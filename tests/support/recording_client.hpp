// SPDX-License-Identifier: MIT
#pragma once

// Clients that write down what they are told.

#include <atomic>
#include <string>
#include <vector>

#include <mmunotify/base/invalidation.hpp>

/// Single-threaded: the calls in their order, "name:start[first,last)" and so on, in a common log.
struct logging_client {
  std::vector<std::string>& log;
  std::string name;
  bool young = false;
  bool refuses = false;

  void note(const std::string& what) { log.push_back(name + ":" + what); }
  static std::string text(mmunotify::range r) {
    return "[" + std::to_string(r.first) + "," + std::to_string(r.last) + ")";
  }
  bool invalidate_range_start(const mmunotify::invalidation& i) {
    note("start" + text(i.range));
    return i.blockable || !refuses;
  }
  void invalidate_range_end(const mmunotify::invalidation& i) { note("end" + text(i.range)); }
  bool clear_flush_young(mmunotify::range) {
    note("clear_flush_young");
    return young;
  }
  bool clear_young(mmunotify::range) {
    note("clear_young");
    return young;
  }
  bool test_young(mmunotify::range) {
    note("test_young");
    return young;
  }
  void release() { note("release"); }
};

/// Counts, from any thread.
struct counting_client {
  std::atomic<int> starts{0};
  std::atomic<int> ends{0};
  std::atomic<int> releases{0};
  std::atomic<int> running{0};

  void invalidate_range_start(const mmunotify::invalidation&) noexcept {
    running.fetch_add(1);
    starts.fetch_add(1);
    running.fetch_sub(1);
  }
  void invalidate_range_end(const mmunotify::invalidation&) noexcept { ends.fetch_add(1); }
  void release() noexcept { releases.fetch_add(1); }
};
