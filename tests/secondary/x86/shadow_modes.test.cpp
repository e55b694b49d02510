// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/shadow_modes.hpp>

#include <doctest/doctest.h>

#include "random_guest.hpp"
#include "shadow_fixture.hpp"

using namespace shadow_test;
using x86::fault_code;
using x86::paging;
using x86::rights;
using x86::shadow_layout;
using x86::table_format;

namespace {
template <class Mode, class Modes = Mode>
struct fixture : machine_of<Mode, Modes> {
  typename machine_of<Mode, Modes>::cpu_type cpu{this->mmu};

  explicit fixture(std::uint64_t slot_pages = machine_of<Mode, Modes>::pages, const x86::mmu_options& o = {})
      : machine_of<Mode, Modes>(slot_pages, o) {}
  void check() {
    CHECK(this->broken() == "");
    CHECK(this->host.on_loan() == 0);
  }
};

/// Pages at many places of the address space, each a page of its own: both halves of a page table, all directories.
constexpr std::uint64_t scattered[] = {0x00000000, 0x001ff000, 0x00200000, 0x003ff000, 0x00400000,
                                       0x3fffe000, 0x40000000, 0x7fe00000, 0x80201000, 0xbfdff000,
                                       0xc0000000, 0xc0200000, 0xffdff000, 0xffe00000, 0xfffff000};

template <class Mode>
void check_scattered() {
  fixture<Mode> f;
  std::uint64_t frame = 1;
  for (const std::uint64_t a : scattered) f.map({a}, {frame++ * page_size});
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  for (int round = 0; round < 2; ++round) {
    frame = 1;
    for (const std::uint64_t a : scattered) {
      const gpa page{frame++ * page_size};
      CHECK(touch(f.cpu, gva{a + 5}, access::read).at == f.now(page + 5));
      CHECK(touch(f.cpu, gva{a + 8}, access::write).at == f.now(page + 8));
      CHECK(touch(f.cpu, gva{a + 9 + (std::uint64_t{7} << 32)}, access::fetch).at == f.now(page + 9));
      if (round == 0) f.check();
    }
  }
  CHECK(f.cpu.prefault({0x5000}, access::read).what == outcome::page_fault);
  const auto faults = f.mmu.statistics().faults;
  for (const std::uint64_t a : scattered) CHECK(f.cpu.hits({a}, access::write));
  CHECK(f.mmu.statistics().faults == faults);
  f.check();
}
}  // namespace

TEST_CASE("each mode has its layout: levels, quadrants, and what a root is found by") {
  using two = shadow_layout<x86::two_level>;
  using pae = shadow_layout<x86::pae>;
  using none = shadow_layout<x86::no_paging>;
  CHECK(two::levels == 3);
  CHECK(two::top_table == 2);
  CHECK(pae::levels == 3);
  CHECK(pae::top_table == 2);
  CHECK(none::levels == 3);
  CHECK(none::top_table == 0);
  CHECK(shadow_layout<x86::long_mode_4>::top_table == 4);
  CHECK(shadow_layout<x86::long_mode_5>::levels == 5);
  CHECK(two::quadrant({0xdfffffff}, 1) == 1);
  CHECK(two::quadrant({0xdfffffff}, 2) == 3);
  CHECK(two::quadrant({0xdfffffff}, 3) == 0);
  CHECK(pae::quadrant({0xdfffffff}, 1) == 0);
  CHECK(two::linear({0x123456789}).value == 0x23456789);
  CHECK(shadow_layout<x86::long_mode_4>::linear({0x123456789}).value == 0x123456789);
  CHECK(x86::shadow_index({0xffffffff}, 3) == 3);
  CHECK(two::guest_index(x86::page_role().with_quadrant(1), 3) == 515);
  CHECK(pae::guest_index(x86::page_role().with_quadrant(1), 3) == 3);
  x86::walk_context c;
  CHECK(none::root_role(c).direct());
  CHECK(none::root_role(c).may_be_root());
  const auto plain = none::root_role(c);
  c.wp = c.nxe = false, c.smep = c.smap = true, c.cr3 = 0x5000;
  CHECK(none::root_role(c) == plain);
  CHECK(none::root_frame(c) == gfn{0});
  CHECK(two::root_frame(c) == gfn{5});
  CHECK(two::root_role(c).has_links_alone());
  CHECK_FALSE(two::root_role(c).has_table());
  CHECK(pae::root_role(c).may_be_root());
  CHECK(shadow_layout<x86::long_mode_4>::root_role(c).has_table());
  c.pdptes = {0x7001, 0x8000, 0x9019, 0};
  CHECK(pae::registers(c) == x86::directory_registers{0x7001, 0, 0x9001, 0});
  CHECK(two::registers(c) == x86::directory_registers{});
}

TEST_CASE("an MMU for one mode has that mode, one for every_mode has all and begins without paging") {
  CHECK(x86::first_mode<x86::pae>() == paging::pae);
  CHECK(x86::has_mode<x86::pae>(paging::pae));
  CHECK_FALSE(x86::has_mode<x86::pae>(paging::none));
  CHECK(x86::first_mode<x86::every_mode>() == paging::none);
  CHECK(x86::has_mode<x86::every_mode>(paging::long_5));
  const auto levels = [](paging m) {
    return x86::in_mode<x86::every_mode>(m, []<class M>(std::type_identity<M>) { return M::levels; });
  };
  CHECK(levels(paging::none) == 0);
  CHECK(levels(paging::two_level) == 2);
  CHECK(levels(paging::pae) == 3);
  CHECK(levels(paging::long_4) == 4);
  CHECK(levels(paging::long_5) == 5);
}

TEST_CASE("without paging an address is the physical one, whatever rights the registers speak of") {
  fixture<x86::no_paging> f;
  REQUIRE(f.cpu.set_smep(true) == errc::ok);
  f.cpu.set_smap(true);
  f.cpu.set_nxe(false);
  const auto faults = f.mmu.statistics().faults;
  for (const unsigned cpl : {0U, 3U}) {
    f.cpu.set_cpl(cpl);
    for (const x86::access how :
         {access::read, access::write, access::fetch, access::implicit_read, access::implicit_write}) {
      CHECK(touch(f.cpu, gva{0x5007}, how).at == f.now({0x5007}));
      CHECK(touch(f.cpu, gva{0x6007 + (std::uint64_t{1} << 32)}, how).at == f.now({0x6007}));
    }
  }
  CHECK(f.mmu.statistics().faults == faults + 2);  // what may be written is writable at once
  f.cpu.set_wp(false);                             // means nothing: the root stays
  CHECK(f.cpu.hits({0x5000}, access::write));
  CHECK(touch(f.cpu, gva{0xfffff000}, access::read).result ==
        outcome{.what = outcome::not_mapped, .address = {0xfffff000}});
  f.migrate({0x5000});
  CHECK_FALSE(f.cpu.hits({0x5000}, access::read));
  CHECK(touch(f.cpu, gva{0x5000}, access::read).at == f.now({0x5000}));
  f.check();
}

TEST_CASE("without paging leaves are as large as the host's mappings") {
  fixture<x86::no_paging> f(1 << 19);
  f.host.place_run(ram_base + (std::uint64_t{1} << 30), 30, 4);
  f.host.place_run(ram_base + (2 << 20), 21, 512);
  CHECK(touch(f.cpu, gva{0x40000123}, access::write).at == f.now({0x40000123}));
  CHECK(touch(f.cpu, gva{0x200123}, access::write).at == f.now({0x200123}));
  CHECK(touch(f.cpu, gva{0x5123}, access::write).at == f.now({0x5123}));
  CHECK(f.mmu.statistics().large == 2);
  CHECK(f.mmu.page_count() == 3);
  f.check();
  f.start(x86::page_range(f.host_of({0x203000})));
  CHECK_FALSE(f.cpu.hits({0x200123}, access::read));
  f.host.split_run(f.host_of({0x200000}));
  f.end(x86::page_range(f.host_of({0x203000})));
  CHECK(touch(f.cpu, gva{0x200123}, access::read).at == f.now({0x200123}));
  f.check();
}

TEST_CASE("a page directory and a page table of 4-byte entries are shadowed in quadrants") {
  check_scattered<x86::two_level>();
}
TEST_CASE("PAE guests reach every page through all four directories") { check_scattered<x86::pae>(); }

TEST_CASE("a 4 MiB page is two leaves of 2 MiB where the host allows, each with a first frame of its own") {
  using mode = x86::two_level;
  fixture<mode> f(4096);
  f.map({0xc0400000}, {0x400000}, rwu | used, 2);
  f.host.place_run(f.host_of({0x400000}), 21, 512);
  f.host.place(f.host_of({0x601000}));
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  CHECK(touch(f.cpu, gva{0xc0401007}, access::write).at == f.now({0x401007}));
  CHECK(f.mmu.statistics().large == 1);
  CHECK(touch(f.cpu, gva{0xc0601007}, access::write).at == f.now({0x601007}));  // a part of the other half
  CHECK(f.mmu.statistics().large == 1);
  f.check();
  f.start(x86::page_range(f.host_of({0x601000})));
  CHECK(f.cpu.hits({0xc0401000}, access::write));
  CHECK_FALSE(f.cpu.hits({0xc0601000}, access::write));
  f.host.place_run(f.host_of({0x600000}), 21, 512);
  f.end(x86::page_range(f.host_of({0x601000})));
  CHECK(touch(f.cpu, gva{0xc0601007}, access::write).at == f.now({0x601007}));
  CHECK(f.mmu.statistics().large == 2);
  f.check();
  CHECK(f.write(f.entry_at({0xc0400000}, 2, f.root), std::uint32_t{0}) == errc::ok);  // both halves are gone
  CHECK_FALSE(f.cpu.hits({0xc0401000}, access::read));
  CHECK_FALSE(f.cpu.hits({0xc0601000}, access::read));
  f.check();
}

TEST_CASE("the halves of a 4 MiB page have one dirty bit in the guest and rights of their own until it is set") {
  fixture<x86::two_level> f(4096);
  f.host.place(f.host_of({0x400000}));
  f.host.place(f.host_of({0x600000}));
  const gpa entry = f.map({0x800000}, {0x400000}, rwu, 2);
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  REQUIRE(touch(f.cpu, gva{0x800000}, access::read).result.what == outcome::done);
  REQUIRE(touch(f.cpu, gva{0xa00000}, access::read).result.what == outcome::done);
  CHECK((f.read<std::uint32_t>(entry) & used) == pte::accessed);
  CHECK_FALSE(f.cpu.hits({0xa00000}, access::write));
  REQUIRE(touch(f.cpu, gva{0xa00000}, access::write).result.what == outcome::done);
  CHECK((f.read<std::uint32_t>(entry) & used) == used);
  CHECK(touch(f.cpu, gva{0x800000}, access::write).at == f.now({0x400000}));
  f.check();
}

TEST_CASE("CR4.PSE is part of what a table means: its PS bits are ignored without") {
  fixture<x86::two_level> f(4096);
  f.host.place(f.host_of({0x400000}));
  // A directory entry that is a page of 4 MiB, or names the table at the same place.
  f.map({0x800000}, {0x400000}, rwu | used, 2);
  CHECK(f.write(gpa{0x400000}, static_cast<std::uint32_t>(0x7000 | rwu | used)) == errc::ok);
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  for (int round = 0; round < 2; ++round) {
    CHECK(touch(f.cpu, gva{0x800000}, access::read).at == f.now({0x400000}));
    CHECK(f.cpu.set_pse(false) == errc::ok);
    CHECK(touch(f.cpu, gva{0x800000}, access::read).at == f.now({0x7000}));
    f.check();
    CHECK(f.cpu.set_pse(true) == errc::ok);
  }
  CHECK(f.mmu.statistics().roots_reused >= 3);
}

TEST_CASE(
    "4 MiB pages above 4 GiB are reached by processors that have the bits, and by no other through their tables") {
  fixture<x86::two_level> f;
  REQUIRE(f.mmu.add_slot({.id = 2, .base = {std::uint64_t{5} << 20}, .pages = 16, .host = ram_base}) == errc::ok);
  f.map({0x800000}, {std::uint64_t{5} << 13}, rwu | used, 2);  // bits 13 and up are bits 32 and up
  machine_of<x86::two_level>::cpu_type narrow{f.mmu};
  x86::walk_context c = f.cpu.registers();
  c.cr3 = f.root;
  REQUIRE(f.cpu.set_registers(c) == errc::ok);
  c.pse36_bits = 34;  // bit 34, which the entry sets, is reserved
  REQUIRE(narrow.set_registers(c) == errc::ok);
  CHECK(touch(f.cpu, gva{0x803001}, access::read).at == f.now({0x3001}));
  const outcome o = touch(narrow, gva{0x803001}, access::read).result;
  CHECK(o.what == outcome::page_fault);
  CHECK(o.code.bits == (fault_code::reserved | fault_code::present));
  CHECK(touch(f.cpu, gva{0x803001}, access::write).at == f.now({0x3001}));
  f.check();
}

TEST_CASE("a directory that is a page table as well is shadowed at both levels, and a write takes down both") {
  fixture<x86::two_level> f;
  const gpa last = f.entry_at({0xffc00000}, 2, f.root);  // where its table would be is the directory
  CHECK(f.write(last, static_cast<std::uint32_t>(f.root | rwu | used)) == errc::ok);
  f.map({0x00400000}, {0x5000}, rwu | used);
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  CHECK(touch(f.cpu, gva{0x400000}, access::write).at == f.now({0x5000}));
  CHECK(touch(f.cpu, gva{0xfffff000 + 4}, access::read).at == f.now({f.root + 4}));  // the directory as a page
  const std::uint32_t named = f.read<std::uint32_t>({f.root + 4});
  CHECK(touch(f.cpu, gva{0xffc01000}, access::read).at == f.now({named & 0xfffff000}));  // its entry 1 as a leaf
  CHECK(touch(f.cpu, gva{0xfffff000 + 4}, access::write).result.what == outcome::write_tracked);
  f.check();
  CHECK(f.write(gpa{f.root + 4}, std::uint32_t{0}) == errc::ok);
  CHECK_FALSE(f.cpu.hits({0x400000}, access::read));
  CHECK_FALSE(f.cpu.hits({0xffc01000}, access::read));
  CHECK(touch(f.cpu, gva{0x400000}, access::read).result.what == outcome::page_fault);
  f.check();
}

TEST_CASE("CR0.WP, U and W work in two-level and PAE paging as in the long modes") {
  const auto run = [](auto identity) {
    using mode = typename decltype(identity)::type;
    fixture<mode> f;
    f.map({0x400000}, {0x5000}, pte::present | pte::user | used);
    f.map({0x401000}, {0x6000}, rw | used);
    REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
    const auto code = [&](std::uint64_t a, x86::access how) {
      const outcome o = touch(f.cpu, gva{a}, how).result;
      return o.what == outcome::page_fault ? o.code.bits : ~0U;
    };
    CHECK(code(0x400000, access::write) == (fault_code::present | fault_code::write));
    f.cpu.set_wp(false);
    CHECK(touch(f.cpu, gva{0x400000}, access::write).at == f.now({0x5000}));
    f.cpu.set_cpl(3);
    CHECK(code(0x400000, access::write) == (fault_code::present | fault_code::write | fault_code::user));
    CHECK(touch(f.cpu, gva{0x400000}, access::read).at == f.now({0x5000}));
    CHECK(code(0x401000, access::read) == (fault_code::present | fault_code::user));
    f.check();
  };
  run(std::type_identity<x86::two_level>{});
  run(std::type_identity<x86::pae>{});
}

TEST_CASE("PDPTEs count as they were loaded: the guest writes where they came from, and nothing changes until a load") {
  fixture<x86::pae> f;
  const gva va{0x40000000};
  f.map(va, {0x5000}, rwu | used);
  const std::uint64_t second = f.new_table();
  const std::uint64_t first = std::exchange(f.root, second);
  f.map(va, {0x6000}, rwu | used);
  REQUIRE(f.cpu.set_cr3(first) == errc::ok);
  CHECK(touch(f.cpu, va, access::write).at == f.now({0x5000}));
  const std::uint64_t other = f.read64({second + 8});
  CHECK(f.write64({first + 8}, other) == errc::ok);
  CHECK(f.cpu.hits(va, access::write));
  CHECK(f.mmu.statistics().tracked_writes == 0);  // no table: nobody watches it
  f.cpu.flush_tlb();
  CHECK(touch(f.cpu, va, access::write).at == f.now({0x5000}));
  machine_of<x86::pae>::cpu_type late{f.mmu};  // the same CR3, loaded later
  REQUIRE(late.set_cr3(first) == errc::ok);
  CHECK(touch(late, va, access::write).at == f.now({0x6000}));
  CHECK(touch(f.cpu, va, access::write).at == f.now({0x5000}));
  f.check();
  f.mmu.zap_all();
  CHECK(touch(f.cpu, va, access::write).at == f.now({0x5000}));
  CHECK(touch(late, va, access::write).at == f.now({0x6000}));
  REQUIRE(f.cpu.set_cr3(first) == errc::ok);
  CHECK(touch(f.cpu, va, access::write).at == f.now({0x6000}));
  CHECK(f.write64({first + 8}, 0) == errc::ok);
  CHECK(touch(f.cpu, va, access::read).result.what == outcome::done);
  REQUIRE(f.cpu.set_cr3(first) == errc::ok);
  CHECK(touch(f.cpu, va, access::read).result.what == outcome::page_fault);
  f.check();
}

TEST_CASE("writes of CR0 and CR4 load the PDPTEs where the manual says so, and a bad one leaves everything as it was") {
  namespace cr0 = x86::cr0;
  namespace cr4 = x86::cr4;
  fixture<x86::pae> f;
  const gva va{0x40000000};
  f.map(va, {0x5000}, rwu | used);
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  f.cpu.set_ac(true);  // for SMAP
  const std::uint64_t good = f.read64({f.root + 8});
  REQUIRE(f.write64({f.root + 8}, good | pte::writable) == errc::ok);  // reserved in a PDPTE
  const auto loads = [&](auto&& change) {
    x86::control_registers next = f.cpu.controls();
    change(next);
    const errc e = f.cpu.set_controls(next);
    CHECK(touch(f.cpu, va, access::read).at == f.now({0x5000}));
    if (e == errc::ok) return false;
    CHECK(e == errc::bad_range);
    CHECK((f.cpu.controls().cr0 != next.cr0 || f.cpu.controls().cr4 != next.cr4 || f.cpu.controls().cr3 != next.cr3));
    return true;
  };
  CHECK(loads([](auto& r) { r.cr4 ^= cr4::pge; }));
  CHECK(loads([](auto& r) { r.cr4 ^= cr4::pse; }));
  CHECK(loads([](auto& r) { r.cr4 ^= cr4::smep; }));
  CHECK(loads([](auto& r) { r.cr0 ^= cr0::cd; }));
  CHECK(loads([](auto& r) { r.cr0 ^= cr0::nw; }));
  CHECK_FALSE(loads([](auto& r) { r.cr0 ^= cr0::wp; }));
  CHECK_FALSE(loads([](auto& r) { r.cr4 ^= cr4::smap; }));
  CHECK_FALSE(loads([](auto& r) { r.efer ^= x86::efer::nxe; }));
  CHECK(f.cpu.set_smep(true) == errc::bad_range);
  CHECK_FALSE(f.cpu.registers().smep);
  CHECK(f.cpu.set_pse(!f.cpu.registers().pse) == errc::bad_range);
  CHECK(f.cpu.set_cr3(f.root) == errc::bad_range);
  CHECK(f.cpu.set_registers(f.cpu.registers()) == errc::bad_range);
  CHECK(f.cpu.set_controls(f.cpu.controls(), {}) == errc::bad_range);
  CHECK(f.cpu.set_cr3(0x8000000) == errc::not_mapped);  // no memory there
  CHECK(f.cpu.registers().cr3 == f.root);
  CHECK(f.cpu.hits(va, access::read));
  REQUIRE(f.write64({f.root + 8}, good) == errc::ok);
  CHECK(f.cpu.set_smep(true) == errc::ok);
  CHECK(f.cpu.registers().smep);
  f.check();
}

TEST_CASE("an MMU refuses the modes that it is not for, and registers that cannot be") {
  fixture<x86::long_mode_4> f;
  x86::control_registers r = f.cpu.controls();
  CHECK(f.cpu.mode() == paging::long_4);
  r.efer &= ~x86::efer::lme;
  CHECK(f.cpu.set_controls(r) == errc::disabled);  // PAE
  r.cr4 &= ~x86::cr4::pae;
  CHECK(f.cpu.set_controls(r) == errc::disabled);  // two levels
  r = f.cpu.controls();
  r.cr4 &= ~x86::cr4::pae;
  CHECK(f.cpu.set_controls(r) == errc::bad_range);  // long mode without PAE
  CHECK(f.cpu.set_controls(f.cpu.controls(), {.maxphyaddr = 53}) == errc::bad_range);
  CHECK(f.cpu.controls().cr4 == x86::controls_of(f.cpu.registers(), paging::long_4).cr4);
}

namespace {
/// The way that a kernel takes from reset to 5 levels, each step a state of the registers with its own tables.
struct boot {
  using modes = machine_of<x86::long_mode_5, x86::every_mode>;
  modes m{256};
  modes::cpu_type cpu{m.mmu};
  std::array<x86::control_registers, 5> steps{};

  static constexpr std::uint64_t page_of(std::size_t step) { return (5 + step) * page_size; }
  boot() {
    for (std::uint64_t i = modes::pages; i < 256; ++i) m.host.place(ram_base + i * page_size);
    namespace cr0 = x86::cr0;
    namespace cr4 = x86::cr4;
    const gva va{page_of(0)};  // without paging it leads to itself
    const std::uint64_t paged = cr0::pe | cr0::pg;
    const auto tables = [&]<class Mode>(std::type_identity<Mode>, std::size_t step) {
      m.root = m.new_table();
      m.map<Mode>(va, {page_of(step)}, rwu | used);
      return m.root;
    };
    steps[0] = {.cr0 = cr0::pe};
    steps[1] = {.cr0 = paged, .cr3 = tables(std::type_identity<x86::two_level>{}, 1)};
    steps[2] = {.cr0 = paged, .cr3 = tables(std::type_identity<x86::pae>{}, 2), .cr4 = cr4::pae};
    steps[3] = {.cr0 = paged,
                .cr3 = tables(std::type_identity<x86::long_mode_4>{}, 3),
                .cr4 = cr4::pae,
                .efer = x86::efer::lme};
    steps[4] = {.cr0 = paged,
                .cr3 = tables(std::type_identity<x86::long_mode_5>{}, 4),
                .cr4 = cr4::pae | cr4::la57,
                .efer = x86::efer::lme};
  }
};
}  // namespace

TEST_CASE("a vCPU goes from mode to mode by its registers, and finds the root of each again without a fault") {
  boot b;
  constexpr gva va{boot::page_of(0)};
  CHECK(b.cpu.mode() == paging::none);
  for (int round = 0; round < 3; ++round) {
    for (std::size_t step = 0; step < 5; ++step) {
      REQUIRE(b.cpu.set_controls(b.steps[step]) == errc::ok);
      CHECK(b.cpu.mode() == static_cast<paging>(step));
      CHECK(touch(b.cpu, va, access::write).at == b.m.now({boot::page_of(step)}));
      CHECK(b.m.broken() == "");
    }
  }
  // Four roots are remembered: back and forth among the last ones.
  const auto faults = b.m.mmu.statistics().faults;
  for (const std::size_t step : {std::size_t{3}, std::size_t{2}, std::size_t{1}, std::size_t{4}, std::size_t{2}}) {
    REQUIRE(b.cpu.set_controls(b.steps[step]) == errc::ok);
    CHECK(b.cpu.hits(va, access::write));
  }
  CHECK(b.m.mmu.statistics().faults == faults);
}

TEST_CASE("whoever comes to PAE paging has loaded its PDPTEs, by whatever register he came") {
  boot b;
  REQUIRE(b.cpu.set_controls(b.steps[3]) == errc::ok);
  x86::control_registers next = b.steps[3];  // the tables of four levels: their first four entries as PDPTEs
  next.efer = 0;
  CHECK(b.cpu.set_controls(next) == errc::bad_range);  // W and U are reserved
  CHECK(b.cpu.mode() == paging::long_4);
  REQUIRE(b.m.write64({next.cr3}, b.m.read64({b.steps[2].cr3})) == errc::ok);
  CHECK(b.cpu.set_controls(next) == errc::ok);
  CHECK(b.cpu.mode() == paging::pae);
  CHECK(touch(b.cpu, gva{boot::page_of(0)}, access::write).at == b.m.now({boot::page_of(2)}));
  CHECK(b.m.broken() == "");
}

TEST_CASE("one table that is read in three ways has three shadows, and a write takes down what it touches in each") {
  boot b;
  constexpr gva va{0x0};
  const std::uint64_t table = b.m.new_table(), directory = b.m.new_table();
  // As 8-byte entry 0 and as 4-byte entry 0 the word leads to page 9; 4-byte entry 1, its upper half, is not present.
  CHECK(b.m.write64({table}, boot::page_of(4) | rwu | used) == errc::ok);
  CHECK(b.m.write64({directory}, table | rwu | used) == errc::ok);
  b.steps[1].cr3 = directory;
  CHECK(b.m.write64({b.steps[2].cr3}, directory | pte::present) == errc::ok);
  // The four-level tree: its PDPT's entry 0 names the directory.
  const gpa pml4{b.steps[3].cr3};
  const gpa pdpt = x86::long_mode_4::table(b.m.read64(pml4));
  CHECK(b.m.write64(pdpt, directory | rwu) == errc::ok);
  std::array<std::unique_ptr<boot::modes::cpu_type>, 3> cpus;
  for (std::size_t i = 0; i < 3; ++i) {
    cpus[i] = std::make_unique<boot::modes::cpu_type>(b.m.mmu);
    REQUIRE(cpus[i]->set_controls(b.steps[i + 1]) == errc::ok);
    CHECK(touch(*cpus[i], va, access::write).at == b.m.now({boot::page_of(4)}));
  }
  CHECK(b.m.broken() == "");
  CHECK(b.m.write({table + 4}, std::uint32_t{0}) == errc::ok);
  CHECK(cpus[0]->hits(va, access::write));  // entry 1 for it
  CHECK_FALSE(cpus[1]->hits(va, access::write));
  CHECK_FALSE(cpus[2]->hits(va, access::write));
  for (auto& cpu : cpus) CHECK(touch(*cpu, va, access::write).result.what == outcome::done);
  CHECK(b.m.write({table}, static_cast<std::uint32_t>(0x7000 | rwu | used)) == errc::ok);
  for (auto& cpu : cpus) CHECK(touch(*cpu, va, access::write).at == b.m.now({0x7000}));
  CHECK(b.m.broken() == "");
}

TEST_CASE("protection keys are judged at each access, and their registers are written without a fault or a flush") {
  using x86::fault_code;
  fixture<x86::long_mode_4> f(2048);
  f.host.place(f.host_of({0x400000}));
  const auto key = [](std::uint64_t k) { return k << pte::protection_key_shift; };
  const gpa user = f.map({0x400000}, {0x5000}, rwu | used | key(3));
  f.map({0x401000}, {0x6000}, rw | used | key(3));
  f.map({0x600000}, {0x400000}, rwu | used | key(5), 2);  // a part of it, on small pages of the host
  f.map({0x800000}, {0x400000}, rwu | used | key(6), 2);  // the same frames by another key
  f.map({0x402000}, {0x7000000}, rwu | used | key(3));    // MMIO
  x86::control_registers r = f.cpu.controls();
  r.cr3 = f.root;
  r.cr4 |= x86::cr4::pke | x86::cr4::pks;
  REQUIRE(f.cpu.set_controls(r) == errc::ok);
  const auto code = [&](std::uint64_t a, x86::access how) {
    const outcome o = touch(f.cpu, gva{a}, how).result;
    return o.what == outcome::page_fault ? o.code.bits : o.what == outcome::done ? 0U : ~0U;
  };
  constexpr std::uint32_t denied = fault_code::present | fault_code::protection_key;
  for (const unsigned a : {0x400000U, 0x401000U, 0x600000U, 0x800000U}) CHECK(code(a, access::write) == 0);
  CHECK(code(0x402000, access::read) == ~0U);
  const auto faults = f.mmu.statistics().faults, flushes = f.mmu.statistics().flushes;
  f.cpu.set_pkru(1U << 6);  // AD of key 3
  CHECK(code(0x401000, access::write) == 0);
  CHECK(code(0x600000, access::write) == 0);
  CHECK_FALSE(f.cpu.hits({0x400000}, access::read));
  f.cpu.set_pkru(2U << 6);  // WD
  CHECK(f.cpu.hits({0x400000}, access::read));
  CHECK_FALSE(f.cpu.hits({0x400000}, access::write));
  f.cpu.set_pkru(1U << 10);  // of the large page
  CHECK_FALSE(f.cpu.hits({0x600000}, access::read));
  CHECK(f.cpu.hits({0x800000}, access::read));
  f.cpu.set_pkru(1U << 12);
  CHECK(f.cpu.hits({0x600000}, access::read));
  CHECK_FALSE(f.cpu.hits({0x800000}, access::read));
  f.cpu.set_pkru(0);
  f.cpu.set_pkrs(1U << 6);
  CHECK(f.cpu.hits({0x400000}, access::write));
  CHECK_FALSE(f.cpu.hits({0x401000}, access::read));
  CHECK(f.mmu.statistics().faults == faults);
  CHECK(f.mmu.statistics().flushes == flushes);
  CHECK(code(0x401000, access::read) == denied);
  f.cpu.set_pkru(3U << 6);
  CHECK(code(0x400000, access::read) == denied);
  CHECK(code(0x402000, access::read) == denied);
  CHECK(touch(f.cpu, gva{0x400000}, access::read).at == nullptr);
  f.cpu.set_pkru(2U << 6);
  CHECK(code(0x400000, access::write) == (denied | fault_code::write));
  f.cpu.set_wp(false);  // WD binds a supervisor with CR0.WP alone
  CHECK(code(0x400000, access::write) == 0);
  f.cpu.set_wp(true);
  f.cpu.set_pkru(1U << 6);
  CHECK(code(0x400000, access::read) == denied);
  CHECK(f.write64(user, 0x5000 | rwu | used | key(4)) == errc::ok);  // the guest gives it another key
  CHECK(code(0x400000, access::read) == 0);
  r = f.cpu.controls();
  r.cr4 &= ~x86::cr4::pks;
  CHECK(f.cpu.set_controls(r) == errc::ok);
  CHECK(code(0x401000, access::read) == 0);
  f.check();
}

TEST_CASE("every access in every mode has the outcome, the address and the traces of a walk made anew") {
  struct {
    std::uint64_t done = 0, tracked = 0, faulted = 0, refused = 0, freely = 0, large = 0, resynced = 0;
  } all;
  const auto run = [&all](auto identity, const std::string& name) {
    using guest = random_guest<typename decltype(identity)::type>;
    std::uint64_t done = 0, tracked = 0, faulted = 0, refused = 0, freely = 0, large = 0, resynced = 0;
    for (std::uint64_t round = 0; round < 10; ++round) {
      guest g(seed() + round, round % 2 == 1);
      for (int i = 0; i < 2500; ++i) {
        g.step();
        if (i % 20 == 0) REQUIRE(g.m.broken() == "");
      }
      CHECK(g.m.host.on_loan() == 0);
      done += g.done;
      tracked += g.tracked;
      faulted += g.faulted;
      refused += g.refused;
      freely += g.freely;
      large += g.m.mmu.statistics().large;
      resynced += g.m.mmu.statistics().resynced;
    }
    MESSAGE(name, ": done ", done, " tracked ", tracked, " faulted ", faulted, " refused ", refused, " large ", large,
            " free writes ", freely, " synchronised ", resynced);
    all.done += done;
    all.large += large;
    all.refused += refused;
    all.tracked += tracked;
    all.faulted += faulted;
    all.freely += freely;
    all.resynced += resynced;
  };
  run(std::type_identity<x86::no_paging>{}, "no paging");
  run(std::type_identity<x86::two_level>{}, "two levels");
  run(std::type_identity<x86::pae>{}, "PAE");
  run(std::type_identity<x86::long_mode_5>{}, "5 levels");
  // Of all modes together: what a single seed does in one of them is chance.
  CHECK(all.done > 5000);
  CHECK(all.large > 10);
  CHECK(all.refused > 100);
  CHECK(all.tracked > 100);
  CHECK(all.faulted > 1000);
  CHECK(all.freely > 100);
  CHECK(all.resynced > 50);
}
