// SPDX-License-Identifier: MIT

// The cases of tools/testing/selftests/mm/hmm-tests.c that need device memory, exclusive access, forks or huge pages.
// See hmm.test.cpp. The device's memory is the primary's; there is one kind of it (Linux tries a private and a coherent
// one), and pages that are empty stay where they are not.

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "testing/hmm.hpp"

using namespace hmm;

namespace {

constexpr std::uintptr_t huge_pages = 512;
/// Aligned to 2 MiB, past the area of `mirrored`.
constexpr std::uintptr_t huge_at(std::uintptr_t page) { return base + 0x20'0000 + page * page_size; }
constexpr range huge_range{huge_at(0), huge_at(huge_pages)};

struct device_memory : mirrored {
  errc migrate(std::uintptr_t first, std::uintptr_t count) {
    return device.on_its_own(pages(first, count),
                             [&] { return primary.migrate_to_device(pages(first, count), &device); });
  }
  errc migrate_back(std::uintptr_t first, std::uintptr_t count) {
    return device.on_its_own(pages(first, count),
                             [&] { return primary.migrate_to_system(pages(first, count), &device); });
  }
  errc exclusive(std::uintptr_t first, std::uintptr_t count) {
    return device.on_its_own(pages(first, count), [&] { return primary.make_exclusive(pages(first, count), &device); });
  }
  bool on_device(std::uintptr_t page) { return device.snapshot(at(page)).device; }
};

/// A second address space over the same memory, to fork into.
struct child_of {
  const std::unique_ptr<dmirror::primary_type> owned;  // see hmm::mirrored
  dmirror::primary_type& primary = *owned;
  explicit child_of(mirrored& m) : owned(std::make_unique<dmirror::primary_type>(m.primary.memory())) {
    CHECK(m.primary.fork(primary) == errc::ok);
  }
  ~child_of() { CHECK(primary.exit() == errc::ok); }
  std::uint64_t get(std::uintptr_t page) {
    std::uint64_t value = 0;
    CHECK(primary.read(at(page), std::as_writable_bytes(std::span(&value, 1))) == errc::ok);
    return value;
  }
  void put(std::uintptr_t page, std::uint64_t value) {
    CHECK(primary.write(at(page), std::as_bytes(std::span(&value, 1))) == errc::ok);
  }
};

}  // namespace

TEST_CASE("anon_write_child: after a fork the device writes to the address space that it mirrors, and to no other") {
  mirrored m;
  for (std::uintptr_t i = 0; i < m.n; ++i) CHECK(m.seen(i) == 1000 + i);
  child_of child(m);
  for (std::uintptr_t i = 0; i < m.n; ++i) REQUIRE(m.device.store(at(i), 5000 + i) == errc::ok);
  for (std::uintptr_t i = 0; i < m.n; ++i) {
    CHECK(m.get(i) == 5000 + i);
    CHECK(child.get(i) == 1000 + i);
  }
  child.put(3, 7);
  CHECK(m.seen(3) == 5003);
}

TEST_CASE("anon_write_child: a device on the child writes to the child alone") {
  mirrored m;
  child_of child(m);
  dmirror device(child.primary);
  REQUIRE(device.open() == errc::ok);
  for (std::uintptr_t i = 0; i < 8; ++i) REQUIRE(device.store(at(i), 80 + i) == errc::ok);
  for (std::uintptr_t i = 0; i < 8; ++i) {
    CHECK(child.get(i) == 80 + i);
    CHECK(m.seen(i) == 1000 + i);
  }
  CHECK(device.close() == errc::ok);
}

TEST_CASE("anon_write_huge, compound: the device writes through a huge page, and follows when it is split") {
  mirrored m;
  REQUIRE(m.primary.map_huge(huge_range, protection::read_write) == errc::ok);
  for (std::uintptr_t i = 0; i < huge_pages; i += 7) REQUIRE(m.device.store(huge_at(i), i) == errc::ok);
  CHECK(m.device.snapshot(huge_at(0)).huge);
  REQUIRE(m.primary.protect({huge_at(100), huge_at(101)}, protection::read) == errc::ok);
  CHECK(m.device.store(huge_at(100), 1) == errc::access_denied);
  for (std::uintptr_t i = 0; i < huge_pages; i += 7) {
    std::uint64_t value = 0;
    REQUIRE(m.device.load(huge_at(i), value) == errc::ok);
    CHECK(value == i);
  }
}

TEST_CASE("migrate: pages go to the device's memory with what they hold, and the device works on them there") {
  device_memory m;
  REQUIRE(m.migrate(0, 32) == errc::ok);
  for (std::uintptr_t i = 0; i < 32; ++i) {
    CHECK(m.on_device(i));
    CHECK(m.seen(i) == 1000 + i);
    REQUIRE(m.device.store(at(i), 2000 + i) == errc::ok);
  }
  CHECK(m.on_device(31));
  CHECK_FALSE(m.on_device(32));
  REQUIRE(m.migrate_back(0, 32) == errc::ok);
  for (std::uintptr_t i = 0; i < 32; ++i) {
    CHECK_FALSE(m.on_device(i));
    CHECK(m.get(i) == 2000 + i);
  }
}

TEST_CASE(
    "migrate_fault: the processor brings back what it touches, with what the device wrote, and the device lets go") {
  device_memory m;
  for (unsigned round = 0; round < 3; ++round) {
    REQUIRE(m.migrate(0, 16) == errc::ok);
    for (std::uintptr_t i = 0; i < 16; ++i) REQUIRE(m.device.store(at(i), 100 * round + i) == errc::ok);
    for (std::uintptr_t i = 0; i < 16; i += 2) {
      CHECK(m.get(i) == 100 * round + i);
      CHECK_FALSE(m.on_device(i));
      CHECK_FALSE(m.device.mapped(at(i)));
      CHECK(m.on_device(i + 1));
      CHECK(m.device.mapped(at(i + 1)));
    }
    m.put(0, 9);
    CHECK(m.seen(0) == 9);
  }
}

TEST_CASE("migrate_multiple, migrate_mixed: pages in many pieces, with holes and pages that are elsewhere already") {
  device_memory m;
  REQUIRE(m.primary.unmap(pages(5, 2)) == errc::ok);
  REQUIRE(m.primary.swap_out(pages(8, 1)) == errc::ok);
  REQUIRE(m.primary.protect(pages(10, 1), protection::read) == errc::ok);
  REQUIRE(m.migrate(2, 1) == errc::ok);
  REQUIRE(m.migrate(0, 16) == errc::ok);
  for (const std::uintptr_t i : std::array<std::uintptr_t, 10>{0, 1, 2, 3, 4, 7, 9, 10, 11, 15}) {
    CHECK(m.on_device(i));
    CHECK(m.seen(i) == 1000 + i);
  }
  CHECK_FALSE(m.on_device(8));
  CHECK(m.seen(8) == 1008);
  std::uint64_t value = 0;
  CHECK(m.device.load(at(5), value) == errc::not_mapped);
  CHECK(m.device.store(at(10), 1) == errc::access_denied);
  for (std::uintptr_t i = 0; i < 60; i += 4) REQUIRE(m.migrate(i, 4) == errc::ok);
  for (std::uintptr_t i = 0; i < 60; ++i) {
    if (i != 5 && i != 6) CHECK(m.get(i) == 1000 + i);
  }
}

TEST_CASE("migrate_shared: pages that a fork shares go to the device from here, and the child keeps its own") {
  device_memory m;
  child_of child(m);
  REQUIRE(m.migrate(0, 8) == errc::ok);
  for (std::uintptr_t i = 0; i < 8; ++i) REQUIRE(m.device.store(at(i), 50 + i) == errc::ok);
  for (std::uintptr_t i = 0; i < 8; ++i) {
    CHECK(child.get(i) == 1000 + i);
    CHECK(m.get(i) == 50 + i);
  }
}

TEST_CASE("migrate_release: an exit while pages are on the device frees them") {
  device_memory m;
  const std::size_t free = m.primary.memory().device.free_count();
  REQUIRE(m.migrate(0, 32) == errc::ok);
  CHECK(m.seen(3) == 1003);
  CHECK(m.primary.memory().device.free_count() == free - 32);
  REQUIRE(m.primary.exit() == errc::ok);
  CHECK(m.primary.memory().device.free_count() == free);
  CHECK_FALSE(m.device.mapped(at(3)));
}

TEST_CASE("hmm_cow_in_device: a fork of what is on the device, and both sides write") {
  device_memory m;
  REQUIRE(m.migrate(0, 8) == errc::ok);
  for (std::uintptr_t i = 0; i < 8; ++i) REQUIRE(m.device.store(at(i), 50 + i) == errc::ok);
  child_of child(m);
  for (std::uintptr_t i = 0; i < 8; ++i) child.put(i, 90 + i);
  for (std::uintptr_t i = 0; i < 8; ++i) {
    CHECK(m.seen(i) == 50 + i);
    REQUIRE(m.device.store(at(i), 60 + i) == errc::ok);
    CHECK(child.get(i) == 90 + i);
    CHECK(m.get(i) == 60 + i);
  }
}

TEST_CASE("migrate_partial_unmap_fault: part of what is on the device is unmapped, the rest comes back") {
  device_memory m;
  REQUIRE(m.migrate(0, 16) == errc::ok);
  REQUIRE(m.primary.unmap(pages(4, 8)) == errc::ok);
  for (std::uintptr_t i = 0; i < 16; ++i) {
    std::uint64_t value = 0;
    if (i >= 4 && i < 12) {
      CHECK(m.device.load(at(i), value) == errc::not_mapped);
    } else {
      CHECK(m.get(i) == 1000 + i);
    }
  }
}

TEST_CASE("migrate_remap_fault: what is on the device is moved to another address, and comes back there") {
  device_memory m;
  REQUIRE(m.migrate(0, 8) == errc::ok);
  for (std::uintptr_t i = 0; i < 8; ++i) REQUIRE(m.device.store(at(i), 50 + i) == errc::ok);
  REQUIRE(m.primary.move(pages(0, 8), at(200)) == errc::ok);
  std::uint64_t value = 0;
  CHECK(m.device.load(at(3), value) == errc::not_mapped);
  CHECK(m.seen(204) == 54);
  CHECK(m.get(203) == 53);
  CHECK_FALSE(m.on_device(203));
}

TEST_CASE("migrate_anon_huge: empty, zero and written huge pages go to the device page by page, and back") {
  device_memory m;
  REQUIRE(m.primary.map_huge(huge_range, protection::read_write) == errc::ok);
  const range part{huge_at(0), huge_at(64)};
  for (std::uintptr_t i = 0; i < 64; i += 2) REQUIRE(m.device.store(huge_at(i), 7 + i) == errc::ok);
  const auto there = [&] { return m.primary.migrate_to_device(part, &m.device); };
  REQUIRE(m.device.on_its_own(part, there) == errc::ok);
  for (std::uintptr_t i = 0; i < 64; ++i) {
    std::uint64_t value = 1;
    REQUIRE(m.device.load(huge_at(i), value) == errc::ok);
    CHECK(value == (i % 2 == 0 ? 7 + i : 0));
  }
  for (std::uintptr_t i = 0; i < 64; ++i) {
    std::uint64_t value = 1;
    REQUIRE(m.primary.read(huge_at(i), std::as_writable_bytes(std::span(&value, 1))) == errc::ok);
    CHECK(value == (i % 2 == 0 ? 7 + i : 0));
  }
}

TEST_CASE("migrate_anon_huge_err: what does not fit on the device stays where it is, with what it holds") {
  device_memory m;
  REQUIRE(m.primary.map_huge(huge_range, protection::read_write) == errc::ok);
  REQUIRE(m.device.store(huge_at(300), 3) == errc::ok);
  const auto there = [&] { return m.primary.migrate_to_device(huge_range, &m.device); };
  CHECK(m.device.on_its_own(huge_range, there) == errc::no_memory);
  CHECK(m.device.snapshot(huge_at(300)).present);
  std::uint64_t value = 0;
  CHECK(m.device.load(huge_at(300), value) == errc::ok);
  CHECK(value == 3);
}

TEST_CASE("exclusive: a page that is the device's alone is the processor's again when it touches it") {
  device_memory m;
  REQUIRE(m.exclusive(0, 4) == errc::ok);
  for (std::uintptr_t i = 0; i < 4; ++i) {
    CHECK(m.device.snapshot(at(i)).exclusive);
    REQUIRE(m.device.store(at(i), 70 + i) == errc::ok);
  }
  CHECK(m.get(1) == 71);
  CHECK_FALSE(m.device.snapshot(at(1)).exclusive);
  CHECK_FALSE(m.device.mapped(at(1)));  // it was told, although the page is the same
  CHECK(m.device.snapshot(at(2)).exclusive);
  CHECK(m.device.mapped(at(2)));
  m.put(1, 5);
  CHECK(m.seen(1) == 5);
}

TEST_CASE("exclusive_mprotect: protection withdraws an exclusive page's write access as any other's") {
  device_memory m;
  REQUIRE(m.exclusive(0, 4) == errc::ok);
  REQUIRE(m.device.store(at(0), 70) == errc::ok);
  REQUIRE(m.primary.protect(pages(0, 4), protection::read) == errc::ok);
  CHECK(m.device.store(at(0), 71) == errc::access_denied);
  CHECK(m.get(0) == 70);
  CHECK(m.exclusive(0, 4) == errc::access_denied);
}

TEST_CASE("exclusive_cow: taking a page that a fork shares gives this side its own") {
  device_memory m;
  child_of child(m);
  REQUIRE(m.exclusive(0, 4) == errc::ok);
  for (std::uintptr_t i = 0; i < 4; ++i) REQUIRE(m.device.store(at(i), 70 + i) == errc::ok);
  for (std::uintptr_t i = 0; i < 4; ++i) {
    CHECK(child.get(i) == 1000 + i);
    CHECK(m.get(i) == 70 + i);
  }
}

TEST_CASE("exclusive: an increment of the device is never lost to the processor's, and the other way round") {
  device_memory m;
  m.put(0, 0);
  std::atomic<unsigned> wrong{0};
  std::atomic<bool> over{false};
  std::atomic<std::uint64_t> by_processor{0};
  std::uint64_t by_device = 0;
  std::thread processor([&] {
    for (std::uint64_t n = 1; !over.load(); by_processor.store(n++)) {
      std::uint64_t value = 0;
      while (m.primary.compare_exchange(hva{at(0)}, value, value + 1) == errc::again) {
      }
      if (n % 4 == 0) wrong.fetch_add(m.primary.migrate(pages(0, 1)) == errc::ok ? 0 : 1);  // another frame
    }
  });
  for (unsigned i = 0; i < 10; ++i) {
    wrong.fetch_add(m.exclusive(0, 1) == errc::ok ? 0 : 1);
    for (const std::uint64_t then = by_processor.load(); by_processor.load() < then + 6; ++by_device) {
      std::this_thread::yield();
      wrong.fetch_add(m.device.add(at(0), 1) == errc::ok ? 0 : 1);  // while the processor takes the page back
    }
  }
  over.store(true);
  processor.join();
  CHECK(wrong.load() == 0);
  CHECK(m.get(0) == by_processor + by_device);
}

TEST_CASE("migrate: the device's pages go to and fro under the processor's hands, and no write is lost") {
  device_memory m;
  for (std::uintptr_t i = 0; i < 8; ++i) m.put(i, 0);
  std::atomic<bool> over{false};
  std::atomic<unsigned> wrong{0}, rounds{0};
  std::thread migrating([&] {
    for (unsigned i = 0; !over.load(); rounds.store(++i)) {
      const errc there = m.migrate(0, 8);
      const errc back = i % 3 == 0 ? m.migrate_back(0, 8) : errc::ok;
      wrong.fetch_add(there == errc::ok && back == errc::ok ? 0 : 1);
    }
  });
  std::array<std::uint64_t, 8> expected{};
  for (std::uint64_t k = 1; k < 400; ++k) {
    const std::uintptr_t i = k % 8;
    if (k % 3 == 0) {
      m.put(i, expected[i] = k);
    } else if (k % 3 == 1) {
      wrong.fetch_add(m.device.store(at(i), expected[i] = k) == errc::ok ? 0 : 1);
    } else {
      wrong.fetch_add(m.get(i) == expected[i] ? 0 : 1);
      wrong.fetch_add(m.seen(i) == expected[i] ? 0 : 1);
    }
    if (k % 50 == 0) {
      for (const unsigned then = rounds.load(); rounds.load() == then;) std::this_thread::yield();
    }
  }
  over.store(true);
  migrating.join();
  CHECK(wrong.load() == 0);
  for (std::uintptr_t i = 0; i < 8; ++i) CHECK(m.get(i) == expected[i]);
}
