// SPDX-License-Identifier: MIT
#pragma once

// Catches contract violations instead of aborting, for tests that provoke them.

#include <mutex>
#include <string>
#include <vector>

#include <mmunotify/config.hpp>

/// While it lives, violations are recorded, from all threads. One at a time.
class contract_recorder {
 public:
  contract_recorder() { previous_ = mmunotify::set_contract_handler(&record); }
  ~contract_recorder() {
    mmunotify::set_contract_handler(previous_);
    const std::lock_guard lock(mutex());
    records().clear();
  }
  contract_recorder(const contract_recorder&) = delete;
  contract_recorder& operator=(const contract_recorder&) = delete;

  /// The rules' IDs, in the order of their violation.
  std::vector<std::string> rules() const {
    const std::lock_guard lock(mutex());
    std::vector<std::string> ids;
    for (const auto& r : records()) ids.push_back(r.rule);
    return ids;
  }
  /// The sentence of the last violation.
  std::string sentence() const {
    const std::lock_guard lock(mutex());
    return records().empty() ? std::string() : records().back().sentence;
  }

 private:
  struct entry {
    std::string rule;
    std::string sentence;
  };
  static std::mutex& mutex() {
    static std::mutex m;
    return m;
  }
  static std::vector<entry>& records() {
    static std::vector<entry> r;
    return r;
  }
  static void record(const mmunotify::contract_violation& v) noexcept {
    const std::lock_guard lock(mutex());
    records().push_back({v.rule, std::string(v.function) + ": " + v.sentence});
  }

  mmunotify::contract_handler previous_;
};
