// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/shadow_page.hpp>

#include <doctest/doctest.h>

#include <memory>
#include <set>
#include <vector>

using namespace mmunotify;
using x86::page_role;
using x86::rights;
using x86::shadow_entry;

TEST_CASE("a shadow leaf says what it was made of, for every set of rights") {
  for (std::uint8_t bits = 0; bits < 8; ++bits) {
    for (const bool guest_user : {false, true}) {
      for (const std::uint64_t frame : {std::uint64_t{0}, std::uint64_t{0xabcde}, shadow_entry::frame_limit - 1}) {
        const auto e = shadow_entry::leaf({frame}, rights{bits}, guest_user);
        CHECK(e.present());
        CHECK(e.is_leaf());
        CHECK(e.frame() == pfn{frame});
        CHECK(e.allows() == rights{bits});
        CHECK(e.guest_user() == guest_user);
        CHECK_FALSE(e.accessed());
        CHECK(e.with(shadow_entry::accessed_bit).accessed());
        CHECK(e.with(shadow_entry::dirty_bit).without(shadow_entry::dirty_bit) == e);
      }
    }
  }
}

TEST_CASE("a leaf that may be written says so beside being writable") {
  const auto e = shadow_entry::leaf({5}, rights{}, true);
  CHECK(e.may_write());
  CHECK(e.without(shadow_entry::write_bit).may_write());
  CHECK_FALSE(e.without(shadow_entry::write_bit).allows().writable());
  CHECK_FALSE(shadow_entry::leaf({5}, rights{rights::user_bit}, true).may_write());
}

TEST_CASE("an MMIO entry is not present and says which frame, which rights and which generation") {
  for (std::uint8_t bits = 0; bits < 8; ++bits) {
    for (const std::uint64_t g : {std::uint64_t{0}, std::uint64_t{1}, shadow_entry::mmio_generations - 1}) {
      const auto e = shadow_entry::mmio({shadow_entry::frame_limit - 2}, rights{bits}, bits == 3, g);
      CHECK_FALSE(e.present());
      CHECK(e.is_mmio());
      CHECK(e.mmio_frame() == gfn{shadow_entry::frame_limit - 2});
      CHECK(e.allows() == rights{bits});
      CHECK(e.guest_user() == (bits == 3));
      CHECK(e.of_generation(g));
      CHECK_FALSE(e.of_generation(g + 1));
      CHECK(e.of_generation(g + shadow_entry::mmio_generations));  // hence shadow_tables::zap_mmio
    }
  }
  CHECK_FALSE(shadow_entry{}.is_mmio());
  CHECK_FALSE(shadow_entry::leaf({1}, rights{}, false).is_mmio());
}

TEST_CASE("a link leads to its page and restricts nothing") {
  const auto p = std::make_unique<x86::shadow_page>();
  const auto e = shadow_entry::link(*p);
  CHECK(e.present());
  CHECK_FALSE(e.is_leaf());
  CHECK(e.child() == p.get());
}

TEST_CASE("sets of rights combine and compare") {
  const rights all{}, none{0}, write{rights::write_bit};
  CHECK(x86::covers(all, none));
  CHECK(x86::covers(all, write));
  CHECK_FALSE(x86::covers(write, all));
  CHECK(x86::changed(none, rights::write_bit, 0) == write);
  CHECK(x86::changed(all, 0, rights::user_bit | rights::execute_bit) == write);
}

TEST_CASE("pages of one frame and different roles are different pages, and only indirect ones are tracked") {
  x86::page_index index;
  const page_role table = page_role().with_level(2);
  const page_role other = table.with_access(rights{rights::write_bit});
  const page_role direct = table.part_below(rights{}, true);
  CHECK(direct.level() == 1);
  const auto make = [](gfn f, const page_role& r) {
    auto p = std::make_unique<x86::shadow_page>();
    p->frame = f;
    p->role = r;
    return p;
  };
  const auto a = make({5}, table), b = make({5}, other), c = make({6}, direct);
  for (const auto* p : {&a, &b, &c}) index.insert(**p);
  CHECK(index.size() == 3);
  CHECK(index.oldest() == a.get());
  CHECK(index.find({5}, table) == a.get());
  CHECK(index.find({5}, other) == b.get());
  CHECK(index.find({6}, direct) == c.get());
  CHECK(index.find({6}, table) == nullptr);
  CHECK(index.tracked({5}));
  CHECK_FALSE(index.tracked({6}));
  index.remove(*b);
  CHECK(index.find({5}, other) == nullptr);
  CHECK(index.tracked({5}));
  index.remove(*a);
  CHECK_FALSE(index.tracked({5}));
  CHECK(index.oldest() == c.get());
  index.remove(*c);
  CHECK(index.size() == 0);
  CHECK(index.oldest() == nullptr);
}

TEST_CASE("the index finds every page among many, and forgets the removed ones") {
  x86::page_index index;
  std::vector<std::unique_ptr<x86::shadow_page>> pages;
  for (std::uint64_t i = 0; i < 3000; ++i) {
    pages.push_back(std::make_unique<x86::shadow_page>());
    pages.back()->frame = {i * 7};
    index.insert(*pages.back());
  }
  for (const auto& p : pages) REQUIRE(index.find(p->frame, p->role) == p.get());
  for (std::size_t i = 0; i < pages.size(); i += 2) index.remove(*pages[i]);
  CHECK(index.size() == 1500);
  std::size_t seen = 0;
  index.for_each([&](x86::shadow_page& p) { seen += (p.frame.value / 7) % 2; });
  CHECK(seen == 1500);
  for (std::size_t i = 0; i < pages.size(); ++i) {
    REQUIRE((index.find(pages[i]->frame, pages[i]->role) != nullptr) == (i % 2 == 1));
  }
}

TEST_CASE("what a write to a guest table touches of a shadow page: whole entries, in its quadrant, both of a pair") {
  using x86::table_format;
  const auto touched = [](x86::page_role r, unsigned first, unsigned last) {
    std::set<unsigned> entries;
    const auto span = x86::shadow_page::shadows_of(r, first, last);
    for (unsigned i = span.first; i <= span.last; ++i) entries.insert(i);
    return entries;
  };
  using set = std::set<unsigned>;
  const x86::page_role wide = x86::page_role(), narrow = x86::page_role().with_format(table_format::four_byte);
  CHECK(touched(wide, 15, 16) == set{1, 2});
  CHECK(touched(wide, 4095, 4095) == set{511});
  CHECK(touched(narrow, 3, 4) == set{0, 1});
  CHECK(touched(narrow, 2047, 2048) == set{511});
  CHECK(touched(narrow, 2048, 4095).empty());
  const x86::page_role second = narrow.with_quadrant(1);
  CHECK(touched(second, 2047, 2048) == set{0});
  CHECK(touched(second, 0, 2047).empty());
  CHECK(touched(second, 0, 4095).size() == 512);
  const x86::page_role directory = narrow.with_level(2).with_quadrant(2);
  CHECK(touched(directory, 2048, 2048) == set{0, 1});
  CHECK(touched(directory, 2047, 2052) == set{0, 1, 2, 3});
  CHECK(touched(directory, 3071, 3072) == set{510, 511});
  CHECK(touched(directory, 3072, 4095).empty());
  CHECK(touched(directory, 0, 2047).empty());
}

TEST_CASE("a page of links is found by the registers that it was made from, any other page is not") {
  const auto index = std::make_unique<x86::page_index>();
  const auto links = x86::page_role().with_format(x86::table_format::pae).with_level(3);
  std::array<x86::shadow_page, 3> pages;
  for (auto& p : pages) p.frame = {7};
  pages[0].role = pages[1].role = links;
  pages[0].registers = {0x1001, 0, 0, 0};
  pages[1].registers = {0x1001, 0, 0, 0x2001};
  pages[2].role = links.table_below(rights{});
  for (auto& p : pages) index->insert(p);
  CHECK(index->find({7}, links, 0, {0x1001, 0, 0, 0}) == &pages[0]);
  CHECK(index->find({7}, links, 0, {0x1001, 0, 0, 0x2001}) == &pages[1]);
  CHECK(index->find({7}, links) == nullptr);
  CHECK(index->find({7}, pages[2].role, 0, {1, 2, 3, 4}) == &pages[2]);
  CHECK(index->tracked({7}));
  index->remove(pages[2]);
  CHECK_FALSE(index->tracked({7}));
}
