// SPDX-License-Identifier: MIT
#pragma once

// A page frame, as a primary MMU lends it to a secondary one.
//
// A frame need not have a page descriptor (contract K4): device memory and reserved frames have none. So frames are
// taken and given back through their provider, by number, and never through "the page behind the entry".

#include <concepts>
#include <cstddef>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/result.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// A frame on loan. It stays what it is until it is given back, but it may cease to be the page behind the address:
/// only an invalidation says so.
struct frame_lease {
  errc error = errc::not_mapped;  ///< ok: the other members count
  pfn frame{};
  bool writable = false;  ///< the primary's mapping allows writes now; a read lease may still say so

  constexpr explicit operator bool() const noexcept { return error == errc::ok; }
};

/// Lends frames by host virtual address.
///   pin(a, write)  faults the page in if need be and takes one reference. May sleep; must be called without the
///                  secondary's own lock. Errors: not_mapped, access_denied, no_memory.
///   unpin(f)       gives one reference back. Any thread; does not sleep.
///   data(f)        where this process sees the frame's 4 KiB, for software that plays the hardware; stable while the
///                  frame is pinned or mapped under the notifier's protection.
template <class P>
concept frame_provider = requires(P& p, hva a, bool write, pfn f) {
  { p.pin(a, write) } -> std::same_as<frame_lease>;
  { p.unpin(f) } noexcept;
  { p.data(f) } noexcept -> std::same_as<std::byte*>;
};

MMUNOTIFY_END_NAMESPACE
