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
  static constexpr bracket_type invalidate_in_place(range_type, event, const void* = nullptr) noexcept { return {}; }
  static constexpr void change_entry(const basic_entry_change<key>&) noexcept {}
  static constexpr void invalidate_secondary_tlbs(range_type) noexcept {}
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
  static constexpr errc young_pages(range_type, std::span<std::uint64_t>, bool) noexcept { return errc::ok; }
  static constexpr errc release() noexcept { return errc::ok; }
  static constexpr errc barrier() noexcept { return errc::ok; }

  /// Returns: disabled, always. The witness, if any, is not looked at.
  template <class Client, class... Witness>
  static constexpr errc register_subscriber(subscriber<Client, key>&, const Witness&...) noexcept {
    return errc::disabled;
  }
  /// Returns: not_registered, always.
  static constexpr errc unregister(basic_subscriber<key>&) noexcept { return errc::not_registered; }
  using done_hook = void (*)(basic_subscriber<key>&) noexcept;
  static constexpr errc unregister_async(basic_subscriber<key>&, done_hook = nullptr) noexcept {
    return errc::not_registered;
  }

  template <class Interval, class... Witness>
  static constexpr errc insert(Interval&, range_type, const Witness&...) noexcept {
    return errc::disabled;
  }
  template <class Interval>
  static constexpr errc remove(Interval&) noexcept {
    return errc::not_registered;
  }
  static constexpr errc remove_async(basic_interval<key>&, void (*)(basic_interval<key>&) noexcept = nullptr) noexcept {
    return errc::not_registered;
  }
  template <class Interval>
  static constexpr errc resize(Interval&, range_type) noexcept {
    return errc::not_registered;
  }
  template <class Interval>
  static constexpr errc split(Interval&, key, Interval&) noexcept {
    return errc::not_registered;
  }

 private:
  template <class, class>
  friend class shared_subscription;

  struct nobody {};
  static constexpr nobody sharing(errc&) noexcept { return {}; }
  static constexpr basic_subscriber<key>* find_shared(const detail::operations<key>&, std::uint64_t) noexcept {
    return nullptr;
  }
};

MMUNOTIFY_END_NAMESPACE
