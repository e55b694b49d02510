// SPDX-License-Identifier: MIT

// A grace period that goes to sleep is woken: whoever ends the last section that it waits for sees it, or it sees that
// the section has ended. It never spins here. main and, with -DMODEL_LEAVERS=2, a thread have sections, the last thread
// waits for them.
// Notices: no_leaver_fence, no_sleeper_fence. Both need a checker: on x86 the mark is a locked instruction, and the
// compilers do not use their freedom.

#include "platform.hpp"

#include <mmunotify/sync/srcu_domain.hpp>

#ifndef MODEL_LEAVERS
#define MODEL_LEAVERS 1
#endif

struct wakeup {
  using domain = mmunotify::basic_srcu_domain<model::platform<MODEL_LEAVERS, 0>>;

  static constexpr int threads = MODEL_LEAVERS;
  static constexpr int joined = MODEL_LEAVERS - 1;

  void prepare() { model::attach_all(domain_, threads); }

  void thread(int i) {
    if (i == threads) return domain_.synchronize();
    const auto token = domain_.read_lock();
    domain_.read_unlock(token);
  }

  void finish() {}

 private:
  domain domain_;
};

int main() { return model::run<wakeup>(); }
