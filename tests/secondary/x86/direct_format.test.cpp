// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/direct_format.hpp>

#include <doctest/doctest.h>

#include <memory>

using namespace mmunotify;
using x86::bit;
using x86::ept_format;
using x86::npt_format;

TEST_CASE_TEMPLATE("a leaf and a link say what they were made of, and are no misconfiguration", F, ept_format,
                   npt_format) {
  CHECK_FALSE(F::present(0));
  const auto t = std::make_unique<x86::direct_table>();
  const std::uint64_t link = F::link(*t);
  for (unsigned level = 2; level <= 4; ++level) {
    CHECK(F::present(link));
    CHECK_FALSE(F::maps(link, level));
    CHECK_FALSE(F::reserved(link, level));
  }
  CHECK(F::table(link) == t.get());
  for (const bool writable : {false, true}) {
    for (unsigned level = 1; level <= 3; ++level) {
      const pfn frame{std::uint64_t{5} << 20};
      const std::uint64_t e = F::leaf(frame, writable, level);
      CHECK(F::present(e));
      CHECK(F::maps(e, level));
      CHECK(F::frame(e) == frame);
      CHECK(((e & F::write_bit) != 0) == writable);
      CHECK(((e & x86::direct_may_write_bit) != 0) == writable);
      CHECK((e & (F::accessed_bit | F::dirty_bit)) == 0);
      CHECK_FALSE(F::reserved(e, level));
      if (level > 1) CHECK(F::reserved(e | bit(13), level));  // not aligned
      CHECK_FALSE(F::reserved(e | F::accessed_bit | F::dirty_bit, level));
    }
  }
}

TEST_CASE("the bits are where the manuals have them") {
  CHECK(ept_format::leaf({0x12345}, true, 1) == (0x12345000 | 0x37 | bit(57)));  // RWX, write-back
  CHECK(ept_format::leaf({0x12200}, false, 2) == (0x12200000 | 0x35 | bit(7)));
  CHECK(ept_format::accessed_bit == bit(8));
  CHECK(ept_format::dirty_bit == bit(9));
  CHECK(npt_format::leaf({0x12345}, true, 1) == (0x12345000 | 0x7 | bit(57)));
  CHECK(npt_format::leaf({0x12200}, false, 2) == (0x12200000 | 0x5 | bit(7)));
  CHECK(npt_format::accessed_bit == bit(5));
  CHECK(npt_format::dirty_bit == bit(6));
}

TEST_CASE("what the hardware would refuse is seen") {
  const std::uint64_t ept = ept_format::leaf({0x200}, true, 1);
  CHECK(ept_format::reserved((ept & ~ept_format::read_bit), 1));  // writable, not readable
  for (const std::uint64_t type : {2U, 3U, 7U}) {
    CHECK(ept_format::reserved((ept & ~ept_format::memory_type) | type << 3, 1));
  }
  CHECK(ept_format::reserved(ept | bit(7), 4));  // there is no leaf
  CHECK(ept_format::reserved(0x1000 | 7 | bit(3), 3));
  const std::uint64_t npt = npt_format::leaf({0x200}, true, 1);
  CHECK(npt_format::reserved(npt & ~std::uint64_t{4}, 1));  // the nested walk is a user's
  CHECK(npt_format::reserved(npt | bit(7), 4));
  CHECK(npt_format::reserved(0x1007 | bit(8), 4));
}
