// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/subscriber.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/recording_client.hpp"
#include "support/spaces.hpp"

using namespace mmunotify;

TEST_CASE("a subscriber is an idle node with a client until it is registered") {
  counting_client client;
  subscriber<counting_client> node{client};
  CHECK_FALSE(node.registered());
  CHECK(&node.client() == &client);
  under_primary primary;
  REQUIRE(primary.join(node) == errc::ok);
  CHECK(node.registered());
  CHECK(primary.space.unregister(node) == errc::ok);
  CHECK_FALSE(node.registered());
}

TEST_CASE("a client may have its node as a member") {
  struct driver {
    int drops = 0;
    subscriber<driver> node{*this};
    void invalidate_range_start(const invalidation&) noexcept { ++drops; }
  };
  driver d;
  tracked_primary primary;
  REQUIRE(primary.join(d.node) == errc::ok);
  { const auto inv = primary.space.invalidate({0, 1}, event::unmap); }
  CHECK(d.drops == 1);
  CHECK(primary.space.unregister(d.node) == errc::ok);
}

TEST_CASE("L1: a subscriber that is destroyed while registered is reported") {
  const contract_recorder recorder;
  counting_client client;
  alignas(subscriber<counting_client>) std::array<std::byte, sizeof(subscriber<counting_client>)> storage{};
  // Never destroyed: its list keeps the node, as a program would find out.
  auto* primary = new tracked_primary;
  auto* node = new (storage.data()) subscriber<counting_client>{client};
  REQUIRE(primary->join(*node) == errc::ok);
  node->~subscriber();
  CHECK(recorder.rules() == std::vector<std::string>{"L1", "L1"});
  node = new (storage.data()) subscriber<counting_client>{client};
  ::operator delete(primary, std::align_val_t{alignof(tracked_primary)});
}
