// SPDX-License-Identifier: MIT

// interval_entry: a bracket calls an entry at its end exactly if it called it at its start, while the entry comes and
// goes, and another bracket, slow or fast, settles what it meets. The list is one flag: linked, or not yet.
// interval_phases: an interval moves from one set to another. The insertion is not over when a callback of the new set
// asks for the removal; and somebody still tries to remove it from the old one.
// Notices: interval_born_behind, interval_claim_unseen, interval_recall_lost.

#include "platform.hpp"

#include <mmunotify/interval/detail/interval_phases.hpp>
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

namespace mmunotify {
inline namespace MMUNOTIFY_ABI {
/// What a roster does besides: says where the interval is.
struct interval_probe {
  using interval = basic_interval<std::uintptr_t>;
  static void come(interval& n, detail::interval_context* c) { n.context_.store(c, std::memory_order_release); }
  static auto done(const interval& n) { return n.done_; }
};
}  // namespace MMUNOTIFY_ABI
}  // namespace mmunotify

class phases {
  using probe = mmunotify::interval_probe;
  using interval = probe::interval;
  using errc = mmunotify::errc;

  struct set : mmunotify::detail::interval_phases<std::uintptr_t> {
    using base = mmunotify::detail::interval_phases<std::uintptr_t>;
    explicit set(mmunotify::srcu_domain& d) : base(d) {}

    /// Returns: true if the removal is the insertion's to begin.
    bool insert(interval& n, std::atomic<bool>& called) {
      model::wait_until([&] { return move(n, phase::idle, phase::joining); });
      probe::come(n, &context_);
      called.store(true, std::memory_order_release);  // brackets find it
      return !end_joining(n, phase::live);
    }
    /// Returns: true if the removal is the caller's to begin.
    bool remove(interval& n, errc& e, void (*done)(interval&) noexcept) {
      bool ours = false;
      e = claim_removal(n, done, ours);
      return ours;
    }
    bool remove(interval& n) { return claim_removal(n); }
    void end_removal(interval& n) { settle(n, phase::idle); }
  };

 public:
  static constexpr int threads = 2;

  void prepare() { static_cast<void>(old_.insert(n_, called_)), called_.store(false, std::memory_order_relaxed); }

  void thread(int i) {
    errc e = errc::ok;
    if (i == 0) {  // moves it
      if (old_.remove(n_)) old_.end_removal(n_);
      if (new_.insert(n_, called_)) begin();
    } else if (i == 1) {  // a callback of the new one
      model::wait_until([this] { return called_.load(std::memory_order_acquire); });
      if (new_.remove(n_, e, &told)) begin();
      model::check(e == errc::ok, "L7: who removes an interval that is registered finds it so, whoever else looks");
    } else if (old_.remove(n_, e, nullptr)) {  // somebody who is late, or is not
      old_.end_removal(n_);
    }
  }

  void finish() {
    model::check(begun_ == 1, "L1: a removal is begun, once");
    model::check(n_.registered() && probe::done(n_) == &told, "L8: its owner is told");
    new_.end_removal(n_);
  }

 private:
  void begin() { ++begun_; }
  static void told(interval&) noexcept {}

  struct client {
    void invalidate_range_start(const mmunotify::invalidation&) noexcept {}
  } client_;
  mmunotify::interval_notifier<client> n_{client_};
  mmunotify::srcu_domain domain_;
  set old_{domain_};
  set new_{domain_};
  std::atomic<bool> called_{false};
  int begun_ = 0;
};

int main() {
  const int first = model::run<entries>();
  return first != 0 ? first : model::run<phases>();
}
