// SPDX-License-Identifier: MIT

// Deferred callbacks: call, barrier, backlog, executors, the worker.
#include <mmunotify/sync/srcu_domain.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/domains.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

/// A callback that writes its number down.
struct numbered : srcu_head {
  int number = 0;
  std::vector<int>* log = nullptr;  // written by the one who runs callbacks, read after a barrier
  static void run(srcu_head* h) noexcept {
    auto* const self = static_cast<numbered*>(h);
    self->log->push_back(self->number);
  }
};

struct counting : srcu_head {
  std::atomic<int>* count = nullptr;
  static void run(srcu_head* h) noexcept { static_cast<counting*>(h)->count->fetch_add(1, std::memory_order_relaxed); }
};

/// The system has no thread left.
struct no_threads : linux_platform {
  static bool start_thread(thread&, void* (*)(void*), void*) noexcept { return false; }
};

/// An event loop reduced to its flag.
struct loop {
  std::atomic<int> asked{0};
  static void schedule(void* context) noexcept {
    static_cast<loop*>(context)->asked.fetch_add(1, std::memory_order_relaxed);
  }
  srcu_options options(std::size_t max_backlog = 0) {
    return {.isolated = false, .max_backlog = max_backlog, .schedule = &schedule, .context = this};
  }
};

}  // namespace

TEST_CASE_TEMPLATE("S4: a barrier returns when every callback queued before has run, in the order of their calls",
                   Domain, MMUNOTIFY_ALL_DOMAINS, basic_srcu_domain<no_threads>) {
  Domain domain;
  std::vector<int> log;
  std::array<numbered, 100> callbacks;
  for (int round = 0; round < 10; ++round) {
    log.clear();
    std::vector<int> expected;
    for (int i = 0; i < 100; ++i) {
      auto& c = callbacks[static_cast<std::size_t>(i)];
      c.number = i;
      c.log = &log;
      CHECK(domain.call(c, &numbered::run) == errc::ok);
      expected.push_back(i);
    }
    domain.barrier();
    CHECK(log == expected);
    CHECK(domain.backlog() == 0);
  }
  domain.barrier();  // nothing is queued
}

TEST_CASE_TEMPLATE("S1: a callback runs after the sections that were open when it was queued", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> ran{0};
    std::atomic<bool> inside{false};
    std::atomic<bool> queued{false};
    std::thread reader([&] {
      const basic_read_section s(domain);
      inside.store(true, std::memory_order_release);
      wait_for(queued);
      let_others_run();
      CHECK(ran.load(std::memory_order_relaxed) == 0);
    });
    wait_for(inside);
    counting c;
    c.count = &ran;
    CHECK(domain.call(c, &counting::run) == errc::ok);
    queued.store(true, std::memory_order_release);
    domain.barrier();
    CHECK(ran.load(std::memory_order_relaxed) == 1);
    reader.join();
  }
}

TEST_CASE("S7: a sleeper in one domain does not delay another one's callbacks") {
  srcu_domain sleepy;
  srcu_domain other;
  std::atomic<int> ran{0};
  counting held_back;
  counting due;
  held_back.count = due.count = &ran;
  std::atomic<bool> inside{false};
  std::atomic<bool> done{false};
  std::thread reader([&] {
    const read_section s(sleepy);
    inside.store(true, std::memory_order_release);
    wait_for(done);
  });
  wait_for(inside);
  CHECK(sleepy.call(held_back, &counting::run) == errc::ok);
  for (int i = 0; i < 50; ++i) {  // while the worker waits for the sleeper, too
    CHECK(other.call(due, &counting::run) == errc::ok);
    other.barrier();
  }
  CHECK(ran.load() == 50);
  CHECK(sleepy.backlog() == 1);
  done.store(true, std::memory_order_release);
  reader.join();
  sleepy.barrier();
  CHECK(ran.load() == 51);
}

TEST_CASE("a callback may call again, also itself, in its own and in other domains") {
  static srcu_domain a;
  static srcu_domain b;
  struct relay : srcu_head {
    int left = 1000;
    static void run(srcu_head* h) noexcept {
      auto* const self = static_cast<relay*>(h);
      if (--self->left == 0) return;
      srcu_domain& next = self->left % 2 == 0 ? a : b;
      if (next.call(*self, &run) != errc::ok) self->left = -1;
    }
  };
  relay r;
  CHECK(a.call(r, &relay::run) == errc::ok);
  while (a.backlog() + b.backlog() != 0) {
    a.barrier();
    b.barrier();
  }
  CHECK(r.left == 0);
}

TEST_CASE("L7: a barrier inside a callback or a section is refused, with a sentence") {
  const contract_recorder recorder;
  static srcu_domain domain;
  srcu_head head;
  CHECK(domain.call(head, [](srcu_head*) noexcept { domain.barrier(); }) == errc::ok);
  domain.barrier();
  CHECK(recorder.rules() == std::vector<std::string>{"L7"});
  {
    const read_section s(domain);
    domain.barrier();
  }
  CHECK(recorder.rules() == std::vector<std::string>{"L7", "L7"});
}

TEST_CASE("L6: what cannot be queued is an error value and leaves no trace") {
  const contract_recorder recorder;
  srcu_domain domain;
  srcu_head head;
  {
    const read_section s(domain);  // holds the first one back
    CHECK(domain.call(head, [](srcu_head*) noexcept {}) == errc::ok);
    CHECK(domain.call(head, [](srcu_head*) noexcept {}) == errc::already_registered);
    srcu_head other;
    CHECK(domain.call(other, nullptr) == errc::already_registered);
    CHECK(domain.backlog() == 1);
  }
  domain.barrier();
  CHECK(domain.backlog() == 0);
  CHECK(recorder.rules() == std::vector<std::string>{"L6", "L6"});
  CHECK(domain.call(head, [](srcu_head*) noexcept {}) == errc::ok);  // it has run: it may be queued again
  domain.barrier();
}

TEST_CASE("a bounded backlog refuses the callback that is too many, and takes it later") {
  srcu_domain domain(srcu_options{.max_backlog = 3});
  std::atomic<int> ran{0};
  std::array<counting, 5> c;
  for (auto& x : c) x.count = &ran;
  {
    const read_section s(domain);
    for (std::size_t i = 0; i < 3; ++i) CHECK(domain.call(c[i], &counting::run) == errc::ok);
    CHECK(domain.call(c[3], &counting::run) == errc::again);
    CHECK(domain.call_unbounded(c[4], &counting::run) == errc::ok);
    CHECK(domain.backlog() == 4);
  }
  domain.barrier();
  CHECK(ran.load() == 4);
  CHECK(domain.call(c[3], &counting::run) == errc::ok);
  domain.barrier();
  CHECK(ran.load() == 5);
}

TEST_CASE("floods of callbacks from many threads: each runs once, after its grace period, and the bound holds") {
  struct object : srcu_head {
    std::atomic<int> alive{1};
    std::atomic<bool>* free = nullptr;
  };
  constexpr std::size_t bound = 64;
  constexpr int rounds = 3000;
  srcu_domain domain(srcu_options{.max_backlog = bound});
  std::atomic<object*> current{nullptr};
  std::atomic<bool> stop{false};
  std::atomic<int> dead_seen{0};
  std::atomic<int> over{0};
  std::thread reader([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      const read_section s(domain);
      const object* const o = current.load(std::memory_order_acquire);
      for (int i = 0; i < 3; ++i) {
        if (o != nullptr && o->alive.load(std::memory_order_relaxed) == 0) dead_seen.fetch_add(1);
      }
    }
  });
  std::vector<std::thread> updaters;
  for (int t = 0; t < 2; ++t) {
    updaters.emplace_back([&] {
      for (int i = 0; i < rounds; ++i) {
        object* const old = current.exchange(new object, std::memory_order_acq_rel);
        if (old == nullptr) continue;
        while (domain.call(*old, [](srcu_head* h) noexcept {
          auto* const o = static_cast<object*>(h);
          o->alive.store(0, std::memory_order_relaxed);
          delete o;
        }) != errc::ok) {
          std::this_thread::yield();
        }
        if (domain.backlog() > bound) over.fetch_add(1);
      }
    });
  }
  for (auto& u : updaters) u.join();
  stop.store(true);
  reader.join();
  delete current.load();
  domain.barrier();
  CHECK(dead_seen.load() == 0);
  CHECK(over.load() == 0);
}

TEST_CASE("the destruction of a domain runs what is queued, also inside another domain's callback") {
  std::atomic<int> ran{0};
  counting c;
  c.count = &ran;
  {
    srcu_domain domain;
    CHECK(domain.call(c, &counting::run) == errc::ok);
  }
  CHECK(ran.load() == 1);
  struct owner : srcu_head {
    srcu_domain inner;
  };
  srcu_domain outer;
  auto* const o = new owner;
  CHECK(o->inner.call(c, &counting::run) == errc::ok);
  o->inner.barrier();
  CHECK(outer.call(*o, [](srcu_head* h) noexcept { delete static_cast<owner*>(h); }) == errc::ok);
  outer.barrier();
  CHECK(ran.load() == 2);
}

TEST_CASE("a domain without a slot refuses callbacks and barriers") {
  const contract_recorder recorder;
  basic_srcu_domain<one_slot> only;
  basic_srcu_domain<one_slot> none;
  REQUIRE(none.status() == errc::no_slot);
  srcu_head head;
  CHECK(none.call(head, [](srcu_head*) noexcept {}) == errc::no_slot);
  none.barrier();
  CHECK_FALSE(none.poll(none.start_poll()));
  CHECK(recorder.rules() == std::vector<std::string>{"S1", "S1", "S1"});
  CHECK(!head.function);
}

TEST_CASE("an executor is asked once for a burst, drains what is due, and is asked again when a section ends") {
  loop events;
  srcu_domain domain(events.options());
  std::vector<int> log;
  std::array<numbered, 4> c;
  for (int i = 0; i < 4; ++i) {
    c[static_cast<std::size_t>(i)].number = i;
    c[static_cast<std::size_t>(i)].log = &log;
  }
  CHECK(domain.drain() == 0);
  for (std::size_t i = 0; i < 3; ++i) CHECK(domain.call(c[i], &numbered::run) == errc::ok);
  CHECK(events.asked == 1);
  CHECK(domain.drain() == 3);
  CHECK(log == std::vector<int>{0, 1, 2});
  std::atomic<bool> inside{false};
  std::atomic<bool> leave{false};
  std::thread reader([&] {
    const read_section s(domain);
    inside.store(true, std::memory_order_release);
    wait_for(leave);
  });
  wait_for(inside);
  CHECK(domain.call(c[3], &numbered::run) == errc::ok);
  CHECK(events.asked == 2);
  CHECK(domain.drain() == 0);
  CHECK(events.asked == 2);
  leave.store(true, std::memory_order_release);
  reader.join();
  CHECK(events.asked == 3);
  CHECK(domain.drain() == 1);
  CHECK(log == std::vector<int>{0, 1, 2, 3});
}

TEST_CASE("a barrier of a domain with an executor drains it itself") {
  loop events;
  srcu_domain domain(events.options());
  std::atomic<int> ran{0};
  counting c;
  c.count = &ran;
  CHECK(domain.call(c, &counting::run) == errc::ok);
  domain.barrier();
  CHECK(ran == 1);
  const contract_recorder recorder;
  {
    const read_section s(domain);
    CHECK(domain.drain() == 0);
  }
  srcu_domain plain;
  CHECK(plain.drain() == 0);
  CHECK(recorder.rules() == std::vector<std::string>{"L7", "L7"});
}

TEST_CASE("an event loop that drains when asked loses nothing against readers and callers") {
  loop events;
  srcu_domain domain(events.options());
  constexpr int rounds = 2000;
  std::atomic<bool> stop{false};
  std::atomic<int> ran{0};
  std::thread reader([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      const read_section s(domain);
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> drainers;
  for (int t = 0; t < 2; ++t) {
    drainers.emplace_back([&] {
      int seen = 0;
      while (!stop.load(std::memory_order_relaxed)) {
        const int asked = events.asked.load(std::memory_order_relaxed);
        if (asked != seen) domain.drain();  // never unasked
        seen = asked;
        std::this_thread::yield();
      }
    });
  }
  std::vector<std::unique_ptr<counting>> all;
  for (int i = 0; i < rounds; ++i) {
    all.push_back(std::make_unique<counting>());
    all.back()->count = &ran;
    CHECK(domain.call(*all.back(), &counting::run) == errc::ok);
    if (i % 50 == 0) {
      while (domain.backlog() != 0) std::this_thread::yield();
    }
  }
  while (domain.backlog() != 0) std::this_thread::yield();
  stop.store(true);
  reader.join();
  for (auto& d : drainers) d.join();
  CHECK(ran.load() == rounds);
}

TEST_CASE("S4: barriers of many callers, each for its own callback") {
  srcu_domain domain;
  constexpr int rounds = 2000;
  std::atomic<int> missing{0};
  std::atomic<int> negative{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t) {
    callers.emplace_back([&] {
      for (int i = 0; i < rounds; ++i) {
        std::atomic<int> ran{0};
        counting c;
        c.count = &ran;
        if (domain.call(c, &counting::run) != errc::ok) missing.fetch_add(1);
        if (domain.backlog() > 1000) negative.fetch_add(1);
        domain.barrier();
        if (ran.load(std::memory_order_relaxed) != 1) missing.fetch_add(1);
      }
    });
  }
  for (auto& c : callers) c.join();
  CHECK(missing.load() == 0);
  CHECK(negative.load() == 0);
}

TEST_CASE("S4: where no thread can be had, barriers stand in for the worker, several at once") {
  using domain_type = basic_srcu_domain<no_threads>;
  domain_type domain;
  std::atomic<int> missing{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t) {
    callers.emplace_back([&] {
      for (int i = 0; i < 200; ++i) {
        std::atomic<int> ran{0};
        counting c;
        c.count = &ran;
        if (domain.call(c, &counting::run) != errc::ok) missing.fetch_add(1);
        domain.barrier();
        if (ran.load(std::memory_order_relaxed) != 1) missing.fetch_add(1);
      }
    });
  }
  for (auto& c : callers) c.join();
  CHECK(missing.load() == 0);
}

TEST_CASE("an executor is asked again after a drain that found another one at work") {
  loop events;
  srcu_domain domain(events.options());
  std::atomic<int> ran{0};
  counting c;
  c.count = &ran;
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;  // two, so that a section ends while another one holds the callback back
  for (int t = 0; t < 2; ++t) {
    readers.emplace_back([&] {
      while (!stop.load(std::memory_order_relaxed)) {
        const read_section s(domain);
        std::this_thread::yield();
      }
    });
  }
  std::vector<std::thread> drainers;
  for (int t = 0; t < 2; ++t) {
    drainers.emplace_back([&] {
      while (!stop.load(std::memory_order_relaxed)) {
        if (events.asked.exchange(0, std::memory_order_acq_rel) != 0) domain.drain();  // never unasked
        std::this_thread::yield();
      }
    });
  }
  for (int i = 1; i <= 1000; ++i) {
    CHECK(domain.call(c, &counting::run) == errc::ok);
    while (domain.backlog() != 0) std::this_thread::yield();
    CHECK(ran.load() == i);
  }
  stop.store(true);
  for (auto& r : readers) r.join();
  for (auto& d : drainers) d.join();
}

TEST_CASE("a barrier beside a drainer that is held up in a callback makes no storm of heavy fences") {
  using platform = counted_fences<struct storm>;
  loop events;
  basic_srcu_domain<platform> domain(events.options());
  struct held_up : srcu_head {
    std::atomic<bool> begun{false};
    std::atomic<bool> go_on{false};
  };
  held_up h;
  CHECK(domain.call(h, [](srcu_head* p) noexcept {
    auto* const self = static_cast<held_up*>(p);
    self->begun.store(true, std::memory_order_release);
    wait_for(self->go_on);
  }) == errc::ok);
  std::thread drainer([&] { domain.drain(); });
  wait_for(h.begun);
  std::atomic<bool> done{false};
  std::thread waiter([&] {
    domain.barrier();
    done.store(true, std::memory_order_release);
  });
  for (int i = 0; i < 20; ++i) let_others_run();
  CHECK_FALSE(done.load());
  CHECK(platform::fences.load() < 20);
  h.go_on.store(true, std::memory_order_release);
  waiter.join();
  drainer.join();
}

TEST_CASE("a domain with a backlog may be destroyed in another domain's callback") {
  struct owner : srcu_head {
    srcu_domain inner;
    counting c;
  };
  std::atomic<int> ran{0};
  srcu_domain outer;
  auto* const o = new owner;
  o->c.count = &ran;
  CHECK(outer.call(*o, [](srcu_head* h) noexcept {
    auto* const self = static_cast<owner*>(h);
    if (self->inner.call(self->c, &counting::run) != errc::ok) self->c.count->store(-100);
    delete self;
  }) == errc::ok);
  outer.barrier();
  CHECK(ran.load() == 1);
}
