// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/memslots.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <climits>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

using namespace mmunotify;
using x86::memslot;
using x86::memslot_config;
using x86::memslots;

namespace {
constexpr hva host{0x10000000};
const auto nothing = [](memslot*, std::uint64_t) {};

struct fixture {
  srcu_domain domain;
  memslots slots{domain};
  std::mutex lock;

  auto runs(range r) {
    std::vector<std::tuple<unsigned, std::uint64_t, std::uint64_t>> found;
    const read_section reading{domain};
    slots.current().for_each_in(
        r, [&](memslot& s, gfn first, gfn last) { found.emplace_back(s.config().id, first.value, last.value); });
    return found;
  }
};
using run = std::tuple<unsigned, std::uint64_t, std::uint64_t>;
}  // namespace

TEST_CASE("a guest frame is found in its slot, and nowhere else") {
  fixture f;
  CHECK_FALSE(f.slots.lookup({0}));
  CHECK(f.slots.add({.id = 2, .base = {100}, .pages = 10, .host = host, .read_only = true}, f.lock) == errc::ok);
  CHECK(f.slots.add({.id = 1, .base = {0}, .pages = 100, .host = host + 0x100000}, f.lock) == errc::ok);
  CHECK(f.slots.lookup({0}).address == host + 0x100000);
  CHECK(f.slots.lookup({99}).address == host + 0x100000 + 99 * page_size);
  CHECK_FALSE(f.slots.lookup({99}).read_only);
  CHECK(f.slots.lookup({100}).address == host);
  CHECK(f.slots.lookup({109}).read_only);
  CHECK(f.slots.lookup({110}).error == errc::not_mapped);
  CHECK(f.slots.current().generation() == 2);
}

TEST_CASE("a slot is found by its id, in whatever order ids come, go and move") {
  fixture f;
  const auto find = [&](unsigned id) { return memslots::find_id(f.slots.current(), id); };
  CHECK(find(0) == nullptr);
  const std::vector<unsigned> ids{7, 3, UINT_MAX, 0, 5};
  for (unsigned n = 0; n < ids.size(); ++n) {
    REQUIRE(f.slots.add({.id = ids[n], .base = {10 * n}, .pages = 1, .host = host}, f.lock) == errc::ok);
    CHECK(f.slots.add({.id = ids[n], .base = {1000}, .pages = 1, .host = host}, f.lock) == errc::already_registered);
  }
  for (unsigned n = 0; n < ids.size(); ++n) {
    REQUIRE(find(ids[n]) != nullptr);
    CHECK(find(ids[n])->config().base == gfn{10 * n});
  }
  for (const unsigned other : {1U, 4U, 6U, 8U, UINT_MAX - 1}) CHECK(find(other) == nullptr);
  REQUIRE(f.slots.move(5, {500}, f.lock, nothing) == errc::ok);
  REQUIRE(f.slots.remove(3, f.lock, nothing) == errc::ok);
  REQUIRE(f.slots.remove(UINT_MAX, f.lock, nothing) == errc::ok);
  CHECK(find(5)->config().base == gfn{500});
  CHECK(find(3) == nullptr);
  CHECK(find(UINT_MAX) == nullptr);
  CHECK(find(0) != nullptr);
  CHECK(find(7) != nullptr);
}

TEST_CASE("a host range names the guest frames behind each of its bytes, in all slots") {
  fixture f;
  REQUIRE(f.slots.add({.id = 1, .base = {10}, .pages = 4, .host = host}, f.lock) == errc::ok);
  REQUIRE(f.slots.add({.id = 2, .base = {50}, .pages = 2, .host = host + page_size}, f.lock) == errc::ok);  // again
  const auto h = static_cast<std::uintptr_t>(host.value);
  CHECK(f.runs({h, h + 1}) == std::vector<run>{{1, 10, 11}});
  CHECK(f.runs({h + 4095, h + 4097}) == std::vector<run>{{1, 10, 12}, {2, 50, 51}});
  CHECK(f.runs({0, h}).empty());
  CHECK(f.runs({h + 4 * 4096, UINTPTR_MAX}).empty());
  CHECK(f.runs({0, UINTPTR_MAX}) == std::vector<run>{{1, 10, 14}, {2, 50, 52}});
  CHECK(f.runs({h + 5, h + 5}).empty());
  CHECK(f.runs({h + 6, h + 5}).empty());
}

TEST_CASE("bad slots are refused with the reason, and nothing has changed") {
  fixture f;
  REQUIRE(f.slots.add({.id = 1, .base = {10}, .pages = 4, .host = host}, f.lock) == errc::ok);
  const auto bad = [&](memslot_config c) { return f.slots.add(c, f.lock); };
  CHECK(bad({.id = 2, .base = {20}, .pages = 0, .host = host}) == errc::bad_range);
  CHECK(bad({.id = 2, .base = {20}, .pages = 1, .host = host + 1}) == errc::bad_range);
  CHECK(bad({.id = 2, .base = {memslots::frame_limit - 1}, .pages = 2, .host = host}) == errc::bad_range);
  CHECK(bad({.id = 2, .base = {UINT64_MAX}, .pages = 2, .host = host}) == errc::bad_range);
  CHECK(bad({.id = 2, .base = {20}, .pages = UINT64_MAX, .host = host}) == errc::bad_range);
  CHECK(bad({.id = 2, .base = {20}, .pages = 2, .host = hva{UINT64_MAX - page_mask}}) == errc::bad_range);
  CHECK(bad({.id = 2, .base = {13}, .pages = 1, .host = host}) == errc::overlap);
  CHECK(bad({.id = 2, .base = {0}, .pages = 11, .host = host}) == errc::overlap);
  CHECK(bad({.id = 1, .base = {20}, .pages = 1, .host = host}) == errc::already_registered);
  CHECK(f.slots.remove(2, f.lock, nothing) == errc::not_registered);
  CHECK(f.slots.move(2, {0}, f.lock, nothing) == errc::not_registered);
  CHECK(f.slots.move(1, {memslots::frame_limit}, f.lock, nothing) == errc::bad_range);
  CHECK(f.slots.current().generation() == 1);
  CHECK(f.slots.lookup({10}).address == host);
  CHECK(f.slots.current().slots().size() == 1);
}

TEST_CASE("a slot that goes is zapped under the lock while readers still see it, and then it is gone") {
  fixture f;
  REQUIRE(f.slots.add({.id = 1, .base = {10}, .pages = 4, .host = host}, f.lock) == errc::ok);
  int zaps = 0;
  const auto zap = [&](memslot* going, std::uint64_t generation) {
    ++zaps;
    CHECK(generation == f.slots.current().generation() + 1);
    bool taken = false;
    std::thread([&] { taken = f.lock.try_lock(); }).join();
    CHECK_FALSE(taken);
    CHECK(f.slots.current().find(going->config().base) == going);
  };
  CHECK(f.slots.move(1, {12}, f.lock, zap) == errc::ok);  // onto its own old frames
  CHECK(zaps == 1);
  CHECK(f.slots.lookup({12}).address == host);
  CHECK_FALSE(f.slots.lookup({11}));
  CHECK(f.slots.remove(1, f.lock, zap) == errc::ok);
  CHECK(zaps == 2);
  CHECK_FALSE(f.slots.lookup({12}));
}

TEST_CASE("S1: a reader keeps the snapshot that it found while slots come and go") {
  fixture f;
  REQUIRE(f.slots.add({.id = 1, .base = {0}, .pages = 8, .host = host}, f.lock) == errc::ok);
  std::atomic<bool> stop{false};
  std::atomic<unsigned> wrong{0}, rounds{0};
  std::thread reader([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      const read_section reading{f.domain};
      const auto& now = f.slots.current();
      const auto generation = now.generation();
      for (std::uint64_t g = 0; g < 24; ++g) {
        const memslot* s = now.find({g});
        if (s != nullptr && !s->config().contains({g})) wrong.fetch_add(1, std::memory_order_relaxed);
        if (g % 8 == 7) std::this_thread::yield();
      }
      if (now.generation() != generation || now.slots().empty()) wrong.fetch_add(1, std::memory_order_relaxed);
      rounds.fetch_add(1, std::memory_order_relaxed);
    }
  });
  for (int i = 0; i < 300; ++i) {
    for (const unsigned seen = rounds.load(); rounds.load() == seen;) std::this_thread::yield();
    REQUIRE(f.slots.add({.id = 2, .base = {8}, .pages = 8, .host = host}, f.lock) == errc::ok);
    REQUIRE(f.slots.move(2, {16}, f.lock, nothing) == errc::ok);
    REQUIRE(f.slots.remove(2, f.lock, nothing) == errc::ok);
  }
  stop.store(true, std::memory_order_relaxed);
  reader.join();
  CHECK(wrong.load() == 0);
}
