// SPDX-License-Identifier: MIT
#pragma once

// Collects what is wrong: from the scenarios, and from the library's own checks while they run.

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>

#include <mmunotify/config.hpp>
#include <mmunotify/testing/report.hpp>
#include <mmunotify/testing/schedule.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing::detail {

/// One scenario's verdict: the first thing that went wrong counts, what follows from it does not. Any thread.
class judge {
 public:
  judge(const char* scenario, std::uint64_t seed) noexcept {
    std::snprintf(failure_.scenario, sizeof failure_.scenario, "%s", scenario);
    failure_.seed = seed;
    previous_ = current.exchange(this, std::memory_order_acq_rel);  // (jd1) pairs with (jd2)
  }
  ~judge() { current.store(previous_, std::memory_order_release); }  // (jd1) pairs with (jd2)
  judge(const judge&) = delete;
  judge& operator=(const judge&) = delete;

  /// Effects: unless `ok`, the rule is broken, for the reason given. Returns: ok.
  template <class... Values>
  bool that(bool ok, const char* rule, const char* format, Values... values) noexcept {
    if (ok) return true;
    char sentence[sizeof failure_.sentence];
    if constexpr (sizeof...(Values) == 0) {
      std::snprintf(sentence, sizeof sentence, "%s", format);
    } else {
      std::snprintf(sentence, sizeof sentence, format, values...);
    }
    const std::lock_guard lock{mutex_};
    if (failed_.load(std::memory_order_relaxed)) return false;
    std::snprintf(failure_.rule, sizeof failure_.rule, "%s", rule);
    std::memcpy(failure_.sentence, sentence, sizeof sentence);
    failed_.store(true, std::memory_order_relaxed);  // read elsewhere only in order to stop early
    return false;
  }
  bool failed() const noexcept { return failed_.load(std::memory_order_relaxed); }
  void seed(std::uint64_t s) noexcept { failure_.seed = s; }
  /// Context: when nobody else judges any more.
  const failure& verdict() const noexcept { return failure_; }

  /// The library's contract handler while the kit runs: what it finds is a failure of the scenario.
  static void on_violation(const contract_violation& v) noexcept {
    if (is_wait_of_an_interval(v)) return;
    // (jd2) acquire pairs with (jd1): the judge is complete.
    if (judge* const j = current.load(std::memory_order_acquire); j != nullptr) {
      j->that(false, v.rule, "%s: %s", v.function, v.sentence);
    }
  }

 private:
  /// An interval's fault or removal would wait for a bracket of its own thread, as the thread plays the primary, too: a
  /// real one would wait, or not be there. What it gets tells it that it has failed. (In a hook it is a failure.)
  static bool is_wait_of_an_interval(const contract_violation& v) noexcept {
    if (current_schedule.callbacks != 0 || std::strcmp(v.rule, "L7") != 0) return false;
    for (const char* f : {"interval_notifier::read_begin", "interval_notifier::take_turn", "address_space::remove"}) {
      if (std::strcmp(v.function, f) == 0) return true;
    }
    return false;
  }

  static inline std::atomic<judge*> current{nullptr};

  failure failure_{};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  judge* previous_ = nullptr;
};

}  // namespace testing::detail
MMUNOTIFY_END_NAMESPACE
