// SPDX-License-Identifier: MIT

// The calls of an address space besides brackets: in-place changes, device TLBs, young pages, what exists already.

#include <mmunotify/notifier/address_space.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <limits>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/recording_client.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;
using log_type = std::vector<std::string>;

#define EVERY_PRIMARY under_primary, keyed_primary, tracked_primary

namespace {

/// Mirrors one page; keeps it through in-place brackets.
struct one_page_mirror {
  pfn frame{1};
  bool mapped = true;
  bool open = false;
  int zaps = 0;
  void invalidate_range_start(const invalidation& i) noexcept {
    open = true;
    if (i.in_place) return;
    mapped = false;
    ++zaps;
  }
  void invalidate_range_end(const invalidation&) noexcept { open = false; }
  void change_entry(const entry_change& e) noexcept {
    CHECK(open);
    CHECK(e.range == mmunotify::range{0x1000, 0x2000});
    if (mapped) frame = e.frame;
  }
};

struct device_tlb {
  log_type* log = nullptr;
  std::atomic<int> flushes{0};
  void invalidate_secondary_tlbs(mmunotify::range r) noexcept {
    flushes.fetch_add(1);
    if (log != nullptr) log->push_back(logging_client::text(r));
  }
};

}  // namespace

TEST_CASE_TEMPLATE("change_entry replaces a translation that start has kept; who lacks it lets go", P, EVERY_PRIMARY) {
  P primary;
  one_page_mirror mirror;
  counting_client simple;
  subscriber<one_page_mirror> node{mirror};
  subscriber<counting_client> other{simple};
  REQUIRE(primary.join(node) == errc::ok);
  REQUIRE(primary.join(other) == errc::ok);
  const auto reading = primary.lock();
  {
    const auto inv = primary.space.invalidate_in_place({0x1000, 0x2000}, event::clear);
    CHECK(simple.starts.load() == 1);
    primary.space.change_entry({{0x1000, 0x2000}, pfn{2}, false});
  }
  CHECK(mirror.mapped);
  CHECK(mirror.frame == pfn{2});
  CHECK(mirror.zaps == 0);
  { const auto inv = primary.space.invalidate_in_place({0x1000, 0x2000}, event::clear); }  // nothing changed after all
  CHECK(mirror.frame == pfn{2});
  { const auto inv = primary.space.invalidate({0x1000, 0x2000}, event::clear); }
  CHECK_FALSE(mirror.mapped);
  CHECK(primary.space.unregister(node) == errc::ok);
  CHECK(primary.space.unregister(other) == errc::ok);
}

#if MMUNOTIFY_CHECKED
TEST_CASE("O1: checked builds report a change_entry outside of a bracket, and tell nobody") {
  const contract_recorder recorder;
  tracked_primary primary;
  one_page_mirror mirror;
  subscriber<one_page_mirror> node{mirror};
  REQUIRE(primary.join(node) == errc::ok);
  primary.space.change_entry({{0x1000, 0x2000}, pfn{2}, false});
  CHECK(recorder.rules() == log_type{"O1"});
  CHECK(mirror.frame == pfn{1});
  CHECK(primary.space.unregister(node) == errc::ok);
}
#endif

TEST_CASE_TEMPLATE("O4: device TLBs are told the range; up to the last key means all; what is no range tells nobody", P,
                   EVERY_PRIMARY) {
  P primary;
  log_type log;
  device_tlb all{&log};
  device_tlb some{&log};
  subscriber<device_tlb> node_some{some, {.range = mmunotify::range{0x5000, 0x6000}}};
  subscriber<device_tlb> node_all{all};
  constexpr auto top = std::numeric_limits<std::uintptr_t>::max();
  primary.space.invalidate_secondary_tlbs({0, top});  // disarmed
  REQUIRE(primary.join(node_some) == errc::ok);
  REQUIRE(primary.join(node_all) == errc::ok);
  const auto reading = primary.lock();
  primary.space.invalidate_secondary_tlbs({1, 2});
  CHECK(log == log_type{"[1,2)"});
  primary.space.invalidate_secondary_tlbs({0, top});
  CHECK(log.size() == 3);
  primary.space.invalidate_secondary_tlbs({7, 7});
  CHECK(log.size() == 3);
  {
    const contract_recorder recorder;
    primary.space.invalidate_secondary_tlbs({8, 7});
    CHECK(recorder.rules() == log_type{"bad input"});
  }
  CHECK(log.size() == 3);
  // Inside a bracket, too.
  {
    const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    primary.space.invalidate_secondary_tlbs({0, 1});
  }
  CHECK(log.size() == 4);
  CHECK(primary.space.unregister(node_all) == errc::ok);
  CHECK(primary.space.unregister(node_some) == errc::ok);
}

TEST_CASE("O4: a flush waits for nobody: not for a bracket, a removal, a registration or another's callback") {
  tracked_primary primary;
  struct slow {
    std::atomic<bool> in_callback{false};
    std::atomic<bool> let_go{false};
    void invalidate_range_start(const invalidation&) noexcept {
      in_callback.store(true, std::memory_order_release);
      wait_for(let_go);
    }
    void release() noexcept {}
  };
  slow client;
  device_tlb tlb;
  counting_client late_client;
  subscriber<slow> node{client};
  subscriber<device_tlb> tlb_node{tlb};
  subscriber<counting_client> late{late_client};
  REQUIRE(primary.join(node) == errc::ok);
  REQUIRE(primary.join(tlb_node) == errc::ok);
  std::thread bracket([&] { const auto inv = primary.space.invalidate({0, 1}, event::unmap); });
  wait_for(client.in_callback);
  std::thread leaver([&] { CHECK(primary.space.unregister(node) == errc::ok); });  // waits for the bracket
  std::thread comer([&] { CHECK(primary.join(late) == errc::ok); });               // so does this
  while (!late.linked()) std::this_thread::yield();
  for (int i = 0; i < 1000; ++i) primary.space.invalidate_secondary_tlbs({0, 1});
  CHECK(tlb.flushes.load() == 1000);
  CHECK_FALSE(client.let_go.load());
  client.let_go.store(true, std::memory_order_release);
  bracket.join();
  leaver.join();
  comer.join();
  CHECK(primary.space.unregister(late) == errc::ok);
  CHECK(primary.space.unregister(tlb_node) == errc::ok);
}

TEST_CASE_TEMPLATE("O5: young pages: one bit each, from who answers for a batch and who is asked page by page", P,
                   EVERY_PRIMARY) {
  struct by_page {
    std::vector<std::uintptr_t> accessed;
    int cleared = 0;
    bool test_young(mmunotify::range r) noexcept {
      for (const auto a : accessed) {
        if (r.contains(a)) return true;
      }
      return false;
    }
    bool clear_young(mmunotify::range r) noexcept {
      ++cleared;
      return test_young(r);
    }
  };
  struct by_batch {
    int calls = 0;
    void young_pages(young_batch& b) noexcept {
      ++calls;
      b.mark(0x10000 + 65 * page_size);
    }
  };
  P primary;
  by_page pages{{0x10000, 0x10000 + 3 * page_size + 7, 0x10000 + 65 * page_size}};
  by_batch batches;
  subscriber<by_page> node{pages};
  subscriber<by_batch> other{batches};
  std::array<std::uint64_t, 2> bits{};
  const mmunotify::range r{0x10000, 0x10000 + 66 * page_size};
  CHECK(primary.space.young_pages(r, bits, false) == errc::ok);  // disarmed
  CHECK(bits == std::array<std::uint64_t, 2>{});
  REQUIRE(primary.join(node) == errc::ok);
  REQUIRE(primary.join(other) == errc::ok);
  {
    const auto reading = primary.lock();
    CHECK(primary.space.young_pages(r, bits, false) == errc::ok);
    CHECK(bits == std::array<std::uint64_t, 2>{0b1001, 0b10});
    CHECK(batches.calls == 1);
    bits = {};
    CHECK(primary.space.young_pages(r, bits, true) == errc::ok);
    CHECK(pages.cleared == 66);  // clearing asks everybody about every page
    CHECK(bits == std::array<std::uint64_t, 2>{0b1001, 0b10});
  }
  for (const mmunotify::range bad : {mmunotify::range{0x10000, 0x10000}, mmunotify::range{0x20000, 0x10000},
                                     mmunotify::range{0x10001, 0x11001}, mmunotify::range{0, 129 * page_size}}) {
    bits = {5, 5};
    CHECK(primary.space.young_pages(bad, bits, true) == errc::bad_range);
    CHECK(bits == std::array<std::uint64_t, 2>{5, 5});
  }
  CHECK(primary.space.unregister(node) == errc::ok);
  CHECK(primary.space.unregister(other) == errc::ok);
}

namespace {

struct replayed {
  std::vector<mmunotify::range> existing;
  int starts = 0;
  void existing_range(mmunotify::range r) { existing.push_back(r); }
  void invalidate_range_start(const invalidation&) noexcept { ++starts; }
};

}  // namespace

TEST_CASE("a new subscriber is handed what exists, clipped to its filter") {
  std::shared_mutex tables;
  address_space<arming::under<std::shared_mutex>> space;
  const std::vector<mmunotify::range> areas{{0x1000, 0x3000}, {0x4000, 0x9000}, {0xa000, 0xb000}};
  const auto walk = [&](auto&& visit) {
    for (const auto r : areas) visit(r);
  };
  replayed all;
  replayed some;
  counting_client deaf;
  subscriber<replayed> node_all{all};
  subscriber<replayed> node_some{some, {.range = mmunotify::range{0x2000, 0x5000}}};
  subscriber<counting_client> node_deaf{deaf};
  {
    const std::unique_lock held(tables);
    CHECK(space.register_subscriber(node_all, held, walk) == errc::ok);
    CHECK(space.register_subscriber(node_some, held, walk) == errc::ok);
    CHECK(space.register_subscriber(node_deaf, held, walk) == errc::ok);
    CHECK(space.register_subscriber(node_all, held, walk) == errc::already_registered);
  }
  CHECK(all.existing == areas);
  CHECK(some.existing == std::vector<mmunotify::range>{{0x2000, 0x3000}, {0x4000, 0x5000}});
  for (auto* n : std::initializer_list<basic_subscriber<std::uintptr_t>*>{&node_all, &node_some, &node_deaf}) {
    CHECK(space.unregister(*n) == errc::ok);
  }
}

TEST_CASE("what exists and what changes: a tracked subscriber misses no change of what it was handed") {
  address_space<arming::tracked> space;
  std::atomic<bool> in_walk{false};
  std::atomic<bool> changed{false};
  replayed client;
  subscriber<replayed> node{client};
  std::thread changer([&] {
    wait_for(in_walk);
    { const auto inv = space.invalidate({0x1000, 0x2000}, event::unmap); }
    changed.store(true, std::memory_order_release);
  });
  CHECK(space.register_subscriber(node, [](const basic_range_visitor<std::uintptr_t>&) {}) == errc::ok);
  CHECK(space.unregister(node) == errc::ok);
  CHECK(space.register_subscriber(node, [&](auto&& visit) {
    visit(mmunotify::range{0x1000, 0x2000});
    in_walk.store(true, std::memory_order_release);
    wait_for(changed);
  }) == errc::ok);
  changer.join();
  CHECK(client.existing == std::vector<mmunotify::range>{{0x1000, 0x2000}});
  CHECK(client.starts == 1);
  CHECK(space.unregister(node) == errc::ok);
}
