// SPDX-License-Identifier: MIT

#include <doctest/doctest.h>

#include <array>
#include <cstdint>

#include <mmunotify/secondary/x86/pae.hpp>

using namespace mmunotify;
using mode = x86::pae;
using x86::pdpte_load;
namespace pte = x86::pte;

namespace {

/// Four PDPTEs at 0x1020, and nothing else.
struct pdptes {
  std::array<std::uint64_t, 4> entries = {0x2001, 0x3001, 0, 0x5001};
  std::uint64_t unreadable = 0;  ///< the address that cannot be read
  unsigned reads = 0;

  bool read_entry(gpa where, std::uint64_t& value) noexcept {
    ++reads;
    if (where.value == unreadable || where.value < 0x1020 || where.value >= 0x1040) return false;
    value = entries[(where.value - 0x1020) / 8];
    return true;
  }
};

x86::walk_context at(std::uint64_t cr3) {
  x86::walk_context c;
  c.cr3 = cr3;
  return c;
}

}  // namespace

TEST_CASE("a load of the PDPTEs takes the four at CR3, which is aligned to 32 bytes and has 32 bits") {
  for (const std::uint64_t cr3 : {std::uint64_t{0x1020}, std::uint64_t{0x103f}, std::uint64_t{0xffff'0000'0000'1028}}) {
    pdptes memory;
    x86::walk_context c = at(cr3);
    CHECK(x86::load_pdptes(memory, c) == pdpte_load::ok);
    CHECK(c.pdptes == memory.entries);
    CHECK(memory.reads == 4);
  }
  CHECK(mode::root(0xffff'ffff'ffff'ffff).value == 0xffff'ffe0);
}

TEST_CASE("a present PDPTE with a reserved bit refuses the load, and the registers stay as they were") {
  unsigned wrong = 0;
  for (unsigned width = 32; width <= 52; ++width) {
    for (const bool nxe : {false, true}) {
      for (unsigned i = 0; i < 4; ++i) {
        for (unsigned n = 0; n < 64; ++n) {
          pdptes memory;
          memory.entries[i] = pte::present | x86::bit(n);
          x86::walk_context c = at(0x1020);
          c.maxphyaddr = width;
          c.nxe = nxe;
          c.pdptes = {1, 2, 3, 4};
          const bool reserved = n == 1 || n == 2 || (n >= 5 && n <= 8) || n >= width;
          const pdpte_load found = x86::load_pdptes(memory, c);
          wrong += found == (reserved ? pdpte_load::general_protection : pdpte_load::ok) ? 0 : 1;
          wrong += c.pdptes == (reserved ? std::array<std::uint64_t, 4>{1, 2, 3, 4} : memory.entries) ? 0 : 1;
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("a PDPTE that is not present is loaded whatever else it holds") {
  pdptes memory;
  memory.entries[2] = ~pte::present;
  x86::walk_context c = at(0x1020);
  CHECK(x86::load_pdptes(memory, c) == pdpte_load::ok);
  CHECK(c.pdptes[2] == ~pte::present);
}

TEST_CASE("PDPTEs that cannot be read are an error of their own, and the registers stay as they were") {
  for (unsigned i = 0; i < 4; ++i) {
    pdptes memory;
    memory.entries[0] = ~std::uint64_t{0};  // does not matter: they are judged when all are there
    memory.unreadable = 0x1020 + 8 * i;
    x86::walk_context c = at(0x1020);
    c.pdptes = {1, 2, 3, 4};
    CHECK(x86::load_pdptes(memory, c) == pdpte_load::memory_error);
    CHECK(c.pdptes == std::array<std::uint64_t, 4>{1, 2, 3, 4});
  }
}

TEST_CASE("reserved in the lower levels are the bits from the address width to 62, and 63 without NX") {
  unsigned wrong = 0;
  for (unsigned width = 32; width <= 52; ++width) {
    for (const bool nxe : {false, true}) {
      const x86::entry_format f{.maxphyaddr = width, .nxe = nxe, .pse = false, .gib_pages = false, .amd = true};
      for (const unsigned level : {1U, 2U}) {
        for (unsigned n = 0; n < 64; ++n) {
          const bool expected = (n >= width && n <= 62) || (n == 63 && !nxe);
          const bool if_large = expected || (level == 2 && n >= 13 && n <= 20);
          const bool small = (mode::reserved(level, f) >> n & 1) != 0;
          const bool large = small || (mode::reserved_large(level, f) >> n & 1) != 0;
          wrong += small == expected && large == if_large ? 0 : 1;
        }
      }
    }
  }
  CHECK(wrong == 0);
  CHECK(mode::reserved(3, {}) == 0);
}

TEST_CASE("the top two bits of 32 choose a PDPTE, nine more an entry of each level") {
  const gva a{0xffff'ffff'0000'0000 | 3U << 30 | 2U << 21 | 1U << 12};
  CHECK(mode::index(a, 3) == 3);
  CHECK(mode::index(a, 2) == 2);
  CHECK(mode::index(a, 1) == 1);
  CHECK(mode::canonical(a));
}

TEST_CASE("pages are 4 KiB and 2 MiB, and never a PDPTE's") {
  constexpr std::uint64_t ones = ~std::uint64_t{0};
  CHECK(mode::frame(ones, 1).value == 0x000f'ffff'ffff'f000);
  CHECK(mode::frame(ones, 2).value == 0x000f'ffff'ffe0'0000);
  CHECK(mode::table(ones).value == 0x000f'ffff'ffff'f000);
  for (const bool pse : {false, true}) {
    CHECK(mode::maps_page(pte::present | pte::large, 2, {.pse = pse}));
    CHECK_FALSE(mode::maps_page(pte::present | pte::large, 3, {.pse = pse}));
  }
}

TEST_CASE("a PDPTE grants everything and has no accessed bit") {
  CHECK(x86::rights_in(mode::grants(pte::present, 3)) == x86::rights{});
  CHECK((mode::grants(pte::present, 3) & pte::accessed) != 0);
  CHECK_FALSE(mode::has_accessed(3));
  CHECK(mode::has_accessed(2));
  CHECK(mode::has_accessed(1));
}
