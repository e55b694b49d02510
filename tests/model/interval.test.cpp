// SPDX-License-Identifier: MIT

// interval_entry: a bracket calls an entry at its end exactly if it called it at its start, while the entry comes and
// goes, and another bracket, slow or fast, settles what it meets. The list is one flag: linked, or not yet.
// Notices: interval_born_behind.

#include "platform.hpp"

#include <mmunotify/interval/interval_notifier.hpp>

struct entries {
  static constexpr int threads = 2;

  void prepare() { entry_.renew(nobody_, {0, 1}); }

  void thread(int i) {
    if (i == 0) {
      clock_.advance();  // others come and go
      clock_.advance();
      linked_.store(true, std::memory_order_release);
      entry_.bear(clock_);
      entry_.kill(clock_);
      return;
    }
    const std::uint64_t g = clock_.read();
    const bool at_start = is_called(g);
    const bool at_end = is_called(g);
    model::check(at_start == at_end, "P1, P2: a bracket's end is called exactly if its start was");
    if (i == 2) static_cast<void>(is_called(clock_.read()));  // and another one
  }

  void finish() { model::check(!is_called(clock_.read()), "L1: who has left is not called"); }

 private:
  bool is_called(std::uint64_t g) { return linked_.load(std::memory_order_acquire) && entry_.hears(g, clock_); }

  struct client {
    void invalidate_range_start(const mmunotify::invalidation&) noexcept {}
  } client_;
  mmunotify::interval_notifier<client> nobody_{client_};
  mmunotify::detail::version_clock clock_;
  mmunotify::detail::interval_entry<std::uintptr_t> entry_;
  std::atomic<bool> linked_{false};
};

int main() { return model::run<entries>(); }
