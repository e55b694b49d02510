// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/follow.hpp>

#include <doctest/doctest.h>

#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
template <class Mode>
struct fixture : machine_of<Mode> {
  typename machine_of<Mode>::cpu_type cpu{this->mmu};

  explicit fixture(std::uint64_t slot_pages = machine_of<Mode>::pages, const x86::mmu_options& o = {})
      : machine_of<Mode>(slot_pages, o) {}
  void check() {
    CHECK(this->broken() == "");
    CHECK(this->host.on_loan() == 0);
  }
};
}  // namespace

TEST_CASE("a guest write to a table of 4-byte entries takes exactly the shadows of the entries that it touches") {
  fixture<x86::two_level> f(4096);
  const std::uint64_t pages[] = {0x1fe000, 0x1ff000, 0x200000, 0x201000, 0x202000};  // around the middle of a table
  gpa first{};
  std::uint64_t frame = 1;
  for (const std::uint64_t a : pages) {
    const gpa at = f.map({a}, {frame++ * page_size}, rwu | used);
    if (a == pages[0]) first = at;
  }
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  const auto hits = [&](std::uint64_t gone) {
    for (std::uint64_t i = 0; i < 5; ++i) CHECK(f.cpu.hits({pages[i]}, access::write) == ((gone >> i & 1) == 0));
    for (const std::uint64_t a : pages) CHECK(touch(f.cpu, gva{a}, access::write).result.what == outcome::done);
    f.check();
  };
  for (const std::uint64_t a : pages) CHECK(touch(f.cpu, gva{a}, access::write).result.what == outcome::done);
  for (std::uint64_t i = 0; i < 5; ++i) {
    CHECK(f.write(first + 4 * i, f.read<std::uint32_t>(first + 4 * i)) == errc::ok);
    hits(std::uint64_t{1} << i);
  }
  CHECK(f.write(first + 2 * 4 - 4, f.read<std::uint32_t>(first + 4)) == errc::ok);
  hits(2);
  std::array<std::byte, 6> over_three{};  // the end of entry 1, entry 2, the beginning of 3: in both quadrants
  std::memcpy(over_three.data(), f.now(first + 7), over_three.size());
  CHECK(f.mmu.guest_write(first + 7, over_three) == errc::ok);
  hits(0b1110);
}

TEST_CASE("a write to a page directory of 4-byte entries takes both shadows of its entry, in its quadrant alone") {
  fixture<x86::two_level> f;
  const std::uint64_t pages[] = {0x40000000, 0x40200000, 0x40400000, 0x80000000, 0x00000000};
  std::uint64_t frame = 1;
  for (const std::uint64_t a : pages) f.map({a}, {frame++ * page_size}, rwu | used);
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  for (const std::uint64_t a : pages) CHECK(touch(f.cpu, gva{a}, access::write).result.what == outcome::done);
  const gpa entry = f.entry_at({pages[0]}, 2, f.root);
  CHECK(f.write(entry, f.read<std::uint32_t>(entry)) == errc::ok);
  for (std::uint64_t i = 0; i < 5; ++i) CHECK(f.cpu.hits({pages[i]}, access::write) == (i >= 2));
  f.check();
}

TEST_CASE("K1: PDPTEs are loaded from the page that is there, not from one that a bracket has replaced meanwhile") {
  fixture<x86::pae> f;
  const gva va{0x40000000};
  f.map(va, {0x5000}, rwu | used);
  const gpa directory = x86::pae::table(f.read64({f.root + 8}));
  f.map({0x80000000}, {0x6000}, rwu | used);
  const std::uint64_t others = f.read64({f.root + 16});
  f.host.during_pin = [&](hva a, bool) {
    if (a != f.host_of({f.root})) return;
    f.migrate({f.root});  // the frame that was pinned is full of nonsense now
    *reinterpret_cast<std::uint64_t*>(f.now({f.root + 8})) = others;
  };
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  CHECK(f.cpu.registers().pdptes[1] == others);
  CHECK(f.cpu.registers().pdptes[1] != (directory.value | pte::present));
  CHECK(f.mmu.statistics().retries == 1);
  f.check();
}

namespace {
/// The guest sees its own page table at `window`, and changes the entries of two pages: in a table of 4-byte entries
/// one in each half.
template <class Mode>
void check_free_writes() {
  using entry = typename Mode::entry_type;
  constexpr gva window{0x80000000};
  constexpr std::uint64_t pages[] = {0x00100000, sizeof(entry) == 4 ? 0x00300000U : 0x00101000U};
  fixture<Mode> f(machine_of<Mode>::pages, {.unsync = true});
  gpa entries[2]{};
  for (std::uint64_t i = 0; i < 2; ++i) entries[i] = f.map({pages[i]}, {(5 + i) * page_size}, rwu | used);
  f.map(window, entries[0].page(), rwu | used);
  REQUIRE(f.cpu.set_cr3(f.root) == errc::ok);
  const auto guest_sets = [&](unsigned i, std::uint64_t value) {
    const outcome o = f.cpu.access(window + entries[i].offset(), access::write, [&](std::byte* at) noexcept {
      std::atomic_ref<entry>(*reinterpret_cast<entry*>(at)).store(static_cast<entry>(value));
    });
    CHECK(o.what == outcome::done);
  };
  for (unsigned n = 0; n < 6; ++n) {
    const unsigned i = n % 2;
    for (const std::uint64_t a : pages) CHECK(touch(f.cpu, gva{a}, access::write).result.what == outcome::done);
    guest_sets(i, 0x8000 | rwu | used);
    CHECK(f.cpu.hits({pages[i]}, access::write));  // as a TLB would have it
    f.check();
    switch (n / 2) {
      case 0: f.cpu.invlpg({pages[i]}); break;
      case 1: f.cpu.flush_tlb(); break;
      default: CHECK(f.cpu.set_cr3(f.root) == errc::ok);
    }
    CHECK_FALSE(f.cpu.hits({pages[i]}, access::read));
    CHECK(f.cpu.hits({pages[1 - i]}, access::write));  // what has not changed stays
    CHECK(touch(f.cpu, gva{pages[i]}, access::write).at == f.now({0x8000}));
    f.check();
    guest_sets(i, (5 + i) * page_size | rwu | used);
    f.cpu.flush_tlb();
    CHECK(touch(f.cpu, gva{pages[i]}, access::write).at == f.now({(5 + i) * page_size}));
    guest_sets(i, (5 + i) * page_size | pte::present | pte::user | used);  // no W
    f.cpu.flush_tlb();
    CHECK_FALSE(f.cpu.hits({pages[i]}, access::write));
    guest_sets(i, (5 + i) * page_size | rwu | used);
    f.cpu.flush_tlb();
    f.check();
  }
}
}  // namespace

TEST_CASE("a guest writes its tables of 4-byte entries freely, in both halves, and its flush makes the changes count") {
  check_free_writes<x86::two_level>();
}
TEST_CASE("a PAE guest writes its page tables freely, and its flush makes the changes count") {
  check_free_writes<x86::pae>();
}

TEST_CASE("what two modes share of a table that one of them wrote freely is compared by the one that flushes") {
  machine_of<x86::pae, x86::every_mode> m(machine::pages, {.unsync = true});
  constexpr gva va{0x100000}, window{0x80000000};
  const gpa entry = m.map(va, {0x5000}, rwu | used);
  m.map(window, entry.page(), rwu | used);
  x86::control_registers pae{.cr0 = x86::cr0::pe | x86::cr0::pg, .cr3 = m.root, .cr4 = x86::cr4::pae};
  x86::control_registers two{.cr0 = x86::cr0::pe | x86::cr0::pg, .cr3 = m.new_table()};
  REQUIRE(m.write(gpa{two.cr3}, static_cast<std::uint32_t>(entry.page().value | rwu | used)) == errc::ok);
  const gva same{entry.offset() / 4 * page_size};  // the lower half of the entry, read as one of 4 bytes
  x86::vcpu a{m.mmu}, b{m.mmu};
  REQUIRE(a.set_controls(pae) == errc::ok);
  REQUIRE(b.set_controls(two) == errc::ok);
  REQUIRE(touch(a, va, access::write).at == m.now({0x5000}));
  REQUIRE(touch(b, same, access::write).at == m.now({0x5000}));
  REQUIRE(a.access(window + entry.offset(), access::write, [](std::byte* at) noexcept {
             std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at)).store(0x6000 | rwu | used);
           }).what == outcome::done);
  CHECK(m.broken() == "");
  b.flush_tlb();
  CHECK(touch(b, same, access::write).at == m.now({0x6000}));
  CHECK(touch(a, va, access::write).at == m.now({0x6000}));
  CHECK(m.broken() == "");
}
