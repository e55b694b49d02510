// SPDX-License-Identifier: MIT
#pragma once

// The role of a shadow page: one word that holds everything that changes the meaning of its entries, besides the guest
// entries themselves.
//
// One guest table can stand at several places of several trees, and mean something else at each: other rights above it,
// another level, another CR0.WP. A shadow page may be used where its frame *and* its role fit, and nowhere else; the
// word is what the index compares, and what the roots of a vCPU are remembered by.
//
// What is in it, and why:
//   level, format, quadrant   how the table is read. A table of 4-byte entries has 1024 of them: at level 1 two shadow
//                             pages cover it, at level 2 four, told apart by the quadrant.
//   direct, guest_user        a part of a large guest leaf, with no table behind it, and that leaf's U
//   key                       of a direct page: the protection key of its leaves
//   access                    what the levels above grant; of a direct page, the rights of its leaves
//   wp                        CR0.WP: with WP=0 the supervisor's writes make leaves that no guest entry grants
//   smep, smap without wp     with WP=1 both are judged at the access and the tables do not know of them; with WP=0
//                             they decide what such a leaf may be
//   nxe, and the processor    which bits are reserved: EFER.NXE, CR4.PSE, physical-address width (in a table of 4-byte
//                             entries, that of 4 MiB pages), 1 GiB pages, AMD. Two vCPUs of different processors do
//                             not share tables.
//   nested                    the table is one that a guest hypervisor keeps for its guest: EPT, with its choices, or
//                             NPT
//   invalid                   the page is on its way out; it fits nowhere
//
// References: Linux Documentation/virt/kvm/x86/mmu.rst ("shadow pages": the same word, for the same reasons).

#include <array>
#include <cstdint>

#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/access.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// How the entries of a guest table are read.
enum class table_format : std::uint8_t {
  none = 0,       ///< there is no guest table: paging is off
  four_byte = 1,  ///< two-level paging
  pae = 2,        ///< 8 bytes, bits 52 to 62 reserved
  long_mode = 3,  ///< 8 bytes, 4 or 5 levels
};

/// What a table of a guest hypervisor is, as far as its entries' meaning depends on it (nested_modes.hpp).
enum class nested_tables : std::uint8_t {
  none = 0,  ///< a table of the guest's own paging
  npt = 1,
  ept = 4,
  ept_accessed_dirty = 5,
  ept_execute_only = 6,
  ept_accessed_dirty_execute_only = 7,
};

/// The PDPTEs of PAE as far as a shadow page depends on them: address and P of those that are present.
using directory_registers = std::array<std::uint64_t, 4>;

class page_role {
 public:
  /// Level 1, long mode, all rights, every control bit clear.
  constexpr page_role() noexcept {
    *this = with_level(1).with_format(table_format::long_mode).with_access(rights{}).with_quadrant(0);
  }
  /// The role of the top table that a processor in this state walks.
  static constexpr page_role root(const walk_context& c, unsigned level, table_format format) noexcept {
    return page_role()
        .with_level(level)
        .with_format(format)
        .with(wp_at, c.wp)
        .with(nxe_at, c.nxe)
        .with(smep_at, c.smep && !c.wp)
        .with(smap_at, c.smap && !c.wp)
        .with(pse_at, c.pse && format == table_format::four_byte && !detail::mutated(detail::mutation::pse_not_in_role))
        .with(gib_at, c.gib_pages)
        .with(amd_at, c.amd)
        .put(width_at, 5, width(c, format) - 32);
  }

  constexpr unsigned level() const noexcept { return get(level_at, 3); }
  constexpr table_format format() const noexcept { return static_cast<table_format>(get(format_at, 2)); }
  constexpr unsigned quadrant() const noexcept { return get(quadrant_at, 2); }
  constexpr bool direct() const noexcept { return has(direct_at); }
  /// There is a guest table behind the page. (Else it is direct, or a page of links above the page directories of a
  /// guest with 32-bit addresses.)
  constexpr bool has_table() const noexcept { return !direct() && !has_links_alone(); }
  constexpr bool has_links_alone() const noexcept {
    return level() == 3 && (format() == table_format::four_byte || format() == table_format::pae);
  }
  /// A vCPU's root may have this role.
  constexpr bool may_be_root() const noexcept {
    if (format() == table_format::long_mode) return !direct() && level() >= 4;
    return level() == 3 && direct() == (format() == table_format::none);
  }
  constexpr bool guest_user() const noexcept { return has(guest_user_at); }
  constexpr unsigned key() const noexcept { return get(key_at, 4); }
  constexpr rights access() const noexcept { return {static_cast<std::uint8_t>(get(access_at, 3))}; }
  constexpr bool wp() const noexcept { return has(wp_at); }
  constexpr bool invalid() const noexcept { return has(invalid_at); }
  constexpr nested_tables nested() const noexcept { return static_cast<nested_tables>(get(nested_at, 3)); }
  /// What decides about reserved bits of 8-byte entries.
  constexpr entry_format bits() const noexcept {
    return {.maxphyaddr = get(width_at, 5) + 32, .nxe = has(nxe_at), .gib_pages = has(gib_at), .amd = has(amd_at)};
  }
  constexpr std::uint32_t word() const noexcept { return word_; }

  constexpr page_role with_level(unsigned l) const noexcept { return put(level_at, 3, l); }
  constexpr page_role with_format(table_format f) const noexcept { return put(format_at, 2, static_cast<unsigned>(f)); }
  constexpr page_role with_quadrant(unsigned q) const noexcept { return put(quadrant_at, 2, q); }
  constexpr page_role with_access(rights r) const noexcept { return put(access_at, 3, r.bits); }
  constexpr page_role with_wp(bool on) const noexcept { return with(wp_at, on); }
  constexpr page_role with_nested(nested_tables n) const noexcept {
    if constexpr (detail::mutated(detail::mutation::nested_not_in_role)) return *this;
    return put(nested_at, 3, static_cast<unsigned>(n));
  }
  constexpr page_role as_invalid() const noexcept { return with(invalid_at, true); }

  /// The role of a guest table below this one.
  constexpr page_role table_below(rights granted, unsigned quadrant = 0) const noexcept {
    return with_level(level() - 1).with_access(granted).with_quadrant(quadrant);
  }
  /// The role of a part of a large leaf in this table. Leaves that share a direct page must agree in all that its
  /// entries say: whether the page may be written already as well (two leaves have two dirty bits).
  constexpr page_role part_below(rights leaf_rights, bool user_in_guest, unsigned key = 0) const noexcept {
    return table_below(leaf_rights).with(direct_at, true).with(guest_user_at, user_in_guest).put(key_at, 4, key);
  }

  /// Whether tables of both roles are read by the same processor in the same state: all but place and rights is equal.
  constexpr bool read_like(page_role other) const noexcept {
    constexpr std::uint32_t processor = ~std::uint32_t{0} << wp_at | std::uint32_t{3} << format_at;
    return ((word_ ^ other.word_) & processor) == 0;
  }

  friend constexpr bool operator==(const page_role&, const page_role&) = default;

 private:
  static constexpr unsigned level_at = 0, format_at = 3, quadrant_at = 5, direct_at = 7, guest_user_at = 8,
                            access_at = 9, wp_at = 12, nxe_at = 13, smep_at = 14, smap_at = 15, pse_at = 16,
                            gib_at = 17, amd_at = 18, width_at = 19, invalid_at = 24, key_at = 25, nested_at = 29;

  /// The width that decides about reserved bits. 4-byte entries have some in 4 MiB pages alone.
  static constexpr unsigned width(const walk_context& c, table_format format) noexcept {
    if (format != table_format::four_byte) return c.maxphyaddr;
    const unsigned least = c.pse36_bits < c.maxphyaddr ? c.pse36_bits : c.maxphyaddr;
    return least < 32 ? 32 : least;
  }
  constexpr unsigned get(unsigned at, unsigned bits) const noexcept { return word_ >> at & ((1U << bits) - 1); }
  constexpr bool has(unsigned at) const noexcept { return get(at, 1) != 0; }
  constexpr page_role put(unsigned at, unsigned bits, unsigned value) const noexcept {
    const std::uint32_t mask = ((1U << bits) - 1) << at;
    page_role r = *this;
    r.word_ = (word_ & ~mask) | (value << at & mask);
    return r;
  }
  constexpr page_role with(unsigned at, bool on) const noexcept { return put(at, 1, on ? 1 : 0); }

  std::uint32_t word_ = 0;
};

static_assert(sizeof(page_role) == 4 && page_role().level() == 1 && page_role().access() == rights{});

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
