// SPDX-License-Identifier: MIT
#pragma once

// 32-bit paging: two levels of 1024 4-byte entries, 4 KiB pages and, with CR4.PSE, 4 MiB pages (SDM 4.3).
//
// A 4 MiB page can lie above 4 GiB (PSE-36): bits 13 and up of its entry are the bits 32 and up of its address. How
// many there are is a property of the processor; the rest up to bit 21 is reserved. A 4 KiB leaf, and a directory entry
// that names a table, have no reserved bits at all. There is no NX bit: everything can be executed but what SMEP
// forbids, and a fetch is marked in the error code under SMEP alone, whatever EFER.NXE says.

#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/entry.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

struct two_level {
  using entry_type = std::uint32_t;
  static constexpr unsigned levels = 2;
  static constexpr unsigned address_bits = 32;
  static constexpr bool top_in_registers = false;
  static constexpr bool has_keys = false;

  static constexpr unsigned page_shift(unsigned level) noexcept { return level == 1 ? 12 : 22; }

  /// Linear addresses have 32 bits; what a caller leaves above them is ignored.
  static constexpr bool canonical(gva) noexcept { return true; }
  static constexpr gpa root(std::uint64_t cr3) noexcept { return {cr3 & bit_range(12, 31)}; }
  static constexpr std::uint64_t index(gva a, unsigned level) noexcept { return a.value >> page_shift(level) & 0x3ff; }

  static constexpr bool maps_page(entry_type e, unsigned level, const entry_format& f) noexcept {
    return level == 1 || (f.pse && (e & pte::large) != 0);
  }

  static constexpr entry_type reserved(unsigned, const entry_format&) noexcept { return 0; }
  /// SDM table 4-4. The width of a 4 MiB page's address is at most the processor's.
  static constexpr entry_type reserved_large(unsigned level, const entry_format& f) noexcept {
    const unsigned width = f.pse36_bits < f.maxphyaddr ? f.pse36_bits : f.maxphyaddr;
    const unsigned first = width < 32 ? 13 : width > 40 ? 21 : width - 19;
    return level == 2 ? static_cast<entry_type>(bit_range(first, 21)) : 0;
  }

  static constexpr gpa table(entry_type e) noexcept { return {e & bit_range(12, 31)}; }
  static constexpr gpa frame(entry_type e, unsigned level) noexcept {
    const std::uint64_t value = e;
    return level == 1 ? table(e) : gpa{(value & bit_range(22, 31)) | (value & bit_range(13, 20)) << 19};
  }
  static constexpr std::uint64_t grants(entry_type e, unsigned) noexcept { return e | pte::no_execute; }
  static constexpr bool has_accessed(unsigned) noexcept { return true; }
  static constexpr bool fetch_reported(const entry_format&, bool smep) noexcept { return smep; }
};

static_assert(paging_mode<two_level>);

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
