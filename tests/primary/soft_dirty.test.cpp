// SPDX-License-Identifier: MIT

// Soft-dirty tracking: who has been written since?

#include "mmu_fixture.hpp"

using namespace mmu_tests;

namespace {

struct tracked_space {
  tracked_space() : ram(32, 16, 8), mmu(ram), child(ram) {
    REQUIRE(mmu.map(pages(0, 8), protection::read_write) == errc::ok);
    for (std::uintptr_t page = 0; page < 4; ++page) REQUIRE(put(mmu, page, 100 + page) == errc::ok);
  }
  bool dirty(std::uintptr_t page) { return mmu.soft_dirty(pages(page, page + 1)).dirty; }
  void clean() { REQUIRE(mmu.clear_soft_dirty(pages(0, 8)) == errc::ok); }
  physical_memory ram;
  mmu_type mmu, child;
};

TEST_CASE(
    "clearing brackets the range with soft_dirty and write-protects; the first write marks the page, without one") {
  tracked_space f;
  CHECK(f.dirty(0));
  CHECK(f.dirty(7));  // it was mapped since
  watcher w{f.mmu, {0, 1}};
  f.clean();
  CHECK(w.take() == seen_list{{event::soft_dirty, 0, 8}});
  CHECK_FALSE(look(f.mmu, 0).writable);
  CHECK_FALSE(f.mmu.soft_dirty(pages(0, 8)));
  CHECK(get(f.mmu, 0) == 100);
  CHECK_FALSE(f.dirty(0));
  const pfn frame = look(f.mmu, 0).frame;
  REQUIRE(put(f.mmu, 0, 1) == errc::ok);
  CHECK(w.take().empty());  // the page is where it was, and may be written: nobody's translation is wrong
  CHECK(look(f.mmu, 0).frame == frame);
  CHECK(f.dirty(0));
  CHECK_FALSE(f.dirty(1));
  CHECK(look(f.mmu, 0).writable);
  sound(f.mmu);
}

TEST_CASE("a page that is first read and then written is dirty after the write") {
  tracked_space f;
  f.clean();
  CHECK(get(f.mmu, 6) == 0);
  CHECK_FALSE(f.dirty(6));
  CHECK_FALSE(look(f.mmu, 6).writable);
  REQUIRE(put(f.mmu, 6, 1) == errc::ok);
  CHECK(f.dirty(6));
  sound(f.mmu);
}

TEST_CASE("O1: writes of a secondary are seen, because it has to fault") {
  tracked_space f;
  mirror m{f.mmu};
  REQUIRE(m.access(at(1), true, [](std::atomic_ref<std::uint64_t> w) { w.store(5); }));
  f.clean();
  REQUIRE(m.access(at(1), false, [](std::atomic_ref<std::uint64_t> w) { CHECK(w.load() == 5); }));
  CHECK_FALSE(f.dirty(1));
  REQUIRE(m.access(at(1), true, [](std::atomic_ref<std::uint64_t> w) { w.store(6); }));
  CHECK(f.dirty(1));
  CHECK(m.agrees());
  sound(f.mmu);
}

TEST_CASE("swapping, migrating, merging, collapsing and a device's reading make nothing dirty, and forget nothing") {
  tracked_space f;
  f.clean();
  REQUIRE(put(f.mmu, 1, 1) == errc::ok);
  const auto check = [&] {
    CHECK_FALSE(f.dirty(0));
    CHECK(f.dirty(1));
    CHECK(get(f.mmu, 0) == 100);
    CHECK(get(f.mmu, 1) == 1);
    CHECK_FALSE(f.dirty(0));
    CHECK(f.dirty(1));
    sound(f.mmu);
  };
  REQUIRE(f.mmu.swap_out(pages(0, 4)) == errc::ok);
  check();
  REQUIRE(f.mmu.migrate(pages(0, 4)) == errc::ok);
  check();
  REQUIRE(f.mmu.migrate_to_device(pages(0, 4), &f) == errc::ok);
  CHECK(f.mmu.find_owned(hva{at(0)}, &f, false));
  check();
  REQUIRE(f.mmu.merge_equal(pages(0, 8)));
  check();
  REQUIRE(f.mmu.fork(f.child) == errc::ok);
  check();
  CHECK_FALSE(f.child.soft_dirty(pages(0, 1)));
  CHECK(f.child.soft_dirty(pages(1, 2)));
  sound(f.mmu, f.child);
}

TEST_CASE("a device that writes makes its page dirty, in its memory or exclusively") {
  tracked_space f;
  REQUIRE(f.mmu.migrate_to_device(pages(0, 1), &f) == errc::ok);
  REQUIRE(f.mmu.make_exclusive(pages(1, 2), &f) == errc::ok);
  f.clean();
  for (const std::uintptr_t page : page_list{0, 1}) {
    CHECK_FALSE(f.dirty(page));
    CHECK(f.mmu.find_owned(hva{at(page)}, &f, false));
    CHECK_FALSE(f.dirty(page));
    CHECK(f.mmu.find_owned(hva{at(page)}, &f, true));
    CHECK(f.dirty(page));
  }
  sound(f.mmu);
}

TEST_CASE("what is mapped or moved to a clean place is dirty, and so is what is mapped again") {
  tracked_space f;
  f.clean();
  REQUIRE(f.mmu.unmap(pages(2, 3)) == errc::ok);
  REQUIRE(f.mmu.map(pages(2, 3), protection::read_write) == errc::ok);
  CHECK(f.dirty(2));
  REQUIRE(f.mmu.move(pages(3, 4), at(5)) == errc::ok);
  CHECK(f.dirty(5));
  CHECK_FALSE(f.dirty(0));
  CHECK(get(f.mmu, 5) == 103);
  CHECK(f.mmu.soft_dirty(pages(0, 8)));
  sound(f.mmu);
}

TEST_CASE("protect does not open a clean page to unseen writes") {
  tracked_space f;
  f.clean();
  REQUIRE(put(f.mmu, 1, 1) == errc::ok);
  REQUIRE(f.mmu.protect(pages(0, 4), protection::read) == errc::ok);
  sound(f.mmu);
  REQUIRE(f.mmu.protect(pages(0, 4), protection::read_write) == errc::ok);
  CHECK_FALSE(look(f.mmu, 0).writable);
  CHECK(look(f.mmu, 1).writable);
  CHECK_FALSE(f.dirty(0));
  sound(f.mmu);
}

TEST_CASE("a part can be cleared, and bad ranges are refused") {
  tracked_space f;
  REQUIRE(f.mmu.clear_soft_dirty(pages(1, 2)) == errc::ok);
  CHECK(f.mmu.areas_locked().size() == 3);
  CHECK(f.dirty(0));
  CHECK_FALSE(f.dirty(1));
  CHECK(f.dirty(2));
  f.clean();
  CHECK(f.mmu.areas_locked().size() == 1);
  CHECK(f.mmu.clear_soft_dirty(paged_memory::whole()) == errc::ok);
  CHECK(f.mmu.clear_soft_dirty(pages(20, 21)) == errc::not_mapped);
  CHECK(f.mmu.soft_dirty(pages(20, 21)).error == errc::not_mapped);
  CHECK(f.mmu.clear_soft_dirty({at(0), at(0) + 1}) == errc::bad_range);
  CHECK(f.mmu.soft_dirty({at(0), at(0)}).error == errc::bad_range);
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(f.mmu.clear_soft_dirty(pages(0, 1)) == errc::released);
  CHECK(f.mmu.soft_dirty(pages(0, 1)).error == errc::released);
}

}  // namespace
