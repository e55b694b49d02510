// SPDX-License-Identifier: MIT

// Large leaves from the huge pages of a real primary: reference_mmu collapses and splits under both x86 MMUs.

#include <doctest/doctest.h>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/primary/reference_mmu.hpp>
#include <mmunotify/secondary/x86/direct_mmu.hpp>
#include <mmunotify/secondary/x86/direct_vcpu.hpp>

#include "shadow_fixture.hpp"

using namespace shadow_test;

namespace {
using primary_type = reference_mmu<>;
static_assert(x86::large_frame_provider<primary_type> && x86::prefetch_provider<primary_type>);

constexpr std::uintptr_t base = 0x40000000;
constexpr std::uint64_t block = 512, pages = 2 * block;

/// Two blocks of host memory are all that the guest has. A shadow MMU's guest has no paging, so that its addresses are
/// physical ones too.
template <class Mmu, class Cpu>
struct virtual_machine {
  using address = std::conditional_t<std::is_same_v<Cpu, x86::direct_vcpu<Mmu>>, gpa, gva>;
  primary_type primary{6 * block, 4 * block};
  Mmu mmu;
  subscriber<Mmu> node{mmu};

  explicit virtual_machine(const x86::mmu_options& o = {}) : mmu(primary, o) {
    REQUIRE(mmu.add_slot({.id = 1, .base = {0}, .pages = pages, .host = {base}}) == errc::ok);
    auto held = primary.lock_tables();
    REQUIRE(primary.space().register_subscriber(node, held) == errc::ok);
  }
  ~virtual_machine() { CHECK(primary.space().unregister(node) == errc::ok); }
  static range host(std::uint64_t first, std::uint64_t n) {
    return {base + first * page_size, base + (first + n) * page_size};
  }
  static address page(std::uint64_t n) { return {n * page_size}; }
  static std::uint64_t value(Cpu& cpu, std::uint64_t n) {
    std::uint64_t seen = ~std::uint64_t{0};
    const outcome o = cpu.access(page(n), access::read, [&](std::byte* at) noexcept {
      seen = std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at)).load(std::memory_order_relaxed);
    });
    CHECK(o.what == outcome::done);
    return seen;
  }
  static void put(Cpu& cpu, std::uint64_t n, std::uint64_t v) {
    const outcome o = cpu.access(page(n), access::write, [&](std::byte* at) noexcept {
      std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at)).store(v, std::memory_order_relaxed);
    });
    CHECK(o.what == outcome::done);
  }
  std::uint64_t large() const { return mmu.statistics().large; }
  std::string broken() {
    const char* const here = mmu.verify();
    const char* const there = primary.verify();
    return here != nullptr ? here : there != nullptr ? there : "";
  }
};

using shadow_type = x86::shadow_mmu<primary_type, x86::no_paging>;
template <class Format>
using direct_type = x86::direct_mmu<primary_type, Format>;

struct shadow : virtual_machine<shadow_type, x86::vcpu<shadow_type>> {
  using cpu_type = x86::vcpu<shadow_type>;
  using virtual_machine::virtual_machine;
};
struct direct : virtual_machine<direct_type<x86::ept_format>, x86::direct_vcpu<direct_type<x86::ept_format>>> {
  using cpu_type = x86::direct_vcpu<direct_type<x86::ept_format>>;
  using virtual_machine::virtual_machine;
};
}  // namespace

TEST_CASE_TEMPLATE("a huge page of the primary is one leaf, until it splits, and again when it has collapsed", M,
                   shadow, direct) {
  M m;
  typename M::cpu_type cpu{m.mmu};
  REQUIRE(m.primary.map_huge(m.host(0, block), protection::read_write) == errc::ok);
  REQUIRE(m.primary.map(m.host(block, block), protection::read_write) == errc::ok);
  m.put(cpu, 5, 55);
  CHECK(m.large() == 1);
  for (std::uint64_t n = 0; n < block; n += 7) REQUIRE(cpu.hits(m.page(n), access::write));
  m.put(cpu, 500, 500);
  m.put(cpu, block + 3, 33);
  CHECK(m.large() == 1);
  CHECK(m.broken() == "");

  REQUIRE(m.primary.migrate(m.host(5, 1)) == errc::ok);  // splits the huge page, and moves one of its parts
  CHECK_FALSE(cpu.hits(m.page(500), access::read));
  CHECK(m.value(cpu, 500) == 500);
  CHECK(m.value(cpu, 5) == 55);
  CHECK(m.large() == 1);
  CHECK(m.broken() == "");
  m.put(cpu, 5, 56);

  REQUIRE(m.primary.collapse(m.host(0, pages)) == errc::ok);
  CHECK_FALSE(cpu.hits(m.page(500), access::read));
  CHECK(m.value(cpu, 5) == 56);
  CHECK(m.value(cpu, 500) == 500);
  CHECK(m.value(cpu, block + 3) == 33);
  CHECK(m.large() == 3);
  CHECK(m.broken() == "");

  // Read-only for a moment: as a whole it can be read, and a write is a fault that splits it in the primary.
  REQUIRE(m.primary.clear_soft_dirty(m.host(0, block)) == errc::ok);
  CHECK(m.value(cpu, 5) == 56);
  m.put(cpu, 6, 66);
  CHECK(m.value(cpu, 5) == 56);
  CHECK(m.value(cpu, 6) == 66);
  CHECK(m.broken() == "");
}

TEST_CASE_TEMPLATE("K1: whatever the primary collapses and splits, the guest finds what it wrote", M, shadow, direct) {
  std::uint64_t large = 0;
  for (std::uint64_t round = 0; round < 4; ++round) {
    M m{x86::mmu_options{.prefetch = round / 2 == 0, .eager_split = round % 2 == 0}};
    typename M::cpu_type cpus[] = {typename M::cpu_type{m.mmu}, typename M::cpu_type{m.mmu}};
    REQUIRE(m.primary.map(m.host(0, pages), protection::read_write) == errc::ok);
    std::array<std::uint64_t, pages> expected{};
    std::mt19937_64 random(seed() + round);
    for (int step = 0; step < 1500; ++step) {
      const std::uint64_t n = random() % pages, some = 1 + random() % 8;
      auto& cpu = cpus[random() % 2];
      const range r = m.host(n, std::min(some, pages - n));
      switch (random() % 40) {
        case 0: REQUIRE(m.primary.collapse(m.host(n / block * block, block)) == errc::ok); break;
        case 1: REQUIRE(m.primary.swap_out(r) == errc::ok); break;
        case 2: REQUIRE(m.primary.migrate(r) == errc::ok); break;
        case 3: REQUIRE(m.primary.clear_soft_dirty(random() % 2 == 0 ? r : m.host(0, pages)) == errc::ok); break;
        case 4: REQUIRE(m.mmu.log_writes(1, static_cast<x86::dirty_tracking>(random() % 3)) == errc::ok); break;
        case 5: REQUIRE(m.mmu.log_writes(1, x86::dirty_tracking::off) == errc::ok); break;
        default:
          REQUIRE(m.value(cpu, n) == expected[n]);
          if (random() % 2 == 0) m.put(cpu, n, expected[n] = random());
      }
      if (step % 50 == 0) REQUIRE(m.broken() == "");
    }
    for (std::uint64_t n = 0; n < pages; ++n) REQUIRE(m.value(cpus[0], n) == expected[n]);
    large += m.large();
  }
  CHECK(large > 10);
}

TEST_CASE_TEMPLATE("O1: vCPUs find what they wrote while the primary collapses and splits, and logs begin", M, shadow,
                   direct) {
  M m{x86::mmu_options{.prefetch = true, .eager_split = true}};
  REQUIRE(m.primary.map(m.host(0, pages), protection::read_write) == errc::ok);
  std::atomic<unsigned> wrong{0}, running{2};
  const auto run_cpu = [&](std::uint64_t id) {
    typename M::cpu_type cpu{m.mmu};
    std::mt19937_64 random(seed() + id);
    std::array<std::uint64_t, pages> expected{};
    for (int n = 0; n < 6000; ++n) {
      const std::uint64_t f = random() % pages;
      const bool write = random() % 2 == 0;
      bool bad = false;
      const outcome o =
          cpu.access(M::page(f) + 8 * id, write ? access::write : access::read, [&](std::byte* at) noexcept {
            std::atomic_ref<std::uint64_t> word(*reinterpret_cast<std::uint64_t*>(at));
            bad = word.load(std::memory_order_relaxed) != expected[f];
            if (write) word.store(expected[f] + 1, std::memory_order_relaxed);
          });
      if (bad || o.what != outcome::done) wrong.fetch_add(1);
      expected[f] += write ? 1 : 0;
    }
    running.fetch_sub(1);
  };
  const auto run_owner = [&] {
    std::mt19937_64 random(seed() + 5);
    std::array<std::uint64_t, pages / 64> words{};
    while (running.load() != 0) {
      static_cast<void>(m.mmu.log_writes(1, static_cast<x86::dirty_tracking>(random() % 3)));
      for (int i = 0; i < 20; ++i) std::this_thread::yield();
      static_cast<void>(m.mmu.harvest_writes(1, words));
      if (m.mmu.verify() != nullptr) wrong.fetch_add(1);
    }
  };
  std::thread first(run_cpu, 0), second(run_cpu, 1), owner(run_owner);
  std::mt19937_64 random(seed() + 9);
  while (running.load() != 0) {
    const std::uint64_t n = random() % pages;
    const range r = m.host(n, std::min<std::uint64_t>(1 + random() % 4, pages - n));
    switch (random() % 4) {
      case 0:
      case 1: static_cast<void>(m.primary.collapse(m.host(n / block * block, block))); break;
      case 2: static_cast<void>(m.primary.swap_out(r)); break;
      default: static_cast<void>(m.primary.migrate(r)); break;
    }
    for (int i = 0; i < 20; ++i) std::this_thread::yield();
  }
  first.join();
  second.join();
  owner.join();
  CHECK(wrong.load() == 0);
  CHECK(m.primary.statistics().stale_writes == 0);
  CHECK(m.broken() == "");
}
