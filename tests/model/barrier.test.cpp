// SPDX-License-Identifier: MIT

// S4: two threads queue a callback each, and each calls barrier; a third drains. A barrier compares two counts, so it
// must not read an old one: who pushes after a callback that has run sees what that one had counted. The domain has an
// executor of its own, so that there is no worker.
// Notices: early_barrier, push_release_only.

#include "platform.hpp"

#include <mmunotify/sync/srcu_domain.hpp>

struct barrier {
  static constexpr int threads = 2;

  using domain = mmunotify::basic_srcu_domain<model::platform<threads>>;

  void prepare() { model::attach_all(domain_, threads); }

  void thread(int i) {
    if (i == 2) return static_cast<void>(domain_.drain());
    element& e = elements_[i];
    static_cast<void>(domain_.call(e, [](mmunotify::srcu_head* h) noexcept { static_cast<element*>(h)->done = true; }));
    domain_.barrier();
    model::check(e.done, "S4: a callback that was queued before a barrier has run when it returns");
  }

  void finish() {}

 private:
  struct element : mmunotify::srcu_head {
    bool done = false;
  };

  static mmunotify::srcu_options options() {
    mmunotify::srcu_options o;
    o.schedule = [](void*) noexcept {};
    return o;
  }

  domain domain_{options()};
  element elements_[2];
};

int main() { return model::run<barrier>(); }
