// SPDX-License-Identifier: MIT
#pragma once

// What the conformance kit found, as a value: which rule of the contract an adapter breaks, in which scenario, and how
// to see it again.
//
// Nothing is thrown and nothing printed unless asked for; a test framework, or a program without one, looks at ok() and
// shows the text.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <span>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing {

/// One broken rule.
struct failure {
  char rule[16] = "";       ///< the contract's ID, "O1"
  char scenario[64] = "";   ///< what was going on
  std::uint64_t seed = 0;   ///< of a random round, to replay it; 0: there was nothing random
  char sentence[208] = "";  ///< what went wrong, with the values
};

/// What a run of the kit came to. A plain value of a few kilobytes.
class report {
 public:
  static constexpr std::size_t capacity = 24;

  /// Returns: true if no rule was seen broken.
  bool ok() const noexcept { return count_ == 0; }
  explicit operator bool() const noexcept { return ok(); }
  /// The failures, one for each scenario that failed, in the order in which they were found; the first `capacity`.
  std::span<const failure> failures() const noexcept { return {failures_.data(), count_}; }
  /// Returns: true if a failure names the rule.
  bool names(const char* rule) const noexcept {
    for (const failure& f : failures()) {
      if (std::strcmp(f.rule, rule) == 0) return true;
    }
    return false;
  }
  /// How many scenarios ran, and how many were left out because the adapter lacks the hook or makes no such claim.
  unsigned ran() const noexcept { return ran_; }
  unsigned skipped() const noexcept { return skipped_; }

  // --- For the kit. -------------------------------------------------------------------------------------------------

  void add(const failure& f) noexcept {
    if (count_ < capacity) failures_[count_++] = f;
  }
  void note_run() noexcept { ran_ += 1; }
  void note_skip() noexcept { skipped_ += 1; }

 private:
  std::array<failure, capacity> failures_{};
  std::size_t count_ = 0;
  unsigned ran_ = 0;
  unsigned skipped_ = 0;
};

/// Effects: one line for each failure, and one with the numbers.
inline void print(const report& r, std::FILE* to = stderr) noexcept {
  for (const failure& f : r.failures()) {
    std::fprintf(to, "%s broken, %s", f.rule, f.scenario);
    if (f.seed != 0) std::fprintf(to, " (seed %llu)", static_cast<unsigned long long>(f.seed));
    std::fprintf(to, ": %s\n", f.sentence);
  }
  std::fprintf(to, "%u scenarios, %u left out, %zu failed\n", r.ran(), r.skipped(), r.failures().size());
}

}  // namespace testing
MMUNOTIFY_END_NAMESPACE
