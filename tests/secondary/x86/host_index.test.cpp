// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/host_index.hpp>

#include <doctest/doctest.h>

#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <vector>

#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
/// Slots of any host range; the guest's side is of no matter here.
struct fixture {
  x86::flush_gate gate;
  x86::memslots slots{gate.domain()};
  std::mutex lock;
  std::vector<x86::memslot_config> known;  ///< by id
  std::set<unsigned> present;

  /// n pages from page `first` of the host on.
  unsigned add(std::uint64_t first, std::uint64_t n) {
    const auto id = static_cast<unsigned>(known.size());
    known.push_back({.id = id, .base = {std::uint64_t{id} << 20}, .pages = n, .host = ram_base + first * page_size});
    REQUIRE(slots.add(known.back(), lock) == errc::ok);
    present.insert(id);
    return id;
  }
  void remove(unsigned id) {
    REQUIRE(slots.remove(id, lock, [](x86::memslot*, std::uint64_t) noexcept {}) == errc::ok);
    present.erase(id);
  }
  static range bytes(std::uint64_t first, std::uint64_t last) {
    const auto base = static_cast<std::uintptr_t>(ram_base.value);
    return {base + first, base + last};
  }
  std::set<unsigned> found(range r) const {
    std::set<unsigned> ids;
    slots.current().for_each_in(r, [&](x86::memslot& s, gfn first, gfn last) {
      REQUIRE(ids.insert(s.config().id).second);
      const range hit = r.clipped_to(s.config().host_range());
      REQUIRE(s.config().host_of(first).value <= hit.first);
      REQUIRE(s.config().host_of(first).value + page_size > hit.first);
      REQUIRE((last - s.config().base) * page_size >= hit.last - s.config().host.value);
    });
    return ids;
  }
  std::set<unsigned> expected(range r) const {
    std::set<unsigned> ids;
    for (const unsigned id : present) {
      if (!r.empty() && known[id].host_range().overlaps(r)) ids.insert(id);
    }
    return ids;
  }
};
}  // namespace

TEST_CASE("K3: a bracket finds the slot that began long before it, behind thousands of small ones") {
  fixture f;
  const unsigned large = f.add(0, 1000);
  for (std::uint64_t i = 0; i < 100; ++i) f.add(2 * i, 1);
  CHECK(f.found(f.bytes(999 * page_size, 999 * page_size + 1)) == std::set<unsigned>{large});
  CHECK(f.found(f.bytes(4 * page_size, 4 * page_size + 1)) == std::set<unsigned>{large, 3});
  CHECK(f.found(f.bytes(1000 * page_size, 1001 * page_size)).empty());
  CHECK(f.found(f.bytes(0, 0)).empty());
  f.remove(large);
  CHECK(f.found(f.bytes(999 * page_size, 999 * page_size + 1)).empty());
  CHECK(f.found({0, UINTPTR_MAX}).size() == 100);
}

TEST_CASE("whatever slots come and go, a range finds those that a look at each would find") {
  std::mt19937_64 random(seed());
  for (int round = 0; round < 20; ++round) {
    fixture f;
    for (int step = 0; step < 120; ++step) {
      if (f.present.size() > 40 && random() % 2 == 0) {
        f.remove(*std::next(f.present.begin(), static_cast<long>(random() % f.present.size())));
      } else {
        f.add(random() % 256, 1 + (random() % 8 == 0 ? random() % 200 : random() % 4));
      }
      for (int n = 0; n < 10; ++n) {
        const std::uint64_t first = random() % (300 * page_size);
        const range r = f.bytes(first, first + random() % (random() % 4 == 0 ? 100 * page_size : 3 * page_size));
        REQUIRE(f.found(r) == f.expected(r));
      }
    }
  }
}

TEST_CASE("a question about one page looks at a few elements, however many slots there are") {
  x86::flush_gate gate;
  x86::memslots slots{gate.domain()};
  std::mutex lock;
  auto index = std::make_unique<x86::host_index>();
  for (unsigned i = 0; i < 1024; ++i) {
    REQUIRE(slots.add({.id = i, .base = {2 * i}, .pages = 2, .host = ram_base + i * page_size}, lock) == errc::ok);
    auto next = std::make_unique<x86::host_index>();
    REQUIRE(next->succeed(*index, nullptr, x86::memslots::find_id(slots.current(), i)));
    index = std::move(next);
  }
  REQUIRE(index->size() == 1024);
  for (const std::uint64_t page : {0U, 1U, 500U, 1023U, 1024U, 2000U}) {
    const auto first = static_cast<std::uintptr_t>(ram_base.value + page * page_size);
    std::size_t hits = 0;
    const std::size_t seen = index->for_each_in({first, first + page_size}, [&](x86::memslot&) { ++hits; });
    CHECK(hits == (page == 0 || page == 1024 ? 1 : page < 1024 ? 2 : 0));
    CHECK(seen <= 24);
  }
}
