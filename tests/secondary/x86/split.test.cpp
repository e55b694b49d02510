// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/split.hpp>

#include <doctest/doctest.h>

#include <mmunotify/secondary/x86/direct_mmu.hpp>
#include <mmunotify/secondary/x86/direct_vcpu.hpp>

#include "random_guest.hpp"

using namespace shadow_test;
using x86::dirty_tracking;

namespace {
constexpr x86::mmu_options eager{.eager_split = true};
constexpr std::uint64_t run_frames = 1024;  ///< guest frames 1024 to 2047 are two runs of 2 MiB of the host

/// Runs that a guest maps by 2 MiB pages at `at`.
struct fixture : machine {
  static constexpr gva at{0x40000000};
  static constexpr gpa base{run_frames * page_size};
  cpu_type cpu{mmu};

  explicit fixture(const x86::mmu_options& o = eager) : machine(4096, o) {
    host.place_run(host_of(base), 21, 512);
    host.place_run(host_of(base + 512 * page_size), 21, 512);
    map(at, base, rwu | used, 2);
    map(at + 512 * page_size, base + 512 * page_size, rwu | used, 2);
    CHECK(cpu.set_cr3(root) == errc::ok);
  }
  static gva page(std::uint64_t i) { return at + i * page_size; }
  static gfn base_frame() { return {run_frames}; }
  std::byte* now(std::uint64_t i) { return host.bytes(host_of(base + i * page_size)); }
  std::uint64_t faults() { return mmu.statistics().faults; }
  std::uint64_t split() { return mmu.statistics().split; }
  std::set<std::uint64_t> harvest() {
    std::array<std::uint64_t, 64> words{};
    CHECK(mmu.harvest_writes(1, words) == errc::ok);
    std::set<std::uint64_t> found;
    for (std::uint64_t f = run_frames; f < run_frames + 1024; ++f) {
      if ((words[f / 64] >> f % 64 & 1) != 0) found.insert(f - run_frames);
    }
    return found;
  }
  void check() {
    CHECK(broken() == "");
    CHECK(host.on_loan() == 0);
  }
};
using some = std::set<std::uint64_t>;
}  // namespace

TEST_CASE("a log that begins splits large leaves, and no page of them has to be faulted in again") {
  for (const dirty_tracking how : {dirty_tracking::write_protect, dirty_tracking::dirty_bits}) {
    fixture f;
    REQUIRE(touch(f.cpu, f.page(3), access::write).result.what == outcome::done);
    REQUIRE(touch(f.cpu, f.page(600), access::write).result.what == outcome::done);
    REQUIRE(f.mmu.statistics().large == 2);
    const auto faults = f.faults();
    REQUIRE(f.mmu.log_writes(1, how) == errc::ok);
    CHECK(f.split() == 2);
    f.check();
    CHECK(f.harvest() == some{});
    for (std::uint64_t i = 0; i < 1024; ++i) {
      REQUIRE(touch(f.cpu, f.page(i), i % 3 == 0 ? access::write : access::read).at == f.now(i));
    }
    CHECK(f.faults() == faults);
    some written;
    for (std::uint64_t i = 0; i < 1024; i += 3) written.insert(i);
    CHECK(f.harvest() == written);
    f.check();
    // When the log has ended, the next fault makes them large again.
    REQUIRE(f.mmu.log_writes(1, dirty_tracking::off) == errc::ok);
    REQUIRE(touch(f.cpu, f.page(5), access::write).result.what == outcome::done);
    CHECK(f.mmu.statistics().large == 3);
    f.check();
  }
}

TEST_CASE("without the option, large leaves are zapped when a log begins") {
  fixture f{x86::mmu_options{}};
  REQUIRE(touch(f.cpu, f.page(3), access::write).result.what == outcome::done);
  REQUIRE(f.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  CHECK(f.split() == 0);
  CHECK_FALSE(f.cpu.hits(f.page(3), access::read));
  f.check();
}

TEST_CASE("a write through what a vCPU cached of the large leaf is in the log: its dirty bit is inherited") {
  fixture f;
  REQUIRE(touch(f.cpu, f.page(3), access::write).result.what == outcome::done);
  REQUIRE(touch(f.cpu, f.page(7), access::write).result.what == outcome::done);
  REQUIRE(f.mmu.log_writes(1, dirty_tracking::dirty_bits) == errc::ok);
  CHECK(f.split() == 1);
  REQUIRE(touch(f.cpu, f.page(7), access::write).result.what == outcome::done);
  CHECK(f.harvest() == some{7});
  f.check();
}

TEST_CASE("the parts have the rights of the whole, and what the guest may not do it may not do") {
  fixture f;
  f.map(f.at + 1024 * page_size, f.base, pte::present | pte::user | used, 2);        // read-only in the guest
  f.map(f.at + 1536 * page_size, f.base + 512 * page_size, rwu | pte::accessed, 2);  // not dirty yet
  REQUIRE(touch(f.cpu, f.page(1024), access::read).result.what == outcome::done);
  REQUIRE(touch(f.cpu, f.page(1536), access::read).result.what == outcome::done);
  const gpa entry = f.entry_at(f.page(1536), 2, f.root);
  REQUIRE(f.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  CHECK(f.split() == 2);
  CHECK(f.cpu.hits(f.page(1100), access::read));
  CHECK(touch(f.cpu, f.page(1100), access::write).result.what == outcome::page_fault);
  CHECK((f.read64(entry) & pte::dirty) == 0);
  CHECK(touch(f.cpu, f.page(1600), access::write).at == f.now(576));
  CHECK((f.read64(entry) & pte::dirty) != 0);
  CHECK(f.harvest() == some{576});
  f.check();
}

TEST_CASE("K3: the parts are taken down by a bracket like any other leaf") {
  fixture f;
  REQUIRE(touch(f.cpu, f.page(3), access::write).result.what == outcome::done);
  REQUIRE(f.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  const range one = x86::page_range(f.host_of(f.base + 100 * page_size));
  f.start(one);
  for (std::uint64_t i = 0; i < 512; ++i) REQUIRE(f.cpu.hits(f.page(i), access::read) == (i != 100));
  f.check();
  f.end(one);
  CHECK(touch(f.cpu, f.page(100), access::write).at == f.now(100));
  f.check();
}

TEST_CASE("K3: a table that is there already has leaves that may less: nobody goes on with more") {
  fixture f;
  const range hundredth = x86::page_range(f.host_of(f.base + 100 * page_size));
  f.start(hundredth);
  REQUIRE(touch(f.cpu, f.page(3), access::read).at == f.now(3));  // small, for the bracket
  f.end(hundredth);
  const range third = x86::page_range(f.host_of(f.base + 3 * page_size));
  f.start(third, event::soft_dirty);
  f.end(third, event::soft_dirty);
  REQUIRE(touch(f.cpu, f.page(3), access::write).at == f.now(3));
  REQUIRE(f.mmu.statistics().large == 1);
  {
    x86::leaf_splitter splitter(f.mmu.tables());
    x86::leaf_splitter::supply supply;
    REQUIRE(supply.fill());
    const std::lock_guard locked{f.mmu.lock()};
    static_cast<void>(splitter.split_some(*f.mmu.slots().current().find(f.base_frame()), supply));
    f.mmu.tables().commit();
  }
  CHECK(f.split() == 1);
  f.check();
  f.start(third, event::soft_dirty);
  CHECK_FALSE(f.cpu.hits(f.page(3), access::write));
  CHECK(f.cpu.hits(f.page(3), access::read));
  f.check();
  f.end(third, event::soft_dirty);
  CHECK(touch(f.cpu, f.page(3), access::write).at == f.now(3));
  f.check();
}

TEST_CASE("one gigabyte becomes 2 MiB, and these 4 KiB, as far as the limit of pages goes") {
  for (const std::size_t limit : {std::size_t{4096}, std::size_t{100}}) {
    machine m(machine::pages, {.max_pages = limit, .eager_split = true});
    constexpr std::uint64_t gib_frames = 512 * 512;
    const hva far = ram_base + (std::uint64_t{1} << 40);
    m.host.place_run(far, 30, 600);
    REQUIRE(m.mmu.add_slot({.id = 2, .base = {4 * gib_frames}, .pages = gib_frames, .host = far}) == errc::ok);
    m.map({0x8000000000}, {4 * gib_frames * page_size}, rwu | used, 3);
    cpu_type cpu{m.mmu};
    REQUIRE(cpu.set_cr3(m.root) == errc::ok);
    REQUIRE(touch(cpu, {0x8000000000}, access::write).at == m.host.bytes(far));
    const auto faults = m.mmu.statistics().faults;
    REQUIRE(m.mmu.log_writes(2, dirty_tracking::write_protect) == errc::ok);
    CHECK(m.broken() == "");
    CHECK(m.mmu.page_count() <= limit);
    CHECK((m.mmu.statistics().split == 513) == (limit == 4096));
    CHECK(touch(cpu, {0x8000000000 + 599 * 4096}, access::write).at == m.host.bytes(far + 599 * page_size));
    CHECK(m.mmu.statistics().faults == faults);
    CHECK(m.broken() == "");
  }
}

TEST_CASE("random guests whose large leaves are split see what a walk made anew says") {
  std::uint64_t split = 0;
  const auto run = [&](auto identity) {
    using guest = random_guest<typename decltype(identity)::type>;
    for (std::uint64_t round = 0; round < 8; ++round) {
      guest g(seed() + round, {.unsync = round % 2 == 1, .eager_split = true});
      for (int i = 0; i < 2000; ++i) {
        if (i % 50 == 0) g.log_something(), g.host_collapses();
        g.step();
        if (i % 20 == 0) REQUIRE(g.m.broken() == "");
      }
      split += g.m.mmu.statistics().split;
    }
  };
  run(std::type_identity<x86::no_paging>{});
  run(std::type_identity<x86::two_level>{});
  run(std::type_identity<x86::long_mode_4>{});
  CHECK(split > 10);
}

// --- A direct MMU. ---------------------------------------------------------------------------------------------------

namespace {
template <class Format>
struct direct_fixture {
  using direct_type = x86::direct_mmu<scripted_host, Format>;
  scripted_host host;
  direct_type mmu{host, eager};
  x86::direct_vcpu<direct_type> cpu{mmu};

  direct_fixture() {
    host.place_run(ram_base + run_frames * page_size, 21, 512);
    host.place_run(ram_base + (run_frames + 512) * page_size, 21, 512);
    CHECK(mmu.add_slot({.id = 1, .base = {0}, .pages = 4096, .host = ram_base}) == errc::ok);
  }
  static gpa page(std::uint64_t i) { return {(run_frames + i) * page_size}; }
  std::byte* now(std::uint64_t i) { return host.bytes(ram_base + page(i).value); }
  void check() {
    const char* broken = mmu.verify();
    CHECK(std::string(broken != nullptr ? broken : "") == "");
  }
  some harvest() {
    std::array<std::uint64_t, 64> words{};
    CHECK(mmu.harvest_writes(1, words) == errc::ok);
    some found;
    for (std::uint64_t f = run_frames; f < run_frames + 1024; ++f) {
      if ((words[f / 64] >> f % 64 & 1) != 0) found.insert(f - run_frames);
    }
    return found;
  }
};
}  // namespace

#define FORMATS x86::ept_format, x86::npt_format

TEST_CASE_TEMPLATE("a direct MMU splits large leaves when a log begins", F, FORMATS) {
  for (const dirty_tracking how : {dirty_tracking::write_protect, dirty_tracking::dirty_bits}) {
    direct_fixture<F> m;
    REQUIRE(touch(m.cpu, m.page(3), access::write).result.what == outcome::done);
    REQUIRE(touch(m.cpu, m.page(600), access::read).result.what == outcome::done);
    REQUIRE(m.mmu.statistics().large == 2);
    const auto faults = m.mmu.statistics().faults;
    REQUIRE(m.mmu.log_writes(1, how) == errc::ok);
    CHECK(m.mmu.statistics().split == 2);
    m.check();
    CHECK(m.harvest() == some{});
    some written;
    for (std::uint64_t i = 0; i < 1024; ++i) {
      REQUIRE(touch(m.cpu, m.page(i), i % 3 == 0 ? access::write : access::read).at == m.now(i));
      if (i % 3 == 0) written.insert(i);
    }
    CHECK(m.mmu.statistics().faults == faults);
    CHECK(m.harvest() == written);
    m.check();
    REQUIRE(m.mmu.log_writes(1, dirty_tracking::off) == errc::ok);
    REQUIRE(touch(m.cpu, m.page(5), access::write).result.what == outcome::done);
    CHECK(m.mmu.statistics().large == 3);
    m.check();
  }
}

TEST_CASE_TEMPLATE("a direct MMU's large leaf leaves its dirty bit to its parts", F, FORMATS) {
  direct_fixture<F> m;
  REQUIRE(touch(m.cpu, m.page(7), access::write).result.what == outcome::done);
  REQUIRE(m.mmu.log_writes(1, dirty_tracking::dirty_bits) == errc::ok);
  REQUIRE(touch(m.cpu, m.page(7), access::write).result.what == outcome::done);
  CHECK(m.harvest() == some{7});
  m.check();
}

TEST_CASE("a gigabyte of a direct MMU is split to the last page") {
  using direct_type = x86::direct_mmu<scripted_host, x86::ept_format>;
  scripted_host host;
  direct_type mmu{host, eager};
  x86::direct_vcpu<direct_type> cpu{mmu};
  host.place_run(ram_base, 30, 600);
  REQUIRE(mmu.add_slot({.id = 1, .base = {512 * 512}, .pages = 512 * 512, .host = ram_base}) == errc::ok);
  const gpa first{std::uint64_t{512} * 512 * page_size};
  REQUIRE(touch(cpu, first, access::write).at == host.bytes(ram_base));
  REQUIRE(mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  CHECK(mmu.statistics().split == 513);
  CHECK(touch(cpu, first + 599 * page_size, access::write).at == host.bytes(ram_base + 599 * page_size));
  CHECK(mmu.statistics().faults == 1);
  CHECK(mmu.verify() == nullptr);
}

// --- The ring. -------------------------------------------------------------------------------------------------------

TEST_CASE_TEMPLATE("a direct MMU's ring has each frame once, costs what was written, and says when it is full", F,
                   FORMATS) {
  direct_fixture<F> m;
  for (std::uint64_t i = 0; i < 8; ++i) m.host.place(ram_base + i * page_size);
  std::array<gfn, 8> out{};
  CHECK(m.mmu.log_writes(1, dirty_tracking::dirty_bits, 4) == errc::bad_range);
  CHECK(m.mmu.log_writes(2, dirty_tracking::write_protect, 4) == errc::not_registered);
  CHECK(m.mmu.harvest_ring(2, out).error == errc::not_registered);
  CHECK(m.mmu.harvest_ring(1, out).error == errc::disabled);
  REQUIRE(m.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  CHECK(m.mmu.harvest_ring(1, out).error == errc::disabled);
  REQUIRE(m.mmu.log_writes(1, dirty_tracking::write_protect, 4) == errc::ok);
  for (const std::uint64_t f : {5U, 2U, 5U}) {
    REQUIRE(touch(m.cpu, gpa{f * page_size}, access::write).result.what == outcome::done);
  }
  const auto found = m.mmu.harvest_ring(1, std::span(out).first(1));
  CHECK(found.error == errc::ok);
  CHECK(found.count == 1);
  CHECK(out[0].value == 5);
  CHECK(m.mmu.harvest_ring(1, out).count == 1);
  CHECK(out[0].value == 2);
  CHECK(m.mmu.harvest_ring(1, out).count == 0);
  REQUIRE(touch(m.cpu, gpa{5 * page_size}, access::write).result.what == outcome::done);  // is noticed again
  CHECK(m.mmu.harvest_ring(1, out).count == 1);
  for (std::uint64_t f = 0; f < 6; ++f) {
    REQUIRE(touch(m.cpu, gpa{f * page_size}, access::write).result.what == outcome::done);
  }
  CHECK(m.mmu.harvest_ring(1, out).error == errc::again);
  std::array<std::uint64_t, 64> words{};
  REQUIRE(m.mmu.harvest_writes(1, words) == errc::ok);
  CHECK(words[0] == 0x3f);
  CHECK(m.mmu.harvest_ring(1, out).error == errc::ok);
  REQUIRE(touch(m.cpu, gpa{4 * page_size}, access::write).result.what == outcome::done);
  CHECK(m.mmu.harvest_ring(1, out).count == 1);
  CHECK(out[0].value == 4);
  m.check();
}
