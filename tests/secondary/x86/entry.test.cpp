// SPDX-License-Identifier: MIT

#include <doctest/doctest.h>

#include <cstdint>

#include <mmunotify/secondary/x86/entry.hpp>

using namespace mmunotify;

namespace {

/// Reserved bits of a 4- or 5-level entry, one bit at a time, straight from the manual's tables.
bool reserved_by_the_manual(unsigned n, unsigned level, bool large, const x86::entry_format& f) {
  if (n >= f.maxphyaddr && n <= 51) return true;
  if (n == 63) return !f.nxe;
  if (n == 7) return level >= 4 || (level == 3 && !f.gib_pages);
  if (n == 8) return level >= 4 && f.amd;
  if (large && level == 2) return n >= 13 && n <= 20;
  if (large && level == 3) return n >= 13 && n <= 29;
  return false;
}

template <class Mode>
unsigned wrong_reserved_bits() {
  unsigned wrong = 0;
  for (unsigned width = 32; width <= 52; ++width) {
    for (unsigned flags = 0; flags < 8; ++flags) {
      const x86::entry_format f{.maxphyaddr = width,
                                .nxe = (flags & 1) != 0,
                                .pse = true,
                                .gib_pages = (flags & 2) != 0,
                                .amd = (flags & 4) != 0};
      for (unsigned level = 1; level <= Mode::levels; ++level) {
        for (unsigned n = 0; n < 64; ++n) {
          const bool small = (Mode::reserved(level, f) >> n & 1) != 0;
          const bool large = small || (Mode::reserved_large(level, f) >> n & 1) != 0;
          wrong += small != reserved_by_the_manual(n, level, false, f) ? 1 : 0;
          wrong += large != reserved_by_the_manual(n, level, true, f) ? 1 : 0;
        }
      }
    }
  }
  return wrong;
}

}  // namespace

TEST_CASE("a bit range holds exactly the bits from its first to its last") {
  for (unsigned first = 0; first < 64; ++first) {
    for (unsigned last = 0; last < 64; ++last) {
      std::uint64_t expected = 0;
      for (unsigned n = first; n <= last; ++n) expected |= std::uint64_t{1} << n;
      REQUIRE(x86::bit_range(first, last) == expected);
    }
  }
}

TEST_CASE("the reserved bits of every level are the manual's, for every width and processor") {
  CHECK(wrong_reserved_bits<x86::long_mode_4>() == 0);
  CHECK(wrong_reserved_bits<x86::long_mode_5>() == 0);
}

TEST_CASE("an address is canonical if the bits above the translated ones repeat the highest") {
  CHECK(x86::long_mode_4::canonical({0x0000'7fff'ffff'ffff}));
  CHECK_FALSE(x86::long_mode_4::canonical({0x0000'8000'0000'0000}));
  CHECK_FALSE(x86::long_mode_4::canonical({0xffff'7fff'ffff'ffff}));
  CHECK(x86::long_mode_4::canonical({0xffff'8000'0000'0000}));
  CHECK(x86::long_mode_5::canonical({0x00ff'ffff'ffff'ffff}));
  CHECK_FALSE(x86::long_mode_5::canonical({0x0100'0000'0000'0000}));
  CHECK_FALSE(x86::long_mode_5::canonical({0xfeff'ffff'ffff'ffff}));
  CHECK(x86::long_mode_5::canonical({0xff00'0000'0000'0000}));
  CHECK(x86::long_mode_5::canonical({0x0000'8000'0000'0000}));
}

TEST_CASE("each level takes nine bits of the address") {
  // PML5 index 1, PML4 2, PDPT 3, PD 4, PT 5, byte 6.
  const gva a{std::uint64_t{1} << 48 | std::uint64_t{2} << 39 | std::uint64_t{3} << 30 | 4U << 21 | 5U << 12 | 6U};
  for (unsigned level = 1; level <= 5; ++level) CHECK(x86::long_mode_5::index(a, level) == 6 - level);
  CHECK(x86::long_mode_4::index({~std::uint64_t{0}}, 4) == 511);
}

TEST_CASE("a leaf's frame leaves out what lies below its alignment and above the address bits") {
  constexpr std::uint64_t ones = ~std::uint64_t{0};
  CHECK(x86::long_mode_4::frame(ones, 1).value == 0x000f'ffff'ffff'f000);
  CHECK(x86::long_mode_4::frame(ones, 2).value == 0x000f'ffff'ffe0'0000);
  CHECK(x86::long_mode_4::frame(ones, 3).value == 0x000f'ffff'c000'0000);
  CHECK(x86::long_mode_4::table(ones).value == 0x000f'ffff'ffff'f000);
  // PCID, LAM and no-flush bits are no part of the root's address.
  CHECK(x86::long_mode_4::root(0xe000'0000'1234'5fff).value == 0x1234'5000);
}

TEST_CASE("only levels 1 to 3 can map a page, and level 1 always does") {
  constexpr x86::entry_format f{};
  CHECK(x86::long_mode_5::maps_page(x86::pte::present, 1, f));
  for (unsigned level = 2; level <= 5; ++level) {
    CHECK_FALSE(x86::long_mode_5::maps_page(x86::pte::present, level, f));
    CHECK(x86::long_mode_5::maps_page(x86::pte::present | x86::pte::large, level, f) == (level <= 3));
  }
}

TEST_CASE("rights combine by what both sides allow, and NX forbids to execute") {
  using x86::rights;
  for (unsigned v = 0; v < 8; ++v) {
    const std::uint64_t e =
        (v & 1 ? x86::pte::writable : 0) | (v & 2 ? x86::pte::user : 0) | (v & 4 ? 0 : x86::pte::no_execute);
    const rights r = x86::rights_in(x86::long_mode_4::grants(e, 1));
    CHECK(r.bits == v);
    CHECK(r.writable() == ((v & 1) != 0));
    CHECK(r.user() == ((v & 2) != 0));
    CHECK(r.executable() == ((v & 4) != 0));
    CHECK((r & rights{}) == r);
    CHECK((r & rights{0}) == rights{0});
    for (unsigned n = 0; n < 8; ++n) {
      CHECK(x86::contains(static_cast<x86::rights_set>(1U << n), r) == (n == v));
    }
  }
}

TEST_CASE("fetches are marked in the error code if SMEP or NX can forbid them") {
  x86::entry_format f{};
  for (const bool nxe : {false, true}) {
    f.nxe = nxe;
    CHECK(x86::long_mode_4::fetch_reported(f, false) == nxe);
    CHECK(x86::long_mode_4::fetch_reported(f, true));
  }
}
