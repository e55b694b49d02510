// SPDX-License-Identifier: MIT

#include <mmunotify/primary/frame_pool.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "support/threads.hpp"

using namespace mmunotify;

namespace {

TEST_CASE("every frame can be had once, and then none") {
  frame_pool pool{5};
  std::set<std::uint64_t> seen;
  for (int i = 0; i < 5; ++i) seen.insert(pool.allocate().value);
  CHECK(seen.size() == 5);
  CHECK(pool.allocate() == frame_pool::none);
  CHECK(pool.free_count() == 0);
  for (const std::uint64_t f : seen) pool.drop(pfn{f});
  CHECK(pool.free_count() == 5);
  CHECK(pool.verify() == nullptr);
}

TEST_CASE("the frame that was freed longest ago is used first, and is poisoned until then") {
  frame_pool pool{3};
  const pfn a = pool.allocate();
  const pfn b = pool.allocate();
  std::memset(pool.data(a), 1, page_size);
  pool.drop(a);
  pool.drop(b);
  CHECK(pool.generation(a) == 1);
  CHECK(pool.allocate().value == 2);
  CHECK(pool.allocate() == a);
  for (std::size_t i = 0; i < page_size; ++i) REQUIRE(pool.data(a)[i] == frame_pool::poison);
  CHECK(pool.verify() == nullptr);
}

TEST_CASE("a frame is freed by whoever gives up the last right to it, exactly once, in any order") {
  // 0: unpin, 1: unpin, 2: withdraw and drop; all orders of these three
  const int orders[3][3] = {{2, 0, 1}, {0, 2, 1}, {0, 1, 2}};
  for (const auto& order : orders) {
    frame_pool pool{2};
    const pfn f = pool.allocate();
    pool.install(f);
    pool.pin(f);
    pool.pin(f);
    CHECK(pool.on_loan(f));
    for (const int step : order) {
      CHECK(pool.generation(f) == 0);
      if (step == 2) {
        CHECK(pool.withdraw(f));
        pool.drop(f);
      } else {
        CHECK(pool.unpin(f));
      }
    }
    CHECK(pool.generation(f) == 1);
    CHECK(pool.free_count() == 2);
    CHECK_FALSE(pool.unpin(f));
    CHECK(pool.verify() == nullptr);
  }
}

TEST_CASE("what is not on loan cannot be given back") {
  frame_pool pool{2};
  CHECK_FALSE(pool.unpin(pfn{0}));
  CHECK_FALSE(pool.unpin(pfn{2}));
  const pfn f = pool.allocate();
  CHECK_FALSE(pool.unpin(f));
  pool.install(f);
  CHECK_FALSE(pool.unpin(f));
  CHECK_FALSE(pool.on_loan(f));
  CHECK(pool.mapped(f));
  CHECK(pool.free_count() == 1);
}

TEST_CASE("a chain collects frames and drops them all; those on loan stay") {
  frame_pool pool{4};
  frame_chain chain;
  CHECK(chain.empty());
  pfn kept;
  for (int i = 0; i < 4; ++i) {
    const pfn f = pool.allocate();
    pool.install(f);
    if (i == 2) pool.pin(kept = f);
    REQUIRE(pool.withdraw(f));
    pool.push(chain, f);
  }
  CHECK(chain.size() == 4);
  pool.drop(chain);
  CHECK(chain.empty());
  CHECK(pool.free_count() == 3);
  CHECK(pool.unpin(kept));
  CHECK(pool.free_count() == 4);
  CHECK(pool.verify() == nullptr);
}

#if !MMUNOTIFY_ASAN  // which reports the write itself
TEST_CASE("a write to a freed frame is noticed by verify, and counted when the frame is used again") {
  frame_pool pool{1};
  const pfn f = pool.allocate();
  std::byte* const stale = pool.data(f);
  pool.drop(f);
  CHECK(pool.verify() == nullptr);
  stale[page_size - 1] = std::byte{0};
  REQUIRE(pool.verify() != nullptr);
  CHECK(std::string(pool.verify()) == "a freed frame was written");
  CHECK(pool.stale_writes() == 0);
  REQUIRE(pool.allocate() == f);
  CHECK(pool.stale_writes() == 1);
  CHECK(pool.verify() != nullptr);
}
#else
TEST_CASE("a freed frame is poisoned in AddressSanitizer's shadow, and a used one is not") {
  frame_pool pool{2};
  CHECK(__asan_region_is_poisoned(pool.data(pfn{0}), 2 * page_size) != nullptr);
  const pfn f = pool.allocate();
  CHECK(__asan_region_is_poisoned(pool.data(f), page_size) == nullptr);
  pool.drop(f);
  CHECK(__asan_address_is_poisoned(pool.data(f)));
  CHECK(__asan_address_is_poisoned(pool.data(f) + page_size - 1));
}
#endif

TEST_CASE("a shared frame is held again after the last of its entries is gone, in any order with loans") {
  for (const bool lent : {false, true}) {
    frame_pool pool{2};
    const pfn f = pool.allocate();
    pool.install(f);
    CHECK(pool.sole(f));
    pool.share(f);
    pool.share(f);
    CHECK(pool.maps(f) == 3);
    CHECK_FALSE(pool.sole(f));
    if (lent) pool.pin(f);
    CHECK_FALSE(pool.withdraw(f));
    CHECK_FALSE(pool.withdraw(f));
    CHECK(pool.sole(f));
    CHECK(pool.mapped(f));
    CHECK(pool.withdraw(f));
    CHECK_FALSE(pool.mapped(f));
    pool.drop(f);
    CHECK(pool.generation(f) == (lent ? 0 : 1));
    if (lent) CHECK(pool.unpin(f));
    CHECK(pool.free_count() == 2);
    CHECK(pool.verify() == nullptr);
  }
}

TEST_CASE("an owner is forgotten when the frame is freed") {
  frame_pool pool{1};
  const pfn f = pool.allocate();
  CHECK(pool.owner(f) == nullptr);
  pool.set_owner(f, &pool);
  CHECK(pool.owner(f) == &pool);
  pool.drop(f);
  REQUIRE(pool.allocate() == f);
  CHECK(pool.owner(f) == nullptr);
}

TEST_CASE("a block is aligned and in a row, leaves the list's order as it is, and is freed frame by frame") {
  constexpr std::size_t n = frame_pool::block_frames;
  frame_pool pool{3 * n + 7};
  const pfn first = pool.allocate();
  REQUIRE(first.value == 0);
  const pfn b = pool.allocate_block();
  CHECK(b.value == n);
  CHECK(pool.free_count() == 2 * n + 6);
  CHECK(pool.verify() == nullptr);
  const pfn c = pool.allocate_block();
  CHECK(c.value == 2 * n);
  CHECK(pool.allocate_block() == frame_pool::none);  // one frame of the first block is taken, and the last 7 are none
  CHECK(pool.free_count() == n + 6);
  for (std::size_t i = 1; i < n; ++i) REQUIRE(pool.allocate().value == i);
  CHECK(pool.allocate().value == 3 * n);
  for (std::size_t i = 0; i < n; ++i) {
    fill_page(pool.data(b + i), std::byte{1});
    pool.drop(b + i);
  }
  CHECK(pool.verify() == nullptr);
  CHECK(pool.allocate_block() == b);
  CHECK(pool.stale_writes() == 0);
  frame_pool small{n - 1};
  CHECK(small.allocate_block() == frame_pool::none);
}

TEST_CASE("blocks and single frames of many threads never share a frame") {
  constexpr std::size_t n = frame_pool::block_frames;
  frame_pool pool{4 * n};
  std::atomic<int> wrong{0};
  {
    std::vector<std::jthread> threads;
    for (std::uint64_t id = 1; id <= 3; ++id) {
      threads.emplace_back([&, id] {
        for (int i = 0; i < 40; ++i) {
          const bool block = (static_cast<std::uint64_t>(i) + id) % 3 == 0;
          const pfn first = block ? pool.allocate_block() : pool.allocate();
          if (first == frame_pool::none) continue;
          const std::size_t count = block ? n : 1;
          for (std::size_t f = 0; f < count; ++f) pool.data(first + f)[0] = static_cast<std::byte>(id);
          std::this_thread::yield();
          for (std::size_t f = 0; f < count; ++f) {
            if (pool.data(first + f)[0] != static_cast<std::byte>(id)) wrong.fetch_add(1);
            pool.drop(first + f);
          }
        }
      });
    }
  }
  CHECK(wrong == 0);
  CHECK(pool.free_count() == 4 * n);
  CHECK(pool.verify() == nullptr);
}

TEST_CASE("a pool without memory is empty and says so") {
  frame_pool none{0};
  CHECK(none.allocate() == frame_pool::none);
  CHECK(none.verify() == nullptr);
  frame_pool too_large{std::size_t{1} << 40};
  CHECK(too_large.size() == 0);
  CHECK(too_large.allocate() == frame_pool::none);
}

/// One frame after another is lent to another thread; both write to it and give it up, in any order.
struct pair_of_owners {
  static constexpr int rounds = 2000;
  frame_pool pool{8};
  std::atomic<std::uint64_t> lent{~std::uint64_t{0}};

  void borrower() {
    for (int i = 0; i < rounds; ++i) {
      std::uint64_t f = 0;
      while ((f = lent.exchange(~std::uint64_t{0}, std::memory_order_acquire)) == ~std::uint64_t{0}) {
        std::this_thread::yield();
      }
      pool.data(pfn{f})[0] = std::byte{1};
      static_cast<void>(pool.unpin(pfn{f}));
    }
  }
  void lender() {
    for (int i = 0; i < rounds; ++i) {
      frame_chain chain;
      for (int n = 0; n < 3; ++n) {
        pfn f = frame_pool::none;
        while ((f = pool.allocate()) == frame_pool::none) std::this_thread::yield();
        if (n == 0) {
          pool.pin(f);
          std::uint64_t nobody = ~std::uint64_t{0};
          while (!lent.compare_exchange_weak(nobody, f.value, std::memory_order_release, std::memory_order_relaxed)) {
            nobody = ~std::uint64_t{0};
            std::this_thread::yield();
          }
        }
        pool.data(f)[page_size / 2] = std::byte{2};
        pool.push(chain, f);
      }
      pool.drop(chain);
    }
  }
};

TEST_CASE("whoever frees a frame has seen what the other did to it") {
  pair_of_owners owners;
  {
    const std::jthread borrower([&] { owners.borrower(); });
    owners.lender();
  }
  CHECK(owners.pool.free_count() == 8);
  const char* const broken = owners.pool.verify();
  CHECK_MESSAGE(broken == nullptr, broken);
}

TEST_CASE("threads that allocate, lend and free never share a frame, and none is lost") {
  constexpr std::size_t frames = 24;
  frame_pool pool{frames};
  std::atomic<int> wrong{0};
  {
    std::vector<std::jthread> threads;
    for (std::uint64_t id = 1; id <= 3; ++id) {
      threads.emplace_back([&, id] {
        small_random random{id};
        for (int i = 0; i < 1500; ++i) {
          frame_chain chain;
          for (std::uint64_t n = random.below(8); n != 0; --n) {
            const pfn f = pool.allocate();
            if (f == frame_pool::none) break;
            fill_page(pool.data(f), static_cast<std::byte>(id));
            pool.install(f);
            pool.pin(f);
            if (!pool.withdraw(f)) wrong.fetch_add(1);
            if (pool.data(f)[random.below(page_size)] != static_cast<std::byte>(id)) wrong.fetch_add(1);
            if (!pool.unpin(f)) wrong.fetch_add(1);
            pool.push(chain, f);
          }
          pool.drop(chain);
        }
      });
    }
    for (int i = 0; i < 50; ++i) {
      if (pool.verify() != nullptr) wrong.fetch_add(1);
    }
  }
  CHECK(wrong == 0);
  CHECK(pool.free_count() == frames);
  CHECK(pool.verify() == nullptr);
}

}  // namespace
