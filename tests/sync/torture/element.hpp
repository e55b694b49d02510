// SPDX-License-Identifier: MIT
#pragma once

// What is published, found, removed, and grows old.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include <mmunotify/sync/rcu.hpp>

#include "sync/torture/base.hpp"

#if TORTURE_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace torture {

inline constexpr std::size_t ledgers = 8;

template <class Domain>
class arena;
template <class Domain>
struct element;

/// What rcu_obj_base::retire and rcu_retire call.
template <class Domain>
struct recycle {
  void operator()(element<Domain>* e) const noexcept;
};

/// The payload is plain data: a reader that holds it too long races with whoever poisons it, and a sanitizer says so.
template <class Domain>
struct element : mmunotify::rcu_obj_base<element<Domain>, recycle<Domain>> {
  static constexpr std::uint64_t poison = 0xdead'0000'dead'0000;

  struct link_type : mmunotify::srcu_head {
    element* owner = nullptr;
  };

  std::uint64_t number = poison;
  std::uint64_t check = 0;

  std::atomic<std::uint32_t> age{0};  ///< 0 published, 1 removed, then one more for each grace period
  std::atomic<bool> taken{false};
  arena<Domain>* home = nullptr;
  link_type link;
  typename Domain::cookie cookie;

  /// A reader that has a ledger says that it has come, and, at the end of its section, that it leaves.
  std::array<std::atomic<std::uint64_t>, ledgers> come{};
  std::array<std::uint64_t, ledgers> left{};

  std::uint64_t expected() const noexcept {
    return (number * 0x9e3779b97f4a7c15U) ^ reinterpret_cast<std::uintptr_t>(this);
  }

  void initialise(std::uint64_t n) noexcept {
    paint(false);
    number = n;
    check = expected();
    age.store(0, std::memory_order_relaxed);
    for (auto& c : come) c.store(0, std::memory_order_relaxed);
    left.fill(0);
  }

  void spoil() noexcept {
    number = poison;
    check = 0;
    paint(true);
  }

 private:
  /// Without AddressSanitizer a late reader finds the poison; with it, it is caught reading.
  void paint([[maybe_unused]] bool forbidden) noexcept {
#if TORTURE_ASAN
    if (forbidden) {
      ASAN_POISON_MEMORY_REGION(&number, 2 * sizeof number);
    } else {
      ASAN_UNPOISON_MEMORY_REGION(&number, 2 * sizeof number);
    }
#endif
  }
};

/// A fixed number of elements, so that they come back soon. Lock-free, for callbacks and forked children.
template <class Domain>
class pool {
 public:
  static constexpr std::size_t size = 512;

  explicit pool(arena<Domain>& home) noexcept : elements_(std::make_unique<element<Domain>[]>(size)) {
    for (std::size_t i = 0; i < size; ++i) elements_[i].home = &home;
  }
  ~pool() {
    for (std::size_t i = 0; i < size; ++i) elements_[i].initialise(0);
  }
  pool(const pool&) = delete;
  pool& operator=(const pool&) = delete;

  /// Returns: nullptr if all are in use.
  element<Domain>* take() noexcept {
    const std::size_t first = next_.fetch_add(1, std::memory_order_relaxed);
    for (std::size_t i = 0; i < size; ++i) {
      auto& e = elements_[(first + i) % size];
      if (e.taken.load(std::memory_order_relaxed)) continue;
      if (e.taken.exchange(true, std::memory_order_acquire)) continue;
      e.initialise(numbers_.fetch_add(1, std::memory_order_relaxed));
      return &e;
    }
    return nullptr;
  }

  static void give_back(element<Domain>& e) noexcept {
    e.spoil();
    if (!e.taken.exchange(false, std::memory_order_release)) fail("an element was freed twice");
  }

  std::size_t in_use() const noexcept {
    std::size_t n = 0;
    for (std::size_t i = 0; i < size; ++i) n += elements_[i].taken.load(std::memory_order_relaxed) ? 1U : 0U;
    return n;
  }

 private:
  std::unique_ptr<element<Domain>[]> elements_;
  std::atomic<std::size_t> next_{0};
  std::atomic<std::uint64_t> numbers_{1};
};

}  // namespace torture
