// SPDX-License-Identifier: MIT
#pragma once

// What must hold for any bytes that somebody calls a capture: they are refused with a sentence and leave nothing, or
// they are read and can be replayed. Anything else ends the program. Called by libFuzzer (fuzz_capture.cpp) and by a
// seeded generator (fuzz_capture.test.cpp).

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <type_traits>
#include <variant>

#include "capture.hpp"
#include "capture_access.hpp"
#include "capture_replay.hpp"

namespace fuzz {

inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_capture: %s\n", what);
  std::abort();
}

/// A damaged capture may announce more than anybody wants to wait for.
inline constexpr std::uint64_t most_translations = 4096;

inline std::uint64_t replay(const capture::linux_tables& t) {
  if (t.translations > most_translations) return 0;
  capture::report r;
  capture::with_walked_mode(t.mode, [&]<class Mode>(std::type_identity<Mode>) {
    capture::check_linux_capture(t, capture::walker_translator<Mode>{t}, r);
  });
  demand(r.checked == t.translations, "a translation was left out");
  return r.checked;
}
inline std::uint64_t replay(const capture::kvm_translations& k) {
  capture::report r;
  capture::with_walked_mode(k.mode, [&](auto mode) { capture::check_kvm_translations(k, mode, r); });
  demand(r.checked == k.answers.size(), "an answer was left out");
  return r.checked;
}
inline std::uint64_t replay(const capture::access_matrix& m) {
  if (m.outcomes.size() > most_translations * 8) return 0;
  capture::report r;
  capture::check_matrix(m, r);
  demand(r.checked + r.skipped == m.outcomes.size(), "a row was left out");
  return r.checked;
}
inline std::uint64_t replay(const capture::access_fuzz& f) {
  capture::report r;
  capture::check_fuzz(f, r);
  demand(r.checked == f.rows.size(), "a row was left out");
  return r.checked;
}
inline std::uint64_t replay(const capture::pse36_translations& p) {
  capture::report r;
  capture::check_pse36(p, r);
  demand(r.checked == p.rows.size(), "a line was left out");
  return r.checked;
}

/// Returns: the bytes were read as a capture.
inline bool try_bytes(std::span<const std::uint8_t> bytes) {
  const auto result = capture::parse(bytes, "fuzzed");
  const bool empty = std::holds_alternative<std::monostate>(result.value);
  demand(static_cast<bool>(result) == !empty, "an error came with a value, or none without one");
  demand(result || (result.error.starts_with("fuzzed: ") && result.error.size() > 12), "an error without a reason");
  std::visit(
      []<class Capture>(const Capture& c) {
        if constexpr (!std::is_same_v<Capture, std::monostate>) replay(c);
      },
      result.value);
  return !empty;
}

}  // namespace fuzz
