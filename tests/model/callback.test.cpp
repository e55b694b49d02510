// SPDX-License-Identifier: MIT

// S4: a callback runs after a grace period, and has run when a barrier returns. Thread 1 has a section; main unlinks an
// object, queues its destruction, drains (a barrier would wait for readers in any case) and calls barrier; with
// -DMODEL_DRAINERS=1 another thread drains at the same time. The domain has an executor of its own, so that there is no
// worker.
// Notices: early_callbacks, early_barrier.

#include "platform.hpp"

#include <mmunotify/sync/srcu_domain.hpp>

#ifndef MODEL_DRAINERS
#define MODEL_DRAINERS 0
#endif

struct callback {
  static constexpr int threads = 1 + MODEL_DRAINERS;

  using domain = mmunotify::basic_srcu_domain<model::platform<threads>>;

  void prepare() { model::attach_all(domain_, threads); }

  void thread(int i) {
    switch (i) {
      case 0:
        shared_.store(nullptr, std::memory_order_release);
        static_cast<void>(domain_.call(object_, [](mmunotify::srcu_head* h) noexcept {
          auto& o = *static_cast<element*>(h);
          o.payload.destroy();
          o.done = true;
        }));
        static_cast<void>(domain_.drain());
        domain_.barrier();
        return model::check(object_.done, "L8: a callback that was queued before a barrier has run when it returns");
      case 1: {
        const auto token = domain_.read_lock();
        const element* const o = shared_.load(std::memory_order_acquire);
        if (o != nullptr) model::check(o->payload.alive(), "S4: an object that a section reaches is alive");
        return domain_.read_unlock(token);
      }
      default: static_cast<void>(domain_.drain());
    }
  }

  void finish() {}

 private:
  struct element : mmunotify::srcu_head {
    model::object payload;
    bool done = false;
  };

  static mmunotify::srcu_options options() {
    mmunotify::srcu_options o;
    o.schedule = [](void*) noexcept {};
    return o;
  }

  domain domain_{options()};
  element object_;
  std::atomic<element*> shared_{&object_};
};

int main() { return model::run<callback>(); }
