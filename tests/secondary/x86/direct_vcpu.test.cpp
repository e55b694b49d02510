// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/direct_vcpu.hpp>

#include <doctest/doctest.h>

#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
template <class Format>
struct fixture {
  using direct_type = x86::direct_mmu<scripted_host, Format>;
  scripted_host host;
  direct_type mmu{host};
  x86::direct_vcpu<direct_type> cpu{mmu};

  fixture() {
    for (std::uint64_t i = 0; i < 8; ++i) host.place(ram_base + i * page_size);
    CHECK(mmu.add_slot({.id = 1, .base = {0}, .pages = 8, .host = ram_base}) == errc::ok);
  }
  std::uint64_t entry(std::uint64_t f) { return mmu.find({f}).value; }
};
}  // namespace

TEST_CASE_TEMPLATE("the walk sets accessed bits, and dirty bits at the first write only, as hardware does", F,
                   x86::ept_format, x86::npt_format) {
  fixture<F> f;
  CHECK(touch(f.cpu, gpa{0x5004}, access::read).at == f.host.bytes(ram_base + 0x5004));
  CHECK((f.entry(5) & F::accessed_bit) != 0);
  CHECK((f.entry(5) & F::dirty_bit) == 0);
  CHECK(f.cpu.hits(gpa{0x5000}, access::fetch));
  CHECK((f.entry(5) & F::dirty_bit) == 0);
  CHECK(f.cpu.hits(gpa{0x5000}, access::write));  // although the TLB has the page
  CHECK((f.entry(5) & F::dirty_bit) != 0);
  CHECK(f.mmu.statistics().faults == 1);
  CHECK(f.mmu.clear_flush_young({0, UINTPTR_MAX}));
  CHECK((f.entry(5) & F::accessed_bit) == 0);
  CHECK(f.cpu.hits(gpa{0x5000}, access::read));
  CHECK((f.entry(5) & F::accessed_bit) != 0);
}

TEST_CASE_TEMPLATE("the function is called once if the access is done, and not at all otherwise", F, x86::ept_format,
                   x86::npt_format) {
  fixture<F> f;
  int calls = 0;
  const auto count = [&](std::byte*) noexcept { ++calls; };
  CHECK(f.cpu.access({0x3000}, access::write, count).what == outcome::done);
  CHECK(calls == 1);
  CHECK(f.cpu.access({0x8000}, access::write, count).what == outcome::not_mapped);
  f.mmu.release();
  CHECK(f.cpu.access({0x3000}, access::read, count).what == outcome::released);
  CHECK(calls == 1);
}
