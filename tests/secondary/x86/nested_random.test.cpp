// SPDX-License-Identifier: MIT

// A guest hypervisor, its guest and the host do anything at all, and each access is held against the rules, which walk
// everything anew (nested_reference.hpp, reference_walk.hpp): neither set of tables is read by the library's walkers.

#include <mmunotify/secondary/x86/nested_vcpu.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <set>

#include "nested_fixture.hpp"
#include "nested_reference.hpp"

using namespace nested_test;

namespace {

struct random_nest {
  static constexpr std::uint64_t slot_pages = 1536;
  static constexpr std::uint64_t run = 512;  ///< frames 512 to 1023 of L1 are one large page of the host, at first
  /// Frames of L1's tables, by level; its guest's tables.
  static constexpr std::array<std::array<std::uint64_t, 3>, 6> second_tables{
      {{}, {38, 39, 46}, {36, 37, 36}, {34, 35, 34}, {32, 33, 32}, {47, 47, 47}}};
  static constexpr std::uint64_t l2_tables = 40, l2_table_count = 6, pdpte_table = 5;

  nested_machine m;
  nested_machine::nested_cpu other;
  std::array<nested_machine::nested_cpu*, 2> cpus{&m.l2, &other};
  std::mt19937_64 random;
  bool npt, unsync;
  bool logging = false;
  bool toggled = false;             ///< the host made a page read-only, or writable, during the access
  bool self = false;                ///< what the walk marks changes its meaning: by the rules it may end otherwise
  std::set<std::uint64_t> written;  ///< frames of L1, since the last harvest
  std::set<std::uint64_t> was_rom;  ///< walks through these may have left no traces
  std::vector<std::pair<gpa, bool>> used_entries;  ///< L1's entries that the access goes through; dirty as well
  std::array<std::uint64_t, 12> seen{};            ///< outcomes
  std::uint64_t freely = 0, harvested = 0;

  const x86::nested_capabilities can;
  std::array<std::array<std::uint64_t, 4>, 2> pdptes{};  ///< of each vCPU
  std::uint64_t loaded = 0, in_pae = 0;

  random_nest(std::uint64_t s, bool with_npt, unsigned levels, const x86::mmu_options& o,
              const x86::nested_capabilities& c)
      : m(with_npt, o, slot_pages, c), other(m.mmu, c), random(s), npt(with_npt), unsync(o.unsync), can(c) {
    m.levels = levels;
    m.host.place_run(m.host_of({run * page_size}), 21, 512);
    for (int i = 0; i < 300; ++i) write_second();
    for (int i = 0; i < 120; ++i) write_l2_entry();
    for (auto* cpu : cpus) {
      enter(*cpu);
      set_registers(*cpu);
    }
  }
  std::uint64_t below(std::uint64_t n) { return random() % n; }
  bool chance(unsigned percent) { return below(100) < percent; }
  std::uint64_t some_frame() { return chance(70) ? below(32) : run + below(512); }
  /// Frames that hold tables of L1's.
  static bool holds_second(std::uint64_t f) { return (f >= 32 && f < 40) || f == 46 || f == 47; }

  // --- What L1 writes. ----------------------------------------------------------------------------------------------

  std::uint64_t second_entry_of(unsigned level) {
    if (chance(4)) return chance(50) ? 0 : random() << 3;
    std::uint64_t e = 0;
    const bool large = level == 2 ? chance(12) : level == 3 && chance(6);
    if (large) {
      e = (level == 2 && chance(60) ? run << 12 : 0) | epte::large;
    } else if (level > 1) {
      e = second_tables[level - 1][below(3)] << 12;
    } else {
      e = (chance(58)   ? l2_tables + below(l2_table_count)
           : chance(80) ? some_frame()
           : chance(40) ? 3000 + below(2)
                        : 32 + below(8))
          << 12;
    }
    if (npt) {
      e |= pte::present | (chance(94) ? pte::writable : 0) | (chance(97) ? pte::user : 0) |
           (chance(4) ? pte::no_execute : 0) | (chance(50) ? pte::accessed : 0) | (chance(50) ? pte::dirty : 0);
    } else {
      e |= (chance(97) ? epte::read : 0) | (chance(93) ? epte::write : 0) | (chance(93) ? epte::execute : 0) |
           (chance(50) ? epte::accessed : 0) | (chance(50) ? epte::dirty : 0);
      if (large || level == 1) e |= chance(97) ? epte::write_back : below(8) << 3;
    }
    const std::uint64_t flipped = chance(1) ? e | std::uint64_t{1} << below(64) : e;
    // What is no table of L1's, or one of another level, does not become one: others write it, unseen.
    const std::uint64_t moved = (flipped ^ e) & pte::address, frame = (flipped & pte::address) >> page_shift;
    return level > 1 && !large && moved != 0 && frame < slot_pages ? e : flipped;
  }
  void write_second() {
    const unsigned level = 1 + static_cast<unsigned>(below(m.levels));
    const gpa where{second_tables[level][below(3)] * page_size + 8 * below(level == 1 ? 8 : 2)};
    const std::uint64_t e = second_entry_of(level);
    m.host.read_only.erase(m.host_of(where.page()).value);  // rights that grow need no bracket
    written.insert(frame_of(where).value);
    const outcome o = m.l1.access({where.value}, access::write, [&](std::byte* at) noexcept {
      std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at)).store(e);
    });
    if (o.what == outcome::write_tracked) {
      REQUIRE(m.write64(where, e) == errc::ok);
      return;
    }
    REQUIRE(o.what == outcome::done);
    if (!unsync) return;
    ++freely;
    for (auto* cpu : cpus) {
      if (chance(50)) {
        cpu->invept();
      } else {
        REQUIRE(cpu->invept(m.pointer(chance(50))) == pointer_error::none);
      }
    }
  }

  // --- What L2 writes, unseen. --------------------------------------------------------------------------------------

  std::uint64_t second_page() {
    const std::uint64_t top = m.levels == 5 ? below(2) << 48 : 0;
    return top | below(8) << 12 | below(2) << 21 | below(2) << 30 | below(2) << 39;
  }
  void write_l2_entry() {
    std::uint64_t e = chance(75) ? below(l2_table_count) << 12 : second_page();
    if (chance(1)) e |= std::uint64_t{1} << 50;
    e |= (chance(96) ? pte::present : 0) | (chance(93) ? pte::writable : 0) | (chance(95) ? pte::user : 0) |
         (chance(40) ? pte::accessed : 0) | (chance(40) ? pte::dirty : 0) | (chance(4) ? pte::no_execute : 0);
    if (chance(6)) e = (e & ~bit_range_of(12, 20)) | pte::large;
    const std::uint64_t n = below(l2_table_count);
    if (n == pdpte_table && chance(90)) e &= pte::address | pte::present;
    std::byte* const table = m.now({(l2_tables + n) * page_size});
    std::atomic_ref<std::uint64_t>(reinterpret_cast<std::uint64_t*>(table)[below(3)]).store(e);
  }
  static constexpr std::uint64_t bit_range_of(unsigned first, unsigned last) { return x86::bit_range(first, last); }

  // --- The rest. ----------------------------------------------------------------------------------------------------

  void enter(nested_machine::nested_cpu& cpu) {
    m.second = second_tables[m.levels][below(2)] * page_size;
    REQUIRE(cpu.enter(m.pointer(chance(50))) == pointer_error::none);
  }
  void set_registers(nested_machine::nested_cpu& cpu) {
    x86::control_registers r = m.long_mode(below(l2_table_count) << 12);
    if (chance(20)) r.cr4 = r.efer = 0;  // two levels
    if (chance(10)) r = {};
    if (chance(30)) r.cr0 &= ~x86::cr0::wp;
    cpu.set_cpl(chance(50) ? 3 : 0);
    if (r.cr0 != 0 && chance(25)) return set_pae(cpu, r.cr0);
    REQUIRE(cpu.set_controls(r).what == nested_outcome::done);
  }
  /// Under EPT the PDPTEs are loaded now, and as plain reads; under NPT by each walk.
  void set_pae(nested_machine::nested_cpu& cpu, std::uint64_t cr0) {
    const x86::control_registers r{
        .cr0 = cr0,
        .cr3 = (chance(80) ? pdpte_table : below(l2_table_count)) << 12 | (chance(20) ? 32 : 0),
        .cr4 = x86::cr4::pae,
        .efer = chance(70) ? x86::efer::nxe : 0};
    std::array<std::uint64_t, 4> now{};
    nested_outcome expected;
    for (unsigned i = 0; i < 4 && !npt && expected.what == nested_outcome::done; ++i) {
      const where_to to = second(cpu, {r.cr3 + 8 * i}, true, false, false, true, false);
      expected = to.refused;
      if (expected.what != nested_outcome::done) continue;
      if (!there(to.address)) {
        expected = elsewhere(nested_outcome::not_mapped, to.address);
      } else {
        now[i] = m.read64(to.address);
      }
    }
    if (expected.what == nested_outcome::done && !npt && !may_be_loaded(now, 40))
      expected.what = nested_outcome::general_protection;
    const x86::walk_context before = cpu.registers();
    REQUIRE(cpu.set_controls(r) == expected);
    if (expected.what != nested_outcome::done) {
      REQUIRE(cpu.registers().cr3 == before.cr3);
      return;
    }
    pdptes[&cpu == cpus[1]] = now;
    ++loaded;
  }
  void host_changes(std::uint64_t frame) {
    const hva at = m.host_of({frame * page_size});
    m.start(x86::page_range(at));
    if (frame >= run) m.host.split_run(m.host_of({run * page_size}));
    m.host.migrate(at);
    if (chance(20)) {
      toggled = true;
      was_rom.insert(frame);
      if (m.host.read_only.erase(at.value) == 0) m.host.read_only[at.value] = true;
    }
    m.end(x86::page_range(at));
  }
  std::uint64_t any_frame() { return chance(50) ? 32 + below(16) : some_frame(); }
  void host_collapses() {
    const hva at = m.host_of({run * page_size});
    const auto h = static_cast<std::uintptr_t>(at.value);
    m.start({h, h + 512 * page_size});
    for (std::uint64_t i = 0; i < 512; ++i) m.host.read_only.erase(at.value + i * page_size);
    m.host.place_run(at, 21, 512);
    m.end({h, h + 512 * page_size});
  }
  void withdraw() {
    const hva at = m.host_of({any_frame() * page_size});
    m.start(x86::page_range(at), event::soft_dirty);
    REQUIRE(m.broken() == "");
    m.end(x86::page_range(at), event::soft_dirty);
  }
  void log_something() {
    constexpr x86::dirty_tracking kinds[] = {x86::dirty_tracking::off, x86::dirty_tracking::write_protect,
                                             x86::dirty_tracking::dirty_bits};
    if (!logging || chance(35)) {
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

  // --- The rules. ---------------------------------------------------------------------------------------------------

  bool there(gpa at) { return frame_of(at).value < slot_pages && m.host.has(m.host_of(at.page())); }
  bool rom(gpa at) { return m.host.read_only.count(m.host_of(at.page()).value) != 0; }

  struct where_to {
    nested_outcome refused;  ///< done: not refused
    gpa address{};
  };
  /// One access of L2 to its physical memory, as L1's tables have it.
  where_to second(const nested_machine::nested_cpu& cpu, l2_gpa at, bool reads, bool writes, bool fetches, bool table,
                  bool linear) {
    const nested_pointer p = cpu.tables();
    const bool marks = !npt && (p.value & x86::eptp::accessed_dirty) != 0;
    const second_level rules{.npt = npt,
                             .levels = m.levels,
                             .root = p.value & pte::address,
                             .marks = marks,
                             .execute_only = can.execute_only,
                             .gib_pages = can.gib_pages,
                             .width = can.maxphyaddr};
    const second_answer r =
        second_walk(rules, at.value, reads, writes, fetches, [&](std::uint64_t w, std::uint64_t& e) {
          if (!there({w})) return false;
          e = m.read64({w});
          return true;
        });
    if (npt || marks) {
      for (const std::uint64_t w : r.used) used_entries.emplace_back(gpa{w}, writes && w == r.used.back());
    }
    switch (r.what) {
      case second_answer::ok: return {{}, {r.address}};
      case second_answer::unreadable: return {elsewhere(nested_outcome::not_mapped, {r.address})};
      case second_answer::misconfigured: return {misconfiguration(at)};
      case second_answer::forbidden: break;
    }
    if (npt) return {npf(at, r.info | (table ? std::uint64_t{1} << 33 : std::uint64_t{1} << 32))};
    return {violation(at, r.info | (linear ? 0x80U : 0U) | (linear && !table ? 0x100U : 0U))};
  }

  bool asks(const nested_machine::nested_cpu& cpu) const {
    return npt || (cpu.tables().value & x86::eptp::accessed_dirty) != 0;
  }

  /// The final access. frames: those that are written on the way.
  nested_outcome expect(const nested_machine::nested_cpu& cpu, l2_gpa at, x86::access how, bool linear, gpa& found) {
    const where_to to = second(cpu, at, how == access::read, how == access::write, how == access::fetch, false, linear);
    if (to.refused.what != nested_outcome::done) return to.refused;
    found = to.address;
    if (!there(to.address) || (how == access::write && rom(to.address))) {
      return elsewhere(nested_outcome::not_mapped, to.address);
    }
    return {};
  }
  nested_outcome expect(const nested_machine::nested_cpu& cpu, gva at, x86::access how, gpa& found,
                        std::vector<gpa>& marked) {
    nested_outcome refused;
    std::vector<gpa> entries;
    const auto read = [&](std::uint64_t where, unsigned bytes, std::uint64_t& value) {
      const where_to to = second(cpu, {where}, true, asks(cpu), false, true, true);
      refused = to.refused;
      if (refused.what == nested_outcome::done && !there(to.address))
        refused = elsewhere(nested_outcome::not_mapped, to.address);
      if (refused.what != nested_outcome::done) return false;
      self = self || holds_second(frame_of(to.address).value);
      // One word that two levels read, by whatever addresses: to mark one is to change the other, and a walk may start
      // again between the two.
      self = self || std::find(entries.begin(), entries.end(), to.address) != entries.end();
      entries.push_back(to.address);
      value = bytes == 4 ? m.read<std::uint32_t>(to.address) : m.read64(to.address);
      return true;
    };
    const first_answer w = first_walk(cpu.registers(), levels_of(cpu.mode()), at.value, how,
                                      npt ? nullptr : &pdptes[&cpu == cpus[1]], read);
    if (w.unreadable) return refused;
    using walk_test::reference_outcome;
    if (w.judged.what == reference_outcome::general_protection) return {.what = nested_outcome::general_protection};
    if (w.judged.what == reference_outcome::page_fault)
      return {.what = nested_outcome::page_fault, .code = {w.judged.code}};
    for (const auto& mark : w.marks) {
      const where_to to = second(cpu, {mark.where}, asks(cpu) && !npt, true, false, true, true);
      if (to.refused.what != nested_outcome::done) return to.refused;
      marked.emplace_back(to.address);
    }
    if (cpu.mode() == x86::paging::pae) ++in_pae;
    return expect(cpu, {w.judged.pa}, how, true, found);
  }
  static unsigned levels_of(x86::paging p) {
    return p == x86::paging::two_level ? 2 : p == x86::paging::pae ? 3 : p == x86::paging::long_4 ? 4 : 0;
  }

  template <class Address>
  void do_access(nested_machine::nested_cpu& cpu, Address at) {
    constexpr x86::access kinds[] = {access::read, access::write, access::fetch};
    const x86::access how = kinds[below(3)];
    gpa found{};
    std::vector<gpa> marked;
    self = toggled = false;
    used_entries.clear();
    nested_outcome expected;
    if constexpr (std::is_same_v<Address, gva>) {
      expected = expect(cpu, at, how, found, marked);
    } else {
      expected = expect(cpu, at, how, false, found);
    }
    if (chance(15)) m.host.during_pin = [&](hva, bool) { host_changes(any_frame()); };
    const nested_seen s = touch2(cpu, at, how);
    m.host.during_pin = nullptr;
    ++seen[s.result.what];
    if (s.at != nullptr && how == access::write && logging) written.insert(frame_of(found).value);
    if (self) return;
    if (toggled && (s.result.what == nested_outcome::not_mapped || expected.what == nested_outcome::not_mapped)) return;
    if (s.result.what == nested_outcome::write_tracked) {
      REQUIRE(how == access::write);
      REQUIRE(expected.what == nested_outcome::done);
      REQUIRE(holds_second(frame_of(found).value));
      REQUIRE(s.result.address == found);
      return;
    }
    REQUIRE(s.result == expected);
    if (expected.what != nested_outcome::done) return;
    REQUIRE(s.at == m.now(found));
    check_marks(marked);
  }
  /// The access has left its traces.
  void check_marks(const std::vector<gpa>& marked) {
    for (const auto& [where, dirty] : used_entries) {
      const std::uint64_t e = m.read64(where);
      if (was_rom.count(frame_of(where).value) != 0) continue;
      REQUIRE((e & (npt ? pte::accessed : epte::accessed)) != 0);
      if (dirty) REQUIRE((e & (npt ? pte::dirty : epte::dirty)) != 0);
    }
    for (const gpa where : marked) {
      if (was_rom.count(frame_of(where).value) != 0) continue;
      REQUIRE((m.read<std::uint32_t>(where) & pte::accessed) != 0);
      written.insert(frame_of(where).value);
    }
  }

  void step() {
    nested_machine::nested_cpu& cpu = *cpus[below(2)];
    const std::uint64_t dice = below(100);
    if (dice < 40) {
      std::uint64_t a = below(page_size / 8) * 8;
      for (unsigned l = 1; l <= 4; ++l)
        a |= below(cpu.mode() == x86::paging::long_4 || cpu.mode() == x86::paging::pae ? 3
                   : l < 3                                                             ? 6
                                                                                       : 1)
             << (12 + 9 * (l - 1));
      return do_access(cpu, gva{a});
    }
    if (dice < 65)
      return do_access(cpu, l2_gpa{second_page() | below(page_size) | (chance(1) ? std::uint64_t{1} << 50 : 0)});
    if (dice < 76) return write_second();
    if (dice < 82) return write_l2_entry();
    if (dice < 88) return host_changes(any_frame());
    if (dice < 90) return enter(cpu);
    if (dice < 93) return set_registers(cpu);
    if (dice < 94) return withdraw();
    if (dice < 97) return log_something();
    if (dice < 98) return static_cast<void>(m.mmu.clear_flush_young({0, UINTPTR_MAX}));
    if (dice < 99) {
      if (chance(30)) return m.mmu.zap_all();
      if (chance(30)) return static_cast<void>(m.mmu.recover_large(1 + below(4)));
      return host_collapses();
    }
    CHECK(m.mmu.move_slot(1, {1 << 16}) == errc::ok);
    CHECK(m.mmu.move_slot(1, {0}) == errc::ok);
    logging = false;
    written.clear();
  }
};

}  // namespace

TEST_CASE("every access of a nested guest is what both sets of tables say at that moment, whatever all sides do") {
  std::array<std::uint64_t, 12> seen{};
  std::uint64_t freely = 0, harvested = 0, loaded = 0, in_pae = 0;
  x86::mmu_statistics sum{};
  for (std::uint64_t round = 0; round < 32; ++round) {
    const auto has = [&](unsigned n) { return (round >> n & 1) != 0; };
    const x86::mmu_options options{.unsync = has(1), .prefetch = has(2), .eager_split = has(3), .nx_huge = has(4)};
    const x86::nested_capabilities can{
        .maxphyaddr = round % 3 == 0 ? 36U : 40U, .gib_pages = round % 5 != 0, .execute_only = round % 7 != 0};
    random_nest n(seed() + round, has(0), round % 3 == 1 ? 5 : 4, options, can);
    CAPTURE(round);
    for (int i = 0; i < 6000; ++i) {
      n.step();
      if (i % 20 == 0) REQUIRE(n.m.broken() == "");
    }
    CHECK(n.m.host.on_loan() == 0);
    for (std::size_t i = 0; i < seen.size(); ++i) seen[i] += n.seen[i];
    const auto s = n.m.mmu.statistics();
    freely += n.freely;
    harvested += n.harvested;
    loaded += n.loaded;
    in_pae += n.in_pae;
    sum.large += s.large;
    sum.resynced += s.resynced;
    sum.tracked_writes += s.tracked_writes;
    sum.prefetched += s.prefetched;
    sum.split += s.split;
  }
  MESSAGE("done ", seen[0], " #PF ", seen[1], " violations ", seen[3], " misconfigurations ", seen[4], " nested #PF ",
          seen[5], " tracked ", seen[6], " not mapped ", seen[7], "; followed writes ", sum.tracked_writes,
          " free writes ", freely, " synchronised ", sum.resynced, " large ", sum.large, " split ", sum.split,
          " prefetched ", sum.prefetched, " harvested ", harvested, " PAE ", loaded, ", accesses there ", in_pae);
  for (const std::size_t kind : {0U, 1U, 3U, 4U, 5U, 6U, 7U}) CHECK(seen[kind] > 20);
  CHECK(in_pae > 5);
  CHECK(sum.split > 5);
  for (const std::uint64_t n : {freely, harvested, loaded, std::uint64_t{sum.large}, std::uint64_t{sum.resynced},
                                std::uint64_t{sum.tracked_writes}, std::uint64_t{sum.prefetched}}) {
    CHECK(n > 20);
  }
}
