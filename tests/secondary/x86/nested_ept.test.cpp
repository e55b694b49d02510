// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/nested_ept.hpp>

#include <doctest/doctest.h>

#include "nested_reference.hpp"
#include "walk_chain.hpp"

using namespace walk_test;
using nested_test::second_answer;
namespace epte = x86::epte;
namespace ept_exit = x86::ept_exit;

namespace {
template <unsigned Levels>
using tables = chain<x86::ept<Levels>>;

constexpr std::uint64_t rwx = epte::read | epte::write | epte::execute;

template <unsigned Levels>
x86::walk_context context(bool marks = false, bool execute_only = false) {
  x86::walk_context c = tables<Levels>::context();
  c.cr3 |= (Levels - 1) << 3 | (marks ? x86::eptp::accessed_dirty : 0) | 6;
  c.execute_only = execute_only;
  return c;
}

/// The walk says what the rules say.
template <unsigned Levels>
void hold_against_rules(const tables<Levels>& given, const x86::walk_context& c, x86::access how,
                        gva a = tables<Levels>::target) {
  tables<Levels> t = given;
  const nested_test::second_level rules{.levels = Levels,
                                        .root = c.cr3 & pte::address,
                                        .marks = (c.cr3 & x86::eptp::accessed_dirty) != 0,
                                        .execute_only = c.execute_only,
                                        .gib_pages = c.gib_pages,
                                        .width = c.maxphyaddr};
  const second_answer expected =
      second_walk(rules, a.value, how == access::read, how == access::write, how == access::fetch,
                  [&](std::uint64_t where, std::uint64_t& e) { return given.read_entry({where}, e); });
  const x86::walk_result dry = x86::guest_walker<x86::ept<Levels>>{c}.translate(t, a, how);
  REQUIRE(t.exchanges == 0);
  const x86::walk_result r = t.walk(how, c, a);
  REQUIRE(dry.status == r.status);
  REQUIRE(dry.code == r.code);
  REQUIRE((expected.what == second_answer::ok) == static_cast<bool>(r));
  if (expected.what == second_answer::unreadable) REQUIRE(r.status == walk_status::memory_error);
  if (expected.what == second_answer::misconfigured) REQUIRE(r.code.bits == ept_exit::misconfigured);
  if (expected.what == second_answer::forbidden) REQUIRE(r.code.bits == expected.info);
  if (!r) {
    REQUIRE(t.exchanges == 0);
    return;
  }
  REQUIRE(r.address.value == expected.address);
  REQUIRE(r.end_level == expected.level);
  REQUIRE(dry.address == r.address);
  for (unsigned level = 1; level <= Levels; ++level) {
    const bool on_the_way = level >= expected.level;
    std::uint64_t e = given.entries[level - 1];
    if (on_the_way && rules.marks) e |= 1 << 8 | (level == expected.level && how == access::write ? 1 << 9 : 0);
    REQUIRE(t.entries[level - 1] == e);
    REQUIRE(r.entry_values[level - 1] == (on_the_way ? e : 0));
  }
}

constexpr x86::access kinds[] = {access::read, access::write, access::fetch};
}  // namespace

TEST_CASE("EPT rights are those that all levels have in common, with every combination at two levels") {
  for (const bool execute_only : {false, true}) {
    for (unsigned upper = 0; upper < 8; ++upper) {
      for (unsigned lower = 0; lower < 8; ++lower) {
        for (unsigned level = 2; level <= 4; ++level) {
          tables<4> t;
          t.without(level, rwx).with(level, upper).without(1, rwx).with(1, lower);
          for (const x86::access how : kinds) hold_against_rules<4>(t, context<4>(false, execute_only), how);
        }
      }
    }
  }
}

TEST_CASE("each bit of each EPT entry counts as the manual says, for links and for leaves of every size") {
  const auto run = [](auto levels) {
    constexpr unsigned n = decltype(levels)::value;
    for (unsigned leaf = 1; leaf <= 3; ++leaf) {
      for (unsigned level = leaf; level <= n; ++level) {
        for (unsigned flipped = 0; flipped < 64; ++flipped) {
          for (const unsigned width : {32U, 40U, 52U}) {
            for (unsigned choice = 0; choice < 8; ++choice) {
              tables<n> t;
              if (leaf > 1) t.entries[leaf - 1] = std::uint64_t{1} << 30 | rwx | epte::large;
              t.with(leaf, epte::write_back);
              t.entries[level - 1] ^= std::uint64_t{1} << flipped;
              x86::walk_context c = context<n>((choice & 1) != 0, (choice & 2) != 0);
              c.gib_pages = (choice & 4) == 0;
              c.maxphyaddr = width;
              for (const x86::access how : kinds) hold_against_rules<n>(t, c, how);
            }
          }
        }
      }
    }
  };
  run(std::integral_constant<unsigned, 4>{});
  run(std::integral_constant<unsigned, 5>{});
}

TEST_CASE("EPT memory types 2, 3 and 7 are misconfigurations in leaves, all others are none") {
  for (std::uint64_t type = 0; type < 8; ++type) {
    for (unsigned leaf = 1; leaf <= 3; ++leaf) {
      tables<4> t;
      if (leaf > 1) t.entries[leaf - 1] = std::uint64_t{1} << 30 | rwx | epte::large;
      t.with(leaf, type << 3);
      const bool bad = type == 2 || type == 3 || type == 7;
      CHECK(t.allowed(access::read, context<4>()) == !bad);
      CHECK(t.code(access::read, context<4>()) == (bad ? ept_exit::misconfigured : ~std::uint32_t{0}));
    }
  }
}

TEST_CASE("a misconfiguration is reported before a violation by rights, and not below an entry that is not present") {
  tables<4> t;
  t.without(4, epte::write).with(2, 1 << 4);
  CHECK(t.code(access::write, context<4>()) == ept_exit::misconfigured);
  t.without(3, rwx);
  CHECK(t.code(access::write, context<4>()) == ept_exit::write);
  t.with(3, 0xff8);  // whatever an entry that is not present holds
  CHECK(t.code(access::write, context<4>()) == ept_exit::write);
}

TEST_CASE("an address beyond what the levels translate is an EPT violation") {
  const gva beyond{tables<4>::target.value | std::uint64_t{1} << 48};
  for (const x86::access how : kinds) {
    tables<4> four;
    CHECK(four.code(how, context<4>(), beyond) == ept_exit::of(how));
    hold_against_rules<4>(four, context<4>(), how, beyond);
    tables<5> five;
    CHECK(five.walk(how, context<5>(), beyond).status == walk_status::page_fault);  // another entry of the top table
    CHECK(five.code(how, context<5>(), {std::uint64_t{1} << 57}) == ept_exit::of(how));
  }
}

TEST_CASE("accessed and dirty bits of EPT are set top down, by compare-exchange, and only if the EPTP asks for them") {
  tables<4> t;
  CHECK(t.walk(access::write, context<4>(false)));
  CHECK(t.exchanges == 0);
  const x86::walk_result r = t.walk(access::write, context<4>(true));
  CHECK(r);
  CHECK_FALSE(r.unmarked);
  CHECK(t.exchanges == 4);
  CHECK(t.order[0] == 4);
  CHECK(t.order[3] == 1);
  CHECK(t.entries[0] == (tables<4>::standard()[0] | epte::accessed | epte::dirty));
  CHECK(t.walk(access::write, context<4>(true)));
  CHECK(t.exchanges == 4);
  tables<4> forbidden;
  forbidden.without(1, epte::write);
  CHECK_FALSE(forbidden.allowed(access::write, context<4>(true)));
  CHECK(forbidden.exchanges == 0);
}

TEST_CASE("an EPT walk starts again if the guest changes an entry under it, and ends where memory does") {
  tables<4> t;
  t.collide_at = 2;
  t.becomes = 0;
  CHECK(t.code(access::read, context<4>(true)) == ept_exit::read);
  tables<4> moved;
  moved.collide_at = 1;
  moved.becomes = 0x77000 | rwx;
  CHECK(moved.walk(access::read, context<4>(true)).address == gpa{0x77000 + (tables<4>::target.value & 0xfff)});
  for (unsigned level = 1; level <= 4; ++level) {
    tables<4> blind, stuck, rom;
    blind.unreadable = level;
    CHECK(blind.walk(access::read, context<4>()).status == walk_status::memory_error);
    CHECK(blind.walk(access::read, context<4>()).end_level == level);
    stuck.unwritable = level;
    CHECK(stuck.walk(access::read, context<4>(true)).status == walk_status::memory_error);
    rom.rom = level;
    const x86::walk_result r = rom.walk(access::read, context<4>(true));
    CHECK(r);
    CHECK(r.unmarked);
  }
}

TEST_CASE("the rights above an EPT table and whether an entry has changed are what the walk saw") {
  tables<4> t;
  t.without(3, epte::write).without(2, epte::execute);
  const x86::walk_result r = t.walk(access::read, context<4>());
  using walker = x86::guest_walker<x86::ept<4>>;
  CHECK(walker::rights_above(r, 4) == x86::rights{});
  CHECK(walker::rights_above(r, 3) == x86::rights{});
  CHECK_FALSE(walker::rights_above(r, 2).writable());
  CHECK(walker::rights_above(r, 2).executable());
  CHECK(walker::rights_above(r, 1) == x86::rights{x86::rights::user_bit});
  CHECK(walker::unchanged(t, r, 2));
  t.with(2, 1 << 8);
  CHECK_FALSE(walker::unchanged(t, r, 2));
  t.unreadable = 2;
  CHECK_FALSE(walker::unchanged(t, r, 2));
}

TEST_CASE("a role tells EPT tables apart whose entries mean different things") {
  using kind = x86::nested_tables;
  CHECK(x86::ept<4>::kind(context<4>(false, false)) == kind::ept);
  CHECK(x86::ept<4>::kind(context<4>(true, false)) == kind::ept_accessed_dirty);
  CHECK(x86::ept<4>::kind(context<4>(false, true)) == kind::ept_execute_only);
  CHECK(x86::ept<4>::kind(context<4>(true, true)) == kind::ept_accessed_dirty_execute_only);
}
