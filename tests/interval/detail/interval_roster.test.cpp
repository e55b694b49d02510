// SPDX-License-Identifier: MIT

// Who changes an interval beside others; insertions and changes that run out of memory, at each of their allocations,
// or out of slots: nothing has changed.

#include <mmunotify/interval/detail/interval_roster.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <thread>
#include <vector>

#include "interval/interval_space.hpp"
#include "support/domains.hpp"
#include "support/recording_client.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

/// How many allocations of this thread succeed before one fails; negative: all do.
thread_local int allocations_left = -1;

bool fails() noexcept {
  if (allocations_left < 0) return false;
  if (allocations_left == 0) return true;
  --allocations_left;
  return false;
}

/// f() with its allocation number n failing, and all behind it.
template <class F>
errc with_memory_for(int n, F f) {
  allocations_left = n;
  const errc e = f();
  allocations_left = -1;
  return e;
}

}  // namespace

// Not inlined: gcc would take malloc and delete for a mismatch.
[[gnu::noinline]] void* operator new(std::size_t n, const std::nothrow_t&) noexcept {
  return fails() ? nullptr : std::malloc(n != 0 ? n : 1);
}
[[gnu::noinline]] void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
  const auto align = static_cast<std::size_t>(a);
  return fails() ? nullptr : std::aligned_alloc(align, (n + align - 1) / align * align);
}
[[gnu::noinline]] void* operator new(std::size_t n) {
  if (void* const p = std::malloc(n != 0 ? n : 1); p != nullptr) return p;
  std::abort();
}
[[gnu::noinline]] void* operator new(std::size_t n, std::align_val_t a) {
  const auto align = static_cast<std::size_t>(a);
  if (void* const p = std::aligned_alloc(align, (n + align - 1) / align * align); p != nullptr) return p;
  std::abort();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace {

constexpr std::uintptr_t page = 0x1000;
using notifier_of = interval_notifier<counting_client>;

/// Waits until nothing is left of what was taken away or given up.
void settle(interval_space& space) {
  for (int i = 0; i < 4; ++i) space.domain.barrier();
}
int hits(interval_space& space, const counting_client& c, range r) {
  const int before = c.starts.load();
  { const auto b = space.invalidate(r); }
  CHECK(c.starts.load() == c.ends.load());
  return c.starts.load() - before;
}

struct nobody {
  void invalidate_range_start(const invalidation&) noexcept {}
};

/// Removes its interval in the first callback that it gets.
struct leaver {
  interval_space* space = nullptr;
  interval_notifier<leaver>* self = nullptr;
  errc said = errc::ok;
  std::atomic<bool> gone{true};
  void invalidate_range_start(const invalidation&) noexcept {
    if (gone.load()) return;
    said = space->set.remove_async(*self);
    gone.store(true);
  }
};

}  // namespace

TEST_CASE("L7: who changes an interval beside others finds it registered, whatever moment it meets") {
  interval_space space;
  nobody client;
  interval_notifier<nobody> low{client};
  interval_notifier<nobody> high{client};
  REQUIRE(space.set.insert(low, {0, page}) == errc::ok);
  // Not inside the interval: it is claimed, looked at, and let go again.
  const auto try_often = [&](int& wrong) {
    for (int i = 0; i < 200'000; ++i) {
      const errc e = space.set.split(low, 0, high);
      if (e != errc::bad_range && e != errc::again) ++wrong;
    }
  };
  int wrong_here = 0;
  int wrong_there = 0;
  std::thread other([&] { try_often(wrong_there); });
  try_often(wrong_here);
  other.join();
  CHECK(wrong_here == 0);
  CHECK(wrong_there == 0);
  CHECK(space.set.remove(low) == errc::ok);
}

TEST_CASE("L7: a callback that comes before the insertion has returned removes the interval") {
  interval_space space;
  leaver client;
  interval_notifier<leaver> iv{client};
  client.space = &space;
  client.self = &iv;
  std::atomic<bool> over{false};
  std::thread primary([&] {
    while (!over.load()) const auto b = space.invalidate({0, page});
  });
  int missed = 0;
  for (int i = 0; i < 500; ++i) {
    client.gone.store(false);
    REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
    wait_for(client.gone);
    if (client.said != errc::ok) {
      ++missed;
      CHECK(space.set.remove(iv) == errc::ok);
    }
    while (iv.registered()) space.domain.barrier();
  }
  over.store(true);
  primary.join();
  CHECK(missed == 0);
}

TEST_CASE("L1: while a section that has found an interval's range is open, the interval does not become free") {
  interval_space space;
  nobody client;
  interval_notifier<nobody> iv{client};
  int freed = 0;
  for (int i = 0; i < 3000; ++i) {
    REQUIRE(space.set.insert(iv, {0, page}) == errc::ok);
    REQUIRE(space.set.remove_async(iv) == errc::ok);
    while (iv.registered()) {
      const basic_read_section s(space.domain);
      if (iv.range().empty()) continue;
      let_others_run();
      if (!iv.registered()) ++freed;
    }
  }
  CHECK(freed == 0);
}

TEST_CASE("L6: an insertion that runs out of memory, wherever, changes nothing") {
  // Ranges of different classes, so that each has the whole way to its leaf to make.
  for (const range r : {range{0x1000, 0x2000}, range{0x40000000, 0x80000000}, range{7, 8}}) {
    interval_space space;
    counting_client c;
    notifier_of iv{c};
    int failures = 0;
    while (with_memory_for(failures, [&] { return space.set.insert(iv, r); }) == errc::no_memory) {
      ++failures;
      CHECK_FALSE(iv.registered());
      CHECK(hits(space, c, r) == 0);
      CHECK(space.set.remove(iv) == errc::not_registered);
      settle(space);
      CHECK(space.set.empty());
    }
    CHECK(failures > 1);
    CHECK(iv.range() == r);
    CHECK(hits(space, c, r) == 1);
    CHECK(space.set.remove(iv) == errc::ok);
  }
}

TEST_CASE("L6: a resize or split that runs out of memory leaves the interval as it was") {
  for (const bool splits : {false, true}) {
    interval_space space;
    counting_client low;
    counting_client high;
    notifier_of iv{low};
    notifier_of upper{high};
    const range before{0x10000, 0x20000};
    constexpr std::uintptr_t at = 0x10000 + page;
    REQUIRE(space.set.insert(iv, before) == errc::ok);
    const auto seq = iv.read_begin();
    const auto change = [&] {
      return splits ? space.set.split(iv, at, upper) : space.set.resize(iv, {0x10000, 0x40000000});
    };
    int failures = 0;
    while (with_memory_for(failures, change) == errc::no_memory) {
      ++failures;
      CHECK(iv.range() == before);
      CHECK_FALSE(iv.read_retry(seq));  // P4
      CHECK_FALSE(upper.registered());
      settle(space);
    }
    CHECK(failures > 1);
    CHECK(iv.read_retry(seq));
    CHECK(iv.range() == (splits ? range{0x10000, at} : range{0x10000, 0x40000000}));
    CHECK(upper.registered() == splits);
    CHECK(hits(space, low, {0x10000, 0x10001}) == 1);
    CHECK(hits(space, high, {at, at + 1}) == (splits ? 1 : 0));
    CHECK(space.set.remove(iv) == errc::ok);
    if (splits) CHECK(space.set.remove(upper) == errc::ok);
    settle(space);
    CHECK(space.set.empty());
  }
}

TEST_CASE_TEMPLATE("L6: the first interval of a space that runs out of memory leaves it disarmed", P, under_primary,
                   keyed_primary, tracked_primary) {
  for (const bool with_ranges : {false, true}) {
    std::optional<P> primary;
    counting_client c;
    notifier_of iv{c};
    int failures = 0;
    bool walked = false;
    errc e = errc::no_memory;
    while (e == errc::no_memory) {
      primary.emplace();
      e = with_memory_for(failures, [&] {
        return with_ranges ? primary->insert(iv, {0, page}, [&](auto&&) { walked = true; })
                           : primary->insert(iv, {0, page});
      });
      CHECK(walked == (with_ranges && e == errc::ok));
      if (e != errc::no_memory) break;
      ++failures;
      CHECK_FALSE(iv.registered());
      CHECK(primary->space.barrier() == errc::ok);
      CHECK_FALSE(primary->space.armed());
    }
    CHECK(e == errc::ok);
    CHECK(failures > 1);
    CHECK(primary->space.remove(iv) == errc::ok);
    CHECK(primary->space.barrier() == errc::ok);
    CHECK_FALSE(primary->space.armed());
  }
}

TEST_CASE("L6: an insertion that finds no slot for its space changes nothing, and the next one may succeed") {
  auto all = take_all_slots();
  counting_client c;
  notifier_of iv{c};
  tracked_primary tracked;
  CHECK(tracked.insert(iv, {0, page}) == errc::no_slot);
  CHECK(tracked.insert(iv, {0, page}, [](auto&&) { FAIL("nothing is there"); }) == errc::no_slot);
  CHECK_FALSE(iv.registered());
  CHECK_FALSE(tracked.space.armed());
  // Registries that the pool still holds have slots: use them up.
  std::vector<std::unique_ptr<under_primary>> primaries;
  std::vector<std::unique_ptr<notifier_of>> nodes;
  errc e = errc::ok;
  while (e == errc::ok) {
    primaries.push_back(std::make_unique<under_primary>());
    nodes.push_back(std::make_unique<notifier_of>(c));
    e = primaries.back()->insert(*nodes.back(), {0, page});
  }
  CHECK(e == errc::no_slot);
  CHECK_FALSE(nodes.back()->registered());
  CHECK_FALSE(primaries.back()->space.armed());
  all.clear();
  CHECK(primaries.back()->insert(*nodes.back(), {0, page}) == errc::ok);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    CHECK(primaries[i]->space.remove(*nodes[i]) == errc::ok);
    CHECK(primaries[i]->space.barrier() == errc::ok);
  }
}

TEST_CASE("L6: an interval set without a slot of its own refuses what would need one") {
  auto all = take_all_slots();
  {
    interval_space space;
    counting_client c;
    notifier_of iv{c};
    notifier_of upper{c};
    CHECK(space.set.insert(iv, {0, page}) == errc::no_slot);
    CHECK_FALSE(iv.registered());
    CHECK(space.set.resize(iv, {0, page}) == errc::no_slot);
    CHECK(space.set.split(iv, 1, upper) == errc::no_slot);
    CHECK(space.set.empty());
  }
}
