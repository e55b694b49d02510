// SPDX-License-Identifier: MIT

// Nested guests on threads of their own, their hypervisor, the primary and the owner, all at once.

#include <mmunotify/secondary/x86/nested_vcpu.hpp>

#include <doctest/doctest.h>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/primary/reference_mmu.hpp>

#include "nested_fixture.hpp"

using namespace nested_test;

namespace {

/// Gives others a chance to run a bracket between the look-up and the installation.
struct slow_provider {
  reference_mmu<>& primary;
  frame_lease pin(hva a, bool write) noexcept {
    const frame_lease lease = primary.pin(a, write);
    for (int i = 0; i < 4; ++i) std::this_thread::yield();
    return lease;
  }
  /// Of the parts of large entries alone: after the last look before the lock.
  unsigned mapping_shift(hva) noexcept {
    for (int i = 0; i < 40; ++i) std::this_thread::yield();
    return page_shift;
  }
  void unpin(pfn f) noexcept { primary.unpin(f); }
  std::byte* data(pfn f) noexcept { return primary.data(f); }
};

/// L1's pages 0 to 39 are real memory. Pages 0 to 3: its EPT, which maps L2's page i to its own page i, and once more
/// by a large entry, from `twin` on. Pages 4 to 7: L2's tables, which map its address `va` and on to its pages. The
/// others are data.
struct real_nest {
  using primary_type = reference_mmu<>;
  using mmu_type = x86::shadow_mmu<slow_provider, x86::no_paging>;
  static constexpr std::uintptr_t base = 0x10000000;
  static constexpr std::uint64_t pages = 40;
  static constexpr gva va{0x400000};
  static constexpr l2_gpa twin{0x200000};

  primary_type primary{256, 256};
  slow_provider provider{primary};
  mmu_type mmu;
  subscriber<mmu_type> node{mmu};

  explicit real_nest(bool unsync) : mmu(provider, {.unsync = unsync}) {
    const range r{base, base + pages * page_size};
    CHECK(primary.map(r, protection::read_write) == errc::ok);
    {
      auto held = primary.lock_tables();
      CHECK(primary.space().register_subscriber(node, held) == errc::ok);
    }
    CHECK(mmu.add_slot({.id = 1, .base = {0}, .pages = pages, .host = {base}}) == errc::ok);
    for (std::uint64_t i = 0; i < 3; ++i) put(i * page_size, (i + 1) * page_size | ept_all);
    for (std::uint64_t i = 0; i < pages; ++i) point(i, i);
    put(2 * page_size + 8, ept_all | epte::write_back | epte::large);
    put(4 * page_size, 5 * page_size | rwu);
    put(5 * page_size, 6 * page_size | rwu);
    put(6 * page_size + 2 * 8, 7 * page_size | rwu);
    for (std::uint64_t i = 0; i < pages; ++i) put(7 * page_size + 8 * i, i * page_size | rwu);
  }
  ~real_nest() {
    if (node.registered()) CHECK(primary.space().unregister(node) == errc::ok);
  }
  void put(std::uint64_t at, std::uint64_t value) {
    CHECK(mmu.guest_write({at}, std::as_bytes(std::span<const std::uint64_t>(&value, 1))) == errc::ok);
  }
  /// L1 maps L2's page i to its own page `frame`.
  void point(std::uint64_t i, std::uint64_t frame) {
    put(3 * page_size + 8 * i, frame * page_size | ept_all | epte::write_back);
  }
};

/// Everything at once; sizes are operations of each thread.
struct storm {
  real_nest& m;
  std::atomic<unsigned> wrong{0}, odd{0}, done{0}, refused{0};
  std::atomic<unsigned> guests{0};  ///< that are at work; the others stop with the last of them

  /// A nested guest that counts in its pages. Every other one through EPT with accessed and dirty bits.
  void run_guest(std::uint64_t id, std::uint64_t round, std::array<std::uint64_t, real_nest::pages>& expected,
                 int operations) {
    x86::nested_vcpu l2{m.mmu};
    const nested_pointer with{.value = (id == 0 ? x86::eptp::accessed_dirty : 0) | 3 << 3 | 6};
    if (l2.enter(with) != pointer_error::none) odd.fetch_add(1);
    if (l2.set_controls(nested_machine::long_mode(4 * page_size)).what != nested_outcome::done) odd.fetch_add(1);
    std::mt19937_64 random(seed() + id + 2 * round);
    const std::uint64_t first = 8 + id * 16;  // pages of my own: first to first + 15; the last one is a window
    std::uint64_t window = first + 15;
    m.point(first + 15, window);
    for (int i = 0; i < operations; ++i) {
      const std::uint64_t at = first + random() % 16;
      if (random() % 16 == 0) m.point(first + 15, window = first + random() % 16);
      if (random() % 64 == 0) l2.invept();
      const std::uint64_t frame = at == first + 15 ? window : at;
      const bool write = random() % 2 == 0;
      bool was_wrong = false;
      const auto use = [&](std::byte* byte) noexcept {
        std::atomic_ref<std::uint64_t> word(*reinterpret_cast<std::uint64_t*>(byte));
        was_wrong = word.load(std::memory_order_relaxed) != expected[frame];
        if (write) word.store(expected[frame] + 1, std::memory_order_relaxed);
      };
      const std::uint64_t offset = at * page_size + 8 * id;
      const x86::access how = write ? access::write : access::read;
      nested_outcome o;
      switch (random() % 3) {
        case 0: o = l2.access(real_nest::va + offset, how, use); break;
        case 1: o = l2.access(l2_gpa{offset}, how, use); break;
        default: o = l2.access(real_nest::twin + (frame * page_size + 8 * id), how, use);
      }
      if (was_wrong) wrong.fetch_add(1);
      if (o.what == nested_outcome::done) {
        expected[frame] += write ? 1 : 0;
        done.fetch_add(1, std::memory_order_relaxed);
      } else if (o.what == nested_outcome::not_mapped) {  // protected, or moved away, just now
        refused.fetch_add(1, std::memory_order_relaxed);
      } else {
        odd.fetch_add(1);
      }
    }
    guests.fetch_sub(1);
  }

  void run_primary(std::uint64_t round, int operations) {
    constexpr std::uint64_t n = real_nest::pages;
    std::mt19937_64 random(seed() + 77 + round);
    for (int i = 0; i < operations && guests.load() > 0; ++i) {
      const std::uint64_t first = random() % n, count = 1 + random() % (n - first);
      const range r{real_nest::base + first * page_size, real_nest::base + (first + count) * page_size};
      switch (random() % 6) {
        case 0: static_cast<void>(m.primary.swap_out(r)); break;
        case 1: static_cast<void>(m.primary.migrate(r)); break;
        case 2: static_cast<void>(m.primary.clear_flush_young(r)); break;
        case 3: {
          const range data{real_nest::base + 8 * page_size, real_nest::base + 24 * page_size};
          static_cast<void>(m.primary.protect(data, protection::read));
          static_cast<void>(m.primary.protect(data, protection::read_write));
          break;
        }
        case 4: {  // away, to another frame there, and back: who kept a mapping writes where nobody looks
          const std::uint64_t from = 8 + random() % 28;
          const range here{real_nest::base + from * page_size, real_nest::base + (from + 4) * page_size};
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
  }

  /// Logs writes, asks for age, throws everything away, adds and removes memory.
  void run_owner(std::uint64_t round, int operations) {
    std::mt19937_64 random(seed() + 99 + round);
    std::array<std::uint64_t, 1> words{};
    for (int i = 0; i < operations && guests.load() > 0; ++i) {
      switch (random() % 6) {
        case 0:
          if (m.mmu.log_writes(1, static_cast<x86::dirty_tracking>(random() % 3)) != errc::ok) odd.fetch_add(1);
          break;
        case 1: static_cast<void>(m.mmu.harvest_writes(1, words)); break;
        case 2: static_cast<void>(m.mmu.clear_young({0, UINTPTR_MAX})); break;
        case 3:
          if (m.mmu.add_slot({.id = 2, .base = {1000}, .pages = 16, .host = {real_nest::base}}) != errc::ok ||
              m.mmu.remove_slot(2) != errc::ok) {
            odd.fetch_add(1);
          }
          break;
        default:
          if (i % 8 == 0) m.mmu.zap_all();
      }
    }
  }
};

}  // namespace

TEST_CASE("O1: no nested guest reads or writes a frame that its page has left, while everything happens at once") {
  for (const bool unsync : {false, true}) {
    CAPTURE(unsync);
    real_nest m(unsync);
    storm s{m};
    std::array<std::array<std::uint64_t, real_nest::pages>, 2> expected{};
    for (std::uint64_t round = 0; round < 3; ++round) {
      std::vector<std::thread> all;
      s.guests.store(2);
      for (std::uint64_t id = 0; id < 2; ++id) {
        all.emplace_back([&, id] { s.run_guest(id, round, expected[id], 3000); });
      }
      all.emplace_back([&] { s.run_primary(round, 4000); });
      s.run_owner(round, 1500);
      for (auto& t : all) t.join();
      CHECK(s.wrong.load() == 0);
      CHECK(s.odd.load() == 0);
      CHECK(std::string(m.mmu.verify() != nullptr ? m.mmu.verify() : "") == "");
    }
    CHECK(m.primary.statistics().stale_writes == 0);
    CHECK(m.primary.verify() == nullptr);
    const auto c = m.mmu.statistics();
    MESSAGE("done ", s.done.load(), " refused ", s.refused.load(), " faults ", c.faults, " retries ", c.retries,
            " zapped ", c.zapped, " flushes ", c.flushes, " followed writes ", c.tracked_writes);
    CHECK(s.done.load() > 1000);
  }
}
