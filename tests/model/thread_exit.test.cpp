// SPDX-License-Identifier: MIT

// S8: a thread may exit while a grace period of a static domain looks at its word: the word, which is a variable of the
// thread's own, stays until then. The thread has a section and exits; main waits for a grace period.
// Notices: exit_unpinned.

#include "platform.hpp"

#include <mmunotify/sync/static_srcu_domain.hpp>

struct thread_exit {
  using platform = model::platform<1>;
  using domain = mmunotify::static_srcu_domain<thread_exit, platform>;

  static constexpr int threads = 1;

  void prepare() {
    model::pretend(1);
    new (&own()) mmunotify::detail::static_slot;
    model::pretend(-1);
    model::attach_all(domain_, threads);
  }

  void thread(int i) {
    if (i == 0) {
      shared_.store(nullptr, std::memory_order_release);
      domain_.synchronize();
      return object_.destroy();
    }
    const auto token = domain_.read_lock();
    const model::object* const o = shared_.load(std::memory_order_acquire);
    if (o != nullptr) model::check(o->alive(), "S1: an object that a section reaches is alive");
    domain_.read_unlock(token);
    platform::exit_thread();
    model::bury(own().word);
  }

  void finish() {}

 private:
  static mmunotify::detail::static_slot& own() { return platform::own<domain, mmunotify::detail::static_slot>(); }

  domain domain_;
  model::object object_;
  std::atomic<model::object*> shared_{&object_};
};

int main() { return model::run<thread_exit>(); }
