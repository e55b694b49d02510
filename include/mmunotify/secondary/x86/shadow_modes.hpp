// SPDX-License-Identifier: MIT
#pragma once

// How each guest paging mode lies in shadow tables, and what an MMU for several modes is made of.
//
// Shadow tables have 512 entries of 8 bytes at every level, whatever the guest's have. So:
//   4 and 5 levels   level by level, each guest table one shadow page
//   PAE              levels 1 and 2 the same; above them a page of four links, made from the PDPTE registers
//   two levels       a table of 1024 entries of 4 bytes has a shadow page for each of its quadrants: two of a page
//   table
//                    (2 MiB each), four of a page directory (1 GiB each). A directory entry becomes two neighbours: the
//                    halves of its table, or 2 MiB leaves for the halves of its 4 MiB page. Above the four, a page of
//                    links.
//   no paging        all of it is a part of one leaf as large as the address space: direct pages from level 3 on
// A page of links has no guest table behind it: it is never write-protected, and what it says is part of what it is
// found by (page_index::find).
//
// Which mode a vCPU is in is known when an MMU for one mode is compiled. An MMU for every_mode has the code for all,
// and asks the vCPU.

#include <array>
#include <concepts>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/access.hpp>
#include <mmunotify/secondary/x86/control_registers.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/no_paging.hpp>
#include <mmunotify/secondary/x86/pae.hpp>
#include <mmunotify/secondary/x86/page_role.hpp>
#include <mmunotify/secondary/x86/two_level.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// The entry of an address in its shadow table of this level.
constexpr unsigned shadow_index(gva a, unsigned level) noexcept {
  return static_cast<unsigned>(a.value >> (12 + 9 * (level - 1)) & 511);
}

template <walked_mode Mode>
struct shadow_layout {
  static constexpr bool narrow = Mode::levels == 2;
  /// Of the shadow tables: the level of their root.
  static constexpr unsigned levels = Mode::levels >= 4 ? Mode::levels : 3;
  /// The highest level with a guest table in memory; 0: there is none.
  static constexpr unsigned top_table = Mode::top_in_registers ? Mode::levels - 1 : Mode::levels;
  static constexpr table_format format = Mode::levels == 0   ? table_format::none
                                         : narrow            ? table_format::four_byte
                                         : Mode::levels == 3 ? table_format::pae
                                                             : table_format::long_mode;

  /// The tables are those of a guest hypervisor, for its guest (nested_modes.hpp).
  static constexpr bool nested = requires(const walk_context& c) { Mode::kind(c); };

  /// The address without what the mode ignores.
  static constexpr gva linear(gva a) noexcept { return Mode::address_bits == 32 ? gva{a.value & bit_range(0, 31)} : a; }

  /// The role of the top shadow page of a processor in this state. Without paging no control register counts.
  static constexpr page_role root_role(const walk_context& c) noexcept {
    if constexpr (Mode::levels == 0) {
      return page_role::root({}, levels + 1, format).part_below(rights{}, true);
    } else if constexpr (nested) {
      return page_role::root(c, levels, format).with_nested(Mode::kind(c));
    } else {
      return page_role::root(c, levels, format);
    }
  }
  static constexpr gfn root_frame([[maybe_unused]] const walk_context& c) noexcept {
    if constexpr (Mode::levels == 0) {
      return {0};
    } else {
      return frame_of(Mode::root(c.cr3));
    }
  }
  /// What a top page made from registers is found by besides: the directories that they name.
  static constexpr directory_registers registers([[maybe_unused]] const walk_context& c) noexcept {
    directory_registers r{};
    if constexpr (Mode::top_in_registers && !detail::mutated(detail::mutation::pdptes_not_in_key)) {
      for (std::size_t i = 0; i < r.size(); ++i) {
        if ((c.pdptes[i] & pte::present) != 0) r[i] = (c.pdptes[i] & pte::address) | pte::present;
      }
    }
    return r;
  }
  /// A write would change nothing in the guest's leaf. Precondition: the walk is ok.
  static constexpr bool dirty([[maybe_unused]] const walk_context& c, const walk_result& walk) noexcept {
    if constexpr (nested) {
      return Mode::dirty(c, walk.leaf());
    } else {
      return walk.dirty();
    }
  }
  /// The part of its guest table that the shadow page of this level around the address covers.
  static constexpr unsigned quadrant([[maybe_unused]] gva a, [[maybe_unused]] unsigned level) noexcept {
    if constexpr (narrow) {
      if (level == 1) return static_cast<unsigned>(a.value >> 21 & 1);
      if (level == 2) return static_cast<unsigned>(a.value >> 30 & 3);
    }
    return 0;
  }
  /// The number of entry i of a shadow page of level 1 in its guest table.
  static constexpr unsigned guest_index(page_role r, unsigned i) noexcept {
    return narrow ? r.quadrant() * 512 + i : i;
  }
  /// The guest table below the entry that the walk went through at this level; above the guest's levels, its root.
  /// Precondition: that entry maps no page.
  static constexpr gfn table_below([[maybe_unused]] const walk_context& c, [[maybe_unused]] const walk_result& walk,
                                   [[maybe_unused]] unsigned level) noexcept {
    if constexpr (Mode::levels == 0) {
      return {0};
    } else {
      if (level > Mode::levels) return root_frame(c);
      return frame_of(Mode::table(static_cast<typename Mode::entry_type>(walk.entry_values[level - 1])));
    }
  }
};

/// For an MMU whose vCPUs can be in any mode and change it, beginning without paging as a processor does.
struct every_mode {};

/// What an MMU is for: one mode, or every_mode.
template <class M>
concept shadowed_modes = std::same_as<M, every_mode> || walked_mode<M>;

template <shadowed_modes Modes>
inline constexpr bool several_modes = std::same_as<Modes, every_mode>;

/// Calls f(std::type_identity<Mode>{}) with the mode that a vCPU of such an MMU is in, and returns what it returns.
template <shadowed_modes Modes, class F>
constexpr decltype(auto) in_mode([[maybe_unused]] paging now, F&& f) {
  if constexpr (several_modes<Modes>) {
    return visit_mode(now, std::forward<F>(f));
  } else {
    return std::forward<F>(f)(std::type_identity<Modes>{});
  }
}

template <walked_mode Mode>
inline constexpr paging paging_of = Mode::levels == 0   ? paging::none
                                    : Mode::levels == 2 ? paging::two_level
                                    : Mode::levels == 3 ? paging::pae
                                    : Mode::levels == 4 ? paging::long_4
                                                        : paging::long_5;

/// The mode of a new vCPU.
template <shadowed_modes Modes>
constexpr paging first_mode() noexcept {
  if constexpr (several_modes<Modes>) {
    return paging::none;
  } else {
    return paging_of<Modes>;
  }
}

template <shadowed_modes Modes>
constexpr bool has_mode(paging m) noexcept {
  return several_modes<Modes> || m == first_mode<Modes>();
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
