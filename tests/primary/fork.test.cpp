// SPDX-License-Identifier: MIT

// fork and copy on write.

#include "mmu_fixture.hpp"

#include <cstddef>
#include <thread>

using namespace mmu_tests;

namespace {

/// A parent with pages 0 to 2 written, page i holding 100 + i, and page 3 untouched; a child that shares its memory.
struct two_spaces {
  explicit two_spaces(std::size_t frames = 16, std::size_t swap = 8, std::size_t device = 4)
      : ram(frames, swap, device), parent(ram), child(ram) {
    REQUIRE(parent.map(pages(0, 4), protection::read_write) == errc::ok);
    for (std::uintptr_t page = 0; page < 3; ++page) REQUIRE(put(parent, page, 100 + page) == errc::ok);
  }
  physical_memory ram;
  mmu_type parent, child;
};

TEST_CASE("fork shares all frames, and brackets the parent's areas with protection_page") {
  two_spaces f;
  REQUIRE(f.parent.map(pages(20, 22), protection::read_write) == errc::ok);
  REQUIRE(f.parent.map(pages(30, 31), protection::read) == errc::ok);
  REQUIRE(put(f.parent, 20, 120) == errc::ok);
  watcher p{f.parent, {0, 1, 20}};
  watcher c{f.child, {0}};
  const std::size_t free = f.ram.frames.free_count();
  CHECK(look(f.parent, 0).writable);
  REQUIRE(f.parent.fork(f.child) == errc::ok);
  CHECK(p.take() == seen_list{{event::protection_page, 0, 4}, {event::protection_page, 20, 22}});
  CHECK(c.take().empty());
  CHECK(f.ram.frames.free_count() == free);
  for (const std::uintptr_t page : page_list{0, 1, 2, 20}) {
    CHECK(look(f.child, page).frame == look(f.parent, page).frame);
    CHECK_FALSE(look(f.parent, page).writable);
    CHECK_FALSE(look(f.child, page).writable);
    CHECK(get(f.child, page) == 100 + page);
  }
  CHECK(f.child.areas_locked().size() == 3);
  CHECK(f.child.areas_locked()[2].allows == protection::read);
  CHECK(get(f.child, 3) == 0);
  CHECK_FALSE(look(f.parent, 3).present);
  CHECK(f.parent.statistics().forked == 4);
  sound(f.parent, f.child);
}

TEST_CASE("a write to a shared page copies it in a clear bracket of the one who writes, and the other keeps his") {
  for (const bool parent_writes : {false, true}) {
    two_spaces f;
    REQUIRE(f.parent.fork(f.child) == errc::ok);
    mmu_type& writer = parent_writes ? f.parent : f.child;
    mmu_type& other = parent_writes ? f.child : f.parent;
    watcher w{writer, {1}};
    watcher o{other, {1}};
    const pfn shared = look(other, 1).frame;
    const std::size_t free = f.ram.frames.free_count();
    REQUIRE(put(writer, 1, 7) == errc::ok);
    CHECK(w.take() == seen_list{{event::clear, 1, 2}});
    CHECK(o.take().empty());
    CHECK(look(other, 1).frame == shared);
    CHECK(look(writer, 1).frame != shared);
    CHECK(look(writer, 1).writable);
    CHECK(get(other, 1) == 101);
    CHECK(get(writer, 1) == 7);
    CHECK(f.ram.frames.free_count() == free - 1);
    sound(f.parent, f.child);
    // The last one that has the frame writes to it where it is; no translation changes, so there is no bracket.
    REQUIRE(put(other, 1, 8) == errc::ok);
    CHECK(o.take().empty());
    CHECK(look(other, 1).frame == shared);
    CHECK(get(writer, 1) == 7);
    CHECK(writer.statistics().copied == 1);
    CHECK(other.statistics().copied == 0);
    sound(f.parent, f.child);
  }
}

TEST_CASE("a read of a shared page copies nothing, and its lease does not allow writes; one for writing does") {
  two_spaces f;
  REQUIRE(f.parent.fork(f.child) == errc::ok);
  const frame_lease read = f.child.pin(hva{at(0)}, false);
  REQUIRE(read);
  CHECK_FALSE(read.writable);
  CHECK(read.frame == look(f.parent, 0).frame);
  f.child.unpin(read.frame);
  const frame_lease write = f.child.pin(hva{at(0)}, true);
  REQUIRE(write);
  CHECK(write.writable);
  CHECK(write.frame != look(f.parent, 0).frame);
  f.child.unpin(write.frame);
  std::uint64_t word = 100;
  CHECK(f.parent.compare_exchange(hva{at(0)}, word, std::uint64_t{5}) == errc::ok);
  CHECK(get(f.child, 0) == 100);
  sound(f.parent, f.child);
}

TEST_CASE("what the parent has in swap is shared there, and each brings back its own") {
  two_spaces f;
  REQUIRE(f.parent.swap_out(pages(0, 2)) == errc::ok);
  REQUIRE(f.parent.fork(f.child) == errc::ok);
  CHECK(f.ram.swap.free_count() == 6);
  CHECK(look(f.child, 0).swapped);
  CHECK(get(f.child, 0) == 100);
  CHECK(f.ram.swap.free_count() == 6);
  CHECK(put(f.child, 0, 9) == errc::ok);
  CHECK(get(f.parent, 0) == 100);
  CHECK(f.ram.swap.free_count() == 7);
  sound(f.parent, f.child);
}

TEST_CASE("a page that may be written through a loan is copied for the child at once") {
  two_spaces f;
  watcher p{f.parent, {0, 1}};
  const frame_lease lease = f.parent.pin(hva{at(1)}, true);
  REQUIRE(lease);
  REQUIRE(f.parent.fork(f.child) == errc::ok);
  CHECK(p.take() == seen_list{{event::protection_page, 0, 4}});
  CHECK(look(f.parent, 1).frame == lease.frame);
  CHECK(look(f.child, 1).frame != lease.frame);
  word_at<std::uint64_t>(f.parent.data(lease.frame)).store(55, std::memory_order_relaxed);
  CHECK(get(f.parent, 1) == 55);
  CHECK(get(f.child, 1) == 101);
  f.parent.unpin(lease.frame);
  sound(f.parent, f.child);
}

TEST_CASE("O1: a secondary of the parent that writes faults after fork, and the child does not see it") {
  two_spaces f;
  mirror m{f.parent};
  REQUIRE(m.access(at(0), true, [](std::atomic_ref<std::uint64_t> w) { w.store(1); }));
  REQUIRE(m.size() == 1);
  REQUIRE(f.parent.fork(f.child) == errc::ok);
  CHECK(m.size() == 0);
  REQUIRE(m.access(at(0), false, [](std::atomic_ref<std::uint64_t> w) { CHECK(w.load() == 1); }));
  REQUIRE(m.agrees());
  REQUIRE(m.access(at(0), true, [](std::atomic_ref<std::uint64_t> w) { w.store(2); }));
  CHECK(m.agrees());
  CHECK(get(f.parent, 0) == 2);
  CHECK(get(f.child, 0) == 1);
  sound(f.parent, f.child);
}

TEST_CASE(
    "who lets translations be changed in place keeps his mapping over copy on write, and has the new frame then") {
  for (const bool keeps : {true, false}) {
    two_spaces f;
    REQUIRE(f.parent.fork(f.child) == errc::ok);
    mirror m{f.parent};
    m.keeps_in_place = keeps;
    REQUIRE(m.access(at(0), false, [](std::atomic_ref<std::uint64_t> w) { CHECK(w.load() == 100); }));
    const std::uint64_t pins = f.parent.statistics().pins;
    REQUIRE(put(f.parent, 0, 1) == errc::ok);
    CHECK(m.size() == (keeps ? 1 : 0));
    CHECK(m.agrees());
    REQUIRE(m.access(at(0), true, [](std::atomic_ref<std::uint64_t> w) { CHECK(w.exchange(2) == 1); }));
    CHECK(f.parent.statistics().pins == pins + (keeps ? 0 : 1));
    CHECK(get(f.parent, 0) == 2);
    CHECK(get(f.child, 0) == 100);
    sound(f.parent, f.child);
  }
}

/// Keeps its mapping over a change in place, and while it still has the old one, another thread writes to the parent.
struct nosy_client {
  void invalidate_range_start(const invalidation&) noexcept {}
  void change_entry(const entry_change& e) noexcept {
    if (e.range != pages(0, 1)) return;
    std::thread([&] { CHECK(put(parent, 0, 55) == errc::ok); }).join();
    seen = word_at<std::uint64_t>(mapped).load(std::memory_order_relaxed);
  }
  mmu_type& parent;
  std::byte* mapped;
  std::uint64_t seen = 0;
};

TEST_CASE("O1: a shared frame is nobody's alone, and not written, before all who may keep mapping it have heard") {
  for (const bool merge : {false, true}) {
    two_spaces f;
    REQUIRE(f.parent.fork(f.child) == errc::ok);
    // An equal page before it: then the merge is what lets go of page 0's frame.
    const std::uintptr_t before = at(0) - page_size;
    const std::uint64_t value = 100;
    REQUIRE(f.child.map({before, at(0)}, protection::read_write) == errc::ok);
    REQUIRE(f.child.write(before, std::as_bytes(std::span{&value, 1})) == errc::ok);
    nosy_client c{f.parent, f.child.data(look(f.child, 0).frame)};
    subscriber<nosy_client> node{c};
    {
      const auto held = f.child.lock_tables();
      REQUIRE(f.child.space().register_subscriber(node, held) == errc::ok);
    }
    if (merge) {
      REQUIRE(f.child.merge_equal({before, at(1)}).merged == 1);
    } else {
      REQUIRE(put(f.child, 0, 7) == errc::ok);
    }
    CHECK(c.seen == 100);
    CHECK(get(f.parent, 0) == 55);
    CHECK(get(f.child, 0) == (merge ? 100 : 7));
    REQUIRE(f.child.space().unregister(node) == errc::ok);
    sound(f.parent, f.child);
  }
}

TEST_CASE("a frame that is shared is freed after the last of them, whoever it is") {
  for (const bool parent_first : {false, true}) {
    two_spaces f;
    REQUIRE(f.parent.fork(f.child) == errc::ok);
    mmu_type& first = parent_first ? f.parent : f.child;
    mmu_type& last = parent_first ? f.child : f.parent;
    const std::size_t free = f.ram.frames.free_count();
    REQUIRE(first.unmap(pages(0, 4)) == errc::ok);
    CHECK(f.ram.frames.free_count() == free);
    CHECK(get(last, 2) == 102);
    REQUIRE(last.exit() == errc::ok);
    CHECK(f.ram.frames.free_count() == 16);
    sound(f.parent, f.child);
  }
}

TEST_CASE("a child that forks shares with both, and a chain of them ends with every frame free") {
  physical_memory ram{32, 8};
  mmu_type a{ram}, b{ram}, c{ram};
  REQUIRE(a.map(pages(0, 4), protection::read_write) == errc::ok);
  REQUIRE(put(a, 0, 1) == errc::ok);
  REQUIRE(a.fork(b) == errc::ok);
  REQUIRE(b.fork(c) == errc::ok);
  CHECK(ram.frames.maps(look(c, 0).frame) == 3);
  REQUIRE(put(b, 0, 2) == errc::ok);
  REQUIRE(put(c, 0, 3) == errc::ok);
  CHECK(get(a, 0) == 1);
  CHECK(get(b, 0) == 2);
  sound(a, b, c);
  CHECK(b.exit() == errc::ok);
  CHECK(a.exit() == errc::ok);
  CHECK(get(c, 0) == 3);
  CHECK(c.exit() == errc::ok);
  CHECK(ram.frames.free_count() == 32);
}

TEST_CASE("fork refuses what makes no sense, and changes nothing") {
  two_spaces f;
  mmu_type stranger{8};
  watcher p{f.parent, {0}};
  CHECK(f.parent.fork(stranger) == errc::access_denied);
  CHECK(f.parent.fork(f.parent) == errc::would_deadlock);
  REQUIRE(f.child.map(pages(9, 10), protection::read) == errc::ok);
  CHECK(f.parent.fork(f.child) == errc::overlap);
  REQUIRE(f.child.exit() == errc::ok);
  CHECK(f.parent.fork(f.child) == errc::released);
  CHECK(f.child.fork(f.parent) == errc::released);
  CHECK(p.take().empty());
  CHECK(look(f.parent, 0).writable);
  sound(f.parent, f.child);
}

TEST_CASE("at any size of the memory, a fork or a copy that fails leaves everything as before") {
  for (std::size_t frames = 3; frames <= 9; ++frames) {
    CAPTURE(frames);
    two_spaces f{frames, 4, 2};
    REQUIRE(f.parent.migrate_to_device(pages(0, 1), &f) == errc::ok);
    const frame_lease lease = f.parent.pin(hva{at(1)}, true);
    REQUIRE(lease);
    watcher p{f.parent, {0, 1, 2}};
    const std::size_t free = f.ram.frames.free_count();
    const errc forked = f.parent.fork(f.child);
    CHECK(forked == (free >= 2 ? errc::ok : errc::no_memory));
    if (forked != errc::ok) {
      CHECK(p.take().empty());
      CHECK(f.child.areas_locked().empty());
      CHECK(f.ram.frames.free_count() == free);
    } else {
      const errc wrote = put(f.child, 2, 1);
      CHECK(wrote == (free >= 3 ? errc::ok : errc::no_memory));
      CHECK(get(f.child, 2) == (wrote == errc::ok ? 1 : 102));
      CHECK(get(f.child, 0) == 100);
      CHECK(get(f.child, 1) == 101);
    }
    CHECK(look(f.parent, 0).device);
    CHECK(look(f.parent, 2).present);
    f.parent.unpin(lease.frame);
    sound(f.parent, f.child);
  }
}

}  // namespace
