// SPDX-License-Identifier: MIT
#include <mmunotify/sync/srcu_domain.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "support/contract_recorder.hpp"
#include "support/domains.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

/// Room for three domains: slot 0 is nobody's.
struct four_slots : linux_platform {
  static constexpr std::uint32_t slots = 4;
};

struct no_slabs : linux_platform {
  static std::byte* allocate_slab(std::size_t) noexcept { return nullptr; }
};

struct no_keys : linux_platform {
  static bool create_exit_key(exit_key&, void (*)(void*)) noexcept { return false; }
};

template <class Platform>
std::size_t record_count() {
  std::size_t n = 0;
  detail::runtime<Platform>::own().for_each_record([&](auto&) {
    ++n;
    return true;
  });
  return n;
}

}  // namespace

TEST_CASE_TEMPLATE("S1: synchronize waits for a section that began before it", Domain, MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  for (int round = 0; round < 20; ++round) {
    std::atomic<bool> inside{false};
    std::atomic<bool> synchronizing{false};
    std::atomic<bool> left{false};
    std::thread reader([&] {
      const basic_read_section s(domain);
      inside.store(true, std::memory_order_release);
      wait_for(synchronizing);
      let_others_run();
      left.store(true, std::memory_order_relaxed);
    });
    wait_for(inside);
    synchronizing.store(true, std::memory_order_release);
    domain.synchronize();
    CHECK(left.load(std::memory_order_relaxed));
    reader.join();
  }
}

TEST_CASE_TEMPLATE("S1: an object retired after a grace period is never seen by a reader", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  struct object {
    std::atomic<std::uint64_t> alive{1};
    std::uint64_t payload = 0;
  };
  constexpr int rounds = 2000;
  Domain domain;
  const std::uint64_t before = domain.grace_periods();
  std::array<object, 8> pool;
  std::atomic<object*> current{&pool[0]};
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> dead_seen{0};
  std::atomic<std::uint64_t> torn_seen{0};
  std::vector<std::thread> readers;
  for (int t = 0; t < 3; ++t) {
    readers.emplace_back([&] {
      while (!stop.load(std::memory_order_relaxed)) {
        const basic_read_section s(domain);
        const object* o = current.load(std::memory_order_acquire);
        const std::uint64_t first = o->payload;
        for (int i = 0; i < 4; ++i) {
          if (o->alive.load(std::memory_order_relaxed) == 0) dead_seen.fetch_add(1, std::memory_order_relaxed);
        }
        if (o->payload != first) torn_seen.fetch_add(1, std::memory_order_relaxed);
      }
    });
  }
  for (std::uint64_t i = 1; i <= rounds; ++i) {
    object* next = &pool[i % pool.size()];
    next->payload = i;  // plain: a reader that still held it would race, and ThreadSanitizer would say so
    next->alive.store(1, std::memory_order_relaxed);
    object* old = current.exchange(next, std::memory_order_acq_rel);
    domain.synchronize();
    old->alive.store(0, std::memory_order_relaxed);
  }
  stop.store(true, std::memory_order_relaxed);
  for (auto& r : readers) r.join();
  CHECK(dead_seen.load() == 0);
  CHECK(torn_seen.load() == 0);
  CHECK(domain.grace_periods() - before == rounds);
}

TEST_CASE_TEMPLATE("S2: a reader finds what was published initialised, with reuse after every grace period", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  struct object {
    std::uint64_t number = 0;
    std::uint64_t square = 0;
  };
  Domain domain;
  std::array<object, 2> pool;  // reused at once: a reader that is late would see halves
  std::atomic<const object*> current{&pool[0]};
  std::atomic<bool> stop{false};
  std::atomic<int> torn{0};
  std::thread reader([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      const basic_read_section s(domain);
      const object* o = current.load(std::memory_order_acquire);
      if (o->square != o->number * o->number) torn.fetch_add(1);
    }
  });
  for (std::uint64_t i = 1; i <= 3000; ++i) {
    object& next = pool[i % 2];
    next = {i, i * i};
    current.store(&next, std::memory_order_release);
    domain.synchronize();
  }
  stop.store(true, std::memory_order_relaxed);
  reader.join();
  CHECK(torn.load() == 0);
}

TEST_CASE_TEMPLATE("S5: grace periods end although new readers keep coming, and none is lost asleep", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  const std::uint64_t before = domain.grace_periods();
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (std::uint64_t t = 0; t < 3; ++t) {
    readers.emplace_back([&, t] {
      small_random random(t + 1);
      while (!stop.load(std::memory_order_relaxed)) {
        const basic_read_section s(domain);
        // Long enough, now and then, that the other side has gone to sleep.
        if (random.below(64) == 0) {
          for (int i = 0; i < 8; ++i) std::this_thread::yield();
        }
      }
    });
  }
  std::thread second([&] {
    for (int i = 0; i < 200; ++i) domain.synchronize();
  });
  for (int i = 0; i < 200; ++i) domain.synchronize();
  second.join();
  stop.store(true, std::memory_order_relaxed);
  for (auto& r : readers) r.join();
  CHECK(domain.grace_periods() - before >= 200);
  CHECK(domain.grace_periods() - before <= 400);
}

TEST_CASE_TEMPLATE("S5: a section that begins after the grace period is not waited for", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  const std::uint64_t before = domain.grace_periods();
  std::atomic<bool> inside{false};
  std::atomic<bool> done{false};
  std::thread reader([&] {
    {
      const basic_read_section old_one(domain);
      inside.store(true, std::memory_order_release);
      while (domain.grace_periods() == before) std::this_thread::yield();
    }
    const basic_read_section new_one(domain);
    wait_for(done);  // a grace period that waited for us would never return
  });
  wait_for(inside);
  domain.synchronize();
  done.store(true, std::memory_order_release);
  reader.join();
  CHECK(domain.grace_periods() - before == 1);
}

TEST_CASE("S6: sections nest; only the outermost ends the section") {
  srcu_domain domain;
  std::atomic<bool> nested_left{false};
  std::atomic<bool> done{false};
  std::atomic<bool> left{false};
  std::thread reader([&] {
    const read_section outer(domain);
    { const read_section inner(domain); }
    CHECK(domain.held_by_this_thread());
    nested_left.store(true, std::memory_order_release);
    let_others_run();
    CHECK_FALSE(done.load(std::memory_order_relaxed));
    left.store(true, std::memory_order_relaxed);
  });
  wait_for(nested_left);
  domain.synchronize();
  CHECK(left.load(std::memory_order_relaxed));
  done.store(true, std::memory_order_relaxed);
  reader.join();
  CHECK_FALSE(domain.held_by_this_thread());
}

TEST_CASE_TEMPLATE("S6: unordered sections last until the last of them has ended, whichever that is", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  domain.lock();  // a
  domain.lock();  // b
  { const basic_read_section s(domain); }
  domain.unlock();  // a, the outermost
  CHECK(domain.held_by_this_thread());
  domain.lock();  // c
  domain.unlock();
  CHECK(domain.held_by_this_thread());
  domain.unlock();
  CHECK_FALSE(domain.held_by_this_thread());
  domain.synchronize();
}

TEST_CASE("S7: a sleeper in one domain does not delay another") {
  srcu_domain sleepy;
  srcu_domain other;
  std::atomic<bool> inside{false};
  std::atomic<bool> done{false};
  std::thread reader([&] {
    const read_section s(sleepy);
    inside.store(true, std::memory_order_release);
    wait_for(done);  // a grace period of `other` that waited for us would never return
  });
  wait_for(inside);
  other.synchronize();
  done.store(true, std::memory_order_release);
  reader.join();
  sleepy.synchronize();
  CHECK(other.grace_periods() == 1);
}

TEST_CASE("S8: threads come and go and leave nothing behind") {
  srcu_domain domain;
  { const read_section s(domain); }
  const std::size_t before = record_count<linux_platform>();
  for (int i = 0; i < 200; ++i) {
    std::thread([&] { const read_section s(domain); }).join();
  }
  CHECK(record_count<linux_platform>() <= before + 1);
  domain.synchronize();
}

TEST_CASE("S8: a thread that exits inside a section is reported, and does not block anybody") {
  srcu_domain domain;
  const contract_recorder recorder;
  std::thread([&] { static_cast<void>(domain.read_lock()); }).join();
  CHECK(recorder.rules() == std::vector<std::string>{"S8"});
  domain.synchronize();
}

TEST_CASE("S8: sections work in thread_local destructors at thread exit") {
  struct late {
    srcu_domain* domain = nullptr;
    ~late() {
      if (domain != nullptr) {
        const read_section s(*domain);
      }
    }
  };
  srcu_domain domain;
  const contract_recorder recorder;
  std::thread([&] {
    thread_local late object;
    object.domain = &domain;
    const read_section s(domain);
  }).join();
  domain.synchronize();
  CHECK(recorder.rules().empty());
}

TEST_CASE("L7: synchronize inside an own section is refused, not waited for") {
  srcu_domain domain;
  const contract_recorder recorder;
  {
    const read_section s(domain);
    domain.synchronize();
  }
  CHECK(recorder.rules() == std::vector<std::string>{"L7"});
  CHECK(domain.grace_periods() == 0);
}

TEST_CASE("a process without free slots says so, and gets them back") {
  using domain = basic_srcu_domain<four_slots>;
  std::array<std::optional<domain>, 3> all;
  for (auto& d : all) {
    d.emplace();
    CHECK(d->status() == errc::ok);
  }
  {
    domain one_too_many;
    CHECK(one_too_many.status() == errc::no_slot);
    const contract_recorder recorder;
    { const basic_read_section s(one_too_many); }  // harmless
    one_too_many.synchronize();
    CHECK(recorder.rules() == std::vector<std::string>{"S1"});
  }
  all[1].reset();
  domain again;
  CHECK(again.status() == errc::ok);
}

TEST_CASE("a domain that is destroyed with an open section is reported, and its slot is not given to another") {
  using domain = basic_srcu_domain<four_slots>;
  const contract_recorder recorder;
  std::optional<domain> d(std::in_place);
  const auto token = d->read_lock();
  d.reset();
  CHECK(recorder.rules() == std::vector<std::string>{"S1"});
  CHECK_FALSE(token.nested());
  // The thread's own exit would report the section again; close it by hand.
  detail::runtime<four_slots>::own().for_each_record([](auto& r) {
    for (std::uint32_t slot = 0; slot < four_slots::slots; ++slot) r.at(slot).word.store(0);
    return true;
  });
}

TEST_CASE("exhausted memory and exhausted keys are error values") {
  basic_srcu_domain<no_slabs> domain;
  CHECK(domain.attach_this_thread() == errc::no_memory);
  basic_srcu_domain<no_keys> keyless;
  CHECK(keyless.status() == errc::no_slot);
  srcu_domain fine;
  CHECK(fine.attach_this_thread() == errc::ok);
}

TEST_CASE("a domain costs a thread 16 bytes, and a section one word of them") {
  using platform = counted_fences<struct costs>;
  basic_srcu_domain<platform> a;
  basic_srcu_domain<platform> b;
  const auto words_in_use = [&] {
    std::size_t n = 0;
    detail::runtime<platform>::own().for_each_record([&](auto& r) {
      for (std::uint32_t slot = 0; slot < 256; ++slot) n += r.at(slot).word.load() != 0 ? 1U : 0U;
      return true;
    });
    return n;
  };
  CHECK(sizeof(detail::section_slot) == 16);
  CHECK(words_in_use() == 0);
  {
    const basic_read_section sa(a);
    CHECK(words_in_use() == 1);
    const basic_read_section sb(b);
    CHECK(words_in_use() == 2);
  }
  CHECK(words_in_use() == 0);
}

TEST_CASE_TEMPLATE("S3: a cookie is not complete while a section that began before it is open", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  std::atomic<bool> inside{false};
  std::atomic<bool> leave{false};
  std::thread reader([&] {
    const basic_read_section s(domain);
    inside.store(true, std::memory_order_release);
    wait_for(leave);
  });
  wait_for(inside);
  const auto first = domain.start_poll();
  CHECK_FALSE(domain.poll(first));
  const auto second = domain.start_poll();  // a grace period runs: this one needs the next
  for (int i = 0; i < 10; ++i) CHECK_FALSE(domain.poll(second));
  leave.store(true, std::memory_order_release);
  reader.join();
  CHECK(domain.poll(first));
  CHECK(domain.poll(second));
  CHECK(domain.poll(first));
}

TEST_CASE("S3: a cookie that was made while a grace period runs needs another one") {
  srcu_domain domain;
  std::optional<read_section> old_one(std::in_place, domain);
  const auto first = domain.start_poll();
  CHECK_FALSE(domain.poll(first));  // it runs, and has seen this thread's section
  const auto second = domain.start_poll();
  old_one.reset();
  {
    const read_section s(domain);  // begins after the first grace period, before the second
    CHECK(domain.poll(first));
    CHECK_FALSE(domain.poll(second));
  }
  CHECK(domain.poll(second));
  CHECK(domain.grace_periods() == 2);
}

TEST_CASE("S3: polling makes one heavy fence for a grace period, and none to look again") {
  using platform = counted_fences<struct polling>;
  basic_srcu_domain<platform> domain;
  if (!platform::heavy_available()) return;
  std::optional<basic_read_section<decltype(domain)>> s(std::in_place, domain);
  const auto cookie = domain.start_poll();
  for (int i = 0; i < 100; ++i) CHECK_FALSE(domain.poll(cookie));
  CHECK(platform::fences == 1);
  s.reset();
  CHECK(domain.poll(cookie));
  CHECK(platform::fences == 1);
}

TEST_CASE("S1: synchronize and polling drive the same grace periods") {
  srcu_domain domain;
  const auto cookie = domain.start_poll();
  domain.synchronize();
  CHECK(domain.poll(cookie));
  CHECK(domain.grace_periods() == 1);
  domain.synchronize_expedited();
  CHECK(domain.grace_periods() == 2);
}

TEST_CASE("S1: synchronize_all waits for every domain, with one heavy fence for all") {
  using platform = counted_fences<struct batching>;
  using domain = basic_srcu_domain<platform>;
  if (!platform::heavy_available()) return;
  std::array<domain, 40> domains;  // more than go at once
  std::vector<domain*> all;
  for (auto& d : domains) all.push_back(&d);
  std::atomic<bool> inside{false};
  std::atomic<bool> synchronizing{false};
  std::atomic<bool> left{false};
  std::thread reader([&] {
    const basic_read_section s(domains[39]);
    inside.store(true, std::memory_order_release);
    wait_for(synchronizing);
    let_others_run();
    left.store(true, std::memory_order_relaxed);
  });
  wait_for(inside);
  synchronizing.store(true, std::memory_order_release);
  domain::synchronize_all(std::span<domain* const>(all));
  CHECK(left.load(std::memory_order_relaxed));
  reader.join();
  for (auto& d : domains) CHECK(d.grace_periods() == 1);
  const auto fences = platform::fences.load();
  domain::synchronize_all(std::span<domain* const>(all).first(32));
  CHECK(platform::fences == fences + 1);
  domain::synchronize_all(std::span<domain* const>{});
  CHECK(platform::fences == fences + 1);
  const contract_recorder recorder;
  {
    const basic_read_section s(domains[5]);
    domain::synchronize_all(std::span<domain* const>(all));
  }
  CHECK(recorder.rules() == std::vector<std::string>{"L7"});
  CHECK(domains[0].grace_periods() == 2);
}

TEST_CASE("S1: concurrent grace periods of many domains share heavy fences, and none is skipped") {
  using platform = counted_fences<struct sharing>;
  using domain = basic_srcu_domain<platform>;
  if (!platform::heavy_available()) return;
  constexpr int rounds = 300;
  std::array<domain, 4> domains;
  std::vector<std::thread> threads;
  for (auto& d : domains) {
    threads.emplace_back([&d] {
      for (int i = 0; i < rounds; ++i) d.synchronize();
    });
  }
  for (auto& t : threads) t.join();
  for (auto& d : domains) CHECK(d.grace_periods() == rounds);
  CHECK(platform::fences <= domains.size() * rounds);
  CHECK(platform::fences >= rounds);
}

TEST_CASE_TEMPLATE("S6: a hand-off section is waited for until another thread ends it", Domain, MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  for (int round = 0; round < 20; ++round) {
    const auto token = domain.down_read();
    CHECK_FALSE(domain.held_by_this_thread());
    const auto cookie = domain.start_poll();
    CHECK_FALSE(domain.poll(cookie));
    std::atomic<bool> left{false};
    std::thread other([&] {
      let_others_run();
      left.store(true, std::memory_order_relaxed);
      domain.up_read(token);
    });
    domain.synchronize();
    CHECK(left.load(std::memory_order_relaxed));
    CHECK(domain.poll(cookie));
    other.join();
  }
}

TEST_CASE("S5: a hand-off section that begins after the grace period is not waited for") {
  srcu_domain domain;
  const auto old_one = domain.down_read();
  const auto cookie = domain.start_poll();
  CHECK_FALSE(domain.poll(cookie));
  const auto new_one = domain.down_read();
  CHECK_FALSE(domain.poll(cookie));
  domain.up_read(old_one);
  CHECK(domain.poll(cookie));
  const auto next = domain.start_poll();
  CHECK_FALSE(domain.poll(next));
  domain.up_read(new_one);
  CHECK(domain.poll(next));
}

TEST_CASE_TEMPLATE("S1: hand-off sections and reuse: nothing is seen after its grace period", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  constexpr int rounds = 1000;
  Domain domain;
  std::array<std::atomic<int>, 4> alive{};
  alive[0] = 1;
  std::atomic<std::size_t> current{0};
  std::atomic<bool> stop{false};
  std::atomic<int> dead_seen{0};
  std::vector<std::thread> readers;
  for (int t = 0; t < 2; ++t) {
    readers.emplace_back([&] {
      while (!stop.load(std::memory_order_relaxed)) {
        const auto token = domain.down_read();
        const std::size_t i = current.load(std::memory_order_acquire);
        for (int n = 0; n < 3; ++n) {
          if (alive[i].load(std::memory_order_relaxed) == 0) dead_seen.fetch_add(1);
        }
        domain.up_read(token);
      }
    });
  }
  for (int i = 1; i <= rounds; ++i) {
    const std::size_t next = static_cast<std::size_t>(i) % alive.size();
    alive[next].store(1, std::memory_order_relaxed);
    const std::size_t old = current.exchange(next, std::memory_order_acq_rel);
    domain.synchronize();
    alive[old].store(0, std::memory_order_relaxed);
  }
  stop.store(true);
  for (auto& r : readers) r.join();
  CHECK(dead_seen.load() == 0);
}

TEST_CASE_TEMPLATE("S6: a domain is a Lockable, as in C++26", Domain, MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  {
    const std::scoped_lock section(domain);
    CHECK(domain.held_by_this_thread());
    CHECK(domain.try_lock());
    domain.unlock();
    CHECK(domain.held_by_this_thread());
  }
  CHECK_FALSE(domain.held_by_this_thread());
}

TEST_CASE("S7: an isolated domain shares no cache line with another") {
  using domain = basic_srcu_domain<counted_fences<struct isolation>>;
  const srcu_options alone{.isolated = true};
  domain before;
  std::array<std::optional<domain>, 3> isolated;
  for (auto& d : isolated) d.emplace(alone);
  domain after;
  const auto line_of = [](domain& d) {
    const basic_read_section s(d);
    std::uintptr_t line = 0;
    detail::runtime<domain::platform>::own().for_each_record([&](auto& r) {
      for (std::uint32_t slot = 0; slot < 64; ++slot) {
        if (r.at(slot).word.load() != 0) line = reinterpret_cast<std::uintptr_t>(&r.at(slot)) / 64;
      }
      return true;
    });
    return line;
  };
  std::vector<std::uintptr_t> lines;
  for (auto& d : isolated) lines.push_back(line_of(*d));
  for (std::size_t i = 0; i < lines.size(); ++i) {
    CHECK(lines[i] != 0);
    CHECK(lines[i] != line_of(before));
    CHECK(lines[i] != line_of(after));
    for (std::size_t j = 0; j < i; ++j) CHECK(lines[i] != lines[j]);
  }
  const auto freed = lines[1];
  isolated[1].reset();
  domain small;
  CHECK(line_of(small) != freed);
  isolated[1].emplace(alone);
  CHECK(line_of(*isolated[1]) == freed);  // recycled
}

TEST_CASE("a grace period that sleeps is woken when the thread that it waits for exits inside its section") {
  srcu_domain domain;
  const contract_recorder recorder;
  std::atomic<bool> inside{false};
  std::thread reader([&] {
    static_cast<void>(domain.read_lock());
    inside.store(true, std::memory_order_release);
    let_others_run();  // the other side sleeps by now
  });
  wait_for(inside);
  domain.synchronize();
  reader.join();
  CHECK(recorder.rules() == std::vector<std::string>{"S8"});
}

namespace {

/// ThreadSanitizer supports no threads in a child, and AddressSanitizer's allocator may be locked there for ever.
#if MMUNOTIFY_TSAN || defined(__SANITIZE_ADDRESS__)
constexpr bool forks = false;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
constexpr bool forks = false;
#else
constexpr bool forks = true;
#endif
#else
constexpr bool forks = true;
#endif

/// Runs f in a forked child. Returns: true if it said true.
template <class F>
bool in_child(F f) {
  if (!forks) return true;
  const pid_t child = ::fork();
  if (child == 0) ::_exit(f() ? 0 : 1);
  int status = -1;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

TEST_CASE_TEMPLATE("S8: a child forked in the middle of everything has usable domains", Domain, MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (std::uint64_t t = 0; t < 2; ++t) {  // in sections nearly always
    threads.emplace_back([&, t] {
      small_random random(t + 1);
      while (!stop.load(std::memory_order_relaxed)) {
        const basic_read_section s(domain);
        if (random.below(4) == 0) std::this_thread::yield();
      }
    });
  }
  threads.emplace_back([&] {  // a driver nearly always
    while (!stop.load(std::memory_order_relaxed)) domain.synchronize();
  });
  threads.emplace_back([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      auto* const head = new srcu_head;
      if (domain.call(*head, [](srcu_head* h) noexcept { delete h; }) == errc::ok) domain.barrier();
    }
  });
  for (int i = 0; i < 20; ++i) {
    const bool usable = in_child([&] {
      static std::atomic<int> ran{0};
      static srcu_head head;
      domain.synchronize();  // would wait for the parent's threads for ever
      {
        const basic_read_section s(domain);
        const auto cookie = domain.start_poll();
        if (domain.poll(cookie)) return false;
      }
      if (domain.call(head, [](srcu_head*) noexcept { ran.fetch_add(1); }) != errc::ok) return false;
      domain.barrier();
      std::thread([&] { const basic_read_section s(domain); }).join();
      domain.synchronize();
      return ran.load() == 1 && !domain.held_by_this_thread();
    });
    CHECK(usable);
  }
  stop.store(true);
  for (auto& t : threads) t.join();
}

TEST_CASE_TEMPLATE("S8: the forking thread's own section goes on in the child", Domain, MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  const basic_read_section s(domain);
  CHECK(in_child([&] {
    if (!domain.held_by_this_thread()) return false;
    const auto cookie = domain.start_poll();
    return !domain.poll(cookie);
  }));
  CHECK(domain.held_by_this_thread());
}

TEST_CASE_TEMPLATE("S8: in the child, hand-off sections have ended, and their tokens do nothing", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  const auto token = domain.down_read();
  CHECK(in_child([&] {
    domain.synchronize();
    const auto own = domain.down_read();
    domain.up_read(token);
    const bool waits = !domain.poll(domain.start_poll());
    domain.up_read(own);
    domain.synchronize();
    return waits;
  }));
  CHECK_FALSE(domain.poll(domain.start_poll()));
  domain.up_read(token);
  domain.synchronize();
}

TEST_CASE_TEMPLATE("S8: the forking thread may exit in the child, as may a thread that the child makes", Domain,
                   MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  std::atomic<bool> stop{false};
  std::vector<std::thread> drivers;  // look at the words of all threads, nearly always
  for (int t = 0; t < 2; ++t) {
    drivers.emplace_back([&] {
      while (!stop.load(std::memory_order_relaxed)) {
        const basic_read_section s(domain);
        static_cast<void>(domain.poll(domain.start_poll()));
      }
    });
  }
  for (int i = 0; i < 10; ++i) {
    std::thread forker([&] {
      { const basic_read_section s(domain); }
      const pid_t child = forks ? ::fork() : -1;
      if (child == 0) {
        std::thread([&] { const basic_read_section s(domain); }).join();
        domain.synchronize();
        std::thread([self = ::pthread_self()] {
          ::_exit(::pthread_join(self, nullptr));  // its exit handlers have run
        }).detach();
        ::pthread_exit(nullptr);
      }
      int status = 0;
      while (child > 0 && ::waitpid(child, &status, 0) < 0 && errno == EINTR) {
      }
      CHECK(status == 0);
    });
    forker.join();
  }
  stop.store(true);
  for (auto& d : drivers) d.join();
}

TEST_CASE("S8: a child does not pay for the slabs of threads that it does not have") {
  const auto resident_pages = [] {
    std::ifstream statm("/proc/self/statm");
    long size = 0;
    long resident = 0;
    statm >> size >> resident;
    return resident;
  };
  srcu_domain domain;
  std::atomic<int> inside{0};
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 40; ++t) {
    threads.emplace_back([&] {
      { const read_section s(domain); }
      inside.fetch_add(1);
      wait_for(stop);
    });
  }
  while (inside.load() < 40) std::this_thread::yield();
  const long before = resident_pages();
  CHECK(in_child([&] { return resident_pages() < before + 40 * 16; }));  // a slab has 320 pages and more
  stop.store(true, std::memory_order_release);
  for (auto& t : threads) t.join();
}
