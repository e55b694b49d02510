// SPDX-License-Identifier: MIT

#include <mmunotify/testing/interval_adapter.hpp>

#include <doctest/doctest.h>

#include "testing/adapters/interval_mirror.hpp"
#include "testing/adapters/interval_regions.hpp"

using namespace mmunotify;
using testing::interval_conformance_adapter;

namespace {

struct driver {
  void invalidate_range_start(const interval_invalidation&) noexcept {}
};
struct complete {
  using client_type = driver;
  range at{};
  errc attach(testing::test_space&, range r) {
    at = r;
    return errc::ok;
  }
  errc detach(testing::test_space&) { return errc::ok; }
  testing::access_result access(std::uintptr_t, bool, std::uint64_t value) { return {errc::ok, value}; }
  bool mapped(std::uintptr_t a) { return at.contains(a); }
};
struct without_range : complete {
  errc attach(testing::test_space&) { return errc::ok; }
};
struct without_hooks : complete {
  struct client_type {};
};

}  // namespace

TEST_CASE("the concept takes what has all functions, and a client with hooks") {
  static_assert(interval_conformance_adapter<complete>);
  static_assert(!interval_conformance_adapter<without_range> && !interval_conformance_adapter<without_hooks>);
  static_assert(interval_conformance_adapter<adapters::interval_mirror> &&
                interval_conformance_adapter<adapters::interval_regions>);
}

TEST_CASE("abilities are found where they are, and only there") {
  using adapters::interval_mirror, adapters::interval_regions;
  static_assert(testing::can_resize<interval_mirror> && !testing::can_resize<interval_regions>);
  static_assert(testing::can_split<interval_mirror> && !testing::can_split<interval_regions>);
  static_assert(testing::can_detach_later<interval_mirror> && !testing::can_detach_later<interval_regions>);
  static_assert(testing::can_take_turns<interval_mirror> && !testing::can_take_turns<interval_regions>);
  static_assert(testing::claims_precision<interval_mirror> && !testing::claims_precision<complete>);
}

TEST_CASE("an interval adapter is one like others when it is placed") {
  using placed = testing::detail::placed<complete*>;
  static_assert(testing::conformance_adapter<placed> && testing::detail::is_placed<placed>);
  static_assert(!testing::can_be_held<placed> && !testing::has_owner_name<placed>);
  static_assert(testing::can_be_held<testing::detail::placed<adapters::interval_mirror*>>);
  complete c;
  placed p(&c);
  testing::test_space space;
  CHECK(p->attach(space) == errc::ok);
  CHECK(c.at == testing::window);
  (*p).where = testing::pages_at(3);
  CHECK(p->attach(space) == errc::ok);
  CHECK(p->mapped(testing::pages_at(3).first));
  CHECK_FALSE(p->mapped(testing::pages_at(4).first));
  CHECK(p->access(0, false, 7).value == 7);
  CHECK(p->detach(space) == errc::ok);
}
