// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/shadow_mmu.hpp>

#include <doctest/doctest.h>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/primary/reference_mmu.hpp>

#include "random_guest.hpp"
#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
constexpr gva va{0x400000};
constexpr gpa page{0x5000};

struct fixture : machine {
  cpu_type cpu{mmu};
  gpa leaf = map(va, page, rwu);

  fixture() { CHECK(cpu.set_cr3(root) == errc::ok); }
  std::byte* now(gpa a) { return host.bytes(host_of(a)); }
  static range bytes_of(gpa a) { return x86::page_range(host_of(a)); }
};

std::vector<contract_violation> reported;
void report(const contract_violation& v) noexcept { reported.push_back(v); }
}  // namespace

TEST_CASE("K2: a bracket closes what it opened although slots came and went in between") {
  fixture f;
  const range r = f.bytes_of(page);
  SUBCASE("a slot that appears inside the bracket is covered by it") {
    f.start(r);
    CHECK(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 1, .host = f.host_of(page)}) == errc::ok);
    CHECK(f.write64(f.leaf, (1000 * page_size) | rwu) == errc::ok);
    CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
    f.host.migrate(f.host_of(page));
    f.end(r);
    CHECK(touch(f.cpu, va, access::read).at == f.now(page));
    f.start(r);  // through both slots
    CHECK_FALSE(f.cpu.hits(va, access::read));
    f.end(r);
  }
  SUBCASE("a slot that goes inside the bracket leaves nothing open") {
    CHECK(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 1, .host = f.host_of(page)}) == errc::ok);
    f.start(r);
    CHECK(f.mmu.remove_slot(2) == errc::ok);
    f.end(r);
    CHECK(f.cpu.prefault(va, access::read).what == outcome::done);
  }
  SUBCASE("a slot that moves inside the bracket leaves nothing open") {
    f.start(r);
    CHECK(f.mmu.move_slot(1, {2000}) == errc::ok);
    CHECK(f.mmu.move_slot(1, {0}) == errc::ok);
    f.end(r);
    CHECK(f.cpu.prefault(va, access::read).what == outcome::done);
  }
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("K3: when start returns no vCPU has the page in its tables or its TLB") {
  fixture f;
  cpu_type other{f.mmu};
  REQUIRE(other.set_cr3(f.root) == errc::ok);
  f.map({0x800000}, page, rwu);
  for (const x86::access how : {access::read, access::write}) {
    REQUIRE(touch(f.cpu, va, how).result.what == outcome::done);
    REQUIRE(touch(other, {0x800000}, how).result.what == outcome::done);
    REQUIRE(touch(other, va, how).result.what == outcome::done);
    f.start(f.bytes_of(page));
    CHECK_FALSE(f.cpu.hits(va, access::read));
    CHECK_FALSE(other.hits(va, access::read));
    CHECK_FALSE(other.hits({0x800000}, access::read));
    CHECK(f.mmu.verify() == nullptr);
    f.host.migrate(f.host_of(page));
    f.end(f.bytes_of(page));
    CHECK(touch(other, {0x800000}, how).at == f.now(page));
    CHECK(touch(f.cpu, va, how).at == f.now(page));
  }
  const auto flushes = f.mmu.statistics().flushes;
  f.migrate({0x7000});
  CHECK(f.mmu.statistics().flushes == flushes);  // nothing of it was mapped
}

TEST_CASE("K3: start waits for a vCPU that is using the page") {
  fixture f;
  REQUIRE(touch(f.cpu, va, access::write).result.what == outcome::done);
  std::atomic<bool> inside{false}, starting{false}, started{false};
  bool too_early = false;
  std::thread guest([&] {
    static_cast<void>(f.cpu.access(va, access::write, [&](std::byte*) noexcept {
      inside.store(true);
      while (!starting.load()) std::this_thread::yield();
      for (int i = 0; i < 2000; ++i) {
        std::this_thread::yield();
        too_early = too_early || started.load();
      }
    }));
  });
  while (!inside.load()) std::this_thread::yield();
  starting.store(true);
  f.start(f.bytes_of(page));
  started.store(true);
  guest.join();
  CHECK_FALSE(too_early);
  f.end(f.bytes_of(page));
}

TEST_CASE("K3: a mapping that the guest itself has zapped is flushed before a bracket could miss it") {
  fixture f;
  REQUIRE(touch(f.cpu, va, access::write).result.what == outcome::done);
  CHECK(f.write64(f.leaf, 0) == errc::ok);
  f.start(f.bytes_of(page));  // finds no leaf
  CHECK_FALSE(f.cpu.hits(va, access::read));
  f.end(f.bytes_of(page));
}

TEST_CASE("K4: frames are taken and given back by number, whatever the number") {
  fixture f;
  for (const std::uint64_t number : {std::uint64_t{0}, std::uint64_t{0xfeedface}, x86::shadow_entry::frame_limit - 1}) {
    f.start(f.bytes_of(page));
    f.host.next_number = number;
    f.host.place(f.host_of(page));
    f.end(f.bytes_of(page));
    CHECK(touch(f.cpu, va, access::write).at == f.now(page));
    CHECK(f.host.on_loan() == 0);
    CHECK(f.mmu.verify() == nullptr);
  }
  f.start(f.bytes_of(page));
  f.host.next_number = x86::shadow_entry::frame_limit;
  f.host.place(f.host_of(page));
  f.end(f.bytes_of(page));
  CHECK(touch(f.cpu, va, access::write).result.what == outcome::not_mapped);
  CHECK(f.host.on_loan() == 0);
}

TEST_CASE("a frame that is lent for reading is mapped read-only, and asked for anew at a write") {
  fixture f;
  f.host.read_only[f.host_of(page).value] = true;
  f.map(va, page, rwu | used);
  CHECK(touch(f.cpu, va, access::read).at == f.now(page));
  CHECK(touch(f.cpu, va, access::write).result == outcome{.what = outcome::not_mapped, .address = page});
  f.start(f.bytes_of(page));
  f.host.read_only.clear();
  f.host.migrate(f.host_of(page));
  f.end(f.bytes_of(page));
  CHECK(touch(f.cpu, va, access::read).at == f.now(page));
  CHECK(touch(f.cpu, va, access::write).at == f.now(page));
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("a write to a read-only slot is the caller's, a read is not") {
  fixture f;
  CHECK(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 1, .host = f.host_of(page), .read_only = true}) == errc::ok);
  f.map(va, {1000 * page_size}, rwu | used);
  CHECK(touch(f.cpu, va, access::read).at == f.now(page));
  CHECK(touch(f.cpu, va, access::write).result.what == outcome::not_mapped);
  CHECK(f.mmu.guest_write({1000 * page_size}, std::array<std::byte, 1>{}) == errc::access_denied);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("O1: a bracket that withdraws write access leaves mappings that are read, and none that is written") {
  for (const event e : {event::protection_page, event::soft_dirty}) {
    fixture f;
    cpu_type other{f.mmu};
    REQUIRE(other.set_cr3(f.root) == errc::ok);
    REQUIRE(touch(f.cpu, va, access::write).result.what == outcome::done);
    REQUIRE(touch(other, va, access::write).result.what == outcome::done);
    const auto zapped = f.mmu.statistics().zapped;
    f.start(f.bytes_of(page), e);
    CHECK(f.mmu.verify() == nullptr);
    CHECK(f.cpu.hits(va, access::read));
    CHECK(other.hits(va, access::read));
    CHECK_FALSE(f.cpu.hits(va, access::write));
    CHECK_FALSE(other.hits(va, access::write));
    CHECK(f.cpu.prefault(va, access::write).what == outcome::again);
    f.host.read_only[f.host_of(page).value] = true;
    f.end(f.bytes_of(page), e);
    CHECK(f.mmu.statistics().zapped == zapped);
    CHECK(f.mmu.statistics().downgraded == 1);
    CHECK(touch(f.cpu, va, access::write).result.what == outcome::not_mapped);
    CHECK(touch(other, va, access::read).at == f.now(page));
    CHECK(f.mmu.verify() == nullptr);
  }
}

TEST_CASE("O1: a withdrawn right to write comes back by a fault alone, also where writes are logged") {
  fixture f;
  REQUIRE(f.mmu.log_writes(1, x86::dirty_tracking::write_protect) == errc::ok);
  REQUIRE(touch(f.cpu, va, access::write).result.what == outcome::done);
  std::array<std::uint64_t, 1> words{};
  REQUIRE(f.mmu.harvest_writes(1, words) == errc::ok);  // now only the log withholds the right
  f.start(f.bytes_of(page), event::soft_dirty);
  CHECK_FALSE(f.cpu.hits(va, access::write));
  CHECK(f.mmu.verify() == nullptr);
  f.end(f.bytes_of(page), event::soft_dirty);
  const auto faults = f.mmu.statistics().faults;
  CHECK(touch(f.cpu, va, access::write).at == f.now(page));
  CHECK(f.mmu.statistics().faults == faults + 1);
}

TEST_CASE("O1: every other event takes mappings down, and the owner says which do not") {
  for (unsigned i = 0; i < event_count; ++i) {
    const auto e = static_cast<event>(i);
    fixture f;
    REQUIRE(touch(f.cpu, va, access::write).result.what == outcome::done);
    f.start(f.bytes_of(page), e);
    CHECK(f.cpu.hits(va, access::read) == (e == event::protection_page || e == event::soft_dirty));
    f.end(f.bytes_of(page), e);
    mmu_type strict{f.host, {.downgrades = {}}};
    mmu_type mild{f.host, {.downgrades = {event::protection_vma}}};
    for (mmu_type* mmu : {&strict, &mild}) {
      REQUIRE(mmu->add_slot({.id = 1, .base = {0}, .pages = machine::pages, .host = ram_base}) == errc::ok);
      cpu_type cpu{*mmu};
      REQUIRE(cpu.set_cr3(f.root) == errc::ok);
      REQUIRE(touch(cpu, va, access::write).result.what == outcome::done);
      mmu->invalidate_range_start({.range = f.bytes_of(page), .event = e});
      CHECK(cpu.hits(va, access::read) == (mmu == &mild && e == event::protection_vma));
      CHECK_FALSE(cpu.hits(va, access::write));
      CHECK(mmu->verify() == nullptr);
      mmu->invalidate_range_end({.range = f.bytes_of(page), .event = e});
    }
  }
}

TEST_CASE(
    "O1: a frame that is replaced in place is read through the old one, then through the new one, and not faulted on") {
  fixture f;
  f.map({0x800000}, page, rwu | used);
  cpu_type other{f.mmu};
  REQUIRE(other.set_cr3(f.root) == errc::ok);
  for (const gva a : {va, gva{0x800000}}) REQUIRE(touch(f.cpu, a, access::write).result.what == outcome::done);
  REQUIRE(touch(other, va, access::read).result.what == outcome::done);
  const auto before = f.mmu.statistics();
  const invalidation bracket{.range = f.bytes_of(page), .event = event::clear, .in_place = true};
  std::byte* const old = f.now(page);
  f.mmu.invalidate_range_start(bracket);
  CHECK_FALSE(f.cpu.hits(va, access::write));
  CHECK(touch(other, va, access::read).at == old);
  CHECK(f.mmu.verify() == nullptr);
  const pfn fresh = f.host.migrate(f.host_of(page));
  f.mmu.change_entry({.range = f.bytes_of(page), .frame = fresh, .writable = true});
  CHECK(touch(other, va, access::read).at == f.now(page));
  CHECK(touch(f.cpu, {0x800000}, access::read).at == f.now(page));
  CHECK_FALSE(f.cpu.hits(va, access::write));
  CHECK(f.mmu.verify() == nullptr);
  f.mmu.invalidate_range_end(bracket);
  CHECK(f.mmu.statistics().faults == before.faults);
  CHECK(f.mmu.statistics().zapped == before.zapped);
  CHECK(f.mmu.statistics().replaced == 2);
  CHECK(touch(f.cpu, va, access::write).at == f.now(page));
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("O1: a replaced part of a large leaf takes it down, a frame that does not fit is not mapped") {
  machine m(2048);
  const hva run = ram_base + 1024 * page_size;
  m.host.place_run(run, 21, 512);
  m.map({0x40000000}, {1024 * page_size}, rwu | used, 2);
  m.map(va, page, rwu | used);
  cpu_type cpu{m.mmu};
  REQUIRE(cpu.set_cr3(m.root) == errc::ok);
  REQUIRE(touch(cpu, {0x40000000}, access::write).result.what == outcome::done);
  REQUIRE(touch(cpu, va, access::write).result.what == outcome::done);
  const invalidation bracket{.range = x86::page_range(run + 7 * page_size), .event = event::clear, .in_place = true};
  m.mmu.invalidate_range_start(bracket);
  CHECK(cpu.hits({0x40000000}, access::read));
  m.host.split_run(run);
  m.mmu.change_entry({.range = bracket.range, .frame = m.host.migrate(run + 7 * page_size)});
  CHECK_FALSE(cpu.hits({0x40000000}, access::read));
  m.mmu.invalidate_range_end(bracket);
  CHECK(touch(cpu, {0x40007000}, access::read).at == m.host.bytes(run + 7 * page_size));
  const range r = x86::page_range(ram_base + page.value);
  m.mmu.invalidate_range_start({.range = r, .in_place = true});
  m.mmu.change_entry({.range = r, .frame = {x86::shadow_entry::frame_limit}});
  CHECK_FALSE(cpu.hits(va, access::read));
  m.mmu.invalidate_range_end({.range = r, .in_place = true});
  CHECK(m.mmu.verify() == nullptr);
}

TEST_CASE("an access to a frame in no slot is known for MMIO, until the slots or the guest's tables change") {
  fixture f;
  constexpr std::uint64_t mmio = 1000 * page_size;
  const gpa leaf = f.map(va, {mmio}, rwu | used);
  const outcome expected{.what = outcome::not_mapped, .address = {mmio + 0x123}};
  CHECK(touch(f.cpu, va + 0x123, access::write).result == expected);
  const auto faults = f.mmu.statistics().faults;
  CHECK(touch(f.cpu, va + 0x123, access::write).result == expected);
  CHECK(touch(f.cpu, va + 0x123, access::read).result == expected);
  CHECK(f.mmu.statistics().faults == faults);
  CHECK(f.mmu.statistics().mmio_hits == 2);
  CHECK(f.mmu.verify() == nullptr);
  SUBCASE("a slot that covers it is found") {
    CHECK(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 1, .host = f.host_of(page)}) == errc::ok);
    CHECK(touch(f.cpu, va + 0x123, access::write).at == f.now(page + 0x123));
    CHECK(f.mmu.verify() == nullptr);
    CHECK(f.mmu.remove_slot(2) == errc::ok);
    CHECK(touch(f.cpu, va + 0x123, access::write).result == expected);
  }
  SUBCASE("a slot elsewhere makes it look again, once") {
    CHECK(f.mmu.add_slot({.id = 2, .base = {5000}, .pages = 1, .host = f.host_of(page)}) == errc::ok);
    CHECK(touch(f.cpu, va + 0x123, access::write).result == expected);
    CHECK(touch(f.cpu, va + 0x123, access::write).result == expected);
    CHECK(f.mmu.statistics().faults == faults + 1);
  }
  SUBCASE("the guest maps memory there") {
    CHECK(f.write64(leaf, page.value | rwu) == errc::ok);
    CHECK(touch(f.cpu, va + 0x123, access::write).at == f.now(page + 0x123));
  }
  SUBCASE("rights are the guest's") {
    CHECK(f.write64(leaf, mmio | pte::present | used) == errc::ok);
    CHECK(touch(f.cpu, va, access::read).result.what == outcome::not_mapped);
    CHECK(touch(f.cpu, va, access::write).result.what == outcome::page_fault);
    f.cpu.set_cpl(3);
    CHECK(touch(f.cpu, va, access::read).result.what == outcome::page_fault);
  }
  SUBCASE("through a large guest leaf") {
    f.map({0x40000000}, {4096 * page_size}, rwu | used, 2);
    for (int i = 0; i < 2; ++i) {
      CHECK(touch(f.cpu, {0x40003456}, access::read).result ==
            outcome{.what = outcome::not_mapped, .address = {4096 * page_size + 0x3456}});
    }
    CHECK(f.mmu.statistics().mmio_hits == 3);
  }
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("what is known for MMIO is forgotten before its generation comes round again") {
  fixture f;
  constexpr std::uint64_t mmio = 1000 * page_size;
  f.map(va, {mmio}, rwu | used);
  CHECK(touch(f.cpu, va, access::read).result.what == outcome::not_mapped);
  CHECK(f.mmu.add_slot({.id = 2, .base = {5000}, .pages = 1, .host = f.host_of(page)}) == errc::ok);
  // The last update of the round puts a slot over the frame: it has the generation of the entry, modulo the round.
  for (std::uint64_t i = 0; i < x86::shadow_entry::mmio_generations - 2; ++i) {
    REQUIRE(f.mmu.move_slot(2, {5000 + i % 2}) == errc::ok);
  }
  REQUIRE(f.mmu.move_slot(2, {1000}) == errc::ok);
  CHECK(touch(f.cpu, va, access::read).at == f.now(page));
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("zapping everything goes by generation: nothing old is used from its first step on") {
  fixture f;
  for (std::uint64_t i = 0; i < 20; ++i) f.map(gva{(i + 16) << 21}, {(i % 8) * page_size});
  cpu_type other{f.mmu};
  REQUIRE(other.set_cr3(f.root) == errc::ok);
  for (std::uint64_t i = 0; i < 20; ++i)
    REQUIRE(touch(f.cpu, gva{(i + 16) << 21}, access::read).result.what == outcome::done);
  REQUIRE(touch(other, va, access::write).result.what == outcome::done);
  CHECK(f.mmu.page_count() > 20);
  f.mmu.zap_all();
  CHECK(f.mmu.page_count() == 0);
  CHECK_FALSE(f.cpu.hits(va, access::read));
  CHECK_FALSE(other.hits(va, access::read));
  CHECK(f.mmu.verify() == nullptr);
  CHECK(touch(other, va, access::write).at == f.now(page));
  CHECK(f.mmu.verify() == nullptr);
  f.mmu.zap_all();
  f.mmu.zap_all();
  CHECK(touch(f.cpu, va, access::write).at == f.now(page));
}

TEST_CASE("removing and moving a slot takes down what maps it, and bad slots change nothing") {
  fixture f;
  REQUIRE(touch(f.cpu, va, access::read).result.what == outcome::done);
  CHECK(f.mmu.add_slot({.id = 2, .base = {10}, .pages = 1, .host = ram_base}) == errc::overlap);
  CHECK(f.mmu.add_slot({.id = 1, .base = {1000}, .pages = 1, .host = ram_base}) == errc::already_registered);
  CHECK(f.mmu.remove_slot(7) == errc::not_registered);
  CHECK(f.mmu.move_slot(1, {UINT64_MAX}) == errc::bad_range);
  CHECK(f.cpu.hits(va, access::read));
  CHECK(f.mmu.move_slot(1, {1 << 20}) == errc::ok);
  CHECK_FALSE(f.cpu.hits(va, access::read));
  CHECK(f.mmu.page_count() == 0);
  CHECK(f.mmu.verify() == nullptr);
  CHECK(f.mmu.move_slot(1, {0}) == errc::ok);
  CHECK(touch(f.cpu, va, access::read).at == f.now(page));
  CHECK(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 1, .host = f.host_of(page)}) == errc::ok);
  f.map({0x800000}, {1000 * page_size}, rwu);
  REQUIRE(touch(f.cpu, va, access::write).result.what == outcome::done);
  REQUIRE(touch(f.cpu, {0x800000}, access::write).at == f.now(page));
  CHECK(f.mmu.remove_slot(2) == errc::ok);  // no table is in it: leaves alone go, and only its own
  CHECK_FALSE(f.cpu.hits({0x800000}, access::read));
  CHECK(f.cpu.hits(va, access::write));
  CHECK(f.mmu.verify() == nullptr);
  CHECK(f.mmu.remove_slot(1) == errc::ok);
  CHECK(touch(f.cpu, va, access::read).result.what == outcome::not_mapped);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("the guest's use of a page shows as young until it is cleared") {
  fixture f;
  f.map(va, page, rwu | used);
  const range r = f.bytes_of(page);
  CHECK_FALSE(f.mmu.test_young(r));
  REQUIRE(touch(f.cpu, va, access::read).result.what == outcome::done);
  CHECK(f.mmu.test_young(r));
  CHECK(f.mmu.test_young({0, UINTPTR_MAX}));
  CHECK(f.mmu.clear_flush_young(r));
  CHECK_FALSE(f.mmu.test_young(r));
  CHECK(f.cpu.hits(va, access::read));  // still mapped, and used again
  CHECK(f.mmu.test_young(r));
  CHECK(f.mmu.clear_young(r));
  CHECK_FALSE(f.mmu.clear_young(r));
  CHECK(f.cpu.hits(va, access::read));
  CHECK_FALSE(f.mmu.test_young(r));  // the TLB's entry says nothing: that was the form without a flush
  f.cpu.flush_tlb();
  CHECK(f.cpu.hits(va, access::read));
  CHECK(f.mmu.test_young(r));
  CHECK_FALSE(f.mmu.test_young(f.bytes_of({0x6000})));
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("K6: release takes all mappings down and nothing else, and the owner can resume") {
  fixture f;
  REQUIRE(touch(f.cpu, va, access::write).result.what == outcome::done);
  f.mmu.release();
  CHECK(f.mmu.page_count() == 0);
  CHECK_FALSE(f.cpu.hits(va, access::read));
  CHECK(touch(f.cpu, va, access::read).result.what == outcome::released);
  CHECK(f.mmu.verify() == nullptr);
  CHECK(f.mmu.slots().lookup({0}).error == errc::ok);
  f.mmu.resume();
  CHECK(touch(f.cpu, va, access::write).at == f.now(page));
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("K6: an MMU that is destroyed before its vCPUs is reported") {
  scripted_host host;
  alignas(mmu_type) static std::byte mmu_memory[sizeof(mmu_type)];
  alignas(cpu_type) static std::byte cpu_memory[sizeof(cpu_type)];
  auto* mmu = new (mmu_memory) mmu_type{host};
  static_cast<void>(new (cpu_memory) cpu_type{*mmu});  // never destroyed: that would be the second mistake
  reported.clear();
  const auto before = set_contract_handler(&report);
  mmu->~mmu_type();
  set_contract_handler(before);
  REQUIRE(reported.size() == 1);
  CHECK(std::string(reported[0].rule) == "K6");
}

TEST_CASE("few shadow pages are enough, only slower") {
  for (const std::size_t limit : {std::size_t{0}, std::size_t{7}, std::size_t{10}}) {
    machine m;
    x86::shadow_mmu<scripted_host> small(m.host, {.max_pages = limit});
    REQUIRE(small.add_slot({.id = 1, .base = {0}, .pages = machine::pages, .host = ram_base}) == errc::ok);
    x86::vcpu cpu{small};
    REQUIRE(cpu.set_cr3(m.root) == errc::ok);
    for (std::uint64_t i = 0; i < 8; ++i) m.map(gva{i << 21}, {i * page_size});
    for (int round = 0; round < 3; ++round) {
      for (std::uint64_t i = 0; i < 8; ++i) {
        CHECK(touch(cpu, gva{i << 21}, access::write).at == m.host.bytes(ram_base + i * page_size));
        CHECK(small.verify() == nullptr);
        CHECK(small.page_count() <= std::max<std::size_t>(limit, 5));
      }
    }
  }
}

TEST_CASE("five-level guests are shadowed as well") {
  machine m;
  x86::shadow_mmu<scripted_host, x86::long_mode_5> mmu(m.host);
  REQUIRE(mmu.add_slot({.id = 1, .base = {0}, .pages = machine::pages, .host = ram_base}) == errc::ok);
  x86::vcpu cpu{mmu};
  const gva high{0x00fedcba98765000};
  const std::uint64_t top = m.new_table();
  gpa table{top};
  for (unsigned level = 5; level > 1; --level) {
    const std::uint64_t next = m.new_table();
    REQUIRE(m.write64(table + x86::long_mode_5::index(high, level) * 8, next | rwu) == errc::ok);
    table = {next};
  }
  REQUIRE(m.write64(table + x86::long_mode_5::index(high, 1) * 8, page.value | rwu) == errc::ok);
  REQUIRE(cpu.set_cr3(top) == errc::ok);
  CHECK(touch(cpu, high + 5, access::write).at == m.host.bytes(machine::host_of(page + 5)));
  CHECK(touch(cpu, {0x0100000000000000}, access::read).result.what == outcome::general_protection);
  CHECK(mmu.verify() == nullptr);
}

// --- Against a reference that walks anew at each access. -----------------------------------------------------------

TEST_CASE("every access has the outcome, the address and the traces of a walk made anew") {
  std::uint64_t done = 0, tracked = 0, faulted = 0, refused = 0, harvested = 0, large = 0, mmio = 0, fast = 0;
  std::uint64_t freely = 0, resynced = 0;
  for (std::uint64_t round = 0; round < 16; ++round) {
    random_guest<x86::long_mode_4> g(seed() + round, round % 2 == 1);
    for (int i = 0; i < 2500; ++i) {
      g.step();
      if (i % 10 == 0) {
        const char* broken = g.m.mmu.verify();
        REQUIRE(std::string(broken != nullptr ? broken : "") == "");
      }
    }
    CHECK(g.m.host.on_loan() == 0);
    done += g.done;
    tracked += g.tracked;
    faulted += g.faulted;
    refused += g.refused;
    harvested += g.harvested;
    freely += g.freely;
    resynced += g.m.mmu.statistics().resynced;
    large += g.m.mmu.statistics().large;
    mmio += g.m.mmu.statistics().mmio_hits;
    fast += g.m.mmu.statistics().fast_writes;
  }
  CHECK(harvested > 100);
  CHECK(large > 1);
  CHECK(mmio > 3);
  MESSAGE("done ", done, " tracked ", tracked, " faulted ", faulted, " refused ", refused, " harvested ", harvested,
          " large ", large, " MMIO ", mmio, " fast writes ", fast, " free writes ", freely, " synchronised ", resynced);
  CHECK(freely > 10);
  CHECK(resynced > 10);
  CHECK(done > 500);
  CHECK(tracked > 10);
  CHECK(faulted > 100);
  CHECK(refused > 10);
}

// --- With the real notifier and a real primary. --------------------------------------------------------------------

namespace {
/// Gives others a chance to run a bracket between the look-up and the installation.
struct slow_provider {
  reference_mmu<>& primary;
  frame_lease pin(hva a, bool write) noexcept {
    const frame_lease lease = primary.pin(a, write);
    for (int i = 0; i < 4; ++i) std::this_thread::yield();
    return lease;
  }
  frame_lease try_pin(hva a) noexcept {
    const frame_lease lease = primary.try_pin(a);
    std::this_thread::yield();
    return lease;
  }
  void unpin(pfn f) noexcept { primary.unpin(f); }
  std::byte* data(pfn f) noexcept { return primary.data(f); }
};

struct real_machine {
  using primary_type = reference_mmu<>;
  using real_mmu = x86::shadow_mmu<slow_provider>;
  static constexpr std::uintptr_t base = 0x40000000;
  static constexpr std::uint64_t pages = 48;

  primary_type primary{256, 256};
  slow_provider provider{primary};
  real_mmu mmu{provider, {.prefetch = true}};
  subscriber<real_mmu> node{mmu};

  real_machine() {
    CHECK(primary.map({base, base + pages * page_size}, protection::read_write) == errc::ok);
    CHECK(mmu.add_slot({.id = 1, .base = {0}, .pages = pages, .host = {base}}) == errc::ok);
    // One root at frame 0, tables at 1, 2, 3; frames 8 and on at `va` and on.
    const std::uint64_t tables[] = {0, 1, 2, 3};
    for (unsigned i = 0; i < 3; ++i) {
      put(tables[i] * page_size + x86::long_mode_4::index(va, 4 - i) * 8, tables[i + 1] * page_size | rwu);
    }
    for (std::uint64_t i = 8; i < pages; ++i) point(i, i);
    attach();
  }
  ~real_machine() {
    if (node.registered()) CHECK(primary.space().unregister(node) == errc::ok);
  }
  void attach() {
    auto held = primary.lock_tables();
    CHECK(primary.space().register_subscriber(node, held) == errc::ok);
  }
  void put(std::uint64_t at, std::uint64_t value) {
    CHECK(mmu.guest_write({at}, std::as_bytes(std::span<const std::uint64_t>(&value, 1))) == errc::ok);
  }
  static gva address(std::uint64_t i) { return va + i * page_size; }
  /// The address of page i leads to that frame.
  void point(std::uint64_t i, std::uint64_t frame) {
    put(3 * page_size + x86::long_mode_4::index(address(i), 1) * 8, frame * page_size | rwu);
  }
};
}  // namespace

TEST_CASE("K6: unregistering tears down mappings only, by whoever it is done, and the MMU can be registered again") {
  real_machine m;
  x86::vcpu cpu{m.mmu};
  REQUIRE(cpu.set_cr3(0) == errc::ok);
  const auto write = [](std::byte* at) noexcept { *at = std::byte{42}; };
  REQUIRE(cpu.access(m.address(8), access::write, write).what == outcome::done);
  struct bystander {
    void release() noexcept {}
  } other;
  subscriber<bystander> another{other};
  {
    auto held = m.primary.lock_tables();
    REQUIRE(m.primary.space().register_subscriber(another, held) == errc::ok);
  }
  CHECK(m.primary.space().unregister(another) == errc::ok);
  CHECK(cpu.hits(m.address(8), access::write));
  CHECK(m.primary.space().unregister(m.node) == errc::ok);
  CHECK_FALSE(cpu.hits(m.address(8), access::read));
  CHECK(cpu.access(m.address(8), access::read, write).what == outcome::released);
  m.attach();
  m.mmu.resume();
  std::byte found{};
  CHECK(cpu.access(m.address(8), access::read, [&](std::byte* at) noexcept { found = *at; }).what == outcome::done);
  CHECK(found == std::byte{42});
  CHECK(m.primary.exit() == errc::ok);
  CHECK(cpu.access(m.address(8), access::read, write).what == outcome::released);
  CHECK(m.mmu.verify() == nullptr);
}

TEST_CASE("O1: no vCPU reads or writes a frame that its page has left, while everything happens at once") {
  real_machine m;
  constexpr int cpu_ops = 20000, primary_ops = 4000, slot_ops = 300, owner_ops = 1500;
  std::atomic<unsigned> wrong{0}, odd{0};
  const auto run_cpu = [&](std::uint64_t id) {
    x86::vcpu cpu{m.mmu};
    CHECK(cpu.set_cr3(0) == errc::ok);
    std::mt19937_64 random(seed() + id);
    std::array<std::uint64_t, real_machine::pages> expected{};
    const std::uint64_t first = 8 + id * 16;  // frames of my own: first to first + 15; the last page is a window
    std::uint64_t window_frame = first + 15;
    for (int i = 0; i < cpu_ops; ++i) {
      std::uint64_t at = first + random() % 16, frame = at;
      if (random() % 16 == 0) m.point(first + 15, window_frame = first + random() % 16);
      if (at == first + 15) frame = window_frame;
      const bool write = random() % 2 == 0;
      const gva a = m.address(at) + 8 * id;
      bool was_wrong = false;
      const outcome o = cpu.access(a, write ? access::write : access::read, [&](std::byte* byte) noexcept {
        std::atomic_ref<std::uint64_t> word(*reinterpret_cast<std::uint64_t*>(byte));
        was_wrong = word.load(std::memory_order_relaxed) != expected[frame];
        if (write) word.store(expected[frame] + 1, std::memory_order_relaxed);
      });
      if (was_wrong) wrong.fetch_add(1);
      if (o.what == outcome::done) {
        expected[frame] += write ? 1 : 0;
      } else if (o.what != outcome::not_mapped) {  // protected, or moved away, just now
        odd.fetch_add(1);
      }
    }
  };
  const auto run_primary = [&] {
    std::mt19937_64 random(seed() + 77);
    for (int i = 0; i < primary_ops; ++i) {
      const std::uint64_t first = random() % real_machine::pages, n = 1 + random() % (real_machine::pages - first);
      const range r{real_machine::base + first * page_size, real_machine::base + (first + n) * page_size};
      switch (random() % 8) {
        case 0: static_cast<void>(m.primary.swap_out(r)); break;
        case 1: static_cast<void>(m.primary.migrate(r)); break;
        case 2: static_cast<void>(m.primary.clear_flush_young(r)); break;
        case 3: static_cast<void>(m.primary.clear_young(r)); break;
        case 4: static_cast<void>(m.primary.test_young(r)); break;
        case 5: {
          const range data{real_machine::base + 8 * page_size, real_machine::base + 24 * page_size};
          static_cast<void>(m.primary.protect(data, protection::read));
          static_cast<void>(m.primary.protect(data, protection::read_write));
          break;
        }
        case 6: {  // away, to another frame there, and back: who kept a mapping writes where nobody looks
          const std::uint64_t from = 8 + random() % 32;
          const range here{real_machine::base + from * page_size, real_machine::base + (from + 4) * page_size};
          const range there{here.first + 0x1000000, here.last + 0x1000000};
          bool ok = m.primary.move(here, there.first) == errc::ok;
          std::this_thread::yield();
          static_cast<void>(m.primary.migrate(there));
          ok = ok && m.primary.move(there, here.first) == errc::ok;
          if (!ok) odd.fetch_add(1);
          break;
        }
        default:
          if (m.mmu.verify() != nullptr) odd.fetch_add(1);
      }
    }
  };
  // Withdraws write access, logs writes, asks for age, and throws everything away.
  const auto run_owner = [&] {
    std::mt19937_64 random(seed() + 99);
    std::array<std::uint64_t, 1> words{};
    for (int i = 0; i < owner_ops; ++i) {
      const std::uint64_t f = random() % real_machine::pages;
      const hva at{real_machine::base + f * page_size};
      switch (random() % 6) {
        case 0: {
          const invalidation bracket{.range = x86::page_range(at), .event = event::soft_dirty};
          m.mmu.invalidate_range_start(bracket);
          for (std::uint64_t id = 0; id < 2; ++id) {  // nobody can write: a word stays what it is
            std::uint64_t first = 0, second = 0;
            if (m.primary.load(at + 8 * id, first) != errc::ok) continue;
            for (int n = 0; n < 4; ++n) std::this_thread::yield();
            if (m.primary.load(at + 8 * id, second) == errc::ok && first != second) wrong.fetch_add(1);
          }
          m.mmu.invalidate_range_end(bracket);
          break;
        }
        case 1: static_cast<void>(m.mmu.clear_young({0, UINTPTR_MAX})); break;
        case 2: static_cast<void>(m.mmu.test_young({0, UINTPTR_MAX})); break;
        case 3:
          if (m.mmu.log_writes(1, static_cast<x86::dirty_tracking>(random() % 3)) != errc::ok) odd.fetch_add(1);
          break;
        case 4: static_cast<void>(m.mmu.harvest_writes(1, words)); break;
        default:
          if (i % 8 == 0) m.mmu.zap_all();
      }
    }
  };
  std::vector<std::thread> all;
  all.emplace_back(run_owner);
  all.emplace_back(run_cpu, 0);
  all.emplace_back(run_cpu, 1);
  all.emplace_back(run_primary);
  for (int i = 0; i < slot_ops; ++i) {
    if (m.mmu.add_slot({.id = 2, .base = {1000}, .pages = 16, .host = {real_machine::base}}) != errc::ok)
      odd.fetch_add(1);
    if (m.mmu.move_slot(2, {1008}) != errc::ok || m.mmu.remove_slot(2) != errc::ok) odd.fetch_add(1);
  }
  for (auto& t : all) t.join();
  CHECK(wrong.load() == 0);
  CHECK(odd.load() == 0);
  CHECK(m.primary.statistics().stale_writes == 0);
  CHECK(m.primary.verify() == nullptr);
  CHECK(std::string(m.mmu.verify() != nullptr ? m.mmu.verify() : "") == "");
  const auto s = m.mmu.statistics();
  MESSAGE("faults ", s.faults, " retries ", s.retries, " zapped ", s.zapped, " flushes ", s.flushes, " prefetched ",
          s.prefetched);
}
