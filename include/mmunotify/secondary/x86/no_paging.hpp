// SPDX-License-Identifier: MIT
#pragma once

// No paging (CR0.PG=0): a linear address is the physical one.
//
// A policy without levels, and the walker for it: it reads no memory, allows everything and never faults, so that code
// which takes any mode need not ask. The result has end_level 0, no entries, and one "page" of 4 GiB.

#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/access.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// No paging_mode: nothing of an entry is left to describe.
struct no_paging {
  using entry_type = std::uint64_t;  ///< of no entry; walkers want the name
  static constexpr unsigned levels = 0;
  static constexpr unsigned address_bits = 32;
  static constexpr bool top_in_registers = false;
  static constexpr bool has_keys = false;
  static constexpr bool canonical(gva) noexcept { return true; }
};

template <>
class guest_walker<no_paging> {
 public:
  using mode = no_paging;
  using entry_type = no_paging::entry_type;

  explicit constexpr guest_walker(const walk_context& context) noexcept : context_{context} {}

  constexpr const walk_context& context() const noexcept { return context_; }

  /// Effects: none. Returns: ok; linear addresses have 32 bits, what a caller leaves above them is ignored.
  template <class Memory>
  constexpr walk_result walk(Memory&, gva va, access) const noexcept {
    walk_result r{};
    r.page_shift = no_paging::address_bits;
    r.address = {va.value & bit_range(0, no_paging::address_bits - 1)};
    return r;
  }
  template <class Memory>
  constexpr walk_result translate(Memory& memory, gva va, access how) const noexcept {
    return walk(memory, va, how);
  }

  static constexpr rights rights_above(const walk_result&, unsigned) noexcept { return {}; }
  template <class Memory>
  static constexpr bool unchanged(Memory&, const walk_result&, unsigned) noexcept {
    return true;
  }

 private:
  walk_context context_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
