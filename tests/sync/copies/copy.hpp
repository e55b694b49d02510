// SPDX-License-Identifier: MIT
#pragma once

// A copy of the library, as the test sees it. The program and some shared objects have one each: all are compiled from
// copy.cpp, and none shares a variable of the library with another. Only addresses of the library's objects cross this
// interface, and numbers.

#include <atomic>
#include <cstddef>
#include <cstdint>

/// What readers look at. It is reused after a grace period: a reader that is late finds it dead, or torn.
struct copy_object {
  std::atomic<std::uint64_t> alive{1};
  std::uint64_t number = 0;
  std::uint64_t square = 0;

  /// Returns: 0 if nothing is wrong.
  int faults() const noexcept {
    const std::uint64_t n = number;
    const int torn = square != n * n ? 1 : 0;
    return torn + (alive.load(std::memory_order_relaxed) == 0 ? 1 : 0);
  }
};

/// A section's token, a hand-off's, or a cookie: bytes that the other copies keep.
struct copy_token {
  alignas(8) std::byte bytes[16];
};

/// A deferred callback.
struct copy_job {
  alignas(8) std::byte head[16] = {};
  void (*function)(copy_job*) noexcept = nullptr;
};

struct copy_interface {
  int checked;  ///< MMUNOTIFY_CHECKED
  bool clang;   ///< which compiler
  std::size_t domain_size;
  const void* runtime;  ///< the copy's own

  void* (*make)();
  void (*destroy)(void* domain);
  std::uint64_t (*grace_periods)(void* domain);
  std::size_t (*records)();  ///< how many threads the copy's own runtime knows, or has known

  copy_token (*read_lock)(void* domain);
  void (*read_unlock)(void* domain, copy_token);
  void (*lock)(void* domain);
  void (*unlock)(void* domain);
  copy_token (*down_read)(void* domain);
  void (*up_read)(void* domain, copy_token);
  bool (*held)(void* domain);
  int (*look)(void* domain, const std::atomic<copy_object*>&);  ///< a whole section; the faults of what is found

  void (*synchronize)(void* domain);
  void (*synchronize_expedited)(void* domain);
  copy_token (*start_poll)(void* domain);
  bool (*poll)(void* domain, copy_token);
  bool (*call)(void* domain, copy_job&);  ///< job.function is called by code of this copy
  void (*barrier)(void* domain);

  void (*on_violation)(void (*)(const char* rule) noexcept);  ///< null: as usual
};

/// The name by which a shared object gives its interface away.
extern "C" const copy_interface* mmunotify_test_copy();
