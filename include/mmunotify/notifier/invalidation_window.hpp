// SPDX-License-Identifier: MIT
#pragma once

// Collision detection for a client of the whole space: did a bracket touch *this* key since I looked? (C9)
//
// A secondary MMU fills a mapping in three steps that no lock of the primary's covers: look at the window, look the
// page up (may sleep), take the own lock and install. If a bracket over the page ran in between, the looked-up page may
// be gone. KVM remembers one sequence number and the hull of all ranges, so every bracket anywhere makes every fault
// retry; this window keeps the ranges:
//   in flight   exactly up to InFlight of them; further ones as their common hull, until the last of these has ended
//   finished    a ring of the last History ones, with the sequence at which they ended; a snapshot that is older than
//               the ring retries to be safe
//
//   fault:   s = window.read_begin();  page = lookup();  lock();  if (window.retry(s, range)) again;  install
//   start:   lock();  window.start(range);  drop mappings;  unlock();
//   end:     lock();  window.end(range);  unlock();
//   again registered, after having been unregistered:  lock();  window.forget();  unlock();
//
// start, end and retry are called under the client's own lock; read_begin and check_retry from anywhere.
//
// Orderings:
//   (w1) sequence release / (w2) sequence acquire: who reads sequence s sees the tables as the brackets up to s left
//   them, so a look-up after it cannot find what they took away.
//   The lock-free hint is a seqlock: (w3) the version is odd while the lists change; entries are stored with release
//   and loaded with acquire (w4), so a reader that sees any new entry also sees the version move.
//
// Cost: retry is a scan of the open ranges and of those that ended since the snapshot; two loads when there are none.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <address_key Key = std::uintptr_t, std::size_t InFlight = 8, std::size_t History = 64>
class invalidation_window {
  static_assert(InFlight > 0 && History > 0, "mmunotify: an invalidation_window needs room for at least one range");

 public:
  using range_type = basic_range<Key>;
  /// How many brackets had ended. 64 bits: it does not wrap.
  using snapshot = std::uint64_t;

  /// Returns: the moment from which retry() counts. Progress: wait-free. Call it before the page look-up.
  snapshot read_begin() const noexcept { return finished_.load(std::memory_order_acquire); }  // (w2) pairs with (w1)

  /// Returns: true if a bracket that overlaps r is open or has ended since the snapshot, or if so many have ended that
  /// the history has forgotten. Precondition: under the client's lock. An empty r collides only with what was
  /// forgotten.
  bool retry(snapshot since, range_type r) const noexcept {
    if constexpr (detail::mutated(detail::mutation::no_retry_check)) return false;
    return open_hits(r) || finished_hits(since, r);
  }

  /// Returns: true: this look-up is lost, do not take the lock to learn it. false: a hint.
  /// Progress: wait-free. (C3)
  bool check_retry(snapshot since, range_type r) const noexcept {
    if constexpr (detail::mutated(detail::mutation::no_retry_check)) return false;
    const std::uint64_t before = version_.load(std::memory_order_acquire);
    if ((before & 1) != 0) return false;
    const bool hit = open_hits(r) || finished_hits(since, r);
    return hit && version_.load(std::memory_order_relaxed) == before;
  }

  /// Effects: a bracket over r is open. Precondition: under the client's lock.
  void start(range_type r) noexcept {
    const change c(version_);
    const std::size_t n = open_count_.load(std::memory_order_relaxed);
    if (n < InFlight) {
      open_[n].store(r);
      open_count_.store(n + 1, std::memory_order_release);  // (w4)
      return;
    }
    const std::size_t m = hull_count_.load(std::memory_order_relaxed);
    hull_.store(m == 0 ? r : hull_.load().hull_with(r));
    hull_count_.store(m + 1, std::memory_order_release);  // (w4)
  }

  /// Effects: the bracket over r has ended. Precondition: under the client's lock; start(r) came before (P1; checked).
  void end(range_type r) noexcept {
    const change c(version_);
    if (!close(r)) {
      detail::violated("P1", "invalidation_window::end", "a range ends that has not started");
      return;
    }
    const std::uint64_t n = finished_.load(std::memory_order_relaxed);
    history_[n % History].store(r);
    finished_.store(n + 1, std::memory_order_release);  // (w1) pairs with (w2)
  }

  /// Effects: every snapshot taken before collides with everything. For a client that was unregistered and is
  /// registered again: brackets that it was not told of may have run since. Preconditions: under the client's lock,
  /// after the registration and before mappings are made again.
  void forget() noexcept {
    const change c(version_);
    // (w1) pairs with (w2). Older snapshots now lie before the history; what it holds is old, and hits at most too
    // often.
    finished_.store(finished_.load(std::memory_order_relaxed) + History + 1, std::memory_order_release);
  }

  /// Returns: how many brackets are open. May be stale on arrival.
  std::size_t open() const noexcept {
    return open_count_.load(std::memory_order_relaxed) + hull_count_.load(std::memory_order_relaxed);
  }

  /// Returns: true if one that overlaps r is open. Precondition: under the client's lock.
  bool open_hits(range_type r) const noexcept {
    const std::size_t n = open_count_.load(std::memory_order_acquire);  // (w4)
    for (std::size_t i = 0; i < n; ++i) {
      if (open_[i].load().overlaps(r)) return true;
    }
    return hull_count_.load(std::memory_order_acquire) != 0 && hull_.load().overlaps(r);  // (w4)
  }

 private:
  /// A range whose halves are atomic: the lock-free hint may see halves of two ranges, and then discards them.
  class atomic_range {
   public:
    void store(range_type r) noexcept {
      first_.store(r.first, std::memory_order_release);  // (w4)
      last_.store(r.last, std::memory_order_release);    // (w4)
    }
    range_type load() const noexcept {
      return {first_.load(std::memory_order_acquire), last_.load(std::memory_order_acquire)};  // (w4)
    }

   private:
    std::atomic<Key> first_{};
    std::atomic<Key> last_{};
  };

  /// Makes the version odd for its lifetime.
  class change {
   public:
    explicit change(std::atomic<std::uint64_t>& v) noexcept : version_(v) { bump(); }  // (w3)
    ~change() { bump(); }
    change(const change&) = delete;
    change& operator=(const change&) = delete;

   private:
    void bump() noexcept {
      version_.store(version_.load(std::memory_order_relaxed) + 1, std::memory_order_release);  // (w3)
    }
    std::atomic<std::uint64_t>& version_;
  };

  bool finished_hits(snapshot since, range_type r) const noexcept {
    const std::uint64_t n = finished_.load(std::memory_order_acquire);  // (w2)
    if (n - since > History) return true;
    for (std::uint64_t i = since; i != n; ++i) {
      if (history_[i % History].load().overlaps(r)) return true;
    }
    return false;
  }

  /// Takes one range equal to r off the open ones; without one, r is part of the hull.
  bool close(range_type r) noexcept {
    const std::size_t n = open_count_.load(std::memory_order_relaxed);
    for (std::size_t i = 0; i < n; ++i) {
      if (open_[i].load() == r) {
        open_[i].store(open_[n - 1].load());
        open_count_.store(n - 1, std::memory_order_release);  // (w4)
        return true;
      }
    }
    const std::size_t m = hull_count_.load(std::memory_order_relaxed);
    if (m == 0) return false;
    hull_count_.store(m - 1, std::memory_order_release);  // (w4)
    return true;
  }

  std::atomic<std::uint64_t> version_{0};
  std::atomic<std::uint64_t> finished_{0};
  std::atomic<std::size_t> open_count_{0};
  std::atomic<std::size_t> hull_count_{0};
  std::array<atomic_range, InFlight> open_{};
  atomic_range hull_{};
  std::array<atomic_range, History> history_{};
};

MMUNOTIFY_END_NAMESPACE
