// SPDX-License-Identifier: MIT
#pragma once

// A bracket as a scope: start where it is made, end where it ends.
//
// Everything is held by value and inlined; disarmed, the compiler keeps at most one word of it and tests that once.

#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <class Arming, class... Options>
class address_space;

/// Returned by address_space::invalidate and try_invalidate. Ends in the thread that began it; brackets of one thread
/// may nest and overlap in any order. False after a refused try_invalidate: then nothing may be changed.
template <class Gate, address_key Key>
class [[nodiscard]] bracket {
 public:
  bracket(const bracket&) = delete;
  bracket& operator=(const bracket&) = delete;
  [[gnu::always_inline]] ~bracket() {
    if (gate_ != nullptr) gate_->end(ticket_);
  }

  /// Returns: true if the bracket is open. Only that of try_invalidate can be false.
  constexpr explicit operator bool() const noexcept { return gate_ != nullptr; }

 private:
  template <class Arming, class... Options>
  friend class address_space;

  struct blocking {};
  struct nonblocking {};
  struct in_place {};

  [[gnu::always_inline]] bracket(blocking, Gate& gate, basic_range<Key> r, event e, const void* owner) noexcept
      : gate_(&gate), ticket_(gate.start(r, e, owner)) {}
  [[gnu::always_inline]] bracket(in_place, Gate& gate, basic_range<Key> r, event e, const void* owner) noexcept
      : gate_(&gate), ticket_(gate.start_in_place(r, e, owner)) {}
  [[gnu::always_inline]] bracket(nonblocking, Gate& gate, basic_range<Key> r, event e, const void* owner) noexcept
      : gate_(&gate), ticket_(gate.try_start(r, e, owner)) {
    if (ticket_ == Gate::refused()) gate_ = nullptr;
  }

  Gate* gate_;  ///< null after a refusal
  typename Gate::ticket ticket_;
};

MMUNOTIFY_END_NAMESPACE
