// SPDX-License-Identifier: MIT

// The oracle of the torture, asked about domains that are broken on purpose, one way each: so it is known to notice.
// What the whole torture notices of broken libraries: the negative controls of sync/torture.test.cpp.

#include <doctest/doctest.h>

#include <atomic>
#include <cstdint>

#include <fcntl.h>
#include <unistd.h>

#include <mmunotify/sync/srcu_domain.hpp>

#include "support/sandbox.hpp"
#include "sync/torture/arena.hpp"
#include "sync/torture/lives.hpp"
#include "sync/torture/phase.hpp"

using namespace torture;
using mmunotify::srcu_domain;

namespace {

struct no_wait : srcu_domain {
  static constexpr std::uint64_t update = by_waiting;
  void synchronize() noexcept {}
};
struct no_hurried_wait : srcu_domain {
  static constexpr std::uint64_t update = by_hurrying;
  void synchronize_expedited() noexcept {}
};
struct early_poll : srcu_domain {
  static constexpr std::uint64_t update = by_polling;
  bool poll(cookie) noexcept { return true; }
};
/// Nothing is broken: what it promises can be asked for inside a section, and has not happened.
struct sound : srcu_domain {
  static constexpr std::uint64_t update = by_polling;
};

/// A reader that finds an element, and an update that replaces it, inside the reader's section; in a process of its
/// own. Returns: its exit status: 0 if the oracle found nothing, 1 if it said so.
template <class Domain>
int asked() {
  return in_child([] {
    const int nowhere = ::open("/dev/null", O_WRONLY);
    if (nowhere < 0 || ::dup2(nowhere, STDERR_FILENO) < 0) return no_sandbox;
    enter("main", 0, 1);
    slots_in_use.store(1, std::memory_order_relaxed);
    taste.update.store(Domain::update, std::memory_order_relaxed);
    Domain domain;
    arena<Domain> a(domain, "the domain");
    a.attach();
    a.inside([&] { a.update_one(); });
    leave();
    ::_exit(0);
  });
}

}  // namespace

TEST_CASE("S9: a grace period that ends over a reader's head is noticed, in each way of waiting; a sound one passes") {
  CHECK(asked<sound>() == 0);
  CHECK(asked<no_wait>() == 1);
  CHECK(asked<no_hurried_wait>() == 1);
  CHECK(asked<early_poll>() == 1);
}
