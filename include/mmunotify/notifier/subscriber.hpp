// SPDX-License-Identifier: MIT
#pragma once

// The node by which a client is registered with an address space (Linux: struct mmu_notifier).
//
// Intrusive: registering allocates nothing for it. One registration at a time; after unregister() the same node may be
// registered again, with any space (L9). The node and its client must outlive the registration, and every concurrent
// unregister() of it.
//
//   idle --register--> joining --> live --unregister or the space's release--> leaving --> released --> idle
//
// leaving: one thread has claimed the release hook and runs it (L4); everybody else who wants it done waits (L3).
// released: the hook has run; brackets in flight may still call the node until their grace period has passed.
// departed: the space's release() is done with the node; unregister() or a new registration takes it from there (L5).

#include <atomic>
#include <cstdint>
#include <type_traits>

#include <mmunotify/config.hpp>
#include <mmunotify/notifier/hooks.hpp>
#include <mmunotify/sync/lockfree_hlist.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

namespace detail {
template <address_key Key>
class registry;
}

/// The part of a subscriber that does not depend on the client's type.
template <address_key Key>
class basic_subscriber : public hlist_node {
 public:
  /// Precondition (L1): not registered; checked always.
  ~basic_subscriber() {
    if (registered()) [[unlikely]] {
      detail::violated("L1", "~subscriber", "the subscriber is still registered; unregister it first");
    }
  }

  /// Returns: true while it belongs to a space. May be stale on arrival when others register or unregister it.
  bool registered() const noexcept {
    const std::uint32_t p = phase_.load(std::memory_order_acquire);  // (n4) pairs with (n3): false means it is free
    return p != idle && p != departed;
  }

 protected:
  basic_subscriber(const detail::operations<Key>& operations, void* client) noexcept
      : operations_(&operations), client_(client) {}

 private:
  friend class detail::registry<Key>;

  enum phase : std::uint32_t { idle, joining, live, leaving, released, departed };
  static constexpr std::uint64_t never = ~std::uint64_t{0};

  /// The audience rule: a bracket of version g calls exactly those with born <= g < dead.
  [[gnu::always_inline]] bool hears(std::uint64_t g) const noexcept {
    return born_.load(std::memory_order_relaxed) <= g && g < dead_.load(std::memory_order_relaxed);
  }

  const detail::operations<Key>* operations_;
  void* client_;
  std::atomic<std::uint64_t> born_{never};
  std::atomic<std::uint64_t> dead_{never};
  std::atomic<std::uint32_t> phase_{idle};
  std::atomic<const void*> home_{nullptr};  ///< the space that it was registered with last; compared, never followed
  std::atomic<detail::registry<Key>*> where_{nullptr};  ///< the registry that it is linked with
  basic_subscriber* next_claimed_ = nullptr;            ///< release(): whoever claimed it links it here
};

/// A registration of `Client`. Fails to compile, with one sentence, if Client has no hook or one of a wrong signature.
template <class Client, address_key Key = std::uintptr_t>
class subscriber : public basic_subscriber<Key> {
 public:
  /// Precondition: the client outlives every registration of this node.
  explicit subscriber(Client& client) noexcept
      : basic_subscriber<Key>(detail::operations_for<Client, Key>, &client), client_(client) {
    // Here and not in the class, so that a client may have its own node as a member.
    static_assert(!std::is_const_v<Client>, "mmunotify: a subscriber's client must not be const");
    static_assert(detail::check_client<Client, Key>());
  }

  Client& client() const noexcept { return client_; }

 private:
  Client& client_;
};

MMUNOTIFY_END_NAMESPACE
