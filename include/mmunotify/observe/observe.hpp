// SPDX-License-Identifier: MIT
#pragma once

// What an address space tells an observer, and the two observers everybody needs: none (free) and counters.
//
// An observer is a policy of address_space. Its functions are called from armed paths only; a disarmed hook stays what
// it is. They run inside read sections, in parallel, and must neither throw nor wait for the space.

#include <array>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace observe {

/// What happened.
enum class occurrence : std::uint8_t {
  bracket,       ///< an armed bracket started
  refusal,       ///< a non-blocking start was refused
  callback,      ///< a start, end or young hook was called
  release,       ///< a release hook was called
  registration,  ///< a subscriber was registered
  grace_period,  ///< the space waited for one
};
inline constexpr std::size_t occurrence_count = 6;

template <class O>
concept observer = requires(O& o, occurrence what, std::uint64_t n) {
  typename O::is_observer;
  { o.note(what, n) } noexcept;
};

/// Empty and free.
struct none {
  using is_observer = void;
  static constexpr void note(occurrence, std::uint64_t) noexcept {}
};

/// Counts every occurrence. Threads are spread over cache lines; reading adds them up.
class counters {
 public:
  using is_observer = void;

  void note(occurrence what, std::uint64_t n) noexcept {
    // Relaxed: statistics, ordered with nothing.
    shards_[shard()].counts[static_cast<std::size_t>(what)].fetch_add(n, std::memory_order_relaxed);
  }

  /// Returns: the sum over all threads; exact once they are quiet.
  std::uint64_t total(occurrence what) const noexcept {
    std::uint64_t sum = 0;
    for (const auto& s : shards_) sum += s.counts[static_cast<std::size_t>(what)].load(std::memory_order_relaxed);
    return sum;
  }

 private:
  static constexpr std::size_t shard_count = 16;
  struct alignas(64) counted {
    std::array<std::atomic<std::uint64_t>, occurrence_count> counts{};
  };

  static std::size_t shard() noexcept {
    static std::atomic<std::size_t> next{0};
    thread_local const std::size_t mine = next.fetch_add(1, std::memory_order_relaxed) % shard_count;
    return mine;
  }

  std::array<counted, shard_count> shards_{};
};

static_assert(observer<none> && observer<counters>);

}  // namespace observe
MMUNOTIFY_END_NAMESPACE
