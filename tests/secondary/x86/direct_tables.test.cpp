// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/direct_tables.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <map>
#include <random>
#include <string>
#include <thread>

using namespace mmunotify;
using x86::table_stock;

namespace {
using format = x86::ept_format;
using tables = x86::direct_tables<format>;

bool set(tables& t, table_stock& stock, gfn f, std::uint64_t frame) {
  if (stock.fill(tables::enough) != errc::ok) return false;
  const auto at = t.make(f, 1, stock);
  at.entry->store(format::leaf({frame}, true, 1));
  return at.level == 1;
}
}  // namespace

TEST_CASE("a stock of tables gives back what it got, all zero") {
  table_stock a, b;
  REQUIRE(a.fill(5) == errc::ok);
  x86::direct_table& t = a.pop();
  for (auto& e : t.entries) CHECK(e.load() == 0);
  a.push(t);
  CHECK(a.size() == 5);
  b.take_all(a);
  CHECK(a.size() == 0);
  CHECK(b.size() == 5);
  x86::direct_table& again = b.pop();
  for (auto& e : again.entries) CHECK(e.load() == 0);
  b.push(again);
  REQUIRE(b.fill(5) == errc::ok);
}

TEST_CASE("leaves are found, listed and zapped by range like those of an ordered map, and empty tables go") {
  tables t;
  table_stock stock, removed;
  std::map<std::uint64_t, std::uint64_t> reference;
  std::mt19937_64 random(7);
  const auto frame = [&] {
    const std::uint64_t spread[] = {8, 600, 1 << 20, tables::frame_limit};
    return random() % spread[random() % 4];
  };
  for (int step = 0; step < 3000; ++step) {
    const std::uint64_t f = frame();
    if (random() % 4 != 0) {
      REQUIRE(set(t, stock, {f}, f + 1));
      reference[f] = f + 1;
    } else {
      const std::uint64_t last = std::min(tables::frame_limit, f + 1 + random() % (random() % 2 == 0 ? 20 : 1 << 21));
      std::size_t dropped = 0;
      const bool any = t.zap({f}, {last}, removed, [&](gfn at, unsigned level, std::uint64_t e) {
        REQUIRE(level == 1);
        REQUIRE(reference.at(at.value) == format::frame(e).value);
        ++dropped;
      });
      const auto from = reference.lower_bound(f), to = reference.lower_bound(last);
      REQUIRE(dropped == static_cast<std::size_t>(std::distance(from, to)));
      REQUIRE(any == (dropped != 0));
      reference.erase(from, to);
      stock.take_all(removed);
    }
    const std::uint64_t probe = frame();
    const auto at = t.find({probe});
    REQUIRE((at.level == 1 && format::present(at.value)) == (reference.count(probe) != 0));
  }
  std::size_t n = 0;
  t.for_each_leaf({0}, {tables::frame_limit}, [&](gfn f, unsigned, std::atomic<std::uint64_t>&) {
    REQUIRE(reference.count(f.value) == 1);
    ++n;
  });
  CHECK(n == reference.size());
  CHECK(t.verify() == nullptr);
  t.zap({0}, {tables::frame_limit}, removed, [](gfn, unsigned, std::uint64_t) {});
  for (auto& e : t.root().entries) CHECK(e.load() == 0);
}

TEST_CASE("threads that make the same tables at the same time agree on them") {
  tables t;
  std::atomic<unsigned> ready{0}, wrong{0};
  const auto run = [&](std::uint64_t id) {
    table_stock stock;
    ready.fetch_add(1);
    while (ready.load() != 2) std::this_thread::yield();
    for (std::uint64_t i = 0; i < 4000; ++i) {
      if (!set(t, stock, {(i * 37 + (i % 2) * 5000000) % 40000000 / 2 * 2 + id}, i + 1)) wrong.fetch_add(1);
    }
  };
  std::thread other([&] { run(1); });
  run(0);
  other.join();
  CHECK(wrong.load() == 0);
  std::size_t n[2] = {0, 0};
  t.for_each_leaf({0}, {tables::frame_limit}, [&](gfn f, unsigned, std::atomic<std::uint64_t>&) { ++n[f.value % 2]; });
  CHECK(n[0] == n[1]);
  CHECK(n[0] > 3000);
  CHECK(t.verify() == nullptr);
}

TEST_CASE("the self-check names what no table may hold") {
  tables t;
  table_stock stock;
  REQUIRE(set(t, stock, {5}, 6));
  CHECK(t.verify() == nullptr);
  auto& e = *t.find({5}).entry;
  const std::uint64_t good = e.load();
  e.store(good & ~x86::direct_may_write_bit);
  CHECK(std::string(t.verify()) == "a leaf is writable although it may not be written");
  e.store(good & ~format::read_bit);
  CHECK(std::string(t.verify()) == "an entry has reserved bits");
  e.store(x86::bit(20));
  CHECK(std::string(t.verify()) == "an entry that is not present has bits");
  e.store(good);
  CHECK(t.verify() == nullptr);
}
