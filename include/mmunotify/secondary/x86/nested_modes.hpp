// SPDX-License-Identifier: MIT
#pragma once

// What a nested guest's tables can be, and the pointer to them: L1, a hypervisor that is our guest, maps its own
// guest's (L2's) physical memory to its own by EPT (nested_ept.hpp) or by NPT.
//
// NPT is long-mode paging once more, and guest_walker does all of its walk: each access counts as a user's, with
// CR0.WP=1, SMEP, SMAP and keys off, and NX as L1's EFER.NXE has it. A guest in PAE paging has no PDPTE registers
// there.
//
// Both are shadowed like tables of the guest's own (shadow_tables.hpp), in the same pages, by the same roles and
// reverse mappings. The shadow entries say U for R; hardware_leaf gives what a processor would walk.
//
// Limits. NPT has the format that L1 itself runs with; an L1 in 32-bit paging, whose NPT is PAE or two-level, is not
// served. Nor are encrypted memory, supervisor shadow stacks and guest-mode execute traps (GMET).
//
// References: Intel SDM vol. 3C, 25.6.11 (EPTP), 27.2.1.1 (its checks); AMD APM vol. 2, 15.25 (nested paging).

#include <cstdint>
#include <type_traits>
#include <utility>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/access.hpp>
#include <mmunotify/secondary/x86/direct_format.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/nested_ept.hpp>
#include <mmunotify/secondary/x86/pae.hpp>
#include <mmunotify/secondary/x86/page_role.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

struct nested_physical;
/// A physical address of the nested guest, L2. (gpa is one of L1, our guest.)
using l2_gpa = address<nested_physical>;

/// NPT with 4 or 5 levels.
template <unsigned Levels>
struct npt : long_mode<Levels> {
  static constexpr bool has_keys = false;
  /// Addresses beyond what the levels translate: the walk ends with general_protection, which the nested vCPU reports
  /// as a nested page fault.
  static constexpr bool canonical(gva a) noexcept { return a.value >> npt::address_bits == 0; }

  static constexpr nested_tables kind(const walk_context&) noexcept { return nested_tables::npt; }
  static constexpr bool dirty(const walk_context&, std::uint64_t leaf) noexcept {
    return (leaf & pte::dirty) != 0 || detail::mutated(detail::mutation::nested_dirty_ignored);
  }
};

/// PAE paging of a guest under NPT: its PDPTEs are in its memory, and read and judged by each walk (APM 15.25.10).
struct pae_under_npt : pae {
  static constexpr bool top_in_registers = false;
  static constexpr entry_type reserved(unsigned level, const entry_format& f) noexcept {
    return level == 3 ? pae::reserved_pdpte(f) : pae::reserved(level, f);
  }
};

static_assert(paging_mode<npt<4>> && paging_mode<npt<5>> && paging_mode<pae_under_npt>);

/// What L1 is told that its processor can.
struct nested_capabilities {
  unsigned maxphyaddr = 40;    ///< of L1's addresses, 32 to 52
  bool gib_pages = true;       ///< leaves of 1 GiB
  bool execute_only = true;    ///< EPT
  bool accessed_dirty = true;  ///< EPT
  bool five_levels = true;
};

/// What L1 has put into its VMCS or VMCB.
struct nested_pointer {
  enum kind : std::uint8_t { ept, npt };
  kind what = ept;
  std::uint64_t value = 0;  ///< the EPTP, or nCR3
  bool la57 = false;        ///< NPT: L1 itself runs with CR4.LA57, so NPT has 5 levels; an EPTP says it itself
  bool nxe = true;          ///< NPT: L1's EFER.NXE

  friend constexpr bool operator==(const nested_pointer&, const nested_pointer&) = default;
};

/// Why a pointer is refused: VM entry fails, VMRUN ends with VMEXIT_INVALID, INVEPT fails.
enum class [[nodiscard]] pointer_error : std::uint8_t {
  none,
  memory_type,     ///< of an EPTP, neither uncacheable nor write-back
  walk_length,     ///< neither 4 levels nor, where there are 5, 5
  accessed_dirty,  ///< wanted, and the processor has none
  reserved_bits,
  beyond_width,  ///< the table's address is, or the width is not 32 to 52
};

constexpr const char* to_string(pointer_error e) noexcept {
  switch (e) {
    case pointer_error::none: return "success";
    case pointer_error::memory_type: return "the EPTP's memory type is neither uncacheable nor write-back";
    case pointer_error::walk_length: return "the tables have a number of levels that the processor does not walk";
    case pointer_error::accessed_dirty: return "the EPTP asks for accessed and dirty bits, which the processor lacks";
    case pointer_error::reserved_bits: return "the EPTP has reserved bits set";
    case pointer_error::beyond_width: return "the tables lie beyond the physical-address width, or it is not 32 to 52";
  }
  return "unknown error";
}

/// SDM 27.2.1.1 and APM 15.25.3; the first thing that is wrong.
constexpr pointer_error check_pointer(const nested_pointer& p, const nested_capabilities& can) noexcept {
  if (can.maxphyaddr < 32 || can.maxphyaddr > 52) return pointer_error::beyond_width;
  if (p.what == nested_pointer::npt) {
    if (p.la57 && !can.five_levels) return pointer_error::walk_length;
  } else {
    const std::uint64_t type = p.value & eptp::memory_type, length = (p.value & eptp::walk_length) >> 3;
    if (type != 0 && type != 6) return pointer_error::memory_type;
    if (length != 3 && (length != 4 || !can.five_levels)) return pointer_error::walk_length;
    if ((p.value & eptp::accessed_dirty) != 0 && !can.accessed_dirty) return pointer_error::accessed_dirty;
    if ((p.value & eptp::reserved) != 0) return pointer_error::reserved_bits;
  }
  return (p.value & bit_range(can.maxphyaddr, 63)) != 0 ? pointer_error::beyond_width : pointer_error::none;
}

/// What a walk of these tables depends on. Precondition: check_pointer says none.
constexpr walk_context context_of(const nested_pointer& p, const nested_capabilities& can) noexcept {
  walk_context c;
  c.cr3 = p.value;
  c.maxphyaddr = can.maxphyaddr;
  c.gib_pages = can.gib_pages;
  if (p.what == nested_pointer::npt) {
    c.cpl = 3;
    c.nxe = p.nxe;
    c.amd = true;
  } else {
    c.execute_only = can.execute_only;
  }
  return c;
}

/// Calls f(std::type_identity<Mode>{}) with the policy of these tables and returns what it returns.
template <class F>
constexpr decltype(auto) visit_nested(const nested_pointer& p, F&& f) {
  if (p.what == nested_pointer::npt) {
    if (p.la57) return std::forward<F>(f)(std::type_identity<npt<5>>{});
    return std::forward<F>(f)(std::type_identity<npt<4>>{});
  }
  if ((p.value & eptp::walk_length) >> 3 == 4) return std::forward<F>(f)(std::type_identity<ept<5>>{});
  return std::forward<F>(f)(std::type_identity<ept<4>>{});
}

/// Returns: the leaf as a processor would walk it in tables of this format; write-back. (Links are this process's.)
/// Precondition: a leaf.
template <direct_format Format>
constexpr std::uint64_t hardware_leaf(shadow_entry e, unsigned level) noexcept {
  const rights r = e.allows();
  const std::uint64_t both = Format::place(e.frame()) | (level > 1 ? pte::large : 0) |
                             (e.accessed() ? Format::accessed_bit : 0) | (e.dirty() ? Format::dirty_bit : 0) |
                             (e.may_write() ? direct_may_write_bit : 0) | (r.writable() ? Format::write_bit : 0);
  if constexpr (std::is_same_v<Format, ept_format>) {
    return both | epte::write_back | (r.user() ? epte::read : 0) | (r.executable() ? epte::execute : 0);
  } else {
    return both | pte::present | (r.user() ? pte::user : 0) | (r.executable() ? 0 : pte::no_execute);
  }
}

/// For the self-check: a leaf in a page of this role is one that a processor would take.
constexpr bool hardware_takes(page_role role, shadow_entry leaf) noexcept {
  const unsigned level = role.level();
  if (role.nested() == nested_tables::none) return true;
  if (role.nested() == nested_tables::npt) return !npt_format::reserved(hardware_leaf<npt_format>(leaf, level), level);
  return !ept_format::reserved(hardware_leaf<ept_format>(leaf, level), level);
}

/// Whether L1's entry behind entry n of a shadow page of level 1, as it is now, still allows all that the leaf does.
/// For tables that L1 has written freely (unsync.hpp). Precondition: the page's role is a nested one.
inline bool nested_follows(const shadow_page& p, unsigned n, shadow_entry leaf, std::uint64_t entry) noexcept {
  if constexpr (detail::mutated(detail::mutation::nested_stale_sync)) return true;
  const nested_tables kind = p.role.nested();
  const entry_format f = p.role.bits();
  std::uint64_t grants = 0;
  if (kind == nested_tables::npt) {
    const std::uint64_t needed = pte::present | pte::accessed | (leaf.may_write() ? pte::dirty : 0);
    if ((entry & (npt<4>::reserved(1, f) | needed)) != needed) return false;
    grants = npt<4>::grants(entry, 1);
  } else {
    const unsigned choices = static_cast<unsigned>(kind) - static_cast<unsigned>(nested_tables::ept);
    const std::uint64_t used = epte::accessed | (leaf.may_write() ? epte::dirty : 0);
    const std::uint64_t needed = (choices & 1) != 0 ? used : 0;
    if (!ept<4>::present(entry) || ept<4>::misconfigured(entry, 1, f, (choices & 2) != 0)) return false;
    if ((entry & needed) != needed) return false;
    grants = ept<4>::grants(entry, 1);
  }
  if (frame_of(gpa{entry & pte::address}) != p.leaf_frame(n)) return false;
  const rights granted = rights_in(grants) & p.role.access();
  if (leaf.may_write() && !granted.writable()) return false;
  return covers(granted, leaf.allows()) && leaf.guest_user() == granted.user();
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
