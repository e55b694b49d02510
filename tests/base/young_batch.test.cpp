// SPDX-License-Identifier: MIT
#include <mmunotify/base/young_batch.hpp>

#include <doctest/doctest.h>

#include <algorithm>
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

TEST_CASE("a part of a batch has the bits of its pages, and no others, however often it is divided") {
  constexpr std::uint64_t pages = 130;
  constexpr auto at = [](std::uint64_t p) { return static_cast<std::uintptr_t>(0x10000 + p * page_size); };
  for (std::uint64_t first = 0; first < pages; ++first) {
    for (const std::uint64_t last : {first + 1, std::min(first + 66, pages), pages}) {
      std::array<std::uint64_t, 3> bits{};
      const young_batch whole({at(0), at(pages)}, bits, true);
      young_batch part = whole.part({at(first / 2), at(last)}).part({at(first), at(pages) + page_size});
      CHECK(part.range() == mmunotify::range{at(first), at(last)});
      CHECK(part.pages() == last - first);
      CHECK(part.clear());
      part.mark(at(first) - 1);  // somebody else's
      part.mark(at(last));
      CHECK(bits == std::array<std::uint64_t, 3>{});
      part.mark(at(last) - 1);
      for (std::uint64_t p = 0; p < pages; ++p) CHECK(whole.marked(p) == (p == last - 1));
      CHECK(part.marked(last - 1 - first));
    }
  }
  std::array<std::uint64_t, 1> bits{};
  const young_batch whole({at(0), at(8)}, bits, false);
  CHECK(whole.part({at(2) + 7, at(4) + 1}).range() == mmunotify::range{at(2), at(5)});  // whole pages
  CHECK(whole.part({at(2) + 7, at(3)}).range() == mmunotify::range{at(2), at(3)});
  CHECK(basic_young_batch<gfn>({gfn{10}, gfn{20}}, bits, false).part({gfn{0}, gfn{12}}).pages() == 2);
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
