// SPDX-License-Identifier: MIT
#pragma once

// PAE paging: 32-bit linear addresses, 8-byte entries, two levels of 512 and above them four PDPTEs (SDM 4.4).
//
// The PDPTEs are no table that walks read. The processor loads the four of them into registers when CR3 is written, and
// at some writes of CR0 and CR4 (reloads_pdptes in control_registers.hpp), and refuses that write with #GP if one that
// is present has a reserved bit set. From then on the registers count, whatever memory says. They carry no rights and
// no accessed bit; one that is not present ends a walk like any entry.
//
// In the levels below, bits 52 to 62 are reserved, as is bit 63 while EFER.NXE is 0.

#include <array>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/access.hpp>
#include <mmunotify/secondary/x86/entry.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

struct pae {
  using entry_type = std::uint64_t;
  static constexpr unsigned levels = 3;
  static constexpr unsigned address_bits = 32;
  static constexpr bool top_in_registers = true;
  static constexpr bool has_keys = false;

  static constexpr unsigned page_shift(unsigned level) noexcept { return 12 + 9 * (level - 1); }

  /// Linear addresses have 32 bits; what a caller leaves above them is ignored.
  static constexpr bool canonical(gva) noexcept { return true; }
  /// Where the PDPTEs are loaded from: 32 bytes, aligned to as many.
  static constexpr gpa root(std::uint64_t cr3) noexcept { return {cr3 & bit_range(5, 31)}; }
  static constexpr std::uint64_t index(gva a, unsigned level) noexcept {
    return a.value >> page_shift(level) & (level == 3 ? 3 : 0x1ff);
  }

  static constexpr bool maps_page(entry_type e, unsigned level, const entry_format&) noexcept {
    return level == 1 || (level == 2 && (e & pte::large) != 0);
  }

  /// PDPTEs are checked when they are loaded, and no more when they are used.
  static constexpr entry_type reserved(unsigned level, const entry_format& f) noexcept {
    if (level == 3) return 0;
    return bit_range(f.maxphyaddr, 62) | (f.nxe ? 0 : pte::no_execute);
  }
  static constexpr entry_type reserved_large(unsigned level, const entry_format&) noexcept {
    return level == 2 ? bit_range(13, 20) : 0;
  }
  /// What must be zero in a PDPTE that is present (SDM table 4-8).
  static constexpr entry_type reserved_pdpte(const entry_format& f) noexcept {
    return bit_range(1, 2) | bit_range(5, 8) | bit_range(f.maxphyaddr, 63);
  }

  static constexpr gpa table(entry_type e) noexcept { return {e & pte::address}; }
  static constexpr gpa frame(entry_type e, unsigned level) noexcept { return {e & bit_range(page_shift(level), 51)}; }
  static constexpr std::uint64_t grants(entry_type e, unsigned level) noexcept {
    return level == 3 ? ~std::uint64_t{0} : e ^ pte::no_execute;
  }
  static constexpr bool has_accessed(unsigned level) noexcept { return level != 3; }
  static constexpr bool fetch_reported(const entry_format& f, bool smep) noexcept { return f.nxe || smep; }
};

static_assert(paging_mode<pae>);

enum class pdpte_load : std::uint8_t {
  ok,                  ///< context.pdptes holds the four entries
  general_protection,  ///< one is present and has a reserved bit: #GP(0), the instruction does nothing
  memory_error,        ///< they are not in memory that can be read
};

/// Effects: what writing the context's CR3 (or CR0, CR4) does in PAE paging: loads the PDPTEs that it points to. If it
/// fails the context is as before. Memory: read_entry(gpa, std::uint64_t&), as for walks.
template <class Memory>
  requires requires(Memory& m, gpa where, std::uint64_t& value) {
    { m.read_entry(where, value) } noexcept;
  }
constexpr pdpte_load load_pdptes(Memory& memory, walk_context& context) noexcept {
  std::array<std::uint64_t, 4> loaded{};
  for (std::size_t i = 0; i < loaded.size(); ++i) {
    if (!memory.read_entry(pae::root(context.cr3) + 8 * i, loaded[i])) return pdpte_load::memory_error;
  }
  for (const std::uint64_t e : loaded) {
    const bool reserved = (e & pae::reserved_pdpte(context.format())) != 0;
    if ((e & pte::present) != 0 && reserved) return pdpte_load::general_protection;
  }
  context.pdptes = loaded;
  return pdpte_load::ok;
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
