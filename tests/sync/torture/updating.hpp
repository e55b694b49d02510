// SPDX-License-Identifier: MIT
#pragma once

// What an updater does: it takes an element out of publication, and waits for grace periods in every way there is.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sync/torture/reading.hpp"

namespace torture {

inline constexpr std::size_t max_updaters = 4;

enum : std::uint64_t { by_ageing, by_waiting, by_hurrying, by_polling, by_calling, by_retiring, by_mail, update_kinds };

template <class Domain>
class updated : public published<Domain> {
  using base = published<Domain>;

 public:
  using base::base;
  using typename base::object;

  void update() {
    object* const old = replace();
    if (old == nullptr) return synchronize();
    switch (choose(self->random, update_kinds, taste.update)) {
      default: mine().pipe.push_back(old); return synchronize();
      case by_waiting: return wait_and_free(old);
      case by_hurrying: return wait_expedited(old);
      case by_polling: return poll(old);
      case by_calling: return call(old);
      case by_retiring: return self->random.below(2) == 0 ? retire(old) : retire_plain(old);
      case by_mail: return give_to_third(old);
    }
  }

  /// Empties what the calling updater still holds.
  void finish_updates() {
    for (object* e : mine().pipe) release(*e);
    mine().pipe.clear();
    while (!mine().cookies.empty()) look_at_cookies();
  }

  /// The third thread: looks at the cookies that others have sent.
  void receive() noexcept {
    for (auto& m : this->mails_) {
      if (m.state.load(std::memory_order_acquire) != cell_state::full) continue;  // (t6) pairs with (t5)
      if (!this->domain_.poll(m.cookie)) {
        if (tick.load(std::memory_order_relaxed) > m.since + options.patience)
          fail("S3: a cookie of %s never becomes complete", this->name_);
        continue;
      }
      self->completed.add();
      if (m.removed != nullptr) {
        release(*m.removed);
      } else if (m.ended != m.ticket) {
        fail("S3: a cookie of %s is complete, and the section that it was made in has not ended", this->name_);
      }
      m.state.store(cell_state::empty, std::memory_order_release);  // (t4) pairs with (t3)
    }
  }
  bool has_mail() const noexcept {
    for (auto& m : this->mails_) {
      if (m.state.load(std::memory_order_relaxed) == cell_state::full) return true;
    }
    return false;
  }

  /// Returns: what was removed, or nullptr if there is nothing to put in its place.
  object* replace() noexcept {
    object* const fresh = this->pool_->take();
    if (fresh == nullptr) return nullptr;
    auto& slot = this->table_[self->random.below(slots_in_use.load(std::memory_order_relaxed))];
    object* const old = slot.exchange(fresh, std::memory_order_acq_rel);  // (t2) pairs with (t1)
    old->age.store(1, std::memory_order_relaxed);
    return old;
  }

  /// After a grace period: nobody can be inside who found the element.
  void release(object& e) noexcept {
    audit(e);
    // Who holds it now holds it too long, and may still see the age.
    e.age.fetch_add(1, std::memory_order_relaxed);
    pool<Domain>::give_back(e);
  }

  /// Everything is free but what is published.
  void check_pool() const noexcept {
    if (this->pool_->in_use() != this->table_.size()) {
      fail("%zu elements of %s are lost: they were retired, and their callbacks have not run",
           this->pool_->in_use() - this->table_.size(), this->name_);
    }
  }

 private:
  /// What one updater has to remember.
  struct local {
    std::vector<object*> pipe;
    std::vector<object*> cookies;  ///< those whose cookie is not complete, oldest first
  };
  local& mine() noexcept { return locals_[self->index]; }

  /// Every reader that had come has left.
  void audit(object& e) const noexcept {
    if (is_child.load(std::memory_order_relaxed)) return;  // the readers that have come are gone
    for (std::size_t i = 0; i < ledgers; ++i) {
      if (e.come[i].load(std::memory_order_relaxed) == e.left[i]) continue;
      fail("S1: a grace period of %s has ended, and a section of reader %zu that found the element has not",
           this->name_, i);
    }
  }

  /// Another grace period has passed. Returns: true if that was the last one, and the element is free.
  bool grow(object& e) noexcept {
    const std::uint32_t age = e.age.fetch_add(1, std::memory_order_relaxed) + 1;
    if (age == 2) audit(e);
    if (age <= stages) return false;
    pool<Domain>::give_back(e);
    return true;
  }

  /// A grace period for everything that is in the pipe.
  void synchronize() {
    {
      const in_flight f("synchronize", this->name_);
      this->domain_.synchronize();
      self->note(count::synchronize);
    }
    std::erase_if(mine().pipe, [this](object* e) { return grow(*e); });
  }

  void wait_and_free(object* old) {
    synchronize();
    release(*old);
  }

  void wait_expedited(object* old) {
    {
      const in_flight f("synchronize_expedited", this->name_);
      this->domain_.synchronize_expedited();
      self->note(count::expedited);
    }
    release(*old);
  }

  void poll(object* old) {
    old->cookie = this->domain_.start_poll();
    mine().cookies.push_back(old);
    look_at_cookies();
    if (mine().cookies.size() <= 8) return;
    const in_flight f("poll", this->name_);
    for (const object* oldest = mine().cookies[0]; !mine().cookies.empty() && mine().cookies[0] == oldest;) {
      std::this_thread::yield();
      look_at_cookies();
    }
  }

  void look_at_cookies() {
    auto& cookies = mine().cookies;
    bool later = false;  // a later one is complete
    std::size_t complete = 0;
    for (std::size_t i = cookies.size(); i > 0; --i) {
      const bool over = this->domain_.poll(cookies[i - 1]->cookie);
      if (later && !over) fail("S3: a cookie of %s is not complete, and a later one is", this->name_);
      if (over && !later) complete = i;
      later = over;
    }
    for (std::size_t i = 0; i < complete; ++i) {
      object* const e = cookies[i];
      self->note(count::polled);
      if (stop.load(std::memory_order_relaxed)) {
        release(*e);
      } else if (!grow(*e)) {
        e->cookie = this->domain_.start_poll();
        cookies.push_back(e);
      }
    }
    cookies.erase(cookies.begin(), cookies.begin() + static_cast<std::ptrdiff_t>(complete));
  }

  void call(object* old) {
    old->link.owner = old;
    if (this->domain_.call(old->link, &on_callback) == mmunotify::errc::ok) return self->note(count::called);
    self->note(count::refused);
    wait_and_free(old);
  }

  static void on_callback(mmunotify::srcu_head* h) noexcept {
    object& e = *static_cast<typename object::link_type*>(h)->owner;
    updated& home = *e.home;
    if (home.grow(e)) return;
    if (stop.load(std::memory_order_relaxed) || home.domain_.call(e.link, &on_callback) != mmunotify::errc::ok) {
      return pool<Domain>::give_back(e);
    }
    if (self != nullptr) self->note(count::called_again);
  }

  void retire(object* old) {
    if (old->retire(recycle<Domain>{}, this->domain_) == mmunotify::errc::ok) return self->note(count::retired);
    self->note(count::refused);
    wait_and_free(old);
  }

  void retire_plain(object* old) {
    if (mmunotify::rcu_retire(old, recycle<Domain>{}, this->domain_) == mmunotify::errc::ok) {
      return self->note(count::retired_plain);
    }
    self->note(count::refused);
    wait_and_free(old);
  }

  void give_to_third(object* old) {
    auto* const m = this->claim_mail();
    if (m == nullptr) return wait_and_free(old);
    this->post(*m, old);
    self->note(count::mailed);
  }

  std::array<local, max_updaters> locals_;
};

template <class Domain>
void recycle<Domain>::operator()(element<Domain>* e) const noexcept {
  e->home->release(*e);
}

}  // namespace torture
