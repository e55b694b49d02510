// SPDX-License-Identifier: MIT

// Pages in a device's memory, and exclusive access.

#include "mmu_fixture.hpp"

#include <cstddef>

using namespace mmu_tests;

namespace {

/// Four pages, 0 to 2 holding 100 + i, and a device with some pages.
struct device_space {
  explicit device_space(std::size_t frames = 16, std::size_t device = 8)
      : ram(frames, 8, device), mmu(ram), child(ram) {
    REQUIRE(mmu.map(pages(0, 4), protection::read_write) == errc::ok);
    for (std::uintptr_t page = 0; page < 3; ++page) REQUIRE(put(mmu, page, 100 + page) == errc::ok);
  }
  std::uint64_t owned(std::uintptr_t page, const void* owner) {
    const owned_page p = mmu.find_owned(hva{at(page)}, owner, false);
    REQUIRE(p);
    return word_at<std::uint64_t>(p.data).load(std::memory_order_relaxed);
  }
  physical_memory ram;
  mmu_type mmu, child;
  const int gpu = 0, other = 0;
};

TEST_CASE("pages go to the device's memory in one migrate bracket of the owner's, and only he finds them there") {
  device_space f;
  watcher w{f.mmu, {0, 1}};
  REQUIRE(f.mmu.migrate_to_device(pages(0, 4), &f.gpu) == errc::ok);
  CHECK(w.take() == seen_list{{event::migrate, 0, 4, &f.gpu}});
  CHECK(f.ram.frames.free_count() == 16);
  CHECK(f.ram.device.free_count() == 5);
  CHECK(look(f.mmu, 0).device);
  CHECK_FALSE(look(f.mmu, 0).present);
  CHECK(f.owned(1, &f.gpu) == 101);
  CHECK(f.mmu.find_owned(hva{at(1)}, &f.gpu, false).on_device);
  CHECK(f.mmu.find_owned(hva{at(1)}, &f.other, false).error == errc::not_mapped);
  CHECK(f.mmu.find_owned(hva{at(3)}, &f.gpu, false).error == errc::not_mapped);
  CHECK(f.mmu.find_owned(hva{at(9)}, &f.gpu, false).error == errc::not_mapped);
  CHECK(f.mmu.find_owned(hva{~std::uint64_t{0}}, &f.gpu, false).error == errc::bad_range);
  CHECK(f.mmu.statistics().to_device == 3);
  sound(f.mmu);
}

TEST_CASE("an access by the processor brings a page back, in a migrate bracket that names nobody") {
  for (const bool write : {false, true}) {
    device_space f;
    REQUIRE(f.mmu.migrate_to_device(pages(0, 2), &f.gpu) == errc::ok);
    word_at<std::uint64_t>(f.mmu.find_owned(hva{at(0)}, &f.gpu, true).data).store(55, std::memory_order_relaxed);
    watcher w{f.mmu, {0, 1}};
    if (write) {
      std::uint32_t half = 0;
      REQUIRE(f.mmu.compare_exchange(hva{at(0) + 8}, half, std::uint32_t{1}) == errc::ok);
    }
    CHECK(get(f.mmu, 0) == 55);
    CHECK(w.take() == seen_list{{event::migrate, 0, 1}});
    CHECK(look(f.mmu, 0).present);
    CHECK(look(f.mmu, 1).device);
    CHECK(f.ram.device.free_count() == 7);
    CHECK(f.mmu.statistics().from_device == 1);
    sound(f.mmu);
  }
}

TEST_CASE("the owner gives back what is his, in a bracket of his own, and nothing else") {
  device_space f;
  REQUIRE(f.mmu.migrate_to_device(pages(0, 1), &f.gpu) == errc::ok);
  REQUIRE(f.mmu.migrate_to_device(pages(1, 2), &f.other) == errc::ok);
  watcher w{f.mmu, {0}};
  REQUIRE(f.mmu.migrate_to_system(pages(0, 4), &f.gpu) == errc::ok);
  CHECK(w.take() == seen_list{{event::migrate, 0, 4, &f.gpu}});
  CHECK(look(f.mmu, 0).present);
  CHECK(look(f.mmu, 1).device);
  CHECK(get(f.mmu, 0) == 100);
  w.take();
  REQUIRE(f.mmu.migrate_to_system(pages(0, 4), &f.gpu) == errc::ok);
  CHECK(w.take().empty());
  sound(f.mmu);
}

/// A device that writes to its page when it is told to let go.
struct late_device {
  void invalidate_range_start(const invalidation& i) noexcept {
    if (i.owner != this && data != nullptr) word_at<std::uint64_t>(data).store(777, std::memory_order_relaxed);
    heard += 1;
    skipped += i.owner == this ? 1 : 0;
    if (i.owner != this) data = nullptr;
  }
  std::byte* data = nullptr;
  int heard = 0, skipped = 0;
};

TEST_CASE("what the device writes until start returns comes back with the page") {
  device_space f;
  late_device d;
  subscriber<late_device> node{d};
  {
    const auto held = f.mmu.lock_tables();
    REQUIRE(f.mmu.space().register_subscriber(node, held) == errc::ok);
  }
  REQUIRE(f.mmu.migrate_to_device(pages(0, 1), &d) == errc::ok);
  CHECK(d.skipped == 1);
  d.data = f.mmu.find_owned(hva{at(0)}, &d, true).data;
  CHECK(get(f.mmu, 0) == 777);
  CHECK(d.heard == 2);
  CHECK(d.data == nullptr);
  REQUIRE(f.mmu.space().unregister(node) == errc::ok);
  sound(f.mmu);
}

/// A driver that says at registration that its own brackets are none of its business.
struct filtering_device {
  void invalidate_range_start(const invalidation&) noexcept { heard += 1; }
  int heard = 0;
};

TEST_CASE("an owner that filters its own brackets out hears of the others, the processor's included") {
  device_space f;
  filtering_device d;
  subscriber<filtering_device> node{d, subscriber_filter{.owner = &d}};
  {
    const auto held = f.mmu.lock_tables();
    REQUIRE(f.mmu.space().register_subscriber(node, held) == errc::ok);
  }
  REQUIRE(f.mmu.migrate_to_device(pages(0, 1), &d) == errc::ok);
  REQUIRE(f.mmu.make_exclusive(pages(1, 2), &d) == errc::ok);
  REQUIRE(f.mmu.migrate_to_system(pages(0, 1), &d) == errc::ok);
  REQUIRE(f.mmu.migrate_to_device(pages(0, 1), &d) == errc::ok);
  CHECK(d.heard == 0);
  CHECK(get(f.mmu, 0) == 100);
  CHECK(d.heard == 1);
  CHECK(get(f.mmu, 1) == 101);
  CHECK(d.heard == 2);
  REQUIRE(f.mmu.make_exclusive(pages(1, 2), &f.other) == errc::ok);
  CHECK(d.heard == 3);
  REQUIRE(f.mmu.space().unregister(node) == errc::ok);
}

/// A device that walks the primary's tables, and notes what they say when it is told to flush.
struct walking_device {
  void invalidate_range_start(const invalidation&) noexcept { starts += 1; }
  void invalidate_range_end(const invalidation&) noexcept { ends += 1; }
  void invalidate_secondary_tlbs(range r) noexcept {
    flushes += 1;
    between = between && starts == flushes && ends + 1 == flushes;
    last = r;
    seen = mmu.translate_locked(hva{r.first});
    free = mmu.frames().free_count();
  }
  mmu_type& mmu;
  int starts = 0, ends = 0, flushes = 0;
  bool between = true;
  range last{};
  translation seen{};
  std::size_t free = 0;
};

TEST_CASE("O4: devices that walk the tables flush when an entry has changed, and before its frame is free") {
  device_space f;
  walking_device d{f.mmu};
  subscriber<walking_device> node{d};
  {
    const auto held = f.mmu.lock_tables();
    REQUIRE(f.mmu.space().register_subscriber(node, held) == errc::ok);
  }
  const std::size_t free = f.ram.frames.free_count();
  REQUIRE(f.mmu.unmap(pages(2, 3)) == errc::ok);
  CHECK(d.last == pages(2, 3));
  CHECK(d.seen.error == errc::not_mapped);
  CHECK(d.free == free);
  REQUIRE(f.mmu.swap_out(pages(0, 2)) == errc::ok);
  CHECK(d.seen.swapped);
  REQUIRE(get(f.mmu, 0) == 100);
  REQUIRE(f.mmu.fork(f.child) == errc::ok);
  REQUIRE(put(f.mmu, 0, 1) == errc::ok);
  CHECK(d.last == pages(0, 1));
  CHECK(d.seen.writable);
  CHECK(d.flushes == 4);  // unmap, swap_out, fork, copy on write
  CHECK(d.between);
  REQUIRE(f.mmu.space().unregister(node) == errc::ok);
}

TEST_CASE("a device's pages are unmapped, moved and forgotten like others, and a child has copies") {
  device_space f;
  REQUIRE(f.mmu.migrate_to_device(pages(0, 3), &f.gpu) == errc::ok);
  watcher w{f.mmu, {0, 2}};
  REQUIRE(f.mmu.unmap(pages(2, 3)) == errc::ok);
  CHECK(f.ram.device.free_count() == 6);
  REQUIRE(f.mmu.move(pages(1, 2), at(40)) == errc::ok);
  CHECK(f.owned(40, &f.gpu) == 101);
  REQUIRE(f.mmu.fork(f.child) == errc::ok);
  CHECK(look(f.mmu, 0).device);
  CHECK(look(f.child, 0).present);
  CHECK(get(f.child, 0) == 100);
  CHECK(get(f.child, 40) == 101);
  sound(f.mmu, f.child);
  w.take();
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(f.ram.device.free_count() == 8);
}

TEST_CASE("pages on loan do not go to a device, and neither does what is there, or in swap") {
  device_space f;
  const frame_lease lease = f.mmu.pin(hva{at(0)}, false);
  REQUIRE(f.mmu.swap_out(pages(1, 2)) == errc::ok);
  REQUIRE(f.mmu.migrate_to_device(pages(0, 4), &f.gpu) == errc::ok);
  REQUIRE(f.mmu.migrate_to_device(pages(0, 4), &f.other) == errc::ok);
  CHECK(look(f.mmu, 0).present);
  CHECK(look(f.mmu, 1).swapped);
  CHECK(f.owned(2, &f.gpu) == 102);
  CHECK(f.ram.device.free_count() == 7);
  f.mmu.unpin(lease.frame);
  sound(f.mmu);
}

TEST_CASE("exclusive access: one bracket of the owner's, and the frame stays and is his alone") {
  device_space f;
  watcher w{f.mmu, {0, 1}};
  const pfn frame = look(f.mmu, 1).frame;
  REQUIRE(f.mmu.make_exclusive(pages(0, 4), &f.gpu) == errc::ok);
  CHECK(w.take() == seen_list{{event::exclusive, 0, 4, &f.gpu}});
  const translation t = look(f.mmu, 1);
  CHECK(t.exclusive);
  CHECK_FALSE(t.present);
  CHECK(t.frame == frame);
  const owned_page p = f.mmu.find_owned(hva{at(1)}, &f.gpu, true);
  CHECK(p.frame == frame);
  CHECK_FALSE(p.on_device);
  CHECK(f.owned(3, &f.gpu) == 0);  // it was faulted in
  CHECK(f.mmu.find_owned(hva{at(1)}, &f.other, false).error == errc::not_mapped);
  CHECK(f.mmu.statistics().made_exclusive == 4);
  sound(f.mmu);
}

TEST_CASE("the processor takes an exclusive page back in a clear bracket, and finds what the device wrote") {
  for (const bool write : {false, true}) {
    device_space f;
    REQUIRE(f.mmu.make_exclusive(pages(0, 2), &f.gpu) == errc::ok);
    const owned_page p = f.mmu.find_owned(hva{at(0)}, &f.gpu, true);
    word_at<std::uint64_t>(p.data).store(55, std::memory_order_relaxed);
    watcher w{f.mmu, {0, 1}};
    if (write) {
      REQUIRE(put(f.mmu, 0, 56) == errc::ok);
      CHECK(f.mmu.find_owned(hva{at(0)}, &f.gpu, false).error == errc::not_mapped);
    }
    CHECK(get(f.mmu, 0) == (write ? 56 : 55));
    CHECK(w.take() == seen_list{{event::clear, 0, 1}});
    CHECK(look(f.mmu, 0).frame == p.frame);
    CHECK(look(f.mmu, 1).exclusive);
    CHECK(f.mmu.statistics().revoked == 1);
    sound(f.mmu);
  }
}

TEST_CASE("exclusive access to shared pages copies them first, and pages on loan are left out") {
  device_space f;
  REQUIRE(f.mmu.fork(f.child) == errc::ok);
  const frame_lease lease = f.mmu.pin(hva{at(2)}, true);
  watcher w{f.mmu, {0, 2}};
  REQUIRE(f.mmu.make_exclusive(pages(0, 3), &f.gpu) == errc::ok);
  CHECK(w.take() == seen_list{{event::clear, 0, 1}, {event::clear, 1, 2}, {event::exclusive, 0, 3, &f.gpu}});
  CHECK(look(f.mmu, 0).exclusive);
  CHECK(look(f.mmu, 0).frame != look(f.child, 0).frame);
  CHECK(look(f.mmu, 2).present);
  CHECK(f.mmu.statistics().skipped_pinned == 1);
  f.mmu.unpin(lease.frame);
  sound(f.mmu, f.child);
}

TEST_CASE("a fork takes exclusive pages back in its own bracket and shares them") {
  device_space f;
  REQUIRE(f.mmu.make_exclusive(pages(0, 1), &f.gpu) == errc::ok);
  watcher w{f.mmu, {0}};
  REQUIRE(f.mmu.fork(f.child) == errc::ok);
  CHECK(w.take() == seen_list{{event::protection_page, 0, 4}});
  CHECK(f.mmu.find_owned(hva{at(0)}, &f.gpu, false).error == errc::not_mapped);
  CHECK(look(f.mmu, 0).present);
  CHECK(look(f.child, 0).frame == look(f.mmu, 0).frame);
  REQUIRE(put(f.child, 0, 3) == errc::ok);
  CHECK(get(f.mmu, 0) == 100);
  sound(f.mmu, f.child);
}

TEST_CASE("exclusive access ends with protect for writes only, and is refused where writes are") {
  device_space f;
  REQUIRE(f.mmu.make_exclusive(pages(0, 1), &f.gpu) == errc::ok);
  REQUIRE(f.mmu.protect(pages(0, 2), protection::read) == errc::ok);
  CHECK(f.mmu.find_owned(hva{at(0)}, &f.gpu, true).error == errc::access_denied);
  CHECK(f.mmu.find_owned(hva{at(0)}, &f.gpu, false));
  CHECK(f.mmu.make_exclusive(pages(0, 4), &f.gpu) == errc::access_denied);
  CHECK(get(f.mmu, 0) == 100);
  CHECK(put(f.mmu, 0, 1) == errc::access_denied);
  CHECK(look(f.mmu, 0).present);
  CHECK_FALSE(look(f.mmu, 0).writable);
  CHECK(f.mmu.make_exclusive(pages(2, 5), &f.gpu) == errc::not_mapped);
  sound(f.mmu);
}

TEST_CASE("without an owner, or with bad ranges, nothing happens") {
  device_space f;
  watcher w{f.mmu, {0}};
  CHECK(f.mmu.migrate_to_device(pages(0, 1), nullptr) == errc::access_denied);
  CHECK(f.mmu.migrate_to_system(pages(0, 1), nullptr) == errc::access_denied);
  CHECK(f.mmu.make_exclusive(pages(0, 1), nullptr) == errc::access_denied);
  const range bad{at(0) + 1, at(1)};
  CHECK(f.mmu.migrate_to_device(bad, &f) == errc::bad_range);
  CHECK(f.mmu.migrate_to_system(bad, &f) == errc::bad_range);
  CHECK(f.mmu.make_exclusive(bad, &f) == errc::bad_range);
  CHECK(f.mmu.migrate_to_device(pages(9, 10), &f) == errc::not_mapped);
  CHECK(f.mmu.migrate_to_system(pages(9, 10), &f) == errc::not_mapped);
  CHECK(w.take().empty());
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(f.mmu.migrate_to_device(pages(0, 1), &f) == errc::released);
  CHECK(f.mmu.migrate_to_system(pages(0, 1), &f) == errc::released);
  CHECK(f.mmu.make_exclusive(pages(0, 1), &f) == errc::released);
  CHECK(f.mmu.find_owned(hva{at(0)}, &f, false).error == errc::released);
}

TEST_CASE("when device pages or frames run out, nothing is half-done, at any size") {
  for (std::size_t device = 0; device <= 3; ++device) {
    for (std::size_t frames = 3; frames <= 6; ++frames) {
      CAPTURE(device);
      CAPTURE(frames);
      device_space f{frames, device};
      watcher w{f.mmu, {0, 1, 2}};
      const errc gone = f.mmu.migrate_to_device(pages(0, 3), &f);
      CHECK(gone == (device < 3 ? errc::no_memory : errc::ok));
      CHECK(w.take().size() == (device < 3 ? 0 : 1));
      CHECK(f.ram.device.free_count() == (device < 3 ? device : 0));
      if (gone == errc::ok) {
        // Somebody else takes all frames but one: one page comes back, the next one does not, and stays.
        std::vector<pfn> taken;
        while (f.ram.frames.free_count() > 1) taken.push_back(f.ram.frames.allocate());
        CHECK(f.mmu.migrate_to_system(pages(0, 3), &f) == errc::no_memory);
        CHECK(w.take().empty());
        CHECK(get(f.mmu, 1) == 101);
        CHECK(f.mmu.pin(hva{at(0)}, true).error == errc::no_memory);
        CHECK(look(f.mmu, 0).device);
        CHECK(f.owned(0, &f) == 100);
        for (const pfn p : taken) f.ram.frames.drop(p);
      }
      for (std::uintptr_t page = 0; page < 3; ++page) CHECK(get(f.mmu, page) == 100 + page);
      for (std::uintptr_t page = 0; page < 3; ++page) REQUIRE(put(f.mmu, page, 100 + page) == errc::ok);
      w.remember();
      const errc own = f.mmu.make_exclusive(pages(0, 4), &f);
      CHECK(own == (frames < 4 ? errc::no_memory : errc::ok));
      sound(f.mmu);
    }
  }
}

}  // namespace
