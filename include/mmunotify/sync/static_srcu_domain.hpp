// SPDX-License-Identifier: MIT
#pragma once

// A read-section domain that is known at compile time: two thirds of the cost of a dynamic one.
//
//   struct page_cache;
//   using pages = static_srcu_domain<page_cache>;
//   { pages d; basic_read_section s(d); ... }      pages::synchronize();
//
// A dynamic domain's section finds its word through the thread's slab; here the word is a thread_local variable of its
// own, one for each tag, and nothing is looked up. Everything else is the same (srcu_domain.hpp), and so are the
// orderings. A slot of the slab holds the address of the variable, for grace periods and for the thread's exit, which
// waits until no grace period looks at it (p1..p4).
//
// All members are static; an object of the type is empty, so that it can stand where a domain is asked for. The domain
// takes its slot at the first use in the process, and lives for ever.
//
// Limits: each copy of the library (two shared objects with hidden visibility) has a domain of its own for the same
// tag, so use one from one shared object only, or take a dynamic domain. 40 bytes of static TLS for each tag.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <class Tag, class Platform = linux_platform>
class static_srcu_domain {
  class instance : public detail::domain_core<Platform> {
    using core = detail::domain_core<Platform>;

   public:
    constexpr instance() noexcept : core(detail::runtime<Platform>::own(), true) {}

    /// Takes a slot, once.
    bool ready() noexcept { return core::ready() || this->open({}); }

    /// Makes the variable the calling thread's word. Returns: false if memory is exhausted, or there was no slot.
    bool attach(detail::static_slot& s) noexcept {
      auto* const r = ready() ? this->runtime_->attach() : nullptr;
      if (r == nullptr) return false;
      const typename Platform::signal_guard guard;  // a handler may attach the thread, too
      if (s.slot != 0) return true;
      s.slot = this->slot_;
      s.next = r->static_slots;
      r->static_slots = &s;
      // Without heavy fences the word keeps saying "unattached", and every entry is cold.
      if (this->runtime_->asymmetric()) s.word.store(0, std::memory_order_relaxed);
      // (p5) release pairs with (p2): the word is initialised.
      r->at(this->slot_).word.store(detail::static_slot::address_of(s.word), std::memory_order_release);
      return true;
    }

    // What read_lock and read_unlock do after the thread's exit handler has run: see static_slot.
    void enter_after_exit(detail::static_slot& s) noexcept {
      if (s.handed_off++ == 0) s.bank = this->enter_bank();
    }
    void leave_after_exit(detail::static_slot& s) noexcept {
      if (--s.handed_off == 0) this->leave_bank(s.bank);
    }
    static bool exiting() noexcept { return detail::runtime<Platform>::exiting(); }

    bool asymmetric() const noexcept { return this->runtime_->asymmetric(); }

    using core::after_leaving;
    using core::reader_fence;
    using core::sequence_;
  };

  using word = std::atomic<std::uint64_t>;

 public:
  using platform = Platform;
  using cookie = typename detail::domain_core<Platform>::cookie;
  using handoff_token = typename detail::domain_core<Platform>::handoff_token;

  /// What read_lock hands to read_unlock: what it found in the thread's word.
  class section_token {
    friend static_srcu_domain;
    std::uint64_t found_ = 1;

   public:
    bool nested() const noexcept { return found_ != 0 && !detail::static_slot::is_unattached(found_); }
  };

  // All as in srcu_domain.

  static errc status() noexcept { return domain_.ready() ? errc::ok : errc::no_slot; }

  [[nodiscard, gnu::always_inline]] static section_token read_lock() noexcept {
    section_token t;
    word& w = own().word;
    t.found_ = w.load(std::memory_order_relaxed);
    if (detail::static_slot::is_unattached(t.found_)) [[unlikely]]
      return read_lock_cold();
    if (t.found_ == 0) [[likely]]
      enter(w);
    if constexpr (!detail::mutated(detail::mutation::no_light_after_lock)) Platform::light();
    return t;
  }
  [[gnu::always_inline]] static void read_unlock(section_token t) noexcept {
    if (t.found_ == 0) [[likely]] {
      leave(0);
    } else if (detail::static_slot::is_unattached(t.found_)) [[unlikely]] {
      leave_unattached();
    }
  }

  /// Sections that may end in any order; C++26's names.
  [[gnu::always_inline]] static void lock() noexcept {
    const section_token t = read_lock();
    if (t.nested()) [[unlikely]]
      ++own().count;
  }
  static bool try_lock() noexcept {
    lock();
    return true;
  }
  [[gnu::always_inline]] static void unlock() noexcept {
    if (own().count != 0) [[unlikely]] {
      --own().count;
      return;
    }
    if (own().slot != 0 && domain_.asymmetric()) [[likely]] {
      leave(0);
    } else {
      leave_unattached();
    }
  }

  [[nodiscard]] static bool held_by_this_thread() noexcept {
    return detail::static_slot::is_inside(own().word) || own().handed_off != 0;
  }
  static errc attach_this_thread() noexcept {
    if (const errc e = status(); e != errc::ok) return e;
    return domain_.attach(own()) ? errc::ok : errc::no_memory;
  }

  static void synchronize() noexcept { ready().synchronize(); }
  static void synchronize_expedited() noexcept { ready().synchronize_expedited(); }
  [[nodiscard]] static cookie start_poll() noexcept { return ready().start_poll(); }
  static bool poll(cookie c) noexcept { return ready().poll(c); }
  [[nodiscard]] static handoff_token down_read() noexcept { return ready().down_read(); }
  static void up_read(handoff_token t) noexcept { domain_.up_read(t); }
  static errc call(srcu_head& head, srcu_callback function) noexcept { return ready().call(head, function); }
  static errc call_unbounded(srcu_head& head, srcu_callback function) noexcept {
    return ready().call_unbounded(head, function);
  }
  static std::size_t backlog() noexcept { return domain_.backlog(); }
  static void barrier() noexcept { ready().barrier(); }
  static std::uint64_t grace_periods() noexcept { return domain_.grace_periods(); }

 private:
  static instance& ready() noexcept {
    static_cast<void>(domain_.ready());  // a domain without a slot says so itself
    return domain_;
  }

  [[gnu::always_inline]] static void enter(word& w) noexcept {
    // (d2) acquire pairs with (d1); (d5) release pairs with (d3).
    w.store(domain_.sequence_.load(detail::order(std::memory_order_acquire, detail::mutation::sequence_relaxed)),
            detail::order(std::memory_order_release, detail::mutation::lock_relaxed));
  }

  MMUNOTIFY_COLD static void leave_unattached() noexcept {
    if (own().handed_off != 0) return domain_.leave_after_exit(own());
    leave(detail::static_slot::unattached);
  }

  [[gnu::always_inline]] static void leave(std::uint64_t outside) noexcept {
    // (d4) pairs with (d3)
    own().word.store(outside, detail::order(std::memory_order_release, detail::mutation::unlock_relaxed));
    domain_.after_leaving();
  }

  MMUNOTIFY_COLD static section_token read_lock_cold() noexcept {
    section_token t;
    if (domain_.exiting() && domain_.ready()) {
      domain_.enter_after_exit(own());
      t.found_ = detail::static_slot::unattached;
      return t;
    }
    if (!domain_.attach(own()) && domain_.status() == errc::ok) {
      detail::violated("S8", "static_srcu_domain", "out of memory for a thread's first read section");
      std::abort();
    }
    word& w = own().word;
    t.found_ = w.load(std::memory_order_relaxed);
    enter(w);
    domain_.reader_fence();
    return t;
  }

  [[gnu::always_inline]] static detail::static_slot& own() noexcept {
    return Platform::template own<static_srcu_domain, detail::static_slot>();
  }

  static constinit inline instance domain_{};
};

MMUNOTIFY_END_NAMESPACE
