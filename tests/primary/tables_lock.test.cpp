// SPDX-License-Identifier: MIT

#include <mmunotify/primary/tables_lock.hpp>

#include <doctest/doctest.h>

#include <shared_mutex>
#include <thread>

using namespace mmunotify;

namespace {

/// Whether another thread could lock the mutex now: 0 not at all, 1 shared, 2 exclusively.
int available(std::shared_mutex& m) {
  int found = 0;
  std::thread([&] {
    if (m.try_lock_shared()) {
      found = 1;
      m.unlock_shared();
    }
    if (m.try_lock()) {
      found = 2;
      m.unlock();
    }
  }).join();
  return found;
}

TEST_CASE("each guard holds the mutex as its name says, for its scope") {
  tables_lock lock;
  {
    const tables_lock::shared in{lock};
    CHECK(in.error() == errc::ok);
    CHECK(available(lock.mutex()) == 1);
  }
  {
    const tables_lock::exclusive in{lock};
    CHECK(in.error() == errc::ok);
    CHECK(available(lock.mutex()) == 0);
  }
  {
    const tables_lock::marked in{lock};
    CHECK(in.error() == errc::ok);
    CHECK(available(lock.mutex()) == 2);
  }
  {
    const auto held = lock.witness();
    CHECK(held.owns_lock());
    CHECK(held.mutex() == &lock.mutex());
    CHECK(available(lock.mutex()) == 0);
  }
  CHECK(available(lock.mutex()) == 2);
}

TEST_CASE("a guard that only tries says again instead of waiting, and unlocks only what it has locked") {
  tables_lock lock;
  {
    const tables_lock::try_shared in{lock};
    CHECK(in.error() == errc::ok);
    CHECK(lock.inside());
    CHECK(available(lock.mutex()) == 1);
    const tables_lock::try_shared again{lock};
    CHECK(again.error() == errc::would_deadlock);
  }
  CHECK(available(lock.mutex()) == 2);
  const tables_lock::exclusive held{lock};
  std::thread([&] {
    const tables_lock::try_shared in{lock};
    CHECK(in.error() == errc::again);
    CHECK_FALSE(lock.inside());
  }).join();
  CHECK(available(lock.mutex()) == 0);
}

template <class Outer, class Inner>
void refuses() {
  tables_lock lock;
  CHECK_FALSE(lock.inside());
  {
    const Outer outer{lock};
    CHECK(lock.inside());
    const int before = available(lock.mutex());
    {
      const Inner inner{lock};
      CHECK(inner.error() == errc::would_deadlock);
      CHECK(lock.inside());
    }
    CHECK(lock.inside());
    CHECK(available(lock.mutex()) == before);
    bool inside_elsewhere = true;
    std::thread([&] { inside_elsewhere = lock.inside(); }).join();
    CHECK_FALSE(inside_elsewhere);
  }
  CHECK_FALSE(lock.inside());
  CHECK(available(lock.mutex()) == 2);
}

TEST_CASE("L7: a thread that is inside is refused, whatever it holds and wants") {
  refuses<tables_lock::shared, tables_lock::shared>();
  refuses<tables_lock::shared, tables_lock::exclusive>();
  refuses<tables_lock::exclusive, tables_lock::shared>();
  refuses<tables_lock::exclusive, tables_lock::exclusive>();
  refuses<tables_lock::marked, tables_lock::shared>();
  refuses<tables_lock::marked, tables_lock::exclusive>();
}

TEST_CASE("locks of different primaries nest") {
  tables_lock a;
  tables_lock b;
  const tables_lock::exclusive in_a{a};
  {
    const tables_lock::exclusive in_b{b};
    CHECK(in_b.error() == errc::ok);
    CHECK(a.inside());
    CHECK(b.inside());
    const tables_lock::shared again{a};
    CHECK(again.error() == errc::would_deadlock);
  }
  CHECK_FALSE(b.inside());
  CHECK(a.inside());
}

}  // namespace
