// SPDX-License-Identifier: MIT
#pragma once

// The adapter on a real primary, the reference_mmu: swap, migration, protection, moves, forks, merging, soft-dirty
// tracking, aging and exit, while devices access their pages. What a device stored must be found wherever its page has
// gone since.

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <thread>

#include <mmunotify/primary/reference_mmu.hpp>
#include <mmunotify/testing/detail/random_rounds.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing::detail {

/// A reference_mmu as a test_primary, with points.
class reference_primary final : public test_primary {
 public:
  explicit reference_primary(std::size_t frames) noexcept : mmu(frames, frames) {}

  frame_lease pin(hva a, bool write) noexcept override {
    point();
    const frame_lease lease = mmu.pin(a, write);
    point();
    return lease;
  }
  void unpin(pfn f) noexcept override { mmu.unpin(f); }
  std::byte* data(pfn f) noexcept override { return mmu.data(f); }

  reference_mmu<test_space> mmu;
};

template <class Factory>
class reference_rounds {
 public:
  reference_rounds(Factory& factory, judge& j, std::uint64_t seed, unsigned threads) noexcept
      : verdict_(j),
        adapter_(factory(primary_)),
        seed_(seed),
        devices_(threads < 2 ? 1 : threads / 2),
        changers_(threads < 2 ? 1 : threads - devices_) {
    verdict_.that(primary_.mmu.map(window, protection::read_write) == errc::ok, "access", "the kit is out of memory");
    verdict_.that((*adapter_)->attach(primary_.mmu.space()) == errc::ok, "L9", "attach failed");
  }
  ~reference_rounds() {
    verdict_.that((*adapter_)->detach(primary_.mmu.space()) == errc::ok, "L5", "detach failed after the exit");
    adapter_.reset();
    const primary_statistics s = primary_.mmu.statistics();
    verdict_.that(s.stale_writes == 0, "O1", "freed frames were written");
    verdict_.that(s.pins == s.unpins, "K4", "%llu frames were lent and %llu given back",
                  static_cast<unsigned long long>(s.pins), static_cast<unsigned long long>(s.unpins));
  }
  reference_rounds(const reference_rounds&) = delete;
  reference_rounds& operator=(const reference_rounds&) = delete;

  void run(unsigned steps) noexcept {
    const auto work = [this, steps](unsigned i) noexcept { i < devices_ ? device(i, steps) : change(i, steps); };
    if (!run_threads(seed_, devices_ + changers_, work)) return;
    settle();
    verdict_.that(primary_.mmu.exit() == errc::ok, "L3", "exit failed");
    for (std::uint64_t p = 0; p < window_pages; ++p) {
      verdict_.that(!(*adapter_)->mapped(stage::data_at(p)), "L3", "the primary has exited, and page %u is mapped",
                    static_cast<unsigned>(p));
    }
  }

 private:
  access_result access(std::uint64_t page, bool write, std::uint64_t value) noexcept {
    return (*adapter_)->access(stage::data_at(page), write, value);
  }

  void device(unsigned self, unsigned steps) noexcept {
    dice d(seed_ + self);
    for (unsigned i = 0; i < steps && !verdict_.failed(); ++i) {
      const std::uint64_t page = d.below(window_pages / devices_) * devices_ + self;
      const std::uint64_t value = (std::uint64_t{self + 1} << 32) + i + 1;
      if (d.chance(50)) {
        if (access(page, true, value).error == errc::ok) stored_[page] = value;
      } else {
        check(page, access(page, false, 0));
      }
    }
  }
  void check(std::uint64_t page, access_result r) noexcept {
    verdict_.that(r.error != errc::ok || r.value == stored_[page], "O1",
                  "over a reference_mmu, page %u: stored %llx, found %llx", static_cast<unsigned>(page),
                  static_cast<unsigned long long>(stored_[page]), static_cast<unsigned long long>(r.value));
  }

  void change(unsigned self, unsigned steps) noexcept {
    dice d(seed_ + self);
    auto& mmu = primary_.mmu;
    for (unsigned i = 0; i < steps && !verdict_.failed(); ++i) {
      range r = d.some_range().clipped_to(window);
      r = {r.first & ~std::uintptr_t{page_mask}, (r.last + page_mask) & ~std::uintptr_t{page_mask}};
      switch (d.below(11)) {
        case 0: static_cast<void>(mmu.swap_out(r)); break;
        case 1: static_cast<void>(mmu.protect(r, protection::read)); break;
        case 2: static_cast<void>(mmu.protect(window, protection::read_write)); break;
        case 3: static_cast<void>(mmu.clear_flush_young(r)); break;
        case 4: static_cast<void>(mmu.test_young(r)); break;
        case 5: away_and_back(r); break;
        case 6: fork_a_child(); break;
        case 7: static_cast<void>(mmu.merge_equal(r)); break;
        case 8: static_cast<void>(mmu.clear_soft_dirty(r)); break;
        default: static_cast<void>(mmu.migrate(r)); break;
      }
    }
  }
  /// Moves r elsewhere, to other frames there, and back: who kept a mapping stores where nobody looks.
  void away_and_back(range r) noexcept {
    if (moving_.exchange(true, std::memory_order_acquire)) return;  // (rr1) pairs with (rr2): one at a time
    auto& mmu = primary_.mmu;
    const range there{r.first + 0x1000'0000, r.last + 0x1000'0000};
    if (mmu.move(r, there.first) == errc::ok) {
      static_cast<void>(mmu.migrate(there));
      const errc e = mmu.move(there, r.first);
      verdict_.that(e == errc::ok, "access", "the kit cannot move a range back: %s", to_string(e));
    }
    moving_.store(false, std::memory_order_release);  // (rr2) pairs with (rr1)
  }

  /// Everything is shared with a child, which goes at once: until then, and for pages written meanwhile, each store is
  /// a copy on write, in place.
  void fork_a_child() noexcept {
    using primary = reference_mmu<test_space>;
    const std::unique_ptr<primary> child(new (std::nothrow) primary(primary_.mmu.memory()));
    if (child == nullptr) return;
    static_cast<void>(primary_.mmu.fork(*child));
    std::this_thread::yield();
    static_cast<void>(child->exit());
  }

  /// All is quiet: every page must be found, by the device and by the primary.
  void settle() noexcept {
    static_cast<void>(primary_.mmu.protect(window, protection::read_write));
    for (std::uint64_t p = 0; p < window_pages && !verdict_.failed(); ++p) {
      access_result r = access(p, false, 0);
      for (unsigned n = 0; n < 64 && r.error == errc::again; ++n) r = access(p, false, 0);
      verdict_.that(r.error == errc::ok, "C2", "all is quiet, and page %u cannot be accessed: %s",
                    static_cast<unsigned>(p), to_string(r.error));
      check(p, r);
      std::uint64_t held = 0;
      static_cast<void>(primary_.mmu.read(stage::data_at(p), std::as_writable_bytes(std::span(&held, 1))));
      verdict_.that(held == stored_[p], "O1", "over a reference_mmu, a store to page %u is lost",
                    static_cast<unsigned>(p));
    }
    const char* const broken = primary_.mmu.verify();
    verdict_.that(broken == nullptr, "access", "the primary: %s", broken != nullptr ? broken : "");
  }

  judge& verdict_;
  reference_primary primary_{window_pages * 4};
  std::optional<decltype(std::declval<Factory&>()(std::declval<test_primary&>()))> adapter_;
  std::uint64_t seed_;
  unsigned devices_;
  unsigned changers_;
  std::atomic<bool> moving_{false};
  std::array<std::uint64_t, window_pages> stored_{};  ///< each the one device's that stores there
};

}  // namespace testing::detail
MMUNOTIFY_END_NAMESPACE
