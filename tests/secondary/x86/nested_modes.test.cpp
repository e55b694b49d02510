// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/nested_modes.hpp>

#include <doctest/doctest.h>

#include <cstring>
#include <set>

#include "nested_fixture.hpp"

using namespace nested_test;
using x86::check_pointer;
using x86::nested_tables;
using x86::page_role;
using x86::rights;
using x86::shadow_entry;

namespace {
constexpr std::uint64_t eptp_4 = 0x5000 | 3 << 3 | 6;

page_role role_of(const nested_pointer& p, const x86::nested_capabilities& can = {}) {
  return x86::visit_nested(p, [&]<class Mode>(std::type_identity<Mode>) {
    return x86::shadow_layout<Mode>::root_role(x86::context_of(p, can));
  });
}
}  // namespace

TEST_CASE("an EPTP is refused for its memory type, its walk length, its bits and its address, in that order") {
  const auto error = [](std::uint64_t value, const x86::nested_capabilities& can = {}) {
    return check_pointer({.value = value}, can);
  };
  for (std::uint64_t type = 0; type < 8; ++type) {
    CHECK(error((eptp_4 & ~std::uint64_t{7}) | type) ==
          (type == 0 || type == 6 ? pointer_error::none : pointer_error::memory_type));
  }
  for (std::uint64_t length = 0; length < 8; ++length) {
    const std::uint64_t p = (eptp_4 & ~std::uint64_t{0x38}) | length << 3;
    CHECK(error(p) == (length == 3 || length == 4 ? pointer_error::none : pointer_error::walk_length));
    CHECK(error(p, {.five_levels = false}) == (length == 3 ? pointer_error::none : pointer_error::walk_length));
  }
  CHECK(error(eptp_4 | 1 << 6) == pointer_error::none);
  CHECK(error(eptp_4 | 1 << 6, {.accessed_dirty = false}) == pointer_error::accessed_dirty);
  for (unsigned n = 7; n < 12; ++n) CHECK(error(eptp_4 | std::uint64_t{1} << n) == pointer_error::reserved_bits);
  for (const unsigned width : {32U, 40U, 46U, 52U}) {
    for (unsigned n = 12; n < 64; ++n) {
      CHECK(error(eptp_4 | std::uint64_t{1} << n, {.maxphyaddr = width}) ==
            (n < width ? pointer_error::none : pointer_error::beyond_width));
    }
  }
  for (const unsigned width : {0U, 31U, 53U}) {
    CHECK(error(eptp_4, {.maxphyaddr = width}) == pointer_error::beyond_width);
  }
  CHECK(error(0xffff'ffff'ffff'ffff) == pointer_error::memory_type);
}

TEST_CASE("an nCR3 is refused for its address and for levels that there are not") {
  constexpr auto npt = nested_pointer::npt;
  CHECK(check_pointer({.what = npt, .value = 0x5fff}, {}) == pointer_error::none);  // the low bits are ignored
  CHECK(check_pointer({.what = npt, .value = std::uint64_t{1} << 40}, {}) == pointer_error::beyond_width);
  CHECK(check_pointer({.what = npt, .value = 0x5000}, {.maxphyaddr = 20}) == pointer_error::beyond_width);
  CHECK(check_pointer({.what = npt, .value = 0x5000, .la57 = true}, {}) == pointer_error::none);
  CHECK(check_pointer({.what = npt, .value = 0x5000, .la57 = true}, {.five_levels = false}) ==
        pointer_error::walk_length);
}

TEST_CASE("each reason has a sentence of its own") {
  std::set<std::string> sentences;
  for (unsigned e = 0; e <= static_cast<unsigned>(pointer_error::beyond_width); ++e) {
    sentences.insert(to_string(static_cast<pointer_error>(e)));
  }
  CHECK(sentences.size() == static_cast<unsigned>(pointer_error::beyond_width) + 1);
  CHECK(sentences.count("unknown error") == 0);
  CHECK(std::strcmp(to_string(static_cast<pointer_error>(99)), "unknown error") == 0);
}

TEST_CASE("the pointer says which tables are walked, and the role tells them apart") {
  const nested_pointer pointers[] = {
      {.value = eptp_4},
      {.value = eptp_4 | 1 << 6},
      {.value = eptp_4 + 8},
      {.what = nested_pointer::npt, .value = 0x5000},
      {.what = nested_pointer::npt, .value = 0x5000, .la57 = true},
      {.what = nested_pointer::npt, .value = 0x5000, .nxe = false},
  };
  std::set<std::uint32_t> words;
  for (const nested_pointer& p : pointers) {
    const page_role r = role_of(p);
    words.insert(r.word());
    CHECK(r.may_be_root());
    CHECK(r.has_table());
    CHECK(r.access() == rights{});
    CHECK(r.nested() != nested_tables::none);
    CHECK(r.level() == (p.la57 || (p.what == nested_pointer::ept && (p.value >> 3 & 7) == 4) ? 5 : 4));
    CHECK(r.table_below(rights{}).nested() == r.nested());
    CHECK(r.part_below(rights{}, true).nested() == r.nested());
    CHECK_FALSE(r.read_like(r.with_nested(nested_tables::none)));
    CHECK(r.bits().maxphyaddr == 40);
  }
  words.insert(role_of(pointers[0], {.execute_only = false}).word());
  words.insert(role_of(pointers[0], {.maxphyaddr = 46}).word());
  words.insert(role_of(pointers[0], {.gib_pages = false}).word());
  CHECK(words.size() == std::size(pointers) + 3);
  x86::walk_context guests_own;
  guests_own.cr3 = 0x5000;
  CHECK(x86::shadow_layout<x86::long_mode_4>::root_role(guests_own).nested() == nested_tables::none);
}

TEST_CASE("NPT walks are a user's, whatever the guest's own registers say") {
  const x86::walk_context c = x86::context_of({.what = nested_pointer::npt, .value = 0x5000}, {});
  CHECK(c.cpl == 3);
  CHECK(c.wp);
  CHECK(c.nxe);
  CHECK_FALSE((c.smep || c.smap || c.pke || c.pks));
  CHECK(x86::npt<4>::canonical({(std::uint64_t{1} << 48) - 1}));
  CHECK_FALSE(x86::npt<4>::canonical({std::uint64_t{1} << 48}));
  CHECK(x86::npt<5>::canonical({std::uint64_t{1} << 56}));
  CHECK_FALSE(x86::npt<5>::canonical({~std::uint64_t{0}}));
}

TEST_CASE("a shadow leaf is a leaf of EPT and of NPT that a processor takes") {
  for (std::uint8_t bits = 0; bits < 8; ++bits) {
    for (unsigned level = 1; level <= 3; ++level) {
      const pfn frame{std::uint64_t{5} << 18};
      const shadow_entry e = shadow_entry::leaf(frame, rights{bits}, true)
                                 .with(shadow_entry::accessed_bit | (bits % 2 != 0 ? shadow_entry::dirty_bit : 0));
      const std::uint64_t ept = x86::hardware_leaf<x86::ept_format>(e, level);
      const std::uint64_t npt = x86::hardware_leaf<x86::npt_format>(e, level);
      CHECK(x86::ept_format::maps(ept, level));
      CHECK(x86::npt_format::maps(npt, level));
      CHECK(x86::ept_format::frame(ept) == frame);
      CHECK(x86::npt_format::frame(npt) == frame);
      CHECK((ept & x86::ept_format::memory_type) == x86::ept_format::write_back);
      CHECK(x86::rights_in(x86::ept<4>::grants(ept, level)) == rights{bits});
      CHECK(x86::rights_in(x86::npt<4>::grants(npt, level)) == rights{bits});
      CHECK((ept & x86::ept_format::accessed_bit) != 0);
      CHECK((npt & x86::npt_format::accessed_bit) != 0);
      CHECK(((ept & x86::ept_format::dirty_bit) != 0) == (bits % 2 != 0));
      CHECK(((npt & x86::npt_format::dirty_bit) != 0) == (bits % 2 != 0));
      CHECK(((ept & x86::direct_may_write_bit) != 0) == e.may_write());
      const bool readable = rights{bits}.user(), writable = rights{bits}.writable();
      const page_role plain = page_role().with_level(level);
      CHECK(x86::hardware_takes(plain, e));
      CHECK(x86::hardware_takes(plain.with_nested(nested_tables::ept), e) == (readable || !writable));
      CHECK(x86::hardware_takes(plain.with_nested(nested_tables::npt), e) == readable);
    }
  }
  const page_role large = page_role().with_level(2).with_nested(nested_tables::ept);
  CHECK_FALSE(x86::hardware_takes(large, shadow_entry::leaf({5}, rights{}, true)));  // not aligned
}

TEST_CASE("the self-check finds a leaf of a nested guest that its format does not have") {
  nested_machine m;
  m.second_map({0x3000}, {0x5000});
  m.enter();
  REQUIRE(touch2(m.l2, l2_gpa{0x3000}, access::write).result.what == nested_outcome::done);
  REQUIRE(m.broken() == "");
  x86::shadow_tables& tables = m.mmu.tables();
  auto& list = tables.slots().find({5})->mappings({5});
  REQUIRE(list.count() == 1);
  auto& entry = list.first().page->entries[list.first().index];
  const std::uint64_t was = entry.load();
  entry.store(was & ~shadow_entry::user_bit);
  CHECK(m.broken() == "a leaf for a nested guest is none of its format");
  entry.store(was);
  CHECK(m.broken() == "");
}

TEST_CASE("a leaf follows from an entry that L1 has rewritten if the entry still allows all that it does") {
  x86::shadow_page p;
  p.leaf_frames[3].store(5);
  const std::uint64_t frame = 5 << 12;
  const auto follows = [&](nested_tables kind, shadow_entry leaf, std::uint64_t entry) {
    p.role = page_role::root({}, 4, x86::table_format::long_mode).with_level(1).with_nested(kind);
    return x86::nested_follows(p, 3, leaf, entry);
  };
  const shadow_entry all = shadow_entry::leaf({9}, rights{}, true);
  const shadow_entry reads = shadow_entry::leaf({9}, rights{rights::user_bit}, true);
  constexpr std::uint64_t e = ept_all | epte::write_back, marked = e | epte::accessed | epte::dirty;
  CHECK(follows(nested_tables::ept, all, frame | e));
  CHECK_FALSE(follows(nested_tables::ept, all, frame | (e & ~epte::write)));
  CHECK_FALSE(follows(nested_tables::ept, all, frame | (e & ~epte::execute)));
  CHECK_FALSE(follows(nested_tables::ept, all, (frame + 0x1000) | e));
  CHECK_FALSE(follows(nested_tables::ept, all, frame));
  CHECK_FALSE(follows(nested_tables::ept, all, frame | ept_all | 7 << 3));
  CHECK(follows(nested_tables::ept, reads, frame | epte::read));
  CHECK_FALSE(follows(nested_tables::ept_accessed_dirty, all, frame | e));
  CHECK(follows(nested_tables::ept_accessed_dirty, all, frame | marked));
  CHECK(follows(nested_tables::ept_accessed_dirty, reads, frame | e | epte::accessed));
  CHECK_FALSE(follows(nested_tables::ept_accessed_dirty, reads, frame | e));
  const shadow_entry fetches = shadow_entry::leaf({9}, rights{rights::execute_bit}, false);
  CHECK(follows(nested_tables::ept_execute_only, fetches, frame | epte::execute));
  CHECK_FALSE(follows(nested_tables::ept, fetches, frame | epte::execute));
  CHECK(follows(nested_tables::npt, all, frame | npt_used));
  CHECK_FALSE(follows(nested_tables::npt, all, frame | (npt_used & ~pte::dirty)));
  CHECK_FALSE(follows(nested_tables::npt, all, frame | (npt_used & ~pte::user)));
  CHECK_FALSE(follows(nested_tables::npt, all, frame | npt_used | pte::no_execute));
  CHECK_FALSE(follows(nested_tables::npt, all, frame | npt_used | std::uint64_t{1} << 45));
  CHECK(follows(nested_tables::npt, reads, frame | npt_all | pte::accessed));
  for (const auto& entry : p.entries) CHECK(entry.load() == 0);
}
