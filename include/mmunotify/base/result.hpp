// SPDX-License-Identifier: MIT
#pragma once

// Error values. The library throws nothing: expected refusals and bad input come back as one of these.

#include <cstdint>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

enum class [[nodiscard]] errc : std::uint8_t {
  ok,
  already_registered,  ///< the node is registered, here or elsewhere
  not_registered,      ///< the node is not registered with this space
  released,            ///< the address space was released
  bad_range,           ///< the range is empty, reversed, wrapping or not aligned to pages
  lock_not_held,       ///< the lock witness does not own its mutex
  bracket_open,        ///< brackets are open although the witness's lock should exclude them (checked builds)
  would_deadlock,      ///< called inside a callback or an open bracket of the same space: it would wait for itself
  no_memory,           ///< an allocation failed; nothing was changed
  no_slot,             ///< all read-section slots of the process are in use
  disabled,            ///< the space is compiled out
  not_mapped,          ///< no area, slot or page covers the address
  access_denied,       ///< the mapping exists and forbids the access
  overlap,             ///< the range overlaps one that exists
  again,               ///< a collision: nothing was done, try again
  refused_by_system,   ///< the system no longer lets the process do what it granted before; nothing was changed
};

/// One sentence for a person.
constexpr const char* to_string(errc e) noexcept {
  switch (e) {
    case errc::ok: return "success";
    case errc::already_registered: return "the node is already registered";
    case errc::not_registered: return "the node is not registered with this address space";
    case errc::released: return "the address space was released";
    case errc::bad_range: return "the range is empty, reversed, wrapping or not aligned";
    case errc::lock_not_held: return "the lock passed as a witness is not held";
    case errc::bracket_open: return "a bracket is open that the witness's lock should exclude";
    case errc::would_deadlock: return "called inside a callback or an open bracket of the same address space";
    case errc::no_memory: return "out of memory";
    case errc::no_slot: return "all read-section slots of this process are in use";
    case errc::disabled: return "the address space is compiled out";
    case errc::not_mapped: return "nothing is mapped there";
    case errc::access_denied: return "the mapping forbids the access";
    case errc::overlap: return "the range overlaps an existing one";
    case errc::again: return "the operation collided with another one; try again";
    case errc::refused_by_system: return "the system refuses what it granted to this process before";
  }
  return "unknown error";
}

MMUNOTIFY_END_NAMESPACE
