// SPDX-License-Identifier: MIT
#pragma once

// A domain under torture, with all that goes on in it; and the same without its type.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "sync/torture/calling.hpp"
#include "sync/torture/listing.hpp"
#include "sync/torture/updating.hpp"

namespace torture {

inline constexpr std::size_t max_callers = 3;

class any_arena {
 public:
  virtual ~any_arena() = default;
  virtual const char* arena_name() const = 0;
  virtual void attach() = 0;
  virtual void read_one() = 0;
  virtual void read_last() = 0;  ///< one that leaves nothing for others
  virtual void read_in_handler_one() noexcept = 0;
  virtual void inside(const std::function<void()>& f) = 0;  ///< in a section that the thread itself has to end
  virtual void update_one() = 0;
  virtual void finish() = 0;
  virtual void receive_one() = 0;
  virtual bool mail_waits() = 0;
  virtual void end_handoffs() = 0;
  virtual void change_list() = 0;
  virtual void walk_list() = 0;
  virtual void barrier_one() = 0;
  virtual void flood_one() = 0;
  virtual void sleep_beside(any_arena& other) = 0;
  virtual void need_grace_periods() = 0;
  static constexpr std::uint64_t steps_in_child = 4;
  virtual void use_in_child(std::atomic<std::uint64_t>& step) = 0;
  virtual void close() = 0;
  virtual std::uint64_t grace_periods() = 0;
  virtual std::size_t backlog() = 0;
  virtual std::uint64_t reinserted() = 0;
};

template <class Domain>
class arena final : public any_arena, public updated<Domain> {
  using base = updated<Domain>;
  using calls = numbered_calls<Domain>;

 public:
  /// by_worker: the worker runs the callbacks.
  arena(Domain& d, const char* name, bool by_worker = true)
      : base(d, name, *this), by_worker_(by_worker), list_(d, name) {
    for (auto* all : {&barriers_, &floods_}) {
      for (auto& c : *all) c = std::make_unique<calls>(d, name, !by_worker);
    }
  }

  const char* arena_name() const override { return this->name_; }
  void attach() override {
    if (this->domain_.attach_this_thread() != mmunotify::errc::ok) fail("a thread cannot attach to %s", this->name_);
  }
  void read_one() override {
    this->read();
    self->completed.add();
  }
  void read_last() override { this->read_plain(); }
  void read_in_handler_one() noexcept override { this->read_in_handler(); }
  void inside(const std::function<void()>& f) override { this->read_around(f); }
  void update_one() override {
    this->update();
    self->completed.add();
  }
  void finish() override { this->finish_updates(); }
  void receive_one() override { this->receive(); }
  bool mail_waits() override { return this->has_mail(); }
  void end_handoffs() override { this->drain_handoffs(); }
  void change_list() override {
    list_.change();
    self->completed.add();
  }
  void walk_list() override { list_.walk(); }
  void barrier_one() override { barriers_[self->index]->with_barrier(1 + self->random.below(32)); }
  void flood_one() override { floods_[self->index]->with_patience(calls::size); }

  /// S7: the section lasts until the other domain has done its work, so it hangs if it has to wait for the section.
  void sleep_beside(any_arena& other) override {
    const in_flight f("grace periods and callbacks in another domain, beside a sleeper", other.arena_name());
    this->read_around([&other] { other.need_grace_periods(); });
    self->note(count::sleeper);
  }
  void need_grace_periods() override {
    for (int i = 0; i < 3; ++i) this->domain_.synchronize();
    const auto c = this->domain_.start_poll();
    while (!this->domain_.poll(c)) std::this_thread::yield();
    // An executor may sleep in a callback for the very domain that the sleeper is in.
    if (by_worker_) sleepers_call_->with_patience(1);
  }

  void use_in_child(std::atomic<std::uint64_t>& step) override {
    const auto done = [&] { step.fetch_add(1, std::memory_order_relaxed); };
    {
      const typename base::section s(this->domain_);
      const auto x = this->look(self->random);
      this->verify(x);
    }
    this->domain_.synchronize();
    done();
    const auto c = this->domain_.start_poll();
    while (!this->domain_.poll(c)) std::this_thread::yield();
    done();
    const auto t = this->domain_.down_read();
    this->domain_.up_read(t);
    done();
    calls(this->domain_, this->name_, false).with_barrier(3);
    done();
  }

  /// After all threads have gone.
  void close() override {
    {
      const in_flight f("the last barrier", this->name_);
      this->domain_.barrier();
      list_.close();
      // What was called again by a callback while the first one waited.
      this->domain_.barrier();
    }
    this->check_pool();
    if (this->domain_.backlog() != 0)
      fail("S4: %zu callbacks of %s are queued after its last barrier", this->domain_.backlog(), this->name_);
  }
  std::uint64_t grace_periods() override { return this->domain_.grace_periods(); }
  std::size_t backlog() override { return this->domain_.backlog(); }
  std::uint64_t reinserted() override { return list_.reinserted(); }

 private:
  const bool by_worker_;
  list_torture<Domain> list_;
  std::array<std::unique_ptr<calls>, max_callers> barriers_;
  std::array<std::unique_ptr<calls>, max_callers> floods_;
  std::unique_ptr<calls> sleepers_call_ = std::make_unique<calls>(this->domain_, this->name_, false);
};

inline std::vector<any_arena*> arenas;

inline any_arena& some_arena() { return *arenas[choose(self->random, arenas.size(), taste.arena)]; }

}  // namespace torture
