// SPDX-License-Identifier: MIT

#include <mmunotify/testing/adapter.hpp>

#include <cstdint>

#include <doctest/doctest.h>

#include "testing/adapters/gpu.hpp"
#include "testing/adapters/mirror.hpp"
#include "testing/adapters/rdma.hpp"
#include "testing/adapters/shadow.hpp"

using namespace mmunotify;
using testing::conformance_adapter;

namespace {

struct driver {
  void release() noexcept {}
};
struct complete {
  using client_type = driver;
  errc attach(testing::test_space&) { return errc::ok; }
  errc detach(testing::test_space&) { return errc::ok; }
  testing::access_result access(std::uintptr_t, bool, std::uint64_t) { return {}; }
  bool mapped(std::uintptr_t) { return false; }
};
struct without_client : complete {
  struct client_type {};  // has no hook
};
struct with_other_access : complete {
  bool access(std::uintptr_t, bool) { return true; }
};
struct imprecise : complete {
  static constexpr bool precise = false;
};

}  // namespace

TEST_CASE("the concept takes what has all functions, and a client with hooks") {
  static_assert(conformance_adapter<complete>);
  static_assert(!conformance_adapter<driver>);
  static_assert(!conformance_adapter<without_client>);
  static_assert(!conformance_adapter<with_other_access>);
  static_assert(conformance_adapter<adapters::mirror> && conformance_adapter<adapters::gpu> &&
                conformance_adapter<adapters::rdma> && conformance_adapter<adapters::shadow>);
}

TEST_CASE("claims and abilities are found where they are, and only there") {
  using testing::can_be_held;
  using testing::claims_precision;
  using testing::has_owner_name;
  static_assert(!claims_precision<complete> && !claims_precision<imprecise> && !claims_precision<adapters::rdma>);
  static_assert(claims_precision<adapters::mirror> && claims_precision<adapters::shadow>);
  static_assert(can_be_held<adapters::mirror> && !can_be_held<adapters::gpu>);
  static_assert(has_owner_name<adapters::gpu> && !has_owner_name<adapters::mirror>);
}

TEST_CASE("the pages of the window lie side by side") {
  using testing::pages_at;
  CHECK(pages_at(0).first == testing::window.first);
  CHECK(pages_at(3).last == pages_at(4).first);
  CHECK(pages_at(testing::window_pages - 1).last == testing::window.last);
  CHECK(pages_at(0, testing::window_pages) == testing::window);
}
