// SPDX-License-Identifier: MIT
#pragma once

// Every switch of the library, its version, and the contract handler.
//
// Switches (define them for the whole program, never for one translation unit):
//   MMUNOTIFY_CHECKED   1: contract checks that cost something on hot paths (default: on unless NDEBUG).
//                       The cheap checks are always on. The value is part of the inline namespace, so that
//                       objects built with different values do not link into one inconsistent program.

//   MMUNOTIFY_LIVE_KEYS 0: static keys are loads, no code is changed at run time (default: 1 on x86-64 Linux, and 0
//                       elsewhere and under ThreadSanitizer, which does not see an order that is made by code).

//   MMUNOTIFY_MUTATION  a broken variant, by number, for the negative controls in tests/: a test that cannot notice it
//                       proves nothing. 0, the default, is the product.

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>

/// The one version number; the build system reads it from here.
#define MMUNOTIFY_VERSION_MAJOR 0
#define MMUNOTIFY_VERSION_MINOR 1
#define MMUNOTIFY_VERSION_PATCH 0

#ifndef MMUNOTIFY_CHECKED
#ifdef NDEBUG
#define MMUNOTIFY_CHECKED 0
#else
#define MMUNOTIFY_CHECKED 1
#endif
#endif

#ifndef MMUNOTIFY_MUTATION
#define MMUNOTIFY_MUTATION 0
#endif

#if MMUNOTIFY_MUTATION
#define MMUNOTIFY_ABI mutant
#elif MMUNOTIFY_CHECKED
#define MMUNOTIFY_ABI checked
#else
#define MMUNOTIFY_ABI fast
#endif

/// Opens the library's namespace; every header uses it, so that MMUNOTIFY_CHECKED is part of every mangled name.
#define MMUNOTIFY_BEGIN_NAMESPACE \
  namespace mmunotify {           \
  inline namespace MMUNOTIFY_ABI {
#define MMUNOTIFY_END_NAMESPACE \
  }                             \
  }

/// Code that runs only when something is set up, torn down or wrong: out of line, optimised for size.
#define MMUNOTIFY_COLD [[gnu::cold, gnu::noinline]]

/// Code that runs only when a space is armed, and is to be fast then. Called through a function that is marked cold, so
/// that the caller's straight path is laid out as if it were never called. gcc optimises cold code for size, which
/// costs an armed bracket a third: there the cold function only jumps.
#if defined(__clang__)
#define MMUNOTIFY_ARMED [[gnu::always_inline]]
#else
#define MMUNOTIFY_ARMED [[gnu::noinline]]
#endif

/// The same as MMUNOTIFY_COLD, and the caller keeps all its registers where the compiler can do it (gcc 12 cannot), so
/// that a caller that is not armed saves none. Only for functions that return void: clang 14 restores the return
/// registers, too.
#if defined(__clang__) && (defined(__x86_64__) || defined(__aarch64__))
#define MMUNOTIFY_COLD_PRESERVING __attribute__((cold, noinline, preserve_most))
#else
#define MMUNOTIFY_COLD_PRESERVING MMUNOTIFY_COLD
#endif

/// True under ThreadSanitizer, which understands atomics but neither fences nor inline assembly.
#if defined(__SANITIZE_THREAD__)
#define MMUNOTIFY_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MMUNOTIFY_TSAN 1
#endif
#endif
#ifndef MMUNOTIFY_TSAN
#define MMUNOTIFY_TSAN 0
#endif

#ifndef MMUNOTIFY_LIVE_KEYS
#if defined(__x86_64__) && defined(__linux__) && !MMUNOTIFY_TSAN
#define MMUNOTIFY_LIVE_KEYS 1
#else
#define MMUNOTIFY_LIVE_KEYS 0
#endif
#endif

MMUNOTIFY_BEGIN_NAMESPACE

/// A programmer's mistake, as the handler gets it. The strings live as long as the call.
struct contract_violation {
  const char* rule;      ///< the contract's ID, "L7"
  const char* function;  ///< "address_space::unregister"
  const char* sentence;  ///< what is wrong, with the values
};

/// Called on a contract violation. May be called from any thread and from inside a callback; must not call the library.
/// When it returns, the violating call returns an error value where it has one, and otherwise does nothing.
using contract_handler = void (*)(const contract_violation&) noexcept;

namespace detail {

/// The broken variants that MMUNOTIFY_MUTATION selects.
enum class mutation : int {
  none = 0,
  no_retry_check = 1,         ///< invalidation_window::retry says no collision, always
  unlink_before_release = 2,  ///< unregister unlinks the node first and runs its release hook afterwards
  no_grace_period = 3,        ///< srcu_domain::synchronize returns at once
  start_after_change = 4,     ///< reference_mmu changes its tables first and brackets afterwards
  // sync/: what they remove is an obligation of the proofs in tests/model/.
  no_heavy_fence = 5,              ///< a grace period scans without a heavy fence
  light_for_heavy = 6,             ///< it makes a light one
  no_light_after_lock = 7,         ///< a section's protected loads may come before its store
  unlock_relaxed = 8,              ///< (d4)
  lock_relaxed = 9,                ///< (d5)
  sequence_relaxed = 10,           ///< (d1), (d2)
  scan_relaxed = 11,               ///< (d3)
  no_leaver_fence = 12,            ///< a leaver may look for a sleeper before its section has ended
  no_sleeper_fence = 13,           ///< a grace period may look once more before it says that it sleeps
  sweep_outside_section = 14,      ///< lockfree_hlist, rule H1
  reuse_before_grace_period = 15,  ///< lockfree_hlist frees a node when it is unlinked
  early_cookie = 16,               ///< a cookie names the grace period that has begun, not the next
  no_handoff_recheck = 17,         ///< down_read trusts the first look at the sequence
  handoff_scan_relaxed = 18,       ///< (d3) for the banks
  stale_fence_ticket = 19,         ///< a request is served by a heavy fence that began before it
  early_callbacks = 20,            ///< callbacks run without a grace period
  early_barrier = 21,              ///< barrier returns when it has queued its sentinel
  fork_keeps_readers = 22,         ///< a forked child waits for the sections of threads that it does not have
  exit_unpinned = 23,              ///< a thread exits although a grace period looks at its word
  no_handoff_scan = 24,            ///< grace periods do not wait for hand-off sections
  torn_key = 25,                   ///< a static key is on before every processor runs the changed code
  request_relaxed = 26,            ///< (d8)
  push_release_only = 27,          ///< (q1): who pushes a callback need not see what those before have counted
  silent_barrier = 76,             ///< a barrier does not wake the worker from its rest
  rests_asleep = 77,               ///< the worker sleeps where it should rest
  // notifier/, see tests/model/.
  audience_by_flag = 28,         ///< a bracket calls whoever is registered at the moment, at start and at end
  end_before_change = 29,        ///< the primary of the model ends its bracket before it changes its table
  no_arming_grace_period = 30,   ///< a tracked registration does not wait for the brackets in flight
  no_leaving_grace_period = 31,  ///< unregister unlinks the node while brackets may still have to call it
  version_never_odd = 32,        ///< R3: who comes is linked before anybody can know
  leaving_not_counted = 33,      ///< R3: who leaves looks like everybody
  odd_version_relaxed = 34,      ///< (n1): who reads the version while it is odd may see older stamps
  // interval/
  interval_end_keeps_sequence = 40,   ///< a bracket's end is not seen by those who come later
  interval_refusal_bumps = 41,        ///< a refused bracket counts as one that ended
  interval_unlink_at_once = 42,       ///< a removed interval is unlinked before the brackets that call it have ended
  interval_no_look_in_flight = 43,    ///< an insertion does not look for brackets in flight
  interval_born_behind = 44,          ///< who helps an insertion stamps it with a version of its own past
  interval_neighbour_forgotten = 45,  ///< a question does not look at the bucket before its range
  interval_frozen_is_pinned = 46,     ///< an insertion may go into a node that is being unlinked
  interval_shrinks_first = 47,        ///< a resize takes the old range away before the new one is there
  interval_ignores_turns = 48,        ///< brackets do not wait for a fault's turn
  interval_claim_unseen = 78,         ///< a removal that is late looks like one of the set that the interval is in now
  interval_recall_lost = 79,          ///< an insertion does not look whether its removal was asked for
  // primary/
  write_to_shared = 50,         ///< a write to a shared frame goes to it, without a copy
  free_before_end = 51,         ///< frames are freed inside the bracket that takes them away
  fork_keeps_writable = 52,     ///< fork shares the parent's pages and does not write-protect them
  merge_compares_early = 53,    ///< equal pages are compared before their bracket, and not again inside
  soft_dirty_keeps_write = 54,  ///< clear_soft_dirty does not write-protect
  huge_survives_a_change = 55,  ///< a part of a huge page changes, and the rest still counts as huge
  exclusive_not_revoked = 56,   ///< the processor takes an exclusive page back without a bracket
  device_copied_early = 57,     ///< a device's page is copied back before the bracket
  reap_despite_refusal = 58,    ///< what a client refused to let go is reaped
  collapse_despite_loans = 59,  ///< pages on loan are collapsed
  // secondary/x86/, the shadow side.
  no_shadow_flush = 60,      ///< shadow_tables::commit does not flush
  no_write_tracking = 61,    ///< a guest table is shadowed while it is mapped writable
  half_written_zap = 62,     ///< a guest write over two entries zaps the first one's shadow
  stale_mmio = 63,           ///< an MMIO entry is good in every generation of the slots
  mark_before_upgrade = 64,  ///< a fast write marks the frame before its leaf is writable
  weak_downgrade = 65,       ///< a write-protecting bracket leaves dirty-log upgrades possible
  wide_root_key = 66,        ///< a root is remembered by CR3 alone
  large_over_table = 67,     ///< a large leaf may hold a shadowed table
  no_entry_recheck = 68,     ///< guest entries are not read again under the lock
  stale_sync = 69,           ///< a table that the guest wrote freely is taken for unchanged
  one_quadrant = 70,         ///< all parts of a table of 4-byte entries are taken for the first one
  wide_written_zap = 71,     ///< a guest write counts 8-byte entries in a table of 4-byte ones
  pdptes_not_in_key = 72,    ///< a PAE root is found by CR3 alone
  stale_pdptes = 73,         ///< writes of control registers do not load the PDPTEs
  pse_not_in_role = 74,      ///< CR4.PSE is no part of a shadow page's role
  keys_of_the_fault = 75,    ///< protection keys are judged when a leaf is made and not at each access
  // secondary/x86/, nested guests.
  nested_table_as_read = 85,  ///< a nested guest's page tables are read as if EPT and NPT asked for no write there
  nested_dirty_ignored = 86,  ///< a leaf is writable before the guest hypervisor's dirty bit is set
  nested_not_in_role = 87,    ///< what kind a nested guest's table is, is no part of a shadow page's role
  ept_misconfigured_ok = 88,  ///< EPT entries are not checked for misconfigurations
  nested_stale_sync = 89,     ///< an EPT or NPT table that was written freely is taken for unchanged
  prefetch_unchecked = 90,    ///< neighbours of a fault are installed without a look at the brackets
  prefetch_unaccessed = 91,   ///< they are installed from guest entries that are not accessed yet
  split_forgets_bits = 92,    ///< the parts of a large leaf that is split do not inherit its accessed and dirty bits
  shallow_host_index = 93,    ///< the slots' host index knows how far a slot reaches, and not the ones below it
  nx_huge_fetched = 94,       ///< large leaves may be executed although the owner forbids it
  nx_huge_undone = 95,        ///< the next read or write makes a leaf large again that a fetch has made small
};

/// True in the build that has this one protection removed.
constexpr bool mutated(mutation m) noexcept { return MMUNOTIFY_MUTATION == static_cast<int>(m); }

/// The memory order that the product uses; relaxed in the build that has it removed.
consteval std::memory_order order(std::memory_order o, mutation m) noexcept {
  return mutated(m) ? std::memory_order_relaxed : o;
}

inline void print_and_abort(const contract_violation& v) noexcept {
  std::fprintf(stderr, "mmunotify: contract %s broken in %s: %s\n", v.rule, v.function, v.sentence);
  std::abort();
}

inline std::atomic<contract_handler> current_contract_handler{&print_and_abort};

/// Formats one sentence and calls the handler.
template <class... Values>
MMUNOTIFY_COLD void violated(const char* rule, const char* function, const char* format, Values... values) noexcept {
  char sentence[256];
  if constexpr (sizeof...(Values) == 0) {
    std::snprintf(sentence, sizeof sentence, "%s", format);
  } else {
    std::snprintf(sentence, sizeof sentence, format, values...);
  }
  // (cfg1) acquire pairs with (cfg2): what the handler's installer wrote before is visible to the handler.
  current_contract_handler.load(std::memory_order_acquire)({rule, function, sentence});
}

}  // namespace detail

/// Replaces the handler (default: one line on stderr, then abort). Each copy of the library (shared objects with hidden
/// visibility) has its own.
/// Returns: the previous handler. nullptr restores the default. Progress: wait-free.
inline contract_handler set_contract_handler(contract_handler h) noexcept {
  // (cfg2) release pairs with (cfg1).
  return detail::current_contract_handler.exchange(h != nullptr ? h : &detail::print_and_abort,
                                                   std::memory_order_acq_rel);
}

MMUNOTIFY_END_NAMESPACE
