// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/memory_cache.hpp>

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdlib>
#include <new>

#include <unistd.h>

#include <mmunotify/secondary/x86/direct_vcpu.hpp>

#include "shadow_fixture.hpp"

using namespace shadow_test;

// The allocator of this program can be told to fail, and knows whether the MMU lock is held.
namespace {
std::mutex* watched = nullptr;
long allocations = 0;
long under_lock = 0;
long fail_at = -1;  // the allocation that fails; counted from arm()
bool armed = false;

void* take(std::size_t n, std::size_t alignment) noexcept {
  if (armed) {
    if (watched != nullptr && watched->native_handle()->__data.__owner == gettid()) ++under_lock;
    if (allocations++ == fail_at) return nullptr;
  }
  return std::aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment);
}

/// Counts allocations without throwing for its lifetime.
struct counting {
  explicit counting(std::mutex& lock, long which = -1) {
    watched = &lock;
    allocations = under_lock = 0;
    fail_at = which;
    armed = true;
  }
  ~counting() { armed = false; }
};
}  // namespace

void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return take(n, alignof(std::max_align_t)); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return take(n, alignof(std::max_align_t)); }
void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
  return take(n, static_cast<std::size_t>(a));
}
[[gnu::noinline]] void* operator new(std::size_t n) {
  void* const p = std::aligned_alloc(alignof(std::max_align_t), (n + 15) & ~std::size_t{15});
  if (p == nullptr) std::abort();
  return p;
}
[[gnu::noinline]] void* operator new(std::size_t n, std::align_val_t a) {
  const auto alignment = static_cast<std::size_t>(a);
  void* const p = std::aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment);
  if (p == nullptr) std::abort();
  return p;
}
[[gnu::noinline]] void* operator new[](std::size_t n) { return operator new(n); }
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {
struct thing {
  int value = 7;
  thing* next_spare = nullptr;
};

constexpr gva va{0x400000};
}  // namespace

TEST_CASE("a stock fills up to what is asked for and gives everything back") {
  x86::stock<thing> s;
  CHECK(s.size() == 0);
  CHECK(s.fill(3) == errc::ok);
  CHECK(s.size() == 3);
  CHECK(s.fill(2) == errc::ok);
  CHECK(s.size() == 3);
  thing& t = s.pop();
  CHECK(t.value == 7);
  CHECK(t.next_spare == nullptr);
  CHECK(s.size() == 2);
  s.push(t);
  s.trim(1);
  CHECK(s.size() == 1);
}

TEST_CASE("a stock takes from another one what it lacks and what is there") {
  x86::stock<thing> a, b;
  REQUIRE(a.fill(5) == errc::ok);
  b.take_from(a, 2);
  CHECK(a.size() == 3);
  CHECK(b.size() == 2);
  b.take_from(a, 2);
  CHECK(b.size() == 2);
  b.take_from(a, 100);
  CHECK(a.size() == 0);
  CHECK(b.size() == 5);
}

TEST_CASE("a stock that cannot be filled keeps what it has") {
  x86::stock<thing> s;
  std::mutex unused;
  {
    const counting c(unused, 2);
    CHECK(s.fill(5) == errc::no_memory);
  }
  CHECK(s.size() == 2);
  CHECK(s.fill(5) == errc::ok);
  CHECK(s.size() == 5);
}

TEST_CASE("a fault that runs out of memory says so at each allocation, and has changed nothing") {
  long n = 0;
  for (bool failed = true; failed; ++n) {
    machine m;
    cpu_type cpu{m.mmu};
    m.map(va, {0x5000}, rwu | used);
    REQUIRE(cpu.set_cr3(m.root) == errc::ok);
    outcome o;
    {
      const counting c(m.mmu.lock(), n);
      o = cpu.prefault(va, access::write);
      failed = allocations > n;
      CHECK(under_lock == 0);
    }
    CHECK(o.what == (failed ? outcome::no_memory : outcome::done));
    if (failed) CHECK(m.mmu.page_count() == 0);
    CHECK(m.mmu.verify() == nullptr);
    CHECK(m.host.on_loan() == 0);
    CHECK(touch(cpu, va, access::write).at == m.host.bytes(ram_base + 0x5000));
    CHECK(m.mmu.verify() == nullptr);
  }
  CHECK(n > 10);
}

TEST_CASE("a fault of a direct MMU that runs out of memory says so at each allocation, and has changed nothing") {
  using direct_type = x86::direct_mmu<scripted_host, x86::ept_format>;
  long n = 0;
  for (bool failed = true; failed; ++n) {
    scripted_host host;
    host.place(ram_base);
    direct_type mmu{host};
    REQUIRE(mmu.add_slot({.id = 1, .base = {0}, .pages = 1, .host = ram_base}) == errc::ok);
    x86::direct_vcpu<direct_type> cpu{mmu};
    std::mutex unused;
    outcome o;
    {
      const counting c(unused, n);
      o = cpu.prefault({0}, access::write);
      failed = allocations > n;
    }
    CHECK(o.what == (failed ? outcome::no_memory : outcome::done));
    if (failed) CHECK(mmu.find({0}).level == 4);
    CHECK(host.on_loan() == 0);
    CHECK(mmu.verify() == nullptr);
    CHECK(touch(cpu, gpa{8}, access::write).at == host.bytes(ram_base + 8));
  }
  CHECK(n == 4);
}

TEST_CASE("slots and logs that run out of memory say so at each allocation, and have changed nothing") {
  const auto each_fails = [](auto&& attempt) {
    long n = 0;
    for (bool failed = true; failed; ++n) {
      machine m;
      m.map(va, {0x5000}, rwu | used);
      cpu_type cpu{m.mmu};
      REQUIRE(cpu.set_cr3(m.root) == errc::ok);
      REQUIRE(touch(cpu, va, access::write).result.what == outcome::done);
      const auto generation = m.mmu.slots().current().generation();
      errc e = errc::ok;
      {
        const counting c(m.mmu.lock(), n);
        e = attempt(m);
        failed = allocations > n;
        CHECK(under_lock == 0);
      }
      CHECK(e == (failed ? errc::no_memory : errc::ok));
      if (failed) {
        CHECK(cpu.hits(va, access::write));
        CHECK(m.mmu.slots().current().generation() == generation);
      }
      CHECK(m.mmu.verify() == nullptr);
    }
    return n - 1;
  };
  CHECK(each_fails([](machine& m) { return m.mmu.add_slot({.id = 2, .base = {1000}, .pages = 8, .host = ram_base}); }) >
        8);
  CHECK(each_fails([](machine& m) { return m.mmu.move_slot(1, {4096}); }) > 8);
  CHECK(each_fails([](machine& m) { return m.mmu.remove_slot(1); }) > 2);
  CHECK(each_fails([](machine& m) { return m.mmu.log_writes(1, x86::dirty_tracking::write_protect); }) > 1);
  CHECK(each_fails([](machine& m) { return m.mmu.log_writes(1, x86::dirty_tracking::write_protect, 8); }) > 3);
}

TEST_CASE("nothing that happens under the MMU lock allocates") {
  machine m;
  cpu_type cpu{m.mmu};
  REQUIRE(cpu.set_cr3(m.root) == errc::ok);
  for (std::uint64_t i = 0; i < 64; ++i) m.map(va + i * page_size, {(i % 16) * page_size}, rwu | used);
  m.map({0x700000}, {1000 * page_size}, rwu | used);
  std::array<std::uint64_t, 1> words{};
  {
    const counting c(m.mmu.lock());
    for (int round = 0; round < 3; ++round) {
      for (std::uint64_t i = 0; i < 64; ++i) static_cast<void>(cpu.prefault(va + i * page_size, access::write));
      static_cast<void>(cpu.prefault({0x700000}, access::write));
      m.start(x86::page_range(ram_base + 3 * page_size));
      m.end(x86::page_range(ram_base + 3 * page_size));
      m.start({0, UINTPTR_MAX}, event::soft_dirty);
      m.end({0, UINTPTR_MAX}, event::soft_dirty);
      CHECK(m.mmu.log_writes(1, x86::dirty_tracking::write_protect) == errc::ok);
      static_cast<void>(cpu.prefault(va, access::write));
      CHECK(m.mmu.harvest_writes(1, words) == errc::ok);
      CHECK(m.mmu.log_writes(1, x86::dirty_tracking::off) == errc::ok);
      static_cast<void>(m.mmu.clear_flush_young({0, UINTPTR_MAX}));
      static_cast<void>(m.mmu.guest_write({m.root}, std::array<std::byte, 8>{}));
      m.mmu.zap_all();
    }
    CHECK(under_lock == 0);
    CHECK(allocations > 0);
  }
  CHECK(m.mmu.verify() == nullptr);
}

namespace {
using ahead_machine = machine_of<x86::long_mode_4, x86::long_mode_4, prefetching_host>;
constexpr gva large_va{0x40000000};
constexpr std::uint64_t run = 1024;

/// A machine whose owner wants everything, with a large leaf and eight neighbours at `va`.
void prepare(ahead_machine& m, ahead_machine::cpu_type& cpu) {
  m.host.place_run(ram_base + run * page_size, 21, 512);
  m.map(large_va, {run * page_size}, rwu | used, 2);
  for (std::uint64_t i = 0; i < 8; ++i) m.map(va + i * page_size, {(8 + i) * page_size}, rwu | used);
  REQUIRE(cpu.set_cr3(m.root) == errc::ok);
  REQUIRE(touch(cpu, large_va, access::write).result.what == outcome::done);
}
}  // namespace

TEST_CASE("neither prefetches nor splits allocate under the MMU lock") {
  ahead_machine m(4096, {.prefetch = true, .eager_split = true, .nx_huge = true});
  ahead_machine::cpu_type cpu{m.mmu};
  prepare(m, cpu);
  {
    const counting c(m.mmu.lock());
    for (int round = 0; round < 3; ++round) {
      static_cast<void>(cpu.prefault(va, access::write));
      CHECK(m.mmu.log_writes(1, x86::dirty_tracking::dirty_bits) == errc::ok);
      CHECK(m.mmu.log_writes(1, x86::dirty_tracking::off) == errc::ok);
      static_cast<void>(cpu.prefault(large_va, access::write));
      static_cast<void>(cpu.prefault(large_va, access::fetch));
      static_cast<void>(m.mmu.recover_large(5));
      static_cast<void>(cpu.prefault(large_va, access::write));
      m.start({0, UINTPTR_MAX});
      m.end({0, UINTPTR_MAX});
      static_cast<void>(cpu.prefault(large_va, access::write));
    }
    CHECK(under_lock == 0);
    CHECK(allocations > 0);
  }
  CHECK(m.mmu.statistics().prefetched > 7);
  CHECK(m.mmu.statistics().split == 3);
  CHECK(m.mmu.verify() == nullptr);
}

TEST_CASE("a log begins whatever memory there is for splits, or says that there is none for itself") {
  long n = 0;
  for (bool failed = true; failed; ++n) {
    ahead_machine m(4096, {.eager_split = true});
    ahead_machine::cpu_type cpu{m.mmu};
    prepare(m, cpu);
    errc e = errc::ok;
    {
      const counting c(m.mmu.lock(), n);
      e = m.mmu.log_writes(1, x86::dirty_tracking::write_protect);
      failed = allocations > n;
      CHECK(under_lock == 0);
    }
    const bool split = m.mmu.statistics().split != 0;
    CHECK((e == errc::ok || (failed && split && e == errc::no_memory)));
    CHECK((cpu.hits(large_va, access::read) == (split || e != errc::ok)));
    CHECK(m.mmu.verify() == nullptr);
  }
  CHECK(n > 10);
}
