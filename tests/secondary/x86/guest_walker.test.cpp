// SPDX-License-Identifier: MIT

// The walker's rules, one by one and by hand, in every mode that has them. What processors answered is in
// guest_walker_captures.test.cpp, and an exhaustive comparison with a second walker in guest_walker_reference.test.cpp.

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>

#include <mmunotify/secondary/x86/guest_walker.hpp>

#include "walk_chain.hpp"

using namespace walk_test;
using x86::exchange_result;

namespace {

using two = x86::two_level;
using pae = x86::pae;
using four = x86::long_mode_4;
using five = x86::long_mode_5;
#define ALL_MODES two, pae, four, five
#define WIDE_MODES pae, four, five
#define LONG_MODES four, five

constexpr std::uint32_t P = fault_code::present, W = fault_code::write, U = fault_code::user;
constexpr std::uint32_t R = fault_code::reserved, I = fault_code::fetch, K = fault_code::protection_key;

constexpr x86::access every_access[] = {access::read, access::write, access::fetch, access::implicit_read,
                                        access::implicit_write};

/// The context of a chain with a member set.
template <class Mode, class Set>
constexpr x86::walk_context context(Set set) {
  x86::walk_context c = chain<Mode>::context();
  set(c);
  return c;
}
template <class Mode>
constexpr x86::walk_context user() {
  return context<Mode>([](auto& c) { c.cpl = 3; });
}
/// The least that makes an entry not present for the mode's level: PDPTEs are cleared, since their other bits are
/// reserved.
template <class Mode>
constexpr std::uint64_t bits_but_present(unsigned level) {
  const bool pdpte = Mode::top_in_registers && level == Mode::levels;
  return pdpte ? 0 : pte::writable | pte::user | pte::accessed | pte::dirty | pte::large;
}

static_assert(
    [] {
      chain<four> t;
      return t.walk(access::write).address;
    }() == gpa{0x55abc},
    "the walker works at compile time");

static_assert(std::is_trivially_copyable_v<x86::walk_result>);
static_assert(x86::guest_memory<chain<two>, std::uint32_t> && x86::guest_memory<chain<four>, std::uint64_t>);
static_assert(!x86::guest_memory<const chain<four>, std::uint64_t>, "what cannot be written can only be translated");
static_assert(x86::readable_guest_memory<const chain<four>, std::uint64_t>);

}  // namespace

TEST_CASE("an address that is not canonical is a general protection fault and reads no memory") {
  chain<four> t;
  t.unreadable = 4;
  for (const std::uint64_t a : {0x0000'8000'0000'0000U, 0x7fff'ffff'ffff'ffffU}) {
    CHECK(t.walk(access::read, t.context(), {a}).status == walk_status::general_protection);
  }
  CHECK(t.walk(access::read, t.context(), {0xffff'7fff'ffff'ffff}).status == walk_status::general_protection);
  CHECK(t.walk(access::read, t.context(), {0xffff'8000'0000'0000}).status == walk_status::memory_error);
  chain<five> u;
  u.unreadable = 5;
  CHECK(u.walk(access::read, u.context(), {0x0100'0000'0000'0000}).status == walk_status::general_protection);
  CHECK(u.walk(access::read, u.context(), {0x0000'8000'0000'0000}).status == walk_status::memory_error);
}

TEST_CASE_TEMPLATE("linear addresses have 32 bits outside long mode", Mode, two, pae) {
  chain<Mode> t;
  const gva high{t.target.value | 0xdead'beef'0000'0000};
  const auto r = t.walk(access::read, t.context(), high);
  REQUIRE(r);
  CHECK(r.address == gpa{0x55abc});
  CHECK(r.va == t.target);
  for (unsigned l = 1; l <= Mode::levels; ++l) CHECK(r.entry(l).where == t.place(l));
}

TEST_CASE_TEMPLATE("an entry that is not present ends the walk without P, whatever else it holds", Mode, ALL_MODES) {
  for (unsigned level = 1; level <= Mode::levels; ++level) {
    CAPTURE(level);
    chain<Mode> t;
    t.entries[level - 1] = static_cast<typename Mode::entry_type>(bits_but_present<Mode>(level));
    if (sizeof(typename Mode::entry_type) == 8 && level <= top_in_memory<Mode>) t.with(level, x86::bit_range(40, 63));
    CHECK(t.code(access::read) == 0);
    CHECK(t.code(access::write) == W);
    CHECK(t.code(access::write, user<Mode>()) == (W | U));
    CHECK(t.walk(access::read).end_level == level);
    CHECK(t.exchanges == 0);
  }
}

TEST_CASE_TEMPLATE("a reserved bit ends the walk before any right is looked at", Mode, WIDE_MODES) {
  for (unsigned level = 1; level <= top_in_memory<Mode>; ++level) {
    CAPTURE(level);
    chain<Mode> t;
    t.without(top_in_memory<Mode>, pte::writable | pte::user).with(level, x86::bit(50));
    const auto r = t.walk(access::write, user<Mode>());
    CHECK(r.status == walk_status::page_fault);
    CHECK(r.code.bits == (P | W | U | R));
    CHECK(r.end_level == level);
    CHECK(r.entry(level).where == t.place(level));
    CHECK(r.entry(level).value == t.entries[level - 1]);
    t.without(level, pte::present);
    CHECK(t.code(access::write, user<Mode>()) == (W | U));
  }
}

TEST_CASE_TEMPLATE("addresses from MAXPHYADDR on are reserved, and those below are not", Mode, WIDE_MODES) {
  for (unsigned width = 32; width <= 52; ++width) {
    for (unsigned n = 30; n < 52; ++n) {
      chain<Mode> t;
      t.with(1, x86::bit(n));
      const auto c = context<Mode>([&](auto& x) { x.maxphyaddr = width; });
      CHECK(t.code(access::read, c) == (n < width ? ~0U : P | R));
      CHECK(t.walk(access::read, c).address.value == (n < width ? 0x55abc | x86::bit(n) : 0));
    }
  }
}

TEST_CASE("bits 52 to 62 are ignored in long mode and reserved in PAE") {
  for (unsigned n = 52; n <= 62; ++n) {
    chain<four> t;
    for (unsigned l = 1; l <= 4; ++l) t.with(l, x86::bit(n));
    const auto r = t.walk(access::read);
    REQUIRE(r);
    CHECK(r.address == gpa{0x55abc});
    for (const unsigned level : {1U, 2U}) {
      chain<pae> p;
      CHECK(p.with(level, x86::bit(n)).code(access::read) == (P | R));
    }
  }
}

TEST_CASE_TEMPLATE("NX forbids fetches at any level, and is reserved while EFER.NXE is 0", Mode, WIDE_MODES) {
  for (unsigned level = 1; level <= top_in_memory<Mode>; ++level) {
    chain<Mode> t;
    t.with(level, pte::no_execute);
    CHECK(t.code(access::fetch) == (P | I));
    CHECK(t.code(access::fetch, user<Mode>()) == (P | I | U));
    CHECK(t.allowed(access::read));
    CHECK(t.allowed(access::write));
    const auto off = context<Mode>([](auto& c) { c.nxe = false; });
    CHECK(t.code(access::read, off) == (P | R));
    CHECK(t.code(access::fetch, off) == (P | R));  // no I: neither NX nor SMEP can forbid a fetch
    CHECK(t.walk(access::fetch, off).end_level == level);
  }
}

TEST_CASE("two levels have no NX: what is executable is everything, and NXE marks no fetch") {
  chain<two> t;
  for (const bool nxe : {false, true}) {
    auto c = context<two>([&](auto& x) { x.nxe = nxe; });
    CHECK(t.walk(access::fetch, c).granted == x86::rights{});
    t.without(1, pte::present);
    CHECK(t.code(access::fetch, c) == 0);
    c.smep = true;
    CHECK(t.code(access::fetch, c) == I);
    t.with(1, pte::present);
  }
}

TEST_CASE_TEMPLATE("write and user rights are those that all levels grant", Mode, ALL_MODES) {
  for (unsigned level = 1; level <= top_in_memory<Mode>; ++level) {
    CAPTURE(level);
    chain<Mode> ro;
    ro.without(level, pte::writable);
    CHECK(ro.code(access::write) == (P | W));
    CHECK(ro.code(access::write, user<Mode>()) == (P | W | U));
    CHECK(ro.allowed(access::read));
    CHECK_FALSE(ro.walk(access::read).granted.writable());
    chain<Mode> su;
    su.without(level, pte::user);
    CHECK(su.code(access::read, user<Mode>()) == (P | U));
    CHECK(su.code(access::fetch, user<Mode>()) == (Mode::has_keys || Mode::levels == 3 ? P | U | I : P | U));
    CHECK(su.allowed(access::write));
    CHECK_FALSE(su.walk(access::read).granted.user());
  }
}

TEST_CASE("a PDPTE of PAE carries no rights and gets no accessed bit") {
  chain<pae> t;
  CHECK((t.entries[2] & (pte::writable | pte::user)) == 0);
  const auto r = t.walk(access::write, user<pae>());
  REQUIRE(r);
  CHECK(r.granted == x86::rights{});
  CHECK(t.exchanges == 2);
  CHECK(t.order == std::array<unsigned, 8>{2, 1});
  CHECK(t.entries[2] == chain<pae>{}.entries[2]);
  CHECK_FALSE(r.unmarked);
}

TEST_CASE("PDPTEs are what was loaded, whatever memory says since") {
  chain<pae> t;
  x86::walk_context c = t.context();
  REQUIRE(x86::load_pdptes(t, c) == x86::pdpte_load::ok);
  t.entries[2] = 0;
  const x86::guest_walker<pae> w{c};
  const auto r = w.walk(t, t.target, access::read);
  REQUIRE(r);
  CHECK(r.entry(3).where == t.place(3));
  CHECK(r.entry(3).value == (0x2000 | pte::present));
  CHECK(w.unchanged(t, r, 3));  // a register
  CHECK(t.code(access::read) == 0);
  t.unreadable = 3;
  CHECK(w.walk(t, t.target, access::read).status == walk_status::ok);
}

TEST_CASE_TEMPLATE("without CR0.WP the supervisor writes what is read-only, and the user does not", Mode, ALL_MODES) {
  chain<Mode> t;
  t.without(1, pte::writable);
  auto c = context<Mode>([](auto& x) { x.wp = false; });
  CHECK(t.allowed(access::write, c));
  CHECK((t.entries[0] & pte::dirty) != 0);
  c.cpl = 3;
  CHECK(t.code(access::write, c) == (P | W | U));
  CHECK(t.allowed(access::implicit_write, c));
  for (c.cpl = 1; c.cpl < 3; ++c.cpl) CHECK(t.allowed(access::write, c));
}

TEST_CASE_TEMPLATE("SMEP forbids the supervisor to fetch from user pages, whatever CR0.WP says", Mode, ALL_MODES) {
  for (const bool wp : {false, true}) {
    chain<Mode> t;
    auto c = context<Mode>([&](auto& x) { x.smep = true, x.wp = wp; });
    CHECK(t.code(access::fetch, c) == (P | I));
    CHECK(t.allowed(access::read, c));
    c.cpl = 3;
    CHECK(t.allowed(access::fetch, c));
    c.cpl = 0;
    for (unsigned level = 1; level <= top_in_memory<Mode>; ++level) {
      chain<Mode> supervisors;  // U in all levels makes a user page
      CHECK(supervisors.without(level, pte::user).allowed(access::fetch, c));
    }
  }
}

TEST_CASE_TEMPLATE("SMAP forbids the supervisor data of user pages without EFLAGS.AC, whatever CR0.WP says", Mode,
                   ALL_MODES) {
  for (const bool wp : {false, true}) {
    chain<Mode> t;
    auto c = context<Mode>([&](auto& x) { x.smap = true, x.wp = wp; });
    CHECK(t.code(access::read, c) == P);
    CHECK(t.code(access::write, c) == (P | W));
    CHECK(t.allowed(access::fetch, c));
    c.ac = true;
    CHECK(t.allowed(access::read, c));
    CHECK(t.allowed(access::write, c));
    c.ac = false;
    c.cpl = 3;
    CHECK(t.allowed(access::write, c));
    c.cpl = 0;
    chain<Mode> supervisors;
    CHECK(supervisors.without(1, pte::user).allowed(access::write, c));
  }
}

TEST_CASE_TEMPLATE("an implicit access is a supervisor's at any CPL, and SMAP forbids it whatever EFLAGS.AC says", Mode,
                   ALL_MODES) {
  for (const unsigned cpl : {0U, 3U}) {
    chain<Mode> t;
    const auto c = context<Mode>([&](auto& x) { x.smap = x.ac = true, x.cpl = cpl; });
    CHECK(t.code(access::implicit_read, c) == P);
    CHECK(t.code(access::implicit_write, c) == (P | W));
    CHECK(t.allowed(access::read, c));
    chain<Mode> supervisors;
    supervisors.without(1, pte::user);
    CHECK(supervisors.allowed(access::implicit_write, c));
    CHECK(supervisors.allowed(access::read, c) == (cpl == 0));
    supervisors.without(1, pte::present);
    CHECK(supervisors.code(access::implicit_write, c) == W);
  }
}

TEST_CASE_TEMPLATE("PKRU takes the data of user pages by the leaf's key, and fetches never", Mode, LONG_MODES) {
  constexpr unsigned key = 5;
  chain<Mode> t;
  t.with(1, std::uint64_t{key} << 59).with(2, std::uint64_t{9} << 59);
  auto c = context<Mode>([](auto& x) { x.pke = true, x.cpl = 3, x.pks = true, x.pkrs = 0xffffffff; });
  c.pkru = ~(3U << 2 * key);
  for (const auto a : every_access) CHECK(t.allowed(a, c));
  c.pkru = 1U << 2 * key;  // AD
  CHECK(t.code(access::read, c) == (P | U | K));
  CHECK(t.code(access::write, c) == (P | W | U | K));
  CHECK(t.code(access::implicit_read, c) == (P | K));
  CHECK(t.allowed(access::fetch, c));
  c.cpl = 0;
  CHECK(t.code(access::read, c) == (P | K));
  c.wp = false;
  CHECK(t.code(access::read, c) == (P | K));
  c.pke = false;
  CHECK(t.allowed(access::read, c));
}

TEST_CASE_TEMPLATE("a key's WD forbids writes, by the supervisor only if CR0.WP is set", Mode, LONG_MODES) {
  chain<Mode> t;
  t.with(1, std::uint64_t{15} << 59);
  auto c = context<Mode>([](auto& x) { x.pke = true, x.pkru = 2U << 30; });
  CHECK(t.allowed(access::read, c));
  CHECK(t.code(access::write, c) == (P | W | K));
  c.wp = false;
  CHECK(t.allowed(access::write, c));
  c.cpl = 3;
  CHECK(t.code(access::write, c) == (P | W | U | K));
  CHECK(t.allowed(access::implicit_write, c));
}

TEST_CASE_TEMPLATE("PKRS takes the data of supervisor pages, and PKRU does not", Mode, LONG_MODES) {
  for (unsigned level = 1; level <= Mode::levels; ++level) {
    chain<Mode> t;
    t.without(level, pte::user).with(1, std::uint64_t{3} << 59);
    auto c = context<Mode>([](auto& x) { x.pke = true, x.pkru = 0xffffffff; });
    CHECK(t.allowed(access::write, c));
    c.pks = true;
    CHECK(t.allowed(access::write, c));
    c.pkrs = 1U << 6;  // AD
    CHECK(t.code(access::read, c) == (P | K));
    CHECK(t.code(access::implicit_write, c) == (P | W | K));
    CHECK(t.allowed(access::fetch, c));
    c.pkrs = 2U << 6;  // WD
    CHECK(t.allowed(access::read, c));
    CHECK(t.code(access::write, c) == (P | W | K));
    c.wp = false;
    CHECK(t.allowed(access::write, c));
  }
}

TEST_CASE_TEMPLATE("PK is reported beside another violation, and not beside a reserved bit", Mode, LONG_MODES) {
  chain<Mode> t;
  t.without(1, pte::writable);
  const auto c = context<Mode>([](auto& x) { x.pke = true, x.pkru = 3, x.cpl = 3; });
  CHECK(t.code(access::write, c) == (P | W | U | K));
  const auto smap = context<Mode>([](auto& x) { x.pke = x.smap = true, x.pkru = 3; });
  CHECK(t.code(access::read, smap) == (P | K));
  const auto smep = context<Mode>([](auto& x) { x.pke = x.smep = true, x.pkru = 3; });
  CHECK(t.code(access::fetch, smep) == (P | I));
  t.with(1, x86::bit(50));
  CHECK(t.code(access::write, c) == (P | W | U | R));
}

TEST_CASE_TEMPLATE("there are no protection keys outside long mode", Mode, two, pae) {
  chain<Mode> t;
  const auto c = context<Mode>([](auto& x) { x.pke = x.pks = true, x.pkru = x.pkrs = 0xffffffff; });
  CHECK(t.allowed(access::write, c));
  t.without(1, pte::writable);
  CHECK(t.code(access::write, c) == (P | W));
}

TEST_CASE("a 4 MiB page needs CR4.PSE, without it PS is ignored") {
  chain<two> t;
  t.with(2, pte::large);
  auto c = t.context();
  c.pse = false;
  CHECK(t.walk(access::read, c).end_level == 1);
  c.pse = true;
  t.entries[1] = static_cast<std::uint32_t>(0x0040'0000 | pwu | pte::large | pte::pat_large);
  const auto r = t.walk(access::write, c);
  REQUIRE(r);
  CHECK(r.end_level == 2);
  CHECK(r.page_shift == 22);
  CHECK(r.address == gpa{0x0040'0000 | (t.target.value & 0x3f'ffff)});
  CHECK(r.page_base() == gpa{0x0040'0000});
  CHECK((t.entries[1] & pte::dirty) != 0);
}

TEST_CASE("a 4 MiB page may lie above 4 GiB as far as the processor's width goes, and bit 21 is reserved") {
  for (unsigned width = 32; width <= 40; ++width) {
    for (unsigned n = 13; n <= 21; ++n) {
      chain<two> t;
      t.entries[1] = static_cast<std::uint32_t>(0x0040'0000 | pwu | pte::large | x86::bit(n));
      for (const bool by_maxphyaddr : {false, true}) {
        auto c = t.context();
        (by_maxphyaddr ? c.maxphyaddr : c.pse36_bits) = width;
        const unsigned becomes = n + 19;
        if (becomes < width) {
          CHECK(t.walk(access::read, c).address.value ==
                (x86::bit(becomes) | 0x0040'0000 | (t.target.value & 0x3f'ffff)));
        } else {
          CHECK(t.code(access::read, c) == (P | R));
        }
      }
      auto c = t.context();
      c.pse = false;  // then these are bits of the table's address
      CHECK(t.walk(access::read, c).status == walk_status::memory_error);
    }
  }
}

TEST_CASE_TEMPLATE("large pages end the walk above level 1, whatever CR4.PSE says", Mode, WIDE_MODES) {
  for (const bool pse : {false, true}) {
    for (unsigned level = 2; level <= (Mode::has_keys ? 3 : 2); ++level) {
      chain<Mode> t;
      const unsigned shift = Mode::page_shift(level);
      const std::uint64_t frame = std::uint64_t{3} << shift;
      t.entries[level - 1] = frame | pwu | pte::large;
      t.unreadable = level - 1;
      const auto r = t.walk(access::write, context<Mode>([&](auto& c) { c.pse = pse; }));
      REQUIRE(r);
      CHECK(r.end_level == level);
      for (unsigned l = 1; l <= 5; ++l) CHECK((r.entry_values[l - 1] == 0) == (l < level || l > Mode::levels));
      CHECK(r.page_bytes() == std::uint64_t{1} << shift);
      CHECK(r.address.value == frame + (t.target.value & (r.page_bytes() - 1)));
      CHECK(r.page_base().value == frame);
      CHECK(r.dirty());
    }
  }
}

TEST_CASE_TEMPLATE("address bits below a large page's alignment are reserved, down to 13", Mode, WIDE_MODES) {
  for (unsigned level = 2; level <= (Mode::has_keys ? 3 : 2); ++level) {
    for (unsigned n = 12; n < Mode::page_shift(level) + 1; ++n) {
      chain<Mode> t;
      t.entries[level - 1] = pwu | pte::large | x86::bit(n);
      const bool reserved = n >= 13 && n < Mode::page_shift(level);
      CHECK(t.code(access::read) == (reserved ? P | R : ~0U));
    }
  }
}

TEST_CASE_TEMPLATE("PS is reserved where no page can be: PML4E, PML5E, and a PDPTE without 1 GiB pages", Mode,
                   LONG_MODES) {
  for (unsigned level = 4; level <= Mode::levels; ++level) {
    chain<Mode> t;
    CHECK(t.with(level, pte::large).code(access::read) == (P | R));
  }
  chain<Mode> t;
  t.entries[2] = pwu | pte::large;
  CHECK(t.allowed(access::read));
  CHECK(t.code(access::read, context<Mode>([](auto& c) { c.gib_pages = false; })) == (P | R));
  chain<Mode> smaller;
  smaller.entries[1] = pwu | pte::large;
  CHECK(smaller.allowed(access::read, context<Mode>([](auto& c) { c.gib_pages = false; })));
}

TEST_CASE_TEMPLATE("bit 8 of a PML4E or PML5E is reserved on AMD and ignored on Intel", Mode, LONG_MODES) {
  for (unsigned level = 1; level <= Mode::levels; ++level) {
    chain<Mode> t;
    t.with(level, x86::bit(8));
    CHECK(t.allowed(access::read));
    CHECK(t.code(access::read, context<Mode>([](auto& c) { c.amd = true; })) == (level >= 4 ? P | R : ~0U));
  }
}

TEST_CASE("PAT is bit 7 of a 4 KiB leaf and bit 12 of a large one") {
  chain<four> t;
  CHECK_FALSE(t.walk(access::read).pat());
  CHECK(t.with(1, x86::bit(7)).walk(access::read).pat());
  CHECK(t.walk(access::read).address == gpa{0x55abc});
  t.entries[1] = pwu | pte::large;
  CHECK_FALSE(t.walk(access::read).pat());
  CHECK(t.with(2, x86::bit(12)).walk(access::read).pat());
  chain<two> u;
  u.entries[1] = static_cast<std::uint32_t>(pwu | pte::large | pte::pat_large);
  CHECK(u.walk(access::read).pat());
  chain<two> v;
  CHECK(v.with(1, x86::bit(7)).walk(access::read).pat());
}

TEST_CASE_TEMPLATE("a fault leaves guest memory as it was", Mode, ALL_MODES) {
  for (unsigned broken = 1; broken <= top_in_memory<Mode>; ++broken) {
    chain<Mode> t;
    t.without(broken, pte::writable);
    const auto before = t.entries;
    CHECK(t.walk(access::write).status == walk_status::page_fault);
    CHECK(t.entries == before);
  }
}

TEST_CASE_TEMPLATE("an allowed access sets accessed top down, and dirty in the leaf if it writes", Mode, ALL_MODES) {
  constexpr unsigned top = top_in_memory<Mode>;
  chain<Mode> t;
  const auto r = t.walk(access::write);
  REQUIRE(r);
  CHECK(t.exchanges == top);
  for (unsigned i = 0; i < top; ++i) CHECK(t.order[i] == top - i);
  for (unsigned level = 1; level <= top; ++level) {
    CHECK((t.entries[level - 1] & pte::accessed) != 0);
    CHECK(((t.entries[level - 1] & pte::dirty) != 0) == (level == 1));
    CHECK(r.entry(level).value == t.entries[level - 1]);
  }
  CHECK(t.walk(access::write));
  CHECK(t.exchanges == top);
  chain<Mode> read;
  for (const auto a : {access::read, access::fetch, access::implicit_read}) {
    CHECK(read.walk(a));
    CHECK((read.entries[0] & (pte::accessed | pte::dirty)) == pte::accessed);
  }
  CHECK(read.exchanges == top);
  CHECK(read.walk(access::implicit_write));
  CHECK((read.entries[0] & pte::dirty) != 0);
}

TEST_CASE_TEMPLATE("translate judges like walk and writes nothing", Mode, ALL_MODES) {
  chain<Mode> t;
  x86::walk_context c = t.context();
  if constexpr (Mode::top_in_registers) REQUIRE(x86::load_pdptes(t, c) == x86::pdpte_load::ok);
  const x86::guest_walker<Mode> w{c};
  const auto before = t.entries;
  const auto r = w.translate(t, t.target, access::write);
  REQUIRE(r);
  CHECK(r.address == gpa{0x55abc});
  CHECK(r.leaf() == t.entries[0]);
  CHECK(r.unmarked);
  CHECK(t.entries == before);

  CHECK_FALSE(t.walk(access::read).unmarked);
  CHECK_FALSE(w.translate(t, t.target, access::read).unmarked);
  CHECK(w.translate(t, t.target, access::write).unmarked);
}

TEST_CASE_TEMPLATE("if the guest changes an entry meanwhile, the walk starts again with what is there now", Mode,
                   ALL_MODES) {
  using entry = typename Mode::entry_type;
  for (unsigned level = 1; level <= top_in_memory<Mode>; ++level) {
    CAPTURE(level);
    chain<Mode> moved;  // the leaf goes elsewhere; an upper entry is only marked
    moved.collide_at = level;
    moved.becomes = static_cast<entry>(level == 1 ? 0x66000 | pwu : moved.entries[level - 1] | pte::cache_disable);
    auto r = moved.walk(access::write);
    REQUIRE(r);
    CHECK(r.address == gpa{level == 1 ? 0x66abcU : 0x55abcU});
    for (unsigned l = 1; l <= Mode::levels; ++l) CHECK(x86::guest_walker<Mode>::unchanged(moved, r, l));

    chain<Mode> gone;
    gone.collide_at = level;
    r = gone.walk(access::write);
    CHECK(r.status == walk_status::page_fault);
    CHECK(r.code.bits == W);
    CHECK(r.end_level == level);
    CHECK(gone.entries[level - 1] == 0);
    CHECK(r.address == gpa{0});  // nothing is left of the walk before
    CHECK(r.page_shift == 0);

    chain<Mode> protect;
    protect.collide_at = level;
    protect.becomes = static_cast<entry>(protect.entries[level - 1] & ~pte::writable);
    r = protect.walk(access::write);
    CHECK(r.status == walk_status::page_fault);
    CHECK(r.code.bits == (P | W));
    CHECK((protect.entries[0] & pte::dirty) == 0);
  }
}

TEST_CASE_TEMPLATE("memory that fails is an outcome of its own and names the entry", Mode, ALL_MODES) {
  for (unsigned level = 1; level <= top_in_memory<Mode>; ++level) {
    chain<Mode> t;
    t.unreadable = level;
    auto r = t.walk(access::read);
    CHECK(r.status == walk_status::memory_error);
    CHECK(r.end_level == level);
    CHECK(r.entry(level).where == t.place(level));
    CHECK(t.exchanges == 0);

    chain<Mode> u;
    u.unwritable = level;
    r = u.walk(access::read);
    CHECK(r.status == walk_status::memory_error);
    CHECK(r.end_level == level);
    CHECK(u.exchanges == top_in_memory<Mode> - level);
  }
}

TEST_CASE_TEMPLATE("entries in ROM keep their bits and translate all the same", Mode, ALL_MODES) {
  chain<Mode> t;
  t.rom = 1;
  const auto before = t.entries[0];
  const auto r = t.walk(access::write);
  REQUIRE(r);
  CHECK(r.leaf() == before);
  CHECK(r.unmarked);
  CHECK(t.entries[0] == before);
  CHECK((t.entries[1] & pte::accessed) != 0);
}

TEST_CASE("a result tells the rights above each table, the leaf's bits and the page") {
  chain<four> t;
  t.with(4, pte::no_execute).without(3, pte::writable).without(2, pte::user);
  t.with(1, pte::global | std::uint64_t{9} << 59);
  const auto r = t.walk(access::read);
  REQUIRE(r);
  using walker = x86::guest_walker<four>;
  CHECK(walker::rights_above(r, 4) == x86::rights{});
  CHECK(walker::rights_above(r, 3) == x86::rights{x86::rights::write_bit | x86::rights::user_bit});
  CHECK(walker::rights_above(r, 2) == x86::rights{x86::rights::user_bit});
  CHECK(walker::rights_above(r, 1) == x86::rights{0});
  CHECK(r.granted == x86::rights{0});
  CHECK(r.global());
  CHECK_FALSE(r.dirty());
  CHECK(r.protection_key() == 9);
  CHECK(r.page_shift == 12);
  CHECK(r.page_base() == gpa{0x55000});
}

TEST_CASE("a PDPTE takes no right from the tables below it") {
  chain<pae> t;
  t.without(2, pte::writable);
  const auto r = t.walk(access::read);
  CHECK(x86::guest_walker<pae>::rights_above(r, 2) == x86::rights{});
  CHECK(x86::guest_walker<pae>::rights_above(r, 1) == x86::rights{x86::rights::user_bit | x86::rights::execute_bit});
}

TEST_CASE_TEMPLATE("a changed entry is noticed level by level, and so is one that cannot be read", Mode, ALL_MODES) {
  chain<Mode> t;
  const auto r = t.walk(access::read);
  for (unsigned level = 1; level <= top_in_memory<Mode>; ++level) {
    chain<Mode> later = t;
    CHECK(x86::guest_walker<Mode>::unchanged(later, r, level));
    later.entries[level - 1] ^= static_cast<typename Mode::entry_type>(pte::writable);
    CHECK_FALSE(x86::guest_walker<Mode>::unchanged(later, r, level));
    later.unreadable = level;
    CHECK_FALSE(x86::guest_walker<Mode>::unchanged(later, r, level));
  }
}

namespace {
/// One table whose last entry names the table itself, as guests do to see their own tables; so one entry is read and
/// marked at every level.
template <class Mode>
struct self_map {
  typename Mode::entry_type entry = static_cast<typename Mode::entry_type>(0x1000 | pwu);
  unsigned exchanges = 0;

  bool read_entry(gpa where, typename Mode::entry_type& value) const noexcept {
    value = where.value == 0x2000 - sizeof value ? entry : typename Mode::entry_type{0};
    return where.page() == gpa{0x1000};
  }
  exchange_result compare_exchange_entry(gpa, typename Mode::entry_type expected,
                                         typename Mode::entry_type desired) noexcept {
    ++exchanges;
    if (entry != expected) return exchange_result::changed;
    entry = desired;
    return exchange_result::done;
  }
};
}  // namespace

TEST_CASE_TEMPLATE("a table that maps itself is walked: one entry is marked at all levels", Mode, two, four, five) {
  self_map<Mode> m;
  x86::walk_context c;
  c.cr3 = 0x1000;
  const auto r = x86::guest_walker<Mode>{c}.walk(m, {~std::uint64_t{0}}, access::write);
  REQUIRE(r);
  CHECK(r.address == gpa{0x1fff});
  CHECK((m.entry & (pte::accessed | pte::dirty)) == (pte::accessed | pte::dirty));
  for (unsigned l = 1; l <= Mode::levels; ++l) CHECK(r.entry(l).value == m.entry);
  CHECK(m.exchanges == 2);
}

namespace {
/// A leaf that a second thread keeps changing, with all upper entries marked.
template <class Mode>
struct contended {
  using entry = typename Mode::entry_type;
  std::atomic<entry> leaf{0};

  bool read_entry(gpa where, entry& value) const noexcept {
    constexpr std::uint64_t used = pwu | pte::accessed;
    const auto level = static_cast<unsigned>(where.value >> 12);
    value = level == 1 ? leaf.load(std::memory_order_relaxed)
                       : static_cast<entry>(std::uint64_t{0x1000} * (level - 1) | used);
    return true;
  }
  exchange_result compare_exchange_entry(gpa, entry expected, entry desired) noexcept {
    const bool done = leaf.compare_exchange_strong(expected, desired, std::memory_order_relaxed);
    return done ? exchange_result::done : exchange_result::changed;
  }
};
}  // namespace

TEST_CASE_TEMPLATE("beside a guest that remaps a page, dirty is set in the entry that was walked and in no other", Mode,
                   two, four) {
  using entry = typename Mode::entry_type;
  contended<Mode> m;
  constexpr entry writable = 0x55000 | pwu, read_only = 0x66000 | pte::present;
  m.leaf.store(writable, std::memory_order_relaxed);
  std::atomic<bool> finished{false};
  std::uint64_t wrongly_marked = 0;
  std::thread guest([&] {
    for (unsigned i = 0; i < 50'000; ++i) {
      m.leaf.exchange(read_only, std::memory_order_relaxed);
      // Nobody may set D here: the page is read-only.
      const entry was = m.leaf.exchange(writable, std::memory_order_relaxed);
      if ((was & pte::dirty) != 0) ++wrongly_marked;
    }
    finished.store(true, std::memory_order_release);  // (gt1) release pairs with (gt2)
  });
  x86::walk_context c;
  c.cr3 = 0x1000 * Mode::levels;
  const x86::guest_walker<Mode> w{c};
  std::uint64_t wrong = 0, done = 0, refused = 0;
  while (!finished.load(std::memory_order_acquire)) {  // (gt2) acquire pairs with (gt1)
    const auto r = w.walk(m, {0}, access::write);
    (r ? done : refused) += 1;
    if (r && (r.address != gpa{0x55000} || !r.dirty())) ++wrong;
    if (!r && r.code.bits != (P | W)) ++wrong;
  }
  guest.join();
  CHECK(wrong == 0);
  CHECK(wrongly_marked == 0);
  MESSAGE(done, " walks found the page writable, ", refused, " did not");
}
