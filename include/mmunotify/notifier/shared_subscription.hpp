// SPDX-License-Identifier: MIT
#pragma once

// One client per address space and kind, shared by all who ask for it (Linux: mmu_notifier_get and put).
//
// Several parts of a driver want the same mirror of an address space. The first get makes it and registers it, others
// get the same one, and the last put unregisters and frees it: once, and after all its callbacks (L2). put does not
// wait and may be called in callbacks, also in the client's own.
//
//   auto mirror = shared_subscription<gpu_mirror, space_type>::get(space, [] { return new (std::nothrow) gpu_mirror;
//   }); if (mirror) mirror->map(...);                       // arming::under: get(space, make, held)
//
// The kind is the client's type and, if one type serves several purposes, a number. A client that is being put for the
// last time is not found any more: a get beside it makes a new one. Before the space goes: space.barrier().
//
// Each copy of the library (shared objects with hidden visibility) shares within itself only.

#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/notifier/address_space.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// A table of its own: so a node is known as one of Client's shared ones.
template <class Client, address_key Key>
inline constexpr operations<Key> shared_operations_for = make_operations<Client, Key, basic_invalidation<Key>>();

/// The client, its node and its users. Frees itself.
template <class Client, address_key Key>
class shared_subscriber : public subscriber<Client, Key> {
 public:
  shared_subscriber(std::unique_ptr<Client> client, std::uint64_t number) noexcept
      : subscriber<Client, Key>(*client, shared_operations_for<Client, Key>, number), owned_(std::move(client)) {}

  using subscriber<Client, Key>::add_user;
  using subscriber<Client, Key>::remove_user;
  static void free(basic_subscriber<Key>& n) noexcept { delete static_cast<shared_subscriber*>(&n); }

 private:
  std::unique_ptr<Client> owned_;
};

}  // namespace detail

/// A user's share; a copy is a user of its own. Threads may have theirs, but not one object together.
template <class Client, class Space>
class [[nodiscard]] shared_subscription {
  using key = typename Space::key;
  using node = detail::shared_subscriber<Client, key>;

 public:
  /// Nobody's.
  shared_subscription() noexcept = default;
  shared_subscription(const shared_subscription& o) noexcept : space_(o.space_), node_(o.node_), error_(o.error_) {
    if (node_ != nullptr) node_->add_user();
  }
  shared_subscription(shared_subscription&& o) noexcept
      : space_(o.space_),
        node_(std::exchange(o.node_, nullptr)),
        error_(std::exchange(o.error_, errc::not_registered)) {}
  shared_subscription& operator=(shared_subscription o) noexcept {
    std::swap(space_, o.space_);
    std::swap(node_, o.node_);
    std::swap(error_, o.error_);
    return *this;
  }
  ~shared_subscription() { put(); }

  /// Effects: finds the space's client of this type and number, or makes one: make() returns a pointer to a new Client
  /// (null: out of memory), which is then registered. `witness...`: the lock that arming::under asks for, nothing for
  /// arming::tracked. If the result is empty, error() says why, and no client is left behind. Errors: those of
  /// register_subscriber; inside a callback of a tracked space: would_deadlock if there is none yet. Progress: walks
  /// the subscribers; blocking where registration is.
  template <class Make, class... Witness>
    requires std::is_invocable_r_v<Client*, Make>
  static shared_subscription get(Space& space, Make make, const Witness&... witness) noexcept {
    return get_numbered(space, 0, std::move(make), witness...);
  }
  /// The same for one of several clients of the type.
  template <class Make, class... Witness>
    requires std::is_invocable_r_v<Client*, Make>
  static shared_subscription get_numbered(Space& space, std::uint64_t number, Make make,
                                          const Witness&... witness) noexcept {
    shared_subscription s;
    s.space_ = &space;
    s.error_ = s.find(number);
    if (s.error_ == errc::ok) return s;
    [[maybe_unused]] const auto guard = space.sharing(s.error_);  // tracked: one get at a time makes a client
    if (s.error_ == errc::would_deadlock) return s;
    s.error_ = s.find(number);
    if (s.error_ != errc::ok) s.error_ = s.make(number, std::move(make), witness...);
    return s;
  }

  /// Effects: gives the share back; the last one unregisters the client by unregister_async, then deletes it. The
  /// client hears its release hook, and brackets until then. Progress: never waits. Context: anywhere, also in
  /// callbacks.
  void put() noexcept {
    node* const n = std::exchange(node_, nullptr);
    error_ = errc::not_registered;
    if (n == nullptr || !n->remove_user()) return;
    // Cannot fail: nobody else unregisters it.
    static_cast<void>(space_->unregister_async(*n, &node::free));
  }

  explicit operator bool() const noexcept { return node_ != nullptr; }
  /// Returns: ok, or why it is nobody's.
  errc error() const noexcept { return error_; }
  /// Precondition: not empty.
  Client& operator*() const noexcept { return node_->client(); }
  Client* operator->() const noexcept { return &node_->client(); }

 private:
  errc find(std::uint64_t number) noexcept {
    auto* const found = space_->find_shared(detail::shared_operations_for<Client, key>, number);
    node_ = static_cast<node*>(found);
    return found != nullptr ? errc::ok : errc::not_registered;
  }

  template <class Make, class... Witness>
  errc make(std::uint64_t number, Make made, const Witness&... witness) noexcept {
    std::unique_ptr<Client> client(made());
    if (client == nullptr) return errc::no_memory;
    std::unique_ptr<node> n(new (std::nothrow) node(std::move(client), number));
    if (n == nullptr) return errc::no_memory;
    if (const errc e = space_->register_subscriber(*n, witness...); e != errc::ok) return e;
    node_ = n.release();
    return errc::ok;
  }

  Space* space_ = nullptr;
  node* node_ = nullptr;
  errc error_ = errc::not_registered;
};

MMUNOTIFY_END_NAMESPACE
