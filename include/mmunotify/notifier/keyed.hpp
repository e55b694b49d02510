// SPDX-License-Identifier: MIT
#pragma once

// arming::keyed<Mutex>: arming::under<Mutex> behind a static key. While no space of the process that has this policy is
// armed, a bracket is a five-byte no-op: not even the load of the space's word is left (D4). Otherwise it is that of
// `under`, with a jump before it.
//
//   std::shared_mutex tables;
//   mmunotify::address_space<mmunotify::arming::keyed<std::shared_mutex>> space;   // used as with under
//
// Order. Arming a space enables the key before the registration returns, while the caller shows the primary's lock: the
// space's brackets come later, and a bracket that is in flight elsewhere belongs to a space that is disarmed. Disarming
// disables it after the space's word is 0, sooner or later; a bracket takes its end from its ticket, not from the key.
//
// Which one. A process that arms now and then, or never, and has its primary's hot path in many places: keyed. One that
// is mostly armed: under. Registering the first subscriber of the process rewrites every bracket in its code, and the
// last one's leaving does it again: 6 to 16 us and 1 us for each place, independent of areas, brackets in flight and
// threads (L10). Other registrations cost 30 ns more than with `under`. Where the system does not let code be changed
// this policy is `under` with a jump (key_patching() tells), see sync/static_key.hpp. A system that withdraws the right
// while the process runs makes the registration fail: errc::refused_by_system, and nothing has happened.

#include <mmunotify/config.hpp>
#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/notifier/arming.hpp>
#include <mmunotify/notifier/detail/under_gate.hpp>
#include <mmunotify/sync/static_key.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace arming {

template <class Mutex>
struct keyed {
  using mutex = Mutex;
};

/// On while a space of the process is armed that has the policy `keyed`.
using any_armed = static_key<"mmunotify.armed">;

}  // namespace arming
namespace detail {

template <class Mutex, class Key, class Observer>
struct gate_of<arming::keyed<Mutex>, Key, Observer> {
  using type = under_gate<Key, Observer, arming::any_armed>;
};
template <class Mutex>
inline constexpr bool is_under<arming::keyed<Mutex>> = true;

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
