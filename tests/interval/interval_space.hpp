// SPDX-License-Identifier: MIT
#pragma once

// A set of intervals with what an address space adds to it: sections, and brackets as scopes.

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <mmunotify/interval/detail/interval_set.hpp>

#include "support/threads.hpp"

namespace mmunotify {
inline namespace MMUNOTIFY_ABI {
/// Sees an interval's word.
struct interval_probe {
  template <class Key>
  static std::uint64_t word(const basic_interval<Key>& n) noexcept {
    return n.word_.load();
  }
  /// Precondition: idle.
  template <class Key>
  static void start_at(basic_interval<Key>& n, std::uint64_t sequence) noexcept {
    n.word_.~collision_word();
    new (&n.word_) detail::collision_word(sequence);
  }
  /// What the brackets go by that start now.
  template <class Key>
  static std::uint64_t version(const basic_interval<Key>& n) noexcept {
    return n.context_.load()->clock.read();
  }
  /// Whether a bracket of that version calls the interval: by the range that it was inserted with, or the current one.
  template <class Key>
  static bool hears(basic_interval<Key>& n, std::uint64_t version) noexcept {
    auto& clock = n.context_.load()->clock;
    return n.first_entry_.hears(version, clock) || n.current_.load()->hears(version, clock);
  }
};
}  // namespace MMUNOTIFY_ABI
}  // namespace mmunotify

template <class Key>
struct basic_interval_space {
  using range_type = mmunotify::basic_range<Key>;
  using invalidation_type = mmunotify::basic_invalidation<Key>;

  mmunotify::srcu_domain domain;
  mmunotify::detail::interval_set<Key> set{domain};
  mmunotify::observe::counters seen;

  /// Start where it is made, end where it goes.
  class bracket {
   public:
    explicit bracket(basic_interval_space& s, const invalidation_type& i) : space_(&s), what_(i) {
      s.domain.read_lock_unordered();
      mmunotify::detail::pending_passes<Key> passes;
      open_ = s.set.start(what_, memo_, passes, s.seen);
      passes.finish_all(what_);
      if (!open_) s.domain.read_unlock_unordered();
    }
    bracket(const bracket&) = delete;
    bracket& operator=(const bracket&) = delete;
    ~bracket() { end(); }
    explicit operator bool() const { return open_; }
    void end() {
      if (!std::exchange(open_, false)) return;
      space_->set.end(what_, memo_, space_->seen);
      space_->domain.read_unlock_unordered();
    }
    /// A subscriber that comes after the intervals refuses.
    void cancel() {
      if (!std::exchange(open_, false)) return;
      space_->set.cancel(what_, memo_, space_->seen);
      space_->domain.read_unlock_unordered();
    }

   private:
    basic_interval_space* space_;
    invalidation_type what_;
    mmunotify::detail::flight_memo memo_{};
    bool open_ = false;
  };

  bracket invalidate(range_type r, mmunotify::event e = mmunotify::event::unmap, const void* owner = nullptr) {
    return bracket(*this, {.range = r, .event = e, .owner = owner});
  }
  bracket try_invalidate(range_type r) { return bracket(*this, {.range = r, .blockable = false}); }

  /// Removes it without waiting, then waits until it is free.
  void remove_later(mmunotify::basic_interval<Key>& n) {
    static_cast<void>(set.remove_async(n));
    while (n.registered()) domain.barrier();
  }
};

using interval_space = basic_interval_space<std::uintptr_t>;

/// A fault in a thread of its own: read_begin, and what it returned, if nothing collides afterwards, is good.
class beside_fault {
 public:
  explicit beside_fault(mmunotify::basic_interval<std::uintptr_t>& n)
      : thread_([this, &n] {
          const auto seq = n.read_begin();
          returned_.store(true);
          good_ = !n.read_retry(seq);
        }) {}
  ~beside_fault() {
    if (thread_.joinable()) thread_.join();
  }
  /// Whether read_begin has not returned, although it had the time. A hint: it may be slow.
  bool waits() const {
    let_others_run();
    return !returned_.load();
  }
  /// Waits for it. Returns: whether the sequence was good.
  bool succeeds() {
    thread_.join();
    return good_;
  }

 private:
  std::atomic<bool> returned_{false};
  bool good_ = false;
  std::thread thread_;  // last: it uses the others
};
