// SPDX-License-Identifier: MIT

// Grace periods are shared: who learns from a counter that one has ended comes after the sections that its driver
// waited for. Thread 1 has a section, thread 2 drives grace periods, main unlinks an object and destroys it when poll
// says so. (The driver itself fences afterwards: it would come after them even if its scan were relaxed.) With
// -DMODEL_HANDOFF=1 the section is of the hand-off kind; as an ordinary test, in every other round.
// Notices: scan_relaxed, handoff_scan_relaxed, request_relaxed.

#include "platform.hpp"

#include <mmunotify/sync/srcu_domain.hpp>

#ifndef MODEL_HANDOFF
#define MODEL_HANDOFF 0
#endif

#if MODEL_CHECKER
constexpr bool hand_off() { return MODEL_HANDOFF != 0; }
#else
bool hand_off() {
  static bool last = false;
  return last = !last;
}
#endif

struct driver {
  using domain = mmunotify::basic_srcu_domain<model::platform<2>>;

  static constexpr int threads = 2;
  static constexpr unsigned rounds = 200'000;

  void prepare() { model::attach_all(domain_, threads); }

  void thread(int i) {
    switch (i) {
      case 0: {
        shared_.store(nullptr, std::memory_order_release);
        const auto cookie = domain_.start_poll();
        if (domain_.poll(cookie)) object_.destroy();
        return;
      }
      case 1: return read();
      default: static_cast<void>(domain_.poll(domain_.start_poll()));
    }
  }

  void finish() {}

 private:
  void read() {
    if (hand_off()) {
      const auto token = domain_.down_read();
      look();
      domain_.up_read(token);
    } else {
      const auto token = domain_.read_lock();
      look();
      domain_.read_unlock(token);
    }
  }
  void look() {
    const model::object* const o = shared_.load(std::memory_order_acquire);
    if (o != nullptr) model::check(o->alive(), "S3: an object that a section reaches is alive");
  }

  domain domain_;
  model::object object_;
  std::atomic<model::object*> shared_{&object_};
};

int main() { return model::run<driver>(); }
