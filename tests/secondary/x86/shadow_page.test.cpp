// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/shadow_page.hpp>

#include <doctest/doctest.h>

#include <memory>
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
