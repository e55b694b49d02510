// SPDX-License-Identifier: MIT

#include <doctest/doctest.h>

#include <cstdint>

#include <mmunotify/secondary/x86/no_paging.hpp>

using namespace mmunotify;
using how = x86::access;

namespace {
struct no_memory {};  ///< nothing can be read from it
}  // namespace

TEST_CASE("without paging an address is itself, for every access and every setting") {
  no_memory memory;
  for (unsigned v = 0; v < 64; ++v) {
    x86::walk_context c;
    c.cr3 = ~std::uint64_t{0};
    c.cpl = (v & 1) != 0 ? 3 : 0;
    c.wp = (v & 2) != 0;
    c.smep = (v & 4) != 0;
    c.smap = (v & 8) != 0;
    c.pke = c.pks = (v & 16) != 0;
    c.pkru = c.pkrs = 0xffffffff;
    c.nxe = (v & 32) != 0;
    const x86::guest_walker<x86::no_paging> w{c};
    for (const how a : {how::read, how::write, how::fetch, how::implicit_read, how::implicit_write}) {
      const x86::walk_result r = w.walk(memory, {0x8765'4321}, a);
      REQUIRE(r);
      CHECK(r.address == gpa{0x8765'4321});
      CHECK(r.granted == x86::rights{});
      CHECK_FALSE(r.unmarked);
    }
  }
}

TEST_CASE("without paging addresses have 32 bits") {
  no_memory memory;
  const x86::guest_walker<x86::no_paging> w{{}};
  CHECK(w.translate(memory, {0xffff'8000'1234'5678}, how::read).address == gpa{0x1234'5678});
}

TEST_CASE("a result without paging has no entries and needs no trap for the first write") {
  no_memory memory;
  using walker = x86::guest_walker<x86::no_paging>;
  const x86::walk_result r = walker{{}}.walk(memory, {0x1234}, how::read);
  CHECK(r.end_level == 0);
  for (const std::uint64_t e : r.entry_values) CHECK(e == 0);
  CHECK(r.dirty());
  CHECK_FALSE(r.global());
  CHECK(r.page_bytes() == std::uint64_t{1} << 32);
  CHECK(r.page_base() == gpa{0});
  CHECK(walker::rights_above(r, 0) == x86::rights{});
  CHECK(walker::unchanged(memory, r, 0));
}
