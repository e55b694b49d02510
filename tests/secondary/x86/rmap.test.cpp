// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/rmap.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

using namespace mmunotify;
using x86::entry_list;
using x86::entry_place;

TEST_CASE("an entry list of one takes no node") {
  const auto page = std::make_unique<x86::shadow_page>();
  x86::stock<x86::rmap_node> none;
  entry_list l;
  CHECK(sizeof l == sizeof(void*));
  CHECK(l.empty());
  l.add({page.get(), 511}, none);
  CHECK(l.first() == entry_place{page.get(), 511});
  CHECK(l.count() == 1);
  CHECK_FALSE(l.remove({page.get(), 510}, none));
  CHECK(l.remove({page.get(), 511}, none));
  CHECK(l.empty());
  CHECK_FALSE(l.remove({page.get(), 511}, none));
  CHECK(none.size() == 0);
}

TEST_CASE("an entry list gives back every node, whatever the order of removal") {
  const auto a = std::make_unique<x86::shadow_page>();
  const auto b = std::make_unique<x86::shadow_page>();
  const std::array<entry_place, 4> all{{{a.get(), 0}, {a.get(), 1}, {b.get(), 0}, {b.get(), 511}}};
  std::array<unsigned, 4> order{0, 1, 2, 3};
  do {
    x86::stock<x86::rmap_node> nodes;
    REQUIRE(nodes.fill(3) == errc::ok);
    entry_list l;
    for (const entry_place& p : all) l.add(p, nodes);
    CHECK(nodes.size() == 0);
    std::vector<entry_place> left(all.begin(), all.end());
    for (const unsigned i : order) {
      CHECK(l.contains(all[i]));
      CHECK(l.remove(all[i], nodes));
      CHECK_FALSE(l.contains(all[i]));
      left.erase(std::find(left.begin(), left.end(), all[i]));
      CHECK(l.count() == left.size());
      for (const entry_place& p : left) CHECK(l.contains(p));
      CHECK(nodes.size() == 3 - std::max<std::size_t>(left.size(), 1) + 1);
    }
    CHECK(l.empty());
  } while (std::next_permutation(order.begin(), order.end()));
}
