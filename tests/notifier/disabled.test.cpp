// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/disabled.hpp>

#include <doctest/doctest.h>

#include <mutex>
#include <type_traits>

#include "support/recording_client.hpp"

using namespace mmunotify;

TEST_CASE("D2: a space that is compiled out has no size, no state and no subscribers") {
  using space_type = address_space<disabled>;
  struct table {
    void* root = nullptr;
    [[no_unique_address]] space_type space;
  };
  static_assert(std::is_empty_v<space_type> && sizeof(table) == sizeof(void*));

  table t;
  counting_client client;
  subscriber<counting_client> node{client};
  std::mutex tables;
  const std::unique_lock held(tables);
  CHECK(t.space.register_subscriber(node) == errc::disabled);
  CHECK(t.space.register_subscriber(node, held) == errc::disabled);
  CHECK_FALSE(node.registered());
  CHECK(t.space.unregister(node) == errc::not_registered);
  CHECK_FALSE(t.space.armed());
  { const auto inv = t.space.invalidate({0, 1}, event::unmap); }
  if (const auto inv = t.space.try_invalidate({0, 1}, event::unmap)) {
    CHECK(t.space.bracketed({0, 1}, event::unmap, [] { return 7; }) == 7);
  }
  const auto ticket = t.space.invalidate_range_start({{0, 1}});
  t.space.invalidate_range_end(ticket);
  CHECK_FALSE(t.space.clear_flush_young({0, 1}));
  CHECK(t.space.release() == errc::ok);
  CHECK(client.starts.load() == 0);
}
