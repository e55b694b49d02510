// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/fault.hpp>

#include <doctest/doctest.h>

#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
constexpr gva va{0x400000};
constexpr gpa data_page{0x5000};

struct fixture : machine {
  cpu_type cpu{mmu};
  gpa leaf = map(va, data_page);

  fixture() { CHECK(cpu.set_cr3(root) == errc::ok); }
  /// The script runs when the page is pinned for the `n`th time from now.
  void when_pinned(gpa page, std::function<void()> script, int n = 1) {
    host.keep = true;
    host.during_pin = [page, script, n, seen = 0](hva a, bool) mutable {
      if (a == host_of(page) && ++seen == n) script();
    };
  }
  std::byte* now(gpa a) { return host.bytes(host_of(a)); }
  void check() {
    CHECK(mmu.verify() == nullptr);
    CHECK(host.on_loan() == 0);
  }
};
}  // namespace

TEST_CASE("K1: an entry is installed only if no overlapping bracket ran since before the page lookup") {
  fixture f;
  f.when_pinned(data_page, [&] { f.migrate(data_page); });
  CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
  CHECK_FALSE(f.cpu.hits(va, access::read));
  f.check();
  const seen s = touch(f.cpu, va, access::read);
  CHECK(s.result.what == outcome::done);
  CHECK(s.at == f.now(data_page));
  CHECK(f.mmu.statistics().retries == 1);
  f.check();
}

TEST_CASE("K1: a fault that looked its page up before the MMU was unregistered installs nothing after it is back") {
  fixture f;
  f.when_pinned(data_page, [&] {
    f.mmu.release();
    f.host.migrate(f.host_of(data_page));  // no bracket reaches an MMU that is not registered
    f.mmu.resume();
  });
  CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
  CHECK_FALSE(f.cpu.hits(va, access::read));
  f.host.during_pin = nullptr;
  const seen s = touch(f.cpu, va, access::read);
  CHECK(s.at == f.now(data_page));
  f.check();
}

TEST_CASE("K1: an entry is installed only if no overlapping bracket is open, and one byte of overlap is enough") {
  fixture f;
  const auto page = x86::page_range(f.host_of(data_page));
  for (const range r :
       {page, range{page.first - 4096, page.first + 1}, range{page.last - 1, page.last + 5}, range{0, UINTPTR_MAX}}) {
    f.when_pinned(data_page, [&] { f.start(r); });
    CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
    f.host.during_pin = nullptr;
    CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
    f.check();
    f.end(r);
    CHECK(f.cpu.prefault(va, access::read).what == outcome::done);
    f.start(page);
    f.end(page);
  }
  f.check();
}

TEST_CASE("K1: a bracket that runs while the fault waits for the MMU lock is seen under the lock") {
  scripted_host host;
  for (std::uint64_t i = 0; i < 8; ++i) host.place(ram_base + i * page_size);
  x86::flush_gate gate;
  x86::memslots slots{gate.domain()};
  x86::mmu_counters counters;
  x86::mmu_window window;
  x86::shadow_tables tables{slots, gate, counters, 100};
  x86::fault_path<scripted_host, x86::long_mode_4> faults({host, slots, window, tables.lock()}, tables, counters);
  x86::table_follower<scripted_host, x86::long_mode_4> guest({host, slots, window, tables.lock()}, tables, counters);
  REQUIRE(slots.add({.id = 1, .base = {0}, .pages = 8, .host = ram_base}, tables.lock()) == errc::ok);
  for (std::uint64_t level = 4; level > 0; --level) {  // tables at frames 4 to 1; the page is frame 5
    const std::uint64_t entry = (level == 1 ? 5 : level - 1) * page_size | rwu | used;
    REQUIRE(guest.guest_write({level * page_size}, std::as_bytes(std::span(&entry, 1))) == errc::ok);
  }
  x86::vcpu_state cpu;
  cpu.context.cr3 = 4 * page_size;
  const hva page = ram_base + 5 * page_size;
  for (int round = 0; round < 50; ++round) {
    std::atomic<bool> go{false}, locked{false};
    std::thread primary([&] {
      while (!go.load()) std::this_thread::yield();
      const std::lock_guard held{tables.lock()};
      locked.store(true);
      for (int i = 0; i < 50; ++i) std::this_thread::yield();  // the fault goes on to the lock, mostly
      window.start(x86::page_range(page));
      host.migrate(page);
      window.end(x86::page_range(page));
    });
    host.keep = true;
    host.during_pin = [&](hva a, bool) {
      if (a != page) return;
      go.store(true);
      while (!locked.load()) std::this_thread::yield();
    };
    CHECK(faults.fault(cpu, {0}, access::read).what == outcome::again);  // by the hint or under the lock
    primary.join();
    host.during_pin = nullptr;
  }
  CHECK(counters.read().installs == 0);
  CHECK(faults.fault(cpu, {0}, access::read).what == outcome::done);
}

TEST_CASE("C9: a bracket elsewhere makes no fault retry, open or finished") {
  fixture f;
  const auto page = x86::page_range(f.host_of(data_page));
  f.when_pinned(data_page, [&] {
    f.start({page.last, page.last + 4096});  // touches
    f.migrate({0x7000});
  });
  CHECK(f.cpu.prefault(va, access::read).what == outcome::done);
  f.end({page.last, page.last + 4096});
  CHECK(f.mmu.statistics().retries == 0);
  f.check();
}

TEST_CASE("K1: a bracket over a guest table that the walk has read makes the fault retry") {
  for (unsigned level = 1; level <= 4; ++level) {
    fixture f;
    const gpa table = f.entry_at(va, level, f.root).page();
    f.when_pinned(data_page, [&] {
      auto& old = f.host.frames.at(f.host.at(f.host_of(table)).value)->bytes;
      const auto contents = old;
      f.migrate(table);
      old = contents;    // read again there, the entries are as they were
      if (level == 1) {  // and the new page says something else
        *reinterpret_cast<std::uint64_t*>(f.now(f.leaf)) = 0x6000 | rwu;
      }
    });
    CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
    CHECK_FALSE(f.cpu.hits(va, access::read));
    const seen s = touch(f.cpu, va, access::read);
    CHECK(s.at == f.now(level == 1 ? gpa{0x6000} : data_page));
    f.check();
  }
}

TEST_CASE("a guest that changes an entry in the middle of the fault is believed, at every level") {
  for (unsigned level = 1; level <= 4; ++level) {
    fixture f;
    // A second tree for the same address that leads to another page.
    const std::uint64_t second = f.new_table();
    gpa table{second};
    for (unsigned l = 4; l > 1; --l) {
      const std::uint64_t next = f.new_table();
      CHECK(f.write64(table + x86::long_mode_4::index(va, l) * 8, next | rwu) == errc::ok);
      table = {next};
    }
    CHECK(f.write64(table + x86::long_mode_4::index(va, 1) * 8, 0x6000 | rwu) == errc::ok);
    const gpa mine = f.entry_at(va, level, f.root), theirs = f.entry_at(va, level, second);
    f.when_pinned(data_page, [&] { CHECK(f.write64(mine, f.read64(theirs)) == errc::ok); });
    CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
    CHECK(touch(f.cpu, va, access::read).at == f.now({0x6000}));
    f.check();
  }
}

TEST_CASE("a guest page table that is mapped writable cannot be changed unseen while its first entry is shadowed") {
  // Another vCPU has the leaf table mapped writable; it writes there after our walk, directly.
  fixture f;
  cpu_type other{f.mmu};
  const std::uint64_t second = f.new_table();
  const std::uint64_t first_root = std::exchange(f.root, second);
  f.map({0x900000}, f.leaf.page());
  f.root = first_root;
  REQUIRE(other.set_cr3(second) == errc::ok);
  REQUIRE(touch(other, {0x900000}, access::write).result.what == outcome::done);
  f.when_pinned(data_page, [&] {
    const outcome o = other.access({0x900000 + f.leaf.offset()}, access::write, [](std::byte* at) noexcept {
      std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at)).store(0x6000 | rwu);
    });
    CHECK(o.what == outcome::done);
  });
  CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
  CHECK(touch(f.cpu, va, access::read).at == f.now({0x6000}));
  CHECK(touch(other, {0x900000}, access::write).result.what == outcome::write_tracked);
  f.check();
}

TEST_CASE("a slot that goes or moves in the middle of a fault is not mapped through") {
  fixture f;
  f.when_pinned(data_page, [&] { CHECK(f.mmu.move_slot(1, {0x1000}) == errc::ok); });
  CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
  f.check();
  CHECK(f.cpu.prefault(va, access::read).what == outcome::not_mapped);  // the tables are gone as well
  CHECK(f.mmu.move_slot(1, {0}) == errc::ok);
  CHECK(touch(f.cpu, va, access::read).at == f.now(data_page));
  f.when_pinned(data_page, [&] { CHECK(f.mmu.remove_slot(1) == errc::ok); });
  f.start(x86::page_range(f.host_of(data_page)));
  f.end(x86::page_range(f.host_of(data_page)));
  CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
  f.check();
  CHECK(f.mmu.statistics().pages_zapped > 0);
}

TEST_CASE("an MMU that is released in the middle of a fault maps nothing") {
  fixture f;
  f.when_pinned(data_page, [&] { f.mmu.release(); });
  CHECK(f.cpu.prefault(va, access::read).what == outcome::released);
  CHECK(f.mmu.page_count() == 0);
  f.check();
}

TEST_CASE("K5: the provider is never called while the MMU lock is held, and nothing returns with it") {
  fixture f;
  int calls = 0;
  const auto lock_is_free = [&] {
    ++calls;
    bool taken = false;
    std::thread([&] {
      taken = f.mmu.lock().try_lock();
      if (taken) f.mmu.lock().unlock();
    }).join();
    CHECK(taken);
  };
  f.host.keep = true;
  f.host.during_pin = [&](hva, bool) { lock_is_free(); };
  f.host.during_unpin = lock_is_free;
  CHECK(f.cpu.prefault(va, access::read).what == outcome::done);
  CHECK(f.cpu.prefault(va, access::write).what == outcome::done);
  CHECK(f.cpu.prefault({0x999000}, access::write).what == outcome::page_fault);
  CHECK(f.write64(f.leaf, 0x6000 | rwu) == errc::ok);
  CHECK(f.write64({0x6000}, 1) == errc::ok);
  CHECK(f.write64({0x4000000}, 1) == errc::not_mapped);
  CHECK(f.cpu.prefault(va, access::write).what == outcome::done);
  CHECK(calls > 20);
  lock_is_free();
  f.host.during_pin = nullptr;
  f.host.during_unpin = nullptr;
  f.check();
}

TEST_CASE("K5: a guest write to a shadowed table zaps exactly the shadows of the entries that it touches") {
  fixture f;
  for (unsigned i = 1; i < 6; ++i) f.map(va + i * page_size, {(i + 5) * page_size});
  for (unsigned i = 0; i < 6; ++i) REQUIRE(touch(f.cpu, va + i * page_size, access::read).result.what == outcome::done);
  const auto faults = f.mmu.statistics().faults;
  std::array<std::byte, 9> bytes{};  // the end of entry 1, all of 2 would be 8: from offset 15 to 24, entries 1, 2, 3
  std::memcpy(bytes.data(), f.now(f.leaf + 15), bytes.size());
  CHECK(f.mmu.guest_write(f.leaf + 15, bytes) == errc::ok);
  for (unsigned i = 0; i < 6; ++i) CHECK(f.cpu.hits(va + i * page_size, access::read) == (i < 1 || i > 2));
  CHECK(f.mmu.statistics().faults == faults);
  CHECK(f.mmu.statistics().zapped == 2);
  CHECK(touch(f.cpu, va + page_size, access::read).at == f.now({6 * page_size}));
  f.check();
}

TEST_CASE("a guest write is done in pieces where pages end, and says why it stopped") {
  fixture f;
  std::array<std::byte, 5000> bytes;
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = std::byte(i * 7);
  CHECK(f.mmu.guest_write({0x5ffd}, bytes) == errc::ok);
  for (std::size_t i = 0; i < bytes.size(); ++i) REQUIRE(*f.now(gpa{0x5ffd} + i) == bytes[i]);
  CHECK(f.mmu.guest_write({0x5ffd}, {}) == errc::ok);
  CHECK(f.mmu.guest_write({UINT64_MAX - 3}, bytes) == errc::bad_range);
  CHECK(f.mmu.guest_write({machine::pages * page_size - 8}, bytes) == errc::not_mapped);
  f.host.read_only[f.host_of({0x6000}).value] = true;
  CHECK(f.mmu.guest_write({0x5ffd}, bytes) == errc::access_denied);
  f.host.refuses[f.host_of({0x6000}).value] = errc::no_memory;
  CHECK(f.mmu.guest_write({0x6000}, bytes) == errc::no_memory);
  f.mmu.release();
  CHECK(f.mmu.guest_write({0x7000}, bytes) == errc::released);
  f.check();
}

TEST_CASE("K1: a guest write lands in the page that is there, not in the one that was") {
  fixture f;
  const pfn old = f.host.at(f.host_of(data_page));
  f.when_pinned(data_page, [&] { f.migrate(data_page); });
  CHECK(f.write64(data_page, 0x1234) == errc::ok);
  CHECK(f.read64(data_page) == 0x1234);
  CHECK(f.host.data(old)[0] == std::byte{0x6b});
  f.check();
}

TEST_CASE("what the host refuses comes back as the outcome, and leaves nothing behind") {
  fixture f;
  const std::uint64_t page = f.host_of(data_page).value;
  const auto with = [&](errc e) {
    f.host.refuses[page] = e;
    const outcome o = f.cpu.prefault(va, access::read);
    f.host.refuses.clear();
    f.check();
    return o;
  };
  CHECK(with(errc::not_mapped) == outcome{.what = outcome::not_mapped, .address = data_page});
  CHECK(with(errc::access_denied).what == outcome::not_mapped);
  CHECK(with(errc::no_memory).what == outcome::no_memory);
  CHECK(with(errc::released).what == outcome::released);
  CHECK(with(errc::again).what == outcome::again);
  CHECK(f.mmu.statistics().installs == 0);
  f.host.refuses[f.host_of(f.leaf).page().value] = errc::not_mapped;
  CHECK(f.cpu.prefault(va, access::read) == outcome{.what = outcome::not_mapped, .address = f.leaf});
  f.host.refuses.clear();
  CHECK(f.write64(f.leaf, (machine::pages << 12) | rwu) == errc::ok);  // outside all slots
  CHECK(f.cpu.prefault(va, access::read) == outcome{.what = outcome::not_mapped, .address = {machine::pages << 12}});
  f.check();
}

// --- Large leaves. ---------------------------------------------------------------------------------------------------

namespace {
/// A slot of 3 MiB + 1 GiB; a run of 2 MiB of the host at guest frame 1024, mapped at 0x40000000 by a 2 MiB guest leaf.
struct large_fixture : machine {
  static constexpr gva at{0x40000000};
  static constexpr gpa base{1024 * page_size};
  static constexpr hva run = ram_base + base.value;
  cpu_type cpu{mmu};

  large_fixture() : machine(4096) {
    host.place_run(run, 21, 512);
    map(at, base, rwu | used, 2);
    CHECK(cpu.set_cr3(root) == errc::ok);
  }
  std::uint64_t large() { return mmu.statistics().large; }
  std::byte* now(gpa a) { return host.bytes(host_of(a)); }
  void check() {
    const char* broken = mmu.verify();
    CHECK(std::string(broken != nullptr ? broken : "") == "");
  }
};
}  // namespace

TEST_CASE("a large guest page on a large host page is one leaf, and each of its bytes is reached") {
  large_fixture f;
  CHECK(touch(f.cpu, f.at + 0x12345, access::write).at == f.now(f.base + 0x12345));
  CHECK(f.large() == 1);
  const auto faults = f.mmu.statistics().faults;
  for (std::uint64_t i = 0; i < 512; i += 7) {
    CHECK(touch(f.cpu, f.at + i * page_size + i, access::write).at == f.now(f.base + i * page_size + i));
  }
  CHECK(f.mmu.statistics().faults == faults);
  CHECK(f.mmu.statistics().installs == 1);
  f.check();
}

TEST_CASE("K3: a bracket over one byte of a large leaf takes all of it down") {
  large_fixture f;
  REQUIRE(touch(f.cpu, f.at, access::write).result.what == outcome::done);
  const auto last = static_cast<std::uintptr_t>((f.run + 511 * page_size + 4095).value);
  f.start({last, last + 1});
  CHECK_FALSE(f.cpu.hits(f.at, access::read));
  f.check();
  f.host.split_run(f.run);
  f.host.migrate(f.run + 511 * page_size);
  f.end({last, last + 1});
  CHECK(touch(f.cpu, f.at + 511 * page_size, access::write).at == f.now(f.base + 511 * page_size));
  CHECK(touch(f.cpu, f.at, access::write).at == f.now(f.base));
  CHECK(f.large() == 1);
  f.check();
}

TEST_CASE("K1: a large leaf is not installed over a bracket that touched a part of it, a small one is") {
  large_fixture f;
  f.host.keep = true;
  bool done = false;
  f.host.during_pin = [&](hva a, bool) {
    if (a != f.run || std::exchange(done, true)) return;
    const hva other = f.run + 100 * page_size;
    f.start(x86::page_range(other));
    f.host.split_run(f.run);
    f.host.migrate(other);
    f.end(x86::page_range(other));
    f.host.runs[f.run.value] = 21;  // what the fault will be told is stale
  };
  CHECK(f.cpu.prefault(f.at, access::write).what == outcome::done);
  CHECK(done);
  f.host.during_pin = nullptr;
  f.host.split_run(f.run);
  CHECK(f.large() == 0);
  CHECK(touch(f.cpu, f.at + 100 * page_size, access::read).at == f.now(f.base + 100 * page_size));
  f.check();
}

TEST_CASE("a large leaf gives way to a guest table in it, and comes back when the table is none any more") {
  large_fixture f;
  REQUIRE(touch(f.cpu, f.at, access::write).result.what == outcome::done);
  CHECK(f.large() == 1);
  // A page table in the middle of the large page.
  const gpa table = f.base + 77 * page_size;
  const gpa upper = f.entry_at({0x600000}, 2, f.root);
  CHECK(f.write64(upper, table.value | rwu) == errc::ok);
  CHECK(f.write64(table, 0x5000 | rwu) == errc::ok);
  CHECK(touch(f.cpu, {0x600000}, access::read).at == f.now({0x5000}));
  f.check();
  CHECK_FALSE(f.cpu.hits(f.at, access::read));
  CHECK(touch(f.cpu, f.at + 77 * page_size, access::write).result.what == outcome::write_tracked);
  CHECK(touch(f.cpu, f.at, access::write).at == f.now(f.base));
  CHECK(f.large() == 1);
  f.check();
  for (unsigned i = 0; i <= x86::shadow_tables::write_flood; ++i) CHECK(f.write64(table + 8 * i, 0) == errc::ok);
  f.start(x86::page_range(f.run));
  f.end(x86::page_range(f.run));
  CHECK(touch(f.cpu, f.at, access::write).at == f.now(f.base));
  CHECK(f.large() == 2);
  f.check();
}

TEST_CASE("a leaf is as large as guest, host and slot allow, level by level") {
  large_fixture f;
  f.map({0x8000000000}, {0}, rwu | used, 3);  // 1 GiB of the guest, the slot is smaller
  CHECK(touch(f.cpu, gva{0x8000000000} + f.base.value, access::read).at == f.now(f.base));
  CHECK(f.large() == 1);
  CHECK(touch(f.cpu, {0x8000005000}, access::read).at == f.now({0x5000}));
  CHECK(f.large() == 1);
  // A small guest page on a large host page stays small.
  f.map({0x700000}, f.base + 5 * page_size, rwu | used);
  CHECK(touch(f.cpu, {0x700000}, access::read).at == f.now(f.base + 5 * page_size));
  CHECK(f.large() == 1);
  f.check();
}

TEST_CASE("one gigabyte is one leaf") {
  machine m;
  constexpr std::uint64_t gib_frames = 512 * 512;
  const hva far = ram_base + (std::uint64_t{1} << 40);
  m.host.place_run(far, 30, 600);
  REQUIRE(m.mmu.add_slot({.id = 2, .base = {4 * gib_frames}, .pages = gib_frames, .host = far}) == errc::ok);
  m.map({0x8000000000}, {4 * gib_frames * page_size}, rwu | used, 3);
  cpu_type cpu{m.mmu};
  REQUIRE(cpu.set_cr3(m.root) == errc::ok);
  CHECK(touch(cpu, {0x8000000000}, access::write).at == m.host.bytes(far));
  CHECK(touch(cpu, {0x8000000000 + 599 * 4096 + 8}, access::write).at == m.host.bytes(far + 599 * page_size + 8));
  CHECK(m.mmu.statistics().installs == 1);
  CHECK(m.mmu.page_count() == 2);
  CHECK(m.mmu.verify() == nullptr);
  const auto h = static_cast<std::uintptr_t>(far.value);
  m.start({h + (1 << 29), h + (1 << 29) + 1});
  CHECK_FALSE(cpu.hits({0x8000000000}, access::read));
  m.end({h + (1 << 29), h + (1 << 29) + 1});
}

TEST_CASE("K2: the table of a walk whose slot goes meanwhile is not shadowed") {
  fixture f;
  CHECK(f.mmu.add_slot({.id = 2, .base = {1000}, .pages = 8, .host = ram_base + 50 * page_size}) == errc::ok);
  const gpa upper = f.entry_at(va, 2, f.root);
  CHECK(f.write64({1000 * page_size + x86::long_mode_4::index(va, 1) * 8}, data_page.value | rwu) == errc::ok);
  CHECK(f.write64(upper, (1000 * page_size) | rwu) == errc::ok);
  f.when_pinned(data_page, [&] { CHECK(f.mmu.remove_slot(2) == errc::ok); });
  CHECK(f.cpu.prefault(va, access::read).what == outcome::again);
  f.check();
}
