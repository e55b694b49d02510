// SPDX-License-Identifier: MIT

// Bugs that Linux had in its MMU notifiers or in a client of them, each as a scenario against this library. Where a
// commit is named it is the one that repaired the bug, or, for 2013, the one that made it.
//
// Each was seen to fail on a library that has the bug: 2012 with MMUNOTIFY_MUTATION=2, 2023 with 3, the barrier with 21
// (all three run as tests, see tests/CMakeLists.txt); the others with the change that stands above the test.
//
// Who must not return yet is watched for a number of yields: a bug shows when it does, and slowness never looks like
// one.

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/primary/reference_mmu.hpp>

#include "secondary/x86/shadow_fixture.hpp"
#include "support/contract_recorder.hpp"

using namespace mmunotify;

namespace {

constexpr int long_enough = 5000;  // yields; what can go wrong has done so by then

/// Gives way until it is true, or for long enough. Returns: whether it is.
bool soon(const std::atomic<bool>& flag) {
  for (int i = 0; i < long_enough && !flag.load(); ++i) std::this_thread::yield();
  return flag.load();
}
void wait_for(const std::atomic<bool>& flag) {
  while (!flag.load()) std::this_thread::yield();
}

constexpr range pages_at(std::uintptr_t first, std::uintptr_t n) {
  return {0x10000 + first * page_size, 0x10000 + (first + n) * page_size};
}
hva page(std::uintptr_t n) { return {pages_at(n, 1).first}; }

using tracked_space = address_space<arming::tracked>;

/// A bracket that is not blockable, over pages 3 and 4. Returns: whether nobody refused it.
bool was_served(tracked_space& space) {
  const auto b = space.try_invalidate(pages_at(3, 2), event::clear);
  return static_cast<bool>(b);
}

}  // namespace

// 2012, 3ad3d901bbcf: unregister had unlinked the client, and not run its release hook yet, when the address space
// exited: nobody was left to be told, and pages were freed that the client still mapped.
TEST_CASE("L3: 2012: exit frees no page before the release hook that an unregister is running has returned") {
  struct mirror {
    reference_mmu<>& primary;
    std::atomic<std::uint64_t>* word;
    std::atomic<bool> inside{false}, exited{false};
    bool exited_beside = false;
    std::uint64_t seen = 0;

    void release() {
      inside.store(true);
      while (true) {  // until the exit has begun: it is past the point at which it could miss us
        const frame_lease l = primary.pin(page(0), false);
        if (!l) break;
        primary.unpin(l.frame);
        std::this_thread::yield();
      }
      exited_beside = soon(exited);
      if (!exited_beside) seen = word->load();
    }
  };
  reference_mmu<> primary(16);
  REQUIRE(primary.map(pages_at(0, 4), protection::read_write) == errc::ok);
  const std::uint64_t stored = 42;
  REQUIRE(primary.write(pages_at(0, 1).first, std::as_bytes(std::span(&stored, 1))) == errc::ok);
  const frame_lease l = primary.pin(page(0), false);  // mapped, and protected by nothing but the notifier
  primary.unpin(l.frame);
  mirror client{primary, reinterpret_cast<std::atomic<std::uint64_t>*>(primary.data(l.frame))};
  subscriber<mirror> node{client};
  {
    const auto held = primary.lock_tables();
    REQUIRE(primary.space().register_subscriber(node, held) == errc::ok);
  }
  std::thread leaving([&] { static_cast<void>(primary.space().unregister(node)); });
  wait_for(client.inside);
  CHECK(primary.exit() == errc::ok);
  client.exited.store(true);
  leaving.join();
  CHECK_FALSE(client.exited_beside);
  CHECK(client.seen == stored);
}

// 2013, 751efd8610d3 ("multiple release callouts"): of an unregister and an exit at once both ran the hook. The order
// of unlinking was changed for that, which brought the bug of 2012 back. Seen failing with registry::claim_for_release
// returning true whatever the phase is.
TEST_CASE("L4: 2013: of an unregister and a release at once one runs the hook, once, and both wait for it") {
  struct once {
    std::atomic<int> runs{0}, inside{0};
    std::atomic<bool> entered{false}, other_returned{false};
    bool beside = false, other_was_early = false;
    void release() {
      runs.fetch_add(1);
      beside = beside || inside.fetch_add(1) != 0;
      entered.store(true);
      other_was_early = other_was_early || soon(other_returned);
      inside.fetch_sub(1);
    }
  };
  for (const bool unregister_first : {true, false}) {
    tracked_space space;
    once client;
    subscriber<once> node{client};
    REQUIRE(space.register_subscriber(node) == errc::ok);
    std::thread first([&] {
      if (unregister_first) {
        CHECK(space.unregister(node) == errc::ok);
      } else {
        CHECK(space.release() == errc::ok);
      }
    });
    wait_for(client.entered);
    if (unregister_first) {
      CHECK(space.release() == errc::ok);
    } else {
      CHECK(space.unregister(node) == errc::ok);
    }
    client.other_returned.store(true);
    first.join();
    CHECK(client.runs.load() == 1);
    CHECK_FALSE(client.beside);
    CHECK_FALSE(client.other_was_early);
    static_cast<void>(space.unregister(node));
    CHECK(client.runs.load() == 1);
  }
}

// 2021, c2655835fd8c: of several clients one refused, and those that had taken the start never got its end. KVM counted
// a bracket as open for ever, and no fault of the VM made progress. Seen failing without the call of call_end in
// audience::try_call_start.
TEST_CASE("P3: 2021: who has taken a start that another one refuses gets its end, and can fault again") {
  struct counting {
    invalidation_window<> brackets;
    bool refuses = false;
    int starts = 0, ends = 0;
    bool invalidate_range_start(const invalidation& i) {
      ++starts;
      brackets.start(i.range);
      return i.blockable || !refuses;
    }
    void invalidate_range_end(const invalidation& i) {
      ++ends;
      brackets.end(i.range);
    }
  };
  for (std::size_t refusing = 0; refusing < 4; ++refusing) {
    tracked_space space;
    std::array<counting, 4> clients;
    std::array<subscriber<counting>, 4> nodes{subscriber{clients[0]}, subscriber{clients[1]}, subscriber{clients[2]},
                                              subscriber{clients[3]}};
    for (auto& n : nodes) REQUIRE(space.register_subscriber(n) == errc::ok);
    clients[refusing].refuses = true;
    for (int i = 0; i < 3; ++i) CHECK_FALSE(was_served(space));
    for (const counting& c : clients) {
      CHECK(c.starts == c.ends);
      CHECK(c.brackets.open() == 0);
      CHECK_FALSE(c.brackets.retry(c.brackets.read_begin(), pages_at(3, 2)));
    }
    CHECK(clients[3].starts == 3);  // the newest is asked first
    clients[refusing].refuses = false;
    CHECK(was_served(space));
    for (auto& n : nodes) CHECK(space.unregister(n) == errc::ok);
  }
}

// 2021, KVM: the memory slots changed between a bracket's start and its end, which looked the slots up anew: the count
// of open brackets went wrong. Seen failing with shadow_mmu::invalidate_range_end doing nothing unless a slot overlaps
// the range, and with its start doing so.
TEST_CASE("K2: 2021: slots come, move and go between start and end, and the bracket is still one") {
  using namespace shadow_test;
  constexpr hva data = ram_base + 45 * page_size;
  const range r = x86::page_range(data);
  // The guest has the page at a if its slot is at frame 1000, at b if that is at 2000; no other slot has it.
  const gva a{0x400000}, b{0x401000};
  enum class slots { none, at_1000, at_2000 };
  const auto config = [&](slots s) {
    return x86::memslot_config{.id = 9, .base = {s == slots::at_1000 ? 1000U : 2000U}, .pages = 4, .host = data};
  };
  const auto change = [&](machine& m, slots from, slots to) {
    if (from == to) return errc::ok;
    if (from == slots::none) return m.mmu.add_slot(config(to));
    return to == slots::none ? m.mmu.remove_slot(9) : m.mmu.move_slot(9, config(to).base);
  };
  const slots all[] = {slots::none, slots::at_1000, slots::at_2000};
  for (const slots at_start : all) {
    for (const slots between : all) {
      for (const slots at_end : all) {
        machine m(40);
        REQUIRE(m.slot_error == errc::ok);
        m.map(a, {1000 * page_size});
        m.map(b, {2000 * page_size});
        cpu_type cpu{m.mmu};
        REQUIRE(cpu.set_cr3(m.root) == errc::ok);
        REQUIRE(change(m, slots::none, at_start) == errc::ok);
        for (const gva g : {a, b}) static_cast<void>(cpu.prefault(g, access::read));
        m.start(r);
        REQUIRE(change(m, at_start, between) == errc::ok);
        for (const gva g : {a, b}) {
          CHECK(cpu.prefault(g, access::read).what != outcome::done);
          CHECK_FALSE(cpu.hits(g, access::read));
        }
        m.host.migrate(data);
        REQUIRE(change(m, between, at_end) == errc::ok);
        m.end(r);
        REQUIRE(change(m, at_end, slots::at_1000) == errc::ok);
        REQUIRE(cpu.prefault(a, access::read).what == outcome::done);
        CHECK(touch(cpu, a, access::read).at == m.host.bytes(data));
        CHECK(m.mmu.verify() == nullptr);
      }
    }
  }
}

// 2023, e611b0a9a274: registration excluded brackets by taking every lock under which they ran; then faults began to
// run under a lock of their area alone, and a bracket could be in flight that had seen no client and that the client
// did not see. Here no lock is on a list: an open bracket is what is waited for.
TEST_CASE("P7: 2023: a registration waits for a bracket that runs under a lock which nobody told it of") {
  struct mapper {
    std::atomic<bool> usable{false};
    void invalidate_range_start(const invalidation&) noexcept {}
  };
  tracked_space space;
  std::mutex area;  // of the area that faults; registration knows nothing of it
  mapper client;
  subscriber<mapper> node{client};
  std::atomic<bool> in_flight{false}, go_on{false};
  std::thread faulting([&] {
    const std::lock_guard locked{area};
    const auto bracket = space.invalidate(pages_at(0, 1), event::clear);  // copy on write, say
    in_flight.store(true);
    wait_for(go_on);
  });
  wait_for(in_flight);
  std::thread registering([&] {
    CHECK(space.register_subscriber(node) == errc::ok);
    client.usable.store(true);
  });
  while (!space.armed()) std::this_thread::yield();
  CHECK_FALSE(soon(client.usable));
  go_on.store(true);
  registering.join();
  faulting.join();
  CHECK(client.usable.load());
  CHECK(space.unregister(node) == errc::ok);
}

// The same where registration does rely on a lock: a bracket without it is a broken promise, and checked builds say so.
TEST_CASE("P7: 2023: with arming::under a bracket beside the lock is caught when somebody registers") {
  struct client_type {
    void release() noexcept {}
  } client;
  std::shared_mutex tables;
  address_space<arming::under<std::shared_mutex>> space;
  subscriber<client_type> node{client};
  const contract_recorder recorder;
  errc e = errc::ok;
  {
    const auto beside = space.invalidate(pages_at(0, 1), event::clear);
    const std::unique_lock held{tables};
    e = space.register_subscriber(node, held);
  }
  CHECK(e == (MMUNOTIFY_CHECKED ? errc::bracket_open : errc::ok));
  if (e == errc::ok) CHECK(space.unregister(node) == errc::ok);
}

// 2024, KVM: faults that had to retry took the lock to find that out, and kept the bracket from getting it that they
// waited for: virtual machines stood still for seconds. Seen failing with pinned_frame::pin not asking check_retry.
TEST_CASE("C3: 2024: a fault that collides with an open bracket learns it without the lock") {
  using namespace shadow_test;
  machine m;
  const gva a{0x400000};
  m.map(a, {5 * page_size});
  cpu_type cpu{m.mmu};
  REQUIRE(cpu.set_cr3(m.root) == errc::ok);
  const range r = x86::page_range(ram_base + 5 * page_size);
  m.start(r);
  REQUIRE(cpu.prefault(a, access::read).what == outcome::again);  // has stocked up what a fault needs
  std::atomic<bool> over{false};
  std::thread faulting;
  bool without_lock = false;
  {
    const std::lock_guard held{m.mmu.lock()};  // the bracket's, say, which is busy
    faulting = std::thread([&] {
      for (int i = 0; i < 100; ++i) CHECK(cpu.prefault(a, access::read).what == outcome::again);
      over.store(true);
    });
    for (int i = 0; i < 100 * long_enough && !over.load(); ++i) std::this_thread::yield();
    without_lock = over.load();
  }
  faulting.join();
  CHECK(without_lock);
  m.end(r);
  CHECK(touch(cpu, a, access::read).result.what == outcome::done);
}

// The leaked epoch, in Linux 7.2 still: one kind of client takes the start, another refuses, and only the second kind's
// state is put back. Everything that can be seen is compared, field by field, over every mix of kinds and every
// refuser. Seen failing without pending.finish_all, without call_end, without give_back
// (tracked_gate::try_start_armed), and with call_end stopping one client early.
namespace {

struct state_of_client {
  int starts_owed = 0;
  int passes_owed = 0;
  std::size_t open = 0;
  bool collides = false;
  bool token_in_use = false;
  bool operator==(const state_of_client&) const = default;
};

struct plain_kind {
  invalidation_window<> brackets{};
  state_of_client state{};
  bool refuses = false;
  bool invalidate_range_start(const invalidation& i) {
    state.starts_owed += 1;
    brackets.start(i.range);
    return i.blockable || !refuses;
  }
  void invalidate_range_end(const invalidation& i) {
    state.starts_owed -= 1;
    brackets.end(i.range);
  }
};
struct two_pass_kind {
  invalidation_window<> brackets{};
  state_of_client state{};
  bool refuses = false;
  two_pass_token token{};
  first_pass invalidate_begin(const invalidation& i) {
    state.starts_owed += 1;
    brackets.start(i.range);
    if (!i.blockable && refuses) return first_pass::refused();
    state.passes_owed += 1;
    return token;
  }
  void invalidate_finish(two_pass_token&, const invalidation&) { state.passes_owed -= 1; }
  void invalidate_range_end(const invalidation& i) {
    state.starts_owed -= 1;
    brackets.end(i.range);
  }
};
struct no_end_kind {
  invalidation_window<> brackets{};
  state_of_client state{};
  bool refuses = false;
  bool invalidate_range_start(const invalidation& i) { return i.blockable || !refuses; }
};

template <class Kind>
state_of_client look_at(Kind& k, range r) {
  state_of_client s = k.state;
  s.open = k.brackets.open();
  s.collides = k.brackets.retry(k.brackets.read_begin(), r);
  if constexpr (requires { k.token; }) s.token_in_use = k.token.in_use();
  return s;
}

/// Two of each kind, registered in the order that `order` says.
struct mixed {
  tracked_space space;
  plain_kind plain[2];
  two_pass_kind two_pass[2];
  no_end_kind no_end[2];
  subscriber<plain_kind> plain_nodes[2]{subscriber{plain[0]}, subscriber{plain[1]}};
  subscriber<two_pass_kind> two_pass_nodes[2]{subscriber{two_pass[0]}, subscriber{two_pass[1]}};
  subscriber<no_end_kind> no_end_nodes[2]{subscriber{no_end[0]}, subscriber{no_end[1]}};

  void add(int i) {
    const int which = i % 2;
    const errc e = i < 2   ? space.register_subscriber(plain_nodes[which])
                   : i < 4 ? space.register_subscriber(two_pass_nodes[which])
                           : space.register_subscriber(no_end_nodes[which]);
    CHECK(e == errc::ok);
  }
  bool& refuses(int i) {
    return i < 2 ? plain[i % 2].refuses : i < 4 ? two_pass[i % 2].refuses : no_end[i % 2].refuses;
  }
  std::vector<state_of_client> look(range r) {
    return {look_at(plain[0], r),    look_at(plain[1], r),  look_at(two_pass[0], r),
            look_at(two_pass[1], r), look_at(no_end[0], r), look_at(no_end[1], r)};
  }
  ~mixed() {
    for (auto& n : plain_nodes) CHECK(space.unregister(n) == errc::ok);
    for (auto& n : two_pass_nodes) CHECK(space.unregister(n) == errc::ok);
    for (auto& n : no_end_nodes) CHECK(space.unregister(n) == errc::ok);
  }
};

}  // namespace

TEST_CASE("P4: a refusal among clients of several kinds leaves everything as it was, field by field") {
  const int orders[][6] = {{0, 2, 4, 1, 3, 5}, {4, 2, 0, 5, 3, 1}, {2, 3, 0, 1, 4, 5}, {5, 4, 1, 0, 3, 2}};
  const range r = pages_at(3, 2);
  for (const auto& order : orders) {
    mixed m;
    for (const int i : order) m.add(i);
    const auto before = m.look(r);
    for (int refusing = 0; refusing < 6; ++refusing) {
      m.refuses(refusing) = true;
      // A thread has so many cells for what is open: none may be lost.
      const std::size_t refusals = refusing == order[0] ? linux_platform::cells + 1 : 3;
      for (std::size_t i = 0; i < refusals; ++i) {
        REQUIRE_FALSE(was_served(m.space));
      }
      m.refuses(refusing) = false;
      CHECK(m.look(r) == before);
      {
        const auto b = m.space.try_invalidate(r, event::clear);  // one whole bracket, as if nothing had been
        CHECK(static_cast<bool>(b));
        CHECK(m.look(r)[0].open == 1);
      }
      CHECK(m.look(r) == before);
    }
    CHECK(m.space.armed());
    CHECK(m.space.barrier() == errc::ok);  // no section of this thread is left open, or this would be refused
  }
}

// mmu_notifier_synchronize, in Linux 7.2 still: it promises that all that was put has been freed, and waits for a grace
// period alone; on machines of 128 processors and more it returned before, in 40 of 40 tries.
TEST_CASE("L8: barrier returns when everything that was put before has been freed, however slow that is") {
  struct client_type {
    void release() noexcept {}
  };
  struct entry {
    client_type client{};
    subscriber<client_type> node{client};
  };
  static std::atomic<int> freed{0};
  constexpr int n = 64;
  tracked_space space;
  std::vector<entry> entries(n);
  for (auto& e : entries) REQUIRE(space.register_subscriber(e.node) == errc::ok);
  freed.store(0);
  for (auto& e : entries) {
    CHECK(space.unregister_async(e.node, [](basic_subscriber<std::uintptr_t>&) noexcept {
      for (int i = 0; i < 20; ++i) std::this_thread::yield();
      freed.fetch_add(1);
    }) == errc::ok);
  }
  CHECK(space.barrier() == errc::ok);
  CHECK(freed.load() == n);
}
