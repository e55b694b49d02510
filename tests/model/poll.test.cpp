// SPDX-License-Identifier: MIT

// S3: a cookie that is over was waited for: the sections that began before it have ended. One thread has a section,
// main unlinks an object, takes a cookie, and destroys the object if poll says so.
// Notices: early_cookie.

#include "platform.hpp"

#include <mmunotify/sync/srcu_domain.hpp>

struct poll {
  using domain = mmunotify::basic_srcu_domain<model::platform<1>>;

  static constexpr int threads = 1;

  void prepare() { model::attach_all(domain_, threads); }

  void thread(int i) {
    if (i == 0) {
      shared_.store(nullptr, std::memory_order_release);
      const auto cookie = domain_.start_poll();
      for (int n = 0; n < 2; ++n) {
        if (domain_.poll(cookie)) return object_.destroy();
      }
      return;
    }
    const auto token = domain_.read_lock();
    const model::object* const o = shared_.load(std::memory_order_acquire);
    if (o != nullptr) model::check(o->alive(), "S3: an object that a section reaches is alive");
    domain_.read_unlock(token);
  }

  void finish() {}

 private:
  domain domain_;
  model::object object_;
  std::atomic<model::object*> shared_{&object_};
};

int main() { return model::run<poll>(); }
