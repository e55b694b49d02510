// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/dirty_harvest.hpp>

#include <doctest/doctest.h>

#include <set>

#include "shadow_fixture.hpp"

using namespace shadow_test;
using x86::dirty_tracking;

namespace {
constexpr gva va{0x400000};

struct fixture : machine {
  cpu_type cpu{mmu};
  fixture() {
    for (std::uint64_t i = 0; i < 16; ++i) map(va + i * page_size, {i * page_size}, rwu | used);
    CHECK(cpu.set_cr3(root) == errc::ok);
  }
  std::set<std::uint64_t> harvest() {
    std::array<std::uint64_t, 1> words{};
    CHECK(mmu.harvest_writes(1, words) == errc::ok);
    CHECK(mmu.verify() == nullptr);
    std::set<std::uint64_t> frames;
    for (std::uint64_t i = 0; i < 64; ++i) {
      if ((words[0] >> i & 1) != 0) frames.insert(i);
    }
    return frames;
  }
  outcome::kind does(x86::access how, std::uint64_t i) { return touch(cpu, va + i * page_size, how).result.what; }
};
using frames = std::set<std::uint64_t>;
}  // namespace

TEST_CASE("a harvest names what was written since the last one, in both ways of tracking") {
  for (const dirty_tracking how : {dirty_tracking::write_protect, dirty_tracking::dirty_bits}) {
    fixture f;
    CHECK(f.does(access::write, 1) == outcome::done);
    CHECK(f.does(access::write, 2) == outcome::done);
    CHECK(f.does(access::read, 3) == outcome::done);
    REQUIRE(f.mmu.log_writes(1, how) == errc::ok);
    CHECK(f.harvest() == frames{});  // the log begins now
    CHECK(f.does(access::write, 1) == outcome::done);
    CHECK(f.does(access::read, 2) == outcome::done);
    CHECK(f.does(access::write, 3) == outcome::done);
    CHECK(f.does(access::write, 4) == outcome::done);
    CHECK(f.harvest() == frames{1, 3, 4});
    CHECK(f.harvest() == frames{});
    CHECK(f.does(access::write, 1) == outcome::done);
    CHECK(f.does(access::write, 1) == outcome::done);
    CHECK(f.harvest() == frames{1});
    f.migrate({page_size});  // what it was, the page may have been written while it had its frame
    CHECK(f.does(access::read, 1) == outcome::done);
    CHECK(f.harvest() == frames{});
    CHECK(f.does(access::write, 5) == outcome::done);
    f.migrate({5 * page_size});  // the leaf that knew goes
    CHECK(f.harvest() == frames{5});
    REQUIRE(f.mmu.log_writes(1, dirty_tracking::off) == errc::ok);
    CHECK(f.does(access::write, 2) == outcome::done);
    CHECK(f.mmu.verify() == nullptr);
  }
}

TEST_CASE("the MMU's own writes are logged: emulated ones, and accessed and dirty bits in guest tables") {
  for (const dirty_tracking how : {dirty_tracking::write_protect, dirty_tracking::dirty_bits}) {
    fixture f;
    const gpa leaf = f.map(va + 20 * page_size, {7 * page_size}, rwu);
    REQUIRE(f.mmu.log_writes(1, how) == errc::ok);
    CHECK(f.write64({9 * page_size}, 1) == errc::ok);
    CHECK(f.harvest() == frames{9});
    CHECK(f.does(access::read, 20) == outcome::done);
    CHECK(f.harvest().count(frame_of(leaf).value) == 1);
    CHECK(f.does(access::write, 20) == outcome::done);
    CHECK(f.harvest() == frames{7, frame_of(leaf).value});
  }
}

TEST_CASE("the first write after a harvest takes no fault, the page's others nothing at all") {
  fixture f;
  REQUIRE(f.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  CHECK(f.does(access::read, 1) == outcome::done);
  CHECK(f.harvest().count(1) == 0);  // accessed bits in the tables, perhaps
  const auto before = f.mmu.statistics();
  for (int round = 0; round < 3; ++round) {
    CHECK(f.does(access::write, 1) == outcome::done);
    CHECK(f.does(access::write, 1) == outcome::done);
    CHECK(f.harvest() == frames{1});
  }
  const auto after = f.mmu.statistics();
  CHECK(after.faults == before.faults);
  CHECK(after.fast_writes == before.fast_writes + 3);
}

TEST_CASE("a page that may not be written for another reason is not made writable by the way") {
  fixture f;
  REQUIRE(f.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  const std::uint64_t table = frame_of(f.entry_at(va, 1, f.root)).value;
  f.map(va + 30 * page_size, {table * page_size}, rwu | used);
  CHECK(f.does(access::read, 30) == outcome::done);
  CHECK(f.does(access::write, 30) == outcome::write_tracked);
  f.map(va + 31 * page_size, {8 * page_size}, pte::present | used);
  CHECK(f.does(access::read, 31) == outcome::done);
  CHECK(f.does(access::write, 31) == outcome::page_fault);
  f.map(va + 29 * page_size, {6 * page_size}, rwu | pte::accessed);  // not dirty: the guest is to be told
  CHECK(f.does(access::read, 29) == outcome::done);
  CHECK_FALSE(f.cpu.hits(va + 29 * page_size, access::write));
  CHECK(f.mmu.statistics().fast_writes == 0);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("large leaves are split while writes are logged, and made again afterwards") {
  machine m(2048);
  const hva run = ram_base + 1024 * page_size;
  m.host.place_run(run, 21, 512);
  m.map({0x40000000}, {1024 * page_size}, rwu | used, 2);
  cpu_type cpu{m.mmu};
  REQUIRE(cpu.set_cr3(m.root) == errc::ok);
  std::vector<std::uint64_t> words(2048 / 64);
  for (int round = 0; round < 2; ++round) {
    CHECK(touch(cpu, {0x40003000}, access::write).result.what == outcome::done);
    CHECK(cpu.hits({0x40100000}, access::write));
    const auto large = m.mmu.statistics().large;
    REQUIRE(m.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
    CHECK_FALSE(cpu.hits({0x40003000}, access::read));
    CHECK(touch(cpu, {0x40003000}, access::write).result.what == outcome::done);
    CHECK(touch(cpu, {0x40100000}, access::read).result.what == outcome::done);
    REQUIRE(m.mmu.harvest_writes(1, words) == errc::ok);
    CHECK(words[1024 / 64] == 1U << 3);
    CHECK(words[(1024 + 256) / 64] == 0);
    CHECK(m.mmu.statistics().large == large);
    CHECK(m.mmu.verify() == nullptr);
    REQUIRE(m.mmu.log_writes(1, dirty_tracking::off) == errc::ok);
    CHECK(m.mmu.verify() == nullptr);
  }
  CHECK(touch(cpu, {0x40003000}, access::write).result.what == outcome::done);
  CHECK(cpu.hits({0x40100000}, access::write));
}

TEST_CASE("a ring is harvested piece by piece, beside the bitmap, and gives way to it when it was full") {
  fixture f;
  REQUIRE(f.mmu.log_writes(1, dirty_tracking::write_protect, 4) == errc::ok);
  for (std::uint64_t i = 0; i < 16; ++i) CHECK(f.does(access::read, i) == outcome::done);
  f.harvest();
  std::array<gfn, 3> out{};
  CHECK(f.mmu.harvest_ring(1, out).count == 0);  // the bitmap's harvest has had what was pushed
  for (const std::uint64_t i : {5U, 3U, 5U, 9U, 4U}) CHECK(f.does(access::write, i) == outcome::done);
  CHECK(f.mmu.harvest_ring(1, out).count == 3);
  CHECK(out == std::array<gfn, 3>{gfn{5}, gfn{3}, gfn{9}});
  CHECK(f.does(access::write, 5) == outcome::done);
  CHECK(f.mmu.harvest_ring(1, out).count == 2);
  CHECK(out[0] == gfn{4});
  CHECK(out[1] == gfn{5});
  CHECK(f.mmu.verify() == nullptr);
  for (std::uint64_t i = 0; i < 6; ++i) CHECK(f.does(access::write, i) == outcome::done);
  CHECK(f.mmu.harvest_ring(1, out).error == errc::again);
  CHECK(f.harvest() == frames{0, 1, 2, 3, 4, 5});
  CHECK(f.mmu.harvest_ring(1, out).error == errc::ok);
  CHECK(f.does(access::write, 2) == outcome::done);
  const auto found = f.mmu.harvest_ring(1, out);
  CHECK(found.error == errc::ok);
  CHECK(found.count == 1);
  CHECK(out[0] == gfn{2});
  CHECK(f.mmu.harvest_ring(9, out).error == errc::not_registered);
  CHECK(f.mmu.log_writes(1, dirty_tracking::dirty_bits, 4) == errc::bad_range);
  REQUIRE(f.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  CHECK(f.mmu.harvest_ring(1, out).error == errc::disabled);
}

TEST_CASE("bad requests for a log are refused with the reason, and change nothing") {
  fixture f;
  std::array<std::uint64_t, 2> two{};
  const auto one = std::span(two).first(1);
  CHECK(f.mmu.log_writes(9, dirty_tracking::dirty_bits) == errc::not_registered);
  CHECK(f.mmu.harvest_writes(9, one) == errc::not_registered);
  CHECK(f.mmu.harvest_writes(1, one) == errc::disabled);
  REQUIRE(f.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  CHECK(f.does(access::write, 1) == outcome::done);
  CHECK(f.mmu.harvest_writes(1, two) == errc::bad_range);
  CHECK(f.mmu.harvest_writes(1, {}) == errc::bad_range);
  CHECK(f.harvest().count(1) == 1);
  CHECK(f.mmu.move_slot(1, {1 << 20}) == errc::ok);
  CHECK(f.mmu.harvest_writes(1, one) == errc::disabled);  // the log is gone with the old place
}
