// SPDX-License-Identifier: MIT

// S4, S7: the worker runs a callback after its grace period, although it was about to sleep when the callback was
// queued, and although a section held the callback back. Thread 1 is the worker, thread 2 has a section; main unlinks
// an object, queues its destruction, waits for a barrier and ends the worker.

#include "platform.hpp"

#include <mmunotify/sync/srcu_domain.hpp>

struct worker {
  using platform = model::platform<2, 1, true>;
  using domain = mmunotify::basic_srcu_domain<platform>;

  static constexpr int threads = 2;

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
        domain_.barrier();
        model::check(object_.done, "L8: a callback that was queued before a barrier has run when it returns");
        return platform::exit_process();
      case 1: return platform::run_worker();
      default: {
        const auto token = domain_.read_lock();
        const element* const o = shared_.load(std::memory_order_acquire);
        if (o != nullptr) model::check(o->payload.alive(), "S4: an object that a section reaches is alive");
        domain_.read_unlock(token);
      }
    }
  }

  void finish() {}

 private:
  struct element : mmunotify::srcu_head {
    model::object payload;
    bool done = false;
  };

  domain domain_;
  element object_;
  std::atomic<element*> shared_{&object_};
};

int main() { return model::run<worker>(); }
