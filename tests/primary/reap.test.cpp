// SPDX-License-Identifier: MIT

// Reaping without waiting, area by area.

#include "mmu_fixture.hpp"

#include <thread>

using namespace mmu_tests;

namespace {

/// Three areas: pages 0 to 3 with two pages, 10 to 13 with one page and one in swap, 20 to 22 with nothing.
struct three_areas {
  three_areas() : ram(32, 16, 8), mmu(ram), child(ram) {
    REQUIRE(mmu.map(pages(0, 4), protection::read_write) == errc::ok);
    REQUIRE(mmu.map(pages(10, 14), protection::read_write) == errc::ok);
    REQUIRE(mmu.map(pages(20, 22), protection::read_write) == errc::ok);
    for (const std::uintptr_t page : page_list{0, 1, 10, 11}) REQUIRE(put(mmu, page, 100 + page) == errc::ok);
    REQUIRE(mmu.swap_out(pages(11, 12)) == errc::ok);
  }
  physical_memory ram;
  mmu_type mmu, child;
};

TEST_CASE("reaping takes the pages of each area away, in a clear bracket that does not block") {
  three_areas f;
  watcher w{f.mmu, {0, 10}};
  const reap_answer answer = f.mmu.reap();
  CHECK(answer);
  CHECK(answer.reaped == 4);
  CHECK(answer.refused == 0);
  CHECK(w.take() == seen_list{{event::clear, 0, 4}, {event::clear, 10, 14}});
  CHECK(f.ram.frames.free_count() == 32);
  CHECK(f.ram.swap.free_count() == 16);
  CHECK(f.mmu.areas_locked().size() == 3);
  CHECK(get(f.mmu, 0) == 0);
  CHECK(f.mmu.statistics().reaped == 4);
  sound(f.mmu);
}

TEST_CASE("P3: an area that somebody refuses is left exactly as it was, and reported; the others are reaped") {
  for (const std::uintptr_t refused : page_list{0, 10}) {
    three_areas f;
    watcher w{f.mmu, {0, 1, 10, 11}};
    w.refuses = pages(refused, refused + 1);
    const translation before = look(f.mmu, refused);
    const reap_answer answer = f.mmu.reap();
    CHECK_FALSE(answer);
    CHECK(answer.error == errc::ok);
    CHECK(answer.refused == 1);
    CHECK(answer.first_refused == pages(refused, refused + 4));
    CHECK(answer.reaped == 2);
    CHECK(look(f.mmu, refused).frame == before.frame);
    CHECK(look(f.mmu, refused).writable);
    CHECK(get(f.mmu, refused) == 100 + refused);
    CHECK(get(f.mmu, 10 - refused) == 0);
    sound(f.mmu);
    // Tried again when nobody refuses any more, it is complete.
    w.refuses.reset();
    w.remember();
    CHECK(f.mmu.reap());
    CHECK(f.ram.frames.free_count() == 32);
  }
}

TEST_CASE("a refusing secondary keeps what it has mapped, and it is right") {
  three_areas f;
  mirror m{f.mmu};
  REQUIRE(m.access(at(0), true, [](std::atomic_ref<std::uint64_t> w) { w.store(5); }));
  m.refuse(true);
  CHECK(f.mmu.reap().refused == 2);
  CHECK(m.size() == 1);
  CHECK(m.agrees());
  CHECK(get(f.mmu, 0) == 5);
  m.refuse(false);
  CHECK(f.mmu.reap());
  CHECK(m.size() == 0);
  sound(f.mmu);
}

TEST_CASE("pages on loan, shared, huge, exclusive and with a device are reaped as well") {
  physical_memory ram{3 * block, 8, 8};
  mmu_type mmu{ram}, child{ram};
  REQUIRE(mmu.map_huge(pages(0, block), protection::read_write) == errc::ok);
  REQUIRE(mmu.map(pages(block, block + 8), protection::read_write) == errc::ok);
  for (std::uintptr_t page = block; page < block + 4; ++page) REQUIRE(put(mmu, page, page) == errc::ok);
  REQUIRE(mmu.fork(child) == errc::ok);
  REQUIRE(mmu.migrate_to_device(pages(block, block + 1), &ram) == errc::ok);
  REQUIRE(mmu.make_exclusive(pages(block + 1, block + 2), &ram) == errc::ok);
  const frame_lease lease = mmu.pin(hva{at(block + 2)}, true);
  REQUIRE(mmu.reap());
  CHECK(get(child, block) == block);
  CHECK(look(child, 0).huge);
  CHECK(word_at<std::uint64_t>(mmu.data(lease.frame)).load() == block + 2);
  mmu.unpin(lease.frame);
  CHECK(ram.device.free_count() == 8);
  CHECK(ram.frames.free_count() == 2 * block - 4);
  sound(mmu, child);
}

TEST_CASE("reaping does not wait for the tables, and not for itself") {
  three_areas f;
  {
    const auto held = f.mmu.lock_tables();
    std::thread([&] { CHECK(f.mmu.reap().error == errc::again); }).join();
  }
  watcher w{f.mmu};
  static mmu_type* called = nullptr;
  static errc inside = errc::ok;
  called = &f.mmu;
  w.at_start = [] { inside = called->reap().error; };
  REQUIRE(f.mmu.unmap(pages(20, 21)) == errc::ok);
  CHECK(inside == errc::would_deadlock);
  w.at_start = nullptr;
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(f.mmu.reap().error == errc::released);
}

}  // namespace
