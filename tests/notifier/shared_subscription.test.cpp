// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/shared_subscription.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

struct mirror {
  struct account {
    std::atomic<int> made{0};
    std::atomic<int> freed{0};
    std::atomic<int> released{0};
    std::atomic<int> calls{0};
    std::atomic<int> late{0};  ///< callbacks of a client that was freed, or freed while one ran
  };
  account& books;
  std::atomic<int> running{0};
  bool gone = false;

  explicit mirror(account& a) noexcept : books(a) { books.made.fetch_add(1); }
  ~mirror() {
    if (running.load() != 0) books.late.fetch_add(1);
    gone = true;
    books.freed.fetch_add(1);
  }
  void invalidate_range_start(const invalidation&) noexcept {
    running.fetch_add(1);
    books.calls.fetch_add(1);
    if (gone) books.late.fetch_add(1);
    running.fetch_sub(1);
  }
  void invalidate_range_end(const invalidation&) noexcept {}
  void release() noexcept { books.released.fetch_add(1); }
};

template <class P>
auto share(P& primary, mirror::account& books, std::uint64_t number = 0) {
  using shared = shared_subscription<mirror, typename P::space_type>;
  const auto make = [&books] { return new (std::nothrow) mirror(books); };
  if constexpr (std::is_same_v<P, tracked_primary>) {
    return shared::get_numbered(primary.space, number, make);
  } else {
    const std::unique_lock held(primary.tables);
    return shared::get_numbered(primary.space, number, make, held);
  }
}

}  // namespace

TEST_CASE_TEMPLATE("L2: a second get returns the same client; after the last put it is freed once", P, under_primary,
                   keyed_primary, tracked_primary) {
  P primary;
  mirror::account books;
  {
    auto a = share(primary, books);
    REQUIRE(a);
    auto b = share(primary, books);
    CHECK(&*a == &*b);
    auto other = share(primary, books, 7);
    CHECK(&*other != &*a);
    CHECK(books.made.load() == 2);
    a.put();
    CHECK_FALSE(a);
    CHECK(a.error() == errc::not_registered);
    {
      const auto reading = primary.lock();
      const auto inv = primary.space.invalidate({0, 1}, event::unmap);
    }
    CHECK(books.calls.load() == 2);  // b's and the other
    auto c = b;
    CHECK(&*c == &*b);
  }
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(books.freed.load() == 2);
  CHECK(books.released.load() == 2);
  CHECK_FALSE(primary.space.armed());
  // From the beginning.
  auto again = share(primary, books);
  CHECK(books.made.load() == 3);
  again.put();
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(books.freed.load() == 3);
  CHECK(books.late.load() == 0);
}

TEST_CASE("L2: shares move and are assigned; each is put once") {
  tracked_primary primary;
  mirror::account books;
  auto a = share(primary, books);
  auto b = std::move(a);
  CHECK_FALSE(a);
  CHECK(b);
  a = b;
  CHECK(&*a == &*b);
  b = share(primary, books, 3);
  CHECK(&*a != &*b);
  a = {};
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(books.freed.load() == 1);
  b.put();
  b.put();
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(books.freed.load() == 2);
}

TEST_CASE("L2: put in the client's own callback, and get of the same client there") {
  using shared = shared_subscription<mirror, tracked_primary::space_type>;
  tracked_primary primary;
  mirror::account books;
  struct putter {
    tracked_primary& primary;
    mirror::account& books;
    shared* share;
    bool found = false;
    errc other = errc::ok;
    void invalidate_range_start(const invalidation&) noexcept {
      if (!*share) return;
      const auto make = [this] { return new (std::nothrow) mirror(books); };
      found = static_cast<bool>(shared::get(primary.space, make));
      other = shared::get_numbered(primary.space, 9, make).error();  // there is none, and to register would block
      share->put();
    }
  };
  auto s = share(primary, books);
  putter client{primary, books, &s};
  subscriber<putter> node{client};
  REQUIRE(primary.join(node) == errc::ok);
  { const auto inv = primary.space.invalidate({0, 1}, event::unmap); }
  CHECK(client.found);
  CHECK(client.other == errc::would_deadlock);
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(books.made.load() == 1);
  CHECK(books.freed.load() == 1);
  CHECK(primary.space.unregister(node) == errc::ok);
}

TEST_CASE("L2: a get that fails leaves no client behind") {
  using shared = shared_subscription<mirror, tracked_primary::space_type>;
  tracked_primary primary;
  mirror::account books;
  auto nothing = shared::get(primary.space, []() -> mirror* { return nullptr; });
  CHECK_FALSE(nothing);
  CHECK(nothing.error() == errc::no_memory);
  auto kept = share(primary, books);
  CHECK(primary.space.release() == errc::ok);
  CHECK(books.released.load() == 1);
  auto late = share(primary, books);
  CHECK_FALSE(late);
  CHECK(late.error() == errc::released);
  CHECK(books.made.load() == 2);
  CHECK(books.freed.load() == 1);  // the late one, at once
  kept.put();                      // legal after the release (L5)
  CHECK(books.freed.load() == 2);
  CHECK(books.released.load() == 1);
}

TEST_CASE("L7: to get a shared client while another is made would wait for itself") {
  using shared = shared_subscription<mirror, tracked_primary::space_type>;
  const contract_recorder recorder;
  tracked_primary primary;
  mirror::account books;
  errc inner = errc::ok;
  {
    const auto outer = shared::get(primary.space, [&] {
      inner = shared::get_numbered(primary.space, 5, [&] { return new (std::nothrow) mirror(books); }).error();
      return new (std::nothrow) mirror(books);
    });
    CHECK(outer);
    CHECK(inner == errc::would_deadlock);
    CHECK(recorder.rules() == std::vector<std::string>{"L7"});
  }
  CHECK(primary.space.barrier() == errc::ok);
  CHECK(books.made.load() == 1);
  CHECK(books.freed.load() == 1);
}

TEST_CASE("L2: compiled out there is nothing to share") {
  address_space<disabled> space;
  mirror::account books;
  const auto s = shared_subscription<mirror, address_space<disabled>>::get(space, [&] { return new mirror(books); });
  CHECK(s.error() == errc::disabled);
  CHECK(books.freed.load() == books.made.load());
}

TEST_CASE_TEMPLATE("L2: threads that get and put beside brackets: every client is freed once, after its callbacks", P,
                   under_primary, tracked_primary) {
  mirror::account books;
  {
    P primary;
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < 150; ++i) {
          auto a = share(primary, books);
          CHECK(a);
          auto b = share(primary, books);
          CHECK(b);
        }
      });
    }
    std::atomic<bool> stop{false};
    std::thread changer([&] {
      while (!stop.load()) {
        const auto reading = primary.lock();
        const auto inv = primary.space.invalidate({0, 1}, event::unmap);
      }
    });
    for (auto& t : threads) t.join();
    stop.store(true);
    changer.join();
    CHECK(primary.space.barrier() == errc::ok);
    CHECK_FALSE(primary.space.armed());
  }
  CHECK(books.made.load() == books.freed.load());
  CHECK(books.made.load() == books.released.load());
  CHECK(books.late.load() == 0);
}
