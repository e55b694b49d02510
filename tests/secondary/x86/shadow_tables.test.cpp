// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/shadow_tables.hpp>

#include <doctest/doctest.h>

#include <mmunotify/secondary/x86/verify.hpp>

#include "shadow_fixture.hpp"

using namespace shadow_test;
using x86::page_role;
using x86::rights;
using x86::shadow_entry;
using x86::shadow_page;
using x86::shadow_tables;

namespace {
struct fixture {
  x86::flush_gate gate;
  x86::memslots slots{gate.domain()};
  x86::mmu_counters counters;
  x86::mmu_window window, zapping;
  shadow_tables tables;
  x86::fault_stock stock;

  explicit fixture(std::size_t max_pages = 100) : tables(slots, gate, counters, max_pages) {
    CHECK(slots.add({.id = 1, .base = {0}, .pages = 64, .host = ram_base}, tables.lock()) == errc::ok);
    refill();
  }
  void refill() { REQUIRE(stock.fill() == errc::ok); }
  shadow_page& table(std::uint64_t frame, std::uint8_t level = 1) {
    refill();
    return tables.get({frame}, page_role().with_level(level), stock);
  }
  void map(shadow_page& p, unsigned i, std::uint64_t frame, std::uint8_t bits = 7) {
    refill();
    tables.map(p, i, {frame}, shadow_entry::leaf({frame + 1000}, rights{bits}, true), stock);
  }
  void link(shadow_page& p, unsigned i, shadow_page& child) {
    refill();
    tables.link(p, i, child, stock);
  }
  const char* verify() {
    tables.commit();
    return x86::table_check(tables, window, zapping).run();
  }
  std::uint64_t flushes() { return counters.read().flushes; }
};
range host_pages(std::uint64_t first, std::uint64_t last) {
  const auto h = static_cast<std::uintptr_t>(ram_base.value);
  return {h + first * 4096, h + last * 4096};
}
}  // namespace

TEST_CASE("a page is made once for a frame and role") {
  fixture f;
  shadow_page& a = f.table(40);
  CHECK(&f.table(40) == &a);
  CHECK(&f.table(40, 2) != &a);
  CHECK(f.tables.page_count() == 2);
  CHECK(f.tables.tracked({40}));
  CHECK_FALSE(f.tables.tracked({41}));
  CHECK(f.verify() == nullptr);
}

TEST_CASE("an invalidated range is unmapped everywhere, and its neighbours are not") {
  fixture f;
  shadow_page& a = f.table(40);
  shadow_page& b = f.table(41);
  for (unsigned i = 0; i < 8; ++i) {
    f.map(a, i, i);
    f.map(b, 511 - i, i);
    f.map(b, 100 + i, i);
  }
  CHECK(f.verify() == nullptr);
  const auto before = f.flushes();
  f.tables.zap_host_range({host_pages(3, 4).first + 4095, host_pages(5, 6).first + 1});  // one byte of 3 and of 5
  CHECK(f.verify() == nullptr);
  CHECK(f.flushes() == before + 1);
  for (unsigned i = 0; i < 8; ++i) {
    const bool gone = i >= 3 && i <= 5;
    CHECK(a.load(i).present() != gone);
    CHECK(b.load(511 - i).present() != gone);
    CHECK(b.load(100 + i).present() != gone);
  }
  CHECK(f.counters.read().zapped == 9);
  f.tables.zap_host_range(host_pages(3, 6));
  f.tables.commit();
  CHECK(f.flushes() == before + 1);  // nothing there, nothing cached: nothing to flush
}

TEST_CASE("a frame is write-protected in every mapping before its table is shadowed") {
  fixture f;
  shadow_page& a = f.table(40);
  shadow_page& b = f.table(41);
  f.map(a, 1, 7);
  f.map(b, 2, 7);
  f.map(b, 3, 8);
  const auto before = f.flushes();
  f.table(7);
  CHECK(f.flushes() == before + 1);
  CHECK_FALSE(a.load(1).allows().writable());
  CHECK_FALSE(b.load(2).allows().writable());
  CHECK(b.load(3).allows().writable());
  CHECK(a.load(1).allows().user());
  CHECK(f.counters.read().write_protected == 2);
  CHECK(f.verify() == nullptr);
}

TEST_CASE("a leaf that loses rights or changes its frame is flushed, one that gains rights is not") {
  fixture f;
  shadow_page& a = f.table(40);
  f.map(a, 1, 7, rights::user_bit);
  f.map(a, 1, 7, rights::user_bit | rights::write_bit);
  f.tables.commit();
  CHECK(f.flushes() == 0);
  f.map(a, 1, 7, rights::user_bit);
  f.tables.commit();
  CHECK(f.flushes() == 1);
  f.map(a, 1, 8, rights::user_bit);
  f.tables.commit();
  CHECK(f.flushes() == 2);
  CHECK(f.verify() == nullptr);
}

TEST_CASE("a written table loses exactly the shadows of the written entries") {
  fixture f;
  shadow_page& a = f.table(40);
  const page_role weaker = a.role.with_access(rights{rights::user_bit});
  shadow_page& b = f.tables.get({40}, weaker, f.stock);
  for (unsigned i = 0; i < 6; ++i) {
    f.map(a, i, i);
    f.map(b, i, i, rights::user_bit);
  }
  CHECK(f.tables.zap_written({40}, 2 * 8, 3 * 8));
  CHECK_FALSE(f.tables.zap_written({39}, 16, 24));
  for (unsigned i = 0; i < 6; ++i) {
    CHECK(a.load(i).present() == (i != 2 && i != 3));
    CHECK(b.load(i).present() == (i != 2 && i != 3));
  }
  CHECK(f.verify() == nullptr);
}

TEST_CASE("a table that is written again and again and used by nobody is shadowed no more") {
  fixture f;
  f.table(40);
  for (unsigned i = 0; i < shadow_tables::write_flood; ++i) CHECK(f.tables.zap_written({40}, 8 * i, 8 * i));
  f.table(40);  // a fault uses it
  for (unsigned i = 0; i < shadow_tables::write_flood; ++i) CHECK(f.tables.zap_written({40}, 8 * i, 8 * i));
  CHECK(f.tables.tracked({40}));
  CHECK(f.tables.zap_written({40}, 0, 0));
  CHECK_FALSE(f.tables.tracked({40}));
  CHECK(f.verify() == nullptr);
}

TEST_CASE("the oldest pages make room, unlinked from parents, children and roots") {
  fixture f(10);
  x86::vcpu_port port;
  f.gate.attach_locked(port);
  shadow_page& root = f.table(40, 4);
  port.set_root(&root);
  shadow_page* p = &root;
  for (std::uint8_t level = 3; level >= 1; --level) {
    shadow_page& child = f.table(40U + level, level);
    f.link(*p, level, child);
    p = &child;
  }
  f.map(*p, 0, 1);
  for (std::uint64_t i = 50; i < 55; ++i) f.table(i);
  CHECK(f.tables.page_count() == 9);
  CHECK(f.verify() == nullptr);
  f.tables.make_room();
  CHECK(f.tables.page_count() == 5);
  CHECK(port.root() == nullptr);
  CHECK(f.verify() == nullptr);
  CHECK(f.counters.read().zapped == 1);
  f.gate.detach_locked(port);
}

TEST_CASE("what was taken down is used again, and only after a flush") {
  fixture f;
  shadow_page* const a = &f.table(40);
  f.tables.zap_everything();
  x86::fault_stock empty, surplus;
  f.tables.restock(empty, surplus);
  CHECK(empty.pages.size() == 0);
  f.tables.commit();
  f.tables.restock(empty, surplus);
  REQUIRE(empty.pages.size() == 1);
  shadow_page& again = empty.pages.pop();
  CHECK(&again == a);
  CHECK(again.parents.empty());
  empty.pages.push(again);
}

TEST_CASE("pages of an older generation are found by nobody, still unmapped by brackets, and go in batches") {
  fixture f;
  x86::vcpu_port port;
  f.gate.attach_locked(port);
  shadow_page& root = f.table(40, 4);
  port.set_root(&root);
  for (std::uint64_t i = 0; i < 2 * shadow_tables::batch; ++i) f.map(f.table(i), 0, 50 + i % 4);
  f.tables.begin_generation();
  CHECK(port.root() == nullptr);
  shadow_page& fresh = f.table(40, 4);
  CHECK(&fresh != &root);
  port.set_root(&fresh);
  CHECK(f.verify() == nullptr);
  f.tables.zap_host_range(host_pages(50, 52));
  CHECK(f.counters.read().zapped == shadow_tables::batch);
  CHECK(f.verify() == nullptr);
  CHECK(f.tables.zap_obsolete());
  CHECK(f.verify() == nullptr);
  CHECK(f.tables.zap_obsolete());
  CHECK_FALSE(f.tables.zap_obsolete());
  CHECK_FALSE(f.tables.zap_obsolete());
  CHECK(f.tables.page_count() == 1);
  CHECK(port.root() == &fresh);
  CHECK(f.verify() == nullptr);
  f.gate.detach_locked(port);
}

TEST_CASE("a frame that is mapped too often has its list emptied before it grows on") {
  fixture f(20);
  f.map(f.table(40), 0, 9);
  unsigned n = 1;
  for (std::uint64_t t = 0; n < x86::entry_list::recycle_at + 5; ++t) {
    shadow_page& p = f.table(41 + t / 8);
    for (unsigned i = 0; i < 64 && n < x86::entry_list::recycle_at + 5; ++i, ++n)
      f.map(p, i + static_cast<unsigned>(t % 8) * 64, 9);
  }
  CHECK(f.slots.current().find({9})->mappings({9}).count() == 5);
  CHECK(f.counters.read().zapped == x86::entry_list::recycle_at);
  CHECK(f.verify() == nullptr);
}

TEST_CASE("write access is taken from a range with the means to get it back, and reads stay") {
  fixture f;
  shadow_page& a = f.table(40);
  for (unsigned i = 0; i < 6; ++i) f.map(a, i, i);
  f.map(a, 7, 3, rights::user_bit);
  f.tables.write_protect_host_range(host_pages(2, 4));
  for (unsigned i = 0; i < 6; ++i) {
    CHECK(a.load(i).present());
    CHECK(a.load(i).allows().writable() == (i < 2 || i > 3));
    CHECK(a.load(i).may_write() == (i < 2 || i > 3));
  }
  CHECK(f.counters.read().downgraded == 2);
  CHECK(f.verify() == nullptr);
  CHECK(f.flushes() == 1);
  f.tables.write_protect_host_range(host_pages(2, 4));
  f.tables.commit();
  CHECK(f.flushes() == 1);
}
