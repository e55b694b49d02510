// SPDX-License-Identifier: MIT
#pragma once

// The address space that is compiled out: the same calls, no state, no code (D2). Registration says so by an error.

#include <concepts>
#include <utility>

#include <mmunotify/notifier/address_space.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <class... Options>
class address_space<disabled, Options...> {
 public:
  using key = typename detail::key_among<std::uintptr_t, Options...>::type;
  using observer_type = observe::none;
  using range_type = basic_range<key>;
  using invalidation_type = basic_invalidation<key>;
  struct ticket {};
  /// Always open, always nothing. The constructor and destructor keep "unused variable" quiet, and compile to nothing.
  struct [[nodiscard]] bracket_type {
    constexpr bracket_type() noexcept {}
    constexpr ~bracket_type() {}
    bracket_type(const bracket_type&) = delete;
    bracket_type& operator=(const bracket_type&) = delete;
    constexpr explicit operator bool() const noexcept { return true; }
  };

  address_space() = default;
  address_space(const address_space&) = delete;
  address_space& operator=(const address_space&) = delete;

  static constexpr bool armed() noexcept { return false; }
  static constexpr bracket_type invalidate(range_type, event, const void* = nullptr) noexcept { return {}; }
  static constexpr bracket_type invalidate_page(key, event, const void* = nullptr) noexcept { return {}; }
  static constexpr bracket_type try_invalidate(range_type, event, const void* = nullptr) noexcept { return {}; }
  template <std::invocable F>
  [[gnu::always_inline]] static constexpr decltype(auto) bracketed(range_type, event, F f) {
    return f();
  }
  [[nodiscard]] static constexpr ticket invalidate_range_start(const invalidation_type&) noexcept { return {}; }
  static constexpr void invalidate_range_end(ticket) noexcept {}
  static constexpr bool clear_flush_young(range_type) noexcept { return false; }
  static constexpr bool clear_young(range_type) noexcept { return false; }
  static constexpr bool test_young(range_type) noexcept { return false; }
  static constexpr errc release() noexcept { return errc::ok; }

  /// Returns: disabled, always. The witness, if any, is not looked at.
  template <class Client, class... Witness>
  static constexpr errc register_subscriber(subscriber<Client, key>&, const Witness&...) noexcept {
    return errc::disabled;
  }
  /// Returns: not_registered, always.
  static constexpr errc unregister(basic_subscriber<key>&) noexcept { return errc::not_registered; }
};

MMUNOTIFY_END_NAMESPACE
