// SPDX-License-Identifier: MIT
#pragma once

// What a subscriber wants to be told. It is fixed while the subscriber is registered, so that what decided about a
// start decides about its end (P6).

#include <optional>

#include <mmunotify/base/event.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <address_key Key>
struct basic_filter {
  /// Brackets with other events are none of its business. A client type says the same for all its subscribers:
  /// `static constexpr event_set events`; what both allow counts.
  event_set events = event_set::all();
  /// Only what overlaps the range concerns it: brackets, young questions, flushes. Nothing: the whole space. An empty
  /// or reversed range is refused at registration (errc::bad_range).
  std::optional<basic_range<Key>> range{};
  /// Brackets that this one initiated, events migrate and exclusive, are not told to it. Null: all are.
  const void* owner = nullptr;
};

using subscriber_filter = basic_filter<std::uintptr_t>;

MMUNOTIFY_END_NAMESPACE
