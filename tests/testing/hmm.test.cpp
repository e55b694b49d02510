// SPDX-License-Identifier: MIT

// What Linux asks of a device that mirrors an address space: tools/testing/selftests/mm/hmm-tests.c, modelled case by
// case on a reference_mmu and a device of our own. The name of the case stands in the title.
//
// The cases with device memory, exclusive access, forks and huge pages are in hmm_device.test.cpp. Left out: files
// (file_read, file_write, migrate_file_private), memory shared for writing (anon_write_child_shared), pages of device
// drivers (mixedmap), hugetlbfs and the benchmark.

#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include "testing/hmm.hpp"

using namespace hmm;

TEST_CASE("open_close: a device comes and goes, and leaves nothing behind") {
  dmirror::primary_type primary(16);
  REQUIRE(primary.map(pages(0, 4), protection::read_write) == errc::ok);
  for (int i = 0; i < 20; ++i) {
    dmirror a(primary), b(primary);
    CHECK(a.open() == errc::ok);
    CHECK(b.open() == errc::ok);
    CHECK(a.open() == errc::already_registered);
    CHECK(b.close() == errc::ok);
    CHECK(b.close() == errc::not_registered);
  }
  CHECK_FALSE(primary.space().armed());
}

TEST_CASE("anon_read: the device reads what the processor wrote, and zeros where nobody did") {
  mirrored m;
  REQUIRE(m.primary.map(pages(100, 8), protection::read) == errc::ok);
  for (std::uintptr_t i = 0; i < m.n; ++i) CHECK(m.seen(i) == 1000 + i);
  for (std::uintptr_t i = 100; i < 108; ++i) CHECK(m.seen(i) == 0);
}

TEST_CASE("anon_read_prot: protection against everybody is protection against the device") {
  mirrored m;
  CHECK(m.seen(3) == 1003);
  REQUIRE(m.primary.protect(pages(0, 8), protection::none) == errc::ok);
  std::uint64_t value = 7;
  CHECK(m.device.load(at(3), value) == errc::access_denied);
  CHECK(m.device.store(at(3), 1) == errc::access_denied);
  CHECK(value == 7);
  CHECK(m.seen(8) == 1008);
  REQUIRE(m.primary.protect(pages(0, 8), protection::read) == errc::ok);
  CHECK(m.seen(3) == 1003);
}

TEST_CASE("anon_write: the processor reads what the device wrote") {
  mirrored m;
  for (std::uintptr_t i = 0; i < m.n; ++i) REQUIRE(m.device.store(at(i), 5000 + i) == errc::ok);
  for (std::uintptr_t i = 0; i < m.n; ++i) CHECK(m.get(i) == 5000 + i);
}

TEST_CASE("anon_write_prot: the device writes where writing is allowed, and as long as it is") {
  mirrored m;
  REQUIRE(m.primary.protect(pages(0, 8), protection::read) == errc::ok);
  CHECK(m.seen(3) == 1003);
  CHECK(m.device.store(at(3), 1) == errc::access_denied);
  CHECK(m.get(3) == 1003);
  REQUIRE(m.primary.protect(pages(0, 8), protection::read_write) == errc::ok);
  CHECK(m.device.store(at(3), 2) == errc::ok);
  CHECK(m.get(3) == 2);
  REQUIRE(m.primary.protect(pages(0, 8), protection::read) == errc::ok);
  CHECK(m.device.store(at(3), 3) == errc::access_denied);
  CHECK(m.get(3) == 2);
}

TEST_CASE("anon_read_multiple: memory that is unmapped and mapped anew is new for the device as well") {
  mirrored m;
  for (std::uint64_t round = 1; round <= 20; ++round) {
    for (std::uintptr_t i = 0; i < 8; ++i) CHECK(m.seen(i) == (round == 1 ? 1000 : round * 100 - 100) + i);
    REQUIRE(m.primary.unmap(pages(0, 8)) == errc::ok);
    std::uint64_t value = 0;
    CHECK(m.device.load(at(3), value) == errc::not_mapped);
    REQUIRE(m.primary.map(pages(0, 8), protection::read_write) == errc::ok);
    CHECK(m.seen(3) == 0);
    for (std::uintptr_t i = 0; i < 8; ++i) m.put(i, round * 100 + i);
  }
}

TEST_CASE("anon_teardown: memory that goes away while the device reads it is there or is not, and never another's") {
  mirrored m;
  std::atomic<bool> over{false};
  std::atomic<unsigned> wrong{0}, reads{0}, refused{0};
  std::thread reading([&] {
    for (std::uintptr_t i = 0; !over.load(); ++i) {
      std::uint64_t value = 0;
      const errc e = m.device.load(at(i % 16), value);
      if (e == errc::ok) {
        reads.fetch_add(1);
        wrong.fetch_add(value == 0 || value == 1000 + i % 16 ? 0 : 1);
      } else {
        refused.fetch_add(1);
        wrong.fetch_add(e == errc::not_mapped ? 0 : 1);
      }
    }
  });
  const auto until_more = [](std::atomic<unsigned>& c) {
    for (const unsigned then = c.load(); c.load() - then < 2;) std::this_thread::yield();
  };
  for (unsigned round = 0; round < 60; ++round) {
    until_more(reads);
    for (std::uintptr_t i = 0; i < 16; i += 4) REQUIRE(m.primary.unmap(pages(i, 4)) == errc::ok);
    until_more(refused);
    REQUIRE(m.primary.map(pages(0, 16), protection::read_write) == errc::ok);
    for (std::uintptr_t i = 0; i < 16; ++i) m.put(i, 1000 + i);
  }
  over.store(true);
  reading.join();
  CHECK(wrong.load() == 0);
}

TEST_CASE("snapshot: each page is reported as it is, and looking changes nothing") {
  mirrored m;
  REQUIRE(m.primary.map(pages(100, 2), protection::none) == errc::ok);
  REQUIRE(m.primary.map(pages(102, 2), protection::read) == errc::ok);
  REQUIRE(m.primary.swap_out(pages(5, 1)) == errc::ok);
  const auto faults = m.primary.statistics().faults;
  CHECK(m.device.snapshot(at(99)).error == errc::not_mapped);
  CHECK(m.device.snapshot(at(100)).allows == protection::none);
  CHECK_FALSE(m.device.snapshot(at(102)).present);
  CHECK(m.device.snapshot(at(102)).allows == protection::read);
  CHECK(m.device.snapshot(at(4)).present);
  CHECK(m.device.snapshot(at(4)).allows == protection::read_write);
  CHECK(m.device.snapshot(at(5)).swapped);
  CHECK(m.primary.statistics().faults == faults);
  CHECK(m.seen(5) == 1005);
  CHECK(m.device.snapshot(at(5)).present);
}

TEST_CASE("double_map: two devices over the same memory see each other's writes, and the processor's") {
  mirrored m;
  dmirror other(m.primary);
  REQUIRE(other.open() == errc::ok);
  for (std::uintptr_t i = 0; i < m.n; ++i) {
    REQUIRE(m.device.store(at(i), 5000 + i) == errc::ok);
    std::uint64_t value = 0;
    REQUIRE(other.load(at(i), value) == errc::ok);
    CHECK(value == 5000 + i);
    REQUIRE(other.store(at(i), 6000 + i) == errc::ok);
    CHECK(m.seen(i) == 6000 + i);
    m.put(i, 7000 + i);
    CHECK(m.seen(i) == 7000 + i);
  }
  REQUIRE(m.primary.migrate(pages(0, m.n)) == errc::ok);
  CHECK_FALSE(m.device.mapped(at(3)));
  CHECK_FALSE(other.mapped(at(3)));
  CHECK(m.seen(3) == 7003);
  CHECK(other.close() == errc::ok);
}

TEST_CASE("two address spaces, one device on each: the same addresses are different memory") {
  mirrored a, b;
  a.put(3, 1);
  b.put(3, 2);
  CHECK(a.seen(3) == 1);
  CHECK(b.seen(3) == 2);
  REQUIRE(a.primary.unmap(pages(3, 1)) == errc::ok);
  CHECK(b.device.mapped(at(3)));
  CHECK(b.seen(3) == 2);
}

TEST_CASE("hmm_gup_test: a page that somebody has on loan stays where it is, and the device follows what does move") {
  mirrored m;
  CHECK(m.seen(4) == 1004);
  const frame_lease pinned = m.primary.pin(hva{at(4)}, true);
  REQUIRE(pinned);
  const pfn other = m.device.snapshot(at(5)).frame;
  REQUIRE(m.primary.migrate(pages(4, 2)) == errc::ok);
  CHECK(m.device.snapshot(at(4)).frame == pinned.frame);
  CHECK_FALSE(m.device.snapshot(at(5)).frame == other);
  REQUIRE(m.device.store(at(4), 9) == errc::ok);
  CHECK(word_at<std::uint64_t>(m.primary.data(pinned.frame)).load(std::memory_order_relaxed) == 9);
  CHECK(m.seen(5) == 1005);
  m.primary.unpin(pinned.frame);
}

TEST_CASE("migrate_release: an address space that exits takes the device's mappings with it") {
  auto m = std::make_unique<mirrored>();
  for (std::uintptr_t i = 0; i < m->n; ++i) CHECK(m->seen(i) == 1000 + i);
  REQUIRE(m->primary.exit() == errc::ok);
  std::uint64_t value = 0;
  for (std::uintptr_t i = 0; i < m->n; ++i) CHECK_FALSE(m->device.mapped(at(i)));
  CHECK(m->device.load(at(0), value) == errc::released);
  CHECK(m->primary.frames().free_count() == m->primary.frames().size());
}

TEST_CASE("migrate_remap_fault: what is moved to another address is found there by the device, and only there") {
  mirrored m;
  for (std::uintptr_t i = 0; i < 8; ++i) REQUIRE(m.device.store(at(i), 50 + i) == errc::ok);
  REQUIRE(m.primary.move(pages(0, 8), at(200)) == errc::ok);
  std::uint64_t value = 0;
  for (std::uintptr_t i = 0; i < 8; ++i) {
    CHECK(m.device.load(at(i), value) == errc::not_mapped);
    CHECK(m.seen(200 + i) == 50 + i);
  }
}
