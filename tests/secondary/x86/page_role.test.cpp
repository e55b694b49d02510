// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/page_role.hpp>

#include <doctest/doctest.h>

#include "shadow_fixture.hpp"

using namespace shadow_test;
using x86::page_role;
using x86::rights;
using x86::table_format;

TEST_CASE("each part of a role can be set without touching another") {
  const page_role base = page_role().with_level(5).with_format(table_format::four_byte).with_quadrant(3);
  CHECK(base.level() == 5);
  CHECK(base.format() == table_format::four_byte);
  CHECK(base.quadrant() == 3);
  CHECK_FALSE(base.direct());
  CHECK_FALSE(base.invalid());
  for (std::uint8_t bits = 0; bits < 8; ++bits) {
    const page_role r = base.with_access(rights{bits});
    CHECK(r.access() == rights{bits});
    CHECK(r.quadrant() == 3);
    CHECK(r.level() == 5);
    const page_role part = r.part_below(rights{bits}, bits % 2 == 0);
    CHECK(part.direct());
    CHECK(part.level() == 4);
    CHECK(part.guest_user() == (bits % 2 == 0));
    CHECK(part.access() == rights{bits});
    CHECK(part.format() == table_format::four_byte);
  }
  CHECK(base.as_invalid().invalid());
  CHECK(base.as_invalid() != base);
  CHECK(base.as_invalid().level() == 5);
}

TEST_CASE("the role of a root differs with everything that changes what entries mean, and with nothing else") {
  const auto root = [](auto&& change) {
    x86::walk_context c;
    change(c);
    return page_role::root(c, 4, table_format::long_mode);
  };
  const page_role plain = root([](x86::walk_context&) {});
  CHECK(plain.wp());
  CHECK(root([](auto& c) { c.wp = false; }) != plain);
  CHECK(root([](auto& c) { c.nxe = false; }) != plain);
  CHECK(root([](auto& c) { c.gib_pages = false; }) != plain);
  CHECK(root([](auto& c) { c.amd = true; }) != plain);
  for (unsigned width = 32; width <= 52; ++width) {
    CHECK((root([&](auto& c) { c.maxphyaddr = width; }) == plain) == (width == 40));
  }
  // Judged at each access while CR0.WP=1, and part of the tables while it is 0.
  CHECK(root([](auto& c) { c.smep = true; }) == plain);
  CHECK(root([](auto& c) { c.smap = true; }) == plain);
  const page_role no_wp = root([](auto& c) { c.wp = false; });
  CHECK(root([](auto& c) { c.wp = false, c.smep = true; }) != no_wp);
  CHECK(root([](auto& c) { c.wp = false, c.smap = true; }) != no_wp);
  // Not of the tables at all.
  CHECK(root([](auto& c) { c.cr3 = 0x5000, c.cpl = 3, c.ac = true; }) == plain);
  CHECK(root([](auto& c) { c.pse = false; }) == plain);
  x86::walk_context c;
  const page_role two = page_role::root(c, 2, table_format::four_byte);
  c.pse = false;
  CHECK(page_role::root(c, 2, table_format::four_byte) != two);
  c.pse = true;
  c.maxphyaddr = 45;  // 4 MiB pages alone have reserved bits, by the lesser width
  CHECK(page_role::root(c, 2, table_format::four_byte) == two);
  c.pse36_bits = 36;
  const page_role narrow = page_role::root(c, 2, table_format::four_byte);
  CHECK(narrow != two);
  c.maxphyaddr = 36;
  CHECK(page_role::root(c, 2, table_format::four_byte) == narrow);
  c.pse36_bits = 40;
  CHECK(page_role::root(c, 2, table_format::four_byte) == narrow);
}

TEST_CASE("a role says whether there is a table behind the page, and whether it may be a root") {
  const auto role = [](table_format f, unsigned level) { return page_role().with_format(f).with_level(level); };
  for (const table_format f : {table_format::four_byte, table_format::pae}) {
    CHECK(role(f, 3).has_links_alone());
    CHECK(role(f, 3).may_be_root());
    CHECK_FALSE(role(f, 3).has_table());
    for (const unsigned level : {1U, 2U}) {
      CHECK(role(f, level).has_table());
      CHECK_FALSE(role(f, level).may_be_root());
    }
  }
  for (unsigned level = 1; level <= 5; ++level) {
    CHECK(role(table_format::long_mode, level).has_table());
    CHECK(role(table_format::long_mode, level).may_be_root() == (level >= 4));
  }
  const page_role part = role(table_format::none, 4).part_below(rights{}, true);
  CHECK_FALSE(part.has_table());
  CHECK(part.may_be_root());
  CHECK_FALSE(part.part_below(rights{}, true).may_be_root());
  CHECK_FALSE(role(table_format::long_mode, 5).part_below(rights{}, true).may_be_root());
  CHECK(role(table_format::four_byte, 3).table_below(rights{}, 3).quadrant() == 3);
  CHECK(role(table_format::four_byte, 2).with_quadrant(3).table_below(rights{}).quadrant() == 0);
}

TEST_CASE("two processors that differ in what is reserved share no table") {
  machine m;
  constexpr gva va{0x400000};
  m.map(va, {(std::uint64_t{1} << 36) | 0x5000}, rwu | used);
  REQUIRE(m.mmu.add_slot({.id = 2, .base = {1 << 24}, .pages = 16, .host = ram_base}) == errc::ok);
  cpu_type wide{m.mmu}, narrow{m.mmu};
  x86::walk_context c;
  c.cr3 = m.root;
  REQUIRE(wide.set_registers(c) == errc::ok);
  c.maxphyaddr = 36;
  REQUIRE(narrow.set_registers(c) == errc::ok);
  CHECK(touch(wide, va, access::read).at == m.host.bytes(ram_base + 0x5000));
  const outcome o = touch(narrow, va, access::read).result;
  CHECK(o.what == outcome::page_fault);
  CHECK(o.code.has(x86::fault_code::reserved));
  CHECK(touch(wide, va, access::write).at == m.host.bytes(ram_base + 0x5000));
  CHECK(m.mmu.verify() == nullptr);
}

TEST_CASE("with CR0.WP=1 SMEP and SMAP come and go without a fault") {
  machine m;
  constexpr gva va{0x400000};
  m.map(va, {0x5000}, rwu | used);
  cpu_type cpu{m.mmu};
  REQUIRE(cpu.set_cr3(m.root) == errc::ok);
  REQUIRE(touch(cpu, va, access::fetch).result.what == outcome::done);
  const auto faults = m.mmu.statistics().faults;
  CHECK(cpu.set_smep(true) == errc::ok);
  CHECK(touch(cpu, va, access::fetch).result.what == outcome::page_fault);
  CHECK(touch(cpu, va, access::read).result.what == outcome::done);
  cpu.set_smap(true);
  cpu.set_ac(true);
  CHECK(touch(cpu, va, access::read).result.what == outcome::done);
  CHECK(m.mmu.statistics().faults == faults + 1);  // the fetch
  CHECK(m.mmu.page_count() == 4);
}
