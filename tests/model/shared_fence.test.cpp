// SPDX-License-Identifier: MIT

// A heavy fence serves the requests that were made before it began, and no others. Thread 1 has a section of a domain,
// thread 2 waits for another domain and so makes a fence; main unlinks an object and waits for the first one.
// Notices: stale_fence_ticket.

#include "platform.hpp"

#include <mmunotify/sync/srcu_domain.hpp>

struct shared_fence {
  using domain = mmunotify::basic_srcu_domain<model::platform<2>>;

  static constexpr int threads = 2;

  void prepare() { model::attach_all(domain_, threads); }

  void thread(int i) {
    switch (i) {
      case 0:
        shared_.store(nullptr, std::memory_order_release);
        domain_.synchronize();
        return object_.destroy();
      case 1: {
        const auto token = domain_.read_lock();
        const model::object* const o = shared_.load(std::memory_order_acquire);
        if (o != nullptr) model::check(o->alive(), "S1: an object that a section reaches is alive");
        return domain_.read_unlock(token);
      }
      default: other_.synchronize();
    }
  }

  void finish() {}

 private:
  domain domain_;
  domain other_;
  model::object object_;
  std::atomic<model::object*> shared_{&object_};
};

int main() { return model::run<shared_fence>(); }
