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
  ~bracket() {
    if (gate_ != nullptr) gate_->end(range_, event_, owner_, blockable_, ticket_);
  }

  /// Returns: true if the bracket is open. Only that of try_invalidate can be false.
  constexpr explicit operator bool() const noexcept { return gate_ != nullptr; }

 private:
  template <class Arming, class... Options>
  friend class address_space;

  bracket(Gate& gate, basic_range<Key> r, event e, const void* owner, bool blockable,
          typename Gate::ticket ticket) noexcept
      : gate_(Gate::refused(ticket) ? nullptr : &gate),
        range_(r),
        event_(e),
        blockable_(blockable),
        owner_(owner),
        ticket_(ticket) {}

  Gate* gate_;
  basic_range<Key> range_;
  event event_;
  bool blockable_;
  const void* owner_;
  typename Gate::ticket ticket_;
};

MMUNOTIFY_END_NAMESPACE
