// SPDX-License-Identifier: MIT
#pragma once

// The gate of arming::tracked: the registry itself, and a read section around every bracket. See arming.hpp.

#include <atomic>
#include <cstdint>
#include <mutex>

#include <mmunotify/notifier/arming.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <address_key Key, observe::observer Observer, class Platform = linux_platform>
class tracked_gate {
 public:
  using registry_type = registry<Key, Platform>;
  using node = basic_subscriber<Key>;

  using done_hook = typename registry_type::done_hook;

  /// Null: nobody was called.
  using ticket = open_bracket<Key, Platform>*;

  // --- The hot half. ----------------------------------------------------------------------------------------------

  bool armed() const noexcept { return !registry_.empty(); }

  // Dekker: registration links the node, then waits for a grace period; a bracket enters the section, then looks for
  // nodes. Either the bracket sees the node, or the registration waits for the bracket.
  template <manner M = manner::blocking>
  [[gnu::always_inline]] ticket start(basic_range<Key> r, event e, const void* owner) noexcept {
    std::byte* const slab = registry_.domain().read_lock_unordered();
    if (!armed()) [[likely]]
      return nullptr;
    return start_armed<M>(slab, r.first, r.last, e, owner);
  }

  [[gnu::always_inline]] ticket start_in_place(basic_range<Key> r, event e, const void* owner) noexcept {
    return start<manner::in_place>(r, e, owner);
  }

  [[gnu::always_inline]] void end(ticket t) noexcept {
    if (t != nullptr) [[unlikely]]
      return end_armed(t);
    registry_.domain().read_unlock_unordered();
  }

  /// Returns: refused() if a client refused; then the bracket is over and end() must not be called.
  [[gnu::always_inline]] ticket try_start(basic_range<Key> r, event e, const void* owner) noexcept {
    std::byte* const slab = registry_.domain().read_lock_unordered();
    if (!armed()) [[likely]]
      return nullptr;
    ticket t = try_start_armed(slab, r.first, r.last, e, owner);
    if (t == refused()) registry_.domain().read_unlock_unordered();
    return t;
  }
  static ticket refused() noexcept { return reinterpret_cast<ticket>(std::uintptr_t{1}); }

  /// A disarmed bracket is a section all the same, and too small to be put out of line.
  static constexpr bool closure_out_of_line = false;

  /// Returns: f(registry, observer), called in the section of those who are registered; a default value if nobody is.
  /// For the armed half of a call.
  template <class Ask>
  [[gnu::always_inline]] auto ask(Ask f) noexcept {
    registry_.domain().read_lock_unordered();
    const auto a = f(registry_, observer_);
    registry_.domain().read_unlock_unordered();
    return a;
  }

  // --- The cold half. ---------------------------------------------------------------------------------------------

  /// existing: see registry::replay.
  template <class Existing>
  MMUNOTIFY_COLD errc join(node& n, const void* home, Existing&& existing) noexcept {
    if (const errc e = registry_.domain().status(); e != errc::ok) return e;
    if (registry_.would_deadlock("address_space::register_subscriber")) return errc::would_deadlock;
    if (const errc e = registry_type::claim(n, home); e != errc::ok) return e;
    {
      const std::lock_guard lock(registry_.writers());
      if (released_) {
        registry_type::unclaim(n);
        return errc::released;
      }
      registry_.link_locked(n);
    }
    // P7: every bracket that may have missed the node is over.
    if constexpr (!mutated(mutation::no_arming_grace_period)) registry_.grace_period();
    registry_.replay(n, existing);
    registry_.settle(n);
    return errc::ok;
  }

  MMUNOTIFY_COLD errc leave(node& n, const void* home) noexcept {
    while (registry_type::where(n, home) == &registry_) {
      if (const errc e = registry_.leave(n, home); e != errc::again) return e;
    }
    return registry_type::depart(n, home);
  }

  MMUNOTIFY_COLD errc leave_async(node& n, const void* home, done_hook done) noexcept {
    while (registry_type::where(n, home) == &registry_) {
      if (const errc e = registry_.leave_async(n, home, done); e != errc::again) return e;
    }
    return registry_type::depart(n, home, done);
  }

  MMUNOTIFY_COLD errc barrier() noexcept { return registry_.barrier(); }

  /// Effects: f(registry), with its writers' mutex held; for what brackets need not know at once. Errors: released.
  template <class F>
  MMUNOTIFY_COLD errc while_armed(F f) noexcept {
    if (const errc e = registry_.domain().status(); e != errc::ok) return e;
    const std::lock_guard lock(registry_.writers());
    return released_ ? errc::released : f(registry_);
  }

  MMUNOTIFY_COLD errc release() noexcept {
    if (registry_.would_deadlock("address_space::release")) return errc::would_deadlock;
    {
      const std::lock_guard lock(registry_.writers());
      released_ = true;
      registry_.pin_locked();
    }
    return registry_.release_all();
  }

  /// Returns: false if this thread is in no callback and no bracket.
  bool may_be_inside() noexcept { return registry_.domain().held_by_this_thread(); }

  /// Inside a section it is not taken: its owner may wait for this section.
  std::unique_lock<typename Platform::mutex> sharing(errc& e) noexcept {
    if (registry_.domain().held_by_this_thread()) {
      e = errc::would_deadlock;
      return {};
    }
    return std::unique_lock(sharing_);
  }

  Observer& observer() noexcept { return observer_; }

 private:
  /// Inside the bracket's section already.
  [[gnu::always_inline]] open_bracket<Key, Platform>* make(std::byte* slab, Key first, Key last, event e,
                                                           const void* owner, manner m) noexcept {
    if (!is_valid<Key>({first, last})) [[unlikely]]
      return nullptr;
    open_bracket<Key, Platform>* const b = make_bracket(registry_, slab);
    describe(b->i, {first, last}, e, owner, m);
    return b;
  }

  // As in under_gate: cold ends in the primary's code, fast walks behind them.

  template <manner M>
  MMUNOTIFY_COLD open_bracket<Key, Platform>* start_armed(std::byte* slab, Key first, Key last, event e,
                                                          const void* owner) noexcept {
    return start_walk<M>(slab, first, last, e, owner);
  }
  MMUNOTIFY_COLD void end_armed(open_bracket<Key, Platform>* b) noexcept { end_walk(b); }

  template <manner M>
  MMUNOTIFY_ARMED open_bracket<Key, Platform>* start_walk(std::byte* slab, Key first, Key last, event e,
                                                          const void* owner) noexcept {
    open_bracket<Key, Platform>* const b = make(slab, first, last, e, owner, M);
    if (b != nullptr) [[likely]]
      b->version = registry_.call_start(b->i, b->version, b->intervals, observer_);
    return b;
  }
  MMUNOTIFY_ARMED void end_walk(open_bracket<Key, Platform>* b) noexcept {
    if (!is_open(*b)) [[unlikely]]
      return;
    registry_.call_end(b->i, b->version, b->intervals, observer_);
    b->audience = nullptr;
    registry_.domain().read_unlock_unordered(b);
  }

  MMUNOTIFY_COLD open_bracket<Key, Platform>* try_start_armed(std::byte* slab, Key first, Key last, event e,
                                                              const void* owner) noexcept {
    if (last < first) [[unlikely]] {
      static_cast<void>(is_valid<Key>({first, last}));
      return refused();
    }
    open_bracket<Key, Platform>* const b = make(slab, first, last, e, owner, manner::nonblocking);
    if (b == nullptr || registry_.try_call_start(b->i, b->version, b->intervals, observer_)) return b;
    registry_.domain().cells(slab).give_back(b);
    return refused();
  }

  static constexpr gate_hooks<Key, Platform> hooks{nullptr, nullptr,
                                                   [](void* gate, observe::occurrence what, std::uint64_t n) noexcept {
                                                     static_cast<tracked_gate*>(gate)->observer_.note(what, n);
                                                   }};

  registry_type registry_{hooks, this};
  typename Platform::mutex sharing_;  ///< held while a shared client is made
  bool released_ = false;             ///< under the writers' mutex
  [[no_unique_address]] Observer observer_;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
