// SPDX-License-Identifier: MIT

// Large leaves that may not be executed (mmu_options::nx_huge), in both MMUs.

#include <doctest/doctest.h>

#include <mmunotify/secondary/x86/direct_mmu.hpp>
#include <mmunotify/secondary/x86/direct_vcpu.hpp>

#include "random_guest.hpp"

using namespace shadow_test;

namespace {
constexpr x86::mmu_options careful{.nx_huge = true};
constexpr std::uint64_t run = 1024;  ///< guest frames 1024 to 1535 are 2 MiB of the host in one piece

struct shadow : machine {
  cpu_type cpu{mmu};
  explicit shadow(const x86::mmu_options& o = careful) : machine(2048, o) {
    host.place_run(ram_base + run * page_size, 21, 512);
    map({0x40000000}, {run * page_size}, rwu | used, 2);
    CHECK(cpu.set_cr3(root) == errc::ok);
  }
  static gva page(std::uint64_t i) { return gva{0x40000000} + i * page_size; }
};

template <class Format>
struct direct {
  using mmu_type = x86::direct_mmu<scripted_host, Format>;
  scripted_host host;
  mmu_type mmu;
  x86::direct_vcpu<mmu_type> cpu{mmu};
  explicit direct(const x86::mmu_options& o = careful) : mmu(host, o) {
    host.place_run(ram_base + run * page_size, 21, 512);
    CHECK(mmu.add_slot({.id = 1, .base = {0}, .pages = 2048, .host = ram_base}) == errc::ok);
  }
  static gpa page(std::uint64_t i) { return {(run + i) * page_size}; }
  std::string broken() {
    const char* what = mmu.verify();
    return what == nullptr ? "" : what;
  }
};

template <class M>
std::byte* now(M& m, std::uint64_t i) {
  return m.host.bytes(ram_base + (run + i) * page_size);
}
}  // namespace

#define MACHINES shadow, direct<x86::ept_format>, direct<x86::npt_format>

TEST_CASE_TEMPLATE("a large leaf is read and written, and never executed: a fetch makes it small", M, MACHINES) {
  M m;
  REQUIRE(touch(m.cpu, m.page(3), access::write).at == now(m, 3));
  CHECK(m.mmu.statistics().large == 1);
  CHECK(m.cpu.hits(m.page(500), access::write));
  CHECK_FALSE(m.cpu.hits(m.page(3), access::fetch));
  CHECK_FALSE(m.cpu.hits(m.page(500), access::fetch));
  REQUIRE(touch(m.cpu, m.page(7), access::fetch).at == now(m, 7));
  CHECK(m.cpu.hits(m.page(7), access::fetch));
  CHECK(m.cpu.hits(m.page(7), access::read));
  CHECK_FALSE(m.cpu.hits(m.page(500), access::read));  // the large leaf has gone
  CHECK(m.mmu.statistics().large == 1);
  CHECK(m.broken() == "");
  // What is executed stays, whatever is read and written beside it.
  REQUIRE(touch(m.cpu, m.page(500), access::write).at == now(m, 500));
  REQUIRE(touch(m.cpu, m.page(7), access::write).at == now(m, 7));
  CHECK(m.cpu.hits(m.page(7), access::fetch));
  CHECK(m.mmu.statistics().large == 1);
  CHECK(m.broken() == "");
}

TEST_CASE_TEMPLATE("what was made small for a fetch is recovered when the owner wants it, a few tables at a time", M,
                   MACHINES) {
  M m;
  CHECK(m.mmu.recover_large(10) == 0);
  REQUIRE(touch(m.cpu, m.page(7), access::fetch).at == now(m, 7));
  CHECK(m.mmu.recover_large(0) == 0);
  CHECK(m.cpu.hits(m.page(7), access::fetch));
  CHECK(m.mmu.recover_large(10) == 1);
  CHECK_FALSE(m.cpu.hits(m.page(7), access::fetch));
  CHECK(m.broken() == "");
  REQUIRE(touch(m.cpu, m.page(7), access::read).at == now(m, 7));
  CHECK(m.mmu.statistics().large == 1);
  CHECK(m.cpu.hits(m.page(500), access::write));
  REQUIRE(touch(m.cpu, m.page(7), access::fetch).at == now(m, 7));
  CHECK(m.mmu.recover_large(10) == 1);
  CHECK(m.mmu.recover_large(10) == 0);
  CHECK(m.broken() == "");
}

TEST_CASE_TEMPLATE("small pages are executed as ever, and so are large ones of an owner who does not mind", M,
                   MACHINES) {
  M m(x86::mmu_options{});
  REQUIRE(touch(m.cpu, m.page(7), access::fetch).at == now(m, 7));
  CHECK(m.mmu.statistics().large == 1);
  CHECK(m.cpu.hits(m.page(500), access::fetch));
  M small;
  small.host.split_run(ram_base + run * page_size);
  REQUIRE(touch(small.cpu, small.page(7), access::fetch).at == now(small, 7));
  CHECK(small.mmu.recover_large(10) == 0);
  CHECK(small.cpu.hits(small.page(7), access::fetch));
}

TEST_CASE_TEMPLATE("parts of a large leaf that a log has split are executed without a fault", M, MACHINES) {
  M m(x86::mmu_options{.eager_split = true, .nx_huge = true});
  REQUIRE(touch(m.cpu, m.page(7), access::write).at == now(m, 7));
  REQUIRE(m.mmu.log_writes(1, x86::dirty_tracking::write_protect) == errc::ok);
  CHECK(m.mmu.statistics().split == 1);
  CHECK(m.cpu.hits(m.page(8), access::read));
  const auto faults = m.mmu.statistics().faults;
  REQUIRE(touch(m.cpu, m.page(8), access::fetch).at == now(m, 8));
  REQUIRE(touch(m.cpu, m.page(8), access::write).at == now(m, 8));
  CHECK(m.mmu.statistics().faults == faults);
  CHECK(m.broken() == "");
  // Another fault between them takes nothing away.
  const range one = x86::page_range(ram_base + (run + 9) * page_size);
  m.mmu.invalidate_range_start({.range = one});
  m.mmu.invalidate_range_end({.range = one});
  REQUIRE(touch(m.cpu, m.page(9), access::fetch).at == now(m, 9));
  CHECK(m.cpu.hits(m.page(500), access::fetch));
  CHECK(m.mmu.statistics().faults == faults + 1);
  // It was not the fetch that keeps them small.
  CHECK(m.mmu.recover_large(10) == 0);
  CHECK(m.broken() == "");
}

TEST_CASE_TEMPLATE("a direct MMU's self-check names a large leaf that may be executed", F, x86::ept_format,
                   x86::npt_format) {
  direct<F> m;
  REQUIRE(touch(m.cpu, m.page(3), access::write).at == now(m, 3));
  std::atomic<std::uint64_t>& entry = *m.mmu.find({run}).entry;
  const std::uint64_t was = entry.load();
  entry.store(x86::made_executable<F>(was));
  CHECK(m.broken() == "a large leaf may be executed");
  entry.store(was);
  CHECK(m.broken() == "");
}

TEST_CASE("what the guest does not let be executed is not executed for being small") {
  shadow m(x86::mmu_options{.eager_split = true, .nx_huge = true});
  m.map({0x40200000}, {run * page_size}, rwu | used | pte::no_execute, 2);
  REQUIRE(touch(m.cpu, m.page(512), access::write).at == now(m, 0));
  REQUIRE(m.mmu.log_writes(1, x86::dirty_tracking::write_protect) == errc::ok);
  CHECK(m.mmu.statistics().split == 1);
  CHECK(m.cpu.hits(m.page(513), access::read));
  CHECK_FALSE(m.cpu.hits(m.page(513), access::fetch));
  CHECK(touch(m.cpu, m.page(513), access::fetch).result.what == outcome::page_fault);
  CHECK(m.broken() == "");
}

TEST_CASE("random guests whose large leaves may not be executed see what a walk made anew says") {
  const auto go = [](auto identity) {
    using guest = random_guest<typename decltype(identity)::type>;
    for (std::uint64_t round = 0; round < 6; ++round) {
      guest g(seed() + round, {.unsync = round % 2 == 1, .eager_split = round % 3 == 0, .nx_huge = true});
      for (int i = 0; i < 2000; ++i) {
        if (i % 50 == 0) g.host_collapses();
        if (i % 70 == 0) static_cast<void>(g.m.mmu.recover_large(2));
        g.step();
        if (i % 20 == 0) REQUIRE(g.m.broken() == "");
      }
    }
  };
  go(std::type_identity<x86::no_paging>{});
  go(std::type_identity<x86::two_level>{});
  go(std::type_identity<x86::long_mode_4>{});
}
