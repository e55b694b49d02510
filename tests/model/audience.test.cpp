// SPDX-License-Identifier: MIT

// P1, P2: who comes or goes beside a bracket gets both its start and its end, or neither; also from a bracket that
// reads the version while it is odd. One client leaves, another comes, a third stays. -DMODEL_LEAVES=0: the first one
// comes, too. Notices: odd_version_relaxed, audience_by_flag.

#include "platform.hpp"

#include <mmunotify/notifier/arming.hpp>
#include <mmunotify/notifier/detail/tracked_gate.hpp>

#ifndef MODEL_LEAVES
#define MODEL_LEAVES 1
#endif

using namespace mmunotify;
using model_platform = model::platform<2>;

struct audience_model {
  struct counting {
    int open = 0;
    void invalidate_range_start(const basic_invalidation<std::uint32_t>&) noexcept { ++open; }
    void invalidate_range_end(const basic_invalidation<std::uint32_t>&) noexcept {
      model::check(open > 0, "P1: every end had a start");
      --open;
    }
  };
  using node = subscriber<counting, std::uint32_t>;

  static constexpr int threads = 2;

  void prepare() {
    join(stays_);
    if (MODEL_LEAVES != 0) join(leaves_);
  }

  void thread(int i) {
    if (i == 0) return gate_.end(gate_.start({0, 1}, event::unmap, nullptr));
    if (i == 2) return join(comes_);
    if (MODEL_LEAVES != 0) {
      leave(leaves_);
    } else {
      join(leaves_);
    }
  }

  void finish() {
    for (const counting& c : clients_) model::check(c.open == 0, "P2: every start was followed by its end");
    leave(stays_);
    leave(comes_);
    if (MODEL_LEAVES == 0) leave(leaves_);
  }

 private:
  void join(node& n) {
    model::check(gate_.join(n, this, [](const auto&) {}) == errc::ok, "a registration succeeds");
  }
  void leave(node& n) { model::check(gate_.leave(n, this) == errc::ok, "a client leaves"); }

  detail::tracked_gate<std::uint32_t, observe::none, model_platform> gate_;
  counting clients_[3];
  node stays_{clients_[0]};
  node leaves_{clients_[1]};
  node comes_{clients_[2]};
};

int main() { return model::run<audience_model>(); }
