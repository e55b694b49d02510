// SPDX-License-Identifier: MIT
#pragma once

// An access, the processor state that it is judged by, and the judgement of rights: SDM 4.6 without the walk.
//
// Rights come in eight combinations (write, user, execute), so that a processor state and an access give one byte: the
// combinations with which the access is forbidden. The walker tests one bit of it at the leaf; a TLB or a shadow leaf
// can be judged by the same byte later.
//
// Protection keys are judged apart, because they depend on the leaf: PKRU for user pages, PKRS for supervisor pages.
//
// References: Intel SDM vol. 3A, 4.6.1 (access rights), 4.6.2 (protection keys), 4.4.1 (PDPTE registers).

#include <array>
#include <cstdint>

#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/entry.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// The state of a virtual processor that a walk depends on. What a mode does not use is ignored.
struct walk_context {
  std::uint64_t cr3 = 0;
  bool wp = true;             ///< CR0.WP
  bool pse = true;            ///< CR4.PSE; means something in two-level paging only
  bool smep = false;          ///< CR4.SMEP
  bool smap = false;          ///< CR4.SMAP
  bool pke = false;           ///< CR4.PKE; long modes only
  bool pks = false;           ///< CR4.PKS; long modes only
  bool nxe = true;            ///< EFER.NXE; not in two-level paging
  bool ac = false;            ///< EFLAGS.AC
  unsigned cpl = 0;           ///< current privilege level; 3 is user mode
  std::uint32_t pkru = 0;     ///< the rights of user pages by key; means something while pke
  std::uint32_t pkrs = 0;     ///< the rights of supervisor pages by key; means something while pks
  unsigned maxphyaddr = 40;   ///< physical-address width, 32 to 52
  bool gib_pages = true;      ///< the processor has 1 GiB pages
  bool amd = false;           ///< the processor is an AMD one, which reserves more bits
  unsigned pse36_bits = 40;   ///< physical-address width of 4 MiB pages, 32 (no PSE-36) to 40
  bool execute_only = false;  ///< EPT alone (nested_ept.hpp): entries may allow fetches and nothing else
  /// The registers that hold the four PDPTEs of PAE paging. MUST be what load_pdptes (pae.hpp) has put there.
  std::array<std::uint64_t, 4> pdptes{};

  constexpr entry_format format() const noexcept { return {maxphyaddr, nxe, pse, gib_pages, amd, pse36_bits}; }
};

/// What is attempted. Implicit accesses are those that the processor makes by itself to system structures (descriptor
/// tables, task state, exception stacks): supervisor accesses at any privilege level (SDM 4.6).
enum class access : std::uint8_t { read = 0, write = 1, fetch = 2, implicit_read = 4, implicit_write = 5 };

constexpr bool is_write(access a) noexcept { return (static_cast<unsigned>(a) & 1U) != 0; }
constexpr bool is_fetch(access a) noexcept { return (static_cast<unsigned>(a) & 2U) != 0; }
constexpr bool is_implicit(access a) noexcept { return (static_cast<unsigned>(a) & 4U) != 0; }
/// A user-mode access in the sense of SDM 4.6.
constexpr bool is_user(access a, const walk_context& c) noexcept { return c.cpl == 3 && !is_implicit(a); }

/// The rights with which this access is forbidden (SDM 4.6.1), protection keys aside.
/// Computed for all eight combinations at once: bit n of the answer stands for rights{n}.
constexpr rights_set forbidden_rights(const walk_context& c, access a) noexcept {
  constexpr unsigned with_write = 0xaa, with_user = 0xcc, with_execute = 0xf0;
  const bool user = is_user(a, c);
  unsigned forbidden = user ? ~with_user : 0;
  if (is_fetch(a)) {
    forbidden |= ~with_execute;
    if (!user && c.smep) forbidden |= with_user;
  } else {
    if (is_write(a) && (user || c.wp)) forbidden |= ~with_write;
    if (!user && c.smap && (is_implicit(a) || !c.ac)) forbidden |= with_user;
  }
  return static_cast<rights_set>(forbidden);
}

/// The protection keys that forbid this access (SDM 4.6.2), PKRU's for user pages or PKRS's for supervisor pages: bit
/// 2 * key of the answer stands for a key. AD forbids data accesses, WD writes; by a supervisor only if CR0.WP is set.
/// Precondition: the mode is a long mode, no other has keys.
constexpr std::uint32_t forbidden_keys(const walk_context& c, access a, bool user_page) noexcept {
  if (is_fetch(a) || !(user_page ? c.pke : c.pks)) return 0;
  constexpr std::uint32_t every_key = 0x55555555;
  const std::uint32_t keys = user_page ? c.pkru : c.pkrs;
  const bool write_counts = is_write(a) && (is_user(a, c) || c.wp);
  return (keys | (write_counts ? keys >> 1 : 0)) & every_key;
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
