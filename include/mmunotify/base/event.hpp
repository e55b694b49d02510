// SPDX-License-Identifier: MIT
#pragma once

// Why a range is invalidated, and sets of such reasons. The names are those of Linux's enum mmu_notifier_event.

#include <cstdint>
#include <initializer_list>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

enum class event : std::uint8_t {
  unmap,            ///< the range leaves the address space: munmap, the old side of a move
  clear,            ///< entries are cleared or replaced, the area stays: swap, copy on write, zap
  protection_vma,   ///< the protection of a whole area changes: mprotect
  protection_page,  ///< the protection of single pages changes
  soft_dirty,       ///< write access is withdrawn to find out who writes
  release,          ///< the address space dies
  migrate,          ///< pages move to or from the owner's device
  exclusive,        ///< the owner takes exclusive access
};

inline constexpr unsigned event_count = 8;

/// Events that have an initiator: it does not have to be told of what it does itself.
constexpr bool has_owner(event e) noexcept { return e == event::migrate || e == event::exclusive; }

/// The event's name in lower case, as in the enumeration.
constexpr const char* to_string(event e) noexcept {
  constexpr const char* names[event_count] = {"unmap",      "clear",   "protection_vma", "protection_page",
                                              "soft_dirty", "release", "migrate",        "exclusive"};
  const auto i = static_cast<unsigned>(e);
  return i < event_count ? names[i] : "unknown";
}

/// A set of events; one byte.
class event_set {
 public:
  constexpr event_set() = default;
  constexpr event_set(std::initializer_list<event> events) noexcept {
    for (const event e : events) bits_ = static_cast<std::uint8_t>(bits_ | bit(e));
  }
  static constexpr event_set all() noexcept {
    event_set s;
    s.bits_ = 0xff;
    return s;
  }
  /// What is no event is in no set.
  constexpr bool contains(event e) const noexcept {
    return static_cast<unsigned>(e) < event_count && (bits_ & bit(e)) != 0;
  }
  friend constexpr event_set operator&(event_set a, event_set b) noexcept {
    a.bits_ = static_cast<std::uint8_t>(a.bits_ & b.bits_);
    return a;
  }
  friend constexpr bool operator==(event_set, event_set) = default;

 private:
  static constexpr unsigned bit(event e) noexcept { return 1U << static_cast<unsigned>(e); }
  std::uint8_t bits_ = 0;
};

MMUNOTIFY_END_NAMESPACE
