// SPDX-License-Identifier: MIT
#pragma once

// The gate of arming::under: one word. See arming.hpp for the problem.
//
//   word_ = registry address | released     0: disarmed     1: disarmed and released
//
// The word changes only under the writers' mutex of the registry that it names, or by compare-exchange from 0.

#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>

#include <mmunotify/notifier/arming.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// Counts open brackets in checked builds; empty otherwise.
class open_brackets {
#if MMUNOTIFY_CHECKED
 public:
  void add(int n) noexcept { open_.fetch_add(n, std::memory_order_relaxed); }
  bool any() const noexcept { return open_.load(std::memory_order_relaxed) != 0; }

 private:
  std::atomic<int> open_{0};
#else
 public:
  static constexpr void add(int) noexcept {}
  static constexpr bool any() noexcept { return false; }
#endif
};

template <address_key Key, observe::observer Observer>
class under_gate {
  using pool = registry_pool<Key>;
  using entry = typename pool::entry;

 public:
  using node = basic_subscriber<Key>;
  using ticket = armed_bracket;

  under_gate() = default;
  under_gate(const under_gate&) = delete;
  under_gate& operator=(const under_gate&) = delete;
  ~under_gate() {
    if (armed()) [[unlikely]] violated("L1", "~address_space", "subscribers are still registered");
  }

  // --- The hot half. ----------------------------------------------------------------------------------------------

  // Relaxed: whoever arms holds the primary's lock exclusively, and whoever brackets holds it, too.
  bool armed() const noexcept { return word_.load(std::memory_order_relaxed) > released; }

  ticket start(basic_range<Key> r, event e, const void* owner) noexcept {
    open_.add(1);
    if (!armed()) [[likely]] return {};
    return start_saving_registers(r.first, r.last, e, owner);
  }

  void end(basic_range<Key> r, event e, const void* owner, bool blockable, ticket t) noexcept {
    if (t.registry_and_nested != 0) [[unlikely]] end_armed(t, r.first, r.last, e, owner, blockable);
    open_.add(-1);
  }

  /// Returns: refused() if a client refused; then the bracket is over and end() must not be called.
  ticket try_start(basic_range<Key> r, event e, const void* owner) noexcept {
    open_.add(1);
    if (!armed()) [[likely]] return {};
    const ticket t = try_start_armed(r.first, r.last, e, owner);
    if (refused(t)) open_.add(-1);
    return t;
  }
  static bool refused(ticket t) noexcept { return t.registry_and_nested == 0 && t.version != 0; }

  /// True if the closure form may call its closure bare.
  bool skips_bracket() const noexcept { return MMUNOTIFY_CHECKED == 0 && !armed(); }

  template <bool FirstYes>
  bool ask_young(young_hook<Key> hook, basic_range<Key> r) noexcept {
    if (!armed()) [[likely]] return false;
    return ask_young_armed<FirstYes>(hook, r);
  }

  // --- The cold half. ---------------------------------------------------------------------------------------------

  /// Precondition: the caller holds the primary's lock exclusively.
  MMUNOTIFY_COLD errc join(node& n, const void* home) noexcept {
    if (open_.any()) {
      violated("P7", "address_space::register_subscriber",
               "a bracket is open although the lock that was shown should exclude it: the primary brackets without its "
               "lock, or this thread registers inside its own bracket");
      return errc::bracket_open;
    }
    if (const errc e = registry<Key>::claim(n, home); e != errc::ok) return e;
    const errc e = link(n);
    if (e != errc::ok) registry<Key>::unclaim(n);
    return e;
  }

  MMUNOTIFY_COLD errc leave(node& n, const void* home) noexcept {
    entry* const r = named();
    if (registry<Key>::departed(n)) return registry<Key>::depart(n);
    if (registry<Key>::home_of(n) != home || r == nullptr) return errc::not_registered;
    return r->leave(n, observer_, [&] { disarm(); }, [&] { pool::give_back(r); });
  }

  MMUNOTIFY_COLD errc release() noexcept {
    while (true) {
      std::uintptr_t seen = 0;
      // (u3) acquire pairs with (u1).
      if (word_.compare_exchange_strong(seen, released, std::memory_order_acquire) || seen == released) {
        return errc::ok;
      }
      entry* const r = at(seen);
      {
        const std::lock_guard lock(r->writers());
        if (named() != r) continue;  // its last subscriber has just left
        word_.fetch_or(released, std::memory_order_relaxed);
      }
      return r->release_all(observer_, [&] { disarm(); }, [&] { pool::give_back(r); });
    }
  }

  Observer& observer() noexcept { return observer_; }

 private:
  static constexpr std::uintptr_t released = 1;
  static constexpr std::uintptr_t nested = 1;  ///< in a ticket, where the released bit is of no interest

  static entry* at(std::uintptr_t word) noexcept { return reinterpret_cast<entry*>(word & ~std::uintptr_t{1}); }
  /// The registry that the word names, null when disarmed. (u2) acquire pairs with (u1): it is complete.
  entry* named() const noexcept { return at(word_.load(std::memory_order_acquire)); }

  errc link(node& n) noexcept {
    while (true) {
      entry* const r = named();
      if (r == nullptr) {
        if (const errc e = attach(); e != errc::ok) return e;
        continue;
      }
      const std::lock_guard lock(r->writers());
      const std::uintptr_t now = word_.load(std::memory_order_relaxed);
      if (at(now) != r) continue;  // its last subscriber has just left
      if ((now & released) != 0) return errc::released;
      r->link_locked(n);
      r->settle(n, observer_);
      return errc::ok;
    }
  }

  /// Binds a registry to the space.
  errc attach() noexcept {
    if (word_.load(std::memory_order_relaxed) == released) return errc::released;
    entry* const r = pool::take();
    if (r == nullptr) return errc::no_memory;
    std::uintptr_t expected = 0;
    errc e = r->domain().status();
    // (u1) release pairs with (u2), (u3), (u4): the registry is complete for whoever finds it.
    if (e == errc::ok && !word_.compare_exchange_strong(expected, reinterpret_cast<std::uintptr_t>(r),
                                                        std::memory_order_release, std::memory_order_relaxed)) {
      e = expected == released ? errc::released : errc::ok;
    } else if (e == errc::ok) {
      return errc::ok;
    }
    pool::give_back(r);
    return e;
  }

  /// Under the writers' mutex, when the last subscriber has been unlinked.
  void disarm() noexcept { word_.fetch_and(released, std::memory_order_relaxed); }

  /// Enters the named registry's section. Returns: {} if the space is disarmed after all.
  ticket enter() noexcept {
    while (entry* const r = named()) {
      const auto section = r->domain().read_lock();
      if (named() == r) [[likely]] {  // (u4): inside the section now, so it stays ours
        return {reinterpret_cast<std::uintptr_t>(r) | (section.nested() ? nested : 0), r->version()};
      }
      r->domain().read_unlock(section);
    }
    return {};
  }

  static void leave_section(ticket t) noexcept {
    at(t.registry_and_nested)->domain().read_unlock((t.registry_and_nested & nested) != 0);
  }

#if defined(__clang__)
  ticket start_saving_registers(Key first, Key last, event e, const void* owner) noexcept {
    ticket t;
    start_armed_into(t, first, last, e, owner);
    return t;
  }
  MMUNOTIFY_COLD_PRESERVING void start_armed_into(ticket& t, Key first, Key last, event e, const void* owner) noexcept {
    t = start_armed(first, last, e, owner);
  }
#else
  ticket start_saving_registers(Key first, Key last, event e, const void* owner) noexcept {
    return start_armed(first, last, e, owner);
  }
#endif

  MMUNOTIFY_COLD ticket start_armed(Key first, Key last, event e, const void* owner) noexcept {
    const basic_invalidation<Key> i{{first, last}, e, owner, true};
    if (!is_valid(i.range)) return {};
    const ticket t = enter();
    if (t.registry_and_nested != 0) at(t.registry_and_nested)->call_start(i, t.version, observer_);
    return t;
  }

  MMUNOTIFY_COLD ticket try_start_armed(Key first, Key last, event e, const void* owner) noexcept {
    const basic_invalidation<Key> i{{first, last}, e, owner, false};
    if (!is_valid(i.range)) return {};
    const ticket t = enter();
    if (t.registry_and_nested == 0) return t;
    if (at(t.registry_and_nested)->try_call_start(i, t.version, observer_)) return t;
    leave_section(t);
    return {0, t.version};
  }

  MMUNOTIFY_COLD_PRESERVING void end_armed(ticket t, Key first, Key last, event e, const void* owner, bool blockable) noexcept {
    entry* const r = at(t.registry_and_nested);
    r->call_end({{first, last}, e, owner, blockable}, t.version, observer_);
    leave_section(t);
  }

  template <bool FirstYes>
  MMUNOTIFY_COLD bool ask_young_armed(young_hook<Key> hook, basic_range<Key> r) noexcept {
    const ticket t = enter();
    if (t.registry_and_nested == 0) return false;
    const bool young = at(t.registry_and_nested)->template ask_young<FirstYes>(hook, r, observer_);
    leave_section(t);
    return young;
  }

  std::atomic<std::uintptr_t> word_{0};
  [[no_unique_address]] open_brackets open_;
  [[no_unique_address]] Observer observer_;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
