// SPDX-License-Identifier: MIT
#pragma once

// The node by which a client is registered with an address space (Linux: struct mmu_notifier).
//
// Intrusive: registering allocates nothing for it. One registration at a time; after unregister() the same node may be
// registered again, with any space (L9). The node and its client must outlive the registration, and every concurrent
// unregister() of it.
//
//   idle --register--> joining --> live --unregister or the space's release--> leaving --> released --> idle
//                                       --unregister_async--> parting --------^
//
// parting: the worker will remove it; the space's release may run the hook before.
// leaving: one thread has claimed the release hook and runs it (L4); everybody else who wants it done waits (L3).
// released: the hook has run; brackets in flight may still call the node until their grace period has passed.
// departed: the space's release() is done with the node; unregister() or a new registration takes it from there (L5).

#include <atomic>
#include <cstdint>
#include <optional>
#include <type_traits>

#include <mmunotify/config.hpp>
#include <mmunotify/notifier/detail/operations.hpp>
#include <mmunotify/notifier/filter.hpp>
#include <mmunotify/notifier/hooks.hpp>
#include <mmunotify/sync/lockfree_hlist.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

namespace detail {
template <address_key Key, class Platform>
class audience;
template <address_key Key, class Platform>
class roster;
template <address_key Key, class Platform>
class registry;
template <address_key Key>
class interval_roster;
}  // namespace detail

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

  /// What it is told.
  const basic_filter<Key>& filter() const noexcept { return filter_; }

 protected:
  basic_subscriber(const detail::operations<Key>& operations, void* client, const basic_filter<Key>& filter,
                   std::uint64_t number = 0) noexcept
      : start_(is_all(filter) ? operations.start : nullptr),
        end_(is_all(filter) ? operations.end : nullptr),
        invalidate_secondary_tlbs_(is_all(filter) ? operations.invalidate_secondary_tlbs : nullptr),
        client_(client),
        operations_(&operations),
        filter_(filter),
        number_(number) {}

  // Users of a shared one; the first is there from the beginning.
  void add_user() noexcept { users_.fetch_add(1, std::memory_order_relaxed); }
  /// Returns: true if it was the last.
  bool remove_user() noexcept {
    return users_.fetch_sub(1, std::memory_order_acq_rel) == 1;  // (n13) pairs with itself: all they did is over
  }

 private:
  template <address_key, class>
  friend class detail::audience;
  template <address_key, class>
  friend class detail::roster;
  template <address_key, class>
  friend class detail::registry;

  enum phase : std::uint32_t { idle, joining, live, parting, leaving, released, departed };
  static constexpr std::uint64_t never = ~std::uint64_t{0};

  /// The audience rule: a bracket of version g calls exactly those with born <= g < dead.
  [[gnu::always_inline]] bool hears(std::uint64_t g) const noexcept {
    if constexpr (detail::mutated(detail::mutation::audience_by_flag)) {
      return dead_.load(std::memory_order_relaxed) == never;
    }
    return born_.load(std::memory_order_relaxed) <= g && g < dead_.load(std::memory_order_relaxed);
  }
  /// Whether the filter lets the bracket through (P6). Neither the filter nor the bracket changes.
  [[gnu::always_inline]] bool wants(const basic_invalidation<Key>& i) const noexcept {
    return filter_.events.contains(i.event) && wants(i.range) &&
           !(filter_.owner != nullptr && filter_.owner == i.owner && has_owner(i.event));
  }
  [[gnu::always_inline]] bool wants(const basic_range<Key>& r) const noexcept {
    return !filter_.range.has_value() || filter_.range->overlaps(r);
  }

  /// Returns: true, and one user more, if it has the table and the number, and users at all.
  bool share(const detail::operations<Key>& operations, std::uint64_t number) noexcept {
    if (operations_ != &operations || number_ != number) return false;
    if (phase_.load(std::memory_order_acquire) != live) return false;  // (n4) pairs with (n3): it is registered
    std::uint64_t users = users_.load(std::memory_order_relaxed);
    while (users != 0 && !users_.compare_exchange_weak(users, users + 1, std::memory_order_relaxed)) {
    }
    return users != 0;
  }

  static bool is_all(const basic_filter<Key>& f) noexcept {
    return f.events == event_set::all() && !f.range.has_value() && f.owner == nullptr;
  }

  // What walks call without looking further: the hooks of a client that wants to hear everything. Null: look at the
  // table and the filter.
  decltype(detail::operations<Key>::start) const start_;
  decltype(detail::operations<Key>::end) const end_;
  decltype(detail::operations<Key>::invalidate_secondary_tlbs) const invalidate_secondary_tlbs_;
  void* const client_;
  const detail::operations<Key>* const operations_;
  std::atomic<std::uint64_t> born_{never};
  std::atomic<std::uint64_t> dead_{never};
  std::atomic<std::uint32_t> phase_{idle};
  const basic_filter<Key> filter_;
  const std::uint64_t number_;                ///< tells shared ones of one type apart
  std::atomic<std::uint64_t> users_{1};       ///< of a shared one
  std::atomic<const void*> home_{nullptr};    ///< the space that it was registered with last; compared, never followed
  std::atomic<void*> where_{nullptr};         ///< the registry that it is linked with
  basic_subscriber* next_claimed_ = nullptr;  ///< release(): whoever claimed it links it here

  // unregister_async
  struct removal : srcu_head {
    basic_subscriber* node = nullptr;  ///< under way
    bool adopted =
        false;  ///< asked for while another removal, or the registration, was under way, which hands over to it
    void (*done)(basic_subscriber&) noexcept = nullptr;
  } removal_{};
};

/// What a registration with existing ranges calls for each of them; `const auto& visit` in a lambda.
template <address_key Key>
class basic_range_visitor {
 public:
  /// Effects: the client is told of what lies in its filter's range, or its interval, of the range. An empty one is
  /// nothing.
  void operator()(basic_range<Key> r) const noexcept {
    if (within_.has_value()) r = r.clipped_to(*within_);
    if (!r.empty() && tell_ != nullptr) tell_(client_, r);
  }

 private:
  template <address_key, class>
  friend class detail::roster;
  template <address_key>
  friend class detail::interval_roster;
  basic_range_visitor(const detail::operations<Key>& operations, void* client,
                      const std::optional<basic_range<Key>>& within) noexcept
      : tell_(operations.existing_range), client_(client), within_(within) {}

  decltype(detail::operations<Key>::existing_range) tell_;
  void* client_;
  std::optional<basic_range<Key>> within_;
};

namespace detail {
/// What a client type says of all its subscribers, and this one's filter.
template <class Client, address_key Key>
constexpr basic_filter<Key> filter_for(basic_filter<Key> f) noexcept {
  if constexpr (requires {
                  { Client::events } -> std::convertible_to<event_set>;
                }) {
    f.events = f.events & Client::events;
  }
  return f;
}
}  // namespace detail

/// A registration of `Client`. Fails to compile, with one sentence, if Client has no hook or one of a wrong signature.
template <class Client, address_key Key = std::uintptr_t>
class subscriber : public basic_subscriber<Key> {
 public:
  /// Precondition: the client outlives every registration of this node.
  explicit subscriber(Client& client, const basic_filter<Key>& filter = {}) noexcept
      : subscriber(client, detail::operations_for<Client, Key>, 0, filter) {}

  Client& client() const noexcept { return client_; }

 protected:
  /// `operations`: those of the client, or a copy of them that tells a kind of subscriber apart.
  subscriber(Client& client, const detail::operations<Key>& operations, std::uint64_t number,
             const basic_filter<Key>& filter = {}) noexcept
      : basic_subscriber<Key>(operations, &client, detail::filter_for<Client, Key>(filter), number), client_(client) {
    // Here and not in the class, so that a client may have its own node as a member.
    static_assert(!std::is_const_v<Client>, "mmunotify: a subscriber's client must not be const");
    static_assert(detail::check_client<Client, Key, basic_invalidation<Key>>());
  }

 private:
  Client& client_;
};

MMUNOTIFY_END_NAMESPACE
