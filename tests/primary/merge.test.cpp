// SPDX-License-Identifier: MIT

// Merging of equal pages, and how a write ends it.

#include "mmu_fixture.hpp"

#include <array>
#include <cstddef>

using namespace mmu_tests;

namespace {

/// Six pages: 0, 2 and 4 hold 7, page 1 holds 8, page 3 is zero, page 5 has not been touched.
struct six_pages {
  explicit six_pages(std::size_t frames = 16) : ram(frames, 8), mmu(ram), child(ram) {
    REQUIRE(mmu.map(pages(0, 6), protection::read_write) == errc::ok);
    const std::array<std::uint64_t, 5> values{7, 8, 7, 0, 7};
    for (std::uintptr_t page = 0; page < 5; ++page) REQUIRE(put(mmu, page, values[page]) == errc::ok);
  }
  physical_memory ram;
  mmu_type mmu, child;
};

TEST_CASE("equal pages share a frame afterwards, each bracketed by itself with clear, and the others stay") {
  six_pages f;
  watcher w{f.mmu, {0, 2, 4}};
  const pfn kept = look(f.mmu, 0).frame;
  const merge_answer answer = f.mmu.merge_equal(pages(0, 6));
  CHECK(answer);
  CHECK(answer.merged == 2);
  CHECK(w.take() == seen_list{{event::clear, 0, 1}, {event::clear, 2, 3}, {event::clear, 4, 5}});
  CHECK(f.ram.frames.free_count() == 13);
  for (const std::uintptr_t page : page_list{0, 2, 4}) {
    CHECK(look(f.mmu, page).frame == kept);
    CHECK_FALSE(look(f.mmu, page).writable);
    CHECK(get(f.mmu, page) == 7);
  }
  CHECK(look(f.mmu, 1).writable);
  CHECK(f.mmu.statistics().merged == 2);
  sound(f.mmu);
  CHECK(f.mmu.merge_equal(pages(0, 6)).merged == 0);  // what is merged is not merged again
  CHECK(w.take().empty());
}

TEST_CASE("a write to a merged page copies it, and the last one has the frame for itself") {
  six_pages f;
  REQUIRE(f.mmu.merge_equal(pages(0, 6)));
  watcher w{f.mmu, {0, 2, 4}};
  REQUIRE(put(f.mmu, 2, 20) == errc::ok);
  CHECK(w.take() == seen_list{{event::clear, 2, 3}});
  REQUIRE(put(f.mmu, 0, 10) == errc::ok);
  CHECK(w.take() == seen_list{{event::clear, 0, 1}});
  REQUIRE(put(f.mmu, 4, 40) == errc::ok);
  CHECK(w.take().empty());
  CHECK(get(f.mmu, 0) == 10);
  CHECK(get(f.mmu, 2) == 20);
  CHECK(get(f.mmu, 4) == 40);
  CHECK(f.mmu.statistics().copied == 2);
  sound(f.mmu);
}

TEST_CASE("pages on loan are not merged, whichever of a pair they are") {
  for (const std::uintptr_t lent : page_list{0, 2, 4}) {
    six_pages f;
    const frame_lease lease = f.mmu.pin(hva{at(lent)}, true);
    CHECK(f.mmu.merge_equal(pages(0, 6)).merged == 1);
    CHECK(look(f.mmu, lent).frame == lease.frame);
    word_at<std::uint64_t>(f.mmu.data(lease.frame)).store(99, std::memory_order_relaxed);
    for (const std::uintptr_t page : page_list{0, 2, 4}) CHECK(get(f.mmu, page) == (page == lent ? 99 : 7));
    f.mmu.unpin(lease.frame);
    sound(f.mmu);
  }
}

/// Writes to a frame when it is told to let go, as a secondary may until its start returns.
struct late_writer {
  void invalidate_range_start(const invalidation& i) noexcept {
    if (i.range.contains(at(page))) word_at<std::uint64_t>(frame).store(777, std::memory_order_relaxed);
  }
  std::uintptr_t page = 0;
  std::byte* frame = nullptr;
};

TEST_CASE("pages are compared when nobody can write any more: what is written until start returns is kept") {
  for (const std::uintptr_t page : page_list{0, 2}) {
    six_pages f;
    late_writer w;
    w.page = page;
    const frame_lease lease = f.mmu.pin(hva{at(page)}, true);
    w.frame = f.mmu.data(lease.frame);
    f.mmu.unpin(lease.frame);
    subscriber<late_writer> node{w};
    {
      const auto held = f.mmu.lock_tables();
      REQUIRE(f.mmu.space().register_subscriber(node, held) == errc::ok);
    }
    REQUIRE(f.mmu.merge_equal(pages(0, 3)));
    REQUIRE(f.mmu.space().unregister(node) == errc::ok);
    CHECK(get(f.mmu, page) == 777);
    CHECK(get(f.mmu, 2 - page) == 7);
    sound(f.mmu);
  }
}

TEST_CASE("who lets translations be changed in place keeps his mappings over a merge, and faults to write") {
  six_pages f;
  mirror m{f.mmu};
  for (const std::uintptr_t page : page_list{0, 1, 2, 4}) {
    REQUIRE(m.access(at(page), true, [](std::atomic_ref<std::uint64_t> w) { w.fetch_add(1); }));
  }
  REQUIRE(f.mmu.merge_equal(pages(0, 6)).merged == 2);
  CHECK(m.size() == 4);
  CHECK(m.agrees());
  const std::uint64_t pins = f.mmu.statistics().pins;
  REQUIRE(m.access(at(2), false, [](std::atomic_ref<std::uint64_t> w) { CHECK(w.load() == 8); }));
  CHECK(f.mmu.statistics().pins == pins);
  REQUIRE(m.access(at(2), true, [](std::atomic_ref<std::uint64_t> w) { w.store(20); }));
  CHECK(m.agrees());
  CHECK(get(f.mmu, 2) == 20);
  CHECK(get(f.mmu, 0) == 8);
  CHECK(get(f.mmu, 4) == 8);
  sound(f.mmu);
}

TEST_CASE("merging goes on with what fork shares, and read-only areas take part") {
  six_pages f;
  REQUIRE(f.mmu.protect(pages(2, 3), protection::read) == errc::ok);
  REQUIRE(f.mmu.fork(f.child) == errc::ok);
  CHECK(f.mmu.merge_equal(pages(0, 6)).merged == 2);
  CHECK(f.ram.frames.free_count() == 11);  // the child has the two that the parent gave up
  CHECK(get(f.child, 4) == 7);
  REQUIRE(put(f.child, 0, 1) == errc::ok);
  CHECK(get(f.mmu, 0) == 7);
  CHECK(get(f.mmu, 2) == 7);
  sound(f.mmu, f.child);
}

TEST_CASE("equal pages of a huge page are merged after it has been split") {
  physical_memory ram{2 * block, 8};
  mmu_type mmu{ram};
  REQUIRE(mmu.map_huge(pages(0, block), protection::read_write) == errc::ok);
  REQUIRE(put(mmu, 9, 9) == errc::ok);
  CHECK(mmu.merge_equal(pages(0, block)).merged == block - 2);
  CHECK(ram.frames.free_count() == 2 * block - 2);
  CHECK(get(mmu, 9) == 9);
  CHECK(get(mmu, 511) == 0);
  sound(mmu);
  REQUIRE(mmu.collapse(pages(0, block)) == errc::ok);
  CHECK(ram.frames.free_count() == block);
  CHECK(get(mmu, 9) == 9);
  sound(mmu);
}

TEST_CASE("merging nothing is an error, and bad ranges are") {
  six_pages f;
  CHECK(f.mmu.merge_equal(pages(50, 60)).error == errc::not_mapped);
  CHECK(f.mmu.merge_equal({at(0) + 1, at(1)}).error == errc::bad_range);
  CHECK(f.mmu.merge_equal(pages(0, 1)).merged == 0);
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(f.mmu.merge_equal(pages(0, 6)).error == errc::released);
}

}  // namespace
