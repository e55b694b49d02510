// SPDX-License-Identifier: MIT
#pragma once

// Entries of two-dimensional paging: what the second level of translation, from guest-physical to host, looks like on
// Intel (EPT) and on AMD (NPT, which is long-mode paging again, every page a user page).
//
// The tables are as the hardware would walk them, but for one thing: a link holds the table's address in this process,
// where hardware has a physical one. Bits that hardware ignores hold the one thing that software needs to know:
//   bit 57    may_write: slot and host let the leaf be written; a clear W is the dirty log's
//
// References: Intel SDM vol. 3C, 29.3.2 and tables 29-1 to 29-7 (EPT); AMD APM vol. 2, 15.25 (nested paging).

#include <array>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/entry.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// One table of 512 entries.
struct alignas(4096) direct_table {
  std::array<std::atomic<std::uint64_t>, 512> entries{};
};

/// A format of second-level entries.
///   link(t), table(e)           an entry that leads to a table, and back
///   leaf(f, writable, level)    an entry that maps a frame for reading and execution, and for writing if writable
///   present(e), maps(e, level)  whether it allows anything; whether it is a leaf, if so
///   frame(e)                    of a leaf
///   *_bit                       write, accessed, dirty
///   reserved(e, level)          e, present, would be a misconfiguration or a reserved-bit fault at this level
template <class F>
concept direct_format = requires(direct_table& t, std::uint64_t e, unsigned level, pfn f) {
  { F::link(t) } noexcept -> std::same_as<std::uint64_t>;
  { F::table(e) } noexcept -> std::same_as<direct_table*>;
  { F::leaf(f, true, level) } noexcept -> std::same_as<std::uint64_t>;
  { F::present(e) } noexcept -> std::same_as<bool>;
  { F::maps(e, level) } noexcept -> std::same_as<bool>;
  { F::frame(e) } noexcept -> std::same_as<pfn>;
  { F::reserved(e, level) } noexcept -> std::same_as<bool>;
  { F::write_bit + F::accessed_bit + F::dirty_bit } -> std::convertible_to<std::uint64_t>;
};

inline constexpr std::uint64_t direct_may_write_bit = bit(57);

/// What both have in common: where the address is, and that bit 7 makes a leaf above level 1.
struct direct_common {
  static direct_table* table(std::uint64_t e) noexcept { return reinterpret_cast<direct_table*>(e & pte::address); }
  static constexpr bool maps(std::uint64_t e, unsigned level) noexcept { return level == 1 || (e & pte::large) != 0; }
  static constexpr pfn frame(std::uint64_t e) noexcept { return {(e & pte::address) >> page_shift}; }
  static constexpr std::uint64_t place(pfn f) noexcept { return f.value << page_shift; }
  /// Address bits of a large leaf that must be zero.
  static constexpr std::uint64_t unaligned(unsigned level) noexcept { return bit_range(12, 12 + 9 * (level - 1) - 1); }
};

/// Intel: read, write and execute are separate; a leaf has a memory type (write-back, taken from nobody else).
struct ept_format : direct_common {
  static constexpr std::uint64_t read_bit = bit(0), write_bit = bit(1), execute_bit = bit(2);
  static constexpr std::uint64_t memory_type = bit_range(3, 5), write_back = 6 << 3;
  static constexpr std::uint64_t accessed_bit = bit(8), dirty_bit = bit(9);

  static std::uint64_t link(direct_table& t) noexcept {
    return reinterpret_cast<std::uintptr_t>(&t) | read_bit | write_bit | execute_bit;
  }
  static constexpr std::uint64_t leaf(pfn f, bool writable, unsigned level) noexcept {
    return place(f) | read_bit | execute_bit | write_back | (writable ? write_bit | direct_may_write_bit : 0) |
           (level > 1 ? pte::large : 0);
  }
  static constexpr bool present(std::uint64_t e) noexcept { return (e & (read_bit | write_bit | execute_bit)) != 0; }

  /// SDM 29.3.3.1: writable and not readable; a memory type that there is not; bits 3 to 6 (and 7) of a link.
  static constexpr bool reserved(std::uint64_t e, unsigned level) noexcept {
    if ((e & (read_bit | write_bit)) == write_bit) return true;
    if (!maps(e, level)) return (e & bit_range(3, 7)) != 0;
    const std::uint64_t type = (e & memory_type) >> 3;
    return level > 3 || type == 2 || type == 3 || type == 7 || (level > 1 && (e & unaligned(level)) != 0);
  }
};

/// AMD: long-mode entries; the nested walk counts as a user's.
struct npt_format : direct_common {
  static constexpr std::uint64_t write_bit = pte::writable, accessed_bit = pte::accessed, dirty_bit = pte::dirty;

  static std::uint64_t link(direct_table& t) noexcept {
    return reinterpret_cast<std::uintptr_t>(&t) | pte::present | pte::writable | pte::user | pte::accessed;
  }
  static constexpr std::uint64_t leaf(pfn f, bool writable, unsigned level) noexcept {
    return place(f) | pte::present | pte::user | (writable ? write_bit | direct_may_write_bit : 0) |
           (level > 1 ? pte::large : 0);
  }
  static constexpr bool present(std::uint64_t e) noexcept { return (e & pte::present) != 0; }

  static constexpr bool reserved(std::uint64_t e, unsigned level) noexcept {
    constexpr entry_format f{.maxphyaddr = 52, .amd = true};
    if ((e & long_mode_4::reserved(level, f)) != 0 || (e & pte::user) == 0) return true;
    return level > 1 && maps(e, level) && (e & unaligned(level)) != 0;
  }
};

static_assert(direct_format<ept_format> && direct_format<npt_format>);

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
