// SPDX-License-Identifier: MIT
#pragma once

// A condition that is nearly always false, tested by an instruction that does nothing (Linux: jump labels, static
// keys).
//
//   using tracing = mmunotify::static_key<"app.tracing">;
//   if (tracing::test()) [[unlikely]] trace(...);        // off: five bytes of no-op, no load, no branch
//   if (tracing::enable() != mmunotify::errc::ok) ...    // rewrites every test of the process
//
// Problem. A flag that is read on a hot path costs a load, a compare, a branch, and a place in the cache, each time, to
// find the same answer. Here the answer is in the code: enabling changes the first byte of every test's instruction
// from a no-op to a jump (detail/key_site.hpp), disabling changes it back. The jump leads to the load of the flag, so a
// test is right in either state, and a no-op is there only while the answer is no (detail/key_registry.hpp, T1 to T3).
//
// Contract. A key is its name: all of that name in a process are one key, in whatever executable, shared object or
// translation unit. enable() and disable() nest and count. When enable() has returned, every test that comes after it
// is true; a test that is true comes after an enable() and sees what was done before it, a test that is false sees what
// was done before the last disable(). Shared objects may come (their tests know the answer from their first
// initialiser of default priority on) and go while a key flips.
//
// Where code cannot be changed, every test is the load, and everything else is the same: other machines than x86-64,
// ThreadSanitizer, MMUNOTIFY_LIVE_KEYS=0, valgrind and emulators, hardened systems. This is found out per module by
// trying, when it is loaded; key_patching() tells. A process that gives these rights up later (seccomp) is told by
// enable(), which then refuses; if it has enabled the key before, tests are loads and nothing needs to be written.
//
// Is it allowed? The store is one byte inside an instruction whose length and boundaries stay. Processors fetch code
// from coherent caches, a byte is never torn, so each executes the old instruction or the new one; from the membarrier
// on, a serialised one executes the new one only. AMD's manual covers code that is modified while others run it
// (volume 2, "Cross-Modifying Code"). Intel's asks that executing processors wait and serialise (volume 3, "Handling
// Self- and Cross-Modifying Code"; there are errata of long ago, as W108 of the Celeron, for those that do not). Nobody
// waits here: between store and membarrier a processor may execute either. Managed-language run times have patched
// running code without waiting for decades, and more than one byte of it.
//
// Limits. Linux, ELF, a loader with dl_iterate_phdr. A process that forks while another thread flips must not flip in
// the child. A module whose destructors have run hears of no flip any more: maybe() is true there, test() keeps its
// answer. A page of code with a site becomes memory of this process (4 KiB) when it is loaded.
//
// Cost (2 vCPU Zen 4 guest): a test that is off 0 to 0.2 ns, on a jump, a load and a branch. enable() and disable() 15
// ns each while the answer stays; when it changes, 6 us (up to 10 more when other threads run) and 1 us for each test
// in the code; a pair with one test 14 us.

#include <algorithm>
#include <atomic>
#include <cstddef>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/key_module.hpp>
#include <mmunotify/sync/detail/key_registry.hpp>
#include <mmunotify/sync/detail/key_site.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// A string as a template argument.
template <std::size_t Size>
struct key_name {
  char text[Size];
  // NOLINTNEXTLINE(google-explicit-constructor): static_key<"name"> is the point
  constexpr key_name(const char (&s)[Size]) noexcept { std::copy_n(s, Size, text); }
};

/// How the calling module's keys are tested.
struct key_patching_state {
  bool live;             ///< true: by code that is changed; false: by a load
  const char* sentence;  ///< why
};

/// Effects: tries it, if this has not happened when the module was loaded. Progress: blocking.
inline key_patching_state key_patching() noexcept {
  auto* const keys = detail::key_membership::join();
  if (keys == nullptr) return {false, "out of memory"};
  const char* const refusal = keys->refusal(detail::this_module);
  return refusal == nullptr ? key_patching_state{true, "code is changed in place"} : key_patching_state{false, refusal};
}

template <key_name Name>
class static_key {
 public:
  /// Returns: true if the key is on. Progress: wait-free, signal-safe. Context: anywhere.
  [[gnu::always_inline]] static bool test() noexcept {
    // (k2) acquire pairs with (k1).
    return maybe() && copy_.count.load(std::memory_order_acquire) != 0;
  }

  /// Returns: false: the key is off, as test(). true: it may be on; a load that says more about what the key stands for
  /// comes next anyhow, and this one is saved.
  [[gnu::always_inline]] static bool maybe() noexcept { return detail::site_jumps<&copy_>(); }

  /// Effects: one more reason for the key to be on. Returns: ok; refused_by_system, no_memory: then it is as before.
  /// Progress: blocking, a mutex of the process. Context: any thread, also under locks and in callbacks; not in a
  /// signal handler.
  static errc enable() noexcept {
    auto* const keys = detail::key_membership::join();
    return keys == nullptr ? errc::no_memory : keys->enable(copy_, detail::this_module);
  }

  /// Effects: one reason less. Precondition: an enable() that this one takes back; checked. Otherwise as enable().
  static void disable() noexcept {
    auto* const keys = detail::key_membership::join();
    if (keys == nullptr || !keys->disable(copy_, detail::this_module)) [[unlikely]] {
      detail::violated("D4", "static_key::disable", "the key %s is disabled more often than it was enabled", Name.text);
    }
  }

  /// Returns: what test() does, without a site. Progress: blocking.
  static bool enabled() noexcept {
    auto* const keys = detail::key_membership::join();
    return keys != nullptr && keys->enabled(copy_, detail::this_module);
  }

 private:
  /// Hidden, so that its address is a constant in position-independent code; the registry keeps the copies equal.
  [[gnu::visibility("hidden")]] static inline constinit detail::key_copy copy_{Name.text};
};

MMUNOTIFY_END_NAMESPACE
