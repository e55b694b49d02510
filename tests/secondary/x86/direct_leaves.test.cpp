// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/direct_leaves.hpp>

#include <doctest/doctest.h>

#include <array>
#include <vector>

#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
/// Leaves without faults: the test puts them there. Slot 1 has guest frames 0 to 2047, slot 2 a few beyond what tables
/// have places for.
template <class Format>
struct fixture {
  using leaves_type = x86::direct_leaves<Format>;
  x86::flush_gate gate;
  x86::memslots slots{gate.domain()};
  x86::mmu_counters counters;
  leaves_type leaves{slots, gate, counters};
  x86::table_stock stock;

  fixture() {
    REQUIRE(slots.add({.id = 1, .base = {0}, .pages = 2048, .host = ram_base}, leaves.lock()) == errc::ok);
    REQUIRE(slots.add({.id = 2, .base = {leaves_type::tables::frame_limit}, .pages = 4, .host = ram_base + (1 << 24)},
                      leaves.lock()) == errc::ok);
  }
  x86::memslot& slot(unsigned id = 1) { return *x86::memslots::find_id(slots.current(), id); }
  std::atomic<std::uint64_t>& put(std::uint64_t f, unsigned level, std::uint64_t bits = 0) {
    REQUIRE(leaves.restock(stock) == errc::ok);
    const auto at = leaves.tree().make({f}, level, stock);
    REQUIRE(at.level == level);
    at.entry->store(Format::leaf(pfn{0x10000 + f}, true, level) | bits);
    return *at.entry;
  }
  std::uint64_t at(std::uint64_t f) { return leaves.tree().find({f}).value; }
  unsigned level_at(std::uint64_t f) { return leaves.tree().find({f}).level; }
};
}  // namespace

#define FORMATS x86::ept_format, x86::npt_format

TEST_CASE_TEMPLATE("what takes something away asks for one flush, and what takes nothing for none", F, FORMATS) {
  fixture<F> f;
  f.put(3, 1);
  f.put(4, 1, F::dirty_bit);
  f.leaves.reduce({8}, {16}, F::write_bit);
  CHECK_FALSE(f.leaves.flush_due());
  f.leaves.reduce({3}, {4}, F::write_bit);
  CHECK(f.leaves.flush_due());
  f.leaves.commit();
  CHECK(f.gate.flushes() == 1);
  CHECK((f.at(3) & F::write_bit) == 0);
  CHECK((f.at(4) & F::write_bit) != 0);
  f.leaves.reduce({3}, {4}, F::write_bit);
  CHECK_FALSE(f.leaves.flush_due());
  f.leaves.zap(f.slot(), {0}, {2048});
  CHECK(f.leaves.flush_due());
  f.leaves.commit();
  CHECK(f.at(4) == 0);
  CHECK(f.leaves.tree().verify() == nullptr);
  CHECK(f.counters.read().zapped == 2);
}

TEST_CASE_TEMPLATE("a frame is replaced where the change says, bits stay, and slots beyond all tables are left alone",
                   F, FORMATS) {
  fixture<F> f;
  f.put(3, 1, F::accessed_bit);
  const auto host = static_cast<std::uintptr_t>((ram_base + 3 * page_size).value);
  f.leaves.replace(f.slot(), {3}, {4}, {.range = {host, host + page_size}, .frame = {77}});
  CHECK(F::frame(f.at(3)).value == 77);
  CHECK((f.at(3) & F::accessed_bit) != 0);
  CHECK(f.leaves.flush_due());
  f.leaves.commit();
  const auto beyond = static_cast<std::uintptr_t>((ram_base + (1 << 24) + 3 * page_size).value);
  const gfn last{f.leaves.tree().frame_limit + 3};
  f.leaves.replace(f.slot(2), last, last + 1, {.range = {beyond, beyond + page_size}, .frame = {78}});
  CHECK(F::frame(f.at(3)).value == 77);  // the same place, if one counts modulo what there is
  CHECK_FALSE(f.leaves.flush_due());
}

TEST_CASE_TEMPLATE("splitting goes on where it stopped, a table for each leaf, and flushes nothing", F, FORMATS) {
  fixture<F> f;
  f.put(5, 1);
  f.put(512, 2, F::accessed_bit | F::dirty_bit);
  f.put(1024, 2);
  std::uint64_t done = 0;
  x86::table_stock one;
  CHECK(f.leaves.split_some(f.slot(), done, one));  // nothing to make it of
  REQUIRE(one.fill(1) == errc::ok);
  CHECK(f.leaves.split_some(f.slot(), done, one));
  CHECK(f.level_at(512) == 1);
  CHECK(f.level_at(1024) == 2);
  REQUIRE(one.fill(2) == errc::ok);
  CHECK_FALSE(f.leaves.split_some(f.slot(), done, one));
  CHECK(one.size() == 1);
  CHECK(f.level_at(1024) == 1);
  for (std::uint64_t i = 512; i < 1536; ++i) {
    REQUIRE(F::frame(f.at(i)).value == 0x10000 + i);
    REQUIRE(F::maps(f.at(i), 1));
    REQUIRE((f.at(i) & pte::large) == 0);
    REQUIRE(((f.at(i) & F::dirty_bit) != 0) == (i < 1024));
    REQUIRE(((f.at(i) & F::accessed_bit) != 0) == (i < 1024));
  }
  CHECK_FALSE(f.leaves.flush_due());
  CHECK(f.leaves.tree().verify() == nullptr);
  done = 0;
  CHECK_FALSE(f.leaves.split_some(f.slot(2), done, one));
}

TEST_CASE_TEMPLATE("tables that were taken down are used again, after the flush", F, FORMATS) {
  fixture<F> f;
  f.put(3, 1);
  f.leaves.zap(f.slot(), {0}, {2048});
  CHECK(f.level_at(3) == 4);
  x86::table_stock next;
  while (f.stock.size() > 0) delete &f.stock.pop();
  f.leaves.commit();
  REQUIRE(f.leaves.restock(next) == errc::ok);
  CHECK(next.size() == f.leaves.tree().enough);
  f.stock.take_all(next);
  f.put(3, 1);
  CHECK(f.leaves.tree().verify() == nullptr);
}
