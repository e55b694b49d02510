// SPDX-License-Identifier: MIT

#include <doctest/doctest.h>

#include <cstdint>

#include <mmunotify/secondary/x86/two_level.hpp>

using namespace mmunotify;
using mode = x86::two_level;
namespace pte = x86::pte;

TEST_CASE("a 4 MiB page's address has as many bits as the processor gives it, and the rest up to bit 21 is reserved") {
  unsigned wrong = 0;
  for (unsigned width = 32; width <= 52; ++width) {
    for (unsigned pse36 = 32; pse36 <= 40; ++pse36) {
      const x86::entry_format f{.maxphyaddr = width, .pse36_bits = pse36};
      const unsigned address_bits = pse36 < width ? pse36 : width;
      for (unsigned n = 0; n < 32; ++n) {
        const bool is_address = n >= 22 || (n >= 13 && n - 13 + 32 < address_bits);
        const bool reserved = n >= 13 && n <= 21 && !is_address;
        wrong += ((mode::reserved_large(2, f) >> n & 1) != 0) == reserved ? 0 : 1;
        if (is_address) {
          const unsigned becomes = n >= 22 ? n : n - 13 + 32;
          wrong += mode::frame(std::uint32_t{1} << n, 2).value == std::uint64_t{1} << becomes ? 0 : 1;
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("small leaves and entries that name a table have no reserved bits") {
  for (const bool flag : {false, true}) {
    const x86::entry_format f{
        .maxphyaddr = 32, .nxe = flag, .pse = flag, .gib_pages = flag, .amd = flag, .pse36_bits = 32};
    for (const unsigned level : {1U, 2U}) CHECK(mode::reserved(level, f) == 0);
    CHECK(mode::reserved_large(1, f) == 0);
  }
}

TEST_CASE("PS is a page's bit in the directory with CR4.PSE alone, and PAT in a table") {
  x86::entry_format f{};
  for (const bool pse : {false, true}) {
    f.pse = pse;
    CHECK(mode::maps_page(pte::present | pte::large, 2, f) == pse);
    CHECK_FALSE(mode::maps_page(pte::present, 2, f));
    CHECK(mode::maps_page(pte::present, 1, f));
  }
}

TEST_CASE("each level takes ten bits of the low 32 of the address") {
  const gva a{0xffff'ffff'0000'0000 | 3U << 22 | 2U << 12 | 1};
  CHECK(mode::index(a, 2) == 3);
  CHECK(mode::index(a, 1) == 2);
  CHECK(mode::canonical(a));
  CHECK(mode::page_shift(1) == 12);
  CHECK(mode::page_shift(2) == 22);
}

TEST_CASE("tables and small pages are where the upper 20 bits say, and the root where those of CR3 say") {
  CHECK(mode::root(0xffff'ffff'ffff'ffff).value == 0xffff'f000);
  CHECK(mode::table(0xffff'ffff).value == 0xffff'f000);
  CHECK(mode::frame(0xffff'ffff, 1).value == 0xffff'f000);
  CHECK(mode::frame(0xffff'ffff, 2).value == 0xff'ffc0'0000);
}

TEST_CASE("every entry grants fetches, whatever its bits") {
  using x86::rights;
  for (std::uint32_t v = 0; v < 4; ++v) {
    for (const std::uint32_t rest : {0U, 0xffff'fff9U}) {
      CHECK(x86::rights_in(mode::grants(v << 1 | rest, 1)) ==
            rights{static_cast<std::uint8_t>(v | rights::execute_bit)});
    }
  }
}

TEST_CASE("fetches are marked in the error code by SMEP alone") {
  for (const bool nxe : {false, true}) {
    CHECK(mode::fetch_reported({.nxe = nxe}, true));
    CHECK_FALSE(mode::fetch_reported({.nxe = nxe}, false));
  }
}
