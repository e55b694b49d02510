// SPDX-License-Identifier: MIT

// The walker against a second one that shares no code with it (reference_walk.hpp): every combination of the access
// matrix, also of the blocks that nobody has measured, and random entries, registers and processors.

#include <doctest/doctest.h>

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>

#include "capture_access.hpp"
#include "reference_walk.hpp"

using namespace mmunotify;
using capture::access_case;
using walk_test::reference_outcome;

namespace {

std::uint64_t seed() {
  const char* given = std::getenv("MMUNOTIFY_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 1;
}

/// Empty, or in what the two differ.
std::string difference(capture::mode m, const access_case& c) {
  const auto expected = walk_test::reference_walk({c.context, c.how, c.va, c.levels, c.entries}).run();
  const auto found = capture::run_case(m, c);
  const auto set = [&](unsigned bit) {
    unsigned levels = 0;
    for (unsigned l = 0; l < 5; ++l) {
      const std::uint64_t changed = expected.entries[l] ^ c.entries[l];
      levels |= static_cast<unsigned>(changed >> bit & 1) << l;
    }
    return levels;
  };
  if ((found.load != x86::pdpte_load::ok) != (expected.what == reference_outcome::bad_pdpte)) return "load";
  if (expected.what == reference_outcome::bad_pdpte) return {};
  constexpr x86::walk_status statuses[] = {x86::walk_status::ok, x86::walk_status::page_fault,
                                           x86::walk_status::general_protection};
  if (found.result.status != statuses[expected.what]) return "status";
  if (found.result.code.bits != expected.code) return "code";
  if (found.result && found.result.address.value != expected.pa) return "address";
  if (found.result && found.result.end_level != expected.leaf_level) return "level";
  if (!found.clean || found.accessed != set(5) || found.dirty != set(6)) return "accessed and dirty";
  return {};
}

void expect_same(capture::mode m, const access_case& c, std::uint64_t& wrong) {
  const std::string d = difference(m, c);
  if (d.empty() || ++wrong > 3) return;
  std::string entries;
  for (unsigned l = c.levels; l > 0; --l) entries += " " + std::to_string(c.entries[l - 1]);
  MESSAGE(d, " differs in mode ", std::string{capture::to_string(m)}, ", va ", c.va, ", access ", unsigned(c.how),
          ", entries", entries);
}

/// Entries that come near to mattering: mostly present, few bits besides the flags.
std::uint64_t random_entry(std::mt19937_64& random, bool narrow) {
  std::uint64_t e = random() & 0x1ff;
  if (random() % 8 != 0) e |= 1;
  if (random() % 2 == 0) e |= 0x67;
  if (random() % 4 != 0) e &= ~std::uint64_t{0x180};
  for (unsigned bits = static_cast<unsigned>(random() % 8); bits > 5; --bits) e |= std::uint64_t{1} << random() % 64;
  e |= (random() % 16) << 59 & (random() % 2 == 0 ? ~std::uint64_t{0} : 0);
  return narrow ? e & 0xffffffff : e;
}

x86::walk_context random_context(std::mt19937_64& random, unsigned levels) {
  const std::uint64_t flags = random();
  const auto flag = [&](unsigned n) { return (flags >> n & 1) != 0; };
  x86::walk_context c;
  c.cr3 = capture::table_of(levels);
  c.wp = flag(0), c.pse = flag(1), c.smep = flag(2), c.smap = flag(3), c.pke = flag(4), c.pks = flag(5);
  c.nxe = flag(6), c.ac = flag(7), c.gib_pages = flag(8), c.amd = flag(9);
  c.cpl = static_cast<unsigned>(flags >> 10 & 3);
  c.pkru = static_cast<std::uint32_t>(random());
  c.pkrs = static_cast<std::uint32_t>(random());
  c.maxphyaddr = 32 + static_cast<unsigned>(random() % 21);
  c.pse36_bits = 32 + static_cast<unsigned>(random() % 9);
  return c;
}

/// The upper entries name the next table, if what lies in memory is to be found.
access_case random_case(std::mt19937_64& random, capture::mode m) {
  constexpr x86::access kinds[] = {x86::access::read, x86::access::write, x86::access::fetch,
                                   x86::access::implicit_read, x86::access::implicit_write};
  access_case c;
  c.levels = capture::levels_of(m);
  c.context = random_context(random, c.levels);
  c.how = kinds[random() % 5];
  c.va = random();
  if (c.levels >= 4 && random() % 8 != 0) {
    const unsigned unused = c.levels == 4 ? 16 : 7;
    c.va = static_cast<std::uint64_t>(static_cast<std::int64_t>(c.va << unused) >> unused);
  }
  for (unsigned l = 1; l <= c.levels; ++l) {
    std::uint64_t e = random_entry(random, c.levels == 2);
    const bool pdpte = c.levels == 3 && l == 3;
    if (pdpte && random() % 4 != 0) e = 1;
    const bool page = (e & 0x80) != 0 && (c.levels == 2 ? c.context.pse : !pdpte && l <= 3);
    // What is left of the address are bits that the processor does not have: reserved ones.
    const std::uint64_t address = x86::bit_range(12, c.levels == 2 ? 31 : c.context.maxphyaddr - 1);
    if (l > 1 && !page) e = (e & ~address) | capture::table_of(l - 1);
    c.entries[l - 1] = e;
  }
  return c;
}

}  // namespace

TEST_CASE("the second walker finds the same for every row of every block, measured or not") {
  using capture::mode;
  constexpr struct {
    mode m;
    std::uint32_t leaf;
  } blocks[] = {{mode::two_level, 1}, {mode::two_level_pse, 1}, {mode::two_level_pse, 2}, {mode::pae, 1},
                {mode::pae, 2},       {mode::long_4, 3},        {mode::long_5, 2}};
  std::uint64_t wrong = 0, rows = 0;
  for (const auto& b : blocks) {
    capture::access_matrix m;
    m.mode = b.m;
    m.leaf_level = b.leaf;
    m.maxphyaddr = 40;
    m.gib_pages = true;
    std::uint64_t n = 1;
    for (const std::uint32_t radix : capture::matrix_radices(b.m, b.leaf)) n *= radix;
    for (std::uint64_t row = 0; row < n; ++row) expect_same(b.m, capture::case_of(m, row), wrong);
    rows += n;
  }
  CHECK(wrong == 0);
  CHECK(rows == 1'926'528);
}

TEST_CASE("the second walker finds the same for random entries, registers and processors in every mode") {
  using capture::mode;
  std::mt19937_64 random{seed()};
  for (const mode m : {mode::two_level, mode::pae, mode::long_4, mode::long_5}) {
    std::uint64_t wrong = 0, done = 0;
    for (unsigned i = 0; i < 60'000; ++i) {
      const access_case c = random_case(random, m);
      expect_same(m, c, wrong);
      if (capture::run_case(m, c).result) ++done;
    }
    CHECK(wrong == 0);
    CHECK(done > 3'000);  // else there was nothing to compare
    MESSAGE(std::string{capture::to_string(m)}, ": ", done, " of 60000 accesses came to pass");
  }
}
