// SPDX-License-Identifier: MIT
#pragma once

// The contract, checked on a driver whose mirrors are intervals.
//
//   const auto r = mmunotify::testing::interval_conformance([](mmunotify::testing::test_primary& p) {
//     return std::make_unique<my_adapter>(p);                       // interval_adapter.hpp says what it has to have
//   });
//
// Everything that conformance.hpp does, over one interval that covers the kit's window; then scenarios about intervals:
// their edges (C4, C10), brackets elsewhere (C2), insertion under brackets (C5), removal of either kind (L1, L7, P2),
// resizing and splitting (C6), turns (C8). Limits, context and cost: as there.

#include <utility>

#include <mmunotify/config.hpp>
#include <mmunotify/testing/conformance.hpp>
#include <mmunotify/testing/interval_adapter.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing {

/// Effects: runs the kit over adapters that the factory makes: factory(test_primary&) returns a pointer to an
/// interval_conformance_adapter, or something like one that owns it. Returns: what was found.
template <class Factory>
  requires interval_conformance_adapter<detail::adapter_of<Factory>>
report interval_conformance(Factory factory, const options& o = {}) noexcept {
  return conformance(
      [&factory](test_primary& p) {
        using pointer = decltype(factory(p));
        return detail::placed<pointer>(factory(p));
      },
      o);
}

}  // namespace testing
MMUNOTIFY_END_NAMESPACE
