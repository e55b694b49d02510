// SPDX-License-Identifier: MIT
#pragma once

// What users of a domain see of its callbacks.

#include <cstddef>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// What a deferred callback needs; a member or base of what it frees. 16 bytes.
struct srcu_head {
  srcu_head* next = nullptr;
  /// Null while the head is not queued.
  void (*function)(srcu_head*) noexcept = nullptr;
};
using srcu_callback = void (*)(srcu_head*) noexcept;

/// How a domain is made.
struct srcu_options {
  /// The domain's words have a cache line of their own in every thread: for one that is polled or synchronized in a
  /// loop, beside others whose sections must not notice. Costs 64 bytes per thread instead of 16.
  bool isolated = false;
  /// call() answers errc::again while this many callbacks are queued. 0: no bound.
  std::size_t max_backlog = 0;
  /// Who runs the callbacks. Null: the process's worker thread. Otherwise it is asked to see to it that drain() is
  /// called soon, by anybody and outside the domain's sections. It is called in call() and at the end of sections, from
  /// any thread, and from a signal handler if a section ends there: it must not block, drain, or make and destroy
  /// domains.
  void (*schedule)(void* context) noexcept = nullptr;
  void* context = nullptr;
};

MMUNOTIFY_END_NAMESPACE
