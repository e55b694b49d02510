// SPDX-License-Identifier: MIT
#pragma once

// The published elements of one domain, and everything that a reader does with them.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "sync/torture/element.hpp"
#include "sync/torture/phase.hpp"

namespace torture {

/// Hand-off sections are inherited open by a forked child, which knows no token of other threads: who forks closes this
/// gate and waits until none is open.
struct {
  std::atomic<bool> closed{false};
  std::atomic<std::uint32_t> open{0};

  bool enter() noexcept {
    open.fetch_add(1, std::memory_order_seq_cst);  // Dekker with the one who forks
    if (!closed.load(std::memory_order_seq_cst)) return true;
    leave();
    return false;
  }
  void leave() noexcept { open.fetch_sub(1, std::memory_order_seq_cst); }
} inline handoff_gate;

/// A cell that one thread fills and another empties.
enum class cell_state : std::uint32_t { empty, busy, full };

enum : std::uint64_t {
  plain_section,
  another_plain_section,
  nested_section,
  unordered_section,
  ledger_section,
  cookie_section,
  handoff_section,
  section_kinds
};

template <class Domain>
class published {
 public:
  using object = element<Domain>;
  using section = mmunotify::basic_read_section<Domain>;

  published(Domain& d, const char* name, arena<Domain>& home)
      : domain_(d), name_(name), pool_(std::make_unique<pool<Domain>>(home)) {
    for (auto& slot : table_) slot.store(pool_->take(), std::memory_order_relaxed);
  }

  const char* name() const noexcept { return name_; }
  Domain& domain() noexcept { return domain_; }

  /// One section of some kind.
  void read() {
    switch (choose(self->random, section_kinds, taste.section)) {
      default: return read_plain();
      case nested_section: return nested();
      case unordered_section: return unordered();
      case ledger_section: return self->index < ledgers ? with_ledger() : read_plain();
      case cookie_section: return cookie_inside();
      case handoff_section:
        return self->random.below(2) == 0 ? begin_for_another() : static_cast<void>(end_for_another());
    }
  }

  void read_plain() noexcept {
    const bool late = self->random.below(2) == 0;
    if (late) fill_store_buffer(self->random);
    const section s(domain_);
    const sight x = look(self->random);
    if (late) relax(self->random.below(128));
    dwell(self->random);
    verify(x);
    self->note(count::plain);
  }

  void read_in_handler() noexcept {
    const section s(domain_);
    const sight x = look(self->handler_random);
    relax(self->handler_random.below(50));
    verify(x);
    self->note(count::in_handler);
  }

  /// Sections in the order that only the unordered kind allows, over two domains.
  template <class F>
  void read_around(F inner) {
    domain_.lock();
    const sight x = look(self->random);
    inner();
    verify(x);
    domain_.unlock();
    self->note(count::two_domains);
  }

  /// Ends all hand-off sections that nobody else is about to end.
  void drain_handoffs() {
    while (end_for_another()) {
    }
  }

 protected:
  /// An element that a reader has found in its section.
  struct sight {
    object* found = nullptr;
    std::uint64_t number = 0;
    std::uint64_t begun = 0;  ///< grace periods of the domain before
  };

  sight look(small_random& random) noexcept {
    sight s;
    s.begun = domain_.grace_periods();
    // (t1) acquire pairs with (t2): the element is initialised (S2).
    s.found = table_[random.below(slots_in_use.load(std::memory_order_relaxed))].load(std::memory_order_acquire);
    s.number = s.found->number;
    if (s.found->check != s.found->expected()) {
      fail("S1, S2: a reader of %s found an element (number %#lx, age %u) that is %s", name_,
           static_cast<unsigned long>(s.number), s.found->age.load(std::memory_order_relaxed),
           s.number == object::poison ? "freed" : "not initialised");
    }
    return s;
  }

  /// Precondition: the section in which it was found is still open.
  void verify(const sight& s) noexcept {
    asm volatile("" ::: "memory");
    const std::size_t age = s.found->age.load(std::memory_order_relaxed);
    const std::uint64_t number = s.found->number;
    const bool sound = s.found->check == s.found->expected();
    const std::uint64_t begun = domain_.grace_periods() - s.begun;
    self->pipe[std::min(age, bins - 1)].add();
    self->batch[std::min<std::uint64_t>(begun, bins - 1)].add();
    if (age >= 2) {
      fail("S1: a reader of %s holds an element that is %zu grace periods past its removal", name_, age - 1);
    }
    if (!sound || number != s.number) {
      fail("S1: a reader of %s held element %lu, and found it %s", name_, static_cast<unsigned long>(s.number),
           number == object::poison ? "freed" : "reused");
    }
    if (begun >= 2) {
      fail("S1: %lu grace periods of %s began while a section was open", static_cast<unsigned long>(begun), name_);
    }
  }

  /// A cookie on its way to a third thread: with the element that was removed before it was made, or from inside a
  /// section that is still open.
  struct mail {
    std::atomic<cell_state> state{cell_state::empty};
    typename Domain::cookie cookie;
    object* removed = nullptr;
    std::uint64_t ticket = 0;
    std::uint64_t ended = 0;  ///< plain: written by the reader at the end of its section
    std::uint64_t since = 0;
  };

  mail* claim_mail() noexcept {
    for (mail& m : mails_) {
      auto empty = cell_state::empty;
      // (t3) acquire pairs with (t4).
      if (m.state.compare_exchange_strong(empty, cell_state::busy, std::memory_order_acquire)) return &m;
    }
    return nullptr;
  }
  void post(mail& m, object* removed) noexcept {
    m.removed = removed;
    m.since = tick.load(std::memory_order_relaxed);
    m.cookie = domain_.start_poll();
    m.state.store(cell_state::full, std::memory_order_release);  // (t5) pairs with (t6)
  }

  Domain& domain_;
  const char* name_;
  std::unique_ptr<pool<Domain>> pool_;
  std::array<std::atomic<object*>, 8> table_{};
  std::array<mail, 4> mails_;

 private:
  void nested() noexcept {
    const section outer(domain_);
    const sight x = look(self->random);
    {
      const section inner(domain_);
      const sight y = look(self->random);
      dwell(self->random);
      verify(y);
    }
    dwell(self->random);
    verify(x);
    self->note(count::nested);
  }

  void unordered() noexcept {
    if (domain_.held_by_this_thread()) fail("S6: outside of %s, and held_by_this_thread says inside", name_);
    if (self->random.below(4) == 0) fill_store_buffer(self->random);
    domain_.lock();
    const sight x = look(self->random);
    domain_.lock();
    const sight y = look(self->random);
    dwell(self->random);
    domain_.unlock();  // the first of the two; the section goes on
    if (!domain_.held_by_this_thread()) fail("S6: inside of %s, and held_by_this_thread says outside", name_);
    dwell(self->random);
    verify(x);
    verify(y);
    domain_.unlock();
    self->note(count::unordered);
  }

  void with_ledger() noexcept {
    const section s(domain_);
    const sight x = look(self->random);
    const std::uint64_t visit = ++visits_[self->index];
    x.found->come[self->index].store(visit, std::memory_order_relaxed);
    dwell(self->random);
    verify(x);
    x.found->left[self->index] = visit;
    self->note(count::ledger);
  }

  void cookie_inside() noexcept {
    mail* const m = claim_mail();
    const section s(domain_);
    const sight x = look(self->random);
    const typename Domain::cookie mine = domain_.start_poll();
    std::uint64_t ticket = 0;
    if (m != nullptr) {
      ticket = m->ticket = m->ended + 1;
      post(*m, nullptr);
    }
    for (std::uint64_t i = self->random.below(8); i > 0; --i) {
      if (self->random.below(2) == 0) std::this_thread::yield();
      if (domain_.poll(mine)) fail("S3: a cookie of %s is complete inside the section that began before it", name_);
    }
    dwell(self->random);
    verify(x);
    if (m != nullptr) m->ended = ticket;
    self->note(count::cookie_in_section);
  }

  /// A hand-off section on its way to the thread that ends it.
  struct open_section {
    std::atomic<cell_state> state{cell_state::empty};
    typename Domain::handoff_token token;
    sight seen;
  };

  void begin_for_another() noexcept {
    if (!handoff_gate.enter()) return static_cast<void>(end_for_another());
    for (open_section& o : handoffs_) {
      auto empty = cell_state::empty;
      // (t7) acquire pairs with (t8).
      if (!o.state.compare_exchange_strong(empty, cell_state::busy, std::memory_order_acquire)) continue;
      if (self->random.below(2) == 0) fill_store_buffer(self->random);
      o.token = domain_.down_read();
      o.seen = look(self->random);
      dwell(self->random);
      o.state.store(cell_state::full, std::memory_order_release);  // (t9) pairs with (t10)
      return;
    }
    handoff_gate.leave();
    end_for_another();
  }

  bool end_for_another() noexcept {
    for (open_section& o : handoffs_) {
      auto full = cell_state::full;
      // (t10) acquire pairs with (t9).
      if (!o.state.compare_exchange_strong(full, cell_state::busy, std::memory_order_acquire)) continue;
      const auto token = o.token;
      const sight seen = o.seen;
      o.state.store(cell_state::empty, std::memory_order_release);  // (t8) pairs with (t7)
      dwell(self->random);
      verify(seen);
      domain_.up_read(token);
      handoff_gate.leave();
      self->note(count::handed_over);
      return true;
    }
    return false;
  }

  std::array<std::uint64_t, ledgers> visits_{};  ///< each its reader's own
  std::array<open_section, 8> handoffs_;
};

}  // namespace torture
