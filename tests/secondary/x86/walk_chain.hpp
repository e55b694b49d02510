// SPDX-License-Identifier: MIT
#pragma once

// Guest tables by hand for the tests of the walker: one entry per level, in any mode, in memory that does what the test
// says when it is read or written.

#include <array>
#include <cstdint>

#include <mmunotify/secondary/x86/control_registers.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>

namespace walk_test {

using namespace mmunotify;
using x86::access;
using x86::fault_code;
using x86::walk_status;
namespace pte = x86::pte;

inline constexpr std::uint64_t pwu = pte::present | pte::writable | pte::user;

/// Level l's table is at l * 0x1000, its entry for `target` is entries[l-1]; all allow everything.
template <class Mode>
struct chain {
  using mode = Mode;
  using entry = typename Mode::entry_type;
  static constexpr unsigned levels = Mode::levels;
  static constexpr gva target{Mode::address_bits > 32 ? 0x0000'1234'5678'9abc : 0x5678'9abc};

  std::array<entry, levels> entries = standard();
  unsigned unreadable = 0;          ///< the level whose entry cannot be read
  unsigned unwritable = 0;          ///< the level whose entry cannot be exchanged
  unsigned rom = 0;                 ///< the level whose entry is in ROM
  unsigned collide_at = 0;          ///< the level at which the guest interferes, once
  entry becomes = 0;                ///< what it writes there
  unsigned exchanges = 0;           ///< successful ones
  std::array<unsigned, 8> order{};  ///< their levels

  static constexpr std::array<entry, levels> standard() noexcept {
    std::array<entry, levels> e{};
    e[0] = static_cast<entry>(0x55000 | pwu);
    for (unsigned l = 2; l <= levels; ++l) e[l - 1] = static_cast<entry>(0x1000 * (l - 1) | pwu);
    if constexpr (Mode::top_in_registers) e[levels - 1] = 0x1000 * (levels - 1) | pte::present;
    return e;
  }
  static constexpr x86::walk_context context() noexcept {
    x86::walk_context c;
    c.cr3 = 0x1000 * levels;
    return c;
  }
  static constexpr gpa place(unsigned level, gva a = target) noexcept {
    return gpa{0x1000 * level + Mode::index(a, level) * sizeof(entry)};
  }
  static constexpr unsigned level_of(gpa where) noexcept { return static_cast<unsigned>(where.value >> 12); }

  constexpr bool read_entry(gpa where, entry& value) const noexcept {
    const unsigned level = level_of(where);
    if (level < 1 || level > levels || level == unreadable) return false;
    value = where == place(level) ? entries[level - 1] : entry{0};
    return true;
  }
  constexpr x86::exchange_result compare_exchange_entry(gpa where, entry expected, entry desired) noexcept {
    const unsigned level = level_of(where);
    if (level == unwritable) return x86::exchange_result::failed;
    if (level == rom) return x86::exchange_result::read_only;
    if (level == collide_at) {
      collide_at = 0;
      entries[level - 1] = becomes;
    }
    if (entries[level - 1] != expected) return x86::exchange_result::changed;
    entries[level - 1] = desired;
    order[exchanges++] = level;
    return x86::exchange_result::done;
  }

  /// Sets bits in, or takes them from, the entry of a level.
  constexpr chain& with(unsigned level, std::uint64_t bits) noexcept {
    entries[level - 1] |= static_cast<entry>(bits);
    return *this;
  }
  constexpr chain& without(unsigned level, std::uint64_t bits) noexcept {
    entries[level - 1] &= static_cast<entry>(~bits);
    return *this;
  }

  /// One access after CR3 was written, which loads the PDPTEs if the mode has them.
  constexpr x86::walk_result walk(access how, x86::walk_context c = context(), gva a = target) noexcept {
    if constexpr (Mode::top_in_registers) {
      if (x86::load_pdptes(*this, c) != x86::pdpte_load::ok) {
        x86::walk_result refused{};
        refused.status = walk_status::general_protection;
        return refused;
      }
    }
    return x86::guest_walker<Mode>{c}.walk(*this, a, how);
  }
  /// The error code of the page fault; all bits set if there is none.
  constexpr std::uint32_t code(access how, const x86::walk_context& c = context(), gva a = target) noexcept {
    const x86::walk_result r = walk(how, c, a);
    return r.status == walk_status::page_fault ? r.code.bits : ~std::uint32_t{0};
  }
  constexpr bool allowed(access how, const x86::walk_context& c = context()) noexcept {
    return walk(how, c).status == walk_status::ok;
  }
};

/// The lowest level whose entry is in memory and above all leaves.
template <class Mode>
inline constexpr unsigned top_in_memory = Mode::top_in_registers ? Mode::levels - 1 : Mode::levels;

}  // namespace walk_test
