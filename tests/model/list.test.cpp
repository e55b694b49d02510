// SPDX-License-Identifier: MIT

// lockfree_hlist: a node that was removed and inserted again stays, whatever another remover was about to do (rule H1);
// and whoever walks reaches no node that is free. Two threads remove, the first inserts its node again, a third walks.
// -DMODEL_REMOVERS=3 -DMODEL_WALKERS=0: others.
// Notices: sweep_outside_section, reuse_before_grace_period.

#include "platform.hpp"

#include <mmunotify/sync/lockfree_hlist.hpp>

#ifndef MODEL_WALKERS
#define MODEL_WALKERS 1
#endif
#ifndef MODEL_REMOVERS
#define MODEL_REMOVERS 2
#endif

struct list {
  static constexpr int threads = MODEL_REMOVERS - 1 + MODEL_WALKERS;

  using domain = mmunotify::basic_srcu_domain<model::platform<threads>>;
  struct node : mmunotify::hlist_node {
    model::object payload;
  };

  void prepare() {
    model::attach_all(domain_, threads);
    for (node& n : nodes_) static_cast<void>(list_.push_front(n));
  }

  void thread(int i) {
    if (i < MODEL_REMOVERS) return remove(i);
    const mmunotify::basic_read_section<domain> section(domain_);
    for (const node& n : list_) {
      model::check(n.payload.alive(), "S1: a node that a walk reaches is alive");
    }
  }

  void finish() {
    int found = 0;
    for (const node& n : list_) found += &n == &nodes_[MODEL_REMOVERS - 1] ? 1 : 100;
    model::check(found == 1, "H1: the node that was inserted again is on the list, and no other");
    static_cast<void>(list_.remove(nodes_[MODEL_REMOVERS - 1]));
  }

 private:
  void remove(int i) {
    // The newest node is the one that comes back: it is where the others' sweeps begin.
    node& n = nodes_[MODEL_REMOVERS - 1 - i];
    model::check(list_.remove(n) == mmunotify::errc::ok, "a node is removed");
    n.payload.destroy();
    if (i != 0) return;
    n.payload.renew();
    static_cast<void>(list_.push_front(n));
  }

  domain domain_;
  mmunotify::lockfree_hlist<node, domain> list_{domain_};
  node nodes_[MODEL_REMOVERS];
};

int main() { return model::run<list>(); }
