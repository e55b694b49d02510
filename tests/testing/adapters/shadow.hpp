// SPDX-License-Identifier: MIT
#pragma once

// The x86 shadow MMU as an adapter: the window is a guest's memory, mapped one to one by page tables that lie
// elsewhere, and the device is a few vCPUs.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>

#include <mmunotify/notifier/subscriber.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/secondary/x86/shadow_mmu.hpp>
#include <mmunotify/secondary/x86/vcpu.hpp>
#include <mmunotify/testing/adapter.hpp>

namespace adapters {

using namespace mmunotify;

/// The kit's pages, and four of its own for the guest's tables, which never change place.
class guest_host {
 public:
  static constexpr std::uintptr_t tables = 0x7000'0000;
  static constexpr std::uint64_t table_count = 4;

  explicit guest_host(testing::test_primary& p) noexcept : primary_(p) {}
  frame_lease pin(hva a, bool write) noexcept {
    const std::uint64_t n = (a.value - tables) / page_size;
    if (a.value >= tables && n < table_count) return {errc::ok, {first_own + n}, true};
    return primary_.pin(a, write);
  }
  void unpin(pfn f) noexcept {
    if (f.value < first_own) primary_.unpin(f);
  }
  std::byte* data(pfn f) noexcept {
    return f.value >= first_own ? own_[f.value - first_own].bytes.data() : primary_.data(f);
  }

 private:
  static constexpr std::uint64_t first_own = 1U << 20;
  struct alignas(page_size) page {
    std::array<std::byte, page_size> bytes{};
  };
  testing::test_primary& primary_;
  std::array<page, table_count> own_{};
};

class shadow {
 public:
  using client_type = x86::shadow_mmu<guest_host>;
  static constexpr bool precise = true;

  explicit shadow(testing::test_primary& primary) noexcept : host_(primary) {
    const std::uint64_t data_frame = testing::window.first >> page_shift;  // guest-physical is host virtual
    bool fine = mmu_.add_slot({.id = 1, .base = {0}, .pages = guest_host::table_count, .host = {guest_host::tables}}) ==
                errc::ok;
    fine =
        fine && mmu_.add_slot(
                    {.id = 2, .base = {data_frame}, .pages = testing::window_pages, .host = {testing::window.first}}) ==
                    errc::ok;
    for (unsigned level = 4; level > 1; --level) put(4 - level, level, (5 - level) * page_size);
    for (std::uint64_t p = 0; p < testing::window_pages; ++p) {
      write_entry(3 * page_size + (x86::long_mode_4::index(first(), 1) + p) * 8, testing::pages_at(p).first);
    }
    for (cpu& c : cpus_) fine = fine && c.vcpu.set_cr3(0) == errc::ok;
    usable_.store(false, std::memory_order_relaxed);
    if (!fine) detail::violated("access", "adapters::shadow", "the guest could not be set up");
  }

  errc attach(testing::test_space& space) noexcept {
    const errc e = space.register_subscriber(node_);
    if (e != errc::ok) return e;
    mmu_.resume();
    usable_.store(true, std::memory_order_release);  // (sh1) pairs with (sh2)
    return errc::ok;
  }
  errc detach(testing::test_space& space) noexcept {
    usable_.store(false, std::memory_order_relaxed);
    return space.unregister(node_);
  }

  bool mapped(std::uintptr_t at) noexcept {
    for (cpu& c : cpus_) {
      const std::lock_guard mine{c.lock};
      if (c.vcpu.hits({at}, x86::access::read)) return true;
    }
    return false;
  }

  testing::access_result access(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    // (sh2) acquire pairs with (sh1): an unregistered MMU must not run.
    if (!usable_.load(std::memory_order_acquire)) return {.error = errc::released};
    const x86::access how = write ? x86::access::write : x86::access::read;
    cpu& c = cpus_[next_.fetch_add(1, std::memory_order_relaxed) % cpus_.size()];
    const std::lock_guard mine{c.lock};
    if (!c.vcpu.hits({at}, how)) {
      const x86::outcome o = c.vcpu.prefault({at}, how);
      if (o.what != x86::outcome::done) return {.error = error_of(o)};
    }
    testing::access_result r{errc::ok, value};
    const x86::outcome o = c.vcpu.access({at}, how, [&](std::byte* byte) noexcept {
      const auto word = word_at<std::uint64_t>(byte);
      if (write) {
        word.store(value, std::memory_order_relaxed);
      } else {
        r.value = word.load(std::memory_order_relaxed);
      }
    });
    if (o.what != x86::outcome::done) r.error = error_of(o);
    return r;
  }

 private:
  struct cpu {
    explicit cpu(client_type& m) noexcept : vcpu(m) {}
    std::mutex lock;  ///< a vCPU is one thread's at a time
    x86::vcpu<client_type> vcpu;
  };

  static gva first() noexcept { return {testing::window.first}; }
  static errc error_of(const x86::outcome& o) noexcept {
    switch (o.what) {
      case x86::outcome::again: return errc::again;
      case x86::outcome::released: return errc::released;
      case x86::outcome::no_memory: return errc::no_memory;
      default: return errc::not_mapped;
    }
  }
  void write_entry(std::uint64_t at, std::uint64_t to) noexcept {
    const std::uint64_t e = to | x86::pte::present | x86::pte::writable | x86::pte::user;
    static_cast<void>(mmu_.guest_write({at}, std::as_bytes(std::span(&e, 1))));
  }
  void put(std::uint64_t table, unsigned level, std::uint64_t to) noexcept {
    write_entry(table * page_size + x86::long_mode_4::index(first(), level) * 8, to);
  }

  guest_host host_;
  /// The kit asks for the promise to the letter: no bracket leaves a mapping, not even a read-only one.
  client_type mmu_{host_, {.downgrades = event_set{}}};
  subscriber<client_type> node_{mmu_};
  std::array<cpu, 2> cpus_{cpu{mmu_}, cpu{mmu_}};
  std::atomic<unsigned> next_{0};
  std::atomic<bool> usable_{false};
};

}  // namespace adapters
