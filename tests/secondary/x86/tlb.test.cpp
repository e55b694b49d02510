// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <mutex>
#include <thread>

using namespace mmunotify;
using x86::flush_gate;
using x86::guest_mode_section;
using x86::rights;
using x86::soft_tlb;
using x86::vcpu_port;

TEST_CASE("a TLB entry answers for its page alone") {
  std::array<std::byte, page_size> a{}, b{};
  soft_tlb<4> tlb;
  CHECK(tlb.find({0}) == nullptr);
  tlb.insert({0x1234}, a.data(), rights{}, true);
  REQUIRE(tlb.find({0x1fff}) != nullptr);
  CHECK(tlb.find({0x1000})->host == a.data());
  CHECK(tlb.find({0x1000})->guest_user);
  CHECK(tlb.find({0x2000}) == nullptr);
  CHECK(tlb.find({0x5000}) == nullptr);  // the same place, another page
  tlb.insert({0x5000}, b.data(), rights{0}, false);
  CHECK(tlb.find({0x1000}) == nullptr);
  tlb.drop({0x1000});
  CHECK(tlb.find({0x5000}) != nullptr);
  tlb.drop({0x5fff});
  CHECK(tlb.find({0x5000}) == nullptr);
  tlb.insert({0xfffffffffffff000}, a.data(), rights{}, false);
  CHECK(tlb.find({0xffffffffffffffff}) != nullptr);
  tlb.clear();
  CHECK(tlb.find({0xffffffffffffffff}) == nullptr);
}

TEST_CASE("the roots of the last few address spaces are remembered, the least recently used one goes first") {
  std::array<x86::shadow_page, 6> pages;
  vcpu_port port;
  const auto key = [](std::uint64_t i) { return x86::root_key{{i}, 7}; };
  for (std::uint64_t i = 0; i < 4; ++i) {
    CHECK_FALSE(port.select(key(i)));
    CHECK(port.root() == nullptr);
    port.set_root(&pages[i]);
  }
  for (std::uint64_t i = 0; i < 4; ++i) {
    CHECK(port.select(key(i)));
    CHECK(port.root() == &pages[i]);
  }
  CHECK(port.select(key(0)));
  CHECK_FALSE(port.select(key(4)));  // in the place of 1
  port.set_root(&pages[4]);
  CHECK(port.select(key(0)));
  CHECK(port.select(key(2)));
  CHECK(port.select(key(3)));
  CHECK_FALSE(port.select(key(1)));
  CHECK_FALSE(port.select({{2}, 8}));  // another role
  CHECK(port.select(key(2)));
  port.forget_root(pages[2]);
  CHECK(port.root() == nullptr);
  CHECK_FALSE(port.select(key(2)));
  CHECK(port.select(key(3)));
  unsigned n = 0;
  port.for_each_root([&](const x86::shadow_page&) { ++n; });
  CHECK(n == 1);
  port.forget_roots();
  CHECK_FALSE(port.select(key(3)));
}

TEST_CASE("a flush empties every TLB before its vCPU looks something up again, and only once") {
  flush_gate gate;
  std::mutex lock;
  std::array<vcpu_port, 2> ports;
  std::array<soft_tlb<>, 2> tlbs;
  std::array<std::byte, page_size> page{};
  CHECK(gate.empty());
  for (auto& p : ports) gate.attach_locked(p);
  for (std::size_t i = 0; i < 2; ++i) {
    const guest_mode_section in{gate, ports[i], tlbs[i]};
    tlbs[i].insert({0x1000}, page.data(), rights{}, false);
  }
  {
    const std::lock_guard locked{lock};
    gate.flush_locked();
  }
  for (std::size_t i = 0; i < 2; ++i) {
    {
      const guest_mode_section in{gate, ports[i], tlbs[i]};
      CHECK(tlbs[i].find({0x1000}) == nullptr);
      tlbs[i].insert({0x1000}, page.data(), rights{}, false);
    }
    const guest_mode_section in{gate, ports[i], tlbs[i]};
    CHECK(tlbs[i].find({0x1000}) != nullptr);
  }
  for (auto& p : ports) gate.detach_locked(p);
  CHECK(gate.empty());
  CHECK(gate.flushes() == 1);
}

TEST_CASE("K3: a flush returns only after every vCPU that was in guest mode has left it") {
  flush_gate gate;
  std::mutex lock;
  vcpu_port port;
  soft_tlb<> tlb;
  gate.attach_locked(port);
  std::atomic<bool> inside{false}, flushing{false}, flushed{false};
  bool too_early = false;
  std::thread guest([&] {
    const guest_mode_section in{gate, port, tlb};
    inside.store(true);
    while (!flushing.load()) std::this_thread::yield();
    for (int i = 0; i < 2000; ++i) {
      std::this_thread::yield();
      too_early = too_early || flushed.load();
    }
  });
  while (!inside.load()) std::this_thread::yield();
  {
    const std::lock_guard locked{lock};
    flushing.store(true);
    gate.flush_locked();
    flushed.store(true);
  }
  guest.join();
  CHECK_FALSE(too_early);
  gate.detach_locked(port);
}

TEST_CASE("K3: no vCPU uses a translation after the flush that took it away") {
  constexpr int rounds = 3000;
  flush_gate gate;
  std::mutex lock;
  vcpu_port port;
  soft_tlb<> tlb;
  gate.attach_locked(port);
  std::array<std::array<std::byte, 8>, 2> page{};
  std::atomic<std::byte*> table{page[0].data()};     // stands for the shadow tables
  std::atomic<const std::byte*> forbidden{nullptr};  // must not be used any more
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::thread guest([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      const guest_mode_section in{gate, port, tlb};
      if (tlb.find({0}) == nullptr) tlb.insert({0}, table.load(std::memory_order_acquire), rights{}, false);
      if (tlb.find({0})->host == forbidden.load(std::memory_order_relaxed)) wrong.fetch_add(1);
    }
  });
  for (int i = 0; i < rounds; ++i) {
    forbidden.store(nullptr, std::memory_order_relaxed);
    gate.domain().synchronize();  // nobody reads the old value of `forbidden` any more
    const std::lock_guard locked{lock};
    std::byte* const old = page[static_cast<std::size_t>(i % 2)].data();
    table.store(page[static_cast<std::size_t>((i + 1) % 2)].data(), std::memory_order_release);
    gate.flush_locked();
    forbidden.store(old, std::memory_order_relaxed);
  }
  stop.store(true, std::memory_order_relaxed);
  guest.join();
  CHECK(wrong.load() == 0);
  gate.detach_locked(port);
}
