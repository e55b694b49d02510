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

  struct ticket {
    srcu_domain::section_token section;
    std::uint64_t version = 0;  ///< 0: nobody was called
    bool refused = false;
  };

  // --- The hot half. ----------------------------------------------------------------------------------------------

  bool armed() const noexcept { return !registry_.empty(); }

  // Dekker: registration links the node, then waits for a grace period; a bracket enters the section, then looks for
  // nodes. Either the bracket sees the node, or the registration waits for the bracket.
  ticket start(basic_range<Key> r, event e, const void* owner) noexcept {
    ticket t{registry_.domain().read_lock(), 0, false};
    if (armed()) [[unlikely]] t.version = start_armed(r.first, r.last, e, owner);
    return t;
  }

  void end(basic_range<Key> r, event e, const void* owner, bool blockable, ticket t) noexcept {
    if (t.version != 0) [[unlikely]] end_armed(t.version, r.first, r.last, e, owner, blockable);
    registry_.domain().read_unlock(t.section);
  }

  ticket try_start(basic_range<Key> r, event e, const void* owner) noexcept {
    ticket t{registry_.domain().read_lock(), 0, false};
    if (armed()) [[unlikely]] {
      t.version = try_start_armed(r.first, r.last, e, owner);
      t.refused = t.version == refused_version;
      if (t.refused) registry_.domain().read_unlock(t.section);
    }
    return t;
  }
  static bool refused(const ticket& t) noexcept { return t.refused; }

  /// The section is the bracket's, armed or not.
  static constexpr bool skips_bracket() noexcept { return false; }

  template <bool FirstYes>
  bool ask_young(young_hook<Key> hook, basic_range<Key> r) noexcept {
    if (!armed()) [[likely]] return false;
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
    if (registry<Key>::departed(n)) return registry<Key>::depart(n);
    if (registry<Key>::home_of(n) != home) return errc::not_registered;
    return registry_.leave(n, observer_, [] {}, [] {});
  }

  MMUNOTIFY_COLD errc release() noexcept {
    {
      const std::lock_guard lock(registry_.writers());
      released_ = true;
    }
    return registry_.release_all(observer_, [] {}, [] {});
  }

  Observer& observer() noexcept { return observer_; }

 private:
  static constexpr std::uint64_t refused_version = ~std::uint64_t{0};

  MMUNOTIFY_COLD std::uint64_t start_armed(Key first, Key last, event e, const void* owner) noexcept {
    const basic_invalidation<Key> i{{first, last}, e, owner, true};
    if (!is_valid(i.range)) return 0;
    const std::uint64_t g = registry_.version();
    registry_.call_start(i, g, observer_);
    return g;
  }

  MMUNOTIFY_COLD std::uint64_t try_start_armed(Key first, Key last, event e, const void* owner) noexcept {
    const basic_invalidation<Key> i{{first, last}, e, owner, false};
    if (!is_valid(i.range)) return 0;
    const std::uint64_t g = registry_.version();
    return registry_.try_call_start(i, g, observer_) ? g : refused_version;
  }

  MMUNOTIFY_COLD void end_armed(std::uint64_t g, Key first, Key last, event e, const void* owner,
                                bool blockable) noexcept {
    registry_.call_end({{first, last}, e, owner, blockable}, g, observer_);
  }

  template <bool FirstYes>
  MMUNOTIFY_COLD bool ask_young_armed(young_hook<Key> hook, basic_range<Key> r) noexcept {
    const read_section s(registry_.domain());
    return registry_.template ask_young<FirstYes>(hook, r, observer_);
  }

  registry<Key> registry_;
  bool released_ = false;  ///< under the writers' mutex
  [[no_unique_address]] Observer observer_;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
