// SPDX-License-Identifier: MIT

#include <doctest/doctest.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

#include <mmunotify/secondary/x86/control_registers.hpp>

using namespace mmunotify;
using x86::control_registers;
using x86::paging;
namespace cr0 = x86::cr0;
namespace cr4 = x86::cr4;
namespace efer = x86::efer;

namespace {

constexpr control_registers legacy{.cr0 = cr0::pe | cr0::pg};
constexpr control_registers pae{.cr0 = cr0::pe | cr0::pg, .cr4 = cr4::pae};
constexpr control_registers long_4{.cr0 = cr0::pe | cr0::pg, .cr4 = cr4::pae, .efer = efer::lme | efer::lma};

constexpr control_registers with(control_registers r, std::uint64_t c0, std::uint64_t c4 = 0) {
  r.cr0 ^= c0;
  r.cr4 ^= c4;
  return r;
}

}  // namespace

TEST_CASE("the paging mode follows from PG, PAE, LME and LA57") {
  for (unsigned v = 0; v < 16; ++v) {
    const bool pg = (v & 1) != 0, pae_on = (v & 2) != 0, lme = (v & 4) != 0, la57 = (v & 8) != 0;
    const control_registers r{.cr0 = cr0::pe | (pg ? cr0::pg : 0),
                              .cr4 = (pae_on ? cr4::pae : 0) | (la57 ? cr4::la57 : 0),
                              .efer = lme ? efer::lme : 0};
    const paging expected = !pg       ? paging::none
                            : !pae_on ? paging::two_level
                            : !lme    ? paging::pae
                            : la57    ? paging::long_5
                                      : paging::long_4;
    CHECK(x86::mode_of(r) == expected);
  }
}

TEST_CASE("registers that a processor would refuse are refused") {
  const auto check = [](const control_registers& r, unsigned width = 40) {
    return x86::check_registers(r, {.maxphyaddr = width});
  };
  for (const control_registers& r : {control_registers{}, legacy, pae, long_4, with(long_4, 0, cr4::pcide)}) {
    CHECK(check(r) == errc::ok);
  }
  CHECK(check(with(legacy, cr0::pe)) == errc::bad_range);              // paging without protection
  CHECK(check(with(long_4, 0, cr4::pae)) == errc::bad_range);          // long mode without PAE
  CHECK(check(with(pae, 0, cr4::pcide)) == errc::bad_range);           // PCIDs outside long mode
  CHECK(check(with(long_4, cr0::pg, cr4::pcide)) == errc::bad_range);  // long mode that paging has not made active
  CHECK(check(long_4, 31) == errc::bad_range);
  CHECK(check(long_4, 53) == errc::bad_range);
}

TEST_CASE("CR3 is held against the address width in long mode, and bit 63 is free with PCIDs") {
  for (unsigned n = 0; n < 64; ++n) {
    control_registers r = long_4;
    r.cr3 = x86::bit(n);
    CHECK((x86::check_registers(r, {.maxphyaddr = 46}) == errc::ok) == (n < 46));
    r.cr4 |= cr4::pcide;
    CHECK((x86::check_registers(r, {.maxphyaddr = 46}) == errc::ok) == (n < 46 || n == 63));
    control_registers p = pae;  // the processor's own 32-bit moves cannot set more
    p.cr3 = x86::bit(n);
    CHECK(x86::check_registers(p, {.maxphyaddr = 46}) == errc::ok);
  }
}

TEST_CASE("PDPTEs are loaded by changes of CR3 and of the bits of CR0 and CR4 that the manual names, into PAE only") {
  constexpr std::uint64_t of_cr0 = cr0::cd | cr0::nw, of_cr4 = cr4::pge | cr4::pse | cr4::smep;
  for (unsigned n = 0; n < 64; ++n) {
    const std::uint64_t one = x86::bit(n);
    if (one != cr0::pg) CHECK(x86::reloads_pdptes(with(pae, one), pae) == ((one & of_cr0) != 0));
    if (one != cr4::pae) CHECK(x86::reloads_pdptes(with(pae, 0, one), pae) == ((one & of_cr4) != 0));
  }
  CHECK(x86::reloads_pdptes(with(pae, cr0::pg), pae));
  CHECK(x86::reloads_pdptes(legacy, pae));
  CHECK_FALSE(x86::reloads_pdptes(pae, pae));
  control_registers other = pae;
  other.cr3 = 0x1000;
  CHECK(x86::reloads_pdptes(other, pae));
  CHECK_FALSE(x86::reloads_pdptes(pae, legacy));
  CHECK_FALSE(x86::reloads_pdptes(pae, long_4));
  CHECK_FALSE(x86::reloads_pdptes(with(long_4, cr0::cd), long_4));
}

TEST_CASE("each bit that walks depend on comes from its register, and from no other bit") {
  struct source {
    bool x86::walk_context::*to;
    std::uint64_t control_registers::*from;
    unsigned bit;
  };
  constexpr source sources[] = {
      {&x86::walk_context::wp, &control_registers::cr0, 16},   {&x86::walk_context::pse, &control_registers::cr4, 4},
      {&x86::walk_context::smep, &control_registers::cr4, 20}, {&x86::walk_context::smap, &control_registers::cr4, 21},
      {&x86::walk_context::pke, &control_registers::cr4, 22},  {&x86::walk_context::pks, &control_registers::cr4, 24},
      {&x86::walk_context::nxe, &control_registers::efer, 11}};
  for (const source& s : sources) {
    control_registers r{};
    CHECK_FALSE(x86::context_of(r, {}).*s.to);
    r.*s.from = x86::bit(s.bit);
    CHECK(x86::context_of(r, {}).*s.to);
    r = {.cr0 = ~std::uint64_t{0}, .cr4 = ~std::uint64_t{0}, .efer = ~std::uint64_t{0}};
    r.*s.from = ~x86::bit(s.bit);
    CHECK_FALSE(x86::context_of(r, {}).*s.to);
  }
  const x86::walk_context c = x86::context_of({.cr3 = 0x12345678, .pkru = 5, .pkrs = 6},
                                              {.maxphyaddr = 46, .gib_pages = false, .pse36_bits = 36, .amd = true});
  CHECK(c.cr3 == 0x12345678);
  CHECK(c.pkru == 5);
  CHECK(c.pkrs == 6);
  CHECK(c.maxphyaddr == 46);
  CHECK_FALSE(c.gib_pages);
  CHECK(c.pse36_bits == 36);
  CHECK(c.amd);
  CHECK(c.cpl == 0);
  CHECK_FALSE(c.ac);
  CHECK(c.pdptes == std::array<std::uint64_t, 4>{});
}

TEST_CASE("a mode that is known at run time is visited with its policy") {
  const auto levels = [](paging m) {
    return x86::visit_mode(m, []<class Mode>(std::type_identity<Mode>) { return Mode::levels; });
  };
  CHECK(levels(paging::none) == 0);
  CHECK(levels(paging::two_level) == 2);
  CHECK(levels(paging::pae) == 3);
  CHECK(levels(paging::long_4) == 4);
  CHECK(levels(paging::long_5) == 5);
}

TEST_CASE("registers are made of a context, and the same context of them, in every mode") {
  using x86::paging;
  for (const paging m : {paging::none, paging::two_level, paging::pae, paging::long_4, paging::long_5}) {
    for (unsigned flags = 0; flags < 128; ++flags) {
      const auto on = [&](unsigned n) { return (flags >> n & 1) != 0; };
      x86::walk_context c;
      c.cr3 = 0x5000;
      c.wp = on(0), c.pse = on(1), c.smep = on(2), c.smap = on(3), c.pke = on(4), c.pks = on(5), c.nxe = on(6);
      c.pkru = 3, c.pkrs = 12;
      c.maxphyaddr = 36, c.gib_pages = false, c.pse36_bits = 33, c.amd = true;
      const x86::control_registers r = x86::controls_of(c, m);
      CHECK(x86::mode_of(r) == m);
      CHECK(x86::check_registers(r, x86::processor_of(c)) == errc::ok);
      const x86::walk_context again = x86::context_of(r, x86::processor_of(c));
      CHECK(again.cr3 == c.cr3);
      CHECK(std::tie(again.wp, again.pse, again.smep, again.smap) == std::tie(c.wp, c.pse, c.smep, c.smap));
      CHECK(std::tie(again.pke, again.pks, again.nxe, again.amd) == std::tie(c.pke, c.pks, c.nxe, c.amd));
      CHECK(std::tie(again.pkru, again.pkrs) == std::tie(c.pkru, c.pkrs));
      CHECK(std::tie(again.maxphyaddr, again.gib_pages) == std::tie(c.maxphyaddr, c.gib_pages));
      CHECK(again.pse36_bits == c.pse36_bits);
    }
  }
}
