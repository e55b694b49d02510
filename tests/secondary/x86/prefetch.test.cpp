// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/prefetch.hpp>

#include <doctest/doctest.h>

#include <mmunotify/secondary/x86/direct_mmu.hpp>
#include <mmunotify/secondary/x86/direct_vcpu.hpp>

#include "random_guest.hpp"

using namespace shadow_test;
using x86::dirty_tracking;

namespace {
constexpr gva va{0x400000};
constexpr x86::mmu_options ahead{.prefetch = true};

/// Eight pages at va lead to frames 8 to 15; their entries have these bits.
template <class Mode = x86::long_mode_4>
struct fixture : machine_of<Mode, Mode, prefetching_host> {
  using base = machine_of<Mode, Mode, prefetching_host>;
  using base::host, base::mmu, base::map, base::root, base::host_of;
  typename base::cpu_type cpu{mmu};

  explicit fixture(std::uint64_t bits = rwu | used, const x86::mmu_options& o = ahead) : base(base::pages, o) {
    if constexpr (Mode::levels > 0) {
      for (std::uint64_t i = 0; i < 8; ++i) map(page(i), frame(i), bits);
    }
    CHECK(cpu.set_cr3(root) == errc::ok);
  }
  static gva page(std::uint64_t i) { return va + i * page_size; }
  static gpa frame(std::uint64_t i) { return {(8 + i) * page_size}; }
  static range bytes_of(std::uint64_t i) { return x86::page_range(host_of(frame(i))); }
  gpa entry(std::uint64_t i) { return this->entry_at(page(i), 1, root); }
  std::uint64_t prefetched() { return mmu.statistics().prefetched; }
  std::set<std::uint64_t> there(x86::access how = access::read) {
    std::set<std::uint64_t> found;
    for (std::uint64_t i = 0; i < 8; ++i) {
      if (cpu.hits(page(i), how)) found.insert(i);
    }
    return found;
  }
  void check() {
    CHECK(this->broken() == "");
    CHECK(host.on_loan() == 0);
  }
};
using some = std::set<std::uint64_t>;
const some all{0, 1, 2, 3, 4, 5, 6, 7};
}  // namespace

TEST_CASE("a fault fills the eight places of its group, and nobody has used what it did not ask for") {
  fixture<> f;
  f.map(f.page(8), {0x5000}, rwu | used);
  REQUIRE(f.cpu.prefault(f.page(3), access::read).what == outcome::done);
  CHECK(f.prefetched() == 7);
  CHECK(f.mmu.statistics().faults == 1);
  for (std::uint64_t i = 0; i < 8; ++i) CHECK(f.mmu.test_young(f.bytes_of(i)) == (i == 3));
  CHECK(f.there(access::write) == all);
  CHECK_FALSE(f.cpu.hits(f.page(8), access::read));
  for (std::uint64_t i = 0; i < 8; ++i) {
    CHECK(touch(f.cpu, f.page(i), access::write).at == f.host.bytes(f.host_of(f.frame(i))));
  }
  CHECK(f.mmu.statistics().faults == 1);
  f.check();
}

TEST_CASE("what is not known, not there, or not the guest's own is left to its own fault") {
  fixture<> f;
  CHECK(f.write64(f.entry(0), f.frame(0).value | rwu) == errc::ok);                        // not accessed
  CHECK(f.write64(f.entry(1), f.frame(1).value | used) == errc::ok);                       // not present
  CHECK(f.write64(f.entry(2), (machine::pages << 12) | rwu | used) == errc::ok);           // in no slot
  CHECK(f.write64(f.entry(4), f.frame(4).value | rwu | used | x86::bit(45)) == errc::ok);  // a reserved bit
  f.host.busy.insert(f.host_of(f.frame(5)).value);
  f.host.remove(f.host_of(f.frame(6)));
  REQUIRE(f.cpu.prefault(f.page(3), access::read).what == outcome::done);
  CHECK(f.there() == some{3, 7});
  CHECK(f.prefetched() == 1);
  CHECK((f.read64(f.entry(0)) & pte::accessed) == 0);
  f.check();
}

TEST_CASE("what is there already stays as it is, and is not asked for again") {
  fixture<> f;
  f.host.busy.insert(f.host_of(f.frame(2)).value);
  REQUIRE(f.cpu.prefault(f.page(3), access::read).what == outcome::done);
  CHECK(f.there() == some{0, 1, 3, 4, 5, 6, 7});
  f.host.busy.clear();
  some asked;
  f.host.during_try = [&](hva a) { asked.insert((a.value - f.host_of(f.frame(0)).value) >> 12); };
  REQUIRE(f.cpu.prefault(f.page(3), access::write).what == outcome::done);
  CHECK(asked == some{2});
  CHECK(f.prefetched() == 7);
  CHECK(f.there() == all);
  f.check();
}

TEST_CASE("K1: no neighbour is installed over a bracket that is open or has run since it was looked up") {
  for (const bool open : {true, false}) {
    fixture<> f;
    bool changed = false;
    f.host.during_try = [&](hva a) {
      if (a != f.host_of(f.frame(7)) || std::exchange(changed, true)) return;
      for (const std::uint64_t i : {2U, 5U}) {
        f.start(f.bytes_of(i));
        f.host.migrate(f.host_of(f.frame(i)));
        if (!open) f.end(f.bytes_of(i));
      }
    };
    REQUIRE(f.cpu.prefault(f.page(3), access::read).what == outcome::done);
    CHECK(changed);
    CHECK(f.there() == some{0, 1, 3, 4, 6, 7});
    f.check();
    for (const std::uint64_t i : {2U, 5U}) {
      if (open) f.end(f.bytes_of(i));
      CHECK(touch(f.cpu, f.page(i), access::read).at == f.host.bytes(f.host_of(f.frame(i))));
    }
    f.check();
  }
}

TEST_CASE("a guest that changes a neighbour's entry in the middle of the fault is believed") {
  fixture<> f;
  f.host.during_try = [&](hva a) {
    if (a == f.host_of(f.frame(7))) CHECK(f.write64(f.entry(2), 0x5000 | rwu | used) == errc::ok);
  };
  REQUIRE(f.cpu.prefault(f.page(3), access::read).what == outcome::done);
  CHECK(f.there() == some{0, 1, 3, 4, 5, 6, 7});
  CHECK(touch(f.cpu, f.page(2), access::read).at == f.host.bytes(f.host_of({0x5000})));
  f.check();
}

TEST_CASE("a slot that goes in the middle of a prefetch is mapped through by nobody") {
  fixture<> f;
  REQUIRE(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 8, .host = ram_base + 8 * page_size}) == errc::ok);
  for (std::uint64_t i = 4; i < 8; ++i) CHECK(f.write64(f.entry(i), (1000 + i) * page_size | rwu | used) == errc::ok);
  f.host.during_try = [&](hva a) {
    if (a == f.host_of(f.frame(7))) CHECK(f.mmu.remove_slot(2) == errc::ok);
  };
  REQUIRE(f.cpu.prefault(f.page(3), access::read).what == outcome::done);
  CHECK(f.there() == some{0, 1, 2, 3});
  f.check();
}

TEST_CASE("a neighbour may be written only where guest, host, slot and shadowed tables let it") {
  fixture<> f;
  CHECK(f.write64(f.entry(0), f.frame(0).value | rwu | pte::accessed) == errc::ok);  // not dirty
  CHECK(f.write64(f.entry(1), f.frame(1).value | pte::present | used) == errc::ok);
  f.host.read_only[f.host_of(f.frame(2)).value] = true;
  CHECK(f.write64(f.entry(4), f.entry(4).page().value | rwu | used) == errc::ok);  // the table itself
  REQUIRE(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 1, .host = ram_base, .read_only = true}) == errc::ok);
  CHECK(f.write64(f.entry(5), 1000 * page_size | rwu | used) == errc::ok);
  REQUIRE(f.cpu.prefault(f.page(3), access::write).what == outcome::done);
  CHECK(f.there() == all);
  CHECK(f.there(access::write) == some{3, 6, 7});
  CHECK(touch(f.cpu, f.page(0), access::write).result.what == outcome::done);
  CHECK((f.read64(f.entry(0)) & pte::dirty) != 0);
  CHECK(touch(f.cpu, f.page(4), access::write).result.what == outcome::write_tracked);
  f.check();
}

TEST_CASE("a prefetch is no write: logs know of it when the guest has written") {
  for (const dirty_tracking how : {dirty_tracking::write_protect, dirty_tracking::dirty_bits}) {
    fixture<> f;
    REQUIRE(f.mmu.log_writes(1, how) == errc::ok);
    REQUIRE(f.cpu.prefault(f.page(3), access::read).what == outcome::done);
    CHECK(f.there() == all);
    std::array<std::uint64_t, 1> words{};
    REQUIRE(f.mmu.harvest_writes(1, words) == errc::ok);
    CHECK((words[0] >> 8 & 0xff) == 0);
    const auto faults = f.mmu.statistics().faults;
    CHECK(touch(f.cpu, f.page(5), access::write).result.what == outcome::done);
    CHECK(f.mmu.statistics().faults == faults);
    REQUIRE(f.mmu.harvest_writes(1, words) == errc::ok);
    CHECK((words[0] >> 8 & 0xff) == 1 << 5);
    f.check();
  }
}

TEST_CASE("the parts of a large guest page are neighbours, and so are pages without paging") {
  fixture<> f;
  f.map({0x40000000}, {0}, rwu | used, 2);
  REQUIRE(f.cpu.prefault({0x40000000 + 13 * page_size}, access::write).what == outcome::done);
  CHECK(f.prefetched() == 7);
  for (std::uint64_t i = 8; i < 16; ++i) {
    CHECK(touch(f.cpu, gva{0x40000000} + i * page_size, access::write).at == f.host.bytes(ram_base + i * page_size));
  }
  CHECK_FALSE(f.cpu.hits({0x40000000 + 7 * page_size}, access::read));
  f.check();
  fixture<x86::no_paging> flat;
  REQUIRE(flat.cpu.prefault({60 * page_size}, access::read).what == outcome::done);
  CHECK(flat.prefetched() == 7);
  CHECK(touch(flat.cpu, gva{63 * page_size}, access::write).at == flat.host.bytes(ram_base + 63 * page_size));
  flat.check();
}

TEST_CASE("tables of 4-byte entries and of PAE have neighbours as well, in every part") {
  const auto run = [](auto identity) {
    fixture<typename decltype(identity)::type> f;
    for (const std::uint64_t start : {std::uint64_t{0x400000}, std::uint64_t{0x600000}}) {
      for (std::uint64_t i = 0; i < 8; ++i) f.map(gva{start} + i * page_size, {(16 + i) * page_size}, rwu | used);
      REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
      const auto before = f.prefetched();
      REQUIRE(f.cpu.prefault(gva{start}, access::read).what == outcome::done);
      CHECK(f.prefetched() - before == 7);
      const auto faults = f.mmu.statistics().faults;
      for (std::uint64_t i = 0; i < 8; ++i) {
        CHECK(touch(f.cpu, gva{start} + i * page_size, access::write).at ==
              f.host.bytes(ram_base + (16 + i) * page_size));
      }
      CHECK(f.mmu.statistics().faults == faults);
      f.check();
    }
  };
  run(std::type_identity<x86::two_level>{});
  run(std::type_identity<x86::pae>{});
}

TEST_CASE("nobody is asked for a page ahead unless the owner wants it") {
  fixture<> f(rwu | used, x86::mmu_options{});
  f.host.during_try = [](hva) { FAIL("nobody may be asked"); };
  REQUIRE(f.cpu.prefault(f.page(3), access::read).what == outcome::done);
  CHECK(f.there() == some{3});
  f.check();
}

TEST_CASE("random guests on a host that can be asked see what a walk made anew says") {
  std::uint64_t prefetched = 0;
  const auto run = [&](auto identity) {
    using guest = random_guest<typename decltype(identity)::type, prefetching_host>;
    for (std::uint64_t round = 0; round < 8; ++round) {
      guest g(seed() + round, {.unsync = round % 2 == 1, .prefetch = true});
      for (int i = 0; i < 2000; ++i) {
        if (g.chance(30)) {
          g.m.host.during_try = [&](hva) {
            if (!g.chance(20)) return;
            g.host_changes(g.some_frame());
          };
        }
        g.step();
        g.m.host.during_try = nullptr;
        if (i % 20 == 0) REQUIRE(g.m.broken() == "");
      }
      CHECK(g.m.host.on_loan() == 0);
      prefetched += g.m.mmu.statistics().prefetched;
    }
  };
  run(std::type_identity<x86::no_paging>{});
  run(std::type_identity<x86::two_level>{});
  run(std::type_identity<x86::pae>{});
  run(std::type_identity<x86::long_mode_4>{});
  CHECK(prefetched > 1000);
}

// --- A direct MMU. ---------------------------------------------------------------------------------------------------

namespace {
template <class Format>
struct direct_fixture {
  using direct_type = x86::direct_mmu<prefetching_host, Format>;
  prefetching_host host;
  direct_type mmu;
  x86::direct_vcpu<direct_type> cpu{mmu};

  explicit direct_fixture(const x86::mmu_options& o = ahead) : mmu(host, o) {
    for (std::uint64_t i = 0; i < 64; ++i) host.place(ram_base + i * page_size);
    CHECK(mmu.add_slot({.id = 1, .base = {0}, .pages = 14, .host = ram_base}) == errc::ok);
  }
  static range bytes_of(std::uint64_t f) { return x86::page_range(ram_base + f * page_size); }
  some there(x86::access how = access::read) {
    some found;
    for (std::uint64_t i = 0; i < 16; ++i) {
      if (cpu.hits({i * page_size}, how)) found.insert(i);
    }
    return found;
  }
  void check() {
    const char* broken = mmu.verify();
    CHECK(std::string(broken != nullptr ? broken : "") == "");
    CHECK(host.on_loan() == 0);
  }
};
}  // namespace

#define FORMATS x86::ept_format, x86::npt_format

TEST_CASE_TEMPLATE("a direct MMU fills the eight places around a fault, as far as slot and host go", F, FORMATS) {
  direct_fixture<F> m;
  m.host.read_only[(ram_base + 10 * page_size).value] = true;
  m.host.busy.insert((ram_base + 11 * page_size).value);
  REQUIRE(m.cpu.prefault({9 * page_size}, access::read).what == outcome::done);
  CHECK(m.mmu.statistics().prefetched == 4);
  CHECK_FALSE(m.mmu.test_young(m.bytes_of(8)));
  CHECK(m.mmu.test_young(m.bytes_of(9)));
  CHECK(m.there() == some{8, 9, 10, 12, 13});
  CHECK(m.there(access::write) == some{8, 9, 12, 13});
  for (const std::uint64_t f : m.there()) {
    CHECK(touch(m.cpu, gpa{f * page_size}, access::read).at == m.host.bytes(ram_base + f * page_size));
  }
  CHECK(m.mmu.statistics().faults == 1);
  m.check();
  direct_fixture<F> without{x86::mmu_options{}};
  REQUIRE(without.cpu.prefault({9 * page_size}, access::read).what == outcome::done);
  CHECK(without.there() == some{9});
}

TEST_CASE_TEMPLATE("K1: no neighbour is installed over a bracket, open or finished since, by a direct MMU", F,
                   FORMATS) {
  direct_fixture<F> m;
  m.host.during_try = [&](hva a) {
    if (a != ram_base + 7 * page_size) return;
    m.mmu.invalidate_range_start({m.bytes_of(2)});
    m.host.migrate(ram_base + 2 * page_size);
    m.mmu.invalidate_range_end({m.bytes_of(2)});
    m.mmu.invalidate_range_start({m.bytes_of(5)});
  };
  REQUIRE(m.cpu.prefault({3 * page_size}, access::read).what == outcome::done);
  CHECK(m.there() == some{0, 1, 3, 4, 6, 7});
  m.check();
  m.mmu.invalidate_range_end({m.bytes_of(5)});
  CHECK(touch(m.cpu, gpa{2 * page_size}, access::read).at == m.host.bytes(ram_base + 2 * page_size));
  m.check();
}

TEST_CASE_TEMPLATE("a log keeps the pages of a large host page small, and they are neighbours", F, FORMATS) {
  const auto look = [](auto& m, auto address) {
    m.host.place_run(ram_base + 512 * page_size, 21, 512);
    REQUIRE(m.mmu.add_slot({.id = 2, .base = {512}, .pages = 512, .host = ram_base + 512 * page_size}) == errc::ok);
    REQUIRE(m.mmu.log_writes(2, dirty_tracking::write_protect) == errc::ok);
    REQUIRE(m.cpu.prefault(address(515), access::read).what == outcome::done);
    CHECK(m.mmu.statistics().large == 0);
    CHECK(m.mmu.statistics().prefetched == 7);
    for (std::uint64_t i = 511; i < 521; ++i) CHECK(m.cpu.hits(address(i), access::read) == (512 <= i && i < 520));
    m.check();
    REQUIRE(m.mmu.log_writes(2, dirty_tracking::off) == errc::ok);
    REQUIRE(m.cpu.prefault(address(515), access::read).what == outcome::done);
    CHECK(m.mmu.statistics().large == 1);
    CHECK(m.mmu.statistics().prefetched == 7);
    m.check();
  };
  direct_fixture<F> direct;
  look(direct, [](std::uint64_t f) { return gpa{f * page_size}; });
  fixture<x86::no_paging> shadow;
  look(shadow, [](std::uint64_t f) { return gva{f * page_size}; });
}

TEST_CASE_TEMPLATE("a direct MMU's prefetch is no write", F, FORMATS) {
  for (const dirty_tracking how : {dirty_tracking::write_protect, dirty_tracking::dirty_bits}) {
    direct_fixture<F> m;
    REQUIRE(m.mmu.log_writes(1, how) == errc::ok);
    REQUIRE(m.cpu.prefault({3 * page_size}, access::read).what == outcome::done);
    CHECK(m.there() == all);
    std::array<std::uint64_t, 1> words{};
    REQUIRE(m.mmu.harvest_writes(1, words) == errc::ok);
    CHECK(words[0] == 0);
    CHECK(touch(m.cpu, gpa{5 * page_size}, access::write).result.what == outcome::done);
    CHECK(m.mmu.statistics().faults == 1);
    REQUIRE(m.mmu.harvest_writes(1, words) == errc::ok);
    CHECK(words[0] == 1 << 5);
    m.check();
  }
}
