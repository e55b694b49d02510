// SPDX-License-Identifier: MIT

// A small driver, and the kit that tells whether it keeps the contract. Exit status 1 if it does not.
//
//     conformance [--broken]        --broken: without the check that makes a fault retry

#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>

#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/notifier/subscriber.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/testing/conformance.hpp>
#include <mmunotify/testing/schedule.hpp>

using namespace mmunotify;

namespace {

/// The driver: one translation for each page, made when the device faults.
class driver {
 public:
  driver(testing::test_primary& primary, bool checks) noexcept : primary_(primary), checks_(checks) {}

  void invalidate_range_start(const invalidation& i) noexcept {
    const std::lock_guard locked{lock_};
    brackets_.start(i.range);
    testing::stage::for_each(i.range, [&](std::uint64_t p) { pages_[p] = {}; });
  }
  void invalidate_range_end(const invalidation& i) noexcept {
    const std::lock_guard locked{lock_};
    brackets_.end(i.range);
  }
  void release() noexcept {
    const std::lock_guard locked{lock_};
    running_ = false;
    pages_ = {};
  }
  void run() noexcept {  // registered: it may map
    const std::lock_guard locked{lock_};
    brackets_.forget();
    running_ = true;
  }

  bool mapped(std::uintptr_t at) noexcept {
    const std::lock_guard locked{lock_};
    return page(at).error == errc::ok;
  }
  testing::access_result access(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    const std::uint64_t since = brackets_.read_begin();
    frame_lease lease;
    {
      const std::lock_guard locked{lock_};
      if (!running_) return {.error = errc::released};
      if (page(at) && (page(at).writable || !write)) return touch(at, write, value);
    }
    if (lease = primary_.pin(hva{at}.page(), write); !lease) return {.error = lease.error};
    testing::access_result r{.error = errc::again};
    {
      const std::lock_guard locked{lock_};
      const auto first = static_cast<std::uintptr_t>(hva{at}.page().value);
      const bool stale = checks_ && brackets_.retry(since, {first, first + page_size});  // what is mapped, all of it
      if (running_ && !stale) {
        page(at) = lease;
        r = touch(at, write, value);
      }
    }
    primary_.unpin(lease.frame);
    return r;
  }

 private:
  frame_lease& page(std::uintptr_t at) noexcept { return pages_[(at - testing::window.first) / page_size]; }
  testing::access_result touch(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    const auto word = word_at<std::uint64_t>(primary_.data(page(at).frame) + at % page_size);
    if (write) word.store(value, std::memory_order_relaxed);
    return {errc::ok, word.load(std::memory_order_relaxed)};
  }

  testing::test_primary& primary_;
  const bool checks_;
  testing::mutex lock_;  // in the product a std::mutex; this one lets the kit try every order
  invalidation_window<> brackets_;
  std::array<frame_lease, testing::window_pages> pages_{};
  bool running_ = false;
};

/// What the kit needs around it.
struct adapter {
  using client_type = driver;
  static constexpr bool precise = true;

  adapter(testing::test_primary& primary, bool checks) noexcept : device(primary, checks) {}
  errc attach(testing::test_space& space) noexcept {
    const errc e = space.register_subscriber(node);
    if (e == errc::ok) device.run();
    return e;
  }
  errc detach(testing::test_space& space) noexcept { return space.unregister(node); }
  bool mapped(std::uintptr_t at) noexcept { return device.mapped(at); }
  testing::access_result access(std::uintptr_t at, bool write, std::uint64_t value) noexcept {
    return device.access(at, write, value);
  }

  driver device;
  subscriber<driver> node{device};
};

}  // namespace

int main(int argc, char** argv) {
  const bool broken = argc == 2 && std::strcmp(argv[1], "--broken") == 0;
  if (argc > 2 || (argc == 2 && !broken)) {
    std::fprintf(stderr, "usage: conformance [--broken]\n");
    return 2;
  }
  const testing::report r =
      testing::conformance([=](testing::test_primary& primary) { return std::make_unique<adapter>(primary, !broken); });
  testing::print(r, stdout);
  return r.ok() ? 0 : 1;
}
