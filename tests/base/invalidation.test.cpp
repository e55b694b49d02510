// SPDX-License-Identifier: MIT

#include <mmunotify/base/invalidation.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <type_traits>

#include <mmunotify/base/address.hpp>

using namespace mmunotify;

namespace {

static_assert(std::is_same_v<invalidation, basic_invalidation<std::uintptr_t>>);
static_assert(std::is_same_v<decltype(invalidation::range), range>);
static_assert(std::is_trivially_copyable_v<invalidation>);
static_assert(sizeof(invalidation) <= 5 * sizeof(void*));  // Linux: up to six words

}  // namespace

TEST_CASE("no field is ever left unset") {
  const invalidation i{};
  CHECK(i.range == range{0, 0});
  CHECK(i.event == event::unmap);
  CHECK(i.owner == nullptr);
  CHECK(i.blockable);
  const invalidation short_form{.range = {1, 2}};
  CHECK(short_form.owner == nullptr);
  CHECK(short_form.blockable);
}

TEST_CASE("the fields are what the bracket was opened with") {
  const int device = 0;
  const invalidation i{.range = {0x1000, 0x3000}, .event = event::migrate, .owner = &device, .blockable = false};
  CHECK(i.range.first == 0x1000);
  CHECK(i.range.last == 0x3000);
  CHECK(i.event == event::migrate);
  CHECK(i.owner == &device);
  CHECK_FALSE(i.blockable);
}

TEST_CASE("an invalidation can be keyed by a strong address") {
  const basic_invalidation<gfn> i{.range = {gfn{1}, gfn{2}}, .event = event::clear};
  CHECK(i.range.contains(gfn{1}));
  CHECK_FALSE(i.range.contains(gfn{2}));
}
