// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/backing.hpp>

#include <doctest/doctest.h>

#include "shadow_fixture.hpp"

using namespace shadow_test;
using x86::exchange_result;

namespace {
struct fixture {
  scripted_host host;
  srcu_domain domain;
  x86::memslots slots{domain};
  x86::mmu_window window;
  std::mutex lock;
  x86::backing<scripted_host> b{host, slots, window, lock};

  fixture() {
    for (std::uint64_t i = 0; i < 8; ++i) host.place(ram_base + i * page_size);
    CHECK(slots.add({.id = 1, .base = {0}, .pages = 6, .host = ram_base}, lock) == errc::ok);
    CHECK(slots.add({.id = 2, .base = {6}, .pages = 2, .host = ram_base + 6 * page_size, .read_only = true}, lock) ==
          errc::ok);
  }
  std::uint64_t& word(std::uint64_t gpa) { return *reinterpret_cast<std::uint64_t*>(host.bytes(ram_base + gpa)); }
  void replace(std::uint64_t gpa) {
    const range r = x86::page_range(ram_base + gpa);
    const std::lock_guard locked{lock};
    window.start(r);
    host.migrate(ram_base + gpa);
    window.end(r);
  }
};
}  // namespace

TEST_CASE("bytes are stored at any offset and length, and their neighbours stay") {
  alignas(8) std::array<std::byte, 40> frame;
  std::array<std::byte, 24> bytes;
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = std::byte(i + 1);
  for (std::size_t offset = 0; offset < 16; ++offset) {
    for (std::size_t n = 0; n <= bytes.size(); ++n) {
      frame.fill(std::byte{0xee});
      x86::store_in_words(frame.data(), offset, std::span(bytes).first(n));
      for (std::size_t i = 0; i < frame.size(); ++i) {
        const bool inside = i >= offset && i < offset + n;
        REQUIRE(frame[i] == (inside ? bytes[i - offset] : std::byte{0xee}));
      }
    }
  }
}

TEST_CASE("a frame is pinned with the reason if not, and given back exactly once") {
  fixture f;
  {
    x86::pinned_frame<scripted_host> p;
    CHECK_FALSE(p);
    CHECK(p.pin(f.b, {8}, false) == errc::not_mapped);
    CHECK(p.pin(f.b, {6}, true) == errc::access_denied);
    CHECK(p.pin(f.b, {6}, false) == errc::ok);
    f.host.refuses[(ram_base + page_size).value] = errc::no_memory;
    CHECK(p.pin(f.b, {1}, false) == errc::no_memory);
    CHECK_FALSE(p);
    CHECK(f.host.on_loan() == 0);
    f.host.read_only[(ram_base + 2 * page_size).value] = true;
    CHECK(p.pin(f.b, {2}, true) == errc::access_denied);
    CHECK(p.pin(f.b, {2}, false) == errc::ok);
    CHECK(f.host.on_loan() == 1);
    CHECK(p.pin(f.b, {3}, true) == errc::ok);
    CHECK(f.host.on_loan() == 1);
    const std::lock_guard locked{f.lock};
    CHECK(p.stands_locked(f.b));
  }
  CHECK(f.host.on_loan() == 0);
}

TEST_CASE("K1: a pinned frame stands until a bracket over its page, and no bracket elsewhere shakes it") {
  fixture f;
  x86::pinned_frame<scripted_host> p;
  REQUIRE(p.pin(f.b, {1}, false) == errc::ok);
  f.replace(2 * page_size);
  f.replace(0);
  CHECK(p.stands_locked(f.b));
  f.replace(page_size);
  CHECK_FALSE(p.stands_locked(f.b));
  REQUIRE(p.pin(f.b, {1}, false) == errc::ok);
  CHECK(p.stands_locked(f.b));
  f.window.start(x86::page_range(p.at().address));
  CHECK_FALSE(p.stands_locked(f.b));
  f.window.end(x86::page_range(p.at().address));
  REQUIRE(p.pin(f.b, {1}, false) == errc::ok);
  REQUIRE(f.slots.move(1, {100}, f.lock, [](x86::memslot*, std::uint64_t) {}) == errc::ok);
  CHECK_FALSE(p.stands_locked(f.b));
}

TEST_CASE("entries are read, and changed by compare-exchange in the page that is there") {
  fixture f;
  f.word(0x1008) = 5;
  x86::walked_tables<scripted_host> t(f.b);
  std::uint64_t v = 0;
  CHECK(t.read_entry({0x1008}, v));
  CHECK(v == 5);
  CHECK(t.compare_exchange_entry({0x1008}, 5, 6) == exchange_result::done);
  CHECK(f.word(0x1008) == 6);
  CHECK(t.compare_exchange_entry({0x1008}, 5, 7) == exchange_result::changed);
  CHECK(f.word(0x1008) == 6);
  CHECK(t.unchanged_locked({{0x1008}, 6}));
  CHECK_FALSE(t.unchanged_locked({{0x1008}, 5}));
  CHECK_FALSE(t.unchanged_locked({{0x2008}, 0}));  // not a table of this walk
  CHECK_FALSE(t.read_entry({0x8000}, v));
  CHECK(t.error() == errc::not_mapped);
  CHECK(f.host.on_loan() == 1);
}

TEST_CASE("tables that take no writes are read and left as they are") {
  fixture f;
  f.word(0x6010) = 5;
  f.word(0x2010) = 5;
  f.host.read_only[(ram_base + 0x2000).value] = true;
  x86::walked_tables<scripted_host> t(f.b);
  CHECK(t.compare_exchange_entry({0x6010}, 5, 6) == exchange_result::read_only);
  CHECK(t.compare_exchange_entry({0x2010}, 5, 6) == exchange_result::read_only);
  CHECK(f.word(0x6010) == 5);
  CHECK(f.word(0x2010) == 5);
  CHECK(t.unchanged_locked({{0x6010}, 5}));
}

TEST_CASE("K1: an accessed bit is never written to a frame that is the page no more") {
  fixture f;
  f.word(0x1008) = 5;
  x86::walked_tables<scripted_host> t(f.b);
  std::uint64_t v = 0;
  REQUIRE(t.read_entry({0x1008}, v));
  REQUIRE(t.compare_exchange_entry({0x1008}, 5, 6) == exchange_result::done);
  const pfn old = f.host.at(ram_base + 0x1000);
  f.replace(0x1000);
  CHECK(t.compare_exchange_entry({0x1008}, 6, 7) == exchange_result::failed);
  CHECK(t.error() == errc::again);
  CHECK(f.word(0x1008) == 6);
  CHECK(f.host.data(old)[8] == std::byte{0x6b});
  CHECK_FALSE(t.unchanged_locked({{0x1008}, 6}));
}

TEST_CASE("a walk may need more tables than are kept, and gives every pin back") {
  fixture f;
  {
    x86::walked_tables<scripted_host> t(f.b);
    std::uint64_t v = 0;
    for (std::uint64_t round = 0; round < 3; ++round) {
      for (std::uint64_t page = 0; page < 8; ++page) CHECK(t.read_entry({page * page_size}, v));
    }
    CHECK(f.host.on_loan() <= 6);
  }
  CHECK(f.host.on_loan() == 0);
}

TEST_CASE("entries of four bytes are read and exchanged alone, beside their neighbours in the word") {
  fixture f;
  f.word(0x1008) = 0x1111'1111'2222'2222;
  x86::walked_tables<scripted_host, std::uint32_t> t(f.b);
  std::uint32_t v = 0;
  CHECK(t.read_entry({0x100c}, v));
  CHECK(v == 0x1111'1111);
  CHECK(t.compare_exchange_entry({0x100c}, 0x2222'2222, 3) == exchange_result::changed);
  CHECK(t.compare_exchange_entry({0x100c}, 0x1111'1111, 3) == exchange_result::done);
  CHECK(f.word(0x1008) == 0x0000'0003'2222'2222);
  CHECK(t.unchanged_locked({{0x100c}, 3}));
  CHECK(t.unchanged_locked({{0x1008}, 0x2222'2222}));
  CHECK_FALSE(t.unchanged_locked({{0x1008}, 0x3'2222'2222}));
}
