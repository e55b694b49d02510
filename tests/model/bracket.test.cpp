// SPDX-License-Identifier: MIT

// O1: between the start of a bracket and its end no usable mapping exists in its range. A primary takes a page away in
// a bracket; a client registers, faults, uses its mapping and leaves, and another thread of the client's faults and
// uses it, too. Also P1 and P2: the client gets as many ends as starts, in pairs; and L1: none after it has left.
// Notices: no_retry_check, unlink_before_release, audience_by_flag, end_before_change, no_arming_grace_period,
// no_leaving_grace_period, version_never_odd, leaving_not_counted.
// -DMODEL_BRACKETS=2: two brackets, one after the other. -DMODEL_JOINS=0, -DMODEL_LEAVES=0: the client is registered
// from the beginning, to the end. -DMODEL_OTHERS=0: without the other thread.

#include "platform.hpp"

#include <mmunotify/notifier/arming.hpp>
#include <mmunotify/notifier/detail/tracked_gate.hpp>
#include <mmunotify/notifier/invalidation_window.hpp>

#ifndef MODEL_BRACKETS
#define MODEL_BRACKETS 1
#endif
#ifndef MODEL_JOINS
#define MODEL_JOINS 1
#endif
#ifndef MODEL_LEAVES
#define MODEL_LEAVES 1
#endif
#ifndef MODEL_OTHERS
#define MODEL_OTHERS 1
#endif

using namespace mmunotify;
using model_platform = model::platform<1 + MODEL_OTHERS>;

/// The primary's one page: what its table says.
struct page_table {
  model::object page;
  std::atomic<model::object*> entry{&page};
};

/// Mirrors that page. Everything but the window's snapshot is under its lock.
class mirror {
 public:
  explicit mirror(page_table& p) : primary_(p) {}

  void invalidate_range_start(const basic_invalidation<std::uint32_t>& i) noexcept {
    model::check(alive_.alive(), "L1: who has left is not called");
    ++open_;
    lock_.lock();
    window_.start(i.range);
    mapping_ = nullptr;
    lock_.unlock();
  }
  void invalidate_range_end(const basic_invalidation<std::uint32_t>& i) noexcept {
    model::check(alive_.alive(), "L1: who has left is not called");
    model::check(open_ > 0, "P1: every end had a start");
    --open_;
    lock_.lock();
    window_.end(i.range);
    lock_.unlock();
  }
  void release() noexcept {
    lock_.lock();
    active_ = false;
    mapping_ = nullptr;
    lock_.unlock();
  }

  /// After a registration. Look-ups from before it are worth nothing: brackets ran that the client was not told of.
  void activate() {
    lock_.lock();
    window_.forget();
    active_ = true;
    lock_.unlock();
  }
  void fault() {
    const auto snapshot = window_.read_begin();
    model::object* const page = primary_.entry.load(std::memory_order_acquire);
    if (page == nullptr) return;
    lock_.lock();
    if (active_ && !window_.retry(snapshot, {0, 1})) mapping_ = page;
    lock_.unlock();
  }
  void use() {
    lock_.lock();
    if (mapping_ != nullptr) model::check(mapping_->alive(), "O1: a page that is mapped is the primary's");
    lock_.unlock();
  }
  void left() {
    model::check(open_ == 0, "P2: every start was followed by its end");
    alive_.destroy();
  }

 private:
  page_table& primary_;
  model_platform::mutex lock_;
  invalidation_window<std::uint32_t, 1, 2> window_;
  model::object* mapping_ = nullptr;
  bool active_ = false;
  int open_ = 0;  ///< of the primary, whose brackets do not overlap
  model::object alive_;
};

struct bracket_model {
  static constexpr int threads = 1 + MODEL_OTHERS;

  void prepare() {
    if (MODEL_JOINS == 0) join();
  }

  void thread(int i) {
    if (i == 0) return change();
    if (i == 1 && MODEL_JOINS != 0) join();
    client_.fault();
    client_.use();
    if (i == 1 && MODEL_LEAVES != 0) leave();
  }

  void finish() {
    if (MODEL_LEAVES == 0) leave();
  }

 private:
  void join() {
    model::check(gate_.join(node_, this, [](const auto&) {}) == errc::ok, "a registration succeeds");
    client_.activate();
  }
  void leave() {
    model::check(gate_.leave(node_, this) == errc::ok, "the client leaves");
    client_.left();
  }
  void change() {
    for (int n = 0; n < MODEL_BRACKETS; ++n) {
      const auto ticket = gate_.start({0, 1}, event::unmap, nullptr);
      if constexpr (detail::mutated(detail::mutation::end_before_change)) gate_.end(ticket);
      if (n == 0) {
        primary_.entry.store(nullptr, std::memory_order_release);
        primary_.page.destroy();
      }
      if constexpr (!detail::mutated(detail::mutation::end_before_change)) gate_.end(ticket);
    }
  }

  page_table primary_;
  detail::tracked_gate<std::uint32_t, observe::none, model_platform> gate_;
  mirror client_{primary_};
  subscriber<mirror, std::uint32_t> node_{client_};
};

int main() { return model::run<bracket_model>(); }
