// SPDX-License-Identifier: MIT
#pragma once

// What the template parameters of an address space come to: its key, its observer, its gate; and the page of a key.

#include <concepts>
#include <type_traits>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/notifier/arming.hpp>
#include <mmunotify/notifier/detail/tracked_gate.hpp>
#include <mmunotify/notifier/detail/under_gate.hpp>
#include <mmunotify/observe/observe.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <class Default, class...>
struct observer_among {
  using type = Default;
};
template <class Default, class First, class... Rest>
struct observer_among<Default, First, Rest...>
    : std::conditional_t<observe::observer<First>, std::type_identity<First>, observer_among<Default, Rest...>> {};

template <class Default, class...>
struct key_among {
  using type = Default;
};
template <class Default, class First, class... Rest>
struct key_among<Default, First, Rest...>
    : std::conditional_t<!observe::observer<First>, std::type_identity<First>, key_among<Default, Rest...>> {};

template <class Arming, class Key, class Observer>
struct gate_of;
template <class Mutex, class Key, class Observer>
struct gate_of<arming::under<Mutex>, Key, Observer> {
  using type = under_gate<Key, Observer>;
};
template <class Key, class Observer>
struct gate_of<arming::tracked, Key, Observer> {
  using type = tracked_gate<Key, Observer>;
};

template <class Arming>
inline constexpr bool is_under = false;
template <class Mutex>
inline constexpr bool is_under<arming::under<Mutex>> = true;

template <byte_key Key>
constexpr basic_range<Key> page_at(Key k) noexcept {
  // The last page of the key space ends at its last key: a half-open range cannot say more.
  if constexpr (std::unsigned_integral<Key>) {
    const Key first = k & ~static_cast<Key>(page_mask);
    const Key end = static_cast<Key>(first + page_size);
    return {first, end != 0 ? end : static_cast<Key>(~Key{0})};
  } else {
    const Key first = k.page();
    return {first, first < first + page_size ? first + page_size : first + page_mask};
  }
}

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
