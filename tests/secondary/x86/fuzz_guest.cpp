// SPDX-License-Identifier: MIT

// Guests of the shadow MMU under libFuzzer: fuzz_guest [options] <new findings>

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "fuzz_guest.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {
/// A demand that fails outside of a test case ends the program, and libFuzzer keeps the input.
void fail(const doctest::AssertData& a) {
  if (!a.m_failed) return;
  std::fprintf(stderr, "fuzz_guest: %s:%d: %s\n", a.m_file, a.m_line, a.m_expr);
  std::abort();
}

doctest::Context& demands() {
  static doctest::Context context;
  context.setAsDefaultForAssertsOutOfTestCases();
  context.setAssertHandler(&fail);
  return context;
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  [[maybe_unused]] static doctest::Context& context = demands();
  static fuzz::tally seen;
  fuzz::try_bytes({data, size}, seen);
  return 0;
}
