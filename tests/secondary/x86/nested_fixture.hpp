// SPDX-License-Identifier: MIT
#pragma once

// A host, a guest hypervisor (L1) and its guest (L2) for the tests of nested guests. L1 runs without paging, so its
// linear addresses are its physical ones.

#include <cstdint>
#include <initializer_list>

#include <mmunotify/secondary/x86/nested_vcpu.hpp>

#include <doctest/doctest.h>

#include "shadow_fixture.hpp"

namespace nested_test {

using namespace shadow_test;
using mmunotify::x86::l2_gpa;
using x86::nested_outcome;
using x86::nested_pointer;
using x86::pointer_error;
namespace epte = x86::epte;
namespace ept_exit = x86::ept_exit;
namespace npt_exit = x86::npt_exit;
using receiver = nested_outcome::receiver;

inline constexpr std::uint64_t ept_all = epte::read | epte::write | epte::execute;
inline constexpr std::uint64_t npt_all = pte::present | pte::writable | pte::user;
inline constexpr std::uint64_t npt_used = npt_all | pte::accessed | pte::dirty;

struct nested_machine : machine_of<x86::no_paging, x86::no_paging, prefetching_host> {
  using nested_cpu = x86::nested_vcpu<mmu_type>;

  bool npt = false;
  unsigned levels = 4;
  std::uint64_t second = new_table();  ///< L1's top table
  cpu_type l1{mmu};
  nested_cpu l2;

  explicit nested_machine(bool with_npt = false, const x86::mmu_options& o = {}, std::uint64_t slot_pages = pages,
                          const x86::nested_capabilities& can = {})
      : machine_of(slot_pages, o), npt(with_npt), l2(mmu, can) {}

  nested_pointer pointer(bool marks = false) const {
    if (npt) return {.what = nested_pointer::npt, .value = second, .la57 = levels == 5};
    return {.value = second | 6 | (levels - 1) << 3 | (marks ? x86::eptp::accessed_dirty : 0)};
  }
  std::uint64_t all() const { return npt ? npt_used : ept_all; }
  std::uint64_t leaf_bits() const { return npt ? npt_used : ept_all | epte::write_back; }

  /// Where the entry of this level is; tables on the way are made, and allow everything.
  gpa second_entry(l2_gpa a, unsigned level = 1) {
    gpa table{second};
    for (unsigned l = levels;; --l) {
      const gpa where = table + 8 * (a.value >> (12 + 9 * (l - 1)) & 511);
      if (l == level) return where;
      if ((read64(where) & 7) == 0) CHECK(write64(where, new_table() | (npt ? npt_used : ept_all)) == errc::ok);
      table = {read64(where) & pte::address};
    }
  }
  /// L1 maps a to `to` of its own.
  gpa second_map(l2_gpa a, gpa to, std::uint64_t bits, unsigned level = 1) {
    const gpa where = second_entry(a, level);
    CHECK(write64(where, to.value | bits | (level > 1 ? epte::large : 0)) == errc::ok);
    return where;
  }
  gpa second_map(l2_gpa a, gpa to) { return second_map(a, to, leaf_bits()); }

  void enter(bool marks = false) { CHECK(l2.enter(pointer(marks)) == pointer_error::none); }

  /// L2 in 4-level paging, its top table at L2's page 0x10, which is L1's page of that number; so are all its tables.
  static constexpr std::uint64_t l2_root = 0x10000;
  std::uint64_t next_l2_table = l2_root + page_size;
  void start_l2_paging(std::uint64_t cr3 = l2_root) {
    for (std::uint64_t f = 0x10; f < 0x18; ++f) second_map({f * page_size}, {f * page_size});
    CHECK(l2.set_controls(long_mode(cr3)).what == nested_outcome::done);
  }
  static x86::control_registers long_mode(std::uint64_t cr3) {
    return {.cr0 = x86::cr0::pe | x86::cr0::pg | x86::cr0::wp,
            .cr3 = cr3,
            .cr4 = x86::cr4::pae,
            .efer = x86::efer::lme | x86::efer::nxe};
  }
  /// L2 maps va to a, in its own tables; where the entry of this level is (in L1's and L2's memory alike).
  gpa l2_map(gva va, l2_gpa a, std::uint64_t bits = rwu, unsigned level = 1) {
    gpa table{l2_root};
    for (unsigned l = 4;; --l) {
      const gpa where = table + 8 * (va.value >> (12 + 9 * (l - 1)) & 511);
      if (l == level) {
        CHECK(write64(where, a.value | bits | (level > 1 ? pte::large : 0)) == errc::ok);
        return where;
      }
      if ((read64(where) & pte::present) == 0) {
        CHECK(write64(where, next_l2_table | rwu) == errc::ok);
        next_l2_table += page_size;
      }
      table = {read64(where) & pte::address};
    }
  }
};

/// The host address that the access would use; null if it did not come to pass.
struct nested_seen {
  nested_outcome result;
  std::byte* at = nullptr;
};
template <class Cpu, class Address>
nested_seen touch2(Cpu& cpu, Address a, x86::access how) {
  nested_seen s;
  s.result = cpu.access(a, how, [&](std::byte* at) noexcept { s.at = at; });
  return s;
}

inline nested_outcome violation(l2_gpa where, std::uint64_t info) {
  return {.what = nested_outcome::ept_violation, .info = info, .where = where};
}
inline nested_outcome misconfiguration(l2_gpa where) {
  return {.what = nested_outcome::ept_misconfiguration, .where = where};
}
inline nested_outcome npf(l2_gpa where, std::uint64_t info) {
  return {.what = nested_outcome::nested_page_fault, .info = info, .where = where};
}
inline nested_outcome elsewhere(nested_outcome::kind what, gpa address) { return {.what = what, .address = address}; }

/// Calls f(false) for EPT, and f(true) for NPT.
template <class F>
void in_both_formats(F&& f) {
  for (const bool npt : {false, true}) {
    CAPTURE(npt);
    f(npt);
  }
}

}  // namespace nested_test
