// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/vcpu.hpp>

#include <doctest/doctest.h>

#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
constexpr gva va{0x400000};
constexpr gpa page{0x5000};

struct fixture : machine {
  cpu_type cpu{mmu};

  explicit fixture(std::uint64_t slot_pages = pages) : machine(slot_pages) { CHECK(cpu.set_cr3(root) == errc::ok); }
  outcome::kind does(x86::access how, gva a = va) { return touch(cpu, a, how).result.what; }
  std::uint32_t fault_bits(x86::access how, gva a = va) {
    const outcome o = touch(cpu, a, how).result;
    CHECK(o.what == outcome::page_fault);
    return o.code.bits;
  }
  std::byte* now(gpa a) { return host.bytes(host_of(a)); }
};
using x86::fault_code;
}  // namespace

TEST_CASE("an access reaches the byte that the guest's tables name") {
  fixture f;
  f.map(va, page);
  for (const std::uint64_t offset : {0U, 1U, 0x7ffU, 0xfffU}) {
    const seen s = touch(f.cpu, va + offset, access::read);
    CHECK(s.result.what == outcome::done);
    CHECK(s.at == f.now(page + offset));
  }
  CHECK(f.mmu.statistics().faults == 1);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("the function is called once if the access is done, and not at all otherwise") {
  fixture f;
  f.map(va, page);
  int calls = 0;
  const auto count = [&](std::byte*) noexcept { ++calls; };
  CHECK(f.cpu.access(va, access::write, count).what == outcome::done);
  CHECK(calls == 1);
  CHECK(f.cpu.access(va + page_size, access::write, count).what == outcome::page_fault);
  CHECK(f.cpu.access({0x800000000000}, access::write, count).what == outcome::general_protection);
  CHECK(f.cpu.access({0xffff7fffffffffff}, access::write, count).what == outcome::general_protection);
  CHECK(f.cpu.prefault({0x800000000000}, access::read).what == outcome::general_protection);
  CHECK_FALSE(f.cpu.hits({0x800000000000}, access::read));
  CHECK(calls == 1);
}

TEST_CASE("a page is not present in the shadow until its first access, and read-only until its first write") {
  fixture f;
  const gpa leaf = f.map(va, page);
  CHECK(f.does(access::read) == outcome::done);
  CHECK((f.read64(leaf) & used) == pte::accessed);
  CHECK(f.cpu.hits(va, access::read));
  CHECK_FALSE(f.cpu.hits(va, access::write));
  CHECK(f.does(access::write) == outcome::done);
  CHECK((f.read64(leaf) & used) == used);
  CHECK(f.cpu.hits(va, access::write));
  // The guest cleans the page: the next write must be seen.
  CHECK(f.write64(leaf, page.value | rwu | pte::accessed) == errc::ok);
  CHECK_FALSE(f.cpu.hits(va, access::read));
  CHECK(f.does(access::read) == outcome::done);
  CHECK_FALSE(f.cpu.hits(va, access::write));
  CHECK(f.does(access::write) == outcome::done);
  CHECK((f.read64(leaf) & used) == used);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("rights are those of all levels together, and a fault says why") {
  fixture f;
  f.map(va, page, pte::present | pte::user | pte::no_execute);
  CHECK(f.does(access::read) == outcome::done);
  CHECK(f.fault_bits(access::write) == (fault_code::present | fault_code::write));
  CHECK(f.fault_bits(access::fetch) == (fault_code::present | fault_code::fetch));
  f.cpu.set_cpl(3);
  CHECK(f.does(access::read) == outcome::done);
  CHECK(f.fault_bits(access::write) == (fault_code::present | fault_code::write | fault_code::user));
  f.map(va, page, rw);
  CHECK(f.fault_bits(access::read) == (fault_code::present | fault_code::user));
  CHECK(f.does(access::implicit_read) == outcome::done);
  f.cpu.set_cpl(0);
  CHECK(f.does(access::write) == outcome::done);
  CHECK(f.does(access::fetch) == outcome::done);
  CHECK(f.fault_bits(access::read, {0x123456000}) == 0);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("two upper entries with different rights share one lower guest table") {
  fixture f;
  f.map(va, page, rwu | used);
  const gpa upper = f.entry_at(va, 2, f.root);
  const std::uint64_t table = x86::long_mode_4::table(f.read64(upper)).value;
  CHECK(f.write64(upper + 8, table | pte::present) == errc::ok);  // va + 2 MiB: the same table, supervisor, read-only
  CHECK(f.does(access::write) == outcome::done);
  CHECK(f.does(access::read, va + 0x200000) == outcome::done);
  CHECK(f.fault_bits(access::write, va + 0x200000) == (fault_code::present | fault_code::write));
  f.cpu.set_cpl(3);
  CHECK(f.does(access::write) == outcome::done);
  CHECK(f.fault_bits(access::read, va + 0x200000) == (fault_code::present | fault_code::user));
  CHECK(f.mmu.page_count() == 5);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("with CR0.WP=0 the supervisor writes what users may only read, and users still may not") {
  for (const bool smep : {false, true}) {
    for (const bool large : {false, true}) {
      fixture f(1024);
      if (large) {
        f.map(va, {0}, pte::present | pte::user, 2);
      } else {
        f.map(va, page, pte::present | pte::user);
      }
      CHECK(f.cpu.set_smep(smep) == errc::ok);
      CHECK(f.fault_bits(access::write) == (fault_code::present | fault_code::write));
      f.cpu.set_wp(false);
      for (int round = 0; round < 2; ++round) {
        f.cpu.set_cpl(0);
        CHECK(f.does(access::write) == outcome::done);
        CHECK(f.does(access::read) == outcome::done);
        CHECK((f.does(access::fetch) == outcome::done) == !smep);
        CHECK(f.mmu.verify() == nullptr);
        f.cpu.set_cpl(3);
        CHECK(f.does(access::read) == outcome::done);
        CHECK(f.does(access::fetch) == outcome::done);
        CHECK(f.fault_bits(access::write) == (fault_code::present | fault_code::write | fault_code::user));
        CHECK(f.mmu.verify() == nullptr);
      }
      f.cpu.set_cpl(0);
      f.cpu.set_wp(true);
      CHECK(f.fault_bits(access::write) == (fault_code::present | fault_code::write));
    }
  }
}

TEST_CASE("SMAP holds also for a page that CR0.WP=0 made a supervisor's in the shadow") {
  fixture f;
  f.map(va, page, pte::present | pte::user);
  f.cpu.set_wp(false);
  f.cpu.set_smap(true);
  f.cpu.set_ac(true);
  CHECK(f.does(access::write) == outcome::done);
  f.cpu.set_ac(false);
  CHECK(f.fault_bits(access::read) == fault_code::present);
  CHECK(f.fault_bits(access::write) == (fault_code::present | fault_code::write));
  CHECK(f.fault_bits(access::implicit_read) == fault_code::present);
  f.cpu.set_ac(true);
  CHECK(f.does(access::read) == outcome::done);
}

TEST_CASE("two large leaves of one frame keep their own dirty bits and their own U, also with CR0.WP=0") {
  fixture f(1024);
  const gva first{0x40000000}, second{0x80000000}, third{0xc0000000};
  f.map(first, {0}, pte::present | pte::user, 2);
  const gpa other = f.map(second, {0}, pte::present | pte::user, 2);
  f.map(third, {0}, rw | used, 2);  // the supervisor's, and writable anyhow
  f.cpu.set_wp(false);
  f.cpu.set_smap(true);
  f.cpu.set_ac(true);
  CHECK(f.does(access::read, second) == outcome::done);
  CHECK(f.does(access::write, first) == outcome::done);
  CHECK(f.does(access::write, third) == outcome::done);
  CHECK_FALSE(f.cpu.hits(second, access::write));
  CHECK(f.does(access::write, second) == outcome::done);
  CHECK((f.read64(other) & used) == used);
  f.cpu.set_ac(false);
  CHECK(f.fault_bits(access::read, first) == fault_code::present);
  CHECK(f.does(access::read, third) == outcome::done);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("large guest pages are split, and get write access at the first write to any part of them") {
  fixture f(1024);
  const gpa leaf = f.map({0x40000000}, {0}, rwu, 2);
  CHECK(touch(f.cpu, {0x40005123}, access::read).at == f.now({0x5123}));
  CHECK_FALSE(f.cpu.hits({0x40005123}, access::write));
  CHECK((f.read64(leaf) & used) == pte::accessed);
  CHECK(touch(f.cpu, {0x40006001}, access::write).at == f.now({0x6001}));
  CHECK((f.read64(leaf) & used) == used);
  CHECK(touch(f.cpu, {0x40005123}, access::write).at == f.now({0x5123}));
  CHECK(f.mmu.verify() == nullptr);
  const gpa gib = f.map({0x8000000000}, {0}, rwu | used, 3);
  CHECK(touch(f.cpu, {0x8000007abc}, access::write).at == f.now({0x7abc}));
  CHECK(touch(f.cpu, {0x8000000000 + 0x200000}, access::read).result ==
        outcome{.what = outcome::not_mapped, .address = {0x200000}});  // in the slot, and the host has nothing
  CHECK(touch(f.cpu, {0x8000000000 + 0x400000}, access::read).result ==
        outcome{.what = outcome::not_mapped, .address = {0x400000}});
  CHECK(f.mmu.verify() == nullptr);
  CHECK(f.write64(leaf, 0) == errc::ok);
  CHECK(f.does(access::read, {0x40005123}) == outcome::page_fault);
  CHECK(f.write64(gib, 0) == errc::ok);
  CHECK(f.does(access::read, {0x8000007abc}) == outcome::page_fault);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("a guest page table is never writable while it is shadowed, also through a large page or through itself") {
  fixture f(1024);
  f.map(va, page);
  const std::uint64_t table = f.entry_at(va, 1, f.root).page().value;
  f.map({0x600000}, {table}, rwu | used);  // by a 4 KiB page of another table
  f.map({0x40000000}, {0}, rwu | used, 2);
  f.map(va + page_size, {table}, rwu | used);  // through itself
  CHECK(f.does(access::write, {0x600000}) == outcome::done);
  CHECK(f.does(access::write, gva{0x40000000} + table) == outcome::done);
  CHECK(f.does(access::read) == outcome::done);  // now it is shadowed
  CHECK(f.mmu.verify() == nullptr);
  for (const gva a : {gva{0x600000}, gva{0x40000000} + table, va + page_size}) {
    const seen s = touch(f.cpu, a + 8, access::write);
    CHECK(s.result == outcome{.what = outcome::write_tracked, .address = {table + 8}});
    CHECK(s.at == nullptr);
    CHECK(touch(f.cpu, a, access::read).at == f.now({table}));
  }
  CHECK(f.mmu.verify() == nullptr);
  CHECK(f.write64({table}, 0) == errc::ok);
  CHECK(f.does(access::read) == outcome::page_fault);
}

TEST_CASE("control registers have their checks and their effects") {
  fixture f;
  f.map(va, page);
  const std::uint64_t second = f.new_table();
  const std::uint64_t first = std::exchange(f.root, second);
  f.map(va, {0x6000});
  CHECK(touch(f.cpu, va, access::read).at == f.now(page));
  CHECK(f.cpu.set_cr3(std::uint64_t{1} << 40) == errc::bad_range);
  CHECK(f.cpu.registers().cr3 == first);
  CHECK(f.cpu.set_cr3(second) == errc::ok);
  CHECK(touch(f.cpu, va, access::read).at == f.now({0x6000}));
  const auto faults = f.mmu.statistics().faults;
  CHECK(f.cpu.set_cr3(first) == errc::ok);
  CHECK(touch(f.cpu, va, access::read).at == f.now(page));
  CHECK(f.mmu.statistics().faults == faults);  // the root is known
  f.cpu.flush_tlb();
  CHECK(f.cpu.hits(va, access::read));
  f.cpu.invlpg(va);
  CHECK(f.cpu.hits(va, access::read));
  x86::walk_context c = f.cpu.registers();
  c.maxphyaddr = 53;
  CHECK(f.cpu.set_registers(c) == errc::bad_range);
  c.maxphyaddr = 40;
  c.cpl = 4;
  CHECK(f.cpu.set_registers(c) == errc::bad_range);
  c.cpl = 3;
  c.cr3 = UINT64_MAX;
  CHECK(f.cpu.set_registers(c) == errc::bad_range);
  CHECK(f.cpu.registers().cpl == 0);
  c.cr3 = second;
  CHECK(f.cpu.set_registers(c) == errc::ok);
  CHECK(touch(f.cpu, va, access::read).at == f.now({0x6000}));
  f.cpu.set_nxe(false);
  f.map(va, {0x6000}, rwu | pte::no_execute);
  CHECK(f.fault_bits(access::read) == (fault_code::present | fault_code::user | fault_code::reserved));
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("switching among a few address spaces takes no fault, and a root is good for its own role alone") {
  fixture f;
  std::array<std::uint64_t, 3> tops{f.root, f.new_table(), f.new_table()};
  for (std::uint64_t i = 0; i < tops.size(); ++i) {
    f.root = tops[i];
    f.map(va, {(5 + i) * page_size}, pte::present | pte::user | used);
  }
  for (int round = 0; round < 3; ++round) {
    for (std::uint64_t i = 0; i < tops.size(); ++i) {
      CHECK(f.cpu.set_cr3(tops[i]) == errc::ok);
      CHECK(touch(f.cpu, va, access::read).at == f.now({(5 + i) * page_size}));
    }
  }
  CHECK(f.mmu.statistics().faults == 3);
  CHECK(f.mmu.statistics().roots_reused == 6);
  f.cpu.set_wp(false);  // another root from now on
  CHECK(f.does(access::write) == outcome::done);
  f.cpu.set_wp(true);
  CHECK_FALSE(f.cpu.hits(va, access::write));
  CHECK(f.fault_bits(access::write) == (fault_code::present | fault_code::write));
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("a vCPU whose root was taken away finds a new one") {
  fixture f;
  f.map(va, page);
  CHECK(f.does(access::read) == outcome::done);
  for (std::uint64_t i = 0; i <= x86::shadow_tables::write_flood; ++i)
    CHECK(f.write64({f.root + 8 * i + 2048}, 0) == errc::ok);
  CHECK_FALSE(f.cpu.hits(va, access::read));
  CHECK(f.mmu.verify() == nullptr);
  CHECK(f.does(access::read) == outcome::done);
}

namespace {
/// An MMU whose tables the test makes: what a vCPU does with them by itself.
struct bare_mmu {
  using provider_type = scripted_host;
  using modes = x86::long_mode_4;
  scripted_host host;
  x86::flush_gate flush;
  x86::memslots no_slots{flush.domain()};
  x86::mmu_counters count;
  std::mutex mutex;
  std::array<std::unique_ptr<x86::shadow_page>, 4> tables;  ///< [level-1], each linked by entry 0 of the one above
  int faults = 0;

  bare_mmu() {
    for (auto& t : tables) t = std::make_unique<x86::shadow_page>();
    for (std::size_t i = 1; i < 4; ++i) tables[i]->exchange(0, x86::shadow_entry::link(*tables[i - 1]));
  }
  scripted_host& provider() noexcept { return host; }
  x86::flush_gate& gate() noexcept { return flush; }
  std::mutex& lock() noexcept { return mutex; }
  const x86::memslots& slots() noexcept { return no_slots; }
  x86::mmu_counters& counters() noexcept { return count; }
  errc load_pdptes(x86::walk_context&) noexcept { return errc::ok; }
  void synchronise(x86::vcpu_state&) noexcept {}
  void invalidate(x86::vcpu_state&, gva) noexcept {}
  outcome fault(x86::vcpu_state& v, gva, x86::access) noexcept {
    if (++faults > 1) return {.what = outcome::page_fault};
    v.port.set_root(tables[3].get());
    return {};
  }
};
}  // namespace

TEST_CASE("the shadow walk sets accessed bits, and dirty bits at the first write only, as hardware does") {
  using x86::shadow_entry;
  bare_mmu mmu;
  const pfn frame = mmu.host.place(ram_base);
  const auto leaf = shadow_entry::leaf(frame, x86::rights{}, true);
  mmu.tables[0]->exchange(7, leaf);
  x86::vcpu cpu{mmu};
  const gva a{7 * page_size};
  CHECK(touch(cpu, a + 5, access::read).at == mmu.host.data(frame) + 5);
  CHECK(mmu.tables[0]->load(7) == leaf.with(shadow_entry::accessed_bit));
  CHECK(cpu.hits(a, access::fetch));
  CHECK(mmu.tables[0]->load(7) == leaf.with(shadow_entry::accessed_bit));
  CHECK(cpu.hits(a, access::write));  // although the TLB has the page
  CHECK(mmu.tables[0]->load(7) == leaf.with(shadow_entry::accessed_bit | shadow_entry::dirty_bit));
  CHECK(mmu.faults == 1);
  CHECK(touch(cpu, a + page_size, access::read).result.what == outcome::page_fault);
  cpu.flush_tlb();
  mmu.tables[0]->exchange(7, shadow_entry::leaf(frame, x86::rights{0}, false));
  CHECK_FALSE(cpu.hits(a, access::write));
  CHECK(cpu.hits(a, access::read));
  CHECK_FALSE(mmu.tables[0]->load(7).dirty());
}
