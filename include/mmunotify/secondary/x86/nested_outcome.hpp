// SPDX-License-Identifier: MIT
#pragma once

// What an access of a nested guest (L2) came to, and whose business it is.
//
// Three levels can refuse it. L2's own page tables: a page fault, which L2 gets. L1's EPT or NPT: an exit, which L1
// gets, with what the processor would tell it. L0, which is us: the memory of L1 that was meant is not there.

#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/nested_ept.hpp>
#include <mmunotify/secondary/x86/nested_modes.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// The error code of a nested page fault (EXITINFO1): that of a page fault, and which access it was.
namespace npt_exit {
inline constexpr std::uint64_t final_access = bit(32);  ///< to what L2's tables translate to
inline constexpr std::uint64_t table_access = bit(33);  ///< to one of L2's tables
}  // namespace npt_exit

struct [[nodiscard]] nested_outcome {
  enum kind : std::uint8_t {
    done,                  ///< the access happened
    page_fault,            ///< to L2: #PF with `code`; CR2 is the address
    general_protection,    ///< to L2: #GP(0) or #SS(0); of set_controls: #GP(0)
    ept_violation,         ///< to L1: an exit with the qualification `info` and the guest-physical address `where`
    ept_misconfiguration,  ///< to L1: an exit with the guest-physical address `where`
    nested_page_fault,     ///< to L1: an exit with EXITINFO1 `info` and EXITINFO2 `where`
    write_tracked,         ///< to L0: a write to a table of L1's that is shadowed: emulate it, write with guest_write
    not_mapped,            ///< to L0: no slot at `address`, a read-only one for a write, or the host refuses
    released,              ///< as in outcome
    no_memory,             ///< as in outcome
    again,                 ///< of a single attempt
    inactive,              ///< no tables have been entered
  };
  enum class receiver : std::uint8_t { nobody, l2, l1, l0 };

  kind what = done;
  fault_code code{};       ///< page_fault
  std::uint64_t info = 0;  ///< ept_violation (ept_exit), nested_page_fault (fault_code and npt_exit)
  l2_gpa where{};          ///< exits to L1
  gpa address{};           ///< write_tracked, not_mapped: of L1

  friend constexpr bool operator==(const nested_outcome&, const nested_outcome&) = default;

  /// Who has to act.
  constexpr receiver to() const noexcept {
    if (what == done) return receiver::nobody;
    if (what == page_fault || what == general_protection) return receiver::l2;
    return what >= ept_violation && what <= nested_page_fault ? receiver::l1 : receiver::l0;
  }
};

/// An access of L2 to its physical memory.
struct nested_access {
  l2_gpa where{};
  access how = access::read;  ///< read, write or fetch
  bool table = false;         ///< to one of L2's page tables, by a walk of them
  bool linear = false;        ///< on the way to a linear address
  /// A read that EPT and NPT judge as a write: of a table, by NPT and by EPT with accessed and dirty bits.
  bool judged_as_write = false;

  /// What L1's tables are asked.
  constexpr access asked() const noexcept { return judged_as_write ? access::write : how; }
};

/// What the fault path's answer is to a nested guest: who gets what. tables: those that L1 has entered.
constexpr nested_outcome nested_outcome_of(const outcome& o, const nested_access& a,
                                           const nested_pointer& tables) noexcept {
  switch (o.what) {
    case outcome::done: return {};
    case outcome::write_tracked: return {.what = nested_outcome::write_tracked, .address = o.address};
    case outcome::not_mapped: return {.what = nested_outcome::not_mapped, .address = o.address};
    case outcome::released: return {.what = nested_outcome::released};
    case outcome::no_memory: return {.what = nested_outcome::no_memory};
    case outcome::again: return {.what = nested_outcome::again};
    case outcome::page_fault:
    case outcome::general_protection: break;
  }
  if (tables.what == nested_pointer::npt) {
    // general_protection: the address is beyond the tables, so it is not mapped.
    const std::uint32_t access_bits = fault_code::user | (is_write(a.asked()) ? fault_code::write : 0) |
                                      (is_fetch(a.how) && tables.nxe ? fault_code::fetch : 0);
    const std::uint64_t code = o.what == outcome::page_fault ? o.code.bits : access_bits;
    return {.what = nested_outcome::nested_page_fault,
            .info = code | (a.table ? npt_exit::table_access : npt_exit::final_access),
            .where = a.where};
  }
  if (o.code.bits == ept_exit::misconfigured) return {.what = nested_outcome::ept_misconfiguration, .where = a.where};
  // With accessed and dirty bits an access to a table is a read and a write.
  const bool both = a.table && is_write(a.asked()) && (tables.value & eptp::accessed_dirty) != 0;
  const std::uint32_t linear = a.linear ? ept_exit::linear_valid | (a.table ? 0 : ept_exit::translated) : 0;
  return {.what = nested_outcome::ept_violation,
          .info = o.code.bits | (both ? ept_exit::read : 0) | linear,
          .where = a.where};
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
