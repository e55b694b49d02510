// SPDX-License-Identifier: MIT
#pragma once

// A registration as an object: registers when it is made, unregisters when it goes.

#include <mmunotify/notifier/address_space.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// Holds the node. Ask it once whether the registration succeeded. Precondition: space and client outlive it; it is not
/// destroyed inside a callback or an open bracket of the space (L7).
template <class Client, class Space>
class [[nodiscard]] subscription {
 public:
  /// Effects: registers the client. `witness...`: the lock that arming::under asks for, nothing for arming::tracked.
  template <class... Witness>
  subscription(Space& space, Client& client, const Witness&... witness) noexcept
      : space_(space), node_(client), error_(space.register_subscriber(node_, witness...)) {}

  /// Effects: unregisters; blocking, as address_space::unregister.
  ~subscription() {
    // Nobody else holds the node, so the only error left is L7, which unregister has reported.
    if (error_ == errc::ok) static_cast<void>(space_.unregister(node_));
  }
  subscription(const subscription&) = delete;
  subscription& operator=(const subscription&) = delete;

  explicit operator bool() const noexcept { return error_ == errc::ok; }
  /// Returns: ok, or why the client is not registered.
  errc error() const noexcept { return error_; }
  Client& client() const noexcept { return node_.client(); }

 private:
  Space& space_;
  subscriber<Client, typename Space::key> node_;
  errc error_;
};

MMUNOTIFY_END_NAMESPACE
