// SPDX-License-Identifier: MIT
#include <mmunotify/base/young_batch.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <limits>

using namespace mmunotify;

TEST_CASE("O5: a batch has one bit for each page, of byte keys, strong addresses and frames alike") {
  std::array<std::uint64_t, 2> bits{};
  young_batch bytes({0x10000, 0x10000 + 70 * page_size}, bits, false);
  CHECK(bytes.pages() == 70);
  bytes.mark(0x10000 + 69 * page_size + 5);
  CHECK(bytes.marked(69));
  CHECK(bits == std::array<std::uint64_t, 2>{0, 1U << 5});
  CHECK(bytes.page(69) == 0x10000 + 69 * page_size);

  bits = {};
  basic_young_batch<gpa> strong({gpa{0}, gpa{2 * page_size}}, bits, true);
  strong.mark(gpa{page_size});
  CHECK(bits[0] == 2);
  CHECK(strong.clear());

  bits = {};
  basic_young_batch<gfn> frames({gfn{100}, gfn{228}}, bits, false);
  CHECK(frames.pages() == 128);
  frames.mark(gfn{227});
  CHECK(bits[1] == std::uint64_t{1} << 63);
  CHECK(frames.page(127) == gfn{227});
}

TEST_CASE("a mark outside of the range is ignored, one inside keeps the others") {
  std::array<std::uint64_t, 1> bits{1};
  young_batch b({0x1000, 0x3000}, bits, false);
  b.mark(0xfff);
  b.mark(0x3000);
  b.mark(std::numeric_limits<std::uintptr_t>::max());
  CHECK(bits[0] == 1);
  b.mark(0x2fff);
  CHECK(bits[0] == 3);
}

TEST_CASE("a range fits if it is whole pages with a bit for each") {
  std::array<std::uint64_t, 1> bits{};
  CHECK(young_batch::fits({0, 64 * page_size}, bits));
  CHECK_FALSE(young_batch::fits({0, 65 * page_size}, bits));
  CHECK_FALSE(young_batch::fits({0, 0}, bits));
  CHECK_FALSE(young_batch::fits({page_size, 0}, bits));
  CHECK_FALSE(young_batch::fits({1, 1 + page_size}, bits));
  CHECK_FALSE(young_batch::fits({0, page_size + 1}, bits));
  CHECK_FALSE(young_batch::fits({0, page_size}, {}));
  CHECK_FALSE(young_batch::fits({0, std::numeric_limits<std::uintptr_t>::max()}, bits));
  CHECK(basic_young_batch<gfn>::fits({gfn{3}, gfn{4}}, bits));
}
