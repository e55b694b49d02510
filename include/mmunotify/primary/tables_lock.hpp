// SPDX-License-Identifier: MIT
#pragma once

// The primary's own lock, with what std::shared_mutex lacks: fairness to writers (writer_gate.hpp), and an answer
// instead of a deadlock when a thread comes back that is already inside.
//
// A callback that calls back into the primary would wait for the lock that its own thread holds. Which locks a thread
// holds is known from a thread-local chain of the guards on its stack; it is empty or one long in practice.
// Limits: locking mutex() directly, or with witness(), leaves no trace in the chain.

#include <mutex>
#include <shared_mutex>

#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/writer_gate.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

class tables_lock {
  struct link {
    const tables_lock* lock;
    link* outer;
  };

 public:
  /// The mutex itself, for lock witnesses.
  std::shared_mutex& mutex() noexcept { return mutex_; }

  /// The mutex locked exclusively, behind the gate. Preconditions: this thread is not inside.
  [[nodiscard]] std::unique_lock<std::shared_mutex> witness() noexcept {
    gate_.lock(mutex_);
    return std::unique_lock{mutex_, std::adopt_lock};
  }

  /// This thread holds the lock through one of the guards.
  bool inside() const noexcept {
    const link* l = innermost;
    while (l != nullptr && l->lock != this) l = l->outer;
    return l != nullptr;
  }

  enum class mode { shared, exclusive, none, try_shared };

  /// A scope with the lock; error() is errc::would_deadlock, and nothing is locked, if the thread is inside already. Of
  /// try_shared it is errc::again, and nothing is locked, if the lock could not be had at once.
  template <mode Mode>
  class guard {
   public:
    explicit guard(tables_lock& lock) noexcept
        : link_{&lock, innermost}, mutex_(lock.inside() ? nullptr : &lock.mutex_) {
      if (mutex_ == nullptr) {
        error_ = errc::would_deadlock;
        return;
      }
      if constexpr (Mode == mode::exclusive) {
        lock.gate_.lock(*mutex_);
      } else if constexpr (Mode == mode::shared) {
        lock.gate_.lock_shared(*mutex_);
      } else if constexpr (Mode == mode::try_shared) {
        if (!mutex_->try_lock_shared()) {
          mutex_ = nullptr;
          error_ = errc::again;
          return;
        }
      }
      innermost = &link_;
    }
    guard(const guard&) = delete;
    guard& operator=(const guard&) = delete;
    ~guard() {
      if (mutex_ == nullptr) return;
      innermost = link_.outer;
      if constexpr (Mode == mode::exclusive) {
        mutex_->unlock();
      } else if constexpr (Mode != mode::none) {
        mutex_->unlock_shared();
      }
    }

    errc error() const noexcept { return error_; }

   private:
    link link_;
    std::shared_mutex* mutex_;  ///< null: nothing to unlock
    errc error_ = errc::ok;
  };
  using shared = guard<mode::shared>;
  using exclusive = guard<mode::exclusive>;
  using try_shared = guard<mode::try_shared>;
  /// Locks nothing, and makes the thread count as inside: for calls out that must not come back.
  using marked = guard<mode::none>;

 private:
  static inline constinit thread_local link* innermost = nullptr;

  std::shared_mutex mutex_;
  writer_gate gate_;
};

MMUNOTIFY_END_NAMESPACE
