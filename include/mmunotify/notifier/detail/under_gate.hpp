// SPDX-License-Identifier: MIT
#pragma once

// The gate of arming::under: one word. See arming.hpp for the problem.
//
//   word_ = registry address | released     0: disarmed     1: disarmed and released
//
// The word changes only under the writers' mutex of the registry that it names, or by compare-exchange from 0.
//
// A switch stands before the word. It may be off only while the word is 0: it is put on before the word changes from 0,
// and off after it is 0 again. arming::under has none, arming::keyed a static key.

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

/// The switch that is on always.
struct no_switch {
  static constexpr bool maybe() noexcept { return true; }
  static constexpr errc enable() noexcept { return errc::ok; }
  static constexpr void disable() noexcept {}
};

template <address_key Key, observe::observer Observer, class Switch = no_switch, class Platform = linux_platform>
class under_gate {
  using pool = registry_pool<Key, Platform>;
  using entry = typename pool::entry;

 public:
  using registry_type = registry<Key, Platform>;
  using node = basic_subscriber<Key>;
  using done_hook = typename registry_type::done_hook;
  /// Null: nobody was called.
  using ticket = open_bracket<Key, Platform>*;

  under_gate() = default;
  under_gate(const under_gate&) = delete;
  under_gate& operator=(const under_gate&) = delete;
  ~under_gate() {
    if (!armed()) [[likely]]
      return;
    static_cast<void>(barrier());  // those that leave by themselves
    if (armed()) violated("L1", "~address_space", "subscribers are still registered");
  }

  // --- The hot half. ----------------------------------------------------------------------------------------------

  // Arming is ordered by the primary's lock, disarming is not. (u5) acquire pairs with (u6): who finds nobody comes
  // after all that the last client did until its release hook was over, and may free what that client had mapped.
  [[gnu::always_inline]] bool armed() const noexcept {
    return Switch::maybe() && word_.load(std::memory_order_acquire) > released;
  }

  template <manner M = manner::blocking>
  [[gnu::always_inline]] ticket start(basic_range<Key> r, event e, const void* owner) noexcept {
    open_.add(1);
    if (!armed()) [[likely]]
      return nullptr;
    return start_armed<M>(r.first, r.last, e, owner);
  }

  [[gnu::always_inline]] ticket start_in_place(basic_range<Key> r, event e, const void* owner) noexcept {
    return start<manner::in_place>(r, e, owner);
  }

  [[gnu::always_inline]] void end(ticket t) noexcept {
    if (t != nullptr) [[unlikely]]
      end_armed(t);
    open_.add(-1);
  }

  /// Returns: refused() if a client refused; then the bracket is over and end() must not be called.
  [[gnu::always_inline]] ticket try_start(basic_range<Key> r, event e, const void* owner) noexcept {
    open_.add(1);
    if (!armed()) [[likely]]
      return nullptr;
    ticket t = start_armed<manner::nonblocking>(r.first, r.last, e, owner);
    if (t == refused()) open_.add(-1);
    return t;
  }
  static ticket refused() noexcept { return reinterpret_cast<ticket>(std::uintptr_t{1}); }

  /// The closure form calls its closure bare when disarmed, and has its armed half, closure and all, out of line.
  static constexpr bool closure_out_of_line = MMUNOTIFY_CHECKED == 0;

  /// Returns: f(registry, observer), called in the section of those who are registered; a default value if nobody is.
  /// For the armed half of a call.
  template <class Ask>
  [[gnu::always_inline]] auto ask(Ask f) noexcept {
    using answer = decltype(f(std::declval<registry_type&>(), observer_));
    entry* const asked = enter().audience;
    if (asked == nullptr) return answer();
    const answer a = f(static_cast<registry_type&>(*asked), observer_);
    asked->domain().read_unlock_unordered();
    return a;
  }

  // --- The cold half. ---------------------------------------------------------------------------------------------

  /// Precondition: the caller holds the primary's lock exclusively.
  /// existing: see registry::replay.
  template <class Existing>
  MMUNOTIFY_COLD errc join(node& n, const void* home, Existing&& existing) noexcept {
    if (open_.any()) {
      violated("P7", "address_space::register_subscriber",
               "a bracket is open although the lock that was shown should exclude it: the primary brackets without its "
               "lock, or this thread registers inside its own bracket");
      return errc::bracket_open;
    }
    if (const errc e = registry_type::claim(n, home); e != errc::ok) return e;
    const errc e = link(n, existing);
    if (e != errc::ok) registry_type::unclaim(n);
    return e;
  }

  MMUNOTIFY_COLD errc leave(node& n, const void* home) noexcept {
    while (true) {
      registry_type* const r = registry_type::where(n, home);
      if (r == nullptr) return registry_type::depart(n, home);
      if (const errc e = r->leave(n, home); e != errc::again) return e;
    }
  }

  MMUNOTIFY_COLD errc leave_async(node& n, const void* home, done_hook done) noexcept {
    while (true) {
      registry_type* const r = registry_type::where(n, home);
      if (r == nullptr) return registry_type::depart(n, home, done);
      if (const errc e = r->leave_async(n, home, done); e != errc::again) return e;
    }
  }

  /// Effects: f(registry) while the space is armed, with the writers' mutex held; for what brackets need not know at
  /// once. Errors: lock_not_held if the space is disarmed, released.
  template <class F>
  MMUNOTIFY_COLD errc while_armed(F f) noexcept {
    while (true) {
      const std::uintptr_t seen = word_.load(std::memory_order_acquire);  // (u2)
      if (seen <= released) return seen == 0 ? errc::lock_not_held : errc::released;
      entry* const r = at(seen);
      const std::lock_guard lock(r->writers());
      const std::uintptr_t now = word_.load(std::memory_order_relaxed);
      if (at(now) != r) continue;  // its last subscriber has just left
      return (now & released) != 0 ? errc::released : f(*r);
    }
  }

  /// A space that is disarmed has nothing to wait for: it stays armed until removals are over.
  MMUNOTIFY_COLD errc barrier() noexcept {
    registry_type* const r = named();
    return r != nullptr ? r->barrier() : errc::ok;
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
        if (r->would_deadlock("address_space::release")) return errc::would_deadlock;
        word_.fetch_or(released, std::memory_order_relaxed);
        r->pin_locked();  // or it could serve another space before we have looked at it
      }
      return r->release_all();
    }
  }

  /// Returns: false if this thread is certainly in no callback and no armed bracket: the space may just be disarmed.
  bool may_be_inside() const noexcept {
    entry* const r = named();
    return r == nullptr || r->domain().held_by_this_thread();
  }

  /// The witness of the registration excludes others.
  struct nobody {};
  static nobody sharing(errc&) noexcept { return {}; }

  Observer& observer() noexcept { return observer_; }

 private:
  static constexpr std::uintptr_t released = 1;

  [[gnu::always_inline]] static entry* at(std::uintptr_t word) noexcept {
    return reinterpret_cast<entry*>(word & ~std::uintptr_t{1});
  }
  /// The registry that the word names, null when disarmed. (u2) acquire pairs with (u1): it is complete.
  entry* named() const noexcept { return at(word_.load(std::memory_order_acquire)); }

  template <class Existing>
  errc link(node& n, Existing& existing) noexcept {
    while (true) {
      const std::uintptr_t seen = word_.load(std::memory_order_acquire);  // (u2)
      if (seen == released) return errc::released;
      if (seen == 0) {
        if (const errc e = attach(n, existing); e != errc::again) return e;
        continue;
      }
      entry* const r = at(seen);
      {
        const std::lock_guard lock(r->writers());
        const std::uintptr_t now = word_.load(std::memory_order_relaxed);
        if (at(now) != r) continue;  // its last subscriber has just left
        if ((now & released) != 0) return errc::released;
        r->link_locked(n);
      }
      r->replay(n, existing);
      r->settle(n);
      return errc::ok;
    }
  }

  /// Binds a registry to the space, with the node as its first: a registry that is bound is never empty.
  template <class Existing>
  errc attach(node& n, Existing& existing) noexcept {
    entry* const r = pool::take();
    if (r == nullptr) return errc::no_memory;
    if (const errc e = r->domain().status(); e != errc::ok) {
      delete r;  // nobody has seen it; the next one may find a slot
      return e;
    }
    if (const errc e = Switch::enable(); e != errc::ok) {
      pool::give_back(r);
      return e;
    }
    bool linked = false;
    {
      const std::lock_guard lock(r->writers());
      r->serve(hooks, this);
      std::uintptr_t expected = 0;
      // (u1) release pairs with (u2), (u3), (u4): the registry is complete for whoever finds it.
      if (word_.compare_exchange_strong(expected, reinterpret_cast<std::uintptr_t>(r), std::memory_order_release,
                                        std::memory_order_relaxed)) {
        r->link_locked(n);
        linked = true;
      }
    }
    if (linked) {
      r->replay(n, existing);
      r->settle(n);
      return errc::ok;
    }
    Switch::disable();
    pool::give_back(r);
    return errc::again;
  }

  /// Under the writers' mutex, when the last subscriber has been unlinked.
  void disarm() noexcept {
    word_.fetch_and(released, std::memory_order_release);  // (u6) pairs with (u5)
    Switch::disable();                                     // who finds the switch off comes after this, as with (u5)
  }

  struct entered {
    entry* audience = nullptr;
    std::byte* slab = nullptr;
  };

  /// Enters the section of the registry that the word names. Returns: no audience if the space is disarmed after all.
  [[gnu::always_inline]] entered enter() noexcept {
    while (true) {
      const std::uintptr_t word = word_.load(std::memory_order_acquire);  // (u2)
      if (word <= released) [[unlikely]]
        return {};
      entry* const r = at(word);
      std::byte* const slab = r->domain().read_lock_unordered();
      if (word_.load(std::memory_order_acquire) == word) [[likely]]
        return {r, slab};  // (u4): inside the section it stays ours
      r->domain().read_unlock_unordered();
    }
  }

  // start_armed and end_armed are the cold ends of the hooks in the primary's code; the walks behind them are fast.

#if defined(__clang__)
  template <manner M>
  [[gnu::always_inline]] ticket start_armed(Key first, Key last, event e, const void* owner) noexcept {
    ticket t = nullptr;
    start_armed_into<M>(t, first, last, e, owner);
    return t;
  }
  template <manner M>
  MMUNOTIFY_COLD_PRESERVING void start_armed_into(ticket& t, Key first, Key last, event e, const void* owner) noexcept {
    t = start_walk<M>(first, last, e, owner);
  }
#else
  template <manner M>
  MMUNOTIFY_COLD ticket start_armed(Key first, Key last, event e, const void* owner) noexcept {
    return start_walk<M>(first, last, e, owner);
  }
#endif
  /// Static: what it needs of the space it finds through the registry.
  MMUNOTIFY_COLD static void end_armed(ticket b) noexcept { end_walk(b); }

  template <manner M>
  MMUNOTIFY_ARMED ticket start_walk(Key first, Key last, event e, const void* owner) noexcept {
    if (!is_valid<Key>({first, last})) [[unlikely]]
      return last < first && M == manner::nonblocking ? refused() : nullptr;
    const auto [r, slab] = enter();
    if (r == nullptr) [[unlikely]]
      return nullptr;
    open_bracket<Key, Platform>* const b = make_bracket<Key, Platform>(*r, slab);
    describe(b->i, {first, last}, e, owner, M);
    if constexpr (M != manner::nonblocking) {
      b->version = r->call_start(b->i, b->version, b->intervals, observer_);
    } else if (!r->try_call_start(b->i, b->version, b->intervals, observer_)) {
      close(b);
      return refused();
    }
    return b;
  }

  MMUNOTIFY_ARMED static void end_walk(ticket b) noexcept {
    if (!is_open(*b)) [[unlikely]]
      return;
    registry_type* const r = b->audience;
    r->call_end(b->i, b->version, b->intervals, static_cast<under_gate*>(r->gate())->observer_);
    close(b);
  }

  [[gnu::always_inline]] static void close(ticket b) noexcept {
    std::exchange(b->audience, nullptr)->domain().read_unlock_unordered(b);
  }

  static constexpr gate_hooks<Key, Platform> hooks{
      [](void* gate) noexcept { static_cast<under_gate*>(gate)->disarm(); },
      [](registry_type& r) noexcept { pool::give_back(static_cast<entry*>(&r)); },
      [](void* gate, observe::occurrence what, std::uint64_t n) noexcept {
        static_cast<under_gate*>(gate)->observer_.note(what, n);
      }};

  std::atomic<std::uintptr_t> word_{0};
  [[no_unique_address]] open_brackets open_;
  [[no_unique_address]] Observer observer_;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
