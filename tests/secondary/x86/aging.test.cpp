// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/aging.hpp>

#include <doctest/doctest.h>

#include "shadow_fixture.hpp"

using namespace shadow_test;
using x86::ageing;
using x86::rights;
using x86::shadow_entry;
using x86::shadow_page;

namespace {
struct fixture {
  x86::flush_gate gate;
  x86::memslots slots{gate.domain()};
  x86::mmu_counters counters;
  x86::shadow_tables tables{slots, gate, counters, 100};
  x86::fault_stock stock;
  shadow_page* page;

  fixture() {
    CHECK(slots.add({.id = 1, .base = {0}, .pages = 2048, .host = ram_base}, tables.lock()) == errc::ok);
    REQUIRE(stock.fill() == errc::ok);
    page = &tables.get({40}, x86::page_role(), stock);
  }
  void map(shadow_page& p, unsigned i, std::uint64_t frame) {
    REQUIRE(stock.fill() == errc::ok);
    tables.map(p, i, {frame}, shadow_entry::leaf({frame + 1024}, rights{}, true), stock);
  }
  void use(shadow_page& p, unsigned i) { p.update(i, p.load(i), p.load(i).with(shadow_entry::accessed_bit)); }
  bool ask(std::uint64_t first, std::uint64_t last, ageing how) {
    const auto h = static_cast<std::uintptr_t>(ram_base.value);
    return x86::young(slots, gate.domain(), {h + first * 4096, h + last * 4096}, how);
  }
};
}  // namespace

TEST_CASE("accessed bits are tested and cleared in the range, and nowhere else") {
  fixture f;
  f.map(*f.page, 1, 7);
  f.map(*f.page, 2, 8);
  CHECK_FALSE(f.ask(0, 2048, ageing::test));
  f.use(*f.page, 1);
  f.use(*f.page, 2);
  CHECK(f.ask(7, 8, ageing::test));
  CHECK(f.ask(7, 8, ageing::clear));
  CHECK_FALSE(f.ask(7, 8, ageing::test));
  CHECK(f.ask(0, 2048, ageing::test));
  CHECK(f.ask(0, 2048, ageing::clear));
  CHECK_FALSE(f.ask(0, 2048, ageing::clear));
  CHECK(f.page->load(1).present());
  CHECK(f.counters.read().flushes == 0);
}

TEST_CASE("each of the leaves of a frame answers, and a large one for all of its frames") {
  fixture f;
  for (unsigned i = 0; i < 40; ++i) f.map(*f.page, i, 7);
  f.use(*f.page, 33);
  CHECK(f.ask(7, 8, ageing::clear));
  CHECK_FALSE(f.ask(7, 8, ageing::test));
  REQUIRE(f.stock.fill() == errc::ok);
  shadow_page& upper = f.tables.get({41}, x86::page_role().with_level(2), f.stock);
  f.map(upper, 3, 512);
  f.use(upper, 3);
  CHECK(f.ask(1023, 1024, ageing::test));
  CHECK_FALSE(f.ask(1024, 2048, ageing::test));
  CHECK(f.ask(600, 601, ageing::clear));
  CHECK_FALSE(f.ask(512, 1024, ageing::test));
}

TEST_CASE("a batch gets a mark for each page that was used, in every slot that it is in, and clears if it is to") {
  fixture f;
  REQUIRE(f.slots.add({.id = 2, .base = {4096}, .pages = 8, .host = ram_base}, f.tables.lock()) == errc::ok);
  f.map(*f.page, 1, 7);
  f.map(*f.page, 2, 70);
  f.map(*f.page, 3, 71);
  f.map(*f.page, 4, 4096 + 3);
  REQUIRE(f.stock.fill() == errc::ok);
  shadow_page& upper = f.tables.get({41}, x86::page_role().with_level(2), f.stock);
  f.map(upper, 3, 512);
  f.use(*f.page, 1);
  f.use(*f.page, 3);
  f.use(*f.page, 4);
  f.use(upper, 3);
  const auto h = static_cast<std::uintptr_t>(ram_base.value);
  for (const bool clear : {false, true, true}) {
    std::array<std::uint64_t, 9> bits{};
    young_batch batch({h, h + 520 * 4096}, bits, clear);
    const bool before = f.ask(0, 2048, ageing::test);
    x86::young_pages(f.slots, f.gate.domain(), batch);
    CHECK(bits[0] == (before ? 1U << 3 | 1U << 7 : 0U));
    CHECK(bits[1] == (before ? std::uint64_t{1} << 7 : 0U));
    CHECK(bits[8] == (before ? 0xffU : 0U));  // as much of the large page as the batch has
    CHECK(f.ask(0, 2048, ageing::test) == (before && !clear));
  }
}

TEST_CASE("neither asking nor clearing needs the MMU lock") {
  machine m;
  m.map({0x400000}, {0x5000}, rwu | used);
  cpu_type cpu{m.mmu};
  REQUIRE(cpu.set_cr3(m.root) == errc::ok);
  REQUIRE(touch(cpu, {0x400000}, access::read).result.what == outcome::done);
  const range all{0, UINTPTR_MAX};
  bool tested = false, cleared = false, left = true;
  {
    const std::lock_guard held{m.mmu.lock()};
    std::thread([&] {
      tested = m.mmu.test_young(all);
      cleared = m.mmu.clear_young(all);
      left = m.mmu.test_young(all);
    }).join();
  }
  CHECK(tested);
  CHECK(cleared);
  CHECK_FALSE(left);
}

TEST_CASE("pages are asked for their age while they are mapped, zapped and their tables used again") {
  machine m;
  constexpr gva va{0x400000};
  for (std::uint64_t i = 0; i < 40; ++i) m.map(va + i * page_size, {(i % 4) * page_size}, rwu | used);  // lists
  std::atomic<bool> stop{false};
  std::atomic<unsigned> rounds{0};
  std::thread reclaimer([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      static_cast<void>(m.mmu.test_young({0, UINTPTR_MAX}));
      static_cast<void>(m.mmu.clear_young({0, UINTPTR_MAX}));
      rounds.fetch_add(1, std::memory_order_relaxed);
    }
  });
  {
    cpu_type cpu{m.mmu};
    REQUIRE(cpu.set_cr3(m.root) == errc::ok);
    for (int round = 0; round < 150; ++round) {
      for (std::uint64_t i = 0; i < 40; ++i) {
        REQUIRE(touch(cpu, va + i * page_size, access::write).result.what == outcome::done);
      }
      if (round % 3 == 0) {
        m.mmu.zap_all();
      } else {
        m.migrate({static_cast<std::uint64_t>(round % 4) * page_size});
      }
    }
  }
  while (rounds.load() == 0) std::this_thread::yield();
  stop.store(true);
  reclaimer.join();
  CHECK(m.mmu.verify() == nullptr);
}
