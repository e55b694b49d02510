// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/direct_fault.hpp>

#include <doctest/doctest.h>

#include <mmunotify/secondary/x86/direct_mmu.hpp>
#include <mmunotify/secondary/x86/direct_vcpu.hpp>

#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
template <class Format>
struct fixture {
  using direct_type = x86::direct_mmu<scripted_host, Format>;
  scripted_host host;
  direct_type mmu{host};
  x86::direct_vcpu<direct_type> cpu{mmu}, other{mmu};

  fixture() {
    for (std::uint64_t i = 0; i < 16; ++i) host.place(ram_base + i * page_size);
    host.place_run(ram_base + 512 * page_size, 21, 512);
    CHECK(mmu.add_slot({.id = 1, .base = {0}, .pages = 1024, .host = ram_base}) == errc::ok);
  }
  static gpa page(std::uint64_t f) { return {f * page_size}; }
  std::byte* now(std::uint64_t f) { return host.bytes(ram_base + f * page_size); }
  void bracket(std::uint64_t f) {
    mmu.invalidate_range_start({x86::page_range(ram_base + f * page_size)});
    mmu.invalidate_range_end({x86::page_range(ram_base + f * page_size)});
  }
  void check() {
    const char* broken = mmu.verify();
    CHECK(std::string(broken != nullptr ? broken : "") == "");
    CHECK(host.on_loan() == 0);
  }
};
}  // namespace

#define FORMATS x86::ept_format, x86::npt_format

TEST_CASE_TEMPLATE("two vCPUs fault on a page at the same time: what the faster one may, both may", F, FORMATS) {
  fixture<F> m;
  m.host.during_pin = [&](hva, bool) { CHECK(m.other.prefault(m.page(5), access::write).what == outcome::done); };
  CHECK(m.cpu.prefault(m.page(5), access::read).what == outcome::done);
  CHECK(m.cpu.hits(m.page(5), access::write));  // the reader's leaf has not taken it away
  CHECK(m.other.hits(m.page(5), access::write));
  CHECK(touch(m.cpu, m.page(5), access::write).at == m.now(5));
  CHECK(m.mmu.statistics().faults == 2);
  m.check();
}

TEST_CASE_TEMPLATE("K1: a large leaf is not installed over a bracket over a part of it, a small one is", F, FORMATS) {
  fixture<F> m;
  m.host.during_pin = [&](hva, bool) { m.bracket(700); };
  CHECK(m.cpu.prefault(m.page(600), access::write).what == outcome::done);
  CHECK(m.mmu.statistics().large == 0);
  CHECK(m.cpu.hits(m.page(600), access::write));
  CHECK_FALSE(m.cpu.hits(m.page(601), access::read));
  CHECK(m.cpu.prefault(m.page(601), access::write).what == outcome::done);  // beside a small one it is as small
  CHECK(m.mmu.statistics().large == 0);
  m.check();
  m.bracket(600);
  m.bracket(601);
  CHECK(touch(m.cpu, m.page(601), access::write).at == m.now(601));
  CHECK(m.mmu.statistics().large == 1);
  m.check();
}

TEST_CASE_TEMPLATE("a large leaf that is in the way of a small one goes, and the access is tried again", F, FORMATS) {
  fixture<F> m;
  REQUIRE(touch(m.cpu, m.page(600), access::read).result.what == outcome::done);
  REQUIRE(m.mmu.statistics().large == 1);
  const range page = x86::page_range(ram_base + 700 * page_size);
  m.mmu.invalidate_range_start({page, event::soft_dirty});
  CHECK(m.cpu.prefault(m.page(600), access::write).what == outcome::again);
  CHECK(m.cpu.prefault(m.page(600), access::write).what == outcome::done);
  CHECK(m.mmu.statistics().large == 1);
  CHECK_FALSE(m.cpu.hits(m.page(700), access::write));
  m.check();
  m.mmu.invalidate_range_end({page, event::soft_dirty});
  CHECK(touch(m.cpu, m.page(700), access::write).at == m.now(700));
  m.check();
}

TEST_CASE_TEMPLATE("what cannot be mapped says why, and leaves nothing", F, FORMATS) {
  fixture<F> m;
  for (const auto& [e, what] : {std::pair{errc::not_mapped, outcome::not_mapped},
                                {errc::no_memory, outcome::no_memory},
                                {errc::released, outcome::released},
                                {errc::again, outcome::again}}) {
    m.host.refuses[(ram_base + 7 * page_size).value] = e;
    CHECK(m.cpu.prefault(m.page(7), access::read).what == what);
  }
  CHECK(m.cpu.prefault(m.page(1024), access::read) == outcome{.what = outcome::not_mapped, .address = m.page(1024)});
  m.host.read_only[(ram_base + 6 * page_size).value] = true;
  CHECK(m.cpu.prefault(m.page(6), access::write) == outcome{.what = outcome::not_mapped, .address = m.page(6)});
  CHECK(m.mmu.statistics().installs == 0);
  m.check();
}
