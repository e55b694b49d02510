// SPDX-License-Identifier: MIT
#pragma once

// Sleepable read sections and grace periods, one domain per address space.
//
// Problem. A callback may run for as long as it likes, and sleep; unregister must return only when no callback of the
// leaving client is running. A lock around the callbacks would do it and would serialise all of them; a reference count
// costs every reader two locked instructions on a shared line. A read section costs two plain stores to the thread's
// own line, and the one who waits pays for everything.
//
// Contract: S1 (no section that began before a grace period outlives it), S2, S3 (polling), S4 (callbacks and barrier),
// S5, S6 (sections sleep and nest; the hand-off kind ends anywhere), S7 (domains are independent), S8 (threads are not
// registered by the user; they exit, and processes fork, as they like).
//
// The protocol. Each thread has a word per domain (detail/slab.hpp), S is the domain's sequence.
//   section:       w = S; light fence; ... protected loads ...; w = 0
//   grace period:  S += 1; one heavy fence; for every thread: wait while w != 0 and w < S
// A nested section finds w != 0 and leaves it alone; so does a signal handler, which restores what it interrupted. What
// is stored is never what was loaded, so sections one after the other are no chain through memory.
//
// Orderings. (d1..d8 are the non-relaxed ones; each names its partner.)
//   Dekker: a section's store to w, then its protected loads (light fence between); an updater's unlink, then its scan
//   of w (heavy fence between). Either the scan sees w, or the section sees the unlink.                        -> S1
//   (d2) S acquire / (d1) S release: a section that stores the new S began after the unlink, sees it, and may be
//   skipped by `w < S`.
//   (d4) w release at unlock / (d3) w acquire in the scan: all that the section did happens before the grace period's
//   end; (d5) w release at lock, for a scan that reads a later section's w >= S.
//   (d6)/(d7): who learns from the counter that a grace period has ended comes after what its driver saw.     -> S3
//   (d8) an updater's unlink, then its look at S: the grace period that it names begins, and fences, later.
//   Sleep and wake (w1)/(w2): the updater marks `waiter`, heavy fence, scans again, sleeps; a leaver stores w = 0,
//   light fence, loads waiter. Either the updater's scan sees 0 or the leaver sees the mark. No final heavy fence is
//   needed: (d3) orders the sections before what follows.
// Without heavy fences (no membarrier) a section's light fences are full ones: entry takes the cold path always, and
// leaving does because `waiter` is then never 0.
// tests/model/ checks each of these, and what happens without it.
//
// Requests share grace periods: a request needs one that begins after it, so it reads S and waits for S + 1; whoever
// gets the driver's mutex first runs it for all who wait. They share heavy fences, too (detail/runtime.hpp).
//
// Cost (Zen 5, one thread): section 0.7 ns, nested 0.5 ns; grace period 0.4 us idle, of which the fence is 0.35; see
// bench/README.md. 16 bytes per thread that uses the domain.
//
// After: userspace-rcu (Desnoyers et al., TPDS 2012); Linux kernel/rcu/srcutree.c; P1202R5 (asymmetric fences). Names
// that C++26 has in <rcu> are in rcu.hpp.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/domain_core.hpp>
#include <mmunotify/sync/linux/platform.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <class Platform>
class basic_srcu_domain : public detail::domain_core<Platform> {
  using core = detail::domain_core<Platform>;
  using record = detail::thread_record<Platform>;
  using runtime = detail::runtime<Platform>;
  using slot = detail::section_slot;
  using word = std::atomic<std::uint64_t>;

 public:
  /// Takes one of the process's slots; status() says whether one was left. Context: any thread. A domain must not lie
  /// on the stack of one thread when another forks: the child uses that stack for something else.
  basic_srcu_domain() noexcept : basic_srcu_domain(srcu_options{}) {}
  explicit basic_srcu_domain(const srcu_options& o) noexcept : core(runtime::own(), false) {
    static_cast<void>(this->open(o));
  }

  /// Effects: runs the callbacks that are queued (a barrier). Preconditions (S1): no section is open, nobody is inside
  /// a function of the domain; not inside one of its callbacks.
  ~basic_srcu_domain() {
    if (!this->close()) {
      detail::violated("S1", "~srcu_domain", "a read section of the domain (slot %u) is open", this->slot_);
    }
  }

  /// What read_lock hands to read_unlock: the thread's word, and what it found there. (Both: a word that is null for a
  /// nested section has to be made null, out of line, and two more jumps make nested sections half as dear again.)
  class section_token {
    friend basic_srcu_domain;
    word* word_ = nullptr;
    std::uint64_t found_ = 1;  // a token of no section ends none

   public:
    bool nested() const noexcept { return found_ != 0; }
  };

  /// Effects: begins a read section of the calling thread. Errors: if the thread cannot get a slab (memory exhausted in
  /// its very first section) the contract handler is called, and the process ends; attach_this_thread() asks first.
  /// Progress: wait-free. Context: anywhere, also in a signal handler of a thread that is attached.
  [[nodiscard, gnu::always_inline]] section_token read_lock() noexcept {
    std::byte* const slab = runtime::slab();
    if (is_cold(slab)) [[unlikely]]
      return read_lock_cold();
    const section_token t = enter(record::slot_at(slab, own_offset()).word);
    if constexpr (!detail::mutated(detail::mutation::no_light_after_lock)) Platform::light();
    return t;
  }

  /// Effects: ends the section. Precondition: same thread as read_lock; sections end in reverse order of their begin.
  [[gnu::always_inline]] void read_unlock(section_token t) noexcept {
    if (!t.nested()) [[likely]] {
      // (d4) pairs with (d3)
      t.word_->store(0, detail::order(std::memory_order_release, detail::mutation::unlock_relaxed));
      this->after_leaving();
    }
  }

  /// The same for sections of one thread that may end in any order, as brackets do: the section lasts until the last of
  /// them has ended. Dearer by a load and a branch; nested, by a chain through memory. Within one of these, sections of
  /// the other kind begin and end. Progress, errors, context: as read_lock.
  /// Returns: the thread's slab, for cells(); stable for the thread's life.
  [[gnu::always_inline]] std::byte* read_lock_unordered() noexcept {
    std::byte* const slab = runtime::slab();
    if (is_cold(slab)) [[unlikely]]
      return read_lock_unordered_cold();
    enter_unordered(record::slot_at(slab, own_offset()));
    if constexpr (!detail::mutated(detail::mutation::no_light_after_lock)) Platform::light();
    return slab;
  }
  [[gnu::always_inline]] void read_unlock_unordered() noexcept { end_unordered(this->slot_in(own_slab())); }
  /// The same, and gives a cell back that was taken in the section.
  [[gnu::always_inline]] void read_unlock_unordered(void* cell) noexcept {
    std::byte* const slab = own_slab();
    cells(slab).give_back(cell);
    end_unordered(this->slot_in(slab));
  }

  /// Memory of the calling thread's own for what a section has to remember. slab: what read_lock_unordered returned.
  [[gnu::always_inline]] static typename record::cells& cells(std::byte* slab) noexcept {
    return record::cells_in(slab);
  }

  /// C++26's names for a section (std::rcu_domain): a Lockable, for std::scoped_lock and the like.
  void lock() noexcept { read_lock_unordered(); }
  bool try_lock() noexcept {
    read_lock_unordered();
    return true;
  }
  void unlock() noexcept { read_unlock_unordered(); }

 private:
  [[gnu::always_inline]] section_token enter(word& w) noexcept {
    section_token t;
    t.word_ = &w;
    t.found_ = w.load(std::memory_order_relaxed);
    if (!t.nested()) [[likely]] {
      // (d2) acquire pairs with (d1); (d5) release pairs with (d3).
      w.store(this->sequence_.load(detail::order(std::memory_order_acquire, detail::mutation::sequence_relaxed)),
              detail::order(std::memory_order_release, detail::mutation::lock_relaxed));
    }
    return t;
  }

  [[gnu::always_inline]] void enter_unordered(slot& s) noexcept {
    if (enter(s.word).nested()) [[unlikely]]
      s.count.store(s.count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  /// Where the domain's slot is in a slab, unless the section is for the cold path.
  [[gnu::always_inline]] std::uintptr_t own_offset() const noexcept { return this->place_ - runtime::own().key(); }
  [[gnu::always_inline]] bool is_cold(const std::byte* slab) const noexcept {
    return own_offset() >= record::slots_size || slab == nullptr;
  }

  [[gnu::always_inline]] std::byte* own_slab() noexcept {
    std::byte* const slab = runtime::slab();
    if (this->runtime_ != &runtime::own() || slab == nullptr) [[unlikely]]
      return attached().slab();
    return slab;
  }

  [[gnu::always_inline]] void end_unordered(slot& s) noexcept {
    const std::uint64_t others = s.count.load(std::memory_order_relaxed);
    if (others != 0) [[unlikely]] {
      s.count.store(others - 1, std::memory_order_relaxed);
      return;
    }
    section_token t;
    t.word_ = &s.word;
    t.found_ = 0;
    read_unlock(t);
  }

  MMUNOTIFY_COLD record& attached() noexcept {
    auto* r = this->runtime_->attach();
    if (r == nullptr) {
      detail::violated("S8", "srcu_domain", "out of memory for a thread's first read section");
      std::abort();
    }
    return *r;
  }

  MMUNOTIFY_COLD section_token read_lock_cold() noexcept {
    const section_token t = enter(this->slot_in(attached().slab()).word);
    this->reader_fence();
    return t;
  }

  MMUNOTIFY_COLD std::byte* read_lock_unordered_cold() noexcept {
    std::byte* const slab = attached().slab();
    enter_unordered(this->slot_in(slab));
    this->reader_fence();
    return slab;
  }
};

/// A read section as a scope. Precondition: ends in the thread that began it; not kept across a coroutine suspension.
template <class Domain>
class [[nodiscard]] basic_read_section {
 public:
  [[gnu::always_inline]] explicit basic_read_section(Domain& d) noexcept : domain_(d), token_(d.read_lock()) {}
  [[gnu::always_inline]] ~basic_read_section() { domain_.read_unlock(token_); }
  basic_read_section(const basic_read_section&) = delete;
  basic_read_section& operator=(const basic_read_section&) = delete;

 private:
  Domain& domain_;
  mutable typename Domain::section_token token_;  ///< gcc 12 keeps members of a const object in memory
};

using srcu_domain = basic_srcu_domain<linux_platform>;
using read_section = basic_read_section<srcu_domain>;

MMUNOTIFY_END_NAMESPACE
