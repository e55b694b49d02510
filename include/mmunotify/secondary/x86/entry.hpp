// SPDX-License-Identifier: MIT
#pragma once

// Paging-structure entries of x86: where the bits are, which of them are reserved, and what a page fault reports.
//
// One paging mode is one policy type (concept paging_mode): its entry type, its number of levels, and how an entry
// of a level is read. The walker and the shadow MMU are templates over that policy, so that a mode with another entry
// size (two levels of 4-byte entries) or an odd top level (PAE) is a further policy and not a further walker.
// Here: long_mode_4 and long_mode_5; two_level.hpp, pae.hpp and no_paging.hpp have the others.
//
// Levels count from the bottom: 1 is the page table, 2 the page directory, 3 the PDPT, 4 the PML4, 5 the PML5.
//
// References: Intel SDM vol. 3A, sections 4.1.4 (widths), 4.5 (4- and 5-level paging: formats in tables 4-14 to 4-20),
// 4.6 (access rights), 4.7 (error code); AMD APM vol. 2, sections 5.3 and 5.4.

#include <concepts>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// The mask of the bits first..last, both included; 0 if there is none. Preconditions: last < 64.
constexpr std::uint64_t bit_range(unsigned first, unsigned last) noexcept {
  return first > last ? 0 : (~std::uint64_t{0} >> (63 - last)) & (~std::uint64_t{0} << first);
}

constexpr std::uint64_t bit(unsigned n) noexcept { return std::uint64_t{1} << n; }

/// Bits of an entry. The low ones are the same in every mode and at every level that has them.
namespace pte {
inline constexpr std::uint64_t present = bit(0);
inline constexpr std::uint64_t writable = bit(1);
inline constexpr std::uint64_t user = bit(2);
inline constexpr std::uint64_t write_through = bit(3);
inline constexpr std::uint64_t cache_disable = bit(4);
inline constexpr std::uint64_t accessed = bit(5);
inline constexpr std::uint64_t dirty = bit(6);   ///< leaves only
inline constexpr std::uint64_t large = bit(7);   ///< PS: this entry of level 2 or 3 maps a page
inline constexpr std::uint64_t global = bit(8);  ///< leaves only
inline constexpr std::uint64_t pat_4k = bit(7);  ///< PAT of a 4 KiB leaf, where a large one has PS
inline constexpr std::uint64_t pat_large = bit(12);
inline constexpr std::uint64_t no_execute = bit(63);
inline constexpr std::uint64_t protection_key = bit_range(59, 62);
inline constexpr std::uint64_t address = bit_range(12, 51);  ///< architectural limit; MAXPHYADDR cuts it further
inline constexpr unsigned protection_key_shift = 59;
}  // namespace pte

/// What a mapping allows, as three bits: write (1), user (2), execute (4). Supervisor reads are always allowed.
struct rights {
  static constexpr std::uint8_t write_bit = 1;
  static constexpr std::uint8_t user_bit = 2;
  static constexpr std::uint8_t execute_bit = 4;

  std::uint8_t bits = write_bit | user_bit | execute_bit;

  constexpr bool writable() const noexcept { return (bits & write_bit) != 0; }
  constexpr bool user() const noexcept { return (bits & user_bit) != 0; }
  constexpr bool executable() const noexcept { return (bits & execute_bit) != 0; }

  friend constexpr bool operator==(rights, rights) = default;
  /// What both allow: levels combine like this.
  friend constexpr rights operator&(rights a, rights b) noexcept {
    return {static_cast<std::uint8_t>(a.bits & b.bits)};
  }
};

/// A set of `rights` values, bit n standing for the value n: what an access cannot be done with.
using rights_set = std::uint8_t;

constexpr bool contains(rights_set s, rights r) noexcept { return ((s >> r.bits) & 1U) != 0; }

/// The error code that a page fault pushes (SDM 4.7). Only the bits that paging itself sets.
struct fault_code {
  static constexpr std::uint32_t present = 1;          ///< P: not because an entry was not present
  static constexpr std::uint32_t write = 2;            ///< W
  static constexpr std::uint32_t user = 4;             ///< U: the access was a user-mode one
  static constexpr std::uint32_t reserved = 8;         ///< RSVD: a reserved bit was set
  static constexpr std::uint32_t fetch = 16;           ///< I: instruction fetch, while SMEP or NX can forbid one
  static constexpr std::uint32_t protection_key = 32;  ///< PK: the rights of the page's key forbid the access

  std::uint32_t bits = 0;

  constexpr bool has(std::uint32_t mask) const noexcept { return (bits & mask) != 0; }
  friend constexpr bool operator==(fault_code, fault_code) = default;
};

/// What the processor is and how it is set up, as far as entry formats depend on it.
struct entry_format {
  unsigned maxphyaddr = 40;  ///< physical-address width (CPUID 80000008H:EAX[7:0]), 32 to 52
  bool nxe = true;           ///< EFER.NXE
  bool pse = true;           ///< CR4.PSE; means something in two-level paging only
  bool gib_pages = true;     ///< the processor has 1 GiB pages
  bool amd = false;          ///< an AMD processor: bit 8 of a PML4E (and PML5E) must be zero
  unsigned pse36_bits = 40;  ///< physical-address width of 4 MiB pages, 32 (no PSE-36) to 40
};

/// A paging mode.
///   entry_type            std::uint32_t or std::uint64_t
///   levels                the number of the root level
///   address_bits          how many bits of a linear address are used; those above are checked or ignored
///   top_in_registers      the root level is four registers (walk_context::pdptes) and no table
///   has_keys              leaves have a protection key
///   page_shift(l)         log2 of what one entry of level l covers
///   canonical(a)          may a be used at all; otherwise the access raises #GP and not #PF
///   root(cr3)             the root table
///   index(a, l)           the entry of a in its table of level l
///   maps_page(e, l, f)    e, present and at level l, ends the walk
///   reserved(l, f)        bits that must be zero in every present entry of level l
///   reserved_large(l, f)  bits that must be zero as well if e maps a page at level l > 1
///   table(e)              the table that a present entry names
///   frame(e, l)           the first byte of the page that e maps at level l
///   grants(e, l)          writable, user and accessed at their places, bit 63 set if e allows fetches: what a walk
///                         combines by AND; a level that lacks a bit grants it
///   has_accessed(l)       entries of level l have an accessed bit
///   fetch_reported(f, smep)  fetches are marked as such in the error code
template <class M>
concept paging_mode = requires(gva a, std::uint64_t cr3, typename M::entry_type e, unsigned l, const entry_format& f) {
  requires std::same_as<typename M::entry_type, std::uint32_t> || std::same_as<typename M::entry_type, std::uint64_t>;
  requires M::levels >= 2 && M::levels <= 5;
  requires M::address_bits >= 32 && M::address_bits <= 57;
  requires std::same_as<decltype(M::top_in_registers), const bool> && std::same_as<decltype(M::has_keys), const bool>;
  { M::page_shift(l) } noexcept -> std::same_as<unsigned>;
  { M::canonical(a) } noexcept -> std::same_as<bool>;
  { M::root(cr3) } noexcept -> std::same_as<gpa>;
  { M::index(a, l) } noexcept -> std::same_as<std::uint64_t>;
  { M::maps_page(e, l, f) } noexcept -> std::same_as<bool>;
  { M::reserved(l, f) } noexcept -> std::same_as<typename M::entry_type>;
  { M::reserved_large(l, f) } noexcept -> std::same_as<typename M::entry_type>;
  { M::table(e) } noexcept -> std::same_as<gpa>;
  { M::frame(e, l) } noexcept -> std::same_as<gpa>;
  { M::grants(e, l) } noexcept -> std::same_as<std::uint64_t>;
  { M::has_accessed(l) } noexcept -> std::same_as<bool>;
  { M::fetch_reported(f, true) } noexcept -> std::same_as<bool>;
};

/// IA-32e paging with 4 or 5 levels of 512 8-byte entries (SDM 4.5).
template <unsigned Levels>
  requires(Levels == 4 || Levels == 5)
struct long_mode {
  using entry_type = std::uint64_t;
  static constexpr unsigned levels = Levels;
  static constexpr unsigned address_bits = 12 + 9 * Levels;
  static constexpr bool top_in_registers = false;
  static constexpr bool has_keys = true;

  static constexpr unsigned page_shift(unsigned level) noexcept { return 12 + 9 * (level - 1); }

  /// SDM vol. 1, 3.3.7.1: all bits above the translated ones repeat the highest translated one.
  static constexpr bool canonical(gva a) noexcept {
    const auto top = static_cast<std::int64_t>(a.value) >> (address_bits - 1);
    return top == 0 || top == -1;
  }
  static constexpr gpa root(std::uint64_t cr3) noexcept { return {cr3 & pte::address}; }
  static constexpr std::uint64_t index(gva a, unsigned level) noexcept { return a.value >> page_shift(level) & 0x1ff; }

  static constexpr bool maps_page(entry_type e, unsigned level, const entry_format&) noexcept {
    return level == 1 || (level <= 3 && (e & pte::large) != 0);
  }

  /// SDM 4.5.3, AMD APM vol. 2, 5.3: beyond the address width; NX while it is off; PS where no page can be; bit 8 in
  /// the upper tables of AMD.
  static constexpr entry_type reserved(unsigned level, const entry_format& f) noexcept {
    entry_type mask = bit_range(f.maxphyaddr, 51);
    if (!f.nxe) mask |= pte::no_execute;
    if (level >= 4 || (level == 3 && !f.gib_pages)) mask |= pte::large;
    if (level >= 4 && f.amd) mask |= bit(8);
    return mask;
  }
  /// The address bits below the page's alignment; bit 12 is PAT.
  static constexpr entry_type reserved_large(unsigned level, const entry_format&) noexcept {
    return level == 2 || level == 3 ? bit_range(13, page_shift(level) - 1) : 0;
  }

  static constexpr gpa table(entry_type e) noexcept { return {e & pte::address}; }
  static constexpr gpa frame(entry_type e, unsigned level) noexcept { return {e & bit_range(page_shift(level), 51)}; }
  static constexpr std::uint64_t grants(entry_type e, unsigned) noexcept { return e ^ pte::no_execute; }
  static constexpr bool has_accessed(unsigned) noexcept { return true; }
  static constexpr bool fetch_reported(const entry_format& f, bool smep) noexcept { return f.nxe || smep; }
};

using long_mode_4 = long_mode<4>;
using long_mode_5 = long_mode<5>;

static_assert(paging_mode<long_mode_4> && paging_mode<long_mode_5>);

/// The three rights in what paging_mode's `grants` returns.
constexpr rights rights_in(std::uint64_t grants) noexcept {
  return {static_cast<std::uint8_t>((grants >> 1 & 3) | (grants >> 63) << 2)};
}

static_assert(rights_in(long_mode_4::grants(pte::writable | pte::user, 1)) == rights{});
static_assert(rights_in(long_mode_4::grants(pte::writable | pte::no_execute, 1)) == rights{rights::write_bit});

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
