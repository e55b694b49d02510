// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/direct_mmu.hpp>

#include <doctest/doctest.h>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/primary/reference_mmu.hpp>
#include <mmunotify/secondary/x86/direct_vcpu.hpp>

#include <set>

#include "shadow_fixture.hpp"

using namespace shadow_test;
using x86::dirty_tracking;

namespace {
template <class Format>
struct direct_machine {
  using direct_type = x86::direct_mmu<scripted_host, Format>;
  static constexpr std::uint64_t pages = 64;

  scripted_host host;
  direct_type mmu{host};
  x86::direct_vcpu<direct_type> cpu{mmu};

  explicit direct_machine(std::uint64_t slot_pages = pages) {
    for (std::uint64_t i = 0; i < pages; ++i) host.place(ram_base + i * page_size);
    CHECK(mmu.add_slot({.id = 1, .base = {0}, .pages = slot_pages, .host = ram_base}) == errc::ok);
  }
  static gpa at(std::uint64_t f, std::uint64_t offset = 0) { return {f * page_size + offset}; }
  static range bytes_of(std::uint64_t f) { return x86::page_range(ram_base + f * page_size); }
  std::byte* now(std::uint64_t f, std::uint64_t offset = 0) { return host.bytes(ram_base + f * page_size + offset); }
  void start(std::uint64_t f, event e = event::unmap) { mmu.invalidate_range_start({bytes_of(f), e}); }
  void end(std::uint64_t f, event e = event::unmap) { mmu.invalidate_range_end({bytes_of(f), e}); }
  void migrate(std::uint64_t f) {
    start(f);
    host.migrate(ram_base + f * page_size);
    end(f);
  }
  void check() {
    const char* broken = mmu.verify();
    CHECK(std::string(broken != nullptr ? broken : "") == "");
    CHECK(host.on_loan() == 0);
  }
  std::set<std::uint64_t> harvest() {
    std::array<std::uint64_t, 1> words{};
    CHECK(mmu.harvest_writes(1, words) == errc::ok);
    std::set<std::uint64_t> frames;
    for (std::uint64_t i = 0; i < 64; ++i) {
      if ((words[0] >> i & 1) != 0) frames.insert(i);
    }
    return frames;
  }
};
using frames = std::set<std::uint64_t>;
}  // namespace

#define FORMATS x86::ept_format, x86::npt_format

TEST_CASE_TEMPLATE("guest-physical memory is reached, byte by byte, and what is not there is said", F, FORMATS) {
  direct_machine<F> m;
  CHECK(touch(m.cpu, m.at(5, 7), access::read).at == m.now(5, 7));
  CHECK(touch(m.cpu, m.at(5, 8), access::write).at == m.now(5, 8));
  CHECK(m.mmu.statistics().faults == 1);
  for (const std::uint64_t f : {std::uint64_t{64}, std::uint64_t{1} << 36, std::uint64_t{1} << 51}) {
    CHECK(touch(m.cpu, m.at(f), access::read).result == outcome{.what = outcome::not_mapped, .address = m.at(f)});
  }
  m.host.read_only[(ram_base + 6 * page_size).value] = true;
  CHECK(touch(m.cpu, m.at(6), access::read).at == m.now(6));
  CHECK(touch(m.cpu, m.at(6), access::write).result.what == outcome::not_mapped);
  m.host.refuses[(ram_base + 7 * page_size).value] = errc::no_memory;
  CHECK(m.cpu.prefault(m.at(7), access::read).what == outcome::no_memory);
  m.check();
}

TEST_CASE_TEMPLATE("K1: nothing is installed over a bracket that is open or has run since the look-up", F, FORMATS) {
  direct_machine<F> m;
  m.host.during_pin = [&](hva, bool) { m.migrate(5); };
  CHECK(m.cpu.prefault(m.at(5), access::read).what == outcome::again);
  CHECK_FALSE(m.cpu.hits(m.at(5), access::read));
  m.host.during_pin = [&](hva, bool) { m.migrate(6); };  // C9: elsewhere
  CHECK(m.cpu.prefault(m.at(5), access::read).what == outcome::done);
  m.start(5);
  CHECK(m.cpu.prefault(m.at(5), access::read).what == outcome::again);
  CHECK_FALSE(m.cpu.hits(m.at(5), access::read));
  m.end(5);
  m.host.during_pin = [&](hva, bool) {
    m.mmu.release();
    m.mmu.resume();
  };
  CHECK(m.cpu.prefault(m.at(5), access::read).what == outcome::again);
  CHECK(touch(m.cpu, m.at(5), access::write).at == m.now(5));
  m.check();
}

TEST_CASE_TEMPLATE("K3: brackets, slots and releases leave nothing usable, and tables that are empty go", F, FORMATS) {
  direct_machine<F> m;
  for (std::uint64_t i = 0; i < 8; ++i) CHECK(touch(m.cpu, m.at(i), access::write).at == m.now(i));
  m.migrate(3);
  for (std::uint64_t i = 0; i < 8; ++i) CHECK(m.cpu.hits(m.at(i), access::write) == (i != 3));
  CHECK(touch(m.cpu, m.at(3), access::write).at == m.now(3));
  CHECK(m.mmu.add_slot({.id = 2, .base = {1 << 20}, .pages = 4, .host = ram_base}) == errc::ok);
  CHECK(touch(m.cpu, m.at(1 << 20), access::write).at == m.now(0));
  m.migrate(0);  // through both slots
  CHECK_FALSE(m.cpu.hits(m.at(1 << 20), access::read));
  CHECK(touch(m.cpu, m.at(1 << 20), access::write).at == m.now(0));
  CHECK(m.mmu.move_slot(2, {1 << 21}) == errc::ok);
  CHECK(touch(m.cpu, m.at(1 << 20), access::read).result.what == outcome::not_mapped);
  CHECK(m.mmu.remove_slot(2) == errc::ok);
  m.check();
  m.mmu.release();
  CHECK(m.mmu.find({0}).level == 4);  // not even a table
  CHECK(touch(m.cpu, m.at(1), access::read).result.what == outcome::released);
  m.mmu.resume();
  CHECK(touch(m.cpu, m.at(1), access::read).at == m.now(1));
  m.check();
}

TEST_CASE_TEMPLATE("O1: write access is withdrawn and frames replaced while reads go on", F, FORMATS) {
  direct_machine<F> m;
  CHECK(touch(m.cpu, m.at(5), access::write).at == m.now(5));
  m.start(5, event::soft_dirty);
  CHECK(m.cpu.hits(m.at(5), access::read));
  CHECK_FALSE(m.cpu.hits(m.at(5), access::write));
  CHECK(m.cpu.prefault(m.at(5), access::write).what == outcome::again);
  m.check();
  m.end(5, event::soft_dirty);
  CHECK(touch(m.cpu, m.at(5), access::write).at == m.now(5));
  const invalidation in_place{.range = m.bytes_of(5), .event = event::clear, .in_place = true};
  m.mmu.invalidate_range_start(in_place);
  CHECK_FALSE(m.cpu.hits(m.at(5), access::write));
  m.mmu.change_entry({.range = in_place.range, .frame = m.host.migrate(ram_base + 5 * page_size)});
  CHECK(touch(m.cpu, m.at(5), access::read).at == m.now(5));
  m.check();
  m.mmu.invalidate_range_end(in_place);
  CHECK(touch(m.cpu, m.at(5), access::write).at == m.now(5));
  CHECK(m.mmu.statistics().zapped == 0);
  m.check();
}

TEST_CASE_TEMPLATE("large pages of the host are one leaf, split by logs and by brackets over a part", F, FORMATS) {
  direct_machine<F> m(2048);
  const hva run = ram_base + 1024 * page_size;
  m.host.place_run(run, 21, 512);
  CHECK(touch(m.cpu, m.at(1030, 9), access::read).at == m.now(1030, 9));
  CHECK(m.mmu.statistics().large == 1);
  CHECK(touch(m.cpu, m.at(1500), access::write).at == m.now(1500));
  m.check();
  m.start(1100, event::soft_dirty);  // read-only as a whole, a write elsewhere in it needs a leaf of its own
  CHECK_FALSE(m.cpu.hits(m.at(1500), access::write));
  CHECK(touch(m.cpu, m.at(1500), access::write).at == m.now(1500));
  CHECK_FALSE(m.cpu.hits(m.at(1100), access::write));
  m.check();
  m.end(1100, event::soft_dirty);
  CHECK(touch(m.cpu, m.at(1100), access::write).at == m.now(1100));
  m.start(1024);
  m.host.split_run(run);
  m.host.migrate(run);
  m.end(1024);
  CHECK(touch(m.cpu, m.at(1024), access::write).at == m.now(1024));
  CHECK(touch(m.cpu, m.at(1025), access::write).at == m.now(1025));
  m.check();
  const auto r = x86::page_range(run);
  m.mmu.invalidate_range_start({{r.first, r.first + 512 * page_size}});
  m.host.place_run(run, 21, 512);
  m.mmu.invalidate_range_end({{r.first, r.first + 512 * page_size}});
  CHECK(touch(m.cpu, m.at(1200), access::write).at == m.now(1200));
  CHECK(m.cpu.hits(m.at(1201), access::write));
  REQUIRE(m.mmu.log_writes(1, dirty_tracking::write_protect) == errc::ok);
  CHECK_FALSE(m.cpu.hits(m.at(1200), access::read));
  CHECK(touch(m.cpu, m.at(1200), access::write).at == m.now(1200));
  CHECK_FALSE(m.cpu.hits(m.at(1201), access::read));
  m.check();
  REQUIRE(m.mmu.log_writes(1, dirty_tracking::off) == errc::ok);
  CHECK(touch(m.cpu, m.at(1200), access::read).at == m.now(1200));
  CHECK(m.cpu.hits(m.at(1201), access::write));
  m.check();
}

TEST_CASE_TEMPLATE("writes are logged by write protection and by dirty bits", F, FORMATS) {
  for (const dirty_tracking how : {dirty_tracking::write_protect, dirty_tracking::dirty_bits}) {
    direct_machine<F> m;
    CHECK(touch(m.cpu, m.at(1), access::write).at == m.now(1));
    REQUIRE(m.mmu.log_writes(1, how) == errc::ok);
    CHECK(m.harvest() == frames{});
    for (const std::uint64_t f : {1U, 2U, 9U}) CHECK(touch(m.cpu, m.at(f), access::write).at == m.now(f));
    CHECK(touch(m.cpu, m.at(4), access::read).at == m.now(4));
    CHECK(m.harvest() == frames{1, 2, 9});
    CHECK(m.harvest() == frames{});
    const auto faults = m.mmu.statistics().faults;
    CHECK(touch(m.cpu, m.at(4), access::write).at == m.now(4));
    CHECK(m.mmu.statistics().faults == faults);  // without a fault, either way
    m.migrate(4);
    CHECK(m.harvest() == frames{4});
    m.check();
    std::array<std::uint64_t, 2> two{};
    CHECK(m.mmu.harvest_writes(1, two) == errc::bad_range);
    CHECK(m.mmu.harvest_writes(2, two) == errc::not_registered);
    REQUIRE(m.mmu.log_writes(1, dirty_tracking::off) == errc::ok);
    CHECK(m.mmu.harvest_writes(1, std::span(two).first(1)) == errc::disabled);
    m.check();
  }
}

TEST_CASE_TEMPLATE("age is asked and cleared without the lock", F, FORMATS) {
  direct_machine<F> m;
  CHECK(touch(m.cpu, m.at(5), access::read).at == m.now(5));
  bool young = false, cleared = false, left = true;
  {
    const std::lock_guard held{m.mmu.lock()};
    std::thread([&] {
      young = m.mmu.test_young(m.bytes_of(5));
      cleared = m.mmu.clear_young({0, UINTPTR_MAX});
      left = m.mmu.test_young({0, UINTPTR_MAX});
    }).join();
  }
  CHECK(young);
  CHECK(cleared);
  CHECK_FALSE(left);
  CHECK_FALSE(m.mmu.clear_flush_young(m.bytes_of(5)));
  CHECK(m.cpu.hits(m.at(6), access::read) == false);
  CHECK(touch(m.cpu, m.at(6), access::read).at == m.now(6));
  CHECK(m.mmu.clear_flush_young(m.bytes_of(6)));
  CHECK(m.cpu.hits(m.at(6), access::read));  // walks again
  CHECK(m.mmu.test_young(m.bytes_of(6)));
}

TEST_CASE_TEMPLATE("O1: vCPUs that fault at the same time see what they wrote, while the primary changes everything", F,
                   FORMATS) {
  using primary_type = reference_mmu<>;
  using direct_type = x86::direct_mmu<primary_type, F>;
  constexpr std::uintptr_t base = 0x40000000;
  constexpr std::uint64_t pages = 64;
  primary_type primary{256, 256};
  direct_type mmu{primary};
  subscriber<direct_type> node{mmu};
  REQUIRE(primary.map({base, base + pages * page_size}, protection::read_write) == errc::ok);
  REQUIRE(mmu.add_slot({.id = 1, .base = {0}, .pages = pages, .host = {base}}) == errc::ok);
  {
    auto held = primary.lock_tables();
    REQUIRE(primary.space().register_subscriber(node, held) == errc::ok);
  }
  std::atomic<unsigned> wrong{0}, odd{0}, running{3};
  const auto run_cpu = [&](std::uint64_t id) {
    x86::direct_vcpu<direct_type> cpu{mmu};
    std::mt19937_64 random(seed() + id);
    std::array<std::uint64_t, pages> expected{};
    for (int n = 0; n < 10000; ++n) {
      const std::uint64_t f = random() % pages;
      const bool write = random() % 2 == 0;
      bool bad = false;
      const outcome o =
          cpu.access({f * page_size + 8 * id}, write ? access::write : access::read, [&](std::byte* at) noexcept {
            std::atomic_ref<std::uint64_t> word(*reinterpret_cast<std::uint64_t*>(at));
            bad = word.load(std::memory_order_relaxed) != expected[f];
            if (write) word.store(expected[f] + 1, std::memory_order_relaxed);
          });
      if (bad) wrong.fetch_add(1);
      if (o.what == outcome::done) {
        expected[f] += write ? 1 : 0;
      } else {
        odd.fetch_add(1);
      }
    }
    running.fetch_sub(1);
  };
  const auto run_owner = [&] {
    std::mt19937_64 random(seed() + 50);
    std::array<std::uint64_t, 1> words{};
    while (running.load() != 0) {
      switch (random() % 5) {
        case 0: static_cast<void>(mmu.log_writes(1, static_cast<dirty_tracking>(random() % 3))); break;
        case 1: static_cast<void>(mmu.harvest_writes(1, words)); break;
        case 2: static_cast<void>(mmu.clear_young({0, UINTPTR_MAX})); break;
        case 3:
          if (mmu.verify() != nullptr) odd.fetch_add(1);
          break;
        default: {
          const hva at{base + random() % pages * page_size};
          const invalidation bracket{.range = x86::page_range(at), .event = event::soft_dirty};
          mmu.invalidate_range_start(bracket);
          for (std::uint64_t id = 0; id < 3; ++id) {
            std::uint64_t first = 0, second = 0;
            if (primary.load(at + 8 * id, first) != errc::ok) continue;
            std::this_thread::yield();
            if (primary.load(at + 8 * id, second) == errc::ok && first != second) wrong.fetch_add(1);
          }
          mmu.invalidate_range_end(bracket);
        }
      }
    }
  };
  std::vector<std::thread> all;
  for (std::uint64_t id = 0; id < 3; ++id) all.emplace_back(run_cpu, id);
  all.emplace_back(run_owner);
  std::mt19937_64 random(seed());
  while (running.load() != 0) {
    const std::uint64_t first = random() % pages, n = 1 + random() % 8;
    const range r{base + first * page_size, base + std::min(pages, first + n) * page_size};
    if (random() % 2 == 0) {
      static_cast<void>(primary.swap_out(r));
    } else {
      static_cast<void>(primary.migrate(r));
    }
  }
  for (auto& t : all) t.join();
  CHECK(wrong.load() == 0);
  CHECK(odd.load() == 0);
  CHECK(primary.statistics().stale_writes == 0);
  CHECK(std::string(mmu.verify() != nullptr ? mmu.verify() : "") == "");
  CHECK(primary.space().unregister(node) == errc::ok);
}

namespace {
std::vector<contract_violation> reported;
void report(const contract_violation& v) noexcept { reported.push_back(v); }
}  // namespace

TEST_CASE("K6: a direct MMU that is destroyed before its vCPUs is reported") {
  using direct_type = x86::direct_mmu<scripted_host, x86::ept_format>;
  using direct_cpu = x86::direct_vcpu<direct_type>;
  scripted_host host;
  alignas(direct_type) static std::byte mmu_memory[sizeof(direct_type)];
  alignas(direct_cpu) static std::byte cpu_memory[sizeof(direct_cpu)];
  auto* mmu = new (mmu_memory) direct_type{host};
  static_cast<void>(new (cpu_memory) direct_cpu{*mmu});  // never destroyed: that would be the second mistake
  reported.clear();
  const auto before = set_contract_handler(&report);
  mmu->~direct_type();
  set_contract_handler(before);
  REQUIRE(reported.size() == 1);
  CHECK(std::string(reported[0].rule) == "K6");
}
