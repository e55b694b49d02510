// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/subscription.hpp>

#include <doctest/doctest.h>

#include <mutex>
#include <shared_mutex>

#include "support/recording_client.hpp"
#include "support/spaces.hpp"

using namespace mmunotify;

TEST_CASE("a subscription registers when it is made and unregisters when it goes") {
  under_primary primary;
  counting_client client;
  {
    std::unique_lock held(primary.tables);
    const subscription<counting_client, under_primary::space_type> s(primary.space, client, held);
    held.unlock();
    REQUIRE(s);
    CHECK(s.error() == errc::ok);
    CHECK(&s.client() == &client);
    const auto reading = primary.lock();
    { const auto inv = primary.space.invalidate({0, 1}, event::unmap); }
    CHECK(client.starts.load() == 1);
  }
  CHECK(client.releases.load() == 1);
  CHECK_FALSE(primary.space.armed());
}

TEST_CASE("a subscription that failed says why and undoes nothing") {
  tracked_primary primary;
  CHECK(primary.space.release() == errc::ok);
  counting_client client;
  {
    const subscription<counting_client, tracked_primary::space_type> s(primary.space, client);
    CHECK_FALSE(s);
    CHECK(s.error() == errc::released);
  }
  CHECK(client.releases.load() == 0);
}
