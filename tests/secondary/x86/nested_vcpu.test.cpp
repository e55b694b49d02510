// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/nested_vcpu.hpp>

#include <doctest/doctest.h>

#include "nested_fixture.hpp"

using namespace nested_test;

namespace {
constexpr l2_gpa a{0x7'0000'5000};
constexpr gpa page{0x5000};
constexpr gva va{0x400000};

/// L2's page at `a` is L1's page 5, in either format.
struct fixture : nested_machine {
  gpa leaf = second_map(a, page);

  explicit fixture(bool with_npt = false, bool marks = false, const x86::mmu_options& o = {})
      : nested_machine(with_npt, o) {
    enter(marks);
  }
  nested_seen go(x86::access how, l2_gpa at = a) { return touch2(l2, at, how); }
  nested_seen go(x86::access how, gva at) { return touch2(l2, at, how); }
  /// The exit that L1 gets for an access by physical address: of EPT with this qualification, of NPT with this code.
  nested_outcome exit_of(std::uint64_t qualification, std::uint64_t code, l2_gpa where = a) const {
    return npt ? npf(where, code | npt_exit::final_access) : violation(where, qualification);
  }
  static range bytes_of(gpa p) { return x86::page_range(host_of(p)); }
};
}  // namespace

TEST_CASE("a nested access reaches the host's frame through the hypervisor's tables, and no fault follows the first") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    for (const x86::access how : {access::read, access::write, access::fetch}) {
      CHECK(f.go(how, a + 0x123).at == f.now(page + 0x123));
    }
    const auto faults = f.mmu.statistics().faults;
    CHECK(f.go(access::write).at == f.now(page));
    CHECK(f.mmu.statistics().faults == faults);
    CHECK(f.l2.hits(a, access::write));
    CHECK(f.broken() == "");
    CHECK(f.host.on_loan() == 0);
  });
}

TEST_CASE(
    "each right of the hypervisor's entries is judged, at the leaf and above it, and its exit says what there is") {
  struct {
    std::uint64_t bits;
    bool read, write, fetch;
  } const rights[] = {
      {ept_all, true, true, true},
      {epte::read | epte::write, true, true, false},
      {epte::read | epte::execute, true, false, true},
      {epte::read, true, false, false},
      {epte::execute, false, false, true},
  };
  for (const auto& r : rights) {
    for (unsigned level = 1; level <= 4; ++level) {
      fixture f;
      const gpa entry = f.second_entry(a, level);
      CHECK(f.write64(entry, (f.read64(entry) & ~ept_all) | r.bits) == errc::ok);
      const std::uint64_t have = r.bits << 3;
      const auto expect = [&](x86::access how, bool allowed) {
        const nested_seen s = f.go(how);
        CHECK((s.at == f.now(page)) == allowed);
        if (!allowed) CHECK(s.result == violation(a, ept_exit::of(how) | have));
        if (!allowed) CHECK(s.result.to() == receiver::l1);
      };
      for (int again = 0; again < 2; ++again) {
        expect(access::fetch, r.fetch);
        expect(access::read, r.read);
        expect(access::write, r.write);
      }
      CHECK(f.broken() == "");
    }
  }
}

TEST_CASE("each right of NPT is judged as a user's, and its exit has the error code of a page fault") {
  constexpr std::uint64_t p = 1, w = 2, u = 4, reserved = 8, i = 16;
  for (unsigned level = 1; level <= 4; ++level) {
    fixture f(true);
    const gpa entry = f.second_entry(a, level);
    const std::uint64_t whole = f.read64(entry);
    CHECK(f.write64(entry, whole & ~pte::writable) == errc::ok);
    CHECK(f.go(access::read).at == f.now(page));
    CHECK(f.go(access::write).result == npf(a, p | w | u | npt_exit::final_access));
    CHECK(f.write64(entry, whole & ~pte::user) == errc::ok);
    CHECK(f.go(access::read).result == npf(a, p | u | npt_exit::final_access));
    CHECK(f.write64(entry, whole | pte::no_execute) == errc::ok);
    CHECK(f.go(access::fetch).result == npf(a, p | u | i | npt_exit::final_access));
    CHECK(f.go(access::write).at == f.now(page));
    CHECK(f.write64(entry, whole & ~pte::present) == errc::ok);
    CHECK(f.go(access::write).result == npf(a, w | u | npt_exit::final_access));
    CHECK(f.write64(entry, whole | std::uint64_t{1} << 45) == errc::ok);
    CHECK(f.go(access::read).result == npf(a, p | u | reserved | npt_exit::final_access));
    CHECK(f.write64(entry, whole | pte::no_execute) == errc::ok);
    nested_pointer no_nx = f.pointer();
    no_nx.nxe = false;
    CHECK(f.l2.enter(no_nx) == pointer_error::none);  // now it is a reserved bit, and fetches are not told apart
    CHECK(f.go(access::fetch).result == npf(a, p | u | reserved | npt_exit::final_access));
    CHECK(f.broken() == "");
  }
}

TEST_CASE("an address beyond the hypervisor's tables is its business, and no alias of one within") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    const l2_gpa beyond{a.value | std::uint64_t{1} << 48};
    CHECK(f.go(access::write).at == f.now(page));
    CHECK(f.go(access::write, beyond).result == f.exit_of(ept_exit::write, 2 | 4, beyond));
    CHECK(f.go(access::fetch, beyond).result == f.exit_of(ept_exit::fetch, 4 | 16, beyond));
  });
}

TEST_CASE("misconfigurations are exits of their own, for every rule of the format") {
  fixture f;
  const auto with = [&](unsigned level, std::uint64_t bits, std::uint64_t without = 0) {
    fixture g;
    const gpa entry = g.second_entry(a, level);
    CHECK(g.write64(entry, (g.read64(entry) & ~without) | bits) == errc::ok);
    return g.go(access::read).result;
  };
  const nested_outcome bad = misconfiguration(a);
  CHECK(bad.to() == receiver::l1);
  for (unsigned level = 1; level <= 4; ++level) {
    CHECK(with(level, 0, epte::read) == bad);                                 // written and not read
    CHECK(with(level, std::uint64_t{1} << 44) == bad);                        // beyond MAXPHYADDR
    CHECK(with(level, std::uint64_t{1} << 55).what == nested_outcome::done);  // ignored
    if (level > 1) CHECK(with(level, 1 << 4) == bad);                         // a link's reserved bits
  }
  CHECK(with(4, epte::large) == bad);
  CHECK(with(2, epte::large) == bad);  // a link's address is no large leaf's
  CHECK(with(1, 7 << 3) == bad);       // memory type
  CHECK(with(1, 2 << 3, 7 << 3) == bad);
  CHECK(with(1, 0, 7 << 3).what == nested_outcome::done);  // uncacheable
}

TEST_CASE("execute-only entries are misconfigured unless the processor has them") {
  nested_machine without(false, {}, nested_machine::pages, {.execute_only = false});
  without.second_map(a, page, epte::execute | epte::write_back);
  without.enter();
  CHECK(touch2(without.l2, a, access::fetch).result == misconfiguration(a));
  fixture f;
  f.second_map(a, page, epte::execute | epte::write_back);
  CHECK(f.go(access::fetch).at == f.now(page));
  CHECK(f.go(access::read).result == violation(a, ept_exit::read | ept_exit::executable));
}

TEST_CASE(
    "accessed and dirty bits of EPT are set in the hypervisor's memory if the EPTP asks, and a clean leaf is not "
    "written unseen") {
  fixture plain;
  CHECK(plain.go(access::write).at == plain.now(page));
  CHECK((plain.read64(plain.leaf) & (epte::accessed | epte::dirty)) == 0);
  fixture f(false, true);
  CHECK(f.go(access::read).at == f.now(page));
  CHECK((f.read64(f.leaf) & (epte::accessed | epte::dirty)) == epte::accessed);
  CHECK((f.read64(f.second_entry(a, 4)) & epte::accessed) != 0);
  CHECK_FALSE(f.l2.hits(a, access::write));
  CHECK(f.go(access::write).at == f.now(page));
  CHECK((f.read64(f.leaf) & (epte::accessed | epte::dirty)) == (epte::accessed | epte::dirty));
  CHECK(f.broken() == "");
}

TEST_CASE("accessed and dirty bits of NPT are set in the hypervisor's memory, and a clean leaf is not written unseen") {
  fixture f(true);
  CHECK(f.write64(f.leaf, page.value | npt_all) == errc::ok);
  CHECK(f.go(access::read).at == f.now(page));
  CHECK((f.read64(f.leaf) & (pte::accessed | pte::dirty)) == pte::accessed);
  CHECK_FALSE(f.l2.hits(a, access::write));
  CHECK(f.go(access::write).at == f.now(page));
  CHECK((f.read64(f.leaf) & pte::dirty) != 0);
}

TEST_CASE("tables that are read with and without accessed and dirty bits are not shared") {
  fixture f;
  CHECK(f.go(access::write).at == f.now(page));
  CHECK(f.l2.enter(f.pointer(true)) == pointer_error::none);
  CHECK_FALSE(f.l2.hits(a, access::read));
  CHECK(f.go(access::read).at == f.now(page));
  CHECK_FALSE(f.l2.hits(a, access::write));  // the leaf is clean in the tables' new meaning
  CHECK(f.go(access::write).at == f.now(page));
  CHECK((f.read64(f.leaf) & epte::dirty) != 0);
  const auto reused = f.mmu.statistics().roots_reused;
  CHECK(f.l2.enter(f.pointer()) == pointer_error::none);
  CHECK(f.l2.hits(a, access::write));
  CHECK(f.mmu.statistics().roots_reused == reused + 1);
  CHECK(f.broken() == "");
}

TEST_CASE("one table is read as EPT by one hypervisor's context and as NPT by another, and never mixed up") {
  // Bits 0 to 2 mean R, W, X there, and P, W, U here: 5 is execute and read, or not writable.
  fixture f;
  const gpa leaf = f.second_map(a, page, 5);  // bit 5, A of NPT, is a memory type's
  CHECK(f.go(access::fetch).at == f.now(page));
  CHECK(f.go(access::write).result == violation(a, ept_exit::write | ept_exit::readable | ept_exit::executable));
  f.npt = true;
  f.enter();
  CHECK_FALSE(f.l2.hits(a, access::read));
  CHECK(f.go(access::write).result == npf(a, 1 | 2 | 4 | npt_exit::final_access));
  CHECK(f.go(access::fetch).at == f.now(page));
  CHECK((f.read64(leaf) & pte::accessed) != 0);
  CHECK(f.broken() == "");
}

TEST_CASE("large entries of the hypervisor are mapped as large as the host allows, and each part is right") {
  in_both_formats([](bool npt) {
    for (const unsigned level : {2U, 3U}) {
      nested_machine m(npt, {}, 2048);
      const hva run = ram_base + 1024 * page_size;
      m.host.place_run(run, 21, 512);
      const l2_gpa big{0x40000000};
      m.second_map(big, {level == 2 ? 0x400000U : 0U}, m.leaf_bits(), level);
      m.enter();
      const l2_gpa inside = big + (level == 2 ? 0 : 0x400000);
      CHECK(touch2(m.l2, inside + 0x3456, access::write).at == m.host.bytes(run + 0x3456));
      CHECK(m.mmu.statistics().large == 1);
      CHECK(m.l2.hits(inside + 0x1ff000, access::write));
      if (level == 3) {
        CHECK(touch2(m.l2, big + 0x5000, access::write).at == m.now({0x5000}));
        CHECK(touch2(m.l2, big + 0x3f'0000'0, access::write).result.what != nested_outcome::ept_violation);
      }
      CHECK(m.broken() == "");
      m.start(x86::page_range(run + 7 * page_size));
      CHECK_FALSE(m.l2.hits(inside, access::read));
      m.host.split_run(run);
      m.host.migrate(run + 7 * page_size);
      m.end(x86::page_range(run + 7 * page_size));
      CHECK(touch2(m.l2, inside + 0x7000, access::write).at == m.host.bytes(run + 7 * page_size));
      CHECK(touch2(m.l2, inside + 0x8000, access::write).at == m.host.bytes(run + 8 * page_size));
      CHECK(m.broken() == "");
    }
  });
}

TEST_CASE("1 GiB entries are refused where the processor has none") {
  nested_machine m(false, {}, nested_machine::pages, {.gib_pages = false});
  m.second_map({0x40000000}, {0}, ept_all | epte::write_back, 3);
  m.enter();
  CHECK(touch2(m.l2, l2_gpa{0x40000000}, access::read).result == misconfiguration({0x40000000}));
  nested_machine n(true, {}, nested_machine::pages, {.gib_pages = false});
  n.second_map({0x40000000}, {0}, npt_used, 3);
  n.enter();
  CHECK(touch2(n.l2, l2_gpa{0x40000000}, access::read).result == npf({0x40000000}, 1 | 4 | 8 | npt_exit::final_access));
}

TEST_CASE("five levels are walked and shadowed like four") {
  in_both_formats([](bool npt) {
    nested_machine m(npt);
    m.levels = 5;
    const l2_gpa far{0x5'0000'7000'5000};
    m.second_map(far, page);
    m.enter();
    CHECK(touch2(m.l2, far, access::write).at == m.now(page));
    CHECK(m.l2.hits(far, access::write));
    CHECK(m.broken() == "");
    const l2_gpa beyond{std::uint64_t{1} << 57};
    CHECK(touch2(m.l2, beyond, access::read).result.to() == receiver::l1);
  });
}

TEST_CASE("K3: what the hypervisor takes back or moves is gone for its guest when its write returns, at every level") {
  in_both_formats([](bool npt) {
    for (unsigned level = 1; level <= 4; ++level) {
      fixture f(npt);
      nested_machine::nested_cpu other{f.mmu};
      CHECK(other.enter(f.pointer()) == pointer_error::none);
      CHECK(f.go(access::write).at == f.now(page));
      CHECK(touch2(other, a, access::write).at == f.now(page));
      const gpa entry = f.second_entry(a, level);
      const std::uint64_t was = f.read64(entry);
      // By itself, in its memory: it is a tracked write.
      CHECK(touch(f.l1, gva{entry.value}, access::write).result ==
            outcome{.what = outcome::write_tracked, .address = entry});
      CHECK(f.write64(entry, 0) == errc::ok);
      CHECK_FALSE(f.l2.hits(a, access::read));
      CHECK_FALSE(other.hits(a, access::read));
      CHECK(f.go(access::write).result == f.exit_of(ept_exit::write, 2 | 4));
      CHECK(f.write64(entry, level == 1 ? 0x6000 | f.leaf_bits() : was) == errc::ok);
      CHECK(f.go(access::write).at == f.now(level == 1 ? gpa{0x6000} : page));
      CHECK(f.broken() == "");
    }
  });
}

TEST_CASE("rights that the hypervisor withdraws are withdrawn from its guest") {
  fixture f;
  CHECK(f.go(access::write).at == f.now(page));
  f.second_map(a, page, epte::read | epte::write_back);
  CHECK_FALSE(f.l2.hits(a, access::write));
  CHECK(f.go(access::write).result == violation(a, ept_exit::write | ept_exit::readable));
  CHECK(f.go(access::read).at == f.now(page));
  CHECK(f.broken() == "");
}

TEST_CASE("K3: a bracket of the primary takes down what a nested guest maps, and write protection its writes") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    CHECK(f.go(access::write).at == f.now(page));
    CHECK(touch(f.l1, gva{page.value}, access::write).at == f.now(page));
    f.start(f.bytes_of(page));
    CHECK_FALSE(f.l2.hits(a, access::read));
    CHECK_FALSE(f.l1.hits({page.value}, access::read));
    CHECK(f.broken() == "");
    f.host.migrate(f.host_of(page));
    f.end(f.bytes_of(page));
    CHECK(f.go(access::write).at == f.now(page));
    f.start(f.bytes_of(page), event::soft_dirty);
    CHECK(f.l2.hits(a, access::read));
    CHECK_FALSE(f.l2.hits(a, access::write));
    f.end(f.bytes_of(page), event::soft_dirty);
    CHECK(f.go(access::write).at == f.now(page));
    const invalidation in_place{.range = f.bytes_of(page), .event = event::clear, .in_place = true};
    f.mmu.invalidate_range_start(in_place);
    const pfn fresh = f.host.migrate(f.host_of(page));
    f.mmu.change_entry({.range = f.bytes_of(page), .frame = fresh, .writable = true});
    CHECK(f.go(access::read).at == f.now(page));
    f.mmu.invalidate_range_end(in_place);
    CHECK(f.broken() == "");
  });
}

TEST_CASE("K1: a bracket in the middle of a nested fault makes it start again") {
  in_both_formats([](bool npt) {
    for (const gpa victim : {page, gpa{0}}) {
      fixture f(npt);
      const gpa hit = victim.value != 0 ? victim : f.leaf.page();  // the page, and the table that maps it
      f.host.during_pin = [&](hva at, bool) {
        if (at != f.host_of(page)) {
          f.host.keep = true;
          return;
        }
        f.host.keep = false;
        f.migrate(hit);
      };
      const nested_seen s = f.go(access::write);
      CHECK(s.at == f.now(page));
      CHECK(f.mmu.statistics().retries == 1);
      CHECK(f.broken() == "");
      CHECK(f.host.on_loan() == 0);
    }
  });
}

TEST_CASE("a hypervisor that changes its tables in the middle of a nested fault is noticed") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    f.host.keep = true;
    f.host.during_pin = [&](hva at, bool) {
      if (at != f.host_of(page)) return;
      f.host.keep = false;
      *reinterpret_cast<std::uint64_t*>(f.now(f.leaf)) = 0x6000 | f.leaf_bits();
    };
    CHECK(f.go(access::write).at == f.now({0x6000}));
    CHECK(f.broken() == "");
  });
}

TEST_CASE("K3: a slot that goes takes a nested guest's mappings and tables along") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    CHECK(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 1, .host = f.host_of(page)}) == errc::ok);
    f.second_map(a, {1000 * page_size});
    CHECK(f.go(access::write).at == f.now(page));
    CHECK(f.mmu.remove_slot(2) == errc::ok);
    CHECK_FALSE(f.l2.hits(a, access::read));
    const nested_outcome gone = elsewhere(nested_outcome::not_mapped, {1000 * page_size + 8});
    CHECK(f.go(access::write, a + 8).result == gone);
    CHECK(gone.to() == receiver::l0);
    const auto faults = f.mmu.statistics().faults;
    CHECK(f.go(access::write, a + 8).result == gone);  // known for MMIO
    CHECK(f.mmu.statistics().faults == faults);
    CHECK(f.mmu.statistics().mmio_hits == 1);
    CHECK(f.mmu.move_slot(1, {1 << 16}) == errc::ok);  // its tables as well
    CHECK(f.broken() == "");
    CHECK(f.go(access::read).result == elsewhere(nested_outcome::not_mapped, f.second_entry(a, 4)));
  });
}

TEST_CASE("a read-only slot and a frame that the host lends for reading are written by no nested guest") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    CHECK(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 1, .host = f.host_of({0x6000}), .read_only = true}) ==
          errc::ok);
    f.second_map(a, {1000 * page_size});
    CHECK(f.go(access::read).at == f.now({0x6000}));
    CHECK(f.go(access::write).result == elsewhere(nested_outcome::not_mapped, {1000 * page_size}));
    f.host.read_only[f.host_of(page).value] = true;
    f.second_map(a, page);
    CHECK(f.go(access::read).at == f.now(page));
    CHECK(f.go(access::write).result == elsewhere(nested_outcome::not_mapped, page));
    CHECK(f.broken() == "");
  });
}

TEST_CASE("a nested guest's writes are in the log of the hypervisor's memory, by either way to log") {
  in_both_formats([](bool npt) {
    for (const auto how : {x86::dirty_tracking::write_protect, x86::dirty_tracking::dirty_bits}) {
      fixture f(npt);
      std::array<std::uint64_t, 1> words{};
      CHECK(f.go(access::write).at == f.now(page));
      CHECK(f.mmu.log_writes(1, how) == errc::ok);
      CHECK(f.go(access::read).at == f.now(page));
      CHECK(f.mmu.harvest_writes(1, words) == errc::ok);
      CHECK(words[0] == 0);
      for (int i = 0; i < 3; ++i) {
        const auto faults = f.mmu.statistics().faults;
        CHECK(f.go(access::write).at == f.now(page));
        CHECK(f.mmu.statistics().faults == faults);  // no fault is needed for the first write
        CHECK(f.mmu.harvest_writes(1, words) == errc::ok);
        CHECK(words[0] == 1 << 5);
      }
      CHECK(f.broken() == "");
    }
  });
}

TEST_CASE("a nested guest cannot write its hypervisor's tables unseen") {
  in_both_formats([](bool npt) {
    fixture f(npt);
    const l2_gpa window{0x9000};
    f.second_map(window, f.leaf.page());
    CHECK(f.go(access::write).at == f.now(page));  // now the table is shadowed
    CHECK(f.go(access::write, window + f.leaf.offset()).result == elsewhere(nested_outcome::write_tracked, f.leaf));
    CHECK(f.go(access::read, window).at == f.now(f.leaf.page()));
    CHECK(f.broken() == "");
  });
}

TEST_CASE("tables that the hypervisor writes freely count at its INVEPT, in all that they say") {
  in_both_formats([](bool npt) {
    fixture f(npt, true, {.unsync = true});
    const auto l1_writes = [&](std::uint64_t value) {
      CHECK(f.l1.access({f.leaf.value}, access::write,
                        [&](std::byte* at) noexcept {
                          std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at)).store(value);
                        })
                .what == outcome::done);
    };
    const std::uint64_t bits = npt ? npt_used : ept_all | epte::write_back | epte::accessed | epte::dirty;
    const std::uint64_t same = page.value | bits;
    const std::uint64_t withdrawn[] = {
        same & ~(npt ? pte::writable : epte::write),
        npt ? same & ~pte::user : page.value | epte::execute | epte::write_back | epte::accessed,
        same & ~(npt ? pte::dirty : epte::dirty),
        same & ~(npt ? pte::accessed : epte::accessed),
        same | std::uint64_t{1} << 44,
        0x6000 | bits,
        0,
    };
    for (const std::uint64_t value : withdrawn) {
      l1_writes(same);
      f.l2.invept();
      CHECK(f.go(access::write).at == f.now(page));
      l1_writes(value);
      CHECK(f.l2.invept(f.pointer(true)) == pointer_error::none);
      CHECK_FALSE(f.l2.hits(a, access::write));
      CHECK(f.broken() == "");
    }
    l1_writes(page.value | bits);
    f.l2.invept();
    CHECK(f.go(access::write).at == f.now(page));
    l1_writes(page.value | bits | std::uint64_t{1} << 60 >> (npt ? 8 : 0));  // ignored bits
    f.l2.invept();
    CHECK(f.l2.hits(a, access::write));  // what still follows stays
    l1_writes(0x6000 | bits);
    f.l1.flush_tlb();  // any flush brings them up to date
    CHECK_FALSE(f.l2.hits(a, access::read));
    CHECK(f.go(access::write).at == f.now({0x6000}));
    CHECK(f.broken() == "");
  });
}

TEST_CASE("bad pointers are refused with the reason, and change nothing") {
  fixture f;
  const std::uint64_t good = f.pointer().value;
  const auto refused = [&](const nested_pointer& p) {
    const pointer_error e = f.l2.enter(p);
    CHECK(f.l2.invept(p) == e);
    CHECK(f.l2.tables() == f.pointer());
    return e;
  };
  CHECK(refused({.value = (good & ~std::uint64_t{7}) | 4}) == pointer_error::memory_type);
  CHECK(refused({.value = (good & ~std::uint64_t{0x38}) | 2 << 3}) == pointer_error::walk_length);
  CHECK(refused({.value = good | std::uint64_t{1} << 40}) == pointer_error::beyond_width);
  CHECK(refused({.value = good | 1 << 8}) == pointer_error::reserved_bits);
  CHECK(f.go(access::write).at == f.now(page));
  f.l2.leave();
  CHECK(f.go(access::write).result.what == nested_outcome::inactive);
  CHECK_FALSE(f.l2.hits(a, access::read));
  nested_machine::nested_cpu fresh{f.mmu};
  CHECK(touch2(fresh, va, access::read).result.what == nested_outcome::inactive);
}
