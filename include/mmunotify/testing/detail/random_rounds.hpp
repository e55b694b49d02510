// SPDX-License-Identifier: MIT
#pragma once

// Random brackets and accesses, from a seed: in one thread, where a failure can be replayed exactly, and in several.

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <random>
#include <thread>

#include <mmunotify/testing/detail/hook_scenarios.hpp>
#include <mmunotify/testing/detail/trial.hpp>
#include <mmunotify/testing/schedule.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing::detail {

class dice {
 public:
  explicit dice(std::uint64_t seed) noexcept : random_(seed) {}
  /// Returns: 0 to n - 1.
  std::uint64_t below(std::uint64_t n) noexcept { return random_() % n; }
  bool chance(std::uint64_t percent) noexcept { return below(100) < percent; }
  /// A range with a byte of the window at least, with crooked edges now and then.
  range some_range() noexcept {
    if (chance(3)) return {0, UINTPTR_MAX};
    const std::uint64_t first = below(window_pages);
    range r = pages_at(first,
                       1 + below(chance(70) ? std::min<std::uint64_t>(4, window_pages - first) : window_pages - first));
    if (chance(20)) r.first += below(page_size);
    if (chance(20)) r.last -= below(page_size - 1);
    if (r.empty()) r.last = r.first + 1;
    return r;
  }

 private:
  std::mt19937_64 random_;
};

/// One thread: up to six brackets open at once, accesses between, and in the middle of, everything.
template <class Factory>
class one_thread {
 public:
  one_thread(Factory& factory, judge& j, std::uint64_t seed) noexcept : trial_(factory, j), dice_(seed) {}

  void run(unsigned steps) noexcept {
    for (unsigned i = 0; i < steps && !trial_.failed(); ++i) step();
    while (count_ != 0) end(count_ - 1);
    static_cast<void>(trial_.sees_all(window, "O1", "after a random round"));
  }

 private:
  struct open_one {
    range over{};
    test_space::ticket ticket{};
  };

  bool is_open(std::uint64_t page) const noexcept {
    for (unsigned i = 0; i < count_; ++i) {
      if (open_[i].over.overlaps(pages_at(page))) return true;
    }
    return false;
  }

  void step() noexcept {
    switch (dice_.below(10)) {
      case 0: return start(dice_.some_range());
      case 1:
        if (count_ != 0) end(static_cast<unsigned>(dice_.below(count_)));
        return;
      case 2: return trial_.primary.replace(dice_.some_range(), static_cast<event>(dice_.below(2)));
      case 3: return trial_.primary.swap_out(dice_.some_range());
      case 4: return disturbed();
      case 5: {
        const range r = dice_.some_range();
        static_cast<void>(trial_.primary.try_bracketed(
            r, [&] { stage::for_each(r, [&](std::uint64_t p) { trial_.primary.take_back(p); }); }));
        return;
      }
      case 6: return leave_and_come_back();
      default: return access(dice_.below(window_pages));
    }
  }

  void start(range r) noexcept {
    if (count_ == open_.size()) return;
    open_[count_++] = {r, trial_.primary.start(r, event::clear)};
    static_cast<void>(trial_.gone(r, "O1", "start has returned"));
    stage::for_each(r, [&](std::uint64_t p) { trial_.primary.take_back(p); });
  }
  void end(unsigned i) noexcept {
    trial_.primary.end(open_[i].ticket);
    open_[i] = open_[--count_];
  }

  void access(std::uint64_t page) noexcept {
    if (is_open(page)) {
      static_cast<void>(trial_.closed(pages_at(page), "O1", "a bracket is open"));
      return;
    }
    if (count_ == 0 || trial_.precise) {
      static_cast<void>(trial_.sees(page, "O1", "a random access"));
      return;
    }
    const access_result r = trial_.load(page);
    trial_.verdict.that(r.error == errc::again || r.value == trial_.primary.expected(page), "O1",
                        "a random access to page %u saw what is not there", static_cast<unsigned>(page));
  }

  /// An access with a bracket in its middle, or the other way round.
  void disturbed() noexcept {
    const std::uint64_t page = dice_.below(window_pages);
    const range r = dice_.chance(70) ? pages_at(page) : dice_.some_range();
    const auto replace = [&] { trial_.primary.replace(r); };
    const auto load = [&] { static_cast<void>(trial_.load(page)); };
    const auto n = static_cast<unsigned>(dice_.below(12));
    if (dice_.chance(60)) {
      static_cast<void>(interject(n, replace, load));
    } else {
      static_cast<void>(interject(n, load, replace));
    }
    access(page);
  }

  void leave_and_come_back() noexcept {
    if (count_ != 0 || !dice_.chance(20)) return;  // not inside a bracket of this thread
    trial_.detach();
    trial_.primary.replace(dice_.some_range());
    trial_.attach();
  }

  trial<Factory> trial_;
  dice dice_;
  std::array<open_one, 6> open_{};
  unsigned count_ = 0;
};

/// work(i) on a thread for each i < n, whose points give way to others at random. Returns: false without memory, and
/// then nothing has run.
template <class Work>
[[nodiscard]] bool run_threads(std::uint64_t seed, unsigned n, Work work) {
  const std::unique_ptr<std::thread[]> all(new (std::nothrow) std::thread[n]);
  if (all == nullptr) return false;
  for (unsigned i = 0; i < n; ++i) {
    all[i] = std::thread([seed, i, work] {
      current_schedule.restless = seed * 31 + i + 1;
      work(i);
      current_schedule.restless = 0;
    });
  }
  for (unsigned i = 0; i < n; ++i) all[i].join();
  return true;
}

/// Several threads. Devices load every page and store to their own; changers do what a primary does. Each device
/// checks: a page shows a version that it has had since the access began, and what I stored is what I find.
template <class Factory>
class many_threads {
 public:
  many_threads(Factory& factory, judge& j, std::uint64_t seed, unsigned threads) noexcept
      : trial_(factory, j, false),
        seed_(seed),
        devices_(threads < 2 ? 1 : threads / 2),
        changers_(threads < 2 ? 1 : threads - devices_) {
    j.that(trial_.primary.space().register_subscriber(node_) == errc::ok, "access", "the kit is out of memory");
    trial_.attach();
  }
  ~many_threads() { static_cast<void>(trial_.primary.space().unregister(node_)); }
  many_threads(const many_threads&) = delete;
  many_threads& operator=(const many_threads&) = delete;

  void run(unsigned steps) noexcept {
    const auto work = [this, steps](unsigned i) noexcept { i < devices_ ? device(i, steps) : change(i, steps); };
    if (!run_threads(seed_, devices_ + changers_, work)) return;
    trial_.primary.protect(window, true);
    static_cast<void>(trial_.sees_all(window, "O1", "after threads have run"));
    for (std::uint64_t p = 0; p < window_pages; ++p) {
      trial_.verdict.that(trial_.primary.stored(p) == stored_[p], "O1",
                          "after threads have run: a store to page %u is lost", static_cast<unsigned>(p));
    }
  }

 private:
  void device(unsigned self, unsigned steps) noexcept {
    dice d(seed_ + self);
    for (unsigned i = 0; i < steps && !trial_.failed(); ++i) {
      const std::uint64_t page = d.below(window_pages);
      const bool mine = page % devices_ == self;
      if (mine && d.chance(40)) {
        const std::uint64_t value = (std::uint64_t{self + 1} << 32) + i + 1;
        if (trial_.store(page, value).error == errc::ok) stored_[page] = value;
      } else if (mine && d.chance(50)) {
        const access_result r = trial_.adapter().access(stage::data_at(page), false, 0);
        trial_.verdict.that(r.error != errc::ok || r.value == stored_[page], "O1", "page %u: stored %llx, found %llx",
                            static_cast<unsigned>(page), static_cast<unsigned long long>(stored_[page]),
                            static_cast<unsigned long long>(r.value));
      } else {
        look(page);
      }
    }
  }
  void look(std::uint64_t page) noexcept {
    const std::uint64_t least = trial_.primary.expected(page);
    const access_result r = trial_.load(page);
    if (r.error != errc::ok) return;
    trial_.verdict.that(r.value >= least && r.value <= trial_.primary.expected(page), "O1",
                        "page %u shows %llx, and was %llx or newer all the time that it was looked at",
                        static_cast<unsigned>(page), static_cast<unsigned long long>(r.value),
                        static_cast<unsigned long long>(least));
  }

  void change(unsigned self, unsigned steps) noexcept {
    dice d(seed_ + self);
    for (unsigned i = 0; i < steps && !trial_.failed(); ++i) {
      const range r = d.some_range();
      stage& s = trial_.primary;
      switch (d.below(8)) {
        case 0: s.swap_out(r); break;
        case 1: s.protect(r, d.chance(30)); break;
        case 2: s.protect(window, true); break;
        case 3: age(r); break;
        case 4: nested(d, r); break;
        case 5:
          static_cast<void>(s.try_bracketed(r, [&] { stage::for_each(r, [&](std::uint64_t p) { s.take_back(p); }); }));
          break;
        case 6:
          if (self == devices_ && d.chance(5)) leave_and_come_back();
          break;
        default: s.replace(r, static_cast<event>(d.below(2))); break;
      }
    }
  }
  void nested(dice& d, range r) noexcept {
    stage& s = trial_.primary;
    const range other = d.some_range();
    const auto a = s.start(r), b = s.start(other);
    stage::for_each(r, [&](std::uint64_t p) { s.take_back(p); });
    if (d.chance(50)) {
      s.end(a);
      stage::for_each(other, [&](std::uint64_t p) { s.take_back(p); });
      s.end(b);
    } else {
      s.end(b);
      s.end(a);
    }
  }
  void age(range r) noexcept {
    const inside_callbacks inside;
    static_cast<void>(trial_.primary.space().clear_flush_young(r));
    static_cast<void>(trial_.primary.space().test_young(r));
  }
  void leave_and_come_back() noexcept {
    trial_.detach();
    trial_.primary.replace(window);
    trial_.attach();
  }

  trial<Factory> trial_;
  bystander bystander_{};  ///< gives way between the two passes of the adapter
  subscriber<bystander> node_{bystander_};
  std::uint64_t seed_;
  unsigned devices_;
  unsigned changers_;
  std::array<std::uint64_t, window_pages> stored_{};  ///< each the one device's that stores there
};

}  // namespace testing::detail
MMUNOTIFY_END_NAMESPACE
