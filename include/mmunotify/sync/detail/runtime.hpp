// SPDX-License-Identifier: MIT
#pragma once

// What all read-section domains of one process share: the threads' slabs, the domains' slots, the heavy fences.
//
// Records are immortal and recycled: a grace period walks them without a lock. The thread finds its slab through one
// constinit thread_local pointer; whether the domain is of the same runtime is looked at on every entry, because inline
// variables are duplicated between shared objects (clang always, gcc with hidden visibility, dlopen with RTLD_LOCAL): a
// domain made by one copy of this library and entered through another takes the cold path, which goes through the
// domain's own runtime. (Limit: the copy that made a runtime must not be unloaded while threads live that used it.) The
// cold path is also taken always when heavy fences are not to be had: the pointer is then never published.
//
// Heavy fences are shared: the kernel serialises them, so a request that finds one running waits for its end, and then
// one fence serves all who wait. A fence serves the requests that were made before it began.
//
// fork. The child has one thread and all the memory. Its handler clears the other threads' slabs (their sections are
// gone with them), makes every lock anew that another thread may have held, and forgets the worker thread.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/callback.hpp>
#include <mmunotify/sync/detail/slab.hpp>
#include <mmunotify/sync/detail/worker.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <class Platform>
class domain_core;

template <class Platform>
class alignas(64) runtime {
 public:
  using record = thread_record<Platform>;
  using core = domain_core<Platform>;

  /// This copy's runtime. Never destroyed: threads may outlive static destruction.
  static constexpr runtime& own() noexcept { return own_; }

  /// The calling thread's slab of this copy's runtime: what a section's fast path reads. Null: take the cold path.
  [[gnu::always_inline]] static std::byte*& slab() noexcept { return Platform::template own<runtime, std::byte*>(); }

  /// Tells runtimes apart, with room for an offset into a slab below: their sum says where a domain's slot is, and
  /// subtracting the own key is the test whether that is an offset into the own slab.
  [[gnu::always_inline]] std::uintptr_t key() const noexcept { return reinterpret_cast<std::uintptr_t>(this) << 14; }

  /// The calling thread's record, made on first use. Returns: nullptr if memory or pthread keys are exhausted.
  /// Cold: once per thread, except without heavy fences and across copies of the library.
  MMUNOTIFY_COLD record* attach() noexcept {
    if (!prepare()) return nullptr;
    record* r = current();
    if (r == nullptr) {
      const typename Platform::signal_guard guard;
      r = current();  // a handler may have attached the thread
      if (r == nullptr) r = take_record();
      if (r == nullptr) return nullptr;
      if (!Platform::set_exit_value(key_, r)) {
        r->in_use.store(false, std::memory_order_release);  // (r3)
        return nullptr;
      }
    }
    if (this == &own_ && asymmetric() && slab() == nullptr) {
      slab() = r->slab();
    }
    return r;
  }

  /// Returns: the calling thread's record, or nullptr if it has none. Precondition: prepare() said true.
  record* current() const noexcept { return static_cast<record*>(Platform::exit_value(key_)); }

  /// Makes the pthread key and the fork handlers. Every domain calls it when it is made, so that what runs at thread
  /// exit and fork, and in the worker, is code of the copy of the library that owns this runtime. Returns: false if the
  /// process has no key left.
  bool prepare() noexcept {
    // (r6) acquire pairs with (r7): the key is there.
    if (ready_.load(std::memory_order_acquire)) [[likely]]
      return true;
    const std::lock_guard lock(mutex_);
    if (ready_.load(std::memory_order_relaxed)) return true;
    if (!Platform::at_fork(&before_fork, &after_fork_parent, &after_fork_child)) return false;
    if (!Platform::create_exit_key(key_, &thread_exits)) return false;
    asymmetric_ = Platform::heavy_available();
    work.own();
    ready_.store(true, std::memory_order_release);  // (r7)
    return true;
  }

  /// True if readers may rely on heavy fences. One answer for all copies of the library. Precondition: prepare() said
  /// true.
  bool asymmetric() const noexcept { return asymmetric_; }

  /// True in a thread whose exit handler has run.
  static bool exiting() noexcept { return Platform::template own<exit_flag, bool>(); }

  /// How many forks lie between this process and the one that loaded the library.
  std::uint32_t generation() const noexcept { return generation_; }

  /// The fence of a grace period: heavy, or full where readers use full ones. Concurrent requests share it.
  void fence() noexcept {
    if constexpr (mutated(mutation::no_heavy_fence)) return;
    if constexpr (mutated(mutation::light_for_heavy)) return Platform::light();
    if (!asymmetric()) return Platform::full();
    if (fence_mutex_.try_lock()) {
      heavy_locked();
    } else {
      // The caller's stores, then its look at the counter. Partner: heavy_locked counts, then fences. If this look
      // misses fence n + 1, that fence begins after the stores and serves them.
      Platform::full();
      const std::uint64_t begun = fences_begun_.load(std::memory_order_relaxed);
      const std::uint64_t needed = mutated(mutation::stale_fence_ticket) ? begun : begun + 1;
      fence_mutex_.lock();
      if (fences_ended_ < needed) heavy_locked();
    }
    fence_mutex_.unlock();
  }

  /// Calls f(record) for every record, until f returns false. A thread that attaches meanwhile may be missed; the
  /// fences around grace periods make that harmless: its record is published before its first section's fence.
  template <class F>
  bool for_each_record(F&& f) const noexcept {
    // (r1) acquire pairs with (r2): the record is complete.
    for (record* r = records_.load(std::memory_order_acquire); r != nullptr; r = r->next) {
      if (!f(*r)) return false;
    }
    return true;
  }

  /// Gives the domain a slot, unless it has one, and knows it from now on. In one step for whoever forks meanwhile.
  /// Returns: false if there is none left.
  bool enlist(core& d, const srcu_options& o) noexcept {
    const std::lock_guard lock(mutex_);
    if (d.slot_ != 0) return true;
    const std::uint32_t slot = slots_.take(o.isolated);
    if (slot == 0) return false;
    d.next_ = first_;
    d.link_ = &first_;
    if (first_ != nullptr) first_->link_ = &d.next_;
    first_ = &d;
    d.begin_life(slot, o);
    return true;
  }

  /// Forgets the domain. `reusable`: every word of its slot is 0.
  void delist(core& d, std::uint32_t slot, bool isolated, bool reusable) noexcept {
    const std::lock_guard lock(mutex_);
    *d.link_ = d.next_;
    if (d.next_ != nullptr) d.next_->link_ = d.link_;
    if (reusable) slots_.give_back(slot, isolated);
  }

  template <class F>
  void for_each_domain(F&& f) noexcept {
    const std::lock_guard lock(mutex_);
    for (core* d = first_; d != nullptr; d = d->next_) f(*d);
  }

  worker<Platform> work;

 private:
  struct exit_flag;

  record* take_record() noexcept {
    for (record* r = records_.load(std::memory_order_acquire); r != nullptr; r = r->next) {  // (r1)
      bool expected = false;
      // (r4) acquire pairs with (r3): the previous owner's last stores to the slab came before ours.
      if (r->in_use.compare_exchange_strong(expected, true, std::memory_order_acquire, std::memory_order_relaxed)) {
        return r;
      }
    }
    std::byte* const memory = Platform::allocate_slab(record::memory_size);
    if (memory == nullptr) return nullptr;
    auto* const r = new (memory) record;
    r->home = this;
    r->next = records_.load(std::memory_order_relaxed);
    // (r2) release pairs with (r1).
    while (!records_.compare_exchange_weak(r->next, r, std::memory_order_release, std::memory_order_relaxed)) {
    }
    return r;
  }

  /// Precondition: fence_mutex_ is held.
  void heavy_locked() noexcept {
    fences_begun_.store(fences_begun_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    Platform::heavy();
    fences_ended_ = fences_begun_.load(std::memory_order_relaxed);
  }

  /// Runs in the exiting thread, after its thread_local destructors. A section that is still open is the user's bug: it
  /// is reported, and closed, because it would block every grace period of its domain for ever.
  static void thread_exits(void* value) noexcept {
    auto* r = static_cast<record*>(value);
    runtime& home = *r->home;
    slab() = nullptr;
    Platform::template own<exit_flag, bool>() = true;
    while (static_slot* const s = r->static_slots) {
      r->static_slots = s->next;
      home.close(*s, r->at(s->slot));
    }
    std::uint32_t end = 0;
    {
      const std::lock_guard lock(home.mutex_);
      end = home.slots_.end();
    }
    for (std::uint32_t slot = 1; slot < end; ++slot) {
      section_slot& open = r->at(slot);
      if (open.word.load(std::memory_order_relaxed) == 0) continue;
      open.count.store(0, std::memory_order_relaxed);
      home.close(open.word, 0, slot);
    }
    r->in_use.store(false, std::memory_order_release);  // (r3) pairs with (r4)
  }

  /// Ends a section that its thread leaves open.
  void close(std::atomic<std::uint64_t>& word, std::uint64_t outside, std::uint32_t slot) noexcept {
    violated("S8", "thread exit", "a thread exits inside a read section (domain slot %u)", slot);
    word.store(outside, std::memory_order_release);  // (r5) pairs with the grace period's scan, domain_core (d3)
    for_each_domain([&](core& d) {
      if (d.slot_ == slot) d.leave_cold();
    });
  }

  /// The thread_local word of a static domain goes away with its thread, so grace periods must not look at it any more.
  void close(static_slot& s, section_slot& shared) noexcept {
    if (static_slot::is_inside(s.word)) close(s.word, 0, s.slot);
    s.word.store(static_slot::unattached, std::memory_order_release);  // (r5)
    s.count = 0;
    s.slot = 0;
    // Dekker: the address goes, then a look at the pins; a scan pins, then looks for the address.
    shared.word.store(0, std::memory_order_seq_cst);  // (p1) pairs with (p2)
    if constexpr (mutated(mutation::exit_unpinned)) return;
    while (shared.count.load(std::memory_order_seq_cst) != 0) Platform::yield();  // (p3) pairs with (p4)
  }

  static void before_fork() noexcept {
    own_.mutex_.lock();
    own_.work.before_fork();
  }
  static void after_fork_parent() noexcept {
    own_.work.after_fork_parent();
    own_.mutex_.unlock();
  }
  static void after_fork_child() noexcept {
    runtime& home = own_;
    if constexpr (!mutated(mutation::fork_keeps_readers)) {
      const record* const mine = home.current();
      home.for_each_record([&](record& r) {
        if (&r == mine || !r.in_use.load(std::memory_order_relaxed)) return true;
        r.clear();
        r.static_slots = nullptr;
        r.in_use.store(false, std::memory_order_relaxed);
        return true;
      });
    }
    ++home.generation_;
    new (&home.fence_mutex_) typename Platform::mutex;
    home.fences_ended_ = home.fences_begun_.load(std::memory_order_relaxed);
    home.work.after_fork_child(home.first_);
    home.mutex_.unlock();
  }

  std::atomic<record*> records_{nullptr};
  std::atomic<bool> ready_{false};
  typename Platform::exit_key key_{};
  bool asymmetric_ = false;
  std::uint32_t generation_ = 0;

  typename Platform::mutex fence_mutex_;
  std::atomic<std::uint64_t> fences_begun_{0};  ///< written under fence_mutex_
  std::uint64_t fences_ended_ = 0;              ///< under fence_mutex_

  typename Platform::mutex mutex_;  ///< guards what follows; a leaf but for the worker's
  core* first_ = nullptr;           ///< all domains with a slot
  slot_allocator<Platform::slots> slots_;

  static runtime own_;
};

template <class Platform>
constinit inline runtime<Platform> runtime<Platform>::own_{};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
