// SPDX-License-Identifier: MIT
#include <mmunotify/interval/detail/collision_word.hpp>

#include <doctest/doctest.h>

using mmunotify::detail::collision_word;

TEST_CASE("C7: every step of the word is the same before and after the sequence wraps") {
  constexpr std::uint64_t last = ~std::uint64_t{0} / collision_word::step;
  for (const std::uint64_t start : {std::uint64_t{0}, std::uint64_t{1}, last / 2, last - 1, last}) {
    collision_word w(start);
    const auto quiet = w.load();
    CHECK(collision_word::is_quiet(quiet));
    CHECK_FALSE(w.has_moved(quiet));
    w.raise();
    w.raise();
    CHECK(collision_word::is_active(w.load()));
    CHECK(w.has_moved(quiet));
    CHECK_FALSE(w.lower());
    CHECK(collision_word::is_active(w.load()));
    CHECK_FALSE(w.lower());
    CHECK(collision_word::is_quiet(w.load()));
    CHECK(w.has_moved(quiet));
    CHECK(w.load() == quiet + 2 * collision_word::step);  // modulo 2^64
  }
}

TEST_CASE("P4: a start that is taken back leaves the word as it was, beside others as well") {
  collision_word w(7);
  const auto quiet = w.load();
  w.raise();
  CHECK_FALSE(w.cancel());
  CHECK(w.load() == quiet);
  w.raise();
  w.raise();
  CHECK_FALSE(w.cancel());
  CHECK_FALSE(w.lower());
  CHECK(w.load() == quiet + collision_word::step);
}

TEST_CASE("C1: the end that leaves nobody wakes the sleepers, once") {
  collision_word w;
  CHECK_FALSE(w.announce_sleeper());  // nobody to wait for
  w.raise();
  w.raise();
  CHECK(w.announce_sleeper());
  CHECK(w.announce_sleeper());
  CHECK_FALSE(w.lower());
  CHECK(w.lower());
  CHECK(collision_word::is_quiet(w.load()));
  w.raise();
  CHECK(w.announce_sleeper());
  CHECK(w.cancel());
  CHECK(collision_word::is_quiet(w.load()));
}

TEST_CASE("C5: what is pending is not quiet, and is cleared only by who has seen its last setting") {
  collision_word w;
  const auto quiet = w.load();
  w.set_pending();
  const auto seen = w.load();
  CHECK(collision_word::is_pending(seen));
  CHECK(w.has_moved(quiet));
  w.set_pending();  // grown again, while somebody looked
  w.clear_pending(seen);
  CHECK(collision_word::is_pending(w.load()));
  w.clear_pending(w.load());
  CHECK(collision_word::is_quiet(w.load()));
  CHECK(w.has_moved(quiet));
  CHECK(w.has_moved(collision_word::no_value));
}
