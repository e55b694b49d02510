// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/verify.hpp>

#include <doctest/doctest.h>

#include <string>

#include "shadow_fixture.hpp"

using namespace shadow_test;
using x86::page_role;
using x86::rights;
using x86::shadow_entry;
using x86::shadow_page;

namespace {
struct fixture {
  x86::flush_gate gate;
  x86::memslots slots{gate.domain()};
  x86::mmu_counters counters;
  x86::mmu_window window, zapping;
  x86::shadow_tables tables{slots, gate, counters, 100};
  x86::fault_stock stock;
  shadow_page* upper;
  shadow_page* lower;

  fixture() {
    CHECK(slots.add({.id = 1, .base = {0}, .pages = 64, .host = ram_base}, tables.lock()) == errc::ok);
    REQUIRE(stock.fill() == errc::ok);
    const page_role r = page_role().with_level(2).with_wp(true);
    upper = &tables.get({40}, r, stock);
    lower = &tables.get({41}, r.table_below(rights{rights::write_bit | rights::user_bit}), stock);
    tables.link(*upper, 5, *lower, stock);
    tables.map(*lower, 6, {1}, shadow_entry::leaf({77}, rights{rights::write_bit}, false), stock);
    CHECK(found() == "");
  }
  std::string found() {
    const char* broken = x86::table_check(tables, window, zapping).run();
    return broken == nullptr ? "" : broken;
  }
  /// Effects: sets an entry behind everybody's back. Returns: what the check says; puts it back.
  std::string with_entry(shadow_page& p, unsigned i, shadow_entry e) {
    const shadow_entry was = p.exchange(i, e);
    std::string s = found();
    p.exchange(i, was);
    CHECK(found() == "");
    return s;
  }
};
}  // namespace

TEST_CASE("the self-check names a leaf that is gone, foreign, too permissive or misplaced") {
  fixture f;
  const shadow_entry leaf = f.lower->load(6);
  CHECK(f.with_entry(*f.lower, 6, {}) == "a shadow page has lost count of its entries");
  CHECK(f.with_entry(*f.lower, 6, leaf.without(shadow_entry::present_bit)) == "an entry that is not present has bits");
  CHECK(f.with_entry(*f.lower, 7, leaf) == "a leaf is missing in the reverse mapping");
  CHECK(f.with_entry(*f.lower, 6, shadow_entry::leaf({77}, rights{}, false)) ==
        "a leaf grants more than the tables above it");
  CHECK(f.with_entry(*f.upper, 7, leaf) == "a large leaf is not aligned");
  CHECK(f.with_entry(*f.upper, 7, shadow_entry::leaf({512}, rights{0}, false)) ==
        "a large leaf reaches beyond its slot");
  CHECK(f.with_entry(*f.lower, 6, leaf.without(shadow_entry::may_write_bit)) ==
        "a leaf is writable although it may not be written");
  f.lower->leaf_frames[6] = 2;
  CHECK(f.found() == "a leaf is missing in the reverse mapping");
  f.lower->leaf_frames[6] = 99;
  CHECK(f.found() == "a leaf maps a frame outside all slots");
  f.lower->leaf_frames[6] = 1;
  CHECK(f.found() == "");
}

TEST_CASE("the self-check names a link that only one side knows of, and one that leads to the wrong place") {
  fixture f;
  CHECK(f.with_entry(*f.upper, 6, shadow_entry::link(*f.lower)) == "a link is missing among its page's parents");
  CHECK(f.with_entry(*f.lower, 7, shadow_entry::link(*f.lower)) == "a page of the lowest level has a link");
  x86::stock<x86::rmap_chunk> nodes;
  REQUIRE(nodes.fill(1) == errc::ok);
  f.lower->parents.add({f.upper, 9}, nodes);
  CHECK(f.found() == "a parent does not link its child");
  CHECK(f.lower->parents.remove({f.upper, 9}, nodes));
  const page_role role = f.lower->role;
  f.lower->role = role.with_level(3);
  CHECK(f.found() != "");
  f.lower->role = role;
  CHECK(f.found() == "");
}

TEST_CASE("the self-check names what has lost count, and a page that is on its way out") {
  fixture f;
  ++f.lower->mmio;
  CHECK(f.found() == "a shadow page has lost count of its entries");
  --f.lower->mmio;
  CHECK(f.with_entry(*f.upper, 9, shadow_entry::mmio({100}, rights{}, true, 0)) ==
        "an entry that is not present has bits");
  x86::memslot& slot = *f.slots.current().find({41});
  slot.count_table({41}, 1);
  CHECK(f.found() == "the slots have lost count of the shadowed tables");
  slot.count_table({41}, -1);
  const page_role role = f.lower->role;
  f.lower->role = role.as_invalid();
  CHECK(f.found() == "a page in the index is not in use");
  f.lower->role = role;
  f.lower->generation = 7;
  CHECK(f.found() == "a link leads to a page of another generation");
  f.lower->generation = 0;
  CHECK(f.found() == "");
}

TEST_CASE("K1: the self-check names a leaf inside an open bracket, to the byte") {
  fixture f;
  const auto h = static_cast<std::uintptr_t>(ram_base.value);
  f.zapping.start({h + 0x1fff, h + 0x2000});
  CHECK(f.found() == "a leaf is inside an open bracket");
  f.zapping.end({h + 0x1fff, h + 0x2000});
  f.zapping.start({h + 0x2000, h + 0x3000});
  CHECK(f.found() == "");
  f.zapping.end({h + 0x2000, h + 0x3000});
  f.window.start({h + 0x1fff, h + 0x2000});  // one that withdraws write access
  CHECK(f.found() == "a leaf may be written inside an open bracket");
  f.window.end({h + 0x1fff, h + 0x2000});
}

TEST_CASE("the self-check names a writable mapping of a shadowed table, and a root that is none") {
  fixture f;
  f.tables.map(*f.lower, 8, {41}, shadow_entry::leaf({78}, rights{rights::write_bit}, false), f.stock);
  CHECK(f.found() == "a shadowed guest table is mapped writable");
  f.tables.map(*f.lower, 8, {41}, shadow_entry::leaf({78}, rights{0}, false), f.stock);
  CHECK(f.found() == "a flush is due although the lock is free");
  f.tables.commit();
  CHECK(f.found() == "");
  x86::vcpu_port port;
  f.gate.attach_locked(port);
  CHECK_FALSE(port.select({}));
  port.set_root(f.upper);
  CHECK(f.found() == "a vCPU's root is not a top table");
  const auto foreign = std::make_unique<shadow_page>();
  port.set_root(foreign.get());
  CHECK(f.found() == "a vCPU's root is no shadow page of this VM");
  f.gate.detach_locked(port);
  f.tables.set_released(true);
  CHECK(f.found() == "a released MMU has shadow pages");
}

namespace {
/// A directory of 4-byte entries below its page of links, with one table in two halves.
struct narrow_fixture {
  x86::flush_gate gate;
  x86::memslots slots{gate.domain()};
  x86::mmu_counters counters;
  x86::mmu_window window, zapping;
  x86::shadow_tables tables{slots, gate, counters, 100};
  x86::fault_stock stock;
  shadow_page* links;
  shadow_page* directory;

  explicit narrow_fixture(x86::table_format format, const x86::directory_registers& registers = {}) {
    CHECK(slots.add({.id = 1, .base = {0}, .pages = 4096, .host = ram_base}, tables.lock()) == errc::ok);
    refill();
    const page_role top = page_role().with_format(format).with_level(3);
    links = &tables.get({40}, top, stock, registers);
    const bool narrow = format == x86::table_format::four_byte;
    directory = &below(*links, 1, narrow ? gfn{40} : gfn{41}, narrow ? 1 : 0);
    CHECK(found() == "");
  }
  void refill() { REQUIRE(stock.fill() == errc::ok); }
  shadow_page& below(shadow_page& p, unsigned i, gfn frame, unsigned quadrant) {
    refill();
    shadow_page& child = tables.get(frame, p.role.table_below(rights{}, quadrant), stock);
    tables.link(p, i, child, stock);
    tables.commit();
    return child;
  }
  std::string found() {
    const char* broken = x86::table_check(tables, window, zapping).run();
    return broken == nullptr ? "" : broken;
  }
  void undo(shadow_page& p, unsigned i) {
    tables.drop(p, i);
    tables.commit();
    CHECK(found() == "");
  }
};
}  // namespace

TEST_CASE("the self-check names a link to the wrong part of a table of 4-byte entries, and halves that do not match") {
  narrow_fixture f(x86::table_format::four_byte);
  f.below(*f.directory, 6, {43}, 0);
  f.below(*f.directory, 7, {43}, 1);
  CHECK(f.found() == "");
  f.below(*f.directory, 8, {43}, 1);
  CHECK(f.found() == "a link leads to another part of a table");
  f.undo(*f.directory, 8);
  f.below(*f.directory, 7, {44}, 1);
  CHECK(f.found() == "the halves of a guest's entry do not belong together");
  f.refill();
  f.tables.map(*f.directory, 7, {512}, shadow_entry::leaf({512}, rights{0}, false), f.stock);
  f.tables.commit();
  CHECK(f.found() == "an entry of the guest's is half a table");
  f.undo(*f.directory, 7);
  f.undo(*f.directory, 6);
  f.tables.map(*f.directory, 6, {1024}, shadow_entry::leaf({1024}, rights{0}, false), f.stock);
  f.refill();
  f.tables.map(*f.directory, 7, {1536}, shadow_entry::leaf({2048}, rights{0}, false), f.stock);
  CHECK(f.found() == "");
  f.refill();
  f.tables.map(*f.directory, 7, {2048}, shadow_entry::leaf({2048}, rights{0}, false), f.stock);
  f.tables.commit();
  CHECK(f.found() == "the halves of a guest's entry do not belong together");
}

TEST_CASE("the self-check names a large leaf that may be executed where none may") {
  narrow_fixture f(x86::table_format::long_mode);
  f.refill();
  f.tables.map(*f.directory, 7, {512}, shadow_entry::leaf({512}, rights{rights::execute_bit}, false), f.stock);
  f.tables.commit();
  const char* const broken = x86::table_check(f.tables, f.window, f.zapping, true).run();
  REQUIRE(broken != nullptr);
  CHECK(std::string(broken) == "a large leaf may be executed");
  CHECK(f.found() != broken);
}

TEST_CASE("the self-check names a page of links that has more than four, or others than its registers say") {
  narrow_fixture narrow(x86::table_format::four_byte);
  narrow.below(*narrow.links, 2, {41}, 2);
  CHECK(narrow.found() == "a link leads to another directory than the registers");
  narrow.undo(*narrow.links, 2);
  narrow.below(*narrow.links, 4, {40}, 0);
  CHECK(narrow.found() == "a page of four entries has another one");
  narrow_fixture pae(x86::table_format::pae, {0, 41 * page_size | 1, 42 * page_size | 1, 0});
  pae.below(*pae.links, 2, {42}, 0);
  CHECK(pae.found() == "");
  pae.below(*pae.links, 2, {41}, 0);
  CHECK(pae.found() == "a link leads to another directory than the registers");
  pae.undo(*pae.links, 2);
  pae.below(*pae.links, 3, {41}, 0);
  CHECK(pae.found() == "a link leads to another directory than the registers");
}
