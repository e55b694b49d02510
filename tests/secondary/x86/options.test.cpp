// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/options.hpp>

#include <doctest/doctest.h>

#include <mmunotify/secondary/x86/direct_mmu.hpp>
#include <mmunotify/secondary/x86/direct_vcpu.hpp>

#include "shadow_fixture.hpp"

using namespace shadow_test;

TEST_CASE("who wants nothing gets what Linux's events allow, and nothing that costs others") {
  constexpr x86::mmu_options o{};
  CHECK(o.downgrades.contains(event::protection_page));
  CHECK(o.downgrades.contains(event::soft_dirty));
  for (const event e : {event::unmap, event::clear, event::protection_vma, event::migrate, event::release}) {
    CHECK_FALSE(o.downgrades.contains(e));
  }
  CHECK_FALSE(o.unsync);
  CHECK_FALSE(o.prefetch);
  CHECK_FALSE(o.eager_split);
}

TEST_CASE("both MMUs keep reads in brackets with the events that the owner names, and in no others") {
  using direct_type = x86::direct_mmu<scripted_host, x86::npt_format>;
  for (const bool named : {false, true}) {
    x86::mmu_options o;
    if (named) o.downgrades = {event::protection_vma};
    machine m(machine::pages, o);
    cpu_type cpu{m.mmu};
    m.map({0x400000}, {0x5000}, rwu | used);
    REQUIRE(cpu.set_cr3(m.root) == errc::ok);
    REQUIRE(touch(cpu, {0x400000}, access::write).result.what == outcome::done);
    scripted_host host;
    host.place(ram_base);
    direct_type direct{host, o};
    x86::direct_vcpu<direct_type> flat{direct};
    REQUIRE(direct.add_slot({.id = 1, .base = {0}, .pages = 1, .host = ram_base}) == errc::ok);
    REQUIRE(touch(flat, gpa{0}, access::write).result.what == outcome::done);
    for (const event e : {event::protection_vma, event::soft_dirty}) {
      const bool keeps = (e == event::protection_vma) == named;
      const range page = x86::page_range(m.host_of({0x5000}));
      m.start(page, e);
      CHECK(cpu.hits({0x400000}, access::read) == keeps);
      CHECK_FALSE(cpu.hits({0x400000}, access::write));
      m.end(page, e);
      REQUIRE(touch(cpu, {0x400000}, access::write).result.what == outcome::done);
      direct.invalidate_range_start({x86::page_range(ram_base), e});
      CHECK(flat.hits({0}, access::read) == keeps);
      CHECK_FALSE(flat.hits({0}, access::write));
      direct.invalidate_range_end({x86::page_range(ram_base), e});
      REQUIRE(touch(flat, gpa{0}, access::write).result.what == outcome::done);
    }
  }
}
