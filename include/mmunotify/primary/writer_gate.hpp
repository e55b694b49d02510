// SPDX-License-Identifier: MIT
#pragma once

// Makes a reader-preferring shared mutex fair to its writers.
//
// glibc's rwlock, and with it std::shared_mutex, lets a new reader in while a writer waits: with enough faults in
// flight the primary's munmap never gets its turn. A lock of our own would not do, since the notifier's lock witness
// wants the very mutex that the primary uses. So there is a gate in front of it. A writer announces itself and then
// waits for the mutex; a reader that finds a writer announced waits until one of them has been admitted, once, and
// goes on to the mutex.
//
// Progress: a waiting writer waits for the readers already inside and for those that have waited their turn, at most
// one section each; a waiting reader waits for at most one admission and then for the writer that holds the mutex.
// Neither starves the other. Locking the mutex directly is harmless but enjoys no such promise.
// Cost: a reader pays one load more than the mutex costs; a writer two additions.

#include <atomic>
#include <cstdint>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

class writer_gate {
 public:
  /// Locks m, a std::shared_mutex or one like it, exclusively. Progress: blocking. Context: may sleep; not while this
  /// thread holds m in any way.
  template <class SharedMutex>
  void lock(SharedMutex& m) noexcept {
    state_.fetch_add(1, std::memory_order_relaxed);
    m.lock();
    // Leaves the count and adds an admission in one step: a reader never sees the one without the other.
    state_.fetch_add(admission - 1, std::memory_order_relaxed);
    state_.notify_all();
  }

  /// Locks m shared, behind a writer that is waiting. Progress: blocking. Context: as lock().
  template <class SharedMutex>
  void lock_shared(SharedMutex& m) noexcept {
    // All relaxed: the gate only delays. What a reader may see is ordered by the mutex.
    const std::uint64_t arrival = state_.load(std::memory_order_relaxed);
    std::uint64_t now = arrival;
    while (waiting(now) != 0 && now / admission == arrival / admission) {
      state_.wait(now, std::memory_order_relaxed);
      now = state_.load(std::memory_order_relaxed);
    }
    m.lock_shared();
  }

  /// How many writers are announced and not admitted; stale on arrival.
  std::uint64_t waiting_writers() const noexcept { return waiting(state_.load(std::memory_order_relaxed)); }

 private:
  static constexpr std::uint64_t admission = std::uint64_t{1} << 20;
  static constexpr std::uint64_t waiting(std::uint64_t s) noexcept { return s % admission; }

  std::atomic<std::uint64_t> state_{0};  ///< admissions in the high bits, waiting writers in the low 20
};

MMUNOTIFY_END_NAMESPACE
