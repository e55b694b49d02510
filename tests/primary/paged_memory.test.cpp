// SPDX-License-Identifier: MIT

#include <mmunotify/primary/detail/memory_check.hpp>
#include <mmunotify/primary/paged_memory.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include <mmunotify/primary/frame_access.hpp>

#include "support/threads.hpp"

using namespace mmunotify;

namespace {

constexpr std::uintptr_t at(std::uintptr_t page) { return page * page_size; }

/// Four pages that may be written; page i holds i + 1 in its first word.
struct four_pages {
  explicit four_pages(std::size_t frames, std::size_t swap = 8) : ram(frames, swap, 2), memory(ram) {
    const area made{{0, at(4)}, protection::read_write};
    REQUIRE(memory.areas().replaced(made.range, {&made, 1}, memory.areas()));
    for (std::uintptr_t p = 0; p < 4; ++p) REQUIRE(put(p, p + 1) == errc::ok);
  }
  errc put(std::uintptr_t page, std::uint64_t value) {
    return touch(at(page), true, [&](pfn f, bool) {
      word_at<std::uint64_t>(memory.frames().data(f)).store(value, std::memory_order_relaxed);
      return errc::ok;
    });
  }
  std::uint64_t get(std::uintptr_t page) {
    std::uint64_t value = 0;
    const errc e = touch(at(page), false, [&](pfn f, bool) {
      value = word_at<std::uint64_t>(memory.frames().data(f)).load(std::memory_order_relaxed);
      return errc::ok;
    });
    REQUIRE(e == errc::ok);
    return value;
  }
  template <class Function>
  errc touch(std::uintptr_t a, bool write, Function f) {
    obstacle found = obstacle::none;
    const errc e = memory.try_page(a, write, found, f);
    REQUIRE(found == obstacle::none);
    return e;
  }
  /// All pages to the swap store, in the three steps.
  void swap_all() {
    paged_memory::page_jobs jobs;
    withdrawn_pages gone;
    REQUIRE(memory.plan(paged_memory::whole(), detail::to_swap(ram), jobs));
    memory.replace(jobs, detail::to_swap(ram), gone);
    memory.drop(gone);
    paged_memory::give_back(jobs, memory.swap());
  }
  const char* verify() {
    detail::memory_check check{ram};
    const char* const broken = check.look_at(memory);
    return broken != nullptr ? broken : check.look_at_shared();
  }
  physical_memory ram;
  paged_memory memory;
};

TEST_CASE("frames that are replaced stay held, with their contents, until the chain is dropped") {
  four_pages m{8};
  paged_memory::page_jobs jobs;
  withdrawn_pages gone;
  const pfn old = m.memory.translate(0).frame;
  REQUIRE(m.memory.plan({0, at(2)}, detail::to_other_frames(m.ram), jobs));
  CHECK(m.memory.translate(0).frame == old);
  m.memory.replace(jobs, detail::to_other_frames(m.ram), gone);
  CHECK(m.memory.translate(0).frame != old);
  CHECK(m.memory.translate(0).young);
  CHECK(word_at<std::uint64_t>(m.memory.frames().data(old)).load() == 1);
  CHECK(gone.frames.size() == 2);
  CHECK(m.memory.frames().free_count() == 2);
  m.memory.drop(gone);
  CHECK(m.memory.frames().free_count() == 4);
  CHECK(m.get(0) == 1);
  CHECK(m.verify() == nullptr);
}

TEST_CASE("a plan is all or nothing, and what it does not use comes back") {
  four_pages m{6};
  paged_memory::page_jobs jobs;
  CHECK_FALSE(m.memory.plan({0, at(3)}, detail::to_other_frames(m.ram), jobs));
  CHECK(m.memory.frames().free_count() == 2);
  paged_memory::page_jobs fewer;
  REQUIRE(m.memory.plan({0, at(2)}, detail::to_other_frames(m.ram), fewer));
  CHECK(m.memory.frames().free_count() == 0);
  m.memory.give_back(fewer, m.memory.frames());
  CHECK(m.memory.frames().free_count() == 2);
  CHECK(m.verify() == nullptr);
}

TEST_CASE("a page that another thread swapped out since the plan is left alone") {
  four_pages m{8};
  paged_memory::page_jobs jobs;
  withdrawn_pages gone;
  REQUIRE(m.memory.plan({0, at(4)}, detail::to_other_frames(m.ram), jobs));
  m.swap_all();
  m.memory.replace(jobs, detail::to_other_frames(m.ram), gone);
  CHECK(gone.frames.empty());
  m.memory.give_back(jobs, m.memory.frames());
  CHECK(m.memory.frames().free_count() == 8);
  CHECK(m.memory.translate(0).swapped);
  CHECK(m.get(3) == 4);
  CHECK(m.verify() == nullptr);
}

TEST_CASE("taking away empties present and swapped entries, and moving keeps both") {
  four_pages m{8};
  m.swap_all();
  CHECK(m.get(0) == 1);
  REQUIRE(m.memory.make_way({0, at(2)}, at(2000)));
  const area there{{at(2000), at(2002)}, protection::read_write};
  REQUIRE(m.memory.areas().replaced(there.range, {&there, 1}, m.memory.areas()));
  m.memory.move_entries({0, at(2)}, at(2000));
  CHECK(m.memory.translate(at(2000)).present);
  CHECK(m.memory.translate(at(2001)).swapped);
  CHECK_FALSE(m.memory.translate(0).present);
  CHECK(m.get(2001) == 2);
  withdrawn_pages gone;
  CHECK(m.memory.take_away(paged_memory::whole(), gone) == 4);
  CHECK(gone.frames.size() == 2);
  m.memory.drop(gone);
  CHECK(m.memory.frames().free_count() == 8);
  CHECK(m.memory.swap().free_count() == 8);
  m.memory.prune(paged_memory::whole());
  CHECK(m.verify() == nullptr);
}

TEST_CASE("a transfer takes all of its pages before it touches the first") {
  four_pages m{4};
  m.swap_all();
  int copies = 0;
  const auto count = [&](std::byte*, std::size_t, std::size_t) { ++copies; };
  const auto pin = [&](std::uintptr_t page, pfn& pinned) {
    return m.touch(page, false, [&](pfn f, bool) {
      m.memory.frames().pin(pinned = f);
      return errc::ok;
    });
  };
  CHECK(m.memory.transfer(4, 3 * page_size, false, pin, count) == errc::ok);
  CHECK(copies == 4);
  m.swap_all();
  std::vector<pfn> taken(2);
  for (pfn& f : taken) f = m.memory.frames().allocate();
  CHECK(m.memory.transfer(4, 3 * page_size, false, pin, count) == errc::no_memory);
  CHECK(copies == 4);
  for (const pfn f : taken) m.memory.frames().drop(f);
  CHECK(m.verify() == nullptr);
  for (std::uintptr_t p = 0; p < 4; ++p) {
    CHECK(m.memory.frames().pins(m.memory.translate(at(p)).frame) == 0);
    CHECK(m.get(p) == p + 1);
  }
}

TEST_CASE("young bits are set by touching and cleared by asking") {
  four_pages m{8};
  CHECK(m.memory.young({0, at(4)}, true));
  CHECK_FALSE(m.memory.young({0, at(4)}, false));
  CHECK(m.get(2) == 3);
  CHECK(m.memory.young({at(2), at(3)}, false));
  CHECK_FALSE(m.memory.young({at(3), at(4)}, false));
}

pfn doubled{};

TEST_CASE("verify names what is broken") {
  SUBCASE("a frame that is mapped twice") {
    four_pages m{8};
    const area there{{at(9), at(10)}, protection::read_write};
    REQUIRE(m.memory.areas().replaced(there.range, {&there, 1}, m.memory.areas()));
    REQUIRE(m.memory.make_way({0, at(1)}, at(9)));
    const pfn f = m.memory.translate(0).frame;
    m.memory.move_entries({0, at(1)}, at(9));
    REQUIRE(m.put(0, 5) == errc::ok);
    // The entry at 0 is made to point where the other one does, and the frame does not hear of it.
    replacement wrong = detail::to_other_frames(m.ram);
    wrong.made = [](pfn, page_entry old) noexcept { return old.at(doubled); };
    doubled = f;
    paged_memory::page_jobs jobs;
    withdrawn_pages gone;
    REQUIRE(m.memory.plan({0, at(1)}, wrong, jobs));
    m.memory.replace(jobs, wrong, gone);
    m.memory.drop(gone);
    CHECK(std::string(m.verify()) == "a frame's count and the entries that point to it disagree");
  }
  SUBCASE("a page outside all areas") {
    four_pages m{8};
    area_list none;
    m.memory.areas().swap(none);
    CHECK(std::string(m.verify()) == "a page lies in no area");
  }
  SUBCASE("a frame that says mapped and is not") {
    four_pages m{8};
    m.memory.frames().install(m.memory.frames().allocate());
    CHECK(std::string(m.verify()) == "a frame's count and the entries that point to it disagree");
  }
  SUBCASE("a swap slot that is lost") {
    four_pages m{8};
    m.memory.swap().install(m.memory.swap().allocate());
    CHECK(std::string(m.verify()) == "a swap slot's count and the entries that point to it disagree");
  }
}

/// One entry with other bits than it should have, and what verify says then.
std::string broken_by(std::uint64_t set, std::uint64_t cleared, const void* owner = nullptr) {
  four_pages m{8};
  page_slot* const slot = m.memory.table().reach(0);
  const std::uint64_t before = slot->load();
  REQUIRE(m.verify() == nullptr);
  slot->store((before | set) & ~cleared);
  m.memory.frames().set_owner(m.memory.translate(at(1)).frame, owner);
  const char* const broken = m.verify();
  slot->store(before);
  return broken == nullptr ? "" : broken;
}

TEST_CASE("verify names each broken rule of entries") {
  using e = page_entry;
  CHECK(broken_by(e::lock_bit, 0) == "an entry is locked and nobody is inside");
  CHECK(broken_by(0, e::present_bit) == "an empty entry has bits set");
  CHECK(broken_by(e::swapped_bit, 0) == "a page is in two places: present, swapped out, with a device or exclusive");
  CHECK(broken_by(e::exclusive_bit, 0) == "a page is in two places: present, swapped out, with a device or exclusive");
  CHECK(broken_by(e::exclusive_bit, e::present_bit) == "a page is writable and not present");
  CHECK(broken_by(e::exclusive_bit, e::present_bit | e::writable_bit) ==
        "a page has an owner and no device has it, or the reverse");
  CHECK(broken_by(0, e::soft_dirty_bit) == "a page is writable and not soft-dirty");
  CHECK(broken_by(std::uint64_t{1} << 40, 0) == "an entry points outside the pool");
  CHECK(broken_by(std::uint64_t{7} << page_shift, 0) == "an entry points to a frame that does not count it");
  CHECK(broken_by(0, 0, &page_shift) == "a page has an owner and no device has it, or the reverse");
}

TEST_CASE("verify names a shared frame that is writable, an area that is not, and a huge page that is none") {
  four_pages m{8};
  const pfn f = m.memory.translate(0).frame;
  m.memory.frames().share(f);
  CHECK(std::string(m.verify()) == "a shared frame is writable");
  REQUIRE_FALSE(m.memory.frames().withdraw(f));
  area_list next;
  REQUIRE(m.memory.areas().changed(
      {0, at(1)}, [](area& a) { a.allows = protection::read; }, next));
  m.memory.areas().swap(next);
  CHECK(std::string(m.verify()) == "a page is writable and its area is not");
  m.memory.areas().swap(next);
  m.memory.table().set_huge(0);
  CHECK(std::string(m.verify()) == "a huge page is not in one area");
  const area whole{page_table::block_of(0), protection::read_write};
  REQUIRE(m.memory.areas().replaced(whole.range, {&whole, 1}, next));
  m.memory.areas().swap(next);
  CHECK(std::string(m.verify()) == "a huge page is not one block of frames with the same rights");
  m.memory.table().clear_huge(0);
  CHECK(m.verify() == nullptr);
  m.memory.device().install(m.memory.device().allocate());
  CHECK(std::string(m.verify()) == "a device page's count and the entries that point to it disagree");
}

TEST_CASE("faults, replacements and young bits of many threads leave contents and counts right") {
  four_pages m{16, 16};
  {
    std::vector<std::jthread> threads;
    for (std::uint64_t id = 1; id <= 3; ++id) {
      threads.emplace_back([&, id] {
        small_random random{id};
        for (int i = 0; i < 1500; ++i) {
          if (id == 1 && random.below(3) == 0) m.swap_all();
          if (id == 2) m.memory.young({0, at(4)}, true);
          static_cast<void>(m.get(random.below(4)));
        }
      });
    }
  }
  for (std::uintptr_t p = 0; p < 4; ++p) CHECK(m.get(p) == p + 1);
  CHECK(m.verify() == nullptr);
}

}  // namespace
