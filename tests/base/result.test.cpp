// SPDX-License-Identifier: MIT

#include <mmunotify/base/result.hpp>

#include <doctest/doctest.h>

#include <set>
#include <string>

using namespace mmunotify;

namespace {

constexpr auto last_errc = errc::refused_by_system;

}  // namespace

TEST_CASE("success is zero, and the only zero") {
  CHECK(static_cast<unsigned>(errc::ok) == 0);
  CHECK(errc{} == errc::ok);
}

TEST_CASE("every error has a sentence of its own") {
  std::set<std::string> sentences;
  for (unsigned i = 0; i <= static_cast<unsigned>(last_errc); ++i) {
    const std::string sentence = to_string(static_cast<errc>(i));
    CAPTURE(i);
    CHECK_FALSE(sentence.empty());
    CHECK(sentence != "unknown error");
    sentences.insert(sentence);
  }
  CHECK(sentences.size() == static_cast<unsigned>(last_errc) + 1);
}

TEST_CASE("a number that is no error has a sentence too") {
  CHECK(std::string{to_string(static_cast<errc>(static_cast<unsigned>(last_errc) + 1))} == "unknown error");
  CHECK(std::string{to_string(static_cast<errc>(255))} == "unknown error");
}

TEST_CASE("an error takes one byte and is compared at compile time") {
  static_assert(sizeof(errc) == 1);
  static_assert(errc::ok != errc::again);
  static_assert(to_string(errc::ok)[0] == 's');
}
