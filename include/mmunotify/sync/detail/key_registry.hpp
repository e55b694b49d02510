// SPDX-License-Identifier: MIT
#pragma once

// Which modules (the executable, shared objects) have sites, and how a key flips in all of them. See static_key.hpp.
//
// Rules, under the registry's mutex, which is a leaf: nothing is called under it but the kernel.
//   T1  a site is a no-op only while the count of its key is 0;
//   T2  the count leaves 0 only after every site of the key is a jump and every processor runs it (synchronize);
//   T3  a site becomes a no-op only after the count is 0 and every thread has passed a full fence since (synchronize).
// So a test always answers what the count says: a no-op is an answer kept in the code for as long as it is no.
//   T2 -> after enable() has returned, no thread can still execute a stale no-op.
//   T3 -> a thread that executes the no-op does so after that fence, hence after all that came before disable(): the
//         no-op acquires as the load does.
// A site that is a jump though it could be a no-op is merely slow: a failure on the way to the no-op needs no repair.
//
// Orderings:
//   (k1) count release / (k2) count acquire: who finds the key on (off) comes after what was done before enable()
//        (disable()). The same for the no-op: T3.
//
// Cost of a flip: all sites of the process are looked at (some ns each); a byte is written for each of the key's; one
// membarrier.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/key_site.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// An executable or shared object that has keys. Its fields are under the mutex of the registry, but for `registry`.
struct key_module {
  const key_entry* first = nullptr;
  const key_entry* last = nullptr;
  bool (*probe)() = nullptr;  ///< runs the site of probe_copy: true if it is a jump
  const key_copy* probe_copy = nullptr;
  std::atomic<void*> registry{nullptr};
  key_module* next = nullptr;
  bool joined = false;
  const char* refusal = nullptr;  ///< null: its sites are patched; else why not
};

template <class Text>
class key_registry {
 public:
  /// Effects: the module's sites are part of its keys from now on: those that are off become no-ops, once it is proved
  /// that text can be changed and changed back. Joining again is harmless.
  MMUNOTIFY_COLD void join(key_module& m) noexcept {
    const std::lock_guard lock(mutex_);
    if (m.joined) return;
    m.joined = true;
    m.next = modules_;
    modules_ = &m;
    for (const key_entry* e = m.first; e != m.last; ++e) adopt(e->key(), m);
    m.refusal = prove(m);
    if (m.refusal != nullptr) return;
    typename Text::writer text;
    for (const key_entry* e = m.first; e != m.last; ++e) {
      // T3: no thread runs code of a module before its initialisers without having been told of it by one that came
      // after every disable() so far.
      if (is_off(e->key())) static_cast<void>(put(text, *e, site_nop));
    }
  }

  /// Effects: the module's code may go. Its sites are jumps again, its keys keep their last answer.
  MMUNOTIFY_COLD void leave(key_module& m) noexcept {
    const std::lock_guard lock(mutex_);
    if (!m.joined) return;
    if (m.refusal == nullptr) {
      typename Text::writer text;
      for (const key_entry* e = m.first; e != m.last; ++e) static_cast<void>(put(text, *e, site_jump));
      static_cast<void>(Text::synchronize());
    }
    key_copy** copy = &copies_;
    while (*copy != nullptr) {
      key_copy* const c = *copy;
      if (c->home == &m) {
        *copy = c->next;
        c->home = nullptr;
      } else {
        copy = &c->next;
      }
    }
    key_module** at = &modules_;
    while (*at != &m) at = &(*at)->next;
    *at = m.next;
    m.joined = false;
  }

  /// Returns: ok; refused_by_system if a site cannot be made a jump: then the key is as it was.
  MMUNOTIFY_COLD errc enable(key_copy& key, const key_module& home) noexcept {
    const std::lock_guard lock(mutex_);
    adopt(key, home);
    const std::uint64_t count = key.count.load(std::memory_order_relaxed);
    if (count == 0 && !all_jump(key)) return errc::refused_by_system;
    set(key, count + 1);
    return errc::ok;
  }

  /// Returns: false if the key is not enabled.
  MMUNOTIFY_COLD bool disable(key_copy& key, const key_module& home) noexcept {
    const std::lock_guard lock(mutex_);
    adopt(key, home);
    const std::uint64_t count = key.count.load(std::memory_order_relaxed);
    if (count == 0) return false;
    set(key, count - 1);
    if (count == 1) all_nop(key);
    return true;
  }

  MMUNOTIFY_COLD bool enabled(key_copy& key, const key_module& home) noexcept {
    const std::lock_guard lock(mutex_);
    adopt(key, home);
    return !is_off(key);
  }

  /// Returns: null if the module's sites are patched, or why not.
  MMUNOTIFY_COLD const char* refusal(const key_module& m) noexcept {
    const std::lock_guard lock(mutex_);
    return m.refusal;
  }

 private:
  static bool same(const key_copy& a, const key_copy& b) noexcept {
    return &a == &b || std::strcmp(a.name, b.name) == 0;
  }
  static bool is_off(const key_copy& key) noexcept { return key.count.load(std::memory_order_relaxed) == 0; }

  void set(const key_copy& key, std::uint64_t count) noexcept {
    for (key_copy* c = copies_; c != nullptr; c = c->next) {
      if (same(*c, key)) c->count.store(count, std::memory_order_release);  // (k1) pairs with (k2), T3
    }
  }

  /// Effects: the registry knows the copy, and its count is that of the key.
  void adopt(key_copy& key, const key_module& home) noexcept {
    if (key.home != nullptr) return;
    for (const key_copy* c = copies_; c != nullptr; c = c->next) {
      if (!same(*c, key)) continue;
      key.count.store(c->count.load(std::memory_order_relaxed), std::memory_order_release);  // (k1)
      break;
    }
    key.home = &home;
    key.next = copies_;
    copies_ = &key;
  }

  static std::uint8_t byte_at(const std::uint8_t* site) noexcept {
    return *static_cast<const volatile std::uint8_t*>(site);
  }

  static bool put(typename Text::writer& text, const key_entry& e, std::uint8_t byte) noexcept {
    const std::uint8_t* const site = e.site();
    return site == nullptr || byte_at(site) == byte || text.store(site, byte);
  }

  /// Calls f(entry) for each site of the key in modules that are patched, until f returns false.
  /// Returns: 0 if f did, otherwise 1 + the number of sites.
  template <class F>
  std::size_t for_each_site(const key_copy& key, F f) noexcept {
    std::size_t sites = 0;
    for (const key_module* m = modules_; m != nullptr; m = m->next) {
      if (m->refusal != nullptr) continue;
      for (const key_entry* e = m->first; e != m->last; ++e) {
        if (!same(e->key(), key)) continue;
        if (!f(*e)) return 0;
        ++sites;
      }
    }
    return sites + 1;
  }

  /// T2. Returns: true if no processor can run a no-op of the key any more. The barrier is needed although every site
  /// may be a jump already: an earlier call may have failed at it.
  bool all_jump(const key_copy& key) noexcept {
    typename Text::writer text;
    const std::size_t found = for_each_site(key, [&](const key_entry& e) { return put(text, e, site_jump); });
    if constexpr (mutated(mutation::torn_key)) return found != 0;
    return found == 1 || (found > 1 && Text::synchronize());
  }

  /// T3. It may fail at any place.
  void all_nop(const key_copy& key) noexcept {
    if (for_each_site(key, [](const key_entry&) { return true; }) == 1 || !Text::synchronize()) return;
    typename Text::writer text;
    for_each_site(key, [&](const key_entry& e) { return put(text, e, site_nop); });
  }

  /// Flips a site that nobody else runs, there and back, and runs it each time. This finds whatever refuses, and
  /// whatever executes something else than the bytes in memory: valgrind, emulators. Returns: null, or why not.
  static const char* prove(const key_module& m) noexcept {
    const key_entry* e = m.first;
    while (e != m.last && &e->key() != m.probe_copy) ++e;
    if (e == m.last) return "the table of sites was lost by the linker";
    if (e->site() == nullptr) return "built without live patching";
    if (!m.probe()) return "a site does not hold what the compiler wrote";
    if (const char* const why = Text::prepare(); why != nullptr) return why;
    typename Text::writer text;
    if (!put(text, *e, site_nop)) return "the system takes no write to code through /proc/thread-self/mem";
    const bool seen = Text::synchronize() && !m.probe();
    if (!put(text, *e, site_jump) || !Text::synchronize() || !m.probe()) return "a write to code cannot be taken back";
    return seen ? nullptr : "a write to code is not what is executed (an emulator, a translator)";
  }

  std::mutex mutex_;
  key_module* modules_ = nullptr;
  key_copy* copies_ = nullptr;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
