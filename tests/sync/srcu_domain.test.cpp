// SPDX-License-Identifier: MIT
#include <mmunotify/sync/srcu_domain.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

/// A kernel without membarrier.
struct no_membarrier : linux_platform {
  static bool heavy_available() noexcept { return false; }
  static void heavy() noexcept { FAIL("a heavy fence without membarrier"); }
};

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

TEST_CASE_TEMPLATE("S1: synchronize waits for a section that began before it", Platform, linux_platform,
                   no_membarrier) {
  basic_srcu_domain<Platform> domain;
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

TEST_CASE_TEMPLATE("S1: an object retired after a grace period is never seen by a reader", Platform, linux_platform,
                   no_membarrier) {
  struct object {
    std::atomic<std::uint64_t> alive{1};
    std::uint64_t payload = 0;
  };
  constexpr int rounds = 2000;
  basic_srcu_domain<Platform> domain;
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
  CHECK(domain.grace_periods() == rounds);
}

TEST_CASE_TEMPLATE("S2: a reader finds what was published initialised, with reuse after every grace period", Platform,
                   linux_platform, no_membarrier) {
  struct object {
    std::uint64_t number = 0;
    std::uint64_t square = 0;
  };
  basic_srcu_domain<Platform> domain;
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

TEST_CASE_TEMPLATE("S5: grace periods end although new readers keep coming, and none is lost asleep", Platform,
                   linux_platform, no_membarrier) {
  basic_srcu_domain<Platform> domain;
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
  CHECK(domain.grace_periods() >= 200);
  CHECK(domain.grace_periods() <= 400);
}

TEST_CASE_TEMPLATE("S5: a section that begins after the grace period is not waited for", Platform, linux_platform,
                   no_membarrier) {
  basic_srcu_domain<Platform> domain;
  std::atomic<bool> inside{false};
  std::atomic<bool> done{false};
  std::thread reader([&] {
    {
      const basic_read_section old_one(domain);
      inside.store(true, std::memory_order_release);
      while (domain.grace_periods() == 0) std::this_thread::yield();
    }
    const basic_read_section new_one(domain);
    wait_for(done);  // a grace period that waited for us would never return
  });
  wait_for(inside);
  domain.synchronize();
  done.store(true, std::memory_order_release);
  reader.join();
  CHECK(domain.grace_periods() == 1);
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

TEST_CASE_TEMPLATE("S6: unordered sections last until the last of them has ended, whichever that is", Platform,
                   linux_platform, no_membarrier) {
  basic_srcu_domain<Platform> domain;
  domain.read_lock_unordered();  // a
  domain.read_lock_unordered();  // b
  { const basic_read_section s(domain); }
  domain.read_unlock_unordered();  // a, the outermost
  CHECK(domain.held_by_this_thread());
  domain.read_lock_unordered();  // c
  domain.read_unlock_unordered();
  CHECK(domain.held_by_this_thread());
  domain.read_unlock_unordered();
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

TEST_CASE("a domain costs a thread one slot, and a section two stores to it") {
  srcu_domain a;
  srcu_domain b;
  std::vector<std::uint64_t> words;
  const auto words_in_use = [&] {
    std::size_t n = 0;
    detail::runtime<linux_platform>::own().for_each_record([&](auto& r) {
      for (std::uint32_t slot = 0; slot < 256; ++slot) n += r.at(slot).word.load() != 0 ? 1U : 0U;
      return true;
    });
    return n;
  };
  CHECK(words_in_use() == 0);
  {
    const read_section sa(a);
    CHECK(words_in_use() == 1);
    const read_section sb(b);
    CHECK(words_in_use() == 2);
  }
  CHECK(words_in_use() == 0);
}
