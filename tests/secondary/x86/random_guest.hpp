// SPDX-License-Identifier: MIT
#pragma once

// Randomised guests of every paging mode for the tests of the shadow MMU.

#include <array>
#include <atomic>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <utility>

#include <doctest/doctest.h>

#include "reference_walk.hpp"
#include "shadow_fixture.hpp"

namespace shadow_test {

template <class Machine>
struct raw_memory {
  Machine& m;
  template <class Entry>
  bool read_entry(gpa where, Entry& value) noexcept {
    if (!m.host.has(Machine::host_of(where.page()))) return false;
    value = m.template read<Entry>(where);
    return true;
  }
};

/// A guest that does anything at all to its tables, registers and memory, on a host that does the same. Each access is
/// held against a walk made anew, and that against the rules of the manual (reference_walk.hpp).
/// Dice: where its decisions come from; what makes a number below another may be its own business.
template <class Mode, class Host = scripted_host, class Dice = std::mt19937_64>
struct random_guest {
  using machine = machine_of<Mode, Mode, Host>;
  using cpu_type = typename machine::cpu_type;
  using entry = typename Mode::entry_type;
  static constexpr bool pae = Mode::top_in_registers;
  /// Entries of each table that are used: of 1024, some of every quadrant.
  static constexpr auto used_entries = [] {
    if constexpr (sizeof(entry) == 4) {
      return std::array<std::uint64_t, 5>{0, 1, 300, 600, 1023};
    } else {
      return std::array<std::uint64_t, 3>{0, 1, 2};
    }
  }();
  static constexpr std::uint64_t tables = 12;  ///< page tables at guest frames 32 to 43, roots at the first two
  static constexpr std::uint64_t slot_pages = 1536;
  static constexpr std::uint64_t run = 512;  ///< guest frames 512 to 1023 are one large page of the host, at first
  machine m;
  cpu_type cpus[2]{cpu_type{m.mmu}, cpu_type{m.mmu}};
  Dice random;
  std::uint64_t done = 0, tracked = 0, faulted = 0, refused = 0, harvested = 0, freely = 0;
  entry* pending = nullptr;  ///< an entry that the guest may write without being noticed
  bool logging = false;
  std::set<std::uint64_t> written;                       ///< since the last harvest
  std::array<std::array<std::uint64_t, 4>, 2> pdptes{};  ///< what the registers of each vCPU hold
  std::set<std::uint64_t> was_rom;                       ///< walks through these may have left no traces

  random_guest(std::uint64_t s, bool unsync) : random_guest(Dice(s), x86::mmu_options{.unsync = unsync}) {}
  random_guest(std::uint64_t s, const x86::mmu_options& o) : random_guest(Dice(s), o) {}
  random_guest(Dice d, const x86::mmu_options& o) : m(slot_pages, o), random(std::move(d)) {
    m.host.place_run(machine::host_of({run * page_size}), 21, 512);
    for (auto& cpu : cpus) CHECK(cpu.set_cr3(32 * page_size) == errc::ok);  // nothing is mapped
    for (int i = 0; i < 60; ++i) write_entry();
  }
  std::uint64_t below(std::uint64_t n) {
    if constexpr (requires { random.below(n); }) {
      return random.below(n);
    } else {
      return random() % n;
    }
  }
  bool chance(unsigned percent) { return below(100) < percent; }
  std::uint64_t some_entry() { return used_entries[below(used_entries.size())]; }
  gva address() {
    if (Mode::levels == 0)
      return {(chance(90) ? some_frame() : 3000 + below(2)) * page_size | below(page_size) | below(3) << 32};
    std::uint64_t a = 0;
    for (unsigned l = 1; l <= Mode::levels; ++l) a |= some_entry() << shift_of(l);
    return {a | below(page_size)};
  }
  static constexpr unsigned shift_of(unsigned level) { return 12 + (sizeof(entry) == 4 ? 10U : 9U) * (level - 1); }
  /// A PDPTE that is present has a reserved bit now and then.
  std::uint64_t random_pdpte() {
    return (32 + below(tables)) << 12 | (chance(85) ? pte::present : 0) | (chance(4) ? pte::writable : 0);
  }
  std::uint64_t random_entry() {
    std::uint64_t e = (chance(75) ? 32 + below(tables) : chance(70) ? some_frame() : 3000 + below(2)) << 12;
    if (chance(96)) e |= pte::present;
    if (chance(92)) e |= pte::writable;
    if (chance(95)) e |= pte::user;
    if (chance(40)) e |= pte::accessed;
    if (chance(40)) e |= pte::dirty;
    if (chance(5) && sizeof(entry) == 8) e |= pte::no_execute;
    if (chance(30) && Mode::has_keys) e |= below(16) << pte::protection_key_shift;
    if (chance(8)) e = (e & ~pte::address) | pte::large | (chance(70) && sizeof(entry) == 8 ? run << 12 : 0);
    return e;
  }
  void write_entry() {
    const std::uint64_t table = below(tables);
    const gpa where{(32 + table) * page_size + some_entry() * sizeof(entry)};
    m.host.read_only.erase(machine::host_of(where.page()).value);  // rights that grow need no bracket
    written.insert(frame_of(where).value);
    const std::uint64_t e = pae && table < 2 ? random_pdpte() : random_entry();
    CHECK(m.write(where, static_cast<entry>(e)) == errc::ok);
  }
  std::uint64_t some_frame() { return chance(70) ? below(machine::pages) : run + below(512); }
  /// The large page of the host comes back, in other frames.
  void host_collapses() {
    const hva at = machine::host_of({run * page_size});
    const auto h = static_cast<std::uintptr_t>(at.value);
    const range r{h, h + 512 * page_size};
    m.start(r);
    for (std::uint64_t i = 0; i < 512; ++i) m.host.read_only.erase(at.value + i * page_size);
    m.host.place_run(at, 21, 512);
    m.end(r);
  }
  void host_changes(std::uint64_t frame) {
    const hva at = machine::host_of({frame * page_size});
    m.start(x86::page_range(at));
    if (frame >= run) m.host.split_run(machine::host_of({run * page_size}));
    m.host.migrate(at);
    if (chance(20)) {
      was_rom.insert(frame);
      if (m.host.read_only.erase(at.value) == 0) m.host.read_only[at.value] = true;
    }
    m.end(x86::page_range(at));
  }
  /// Effects: a write of a register that loads the PDPTEs. It goes well unless one of them is bad, and only then
  /// counts.
  template <class Write>
  void reload(cpu_type& cpu, std::uint64_t cr3, bool changes, Write&& write) {
    auto& held = pdptes[&cpu == &cpus[0] ? 0 : 1];
    const x86::walk_context before = cpu.registers();
    auto loaded = held;
    bool bad = false;
    for (std::uint64_t i = 0; pae && changes && i < 4; ++i) {
      loaded[i] = m.read64({cr3 + 8 * i});
      bad = bad || ((loaded[i] & 1) != 0 && (loaded[i] & 0x1e6) != 0);
    }
    REQUIRE(write() == (bad ? errc::bad_range : errc::ok));
    if (!bad) held = loaded;
    if (bad) {
      REQUIRE(cpu.registers().cr3 == before.cr3);
      REQUIRE(cpu.registers().smep == before.smep);
      REQUIRE(cpu.registers().pse == before.pse);
    }
    if (pae) REQUIRE(cpu.registers().pdptes == held);
  }
  void change_registers(cpu_type& cpu) {
    const std::uint64_t cr3 = (32 + below(2)) * page_size, now = cpu.registers().cr3;
    const bool on = chance(50);
    switch (below(10)) {
      case 0: reload(cpu, cr3, true, [&] { return cpu.set_cr3(cr3); }); break;
      case 1: cpu.set_wp(on); break;
      case 2: reload(cpu, now, on != cpu.registers().smep, [&] { return cpu.set_smep(on); }); break;
      case 3: cpu.set_smap(on); break;
      case 4: cpu.set_nxe(chance(80)); break;
      case 5: cpu.set_ac(on); break;
      case 6: reload(cpu, now, on != cpu.registers().pse, [&] { return cpu.set_pse(on); }); break;
      case 7: change_keys(cpu); break;
      default: cpu.set_cpl(on ? 3 : 0); break;
    }
  }

  /// Keys of modes that have none are switched on as well, and mean nothing.
  void change_keys(cpu_type& cpu) {
    const auto some_rights = [this] { return static_cast<std::uint32_t>(random() & random()); };
    switch (below(3)) {
      case 0: cpu.set_pkru(some_rights()); break;
      case 1: cpu.set_pkrs(some_rights()); break;
      default: {
        x86::control_registers next = cpu.controls();
        next.cr4 ^= chance(50) ? x86::cr4::pke : x86::cr4::pks;
        next.pkru = some_rights();
        REQUIRE(cpu.set_controls(next) == errc::ok);
      }
    }
  }

  void do_access(cpu_type& cpu) {
    constexpr x86::access kinds[] = {access::read, access::write, access::fetch, access::implicit_read,
                                     access::implicit_write};
    const gva a = address();
    const x86::access how = kinds[below(5)];
    // Without tables the script runs in the look-up of the page itself, after the host has answered.
    const bool rom =
        Mode::levels == 0 && m.host.read_only.count(machine::host_of(gpa{a.value & 0xfffff000}).value) != 0;
    if (chance(15)) m.host.during_pin = [&](hva, bool) { host_changes(some_frame()); };
    const seen s = touch(cpu, a, how);
    m.host.during_pin = nullptr;
    if (s.at != nullptr && x86::is_write(how)) wrote_freely(s);
    raw_memory<machine> raw{m};
    const auto expected = x86::guest_walker<Mode>(cpu.registers()).translate(raw, a, how);
    hold_against_manual(cpu, a, how, expected);
    if (rom && x86::is_write(how) && s.result.what == outcome::not_mapped) return flush_pending();
    compare(s, expected, how);
    flush_pending();
  }

  /// A write may be to a table of the guest's own; it changes an entry there after the access was judged, and flushes.
  void wrote_freely(const seen& s) {
    for (std::uint64_t t = 0; t < tables; ++t) {
      std::byte* const table = m.host.bytes(machine::host_of({(32 + t) * page_size}));
      if (s.at < table || s.at >= table + page_size) continue;
      if (pae && t < 2) continue;  // registers count, and what is here need not be a PDPTE
      pending = reinterpret_cast<entry*>(table) + some_entry();
    }
  }
  void flush_pending() {
    if (pending == nullptr) return;
    std::atomic_ref<entry>(*pending).store(static_cast<entry>(random_entry()));
    pending = nullptr;
    ++freely;
    for (auto& cpu : cpus) {
      switch (below(3)) {
        case 0: cpu.flush_tlb(); break;
        case 1:
          reload(cpu, cpu.registers().cr3, true, [&] { return cpu.set_cr3(cpu.registers().cr3); });
          cpu.flush_tlb();  // a PDPTE may have been bad
          break;
        default:
          for (int i = 0; i < 40; ++i) cpu.invlpg(address());
          // Large leaves have no table of their own; other roots may lead to the table as well.
          cpu.flush_tlb();
      }
    }
  }

  static constexpr unsigned top_in_memory = pae ? Mode::levels - 1 : Mode::levels;

  /// The walk made anew is what the manual says of these entries.
  void hold_against_manual(cpu_type& cpu, gva a, x86::access how, const x86::walk_result& found) {
    if (found.status == x86::walk_status::memory_error) return;
    walk_test::reference_case k{.c = cpu.registers(), .how = how, .va = a.value, .levels = Mode::levels};
    std::uint64_t table = k.c.cr3 & ~std::uint64_t{0xfff};
    for (unsigned level = Mode::levels; level > 0; --level) {
      const std::uint64_t i = a.value >> shift_of(level) & (sizeof(entry) == 4 ? 1023 : 511);
      std::uint64_t& e = k.entries[level - 1];
      if (pae && level == 3) {
        e = pdptes[&cpu == &cpus[0] ? 0 : 1][i & 3];
      } else {
        const gpa where{table + i * sizeof(entry)};
        if (!m.host.has(machine::host_of(where.page()))) break;
        e = m.template read<entry>(where);
      }
      table = e & pte::address;
    }
    const walk_test::reference_outcome o = walk_test::reference_walk(k).run();
    using kind = walk_test::reference_outcome;
    REQUIRE((o.what == kind::done) == static_cast<bool>(found));
    if (o.what == kind::done) REQUIRE(found.address.value == o.pa);
    if (o.what == kind::page_fault) REQUIRE(found.code.bits == o.code);
  }

  void compare(const seen& s, const x86::walk_result& expected, x86::access how) {
    switch (expected.status) {
      case x86::walk_status::page_fault:
        ++faulted;
        REQUIRE(s.result == outcome{.what = outcome::page_fault, .code = expected.code});
        return;
      case x86::walk_status::memory_error:
        REQUIRE(s.result == outcome{.what = outcome::not_mapped, .address = expected.entry(expected.end_level).where});
        return;
      case x86::walk_status::general_protection: FAIL("the addresses are canonical"); return;
      case x86::walk_status::ok: break;
    }
    const hva at = machine::host_of(expected.address.page());
    const bool there = m.host.has(at);
    if (!there || (x86::is_write(how) && m.host.read_only.count(at.value) != 0)) {
      ++refused;
      REQUIRE(s.result == outcome{.what = outcome::not_mapped, .address = expected.address});
      return;
    }
    if (s.result.what == outcome::write_tracked) {
      ++tracked;
      REQUIRE(x86::is_write(how));
      REQUIRE(s.result.address == expected.address);
      return;
    }
    ++done;
    REQUIRE(s.result.what == outcome::done);
    REQUIRE(s.at == m.host.bytes(machine::host_of(expected.address)));
    if (x86::is_write(how)) written.insert(frame_of(expected.address).value);
    for (unsigned level = expected.end_level; level > 0 && level <= top_in_memory; ++level) {
      const x86::walked_entry& e = expected.entry(level);
      if (was_rom.count(frame_of(e.where).value) != 0) continue;
      REQUIRE((e.value & pte::accessed) != 0);
      if (level == expected.end_level && x86::is_write(how)) REQUIRE((e.value & pte::dirty) != 0);
    }
  }

  /// The primary withdraws write access to the page behind some address.
  void withdraw(cpu_type& cpu) {
    raw_memory<machine> raw{m};
    const gva a = address();
    const auto found = x86::guest_walker<Mode>(cpu.registers()).translate(raw, a, access::read);
    if (!found || frame_of(found.address).value >= slot_pages) return;
    const range r = x86::page_range(machine::host_of(found.address));
    m.start(r, event::soft_dirty);
    REQUIRE_FALSE(cpu.hits(a, access::write));
    REQUIRE(m.mmu.verify() == nullptr);
    m.end(r, event::soft_dirty);
  }

  void log_something() {
    if (!logging || chance(20)) {
      constexpr x86::dirty_tracking kinds[] = {x86::dirty_tracking::off, x86::dirty_tracking::write_protect,
                                               x86::dirty_tracking::dirty_bits};
      const auto kind = kinds[below(3)];
      REQUIRE(m.mmu.log_writes(1, kind) == errc::ok);
      logging = kind != x86::dirty_tracking::off;
    } else {
      std::array<std::uint64_t, slot_pages / 64> words{};
      REQUIRE(m.mmu.harvest_writes(1, words) == errc::ok);
      for (const std::uint64_t f : written) REQUIRE((words[f / 64] >> (f % 64) & 1) == 1);
      harvested += written.size();
    }
    written.clear();
  }

  void step() {
    cpu_type& cpu = cpus[below(2)];
    const std::uint64_t dice = below(100);
    if (dice < 68) return do_access(cpu);
    if (dice < 79) return write_entry();
    if (dice < 86) return host_changes(some_frame());
    if (dice < 92) return change_registers(cpu);
    if (dice < 94) return withdraw(cpu);
    if (dice < 96) return log_something();
    if (dice < 97) return static_cast<void>(m.mmu.clear_flush_young({0, UINTPTR_MAX}));
    if (dice < 98) return cpu.invlpg(address());
    if (dice < 99) return chance(30) ? m.mmu.zap_all() : host_collapses();
    CHECK(m.mmu.move_slot(1, {1 << 16}) == errc::ok);
    CHECK(m.mmu.move_slot(1, {0}) == errc::ok);
    logging = false;
    written.clear();
  }
};

}  // namespace shadow_test
