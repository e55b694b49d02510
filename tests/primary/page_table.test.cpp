// SPDX-License-Identifier: MIT

#include <mmunotify/primary/page_table.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <thread>
#include <vector>

#include "support/threads.hpp"

using namespace mmunotify;

namespace {

page_entry entry_of(std::uint64_t f) { return page_entry::mapping(pfn{f}, false); }

void set(page_table& table, std::uintptr_t a, page_entry value) {
  page_slot* const slot = table.reach(a);
  REQUIRE(slot != nullptr);
  locked_entry entry{*slot};
  entry.value = value;
}

TEST_CASE("an entry is nothing, a frame, or a swap slot") {
  CHECK(page_entry{}.none());
  const page_entry mapped = page_entry::mapping(pfn{0}, true);
  CHECK(mapped.present());
  CHECK(mapped.young());
  CHECK_FALSE(mapped.swapped());
  CHECK_FALSE(mapped.none());
  CHECK(mapped.frame() == pfn{0});
  const page_entry swapped = page_entry::swapped_to(pfn{0x1234567});
  CHECK(swapped.swapped());
  CHECK_FALSE(swapped.present());
  CHECK_FALSE(swapped.young());
  CHECK(swapped.frame() == pfn{0x1234567});
}

TEST_CASE("an entry's kinds exclude each other, and another frame keeps the bits") {
  const page_entry device = page_entry::on_device(pfn{5});
  CHECK(device.device());
  CHECK_FALSE(device.present());
  CHECK_FALSE(device.has_frame());
  CHECK_FALSE(device.none());
  const page_entry own = page_entry::mapping(pfn{6}, false)
                             .without(page_entry::present_bit)
                             .with(page_entry::exclusive_bit | page_entry::soft_dirty_bit);
  CHECK(own.exclusive());
  CHECK(own.has_frame());
  CHECK_FALSE(own.present());
  CHECK_FALSE(own.none());
  const page_entry moved = own.at(pfn{7});
  CHECK(moved.frame() == pfn{7});
  CHECK(moved.exclusive());
  CHECK(moved.soft_dirty());
  CHECK_FALSE(moved.writable());
}

TEST_CASE("a huge mark belongs to its 2 MiB, is cleared once, and hides nothing") {
  page_table table;
  constexpr std::uintptr_t size = page_table::block_size;
  CHECK_FALSE(table.huge(5 * size));
  CHECK_FALSE(table.clear_huge(5 * size));
  for (const std::uintptr_t b : std::initializer_list<std::uintptr_t>{5, 6, 8})
    set(table, b * size + 3 * page_size, entry_of(b));
  table.set_huge(6 * size + 123);
  table.set_huge(8 * size);
  CHECK_FALSE(table.huge(5 * size));
  CHECK(table.huge(6 * size));
  CHECK(table.huge(7 * size - 1));
  CHECK(table.peek(6 * size + 3 * page_size).frame() == pfn{6});
  CHECK(table.reach(6 * size + 4 * page_size) != nullptr);
  CHECK(table.nodes() == 6);
  std::vector<std::uintptr_t> blocks, huge;
  table.for_each_block({5 * size, 9 * size}, [&](std::uintptr_t b, bool) { blocks.push_back(b / size); });
  table.for_each_huge({6 * size + page_size, 9 * size}, [&](std::uintptr_t b) { huge.push_back(b / size); });
  CHECK(blocks == std::vector<std::uintptr_t>{5, 6, 8});
  CHECK(huge == std::vector<std::uintptr_t>{6, 8});
  CHECK(table.clear_huge(6 * size));
  CHECK_FALSE(table.clear_huge(6 * size));
  CHECK(table.peek(6 * size + 3 * page_size).frame() == pfn{6});
  CHECK(page_table::block_of(6 * size + 5) == range{6 * size, 7 * size});
}

TEST_CASE("entries at the borders of every level are found where they were put, and in order") {
  page_table table;
  std::map<std::uintptr_t, std::uint64_t> model;
  std::uint64_t f = 1;
  for (unsigned shift = page_shift; shift <= 57; shift += 9) {
    for (const std::uint64_t distance : {0U, 1U, 2U}) {
      const std::uintptr_t border = std::uintptr_t{1} << shift;
      for (const std::uintptr_t a : {border - distance * page_size, border + distance * page_size}) {
        if (a >= page_table::address_limit) continue;
        model[a] = ++f;
        set(table, a, entry_of(f));
      }
    }
  }
  for (const auto& [a, frame] : model) CHECK(table.peek(a + 5).frame() == pfn{frame});
  CHECK(table.peek(0x7777'0000).none());
  auto next = model.begin();
  table.for_each({0, page_table::address_limit}, [&](std::uintptr_t a, page_slot& slot) {
    REQUIRE(next != model.end());
    CHECK(a == next->first);
    CHECK(page_entry{slot.load()}.frame() == pfn{next->second});
    ++next;
  });
  CHECK(next == model.end());
}

TEST_CASE("for_each visits exactly the entries of the range") {
  page_table table;
  const std::uintptr_t edge = std::uintptr_t{1} << 21;  // two leaf nodes meet
  for (std::uintptr_t p = 0; p < 8; ++p) set(table, edge + (p - 4) * page_size, entry_of(p));
  for (std::uintptr_t first = 0; first <= 8; ++first) {
    for (std::uintptr_t last = first; last <= 8; ++last) {
      std::uintptr_t expected = first;
      table.for_each({edge + (first - 4) * page_size, edge + (last - 4) * page_size},
                     [&](std::uintptr_t, page_slot& slot) {
                       CHECK(page_entry{slot.load()}.frame() == pfn{expected});
                       ++expected;
                     });
      CHECK(expected == last);
    }
  }
}

TEST_CASE("pruning frees the nodes that became empty, and only those") {
  page_table table;
  const std::uintptr_t far = std::uintptr_t{1} << 50;
  set(table, 0, entry_of(1));
  CHECK(table.nodes() == 4);
  set(table, far, entry_of(2));
  set(table, far + page_size, entry_of(3));
  CHECK(table.nodes() == 8);
  set(table, far, {});
  table.prune({far, far + page_size});
  CHECK(table.nodes() == 8);
  set(table, far + page_size, {});
  table.prune({far, far + 2 * page_size});
  CHECK(table.nodes() == 4);
  CHECK(table.peek(0).frame() == pfn{1});
  set(table, 0, {});
  table.prune({0, page_table::address_limit});
  CHECK(table.nodes() == 0);
}

TEST_CASE("two threads that make the same nodes at once get the same entry") {
  for (int round = 0; round < 1500; ++round) {
    page_table table;
    std::atomic<int> ready{0};
    page_slot* found[2] = {};
    const auto reach = [&](int me) {
      ready.fetch_add(1, std::memory_order_relaxed);
      while (ready.load(std::memory_order_relaxed) != 2) std::this_thread::yield();
      found[me] = table.reach(0x1234'5000);
    };
    std::thread other([&] { reach(1); });
    reach(0);
    other.join();
    REQUIRE(found[0] == found[1]);
    REQUIRE(table.nodes() == 4);
  }
}

TEST_CASE("threads that reach for the same entries get the same ones, and their locks exclude each other") {
  constexpr int rounds = 4000;
  constexpr std::uintptr_t spread = (std::uintptr_t{1} << 30) + page_size;
  page_table table;
  std::uint64_t plain[8] = {};
  {
    std::vector<std::jthread> threads;
    for (std::uint64_t id = 1; id <= 3; ++id) {
      threads.emplace_back([&, id] {
        small_random random{id};
        for (int i = 0; i < rounds; ++i) {
          const std::uintptr_t p = random.below(8);
          locked_entry entry{*table.reach(p * spread)};
          entry.value = entry_of(entry.value.frame().value + 1);
          const std::uint64_t before = plain[p];
          if (i % 64 == 0) std::this_thread::yield();
          plain[p] = before + 1;
        }
      });
    }
  }
  std::uint64_t total = 0;
  for (std::uintptr_t p = 0; p < 8; ++p) {
    CHECK(table.peek(p * spread).frame().value == plain[p]);
    total += plain[p];
  }
  CHECK(total == 3 * rounds);
}

}  // namespace
