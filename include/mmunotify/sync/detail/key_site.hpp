// SPDX-License-Identifier: MIT
#pragma once

// One test of a static key, as machine code, and the table in which it can be found. See static_key.hpp.
//
// A site is five bytes. Two states, which differ in the first byte only:
//   e9 <rel32>   jmp look                 look: whoever asked looks at the data
//   a9 <imm32>   test $imm32, %eax        falls through: the key is off. No memory, no register but the flags.
// One length, one boundary: whichever byte a processor fetches, it executes one whole instruction, and no instruction
// ever begins at another byte. 0f 1f 44 00 00, the usual five-byte no-op, differs from the jump in all five bytes: no
// store that user space can make through the kernel is known to be atomic over five, and Linux needs a trap for it.
//
// The compiler's output holds the jump. Text that the system refuses to change stays for ever what the compiler wrote,
// so that has to be what is right whether the key is on or off. The no-op is put there by the registry, once it has
// proved that it can take it away again. For the same reason nothing breaks if an entry of the table is lost: that
// site stays a jump.
//
// The table is the section mmunotify_sites of the executable or shared object. An entry is in the COMDAT group of its
// function (?), and lives and dies with the function's section (o, SHF_LINK_ORDER). Both fields are relative to
// themselves, so that the table needs no relocation and no page of its own. Seen to work: gcc 12, clang 14; bfd, gold,
// lld; -O0 to -O2; PIC, PIE, static; --gc-sections, -flto.
//
// Without live patching (another machine, ThreadSanitizer, MMUNOTIFY_LIVE_KEYS=0) there is no instruction at the site,
// and the entry only says which keys the module knows.

#include <atomic>
#include <cstdint>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

struct key_module;

/// A key as one module sees it. All copies of a name are one key: the registry keeps their counts equal.
struct key_copy {
  const char* name;
  /// How often the key is enabled. Written under the registry's mutex only. See static_key.hpp for the orderings.
  std::atomic<std::uint64_t> count{0};
  key_copy* next = nullptr;          ///< under the registry's mutex, as is the rest
  const key_module* home = nullptr;  ///< null: the registry does not know it yet
};

/// One entry of the table: two distances in bytes, each from its own address.
struct key_entry {
  std::int32_t code;  ///< the site; 0: no instruction there
  std::int32_t copy;

  const std::uint8_t* site() const noexcept {
    return code == 0 ? nullptr : reinterpret_cast<const std::uint8_t*>(&code) + code;
  }
  key_copy& key() const noexcept {
    // The linker gave it as a distance, so the table is const although the key is not.
    return *reinterpret_cast<key_copy*>(reinterpret_cast<std::uintptr_t>(&copy) +
                                        static_cast<std::uintptr_t>(std::intptr_t{copy}));
  }
};

inline constexpr std::uint8_t site_jump = 0xe9;
inline constexpr std::uint8_t site_nop = 0xa9;

/// The constraint of a symbol's address as a constant, also in position-independent code.
#if defined(__x86_64__)
#define MMUNOTIFY_SYMBOL "i"
#else
#define MMUNOTIFY_SYMBOL "S"
#endif

#define MMUNOTIFY_KEY_ENTRY(code)                                         \
  ".pushsection mmunotify_sites,\"ao?\",@progbits,.Lmmunotify_site%=\n\t" \
  ".balign 4\n\t"                                                         \
  ".long " code                                                           \
  "\n\t"                                                                  \
  ".long %c0 - .\n\t"                                                     \
  ".popsection"

/// Returns: false if the site is a no-op. Ordering, then: that of an acquire load (registry, T3). The processor's part
/// is done by who writes the no-op, the compiler's by signal fences: a "memory" clobber would do it too, but gcc then
/// keeps the caller's scope in memory. The copy has to be a hidden object: its address is an immediate operand.
template <key_copy* Copy>
[[gnu::always_inline]] inline bool site_jumps() noexcept {
#if MMUNOTIFY_LIVE_KEYS
  std::atomic_signal_fence(std::memory_order_seq_cst);  // (k5) with (k6): nothing passes the site
  asm volatile goto(
      ".Lmmunotify_site%=:\n\t"
      ".byte 0xe9\n\t"
      ".long %l[look] - (.Lmmunotify_site%= + 5)\n\t" MMUNOTIFY_KEY_ENTRY(".Lmmunotify_site%= - .")
      :
      : MMUNOTIFY_SYMBOL(Copy)
      : "cc"
      : look);
#if defined(__clang__)
  asm volatile("");  // a block of its own: clang threads no jump through one that begins at an asm goto
#endif
  std::atomic_signal_fence(std::memory_order_seq_cst);  // (k6) with (k5)
  return false;
look:
  [[unlikely]];
  return true;
#else
  asm volatile(".Lmmunotify_site%=:\n\t" MMUNOTIFY_KEY_ENTRY("0") : : MMUNOTIFY_SYMBOL(Copy));
  return true;
#endif
}

#undef MMUNOTIFY_KEY_ENTRY

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
