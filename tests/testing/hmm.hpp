// SPDX-License-Identifier: MIT
#pragma once

// A mirrored address space for the tests that are modelled on hmm-tests.c.

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include <doctest/doctest.h>

#include "testing/adapters/dmirror.hpp"

namespace hmm {

using namespace mmunotify;
using adapters::dmirror;

inline constexpr std::uintptr_t base = 0x4000'0000;
constexpr std::uintptr_t at(std::uintptr_t page) { return base + page * page_size; }
constexpr range pages(std::uintptr_t first, std::uintptr_t n) { return {at(first), at(first + n)}; }

/// An address space with one area of `n` pages, page i holding 1000 + i, and a device that mirrors it.
struct mirrored {
  static constexpr std::uintptr_t n = 64;
  // On the heap: ThreadSanitizer does not see the end of a std::shared_mutex on the stack, and takes the next object's
  // there for the same one when it looks at the order of locks.
  const std::unique_ptr<dmirror::primary_type> owned = std::make_unique<dmirror::primary_type>(2048, 64, 128);
  dmirror::primary_type& primary = *owned;
  dmirror device{primary};

  mirrored() {
    CHECK(device.open() == errc::ok);
    CHECK(primary.map(pages(0, n), protection::read_write) == errc::ok);
    for (std::uintptr_t i = 0; i < n; ++i) put(i, 1000 + i);
  }
  ~mirrored() {
    static_cast<void>(device.close());
    CHECK(primary.exit() == errc::ok);
    CHECK(std::string(primary.verify() != nullptr ? primary.verify() : "") == "");
  }
  /// The processor's accesses.
  void put(std::uintptr_t page, std::uint64_t value) {
    CHECK(primary.write(at(page), std::as_bytes(std::span(&value, 1))) == errc::ok);
  }
  std::uint64_t get(std::uintptr_t page) {
    std::uint64_t value = 0;
    CHECK(primary.read(at(page), std::as_writable_bytes(std::span(&value, 1))) == errc::ok);
    return value;
  }
  /// The device's.
  std::uint64_t seen(std::uintptr_t page) {
    std::uint64_t value = 0;
    CHECK(device.load(at(page), value) == errc::ok);
    return value;
  }
};

}  // namespace hmm
