// SPDX-License-Identifier: MIT
#include <mmunotify/sync/linux/platform.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <thread>

#include "support/threads.hpp"

using namespace mmunotify;

TEST_CASE("a heavy fence is there, or the platform says that it is not") {
  if (linux_platform::heavy_available()) {
    linux_platform::heavy();
    CHECK(linux_platform::heavy_available());
  } else {
    MESSAGE("this kernel grants no membarrier: readers use full fences");
    CHECK_FALSE(linux_platform::heavy_available());
  }
}

TEST_CASE("wait returns at once when the value has changed, and wake ends a wait") {
  std::atomic<std::uint32_t> word{1};
  linux_platform::wait(word, 0);
  std::thread sleeper([&] {
    while (word.load(std::memory_order_acquire) == 1) linux_platform::wait(word, 1);
  });
  let_others_run();
  word.store(2, std::memory_order_release);
  linux_platform::wake(word);
  sleeper.join();
  CHECK(word.load() == 2);
}

TEST_CASE(
    "a wait that is to last for so long at most ends by itself, at once when the value has changed, and when woken") {
  std::atomic<std::uint32_t> word{1};
  linux_platform::wait_for(word, 1, 1000);
  linux_platform::wait_for(word, 0, 999'999'999);
  std::thread sleeper([&] {
    while (word.load(std::memory_order_acquire) == 1) linux_platform::wait_for(word, 1, 999'999'999);
  });
  let_others_run();
  word.store(2, std::memory_order_release);
  linux_platform::wake(word);
  sleeper.join();
  CHECK(word.load() == 2);
}

TEST_CASE("waiting and waking leave errno alone: they run in the caller's hot paths") {
  const std::atomic<std::uint32_t> word{1};
  errno = 77;
  linux_platform::wait(word, 0);
  linux_platform::wait_for(word, 1, 1000);
  linux_platform::wake(word);
  CHECK(errno == 77);
}

TEST_CASE("a slab is zeroed, and one that cannot be had is null") {
  std::byte* slab = linux_platform::allocate_slab(1U << 16);
  REQUIRE(slab != nullptr);
  CHECK(slab[12345] == std::byte{0});
  CHECK(linux_platform::allocate_slab(~std::size_t{0} - 4095) == nullptr);
}
