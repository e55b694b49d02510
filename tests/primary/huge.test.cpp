// SPDX-License-Identifier: MIT

// Huge pages: mapping, splitting, collapsing.

#include "mmu_fixture.hpp"

#include <cstddef>
#include <memory>

using namespace mmu_tests;

namespace {

/// Two blocks, of which the first is a huge page; pages 0, 5 and 511 hold 100 + page.
struct huge_space {
  explicit huge_space(std::size_t frames = 4 * block, std::size_t swap = 1024)
      : ram(frames, swap, 16), mmu(ram), child(ram) {
    REQUIRE(mmu.map_huge(pages(0, block), protection::read_write) == errc::ok);
    for (const std::uintptr_t page : page_list{0, 5, 511}) REQUIRE(put(mmu, page, 100 + page) == errc::ok);
  }
  bool huge(std::uintptr_t page = 0) { return look(mmu, page).huge; }
  void contents(mmu_type& m, std::uintptr_t from = 0) {
    for (const std::uintptr_t page : page_list{0, 5, 511}) {
      if (look(m, from + page).error == errc::ok) CHECK(get(m, from + page) == 100 + page);
    }
  }
  physical_memory ram;
  mmu_type mmu, child;
};

TEST_CASE("map_huge maps aligned blocks of frames at once, zeroed and writable") {
  mmu_type mmu{3 * block, 8};
  watcher w{mmu, {0}};
  REQUIRE(mmu.map_huge(pages(0, 2 * block), protection::read_write) == errc::ok);
  CHECK(w.take().empty());
  CHECK(mmu.frames().free_count() == block);
  const translation first = look(mmu, 0);
  CHECK(first.huge);
  CHECK(first.writable);
  CHECK(first.frame.value % block == 0);
  for (std::uintptr_t page = 0; page < block; ++page) CHECK(look(mmu, page).frame == first.frame + page);
  CHECK(get(mmu, 700) == 0);
  CHECK(mmu.statistics().faults == 0);
  sound(mmu);
}

TEST_CASE("map_huge refuses what is not aligned, mapped, or more than there is, and changes nothing") {
  mmu_type mmu{2 * block, 8};
  CHECK(mmu.map_huge(pages(0, 5), protection::read) == errc::bad_range);
  CHECK(mmu.map_huge(pages(1, block + 1), protection::read) == errc::bad_range);
  CHECK(mmu.map_huge(pages(0, block), protection{9}) == errc::access_denied);
  CHECK(mmu.map_huge(pages(0, 3 * block), protection::read) == errc::no_memory);
  REQUIRE(mmu.map(pages(3, 4), protection::read_write) == errc::ok);
  REQUIRE(put(mmu, 3, 1) == errc::ok);
  CHECK(mmu.map_huge(pages(0, block), protection::read) == errc::overlap);
  CHECK(mmu.map_huge(pages(block, 3 * block), protection::read) == errc::no_memory);  // one frame is taken
  CHECK(mmu.map_huge({0, std::uintptr_t{1} << 57}, protection::read) == errc::overlap);
  CHECK(mmu.frames().free_count() == 2 * block - 1);
  CHECK(mmu.areas_locked().size() == 1);
  CHECK(mmu.map_huge(pages(block, 2 * block), protection::read) == errc::ok);
  sound(mmu);
}

TEST_CASE("unmapping a part splits first, in a clear bracket over the block") {
  huge_space f;
  watcher w{f.mmu, {0, 5}};
  REQUIRE(f.mmu.unmap(pages(5, 6)) == errc::ok);
  CHECK(w.take() == seen_list{{event::clear, 0, block}, {event::unmap, 5, 6}});
  CHECK_FALSE(f.huge());
  CHECK(f.mmu.statistics().split == 1);
  f.contents(f.mmu);
  sound(f.mmu);
  REQUIRE(f.mmu.unmap(pages(0, block)) == errc::ok);
  CHECK(f.ram.frames.free_count() == 4 * block);
}

TEST_CASE("unmapping or protecting the whole keeps it in one piece until it is gone") {
  huge_space f;
  watcher w{f.mmu, {0}};
  REQUIRE(f.mmu.protect(pages(0, block), protection::read) == errc::ok);
  CHECK(f.huge());
  CHECK_FALSE(look(f.mmu, 0).writable);
  REQUIRE(f.mmu.protect(pages(0, block), protection::read_write) == errc::ok);
  CHECK(f.huge());
  CHECK(look(f.mmu, 9).writable);
  sound(f.mmu);
  REQUIRE(f.mmu.unmap(pages(0, block)) == errc::ok);
  CHECK(w.take() ==
        seen_list{{event::protection_vma, 0, block}, {event::protection_vma, 0, block}, {event::unmap, 0, block}});
  CHECK(f.mmu.statistics().split == 0);
  CHECK(f.ram.frames.free_count() == 4 * block);
}

TEST_CASE("every operation on a part splits, and the contents stay") {
  const auto parts =
      std::vector<errc (*)(mmu_type&)>{[](mmu_type& m) { return m.protect(pages(5, 6), protection::read); },
                                       [](mmu_type& m) { return m.swap_out(pages(5, 6)); },
                                       [](mmu_type& m) { return m.migrate(pages(5, 6)); },
                                       [](mmu_type& m) { return m.migrate_to_device(pages(5, 6), &m); },
                                       [](mmu_type& m) { return m.make_exclusive(pages(5, 6), &m); },
                                       [](mmu_type& m) { return m.clear_soft_dirty(pages(5, 6)); },
                                       [](mmu_type& m) { return m.move(pages(5, 6), at(1000)); },
                                       [](mmu_type& m) { return m.merge_equal(pages(5, 8)).error; }};
  for (const auto operation : parts) {
    huge_space f;
    watcher w{f.mmu};
    REQUIRE(operation(f.mmu) == errc::ok);
    CHECK_FALSE(f.huge());
    CHECK(w.take().front() == bracket_seen{event::clear, 0, block});
    f.contents(f.mmu);
    sound(f.mmu);
  }
}

TEST_CASE("a move by a multiple of 2 MiB keeps a huge page, another does not") {
  for (const std::uintptr_t to : page_list{4 * block, 4 * block + 1}) {
    huge_space f;
    watcher w{f.mmu, {0}};
    REQUIRE(f.mmu.move(pages(0, block), at(to)) == errc::ok);
    CHECK(w.take() == seen_list{{event::unmap, 0, block}});
    CHECK(look(f.mmu, to).huge == (to == 4 * block));
    CHECK_FALSE(f.huge());
    f.contents(f.mmu, to);
    sound(f.mmu);
  }
}

TEST_CASE("a fork shares a huge page as one, and a write splits it and copies one page") {
  huge_space f;
  REQUIRE(f.mmu.fork(f.child) == errc::ok);
  CHECK(look(f.child, 0).huge);
  CHECK(f.huge());
  CHECK(f.ram.frames.free_count() == 3 * block);
  sound(f.mmu, f.child);
  watcher w{f.child, {5}};
  REQUIRE(put(f.child, 5, 7) == errc::ok);
  CHECK(w.take() == seen_list{{event::clear, 0, block}, {event::clear, 5, 6}});
  CHECK_FALSE(look(f.child, 0).huge);
  CHECK(f.huge());
  CHECK(f.ram.frames.free_count() == 3 * block - 1);
  f.contents(f.mmu);
  sound(f.mmu, f.child);
}

TEST_CASE("a fork with one page of a huge one on loan gives the child small pages") {
  huge_space f;
  const frame_lease lease = f.mmu.pin(hva{at(5)}, true);
  REQUIRE(lease);
  REQUIRE(f.mmu.fork(f.child) == errc::ok);
  CHECK(f.huge());
  CHECK_FALSE(look(f.child, 0).huge);
  CHECK(look(f.child, 5).frame != lease.frame);
  f.mmu.unpin(lease.frame);
  f.contents(f.child);
  sound(f.mmu, f.child);
}

/// A block of small pages in every state: present, swapped out, never touched.
struct small_pages {
  explicit small_pages(std::size_t frames) : ram(frames, 16), mmu(ram) {
    REQUIRE(mmu.map(pages(0, 2 * block), protection::read_write) == errc::ok);
    for (std::uintptr_t page = 0; page < 8; ++page) REQUIRE(put(mmu, page * 64, 100 + page) == errc::ok);
    REQUIRE(mmu.swap_out(pages(64, 129)) == errc::ok);
  }
  physical_memory ram;
  mmu_type mmu;
};

TEST_CASE("collapse makes a huge page of small ones, in one clear bracket, and frees the old frames after it") {
  small_pages f{2 * block};
  watcher w{f.mmu, {0, 64, 1}};
  REQUIRE(f.mmu.collapse(pages(0, 2 * block)) == errc::ok);
  CHECK(w.take() == seen_list{{event::clear, 0, block}});
  CHECK(look(f.mmu, 0).huge);
  CHECK(look(f.mmu, 1).writable);
  CHECK(look(f.mmu, 0).young);
  CHECK_FALSE(look(f.mmu, 1).young);
  CHECK_FALSE(look(f.mmu, block).huge);
  CHECK(f.ram.frames.free_count() == block);
  CHECK(f.ram.swap.free_count() == 16);
  for (std::uintptr_t page = 0; page < 8; ++page) CHECK(get(f.mmu, page * 64) == 100 + page);
  CHECK(get(f.mmu, 1) == 0);
  CHECK(f.mmu.statistics().collapsed == 1);
  sound(f.mmu);
  CHECK(f.mmu.collapse(pages(0, 2 * block)) == errc::ok);  // nothing is left to collapse
  CHECK(w.take().empty());
}

TEST_CASE("collapse leaves alone what is on loan, with a device, cut by areas, or only partly asked for") {
  {
    small_pages f{2 * block};
    const frame_lease lease = f.mmu.pin(hva{at(0)}, true);
    REQUIRE(f.mmu.collapse(pages(0, block)) == errc::ok);
    CHECK_FALSE(look(f.mmu, 0).huge);
    CHECK(look(f.mmu, 0).frame == lease.frame);
    CHECK(f.mmu.statistics().skipped_pinned == 1);
    word_at<std::uint64_t>(f.mmu.data(lease.frame)).store(77, std::memory_order_relaxed);
    CHECK(get(f.mmu, 0) == 77);
    f.mmu.unpin(lease.frame);
    CHECK(f.ram.frames.free_count() == 2 * block - 6);
    sound(f.mmu);
  }
  small_pages f{2 * block};
  watcher w{f.mmu};
  CHECK(f.mmu.collapse(pages(1, block)) == errc::ok);
  CHECK(f.mmu.collapse(pages(0, block - 1)) == errc::ok);
  CHECK(w.take().empty());
  REQUIRE(f.mmu.make_exclusive(pages(7, 8), &f) == errc::ok);
  w.take();
  CHECK(f.mmu.collapse(pages(0, block)) == errc::ok);
  CHECK(w.take().empty());
  CHECK(get(f.mmu, 7) == 0);
  REQUIRE(f.mmu.protect(pages(9, 10), protection::read) == errc::ok);
  w.take();
  CHECK(f.mmu.collapse(pages(0, block)) == errc::ok);
  CHECK(w.take().empty());
  CHECK(f.mmu.collapse(pages(5000, 6000)) == errc::not_mapped);
  CHECK(f.mmu.collapse({at(0) + 1, at(2)}) == errc::bad_range);
  sound(f.mmu);
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(f.mmu.collapse(pages(0, block)) == errc::released);
  CHECK(f.mmu.map_huge(pages(0, block), protection::read) == errc::released);
}

TEST_CASE("collapse without a free block fails, and everything is as before") {
  small_pages f{block + 3};  // 6 frames are in use, and the free ones are no block
  watcher w{f.mmu, {0, 64}};
  const std::size_t free = f.ram.frames.free_count();
  CHECK(f.mmu.collapse(pages(0, block)) == errc::no_memory);
  CHECK(w.take().empty());
  CHECK(look(f.mmu, 64).swapped);
  CHECK(f.ram.frames.free_count() == free);
  sound(f.mmu);
  // Two blocks to collapse and frames for one: neither is.
  small_pages g{3 * block};
  REQUIRE(put(g.mmu, block, 1) == errc::ok);
  const frame_lease last = g.mmu.pin(hva{at(block)}, false);
  for (std::uintptr_t page = block + 1; page < 2 * block; ++page) REQUIRE(put(g.mmu, page, 1) == errc::ok);
  g.mmu.unpin(last.frame);
  watcher v{g.mmu, {0}};
  CHECK(g.mmu.collapse(pages(0, 2 * block)) == errc::no_memory);
  CHECK(v.take().empty());
  sound(g.mmu);
}

TEST_CASE("a collapse undoes sharing: the block is this address space's own") {
  physical_memory ram{4 * block, 8};
  mmu_type parent{ram}, child{ram};
  REQUIRE(parent.map(pages(0, block), protection::read_write) == errc::ok);
  REQUIRE(put(parent, 3, 33) == errc::ok);
  REQUIRE(parent.fork(child) == errc::ok);
  REQUIRE(child.collapse(pages(0, block)) == errc::ok);
  CHECK(look(child, 3).writable);
  REQUIRE(put(child, 3, 34) == errc::ok);
  CHECK(look(child, 0).huge);
  CHECK(get(parent, 3) == 33);
  sound(parent, child);
}

TEST_CASE("what was clean stays clean in a huge page, and the first write splits it") {
  huge_space f;
  REQUIRE(f.mmu.clear_soft_dirty(pages(0, block)) == errc::ok);
  CHECK(f.huge());
  watcher w{f.mmu, {5}};
  REQUIRE(put(f.mmu, 5, 105) == errc::ok);
  CHECK(w.take() == seen_list{{event::clear, 0, block}});
  CHECK(f.mmu.soft_dirty(pages(5, 6)));
  CHECK_FALSE(f.mmu.soft_dirty(pages(6, block)));
  REQUIRE(f.mmu.collapse(pages(0, block)) == errc::ok);
  CHECK(f.huge());
  CHECK_FALSE(f.mmu.soft_dirty(pages(6, block)));
  CHECK_FALSE(look(f.mmu, 5).writable);
  f.contents(f.mmu);
  sound(f.mmu);
}

TEST_CASE("mapping_shift tells huge pages from small ones, and answers for any address") {
  huge_space f;
  REQUIRE(f.mmu.map(pages(block, 2 * block), protection::read_write) == errc::ok);
  REQUIRE(put(f.mmu, block, 1) == errc::ok);
  CHECK(f.mmu.mapping_shift(hva{at(0)}) == 21);
  CHECK(f.mmu.mapping_shift(hva{at(511) + 4095}) == 21);
  CHECK(f.mmu.mapping_shift(hva{at(block)}) == 12);
  CHECK(f.mmu.mapping_shift(hva{at(5 * block)}) == 12);
  CHECK(f.mmu.mapping_shift(hva{UINTPTR_MAX}) == 12);
  REQUIRE(f.mmu.migrate(pages(5, 6)) == errc::ok);
  CHECK(f.mmu.mapping_shift(hva{at(0)}) == 12);
  REQUIRE(f.mmu.collapse(pages(0, 2 * block)) == errc::ok);
  CHECK(f.mmu.mapping_shift(hva{at(0)}) == 21);
  CHECK(f.mmu.mapping_shift(hva{at(block)}) == 21);
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(f.mmu.mapping_shift(hva{at(0)}) == 12);
}

}  // namespace
