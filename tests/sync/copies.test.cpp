// SPDX-License-Identifier: MIT

// Several copies of the library in one process, as plugins have them: this program's own and those of shared objects
// with hidden visibility, of another compiler where there is one. A domain that one of them made is used through all.

#include "copies/copy.hpp"

#include <doctest/doctest.h>

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <mmunotify/config.hpp>

#include "support/threads.hpp"

namespace {

class shared_object {
 public:
  explicit shared_object(const char* path) : handle_(::dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    const char* const error = handle_ == nullptr ? ::dlerror() : "";
    REQUIRE_MESSAGE(handle_ != nullptr, error);
    auto* const symbol = ::dlsym(handle_, "mmunotify_test_copy");
    REQUIRE(symbol != nullptr);
    copy_ = reinterpret_cast<decltype(&mmunotify_test_copy)>(symbol)();
  }
  ~shared_object() { ::dlclose(handle_); }
  shared_object(const shared_object&) = delete;
  shared_object& operator=(const shared_object&) = delete;

  const copy_interface* operator->() const noexcept { return copy_; }
  const copy_interface* get() const noexcept { return copy_; }

 private:
  void* handle_;
  const copy_interface* copy_ = nullptr;
};

using copy = const copy_interface*;

/// The program's copy, and two that stay loaded.
const std::array<copy, 3>& copies() {
  static const auto* const a = new shared_object(MMUNOTIFY_COPY_A);
  static const auto* const b = new shared_object(MMUNOTIFY_COPY_B);
  static const std::array<copy, 3> all{mmunotify_test_copy(), a->get(), b->get()};
  return all;
}

/// A domain that one copy made, beside one of each other copy: a thread that uses those is attached to every runtime.
/// The domains have the same slot in their runtimes: a section that is begun in the wrong one finds a place there.
class world {
 public:
  explicit world(copy maker) {
    for (copy c : copies()) {
      domains_.push_back({c, c->make()});
      if (c == maker) domain = domains_.back().domain;
    }
  }
  ~world() {
    for (auto& d : domains_) d.made_by->destroy(d.domain);
  }
  world(const world&) = delete;
  world& operator=(const world&) = delete;

  void attach_everywhere() const {
    for (const auto& d : domains_) d.made_by->read_unlock(d.domain, d.made_by->read_lock(d.domain));
  }

  void* domain = nullptr;

 private:
  struct made {
    copy made_by;
    void* domain;
  };
  std::vector<made> domains_;
};

std::uint64_t run_seed() {
  const char* const text = std::getenv("MMUNOTIFY_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 1;
}

copy any_copy(small_random& random) { return copies()[random.below(copies().size())]; }

/// Records the rules that are broken, in all copies: each has a handler of its own.
class violations {
 public:
  violations() {
    for (copy c : copies()) c->on_violation(&record);
  }
  ~violations() {
    for (copy c : copies()) c->on_violation(nullptr);
    rules_.clear();
  }
  violations(const violations&) = delete;
  violations& operator=(const violations&) = delete;

  std::vector<std::string> rules() const {
    const std::lock_guard lock(mutex_);
    return rules_;
  }

 private:
  static void record(const char* rule) noexcept {
    const std::lock_guard lock(mutex_);
    rules_.emplace_back(rule);
  }
  static inline std::mutex mutex_;
  static inline std::vector<std::string> rules_;
};

using strings = std::vector<std::string>;

}  // namespace

TEST_CASE("the copies are of one ABI, and share nothing") {
  const auto& all = copies();
  for (copy c : all) {
    CHECK(c->checked == MMUNOTIFY_CHECKED);
    CHECK(c->domain_size == all[0]->domain_size);
  }
  CHECK(all[0]->runtime != all[1]->runtime);
  CHECK(all[0]->runtime != all[2]->runtime);
  CHECK(all[1]->runtime != all[2]->runtime);
  CHECK((all[1]->clang != all[2]->clang) == (MMUNOTIFY_COPIES_DIFFER == 1));
}

// The first test, so that it is the plugin through which the first section begins and the first callback is queued.
TEST_CASE("a copy that made no domain may be unloaded while threads live that used it") {
  copy owner = copies()[0];
  void* const domain = owner->make();
  for (int i = 0; i < 10; ++i) {
    std::atomic<bool> used{false};
    std::atomic<bool> unloaded{false};
    std::thread thread;
    copy_job job;
    job.function = [](copy_job*) noexcept {};
    {
      const shared_object plugin(MMUNOTIFY_COPY_C);
      thread = std::thread([&, c = plugin.get()] {
        c->read_unlock(domain, c->read_lock(domain));
        CHECK(c->call(domain, job));
        used.store(true, std::memory_order_release);
        wait_for(unloaded);
        owner->read_unlock(domain, owner->read_lock(domain));
      });
      wait_for(used);
      plugin->synchronize(domain);
      plugin->barrier(domain);  // the callback is code of the plugin
    }
    CHECK(::dlopen(MMUNOTIFY_COPY_C, RTLD_NOW | RTLD_NOLOAD) == nullptr);
    unloaded.store(true, std::memory_order_release);
    owner->synchronize(domain);
    thread.join();
  }
  owner->destroy(domain);
}

TEST_CASE("L8: a copy may be unloaded as soon as a barrier through it has returned") {
  copy owner = copies()[0];
  void* const domain = owner->make();
  for (int i = 0; i < 300; ++i) {
    copy_job job;
    job.function = [](copy_job*) noexcept {};
    const shared_object plugin(MMUNOTIFY_COPY_C);
    CHECK(plugin->call(domain, job));  // code of the plugin, which goes away now
    plugin->barrier(domain);
  }
  owner->destroy(domain);
}

TEST_CASE("S1: synchronize waits for a section of any copy, through any copy") {
  for (copy maker : copies()) {
    for (copy reader : copies()) {
      for (copy waiter : copies()) {
        const world w(maker);
        std::atomic<bool> inside{false};
        std::atomic<bool> synchronizing{false};
        std::atomic<bool> left{false};
        std::thread thread([&] {
          w.attach_everywhere();
          const copy_token t = reader->read_lock(w.domain);
          inside.store(true, std::memory_order_release);
          wait_for(synchronizing);
          let_others_run();
          left.store(true, std::memory_order_relaxed);
          reader->read_unlock(w.domain, t);
        });
        wait_for(inside);
        synchronizing.store(true, std::memory_order_release);
        waiter->synchronize(w.domain);
        CHECK(left.load(std::memory_order_relaxed));
        thread.join();
      }
    }
  }
}

namespace {

/// One section of some kind, through one, two or three copies. Returns: the faults of what it finds.
int look_around(void* domain, const std::atomic<copy_object*>& where, small_random& random) {
  copy outer = any_copy(random);
  copy inner = any_copy(random);
  switch (random.below(4)) {
    case 0: return outer->look(domain, where);
    case 1: {  // nested, in order
      const copy_token t = outer->read_lock(domain);
      const copy_object* const found = where.load(std::memory_order_acquire);
      const int faults = inner->look(domain, where) + found->faults();
      outer->read_unlock(domain, t);
      return faults;
    }
    case 2: {  // two that end in any order, through any copy
      outer->lock(domain);
      const copy_object* const found = where.load(std::memory_order_acquire);
      inner->lock(domain);
      any_copy(random)->unlock(domain);
      const int faults = found->faults();
      any_copy(random)->unlock(domain);
      return faults;
    }
    default: {  // a hand-off section
      const copy_token t = outer->down_read(domain);
      const copy_object* const found = where.load(std::memory_order_acquire);
      const int faults = found->faults();
      inner->up_read(domain, t);
      return faults;
    }
  }
}

/// Waits for a grace period in some way.
void wait_somehow(void* domain, small_random& random) {
  copy first = any_copy(random);
  copy second = any_copy(random);
  switch (random.below(8)) {
    case 0: {
      const copy_token cookie = first->start_poll(domain);
      while (!second->poll(domain, cookie)) std::this_thread::yield();
      return;
    }
    case 1: {
      struct ran : copy_job {
        std::atomic<bool> done{false};
      } job;
      job.function = [](copy_job* j) noexcept { static_cast<ran*>(j)->done.store(true, std::memory_order_relaxed); };
      CHECK(first->call(domain, job));
      second->barrier(domain);
      CHECK(job.done.load(std::memory_order_relaxed));
      return;
    }
    case 2: return first->synchronize_expedited(domain);
    default: return first->synchronize(domain);
  }
}

}  // namespace

TEST_CASE("S1: an object retired after a grace period is never seen, whichever copies read and wait") {
  constexpr std::uint64_t rounds = 1500;
  const std::uint64_t seed = run_seed();
  for (copy maker : copies()) {
    const world w(maker);
    std::array<copy_object, 3> pool;
    std::atomic<copy_object*> current{&pool[0]};
    std::atomic<bool> stop{false};
    std::atomic<int> faults{0};
    std::vector<std::thread> readers;
    for (std::uint64_t t = 0; t < 3; ++t) {
      readers.emplace_back([&, t] {
        small_random random(seed + t);
        w.attach_everywhere();
        while (!stop.load(std::memory_order_relaxed)) {
          const int found = look_around(w.domain, current, random);
          if (found != 0) faults.fetch_add(found, std::memory_order_relaxed);
        }
      });
    }
    small_random random(seed + 3);
    for (std::uint64_t i = 1; i <= rounds; ++i) {
      copy_object& next = pool[i % pool.size()];
      next.number = i;  // plain: a reader that still held it would race, and ThreadSanitizer would say so
      next.square = i * i;
      next.alive.store(1, std::memory_order_relaxed);
      copy_object* const old = current.exchange(&next, std::memory_order_acq_rel);
      wait_somehow(w.domain, random);
      old->alive.store(0, std::memory_order_relaxed);
    }
    stop.store(true, std::memory_order_relaxed);
    for (auto& r : readers) r.join();
    CHECK(faults.load() == 0);
  }
}

TEST_CASE("L7: to wait through one copy inside a section of another is refused") {
  for (copy maker : copies()) {
    for (copy reader : copies()) {
      for (copy waiter : copies()) {
        const world w(maker);
        const violations seen;
        const copy_token t = reader->read_lock(w.domain);
        for (copy c : copies()) CHECK(c->held(w.domain));
        waiter->synchronize(w.domain);
        CHECK(seen.rules() == strings{"L7"});
        waiter->barrier(w.domain);
        CHECK(seen.rules() == strings{"L7", "L7"});
        reader->read_unlock(w.domain, t);
        for (copy c : copies()) CHECK_FALSE(c->held(w.domain));
        CHECK(waiter->grace_periods(w.domain) == 0);
      }
    }
  }
}

TEST_CASE("L7: to wait through one copy for the callbacks that another copy queued is refused in a callback") {
  struct waiting : copy_job {
    copy waiter = nullptr;
    void* domain = nullptr;
  };
  for (copy maker : copies()) {
    for (copy caller : copies()) {
      for (copy waiter : copies()) {
        const world w(maker);
        const violations seen;
        waiting job;
        job.waiter = waiter;
        job.domain = w.domain;
        job.function = [](copy_job* j) noexcept {
          const auto* const self = static_cast<waiting*>(j);
          self->waiter->barrier(self->domain);
        };
        CHECK(caller->call(w.domain, job));
        waiter->barrier(w.domain);
        CHECK(seen.rules() == strings{"L7"});
      }
    }
  }
}

TEST_CASE("S6: sections nest across copies, and only the outermost ends the section") {
  for (copy maker : copies()) {
    const world w(maker);
    for (copy outer : copies()) {
      for (copy inner : copies()) {
        const copy_token a = outer->read_lock(w.domain);
        const copy_token b = inner->read_lock(w.domain);
        inner->read_unlock(w.domain, b);
        CHECK(outer->held(w.domain));
        CHECK(inner->held(w.domain));
        outer->read_unlock(w.domain, a);
        CHECK_FALSE(outer->held(w.domain));

        outer->lock(w.domain);
        inner->lock(w.domain);
        outer->unlock(w.domain);  // the outer one ends first
        CHECK(outer->held(w.domain));
        inner->unlock(w.domain);
        CHECK_FALSE(inner->held(w.domain));
      }
    }
    copies()[0]->synchronize(w.domain);
  }
}

TEST_CASE("S6: a hand-off section that one copy began ends in another thread through another copy") {
  for (copy maker : copies()) {
    for (copy first : copies()) {
      for (copy second : copies()) {
        const world w(maker);
        const copy_token token = first->down_read(w.domain);
        const copy_token cookie = second->start_poll(w.domain);
        CHECK_FALSE(first->poll(w.domain, cookie));
        std::thread([&] { second->up_read(w.domain, token); }).join();
        CHECK(first->poll(w.domain, cookie));
      }
    }
  }
}

TEST_CASE("S4: a barrier through one copy waits for the callbacks of all, which run in order") {
  struct numbered : copy_job {
    int number = 0;
    std::vector<int>* order = nullptr;
  };
  for (copy maker : copies()) {
    const world w(maker);
    std::vector<int> order;
    std::vector<int> expected;
    std::array<numbered, 12> jobs;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      jobs[i].number = static_cast<int>(i);
      jobs[i].order = &order;
      jobs[i].function = [](copy_job* j) noexcept {
        const auto* const self = static_cast<numbered*>(j);
        self->order->push_back(self->number);
      };
      CHECK(copies()[i % 3]->call(w.domain, jobs[i]));
      expected.push_back(static_cast<int>(i));
    }
    copies()[1]->barrier(w.domain);
    CHECK(order == expected);
  }
}

TEST_CASE("S8: a thread that exits inside a section of any copy is reported once, and blocks nobody") {
  for (copy maker : copies()) {
    for (copy reader : copies()) {
      const world w(maker);
      const violations seen;
      std::thread([&] { static_cast<void>(reader->read_lock(w.domain)); }).join();
      CHECK(seen.rules() == strings{"S8"});
      for (copy c : copies()) c->synchronize(w.domain);
    }
  }
}

TEST_CASE("S8: threads come and go through any copy and leave nothing behind") {
  for (copy maker : copies()) {
    const world w(maker);
    w.attach_everywhere();
    const std::size_t before = maker->records();
    for (int i = 0; i < 60; ++i) {
      copy reader = copies()[static_cast<std::size_t>(i) % 3];
      std::thread([&] {
        if (i % 2 == 0) w.attach_everywhere();
        reader->read_unlock(w.domain, reader->read_lock(w.domain));
      }).join();
      // The thread's word in the domain is gone, or 0.
      copies()[static_cast<std::size_t>(i / 3) % 3]->synchronize(w.domain);
    }
    CHECK(maker->records() <= before + 1);
  }
}
