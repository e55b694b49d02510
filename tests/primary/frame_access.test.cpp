// SPDX-License-Identifier: MIT

#include <mmunotify/primary/frame_access.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#include "support/threads.hpp"

using namespace mmunotify;

namespace {

constexpr std::size_t size = 40;

struct memory {
  alignas(8) std::array<std::byte, size> bytes;
  memory() {
    for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>(i + 1);
  }
};

TEST_CASE("every offset and length copies exactly those bytes, both ways") {
  for (std::size_t first = 0; first < size; ++first) {
    for (std::size_t n = 0; n <= size - first; ++n) {
      memory frame;
      std::array<std::byte, size> out{};
      load_bytes(out.data(), frame.bytes.data() + first, n);
      for (std::size_t i = 0; i < size; ++i) REQUIRE(out[i] == (i < n ? frame.bytes[first + i] : std::byte{0}));

      std::array<std::byte, size> in;
      in.fill(std::byte{0xee});
      store_bytes(frame.bytes.data() + first, in.data(), n);
      const memory before;
      for (std::size_t i = 0; i < size; ++i) {
        REQUIRE(frame.bytes[i] == (i >= first && i < first + n ? std::byte{0xee} : before.bytes[i]));
      }
    }
  }
}

TEST_CASE("pages are copied and filled whole, and no further") {
  std::vector<std::byte> a(page_size + 1, std::byte{1});
  std::vector<std::byte> b(page_size + 1, std::byte{2});
  fill_page(a.data(), std::byte{3});
  CHECK(std::count(a.begin(), a.end(), std::byte{3}) == page_size);
  CHECK(a.back() == std::byte{1});
  copy_page(b.data(), a.data());
  CHECK(std::equal(a.begin(), a.end() - 1, b.begin()));
  CHECK(b.back() == std::byte{2});
}

TEST_CASE("an aligned word is never seen torn") {
  constexpr int rounds = 200000;
  memory frame;
  const std::uint64_t ones = ~std::uint64_t{0};
  word_at<std::uint64_t>(frame.bytes.data() + 8).store(0, std::memory_order_relaxed);
  std::atomic<bool> writing{false};
  std::atomic<bool> stop{false};
  std::jthread writer([&] {
    std::array<std::byte, 16> value{};
    for (int i = 0; !stop.load(std::memory_order_relaxed); ++i) {
      if (i == 100) writing.store(true, std::memory_order_release);
      value.fill(i % 2 == 0 ? std::byte{0xff} : std::byte{0});
      store_bytes(frame.bytes.data() + 4, value.data(), value.size());  // ragged ends, one whole word
    }
  });
  wait_for(writing);
  int torn = 0;
  for (int i = 0; i < rounds; ++i) {
    std::uint64_t word = 1;
    load_bytes(reinterpret_cast<std::byte*>(&word), frame.bytes.data() + 8, 8);
    if (word != 0 && word != ones) ++torn;
  }
  stop.store(true, std::memory_order_relaxed);
  CHECK(torn == 0);
}

TEST_CASE("words of both sizes are atomics at their place") {
  memory frame;
  std::uint32_t expected = word_at<std::uint32_t>(frame.bytes.data() + 4).load();
  CHECK(word_at<std::uint32_t>(frame.bytes.data() + 4).compare_exchange_strong(expected, 0));
  CHECK(frame.bytes[3] == std::byte{4});
  CHECK(frame.bytes[4] == std::byte{0});
  CHECK(frame.bytes[7] == std::byte{0});
  CHECK(frame.bytes[8] == std::byte{9});
  static_assert(frame_word<std::uint64_t> && frame_word<std::uint32_t> && !frame_word<std::uint8_t>);
}

}  // namespace
