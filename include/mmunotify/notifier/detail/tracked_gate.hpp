// SPDX-License-Identifier: MIT
#pragma once

// The gate of arming::tracked: the registry itself, and a read section around every bracket. See arming.hpp.

#include <atomic>
#include <cstdint>
#include <mutex>

#include <mmunotify/notifier/arming.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <address_key Key, observe::observer Observer>
class tracked_gate {
 public:
  using node = basic_subscriber<Key>;

  /// Null: nobody was called.
  using ticket = open_bracket<Key>*;

  // --- The hot half. ----------------------------------------------------------------------------------------------

  bool armed() const noexcept { return !registry_.empty(); }

  // Dekker: registration links the node, then waits for a grace period; a bracket enters the section, then looks for
  // nodes. Either the bracket sees the node, or the registration waits for the bracket.
  [[gnu::always_inline]] ticket start(basic_range<Key> r, event e, const void* owner) noexcept {
    std::byte* const slab = registry_.domain().read_lock_unordered();
    if (!armed()) [[likely]]
      return nullptr;
    return start_armed(slab, r.first, r.last, e, owner);
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

  template <bool FirstYes>
  bool ask_young(young_hook<Key> hook, basic_range<Key> r) noexcept {
    if (!armed()) [[likely]]
      return false;
    return ask_young_armed<FirstYes>(hook, r);
  }

  // --- The cold half. ---------------------------------------------------------------------------------------------

  MMUNOTIFY_COLD errc join(node& n, const void* home) noexcept {
    if (const errc e = registry_.domain().status(); e != errc::ok) return e;
    if (registry_.domain().held_by_this_thread()) {
      violated("L7", "address_space::register_subscriber",
               "called inside a callback or an open bracket of the same address space: it would wait for itself");
      return errc::would_deadlock;
    }
    if (const errc e = registry<Key>::claim(n, home); e != errc::ok) return e;
    {
      const std::lock_guard lock(registry_.writers());
      if (released_) {
        registry<Key>::unclaim(n);
        return errc::released;
      }
      registry_.link_locked(n);
    }
    registry_.grace_period(observer_);  // P7: every bracket that may have missed the node is over
    registry_.settle(n, observer_);
    return errc::ok;
  }

  MMUNOTIFY_COLD errc leave(node& n, const void* home) noexcept {
    while (registry<Key>::where(n, home) == &registry_) {
      const errc e = registry_.leave(
          n, home, observer_, [] {}, [] {});
      if (e != errc::again) return e;
    }
    return registry<Key>::depart(n, home);
  }

  MMUNOTIFY_COLD errc release() noexcept {
    if (registry_.release_would_deadlock()) return errc::would_deadlock;
    {
      const std::lock_guard lock(registry_.writers());
      released_ = true;
      registry_.pin_locked();
    }
    return registry_.release_all(
        observer_, [] {}, [] {});
  }

  Observer& observer() noexcept { return observer_; }

 private:
  /// Inside the bracket's section already.
  [[gnu::always_inline]] open_bracket<Key>* make(std::byte* slab, Key first, Key last, event e, const void* owner,
                                                 bool blockable) noexcept {
    if (!is_valid<Key>({first, last})) [[unlikely]]
      return nullptr;
    open_bracket<Key>* const b = make_bracket(registry_, slab);
    b->i.range = {first, last};
    b->i.event = e;
    b->i.owner = owner;
    b->i.blockable = blockable;
    return b;
  }

  // As in under_gate: cold ends in the primary's code, fast walks behind them.

  MMUNOTIFY_COLD open_bracket<Key>* start_armed(std::byte* slab, Key first, Key last, event e,
                                                const void* owner) noexcept {
    return start_walk(slab, first, last, e, owner);
  }
  MMUNOTIFY_COLD void end_armed(open_bracket<Key>* b) noexcept { end_walk(b); }

  MMUNOTIFY_ARMED open_bracket<Key>* start_walk(std::byte* slab, Key first, Key last, event e,
                                                const void* owner) noexcept {
    open_bracket<Key>* const b = make(slab, first, last, e, owner, true);
    if (b != nullptr) [[likely]]
      registry_.call_start(b->i, b->version, observer_);
    return b;
  }
  MMUNOTIFY_ARMED void end_walk(open_bracket<Key>* b) noexcept {
    if (!is_open(*b)) [[unlikely]]
      return;
    registry_.call_end(b->i, b->version, observer_);
    b->audience = nullptr;
    registry_.domain().read_unlock_unordered(b);
  }

  MMUNOTIFY_COLD open_bracket<Key>* try_start_armed(std::byte* slab, Key first, Key last, event e,
                                                    const void* owner) noexcept {
    if (last < first) [[unlikely]] {
      static_cast<void>(is_valid<Key>({first, last}));
      return refused();
    }
    open_bracket<Key>* const b = make(slab, first, last, e, owner, false);
    if (b == nullptr || registry_.try_call_start(b->i, b->version, observer_)) return b;
    registry_.domain().cells(slab).give_back(b);
    return refused();
  }

  template <bool FirstYes>
  MMUNOTIFY_COLD bool ask_young_armed(young_hook<Key> hook, basic_range<Key> r) noexcept {
    if (!is_valid(r)) return false;
    registry_.domain().read_lock_unordered();
    const bool young = registry_.template ask_young<FirstYes>(hook, r, observer_);
    registry_.domain().read_unlock_unordered();
    return young;
  }

  registry<Key> registry_;
  bool released_ = false;  ///< under the writers' mutex
  [[no_unique_address]] Observer observer_;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
