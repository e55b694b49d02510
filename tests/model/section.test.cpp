// SPDX-License-Identifier: MIT

// S1: what a section can reach outlives the section. One thread has two sections, another unlinks an object, waits for
// a grace period and destroys it.
// Notices: no_heavy_fence, light_for_heavy, no_light_after_lock, unlock_relaxed, lock_relaxed, sequence_relaxed,
// scan_relaxed.
// -DMODEL_READERS=2: two threads with sections. -DMODEL_GRACE_PERIODS=2: unlinks two objects, one after the other.
// -DMODEL_ATTACHED=0: the threads' first sections attach them.

#include "platform.hpp"

#include <mmunotify/sync/srcu_domain.hpp>

#ifndef MODEL_READERS
#define MODEL_READERS 1
#endif
#ifndef MODEL_SECTIONS
#define MODEL_SECTIONS 2
#endif
#ifndef MODEL_ATTACHED
#define MODEL_ATTACHED 1
#endif
#ifndef MODEL_GRACE_PERIODS
#define MODEL_GRACE_PERIODS 1
#endif

struct section {
  using domain = mmunotify::basic_srcu_domain<model::platform<MODEL_READERS>>;

  static constexpr int threads = MODEL_READERS;

  void prepare() { model::attach_all(domain_, MODEL_ATTACHED != 0 ? threads : 0); }

  void thread(int i) {
    if (i == 0) {
      for (int n = 0; n < MODEL_GRACE_PERIODS; ++n) {
        shared_.store(n + 1 < MODEL_GRACE_PERIODS ? &objects_[n + 1] : nullptr, std::memory_order_release);
        domain_.synchronize();
        objects_[n].destroy();
      }
      return;
    }
    for (int n = 0; n < MODEL_SECTIONS; ++n) {
      const auto token = domain_.read_lock();
      const model::object* const o = shared_.load(std::memory_order_acquire);
      if (o != nullptr) model::check(o->alive(), "S1: an object that a section reaches is alive");
      domain_.read_unlock(token);
    }
  }

  void finish() {}

 private:
  domain domain_;
  model::object objects_[MODEL_GRACE_PERIODS];
  std::atomic<model::object*> shared_{&objects_[0]};
};

int main() { return model::run<section>(); }
