// SPDX-License-Identifier: MIT

// The two-dimensional walk: a nested guest's linear addresses, through its own tables, each of whose entries lies in
// memory that its hypervisor maps. Who gets which fault, and with which bits.

#include <mmunotify/secondary/x86/nested_vcpu.hpp>

#include <doctest/doctest.h>

#include "nested_fixture.hpp"

using namespace nested_test;

namespace {
constexpr l2_gpa a{0x7'0000'5000};
constexpr gpa page{0x5000};
constexpr gva va{0x400123};

/// L2 maps va to its page at `a`, by tables at pages 0x10 to 0x13; L1 maps that to its page 5, and those one to one.
struct fixture : nested_machine {
  gpa second_leaf = second_map(a, page);
  gpa leaf{};                    ///< L2's
  std::array<gpa, 5> entries{};  ///< L2's, [level]

  explicit fixture(bool with_npt = false, bool marks = false, std::uint64_t used_bits = used,
                   const x86::mmu_options& o = {})
      : nested_machine(with_npt, o) {
    enter(marks);
    start_l2_paging();
    leaf = l2_map(va.page(), a, rwu | used_bits);
    for (unsigned level = 4; level > 0; --level) {
      entries[level] = gpa{l2_root + (4 - level) * page_size + 8 * (va.value >> (12 + 9 * (level - 1)) & 511)};
      CHECK(write64(entries[level], read64(entries[level]) | used_bits) == errc::ok);
    }
    CHECK(entries[1] == leaf);
  }
  nested_seen go(x86::access how) { return touch2(l2, va, how); }
  /// L2's physical address of its entry of a level.
  l2_gpa at(unsigned level) const { return {entries[level].value}; }
  /// L1's entry for L2's table of a level.
  gpa second_of(unsigned level) { return second_entry(l2_gpa{entries[level].value}.page()); }
  void set_second(unsigned level, std::uint64_t with, std::uint64_t without) {
    const gpa where = second_of(level);
    CHECK(write64(where, (read64(where) | with) & ~without) == errc::ok);
  }
};

constexpr std::uint64_t by_linear = ept_exit::linear_valid;
constexpr std::uint64_t to_page = ept_exit::linear_valid | ept_exit::translated;
}  // namespace

TEST_CASE("a linear address of a nested guest reaches the host's frame through both sets of tables") {
  in_both_formats([](bool npt) {
    for (const bool marks : {false, true}) {
      fixture f(npt, marks && !npt);
      for (const x86::access how : {access::read, access::write, access::fetch}) {
        CHECK(f.go(how).at == f.now(page + 0x123));
      }
      const auto faults = f.mmu.statistics().faults;
      CHECK(f.l2.hits(va, access::write));
      CHECK(f.go(access::write).at == f.now(page + 0x123));
      CHECK(f.mmu.statistics().faults == faults);
      CHECK(f.broken() == "");
      CHECK(f.host.on_loan() == 0);
    }
  });
}

TEST_CASE("a violation on the way through each table says the entry's address, and that it is no final access") {
  for (unsigned level = 1; level <= 4; ++level) {
    for (const x86::access how : {access::read, access::write, access::fetch}) {
      fixture f;
      f.set_second(level, 0, ept_all);
      CHECK(f.go(how).result == violation(f.at(level), ept_exit::read | by_linear));
      fixture marking(false, true);
      marking.set_second(level, 0, ept_all);
      CHECK(marking.go(how).result == violation(marking.at(level), ept_exit::read | ept_exit::write | by_linear));
      fixture amd(true);
      amd.set_second(level, 0, pte::present);
      CHECK(amd.go(how).result == npf(amd.at(level), 2 | 4 | npt_exit::table_access));
      CHECK(amd.broken() == "");
    }
  }
}

TEST_CASE("a table that may be read only is read, unless the format asks for a write") {
  for (unsigned level = 1; level <= 4; ++level) {
    fixture f;
    f.set_second(level, 0, epte::write);
    CHECK(f.go(access::write).at == f.now(page + 0x123));
    CHECK(f.broken() == "");
    fixture marking(false, true);
    marking.set_second(level, 0, epte::write);
    constexpr std::uint64_t have = ept_exit::readable | ept_exit::executable;
    CHECK(marking.go(access::read).result ==
          violation(marking.at(level), ept_exit::read | ept_exit::write | have | by_linear));
    fixture amd(true);
    amd.set_second(level, 0, pte::writable);
    CHECK(amd.go(access::read).result == npf(amd.at(level), 1 | 2 | 4 | npt_exit::table_access));
  }
}

TEST_CASE("a table is read as EPT with accessed and dirty bits has it: as a write, so its page is dirty") {
  fixture f(false, true);
  CHECK(f.go(access::read).at == f.now(page + 0x123));
  for (unsigned level = 1; level <= 4; ++level) CHECK((f.read64(f.second_of(level)) & epte::dirty) != 0);
  CHECK((f.read64(f.second_leaf) & (epte::accessed | epte::dirty)) == epte::accessed);
  fixture amd(true);
  amd.set_second(2, 0, pte::dirty);
  CHECK(amd.go(access::read).at == amd.now(page + 0x123));
  CHECK((amd.read64(amd.second_of(2)) & pte::dirty) != 0);
}

TEST_CASE("the guest's own accessed and dirty bits are writes to its tables, which the hypervisor may forbid") {
  in_both_formats([](bool npt) {
    fixture f(npt, false, 0);
    CHECK(f.go(access::read).at == f.now(page + 0x123));
    for (unsigned level = 1; level <= 4; ++level) CHECK((f.read64(f.entries[level]) & used) == pte::accessed);
    CHECK(f.go(access::write).at == f.now(page + 0x123));
    CHECK((f.read64(f.leaf) & used) == used);
    CHECK(f.broken() == "");
  });
  for (unsigned level = 1; level <= 4; ++level) {
    fixture f(false, false, 0);
    f.set_second(level, 0, epte::write);
    constexpr std::uint64_t have = ept_exit::readable | ept_exit::executable;
    CHECK(f.go(access::read).result == violation(f.at(level), ept_exit::write | have | by_linear));
    CHECK((f.read64(f.entries[level]) & used) == 0);
    CHECK(f.write64(f.entries[level], f.read64(f.entries[level]) | pte::accessed) == errc::ok);
    CHECK(f.go(access::read).at == f.now(page + 0x123));
  }
}

TEST_CASE("the final access is judged by the hypervisor's tables as what it is, and says so") {
  fixture f;
  f.second_map(a, page, epte::read | epte::write_back);
  CHECK(f.go(access::read).at == f.now(page + 0x123));
  CHECK(f.go(access::write).result == violation(a + 0x123, ept_exit::write | ept_exit::readable | to_page));
  CHECK(f.go(access::fetch).result == violation(a + 0x123, ept_exit::fetch | ept_exit::readable | to_page));
  f.second_map(a, page, epte::write);
  CHECK(f.go(access::read).result == misconfiguration(a + 0x123));
  fixture amd(true);
  amd.second_map(a, page, npt_used & ~pte::writable);
  CHECK(amd.go(access::write).result == npf(a + 0x123, 1 | 2 | 4 | npt_exit::final_access));
}

TEST_CASE(
    "what the guest's own tables forbid is its own fault, before the hypervisor's tables are asked for the page") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    CHECK(f.write64(f.second_leaf, 0) == errc::ok);
    CHECK(f.go(access::read).result.to() == receiver::l1);
    CHECK(f.write64(f.leaf, a.value | pte::present | used) == errc::ok);
    nested_seen s = f.go(access::write);
    CHECK(s.result == nested_outcome{.what = nested_outcome::page_fault, .code = {1 | 2}});
    CHECK(s.result.to() == receiver::l2);
    f.l2.set_cpl(3);
    CHECK(f.go(access::read).result == nested_outcome{.what = nested_outcome::page_fault, .code = {1 | 4}});
    f.l2.set_cpl(0);
    CHECK(f.write64(f.entries[3], f.read64(f.entries[3]) & ~pte::present) == errc::ok);
    CHECK(f.go(access::read).result == nested_outcome{.what = nested_outcome::page_fault});
    s = touch2(f.l2, gva{std::uint64_t{1} << 50}, access::read);
    CHECK(s.result.what == nested_outcome::general_protection);
    CHECK(s.result.to() == receiver::l2);
  });
}

TEST_CASE("memory of the hypervisor that is not there is the host's business, for pages and for tables of both kinds") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    constexpr gpa hole{2000 * page_size};
    f.second_map(a, hole);
    nested_seen s = f.go(access::write);
    CHECK(s.result == elsewhere(nested_outcome::not_mapped, hole + 0x123));
    CHECK(s.result.to() == receiver::l0);
    f.second_map(f.at(2).page(), hole);
    CHECK(f.go(access::write).result == elsewhere(nested_outcome::not_mapped, hole + f.entries[2].offset()));
    CHECK(f.write64(f.second_entry(a, 4), hole.value | f.all()) == errc::ok);
    const std::uint64_t index = f.at(4).value >> 30 & 511;
    CHECK(f.go(access::write).result == elsewhere(nested_outcome::not_mapped, hole + 8 * index));
    CHECK(f.broken() == "");
  });
}

TEST_CASE("K3: brackets over a guest's tables, its hypervisor's, or the page make the next access look again") {
  in_both_formats([](bool npt) {
    fixture f(npt, false, 0);
    std::vector<gpa> all{page, f.second_leaf.page(), gpa{f.second}};
    for (unsigned level = 1; level <= 4; ++level) all.push_back(f.entries[level].page());
    for (const gpa one : all) {
      CHECK(f.go(access::write).at == f.now(page + 0x123));
      const range r = x86::page_range(f.host_of(one));
      f.start(r);
      if (one != f.second_leaf.page() && one.value != f.second) CHECK_FALSE(f.l2.hits(va, access::read));
      CHECK(f.broken() == "");
      f.host.migrate(f.host_of(one));
      f.end(r);
      const nested_seen s = f.go(access::write);
      CHECK(s.at == f.now(page + 0x123));
    }
    CHECK(f.broken() == "");
  });
}

TEST_CASE("what either side changes in its tables counts at the next access") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    CHECK(f.go(access::write).at == f.now(page + 0x123));
    // The guest changes its entry in its memory, where nobody notices: there is no cache of linear addresses.
    CHECK(touch2(f.l2, l2_gpa{f.leaf.value}, access::write).at == f.now(f.leaf));
    const l2_gpa b{0x7'0000'6000};
    f.second_map(b, {0x6000});
    std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(f.now(f.leaf))).store(b.value | rwu | used);
    CHECK(f.go(access::write).at == f.now({0x6123}));
    f.second_map(b, {0x7000});
    CHECK(f.go(access::write).at == f.now({0x7123}));
    // The hypervisor puts another table in the place of the guest's.
    CHECK(f.write64({0x8000 + f.leaf.offset()}, a.value | rwu | used) == errc::ok);
    f.second_map(f.at(1).page(), {0x8000});
    CHECK(f.go(access::write).at == f.now(page + 0x123));
    CHECK(f.broken() == "");
  });
}

TEST_CASE("a guest's tables in ROM, or lent read-only, are read, and keep their bits") {
  struct {
    bool npt, marks;
  } const formats[] = {{false, false}, {false, true}, {true, false}};
  for (const auto& format : formats) {
    for (unsigned level = 1; level <= 4; ++level) {
      fixture f(format.npt, format.marks, 0);
      const std::uint64_t was = f.read64(f.entries[level]);
      f.start(x86::page_range(f.host_of(f.entries[level].page())));
      f.host.read_only[f.host_of(f.entries[level].page()).value] = true;
      f.end(x86::page_range(f.host_of(f.entries[level].page())));
      CHECK(f.go(access::write).at == f.now(page + 0x123));
      CHECK(f.go(access::read).at == f.now(page + 0x123));
      CHECK(f.read64(f.entries[level]) == was);
      for (unsigned other = 1; other <= 4; ++other) {
        if (other != level) CHECK((f.read64(f.entries[other]) & pte::accessed) != 0);
      }
      CHECK(f.broken() == "");
    }
  }
}

TEST_CASE(
    "a right that the hypervisor withdraws while its guest's table is read from ROM is reported as it was asked") {
  fixture f(false, true);
  const gpa table = f.entries[1].page();
  f.start(x86::page_range(f.host_of(table)));
  f.host.read_only[f.host_of(table).value] = true;
  f.end(x86::page_range(f.host_of(table)));
  f.host.keep = true;
  f.host.during_pin = [&](hva at, bool write) {
    if (at != f.host_of(table) || !write) return;
    f.host.keep = false;
    f.set_second(1, 0, ept_all);
  };
  CHECK(f.go(access::read).result == violation(f.at(1), ept_exit::read | ept_exit::write | by_linear));
}

TEST_CASE("a guest's PDPTEs under NPT are read by each walk, and a bad one is the guest's page fault") {
  fixture f(true);
  x86::control_registers r = f.long_mode(0x15000);
  r.efer = 0;
  f.second_map({0x3000}, page);
  CHECK(f.write64({0x15000}, 0x16003) == errc::ok);  // W is reserved there
  CHECK(f.write64({0x16000}, 0x17003) == errc::ok);
  CHECK(f.write64({0x17000 + 8}, 0x3003) == errc::ok);
  CHECK(f.l2.set_controls(r).what == nested_outcome::done);
  CHECK(touch2(f.l2, gva{0x1456}, access::write).result ==
        nested_outcome{.what = nested_outcome::page_fault, .code = {1 | 2 | 8}});
  CHECK(f.write64({0x15000}, 0x16001) == errc::ok);
  CHECK(touch2(f.l2, gva{0x1456}, access::write).at == f.now(page + 0x456));
  CHECK(f.read64({0x15000}) == 0x16001);  // no accessed bit
  f.second_map({0x15000}, {0x15000}, npt_used & ~pte::writable);
  CHECK(touch2(f.l2, gva{0x1456}, access::read).result ==
        npf({0x15000}, 1 | 2 | 4 | npt_exit::table_access));  // a table is read as a write
}

TEST_CASE("a guest's tables in a table of the hypervisor's are read, and their bits set, and the shadow follows") {
  struct {
    bool npt, marks;
  } const formats[] = {{false, false}, {false, true}, {true, false}};
  for (const auto& format : formats) {
    fixture f(format.npt, format.marks, 0);
    // L2's lowest table is L1's table for a second address, in entries that do not meet.
    const l2_gpa b{0x9'0000'3000};
    const gpa second_b = f.second_map(b, {0x6000});
    REQUIRE(second_b.offset() != f.leaf.offset());
    CHECK(touch2(f.l2, b, access::write).at == f.now({0x6000}));
    const gpa leaf = second_b.page() + f.leaf.offset();
    CHECK(f.write64(leaf, a.value | rwu) == errc::ok);
    f.second_map(f.at(1).page(), second_b.page());
    CHECK(f.mmu.log_writes(1, x86::dirty_tracking::write_protect) == errc::ok);
    CHECK(touch2(f.l2, b, access::write).at == f.now({0x6000}));
    const auto writes = f.mmu.statistics().tracked_writes;
    CHECK(f.go(access::read).at == f.now(page + 0x123));
    CHECK((f.read64(leaf) & used) == pte::accessed);
    CHECK(f.go(access::write).at == f.now(page + 0x123));
    CHECK((f.read64(leaf) & used) == used);
    CHECK(f.mmu.statistics().tracked_writes == writes + 2);
    std::array<std::uint64_t, 1> words{};
    CHECK(f.mmu.harvest_writes(1, words) == errc::ok);
    CHECK((words[0] >> frame_of(leaf).value & 1) == 1);
    CHECK(f.l2.hits(b, access::read));  // its entry was not touched
    CHECK(f.broken() == "");
    CHECK(f.host.on_loan() == 0);
  }
}

TEST_CASE("a guest's writes to its tables are in the log of the hypervisor's memory, its accessed bits as well") {
  for (const auto how : {x86::dirty_tracking::write_protect, x86::dirty_tracking::dirty_bits}) {
    fixture f(false, false, 0);
    CHECK(f.mmu.log_writes(1, how) == errc::ok);
    CHECK(f.go(access::read).at == f.now(page + 0x123));
    std::array<std::uint64_t, 1> words{};
    CHECK(f.mmu.harvest_writes(1, words) == errc::ok);
    CHECK((words[0] & ~(~std::uint64_t{0} << 32)) == 0xf0000);  // four tables, and not the page
    CHECK(f.go(access::write).at == f.now(page + 0x123));
    CHECK(f.mmu.harvest_writes(1, words) == errc::ok);
    CHECK((words[0] & ~(~std::uint64_t{0} << 32)) == (0x80000 | 1 << 5));
  }
}

TEST_CASE("a nested guest may be in any paging mode") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    x86::control_registers r = f.long_mode(f.l2_root);
    SUBCASE("none") {
      CHECK(f.l2.set_controls({}).what == nested_outcome::done);
      f.second_map({0x3000}, page);
      CHECK(touch2(f.l2, gva{0x3456}, access::write).at == f.now(page + 0x456));
      CHECK(touch2(f.l2, gva{0x2000}, access::write).result ==
            (npt ? npf({0x2000}, 2 | 4 | npt_exit::final_access) : violation({0x2000}, ept_exit::write | to_page)));
    }
    SUBCASE("two levels") {
      r.cr4 = r.efer = 0;
      f.second_map({0x3000}, page);
      CHECK(f.write({0x10000 + 4}, std::uint32_t{0x11003}) == errc::ok);
      CHECK(f.write({0x11000 + 8}, std::uint32_t{0x3003}) == errc::ok);
      CHECK(f.l2.set_controls(r).what == nested_outcome::done);
      CHECK(touch2(f.l2, gva{0x402456}, access::write).at == f.now(page + 0x456));
      CHECK(f.read<std::uint32_t>({0x11008}) == 0x3063);
      CHECK(f.read<std::uint32_t>({0x1100c}) == 0);
    }
    SUBCASE("PAE, whose PDPTEs are loaded through EPT") {
      if (npt) return;
      r.efer = 0;
      r.cr3 = 0x15000;
      f.second_map({0x3000}, page);
      const gpa second_15 = f.second_entry({0x15000});
      const std::uint64_t whole = f.read64(second_15);
      CHECK(f.write64(second_15, 0) == errc::ok);
      const x86::walk_context before = f.l2.registers();
      CHECK(f.l2.set_controls(r) == violation({0x15000}, ept_exit::read));
      CHECK(f.l2.registers().cr3 == before.cr3);
      CHECK(f.l2.mode() == x86::paging::long_4);
      CHECK(f.write64(second_15, whole) == errc::ok);
      CHECK(f.write64({0x15000}, 0x16003) == errc::ok);
      CHECK(f.l2.set_controls(r).what == nested_outcome::general_protection);
      CHECK(f.write64({0x15000}, 0x16001) == errc::ok);
      CHECK(f.write64({0x16000}, 0x17003) == errc::ok);
      CHECK(f.write64({0x17000 + 8}, 0x3003) == errc::ok);
      CHECK(f.l2.set_controls(r).what == nested_outcome::done);
      CHECK(f.l2.mode() == x86::paging::pae);
      CHECK(touch2(f.l2, gva{0x1456}, access::write).at == f.now(page + 0x456));
    }
    SUBCASE("five levels") {
      r.cr4 |= x86::cr4::la57;
      r.cr3 = 0x17000;
      CHECK(f.write64({0x17000}, f.l2_root | rwu) == errc::ok);
      CHECK(f.l2.set_controls(r).what == nested_outcome::done);
      CHECK(f.go(access::write).at == f.now(page + 0x123));
    }
    CHECK(f.broken() == "");
  });
}

TEST_CASE("PDPTEs that EPT with accessed and dirty bits maps for reading only can be loaded") {
  fixture f(false, true);
  f.second_map({0x15000}, {0x15000}, epte::read | epte::write_back);
  x86::control_registers r = f.long_mode(0x15000);
  r.efer = 0;
  CHECK(f.l2.set_controls(r).what == nested_outcome::done);
}

TEST_CASE("registers that cannot be are refused, and change nothing") {
  fixture f;
  x86::control_registers r = f.long_mode(f.l2_root);
  r.cr0 &= ~x86::cr0::pe;
  CHECK(f.l2.set_controls(r).what == nested_outcome::general_protection);
  CHECK(f.l2.set_controls(f.long_mode(std::uint64_t{1} << 40)).what == nested_outcome::general_protection);
  CHECK(f.l2.set_controls(f.long_mode(f.l2_root), {.maxphyaddr = 60}).what == nested_outcome::general_protection);
  CHECK(f.go(access::write).at == f.now(page + 0x123));
}

TEST_CASE("protection keys, SMAP and the privilege level of a nested guest are its own") {
  fixture f;
  x86::control_registers r = f.long_mode(f.l2_root);
  r.cr4 |= x86::cr4::smap | x86::cr4::pke;
  CHECK(f.l2.set_controls(r).what == nested_outcome::done);
  CHECK(f.go(access::read).result == nested_outcome{.what = nested_outcome::page_fault, .code = {1}});
  f.l2.set_ac(true);
  CHECK(f.go(access::read).at == f.now(page + 0x123));
  CHECK(touch2(f.l2, va, access::implicit_write).result ==
        nested_outcome{.what = nested_outcome::page_fault, .code = {1 | 2}});
  f.l2.set_cpl(3);
  f.l2.set_pkru(1);
  CHECK(f.go(access::read).result == nested_outcome{.what = nested_outcome::page_fault, .code = {1 | 4 | 32}});
  f.l2.set_pkru(0);
  f.l2.set_pkrs(1);
  CHECK(f.go(access::read).at == f.now(page + 0x123));
}

TEST_CASE("a released host is the owner's business, and a nested guest goes on after it is resumed") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    CHECK(f.go(access::write).at == f.now(page + 0x123));
    f.mmu.release();
    CHECK(f.go(access::write).result.what == nested_outcome::released);
    CHECK(f.mmu.page_count() == 0);
    f.mmu.resume();
    CHECK(f.go(access::write).at == f.now(page + 0x123));
    f.mmu.zap_all();
    CHECK_FALSE(f.l2.hits(va, access::read));
    CHECK(f.go(access::write).at == f.now(page + 0x123));
    CHECK(f.mmu.clear_flush_young({0, UINTPTR_MAX}));
    CHECK_FALSE(f.mmu.test_young({0, UINTPTR_MAX}));
    CHECK(f.go(access::read).at == f.now(page + 0x123));
    CHECK(f.mmu.test_young(x86::page_range(f.host_of(page))));
    CHECK(f.broken() == "");
  });
}

TEST_CASE("an access needs room for its tables alone, however many there have been") {
  in_both_formats([](bool npt) {
    fixture f(npt, false, used, {.max_pages = 64});
    for (std::uint64_t i = 0; i < 100; ++i) {
      const l2_gpa far{i << 39 | 0x5000};
      CHECK(f.write64({f.second + 8 * i}, f.read64({f.second})) == errc::ok);
      static_cast<void>(touch2(f.l2, far, access::read));
      CHECK(f.go(access::write).at == f.now(page + 0x123));
    }
    CHECK(f.mmu.page_count() <= 64);
    CHECK(f.broken() == "");
  });
}
