// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/keyed.hpp>

#include <doctest/doctest.h>

#include <sys/syscall.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include "support/recording_client.hpp"
#include "support/sandbox.hpp"
#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

/// How many tests of the key are a no-op in this executable, and how many there are.
struct census {
  int nops = 0;
  int sites = 0;
};
census count_sites() {
  census c;
  for (const auto* e = __start_mmunotify_sites; e != __stop_mmunotify_sites; ++e) {
    if (std::strcmp(e->key().name, "mmunotify.armed") != 0 || e->site() == nullptr) continue;
    ++c.sites;
    if (*static_cast<const volatile std::uint8_t*>(e->site()) == detail::site_nop) ++c.nops;
  }
  return c;
}

bool live() {
  const key_patching_state state = key_patching();
  if (!state.live) MESSAGE("tests are loads: " << std::string(state.sentence));
  return state.live;
}

[[gnu::noinline]] void change(keyed_primary& p, std::uintptr_t first) {
  const auto reading = p.lock();
  const auto inv = p.space.invalidate({first, first + 1}, event::unmap);
}

}  // namespace

TEST_CASE("D4: while no space of the process is armed, every bracket is a no-op; while one is, none is") {
  if (!live()) return;
  keyed_primary one;
  keyed_primary two;
  counting_client client;
  subscriber<counting_client> first{client};
  subscriber<counting_client> second{client};
  const census disarmed = count_sites();
  CHECK(disarmed.sites > 0);
  CHECK(disarmed.nops == disarmed.sites);
  for (int round = 0; round < 2; ++round) {
    REQUIRE(one.join(first) == errc::ok);
    CHECK(count_sites().nops == 0);
    REQUIRE(two.join(second) == errc::ok);
    CHECK(one.space.unregister(first) == errc::ok);
    CHECK(count_sites().nops == 0);
    if (round == 1) CHECK(two.space.release() == errc::ok);  // the other way to disarm
    CHECK(two.space.unregister(second) == errc::ok);
    CHECK(count_sites().nops == disarmed.sites);
    change(one, 7);
    CHECK(client.starts.load() == 0);
  }
}

TEST_CASE("D4: a space that is disarmed calls nobody while another is armed") {
  keyed_primary armed;
  keyed_primary quiet;
  counting_client client;
  subscriber<counting_client> node{client};
  REQUIRE(armed.join(node) == errc::ok);
  CHECK(armed.space.armed());
  CHECK_FALSE(quiet.space.armed());
  change(quiet, 1);
  CHECK(client.starts.load() == 0);
  change(armed, 1);
  CHECK(client.starts.load() == 1);
  CHECK(client.ends.load() == 1);
  CHECK(armed.space.unregister(node) == errc::ok);
  CHECK_FALSE(armed.space.armed());
}

TEST_CASE("D4: a refused registration leaves the key as it was") {
  keyed_primary primary;
  counting_client client;
  subscriber<counting_client> node{client};
  CHECK(primary.space.release() == errc::ok);
  CHECK(primary.join(node) == errc::released);
  CHECK_FALSE(arming::any_armed::enabled());
  keyed_primary other;
  REQUIRE(other.join(node) == errc::ok);
  CHECK(other.join(node) == errc::already_registered);
  CHECK(other.space.unregister(node) == errc::ok);
  CHECK_FALSE(arming::any_armed::enabled());
}

TEST_CASE("D4: whoever wins, a registration or the release of the space, the key is off when the space is disarmed") {
  for (int round = 0; round < 2000; ++round) {
    keyed_primary primary;
    counting_client client;
    subscriber<counting_client> node{client};
    std::atomic<bool> go{false};
    std::thread releasing([&] {
      go.store(true, std::memory_order_release);
      CHECK(primary.space.release() == errc::ok);
    });
    wait_for(go);
    for (int i = 0; i < round % 32; ++i) linux_platform::relax();
    const errc e = primary.join(node);
    releasing.join();
    CHECK((e == errc::ok || e == errc::released));
    CHECK(client.releases.load() == (e == errc::ok ? 1 : 0));
    if (e == errc::ok) CHECK(primary.space.unregister(node) == errc::ok);
    CHECK_FALSE(arming::any_armed::enabled());
  }
}

TEST_CASE("D4: registering is refused where the system no longer lets code be changed, and leaves no trace") {
  if (!live()) return;
  const int status = in_child([] {
    keyed_primary primary;
    counting_client client;
    subscriber<counting_client> node{client};
    if (!deny(SYS_pwrite64)) return no_sandbox;
    if (primary.join(node) != errc::refused_by_system) return 1;
    if (node.registered() || primary.space.armed() || arming::any_armed::enabled()) return 2;
    change(primary, 1);
    if (client.starts.load() != 0) return 3;
    return primary.join(node) == errc::refused_by_system ? 0 : 4;
  });
  if (status == no_sandbox) {
    MESSAGE("no seccomp here");
  } else {
    CHECK(status == 0);
  }
}

TEST_CASE("D4: where code is not changed, spaces behave the same" * doctest::skip()) {  // run by the next case
  CHECK_FALSE(key_patching().live);
  keyed_primary primary;
  counting_client client;
  subscriber<counting_client> node{client};
  for (int round = 1; round < 4; ++round) {
    CHECK_FALSE(primary.space.armed());
    REQUIRE(primary.join(node) == errc::ok);
    change(primary, 1);
    CHECK(client.starts.load() == round);
    CHECK(primary.space.unregister(node) == errc::ok);
    change(primary, 1);
    CHECK(client.starts.load() == round);
  }
}

TEST_CASE("D4: a system that lets no code be changed gets the load instead") {
  if (!live()) return;
  for (const long call : {long{SYS_membarrier}, long{SYS_pwrite64}}) {
    const int status = again_without(call, "-tc=D4: where code is not changed*");
    if (status == no_sandbox) {
      MESSAGE("no seccomp here");
    } else {
      CHECK(status == 0);
    }
  }
}

TEST_CASE("P7: a bracket that starts after a registration calls the client, while spaces arm and disarm all the time") {
  constexpr std::size_t spaces = 3;
  constexpr int rounds = 300;
  struct place {
    keyed_primary primary{};
    counting_client client{};
    bool listening = false;  ///< under the primary's lock
  };
  std::array<place, spaces> places;
  std::atomic<bool> stop{false};
  std::atomic<int> missed{0};
  std::atomic<std::uint64_t> heard{0};
  std::vector<std::thread> changers;
  for (std::size_t t = 0; t < 2; ++t) {
    changers.emplace_back([&, t] {
      small_random random(t + 11);
      while (!stop.load(std::memory_order_relaxed)) {
        place& p = places[random.below(spaces)];
        const auto reading = p.primary.lock();
        if (!p.listening) continue;
        const int before = p.client.starts.load();
        const auto inv = p.primary.space.invalidate({1, 2}, event::unmap);
        if (p.client.starts.load() == before) missed.fetch_add(1);
        heard.fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  std::vector<std::thread> drivers;
  drivers.reserve(spaces);
  for (place& p : places) {
    drivers.emplace_back([&p] {
      for (int i = 0; i < rounds; ++i) {
        subscriber<counting_client> node{p.client};
        {
          const std::unique_lock held(p.primary.tables);
          REQUIRE(p.primary.space.register_subscriber(node, held) == errc::ok);
          p.listening = true;
        }
        std::this_thread::yield();
        {
          const std::unique_lock held(p.primary.tables);
          p.listening = false;
        }
        REQUIRE(p.primary.space.unregister(node) == errc::ok);
      }
    });
  }
  for (auto& d : drivers) d.join();
  stop.store(true);
  for (auto& c : changers) c.join();
  CHECK(missed.load() == 0);
  CHECK(heard.load() > 0);
  for (auto& p : places) {
    CHECK_FALSE(p.primary.space.armed());
    CHECK(p.client.starts.load() == p.client.ends.load());
  }
  CHECK_FALSE(arming::any_armed::enabled());
  if (live()) CHECK(count_sites().nops == count_sites().sites);
}
