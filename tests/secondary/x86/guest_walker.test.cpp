// SPDX-License-Identifier: MIT

// The walker against what processors answered (data: tests/data/README.md), and by hand where the data are silent:
// collisions with the guest, memory that fails, and what a result says besides the translation.

#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <variant>

#include <mmunotify/secondary/x86/guest_walker.hpp>

#include "capture.hpp"
#include "capture_access.hpp"
#include "capture_replay.hpp"

using namespace mmunotify;
namespace pte = x86::pte;
using x86::walk_status;

namespace {

template <class Capture>
std::optional<Capture> capture_file(const std::string& name) {
  auto loaded = capture::load(std::string{MMUNOTIFY_TEST_DATA "/x86/"} + name);
  REQUIRE_MESSAGE(loaded, loaded.error);
  Capture* c = std::get_if<Capture>(&loaded.value);
  REQUIRE(c != nullptr);
  return std::move(*c);
}

void expect_agreement(const std::string& name, const capture::report& r) {
  std::string lines;
  for (const auto& line : r.first) lines += "\n  " + line;
  CHECK_MESSAGE(r.mismatches == 0, name, ": ", r.mismatches, " of ", r.checked, lines);
}

/// Checks one block as it is, or as `tamper` makes it; adds to the figures.
template <class Tamper = capture::untampered>
capture::report matrix_block(const std::string& name, Tamper tamper = {}) {
  const auto m = *capture_file<capture::access_matrix>("access_matrix/" + name);
  capture::report r;
  REQUIRE(capture::with_paging_mode(m.mode, [&](auto mode) { capture::check_matrix(m, mode, r, tamper); }));
  return r;
}

template <class Tamper = capture::untampered>
capture::report fuzz_file(const std::string& name, Tamper tamper = {}) {
  const auto f = *capture_file<capture::access_fuzz>("access_fuzz/" + name);
  capture::report r;
  REQUIRE(capture::with_paging_mode(f.mode, [&](auto mode) { capture::check_fuzz(f, mode, r, tamper); }));
  return r;
}

constexpr const char* linux_files[] = {"lin64_4l_0.bin",  "lin64_4l_1.bin", "lin64_gb_0.bin",
                                       "lin64_pti_0.bin", "lin64_5l_0.bin", "lin64_5l_1.bin"};

constexpr gva target{0x0000'1234'5678'9abc};

/// Four levels by hand: level l's table is at l * 0x1000, its entry for `target` is [l-1].
struct tables {
  using entry = std::uint64_t;
  std::array<entry, 4> entries = {0x55000 | 7, 0x1000 | 7, 0x2000 | 7, 0x3000 | 7};  ///< all P, W, U
  unsigned unreadable = 0;          ///< the level whose entry cannot be read
  unsigned unwritable = 0;          ///< the level whose entry cannot be exchanged
  unsigned rom = 0;                 ///< the level whose entry is in ROM
  unsigned collide_at = 0;          ///< the level at which the guest interferes, once
  entry becomes = 0;                ///< what it writes there
  unsigned exchanges = 0;           ///< successful ones
  std::array<unsigned, 8> order{};  ///< their levels

  static constexpr unsigned level_of(gpa where) noexcept { return static_cast<unsigned>(where.value >> 12); }
  static constexpr x86::walk_context context() noexcept {
    x86::walk_context c;
    c.cr3 = 0x4000;
    return c;
  }
  constexpr bool read_entry(gpa where, entry& value) const noexcept {
    const unsigned level = level_of(where);
    if (level < 1 || level > 4 || level == unreadable) return false;
    value = where.offset() == 8 * x86::long_mode_4::index(target, level) ? entries[level - 1] : 0;
    return true;
  }
  constexpr x86::exchange_result compare_exchange_entry(gpa where, entry expected, entry desired) noexcept {
    const unsigned level = level_of(where);
    if (level == unwritable) return x86::exchange_result::failed;
    if (level == rom) return x86::exchange_result::read_only;
    if (level == collide_at) {
      collide_at = 0;
      entries[level - 1] = becomes;
    }
    if (entries[level - 1] != expected) return x86::exchange_result::changed;
    entries[level - 1] = desired;
    order[exchanges++] = level;
    return x86::exchange_result::done;
  }
};

using walker = x86::guest_walker<x86::long_mode_4>;

constexpr x86::walk_result walk(tables& t, x86::access how, const x86::walk_context& c = tables::context()) {
  return walker{c}.walk(t, target, how);
}

static_assert(
    [] {
      tables t;
      return walk(t, x86::access::write).address;
    }() == gpa{0x55abc},
    "the walker works at compile time");

static_assert(std::is_trivially_copyable_v<x86::walk_result>);

}  // namespace

TEST_CASE("every translation of captured Linux guests is found, and nothing in between") {
  std::uint64_t translations = 0, holes = 0;
  for (const std::string name : linux_files) {
    const auto t = *capture_file<capture::linux_tables>("linux/" + name);
    capture::report r;
    REQUIRE(capture::with_paging_mode(t.mode, [&]<class Mode>(std::type_identity<Mode>) {
      capture::check_linux_capture(t, capture::walker_translator<Mode>{t}, r);
    }));
    expect_agreement(name, r);
    CHECK(r.checked == t.translations);
    translations += r.checked;
    holes += r.holes;
  }
  CHECK(translations == 438'223);
  MESSAGE(translations, " translations, ", holes, " addresses without one");
}

TEST_CASE("walks of a captured Linux guest set what is missing and find nothing missing the second time") {
  const auto t = *capture_file<capture::linux_tables>("linux/lin64_4l_0.bin");
  capture::guest_memory memory{t.ram_bytes, t.pages};
  x86::walk_context c = capture::context_of(t.regs, t.maxphyaddr);
  c.smap = c.pke = c.wp = false;
  const walker w{c};
  unsigned wrong = 0;
  for (const auto& run : t.runs) {
    const auto first = w.walk(memory, {run.va}, x86::access::write);
    const auto second = w.translate(memory, {run.va}, x86::access::write);
    if (!first || !second || first.address != second.address || first.leaf() != second.leaf()) ++wrong;
    if (!second.dirty() || (second.leaf() & pte::accessed) == 0) ++wrong;
    for (unsigned level = first.end_level; level <= 4; ++level) {
      if (!walker::unchanged(memory, first, level)) ++wrong;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("KVM's translations of random tables are found, and the same accessed bits are set") {
  std::uint64_t translations = 0;
  for (const std::string name : {"kvmtr_lm4_nx0_phy40_smap0_intel.bin", "kvmtr_lm4_nx1_phy40_smap1_intel.bin",
                                 "kvmtr_lm4_nx1_phy46_smap0_intel.bin"}) {
    const auto k = *capture_file<capture::kvm_translations>("kvm_translate/" + name);
    capture::report r;
    capture::check_kvm_translations(k, std::type_identity<x86::long_mode_4>{}, r);
    expect_agreement(name, r);
    CHECK(k.changed.size() > 400);
    translations += r.checked;
  }
  CHECK(translations == 12'000);
}

TEST_CASE("every combination of settings, entries and accesses has the outcome that processors gave it") {
  std::uint64_t rows = 0, skipped = 0;
  for (const std::string name : {"block5.agreed.rle", "block6.agreed.rle", "block8.agreed.rle", "block10.agreed.rle"}) {
    const capture::report r = matrix_block(name);
    expect_agreement(name, r);
    rows += r.checked;
    skipped += r.skipped;
  }
  CHECK(rows == 6'073'152);
  CHECK(rows + skipped == 4 * 1'520'640);
}

TEST_CASE("random chains of entries have the outcome that processors gave them, for six address widths") {
  std::uint64_t rows = 0;
  for (const std::string name :
       {"fuzz_lm4.bin", "fuzz_lm4_kvm_phy36.bin", "fuzz_lm4_kvm_phy39.bin", "fuzz_lm4_kvm_phy40.bin",
        "fuzz_lm4_kvm_phy46.bin", "fuzz_lm4_kvm_phy48.bin", "fuzz_lm5.bin"}) {
    const capture::report r = fuzz_file(name);
    expect_agreement(name, r);
    rows += r.checked;
  }
  CHECK(rows == 22'437);
}

TEST_CASE("the captured outcomes notice each rule that is taken away") {
  const auto notices = [](auto tamper) { return matrix_block("block6.agreed.rle", tamper).mismatches; };
  using capture::access_case;
  CHECK(notices([](access_case& c) { c.context.smep = false; }) > 1000);
  CHECK(notices([](access_case& c) { c.context.smap = false; }) > 1000);
  CHECK(notices([](access_case& c) { c.context.ac = false; }) > 1000);
  CHECK(notices([](access_case& c) { c.context.wp = true; }) > 1000);
  CHECK(notices([](access_case& c) { c.context.nxe = true; }) > 1000);
  CHECK(notices([](access_case& c) { c.context.pke = false; }) > 1000);
  CHECK(notices([](access_case& c) { c.context.cpl = 0; }) > 1000);
  CHECK(notices([](access_case& c) { c.context.maxphyaddr = 52; }) > 1000);
  CHECK(notices([](access_case& c) { c.how = x86::access::read; }) > 1000);
  CHECK(fuzz_file("fuzz_lm4.bin", [](access_case& c) { c.context.gib_pages = false; }).mismatches > 0);
  CHECK(fuzz_file("fuzz_lm4.bin", [](access_case& c) { c.context.amd = true; }).mismatches > 0);
  CHECK(fuzz_file("fuzz_lm4_kvm_phy36.bin", [](access_case& c) { ++c.context.maxphyaddr; }).mismatches > 0);
}

TEST_CASE("the rights that forbid an access are those of the manual, for every setting") {
  unsigned wrong = 0;
  constexpr x86::access all[] = {x86::access::read, x86::access::write, x86::access::fetch, x86::access::implicit_read,
                                 x86::access::implicit_write};
  for (unsigned v = 0; v < 128; ++v) {
    x86::walk_context c;
    c.wp = (v & 1) != 0;
    c.smep = (v & 2) != 0;
    c.smap = (v & 4) != 0;
    c.ac = (v & 8) != 0;
    c.cpl = v >> 4 & 3;
    for (const x86::access a : all) {
      for (std::uint8_t bits = 0; bits < 8; ++bits) {
        const x86::rights r{bits};
        const bool implicit = a == x86::access::implicit_read || a == x86::access::implicit_write;
        const bool write = a == x86::access::write || a == x86::access::implicit_write;
        const bool fetch = a == x86::access::fetch, supervisor = c.cpl < 3 || implicit;
        bool allowed = true;
        if (!supervisor && !r.user()) allowed = false;
        if (write && !r.writable() && (!supervisor || c.wp)) allowed = false;
        if (fetch && !r.executable()) allowed = false;
        if (fetch && supervisor && r.user() && c.smep) allowed = false;
        if (!fetch && supervisor && r.user() && c.smap && (implicit || !c.ac)) allowed = false;
        wrong += x86::contains(x86::forbidden_rights(c, a), r) == allowed ? 1 : 0;
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("an implicit access to a user page faults under SMAP whatever EFLAGS.AC says") {
  for (const unsigned cpl : {0U, 3U}) {
    tables t;
    auto c = tables::context();
    c.smap = c.ac = true;
    c.cpl = cpl;
    CHECK(walk(t, x86::access::implicit_read, c).code.bits == x86::fault_code::present);
    CHECK(walk(t, x86::access::implicit_write, c).code.bits == (x86::fault_code::present | x86::fault_code::write));
    CHECK(walk(t, x86::access::read, c).status == walk_status::ok);
  }
}

TEST_CASE("an address that is not canonical is a general protection fault and reads no memory") {
  tables t;
  t.unreadable = 4;
  CHECK(walker{tables::context()}.walk(t, {0x0000'8000'0000'0000}, x86::access::read).status ==
        walk_status::general_protection);
}

TEST_CASE("an entry that is not present hides its reserved bits, and reserved bits hide rights") {
  tables t;
  auto c = tables::context();
  c.cpl = 3;
  t.entries[2] = x86::bit(50);
  auto r = walk(t, x86::access::write, c);
  CHECK(r.code.bits == (x86::fault_code::write | x86::fault_code::user));
  CHECK(r.end_level == 3);
  t.entries[2] = 0x2000 | pte::present | x86::bit(50);
  t.entries[3] = 0x3000 | pte::present;
  r = walk(t, x86::access::write, c);
  CHECK(r.code.bits ==
        (x86::fault_code::present | x86::fault_code::write | x86::fault_code::user | x86::fault_code::reserved));
  CHECK(r.entry(3).where == gpa{0x3000 + 8 * x86::long_mode_4::index(target, 3)});
  CHECK(r.entry(3).value == t.entries[2]);
}

TEST_CASE("a fault leaves guest memory as it was") {
  for (const unsigned broken : {1U, 2U, 3U, 4U}) {
    tables t;
    t.entries[broken - 1] &= ~pte::writable;
    const auto before = t.entries;
    CHECK(walk(t, x86::access::write).status == walk_status::page_fault);
    CHECK(t.entries == before);
  }
}

TEST_CASE("an allowed access sets accessed top down, and dirty in the leaf if it writes") {
  tables t;
  const auto r = walk(t, x86::access::write);
  REQUIRE(r);
  CHECK(t.exchanges == 4);
  CHECK(t.order == std::array<unsigned, 8>{4, 3, 2, 1});
  for (unsigned level = 1; level <= 4; ++level) {
    CHECK((t.entries[level - 1] & pte::accessed) != 0);
    CHECK(((t.entries[level - 1] & pte::dirty) != 0) == (level == 1));
    CHECK(r.entry(level).value == t.entries[level - 1]);
  }
  CHECK(walk(t, x86::access::write));
  CHECK(t.exchanges == 4);
}

TEST_CASE("translate judges like walk and writes nothing") {
  const tables t;
  const auto r = walker{tables::context()}.translate(t, target, x86::access::write);
  REQUIRE(r);
  CHECK(r.address == gpa{0x55abc});
  CHECK(r.leaf() == t.entries[0]);
  CHECK(r.unmarked);

  tables marked;
  CHECK_FALSE(walk(marked, x86::access::read).unmarked);
  CHECK_FALSE(walker{tables::context()}.translate(marked, target, x86::access::read).unmarked);
  CHECK(walker{tables::context()}.translate(marked, target, x86::access::write).unmarked);
}

TEST_CASE("if the guest changes an entry meanwhile, the walk starts again with what is there now") {
  for (unsigned level = 1; level <= 4; ++level) {
    CAPTURE(level);
    tables moved;  // the leaf goes elsewhere; an upper entry is only marked
    moved.collide_at = level;
    moved.becomes = level == 1 ? 0x66000 | 7 : moved.entries[level - 1] | pte::cache_disable;
    auto r = walk(moved, x86::access::write);
    REQUIRE(r);
    CHECK(r.address == gpa{level == 1 ? 0x66abcU : 0x55abcU});
    for (unsigned l = 1; l <= 4; ++l) CHECK(walker::unchanged(moved, r, l));

    tables gone;
    gone.collide_at = level;
    r = walk(gone, x86::access::write);
    CHECK(r.status == walk_status::page_fault);
    CHECK(r.code.bits == x86::fault_code::write);
    CHECK(r.end_level == level);
    CHECK(gone.entries[level - 1] == 0);

    tables protect;
    protect.collide_at = level;
    protect.becomes = protect.entries[level - 1] & ~pte::writable;
    r = walk(protect, x86::access::write);
    CHECK(r.status == walk_status::page_fault);
    CHECK(r.code.bits == (x86::fault_code::present | x86::fault_code::write));
    CHECK((protect.entries[0] & pte::dirty) == 0);
  }
}

TEST_CASE("memory that fails is an outcome of its own and names the entry") {
  for (unsigned level = 1; level <= 4; ++level) {
    tables t;
    t.unreadable = level;
    auto r = walk(t, x86::access::read);
    CHECK(r.status == walk_status::memory_error);
    CHECK(r.end_level == level);
    CHECK(r.entry(level).where == gpa{std::uint64_t{level} * 0x1000 + 8 * x86::long_mode_4::index(target, level)});
    CHECK(t.exchanges == 0);

    tables u;
    u.unwritable = level;
    r = walk(u, x86::access::read);
    CHECK(r.status == walk_status::memory_error);
    CHECK(r.end_level == level);
    CHECK(u.exchanges == 4 - level);
  }
}

TEST_CASE("entries in ROM keep their bits and translate all the same") {
  tables t;
  t.rom = 1;
  const auto before = t.entries[0];
  const auto r = walk(t, x86::access::write);
  REQUIRE(r);
  CHECK(r.leaf() == before);
  CHECK(r.unmarked);
  CHECK(t.entries[0] == before);
  CHECK((t.entries[1] & pte::accessed) != 0);
}

TEST_CASE("a result tells the rights above each table, the leaf's bits and the page") {
  tables t;
  t.entries[3] |= pte::no_execute;
  t.entries[2] &= ~pte::writable;
  t.entries[1] &= ~pte::user;
  t.entries[0] |= pte::global | std::uint64_t{9} << 59;
  const auto r = walk(t, x86::access::read);
  REQUIRE(r);
  CHECK(walker::rights_above(r, 4) == x86::rights{});
  CHECK(walker::rights_above(r, 3) == x86::rights{x86::rights::write_bit | x86::rights::user_bit});
  CHECK(walker::rights_above(r, 2) == x86::rights{x86::rights::user_bit});
  CHECK(walker::rights_above(r, 1) == x86::rights{0});
  CHECK(r.granted == x86::rights{0});
  CHECK(r.global());
  CHECK_FALSE(r.dirty());
  CHECK(r.protection_key() == 9);
  CHECK(r.page_shift == 12);
  CHECK(r.page_base() == gpa{0x55000});
}

TEST_CASE("large pages end the walk above level 1") {
  for (const unsigned level : {2U, 3U}) {
    tables t;
    const unsigned shift = x86::long_mode_4::page_shift(level);
    const std::uint64_t frame = std::uint64_t{3} << shift;
    t.entries[level - 1] = frame | 7 | pte::large | pte::pat_large;
    t.unreadable = level - 1;
    const auto r = walk(t, x86::access::write);
    REQUIRE(r);
    CHECK(r.end_level == level);
    for (unsigned l = 1; l <= 5; ++l) CHECK((r.entry_values[l - 1] == 0) == (l < level || l == 5));
    CHECK(r.page_bytes() == std::uint64_t{1} << shift);
    CHECK(r.address.value == frame + (target.value & (r.page_bytes() - 1)));
    CHECK(r.page_base().value == frame);
    CHECK(r.dirty());
  }
}

TEST_CASE("a changed entry is noticed level by level") {
  tables t;
  const auto r = walk(t, x86::access::read);
  for (unsigned level = 1; level <= 4; ++level) {
    tables later = t;
    CHECK(walker::unchanged(later, r, level));
    later.entries[level - 1] ^= pte::writable;
    CHECK_FALSE(walker::unchanged(later, r, level));
    later.unreadable = level;
    CHECK_FALSE(walker::unchanged(later, r, level));
  }
}
