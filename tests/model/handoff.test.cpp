// SPDX-License-Identifier: MIT

// S6: a hand-off section protects until it is ended, by whichever thread. Thread 1 begins one and hands it to thread 2
// with the object that it found; main unlinks two objects, one after the other.
// Notices: no_handoff_recheck, no_handoff_scan.

#include "platform.hpp"

#include <mmunotify/sync/srcu_domain.hpp>

struct handoff {
  using domain = mmunotify::basic_srcu_domain<model::platform<2>>;

  static constexpr int threads = 2;

  void prepare() { model::attach_all(domain_, threads); }

  void thread(int i) {
    switch (i) {
      case 0:
        for (int n = 0; n < 2; ++n) {
          shared_.store(n == 0 ? &objects_[1] : nullptr, std::memory_order_release);
          domain_.synchronize();
          objects_[n].destroy();
        }
        return;
      case 1:
        token_ = domain_.down_read();
        found_ = shared_.load(std::memory_order_acquire);
        handed_over_.store(true, std::memory_order_release);
        return;
      default:
        model::wait_until([this] { return handed_over_.load(std::memory_order_acquire); });
        if (found_ != nullptr) model::check(found_->alive(), "S6: an object that a section reaches is alive");
        domain_.up_read(token_);
    }
  }

  void finish() {}

 private:
  domain domain_;
  model::object objects_[2];
  std::atomic<model::object*> shared_{&objects_[0]};
  domain::handoff_token token_;
  const model::object* found_ = nullptr;
  std::atomic<bool> handed_over_{false};
};

int main() { return model::run<handoff>(); }
