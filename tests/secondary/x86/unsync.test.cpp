// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/unsync.hpp>

#include <doctest/doctest.h>

#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
constexpr gva va{0x400000};
constexpr gva window{0x8000000000};  ///< where the guest sees its own leaf table

/// Pages 0 to 7 at va; their table at `window`, through tables of its own.
struct fixture : machine {
  cpu_type cpu{mmu};
  gpa leaf{};

  fixture() : machine(pages, {.unsync = true}) {
    for (std::uint64_t i = 0; i < 8; ++i) leaf = map(va + i * page_size, {i * page_size}, rwu | used);
    leaf = leaf.page();
    map(window, leaf, rwu | used);
    CHECK(cpu.set_cr3(root) == errc::ok);
    for (std::uint64_t i = 0; i < 8; ++i) CHECK(touch(cpu, at(i), access::write).result.what == outcome::done);
  }
  static gva at(std::uint64_t i) { return va + i * page_size; }
  std::byte* now(std::uint64_t frame) { return host.bytes(ram_base + frame * page_size); }
  /// The guest writes its own entry i.
  template <class Cpu>
  outcome guest_sets(Cpu& by, std::uint64_t i, std::uint64_t value) {
    return by.access(window + 8 * i, access::write, [&](std::byte* p) noexcept {
      std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(p)).store(value);
    });
  }
  void check() {
    const char* broken = mmu.verify();
    CHECK(std::string(broken != nullptr ? broken : "") == "");
    CHECK(host.on_loan() == 0);
  }
};
}  // namespace

TEST_CASE("pages leave the list of what is out of step in any order, and each table is named once") {
  std::array<x86::shadow_page, 4> pages;
  for (std::uint64_t i = 0; i < 4; ++i) pages[i].frame = {i / 2};
  x86::unsync_list list;
  std::array<gfn, 4> frames;
  CHECK(list.oldest(frames) == 0);
  for (auto& p : pages) list.add(p);
  CHECK(list.size() == 4);
  CHECK(list.oldest(frames) == 2);
  CHECK(frames[0] == gfn{0});
  CHECK(frames[1] == gfn{1});
  CHECK(list.oldest(std::span(frames).first(1)) == 1);
  list.remove(pages[3]);
  list.remove(pages[0]);
  CHECK_FALSE(pages[0].unsync);
  CHECK(pages[1].unsync);
  list.add(pages[0]);
  CHECK(list.oldest(frames) == 2);
  for (const unsigned i : {1U, 0U, 2U}) list.remove(pages[i]);
  CHECK(list.size() == 0);
  list.add(pages[3]);
  CHECK(list.oldest(frames) == 1);
  CHECK(frames[0] == gfn{1});
}

TEST_CASE("a guest writes its leaf tables with one fault, and its flush makes the changes count") {
  for (const bool by_cr3 : {true, false}) {
    fixture f;
    CHECK(f.guest_sets(f.cpu, 0, 7 * page_size | rwu | used).what == outcome::done);
    const auto faults = f.mmu.statistics().faults;
    for (std::uint64_t i = 1; i < 4; ++i)
      CHECK(f.guest_sets(f.cpu, i, 6 * page_size | rwu | used).what == outcome::done);
    CHECK(f.mmu.statistics().faults == faults);
    f.check();
    if (by_cr3) {
      CHECK(f.cpu.set_cr3(f.root) == errc::ok);
    } else {
      for (std::uint64_t i = 0; i < 4; ++i) f.cpu.invlpg(f.at(i));
    }
    f.check();
    CHECK(touch(f.cpu, f.at(0), access::write).at == f.now(7));
    for (std::uint64_t i = 1; i < 4; ++i) CHECK(touch(f.cpu, f.at(i), access::write).at == f.now(6));
    for (std::uint64_t i = 4; i < 8; ++i) CHECK(f.cpu.hits(f.at(i), access::write));  // they did not change
    CHECK(f.mmu.statistics().resynced == (by_cr3 ? 1 : 0));
    f.check();
  }
}

TEST_CASE("an upper table is never written freely") {
  fixture f;
  const gpa upper = f.entry_at(va, 2, f.root).page();
  f.map(window + page_size, upper, rwu | used);
  CHECK(touch(f.cpu, window + page_size, access::write).result.what == outcome::write_tracked);
  // Nor one that is an upper table at another place.
  f.map(window + 2 * page_size, f.leaf, rwu | used);
  const gpa other = f.entry_at({0x40000000}, 3, f.root);
  CHECK(f.write64(other, f.leaf.value | rwu) == errc::ok);
  CHECK(f.write64(f.leaf + 8 * 100, f.entry_at(va, 1, f.root).page().value | rwu) == errc::ok);
  static_cast<void>(touch(f.cpu, gva{0x40000000} + (std::uint64_t{100} << 21), access::read));
  CHECK(f.guest_sets(f.cpu, 0, 0).what == outcome::write_tracked);
  f.check();
}

TEST_CASE("what a flush may keep is what the guest's entry still allows, bit by bit") {
  const std::uint64_t same = 2 * page_size | rwu | used;
  struct row {
    std::uint64_t entry;
    bool reads, writes, users;
  };
  const row rows[] = {
      {same, true, true, true},
      {same & ~pte::present, false, false, false},
      {same & ~pte::writable, true, false, true},
      {same & ~pte::user, true, true, false},
      {same | pte::no_execute, true, true, true},
      {same | std::uint64_t{1} << 45, false, false, false},  // reserved
  };
  for (const row& r : rows) {
    fixture f;
    CHECK(f.guest_sets(f.cpu, 2, r.entry).what == outcome::done);
    CHECK(f.cpu.set_cr3(f.root) == errc::ok);
    f.check();
    CHECK((touch(f.cpu, f.at(2), access::read).result.what == outcome::done) == r.reads);
    CHECK((touch(f.cpu, f.at(2), access::write).result.what == outcome::done) == r.writes);
    CHECK((touch(f.cpu, f.at(2), access::fetch).result.what == outcome::done) ==
          (r.reads && (r.entry & pte::no_execute) == 0));
    f.cpu.set_cpl(3);
    CHECK((touch(f.cpu, f.at(2), access::read).result.what == outcome::done) == r.users);
    f.check();
  }
  // Accessed and dirty are set again where the guest has cleared them.
  fixture f;
  CHECK(f.guest_sets(f.cpu, 2, same & ~used).what == outcome::done);
  CHECK(f.cpu.set_cr3(f.root) == errc::ok);
  CHECK(touch(f.cpu, f.at(2), access::read).result.what == outcome::done);
  CHECK((f.read64(f.leaf + 16) & used) == pte::accessed);
  CHECK(touch(f.cpu, f.at(2), access::write).result.what == outcome::done);
  CHECK((f.read64(f.leaf + 16) & used) == used);
}

TEST_CASE("after a flush the next write to the table is noticed again") {
  fixture f;
  CHECK(f.guest_sets(f.cpu, 0, 7 * page_size | rwu | used).what == outcome::done);
  CHECK(f.cpu.set_cr3(f.root) == errc::ok);
  CHECK_FALSE(f.cpu.hits(window, access::write));
  CHECK(touch(f.cpu, f.at(0), access::read).at == f.now(7));
  CHECK(f.guest_sets(f.cpu, 0, 5 * page_size | rwu | used).what == outcome::done);
  f.cpu.flush_tlb();
  CHECK(touch(f.cpu, f.at(0), access::read).at == f.now(5));
  f.check();
}

TEST_CASE("a flush on one vCPU is enough for the others, and they never see a table in the making") {
  fixture f;
  cpu_type other{f.mmu};
  REQUIRE(other.set_cr3(f.root) == errc::ok);
  REQUIRE(touch(other, f.at(3), access::write).at == f.now(3));
  CHECK(f.guest_sets(f.cpu, 3, 6 * page_size | rwu | used).what == outcome::done);
  f.cpu.flush_tlb();
  CHECK(touch(other, f.at(3), access::write).at == f.now(6));
  f.check();
}

TEST_CASE("who comes to a table by a new way sees it as it is, without a flush") {
  fixture f;
  CHECK(f.guest_sets(f.cpu, 0, 7 * page_size | rwu | used).what == outcome::done);
  // A second upper entry for the same table: nothing of it can be in a TLB.
  const gpa upper = f.entry_at(va, 2, f.root);
  CHECK(f.write64(upper + 8, f.leaf.value | rwu) == errc::ok);
  CHECK(touch(f.cpu, va + 0x200000, access::read).at == f.now(7));
  f.check();
}

TEST_CASE("a table that was written freely goes like any other: by brackets, slots, generations and releases") {
  for (int how = 0; how < 5; ++how) {
    fixture f;
    CHECK(f.guest_sets(f.cpu, 0, 7 * page_size | rwu | used).what == outcome::done);
    switch (how) {
      case 0: f.migrate(f.leaf); break;
      case 1: f.mmu.zap_all(); break;
      case 2:
        CHECK(f.mmu.move_slot(1, {1 << 16}) == errc::ok);
        CHECK(f.mmu.move_slot(1, {0}) == errc::ok);
        break;
      case 3:
        f.mmu.release();
        f.check();
        f.mmu.resume();
        break;
      default: f.host.refuses[machine::host_of(f.leaf).value] = errc::no_memory;  // it cannot be read at the flush
    }
    f.check();
    CHECK(f.cpu.set_cr3(f.root) == errc::ok);
    f.host.refuses.clear();
    f.check();
    CHECK(touch(f.cpu, f.at(0), access::write).at == f.now(7));
    CHECK(touch(f.cpu, f.at(5), access::write).at == f.now(5));
    f.check();
  }
}

TEST_CASE("vCPUs that write their tables freely and flush see their own changes, while the host moves everything") {
  fixture f;
  for (std::uint64_t i = 0; i < 8; ++i) {
    std::memset(f.now(i), static_cast<int>(i + 1), page_size);
  }
  std::atomic<bool> stop{false};
  std::atomic<unsigned> wrong{0}, odd{0};
  std::mutex host;  // scripted_host is one thread's at a time
  struct locked_host {
    scripted_host& inner;
    std::mutex& mutex;
    frame_lease pin(hva a, bool write) noexcept {
      const std::lock_guard g{mutex};
      return inner.pin(a, write);
    }
    void unpin(pfn p) noexcept {
      const std::lock_guard g{mutex};
      inner.unpin(p);
    }
    std::byte* data(pfn p) noexcept { return reinterpret_cast<std::byte*>(p.value << page_shift); }
  };
  // Frames by address, so that data() needs no lock.
  constexpr std::uint64_t pages = machine::pages;
  const auto bytes = std::make_unique<std::array<scripted_host::frame, 2 * pages>>();
  scripted_host frames;
  std::array<std::uint64_t, pages> where{};
  for (std::uint64_t i = 0; i < pages; ++i) {
    where[i] = i;
    (*bytes)[i] = *f.host.frames.at(f.host.at(ram_base + i * page_size).value);
    frames.pages[(ram_base + i * page_size).value] = reinterpret_cast<std::uintptr_t>(&(*bytes)[i]) >> page_shift;
  }
  locked_host provider{frames, host};
  x86::shadow_mmu<locked_host> mmu{provider, {.unsync = true}};
  REQUIRE(mmu.add_slot({.id = 1, .base = {0}, .pages = pages, .host = ram_base}) == errc::ok);
  const auto run = [&](std::uint64_t id) {
    x86::vcpu cpu{mmu};
    if (cpu.set_cr3(f.root) != errc::ok) odd.fetch_add(1);
    std::mt19937_64 random(seed() + id);
    for (int n = 0; n < 4000; ++n) {
      const std::uint64_t entry = 4 * id + random() % 4, target = random() % 8;
      const std::uint64_t value = target * page_size | rwu | used;
      const outcome o = cpu.access(window + 8 * entry, access::write, [&](std::byte* p) noexcept {
        std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(p)).store(value);
      });
      if (o.what == outcome::write_tracked) {
        if (mmu.guest_write(f.leaf + 8 * entry, std::as_bytes(std::span(&value, 1))) != errc::ok) odd.fetch_add(1);
      } else if (o.what != outcome::done) {
        odd.fetch_add(1);
      }
      if (random() % 4 == 0) {
        cpu.flush_tlb();
      } else {
        cpu.invlpg(f.at(entry));
      }
      std::byte seen_byte{};
      const outcome read = cpu.access(f.at(entry), access::read, [&](std::byte* p) noexcept { seen_byte = *p; });
      if (read.what != outcome::done) odd.fetch_add(1);
      if (seen_byte != std::byte(target + 1)) wrong.fetch_add(1);
    }
  };
  std::thread mover([&] {
    std::mt19937_64 random(seed() + 5);
    std::uint64_t spare = pages;  // every page has a second place
    while (!stop.load()) {
      const std::uint64_t i = random() % pages;
      const hva at = ram_base + i * page_size;
      mmu.invalidate_range_start({.range = x86::page_range(at)});
      {
        const std::lock_guard g{host};
        const std::uint64_t next = where[i] < spare ? i + spare : i;
        const std::uint64_t number = reinterpret_cast<std::uintptr_t>(&(*bytes)[next]) >> page_shift;
        if (frames.pins[number] == 0) {  // else somebody still looks at what it was
          (*bytes)[next] = (*bytes)[where[i]];
          if (i < 8) (*bytes)[where[i]].bytes.fill(std::byte{0x6b});
          where[i] = next;
          frames.pages[at.value] = number;
        }
      }
      mmu.invalidate_range_end({.range = x86::page_range(at)});
    }
  });
  std::thread second([&] { run(1); });
  run(0);
  second.join();
  stop.store(true);
  mover.join();
  CHECK(wrong.load() == 0);
  CHECK(odd.load() == 0);
  CHECK(mmu.statistics().resynced > 10);
  CHECK(std::string(mmu.verify() != nullptr ? mmu.verify() : "") == "");
}
