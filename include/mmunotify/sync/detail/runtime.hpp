// SPDX-License-Identifier: MIT
#pragma once

// What all read-section domains of one process share: the threads' slabs and the domains' slots.
//
//   thread A  -> slab A: [word of slot 0][word of slot 1][word of slot 2] ...
//   thread B  -> slab B: [word of slot 0][word of slot 1][word of slot 2] ...
//
// A slab belongs to one thread, which alone stores to it; a domain is an index (its slot) into every slab. So a domain
// costs a thread 8 bytes (the cells behind the words are for open brackets), and two threads never store to the same
// cache line. Slabs are reserved address space; a page of one is committed when its thread first enters a section of
// one of the page's 256 domains.
//
// Records are immortal and recycled: a grace period walks them without a lock. The thread finds its slab through one
// constinit thread_local pair {runtime, slab}; the runtime is compared on every entry, because inline variables are
// duplicated between shared objects (clang always, gcc with hidden visibility, dlopen with RTLD_LOCAL): a domain made
// by one copy of this library and entered through another takes the cold path, which goes through the domain's own
// runtime. (Limit: the copy that made a runtime must not be unloaded while threads live that used it.) The cold path is
// also taken always when heavy fences are not to be had: the pair is then never published.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

/// What a slab holds for one domain.
struct section_slot {
  /// 0 outside of the domain's sections, else the domain's sequence at the entry of the outermost. Written by the
  /// owner.
  std::atomic<std::uint64_t> word;
  /// Open sections of the unordered kind besides the outermost. The owner's alone.
  std::uint64_t nested;
};
static_assert(sizeof(section_slot) == 16 && std::atomic<std::uint64_t>::is_always_lock_free);

/// Fixed-size cells of a thread's own, in its slab: what an armed bracket has to remember from its start to its end.
/// Taking one is two loads and a store and allocates nothing (the pages of the slab are committed on first touch). Not
/// for signal handlers: sections may begin there, brackets may not.
struct alignas(64) thread_cells {
  struct alignas(64) cell {
    cell* next;
    std::byte rest[56];
  };
  static constexpr std::size_t count = 4096;

  cell* free;
  std::size_t used;  ///< cells from here on were never taken

  /// Returns: nullptr when all are taken.
  [[gnu::always_inline]] void* take() noexcept {
    if (cell* const c = free; c != nullptr) [[likely]] {
      free = c->next;
      return c;
    }
    if (used == count) return nullptr;
    return reinterpret_cast<cell*>(this + 1) + used++;
  }
  [[gnu::always_inline]] void give_back(void* p) noexcept {
    auto* const c = static_cast<cell*>(p);
    c->next = free;
    free = c;
  }
};

template <class Platform>
class runtime;

template <class Platform>
struct thread_record {
  static constexpr std::size_t words_size = std::size_t{Platform::slots} * sizeof(section_slot);
  static constexpr std::size_t cells_offset = (words_size + 63) & ~std::size_t{63};
  static constexpr std::size_t slab_size =
      cells_offset + sizeof(thread_cells) + thread_cells::count * sizeof(thread_cells::cell);

  runtime<Platform>* home = nullptr;
  std::byte* slab = nullptr;
  std::atomic<bool> in_use{true};
  thread_record* next = nullptr;  // never changes once the record is on the list

  [[gnu::always_inline]] static section_slot& slot_in(std::byte* slab, std::uint32_t slot) noexcept {
    // The slab is zeroed memory of the right size and alignment, and all zeros are a valid section_slot.
    return *std::launder(reinterpret_cast<section_slot*>(slab + std::size_t{slot} * sizeof(section_slot)));
  }
  section_slot& at(std::uint32_t slot) const noexcept { return slot_in(slab, slot); }
  [[gnu::always_inline]] static thread_cells& cells_in(std::byte* slab) noexcept {
    return *std::launder(reinterpret_cast<thread_cells*>(slab + cells_offset));
  }
};

template <class Platform>
class runtime {
 public:
  using record = thread_record<Platform>;

  /// This copy's runtime. Never destroyed: threads may outlive static destruction.
  static runtime& own() noexcept { return own_; }

  /// What a section's fast path reads: {the runtime that this thread is attached to, its slab}.
  struct thread_view {
    const runtime* attached_to;
    std::byte* slab;
  };
  static thread_view& view() noexcept { return view_; }

  /// The calling thread's record, made on first use. Returns: nullptr if memory or pthread keys are exhausted.
  /// Cold: once per thread, except without heavy fences and across copies of the library.
  MMUNOTIFY_COLD record* attach() noexcept {
    if (!prepare()) return nullptr;
    auto* r = static_cast<record*>(Platform::exit_value(key_));
    if (r == nullptr) {
      const typename Platform::signal_guard guard;
      r = take_record();
      if (r == nullptr) return nullptr;
      if (!Platform::set_exit_value(key_, r)) {
        r->in_use.store(false, std::memory_order_release);  // (r3)
        return nullptr;
      }
    }
    if (this == &own_ && asymmetric() && view_.attached_to != this) {
      const typename Platform::signal_guard guard;  // a handler must not see half of it
      view_ = {this, r->slab};
    }
    return r;
  }

  /// Makes the pthread key. Every domain calls it when it is made, so that the function that runs at thread exit is
  /// that of the copy of the library that owns this runtime. Returns: false if the process has no key left.
  bool prepare() noexcept {
    std::call_once(once_, [this] { ready_ = Platform::create_exit_key(key_, &thread_exits); });
    return ready_;
  }

  /// True if readers may rely on heavy fences.
  bool asymmetric() const noexcept { return Platform::heavy_available(); }

  /// Calls f(record) for every record, until f returns false. A thread that attaches meanwhile may be missed; the
  /// fences around grace periods make that harmless (see srcu_domain, ordering d4).
  template <class F>
  void for_each_record(F&& f) const noexcept {
    // (r1) acquire pairs with (r2): the record is complete.
    for (record* r = records_.load(std::memory_order_acquire); r != nullptr; r = r->next) {
      if (!f(*r)) return;
    }
  }

  /// Takes a slot. Returns: 0, which is nobody's slot, when all are in use. O(1).
  std::uint32_t take_slot() noexcept {
    const std::lock_guard lock(slots_mutex_);
    if (free_count_ != 0) return free_slots_[--free_count_];
    if (slots_used_ == Platform::slots - 1) return 0;
    return ++slots_used_;
  }

  /// Precondition: every word of the slot is 0.
  void give_back_slot(std::uint32_t slot) noexcept {
    const std::lock_guard lock(slots_mutex_);
    free_slots_[free_count_++] = static_cast<std::uint16_t>(slot);
  }

 private:
  record* take_record() noexcept {
    for (record* r = records_.load(std::memory_order_acquire); r != nullptr; r = r->next) {  // (r1)
      bool expected = false;
      // (r4) acquire pairs with (r3): the previous owner's last stores to the slab came before ours.
      if (r->in_use.compare_exchange_strong(expected, true, std::memory_order_acquire, std::memory_order_relaxed)) {
        return r;
      }
    }
    auto* r = new (std::nothrow) record;
    if (r == nullptr) return nullptr;
    r->home = this;
    r->slab = Platform::allocate_slab(record::slab_size);
    if (r->slab == nullptr) {
      delete r;
      return nullptr;
    }
    r->next = records_.load(std::memory_order_relaxed);
    // (r2) release pairs with (r1).
    while (!records_.compare_exchange_weak(r->next, r, std::memory_order_release, std::memory_order_relaxed)) {
    }
    return r;
  }

  /// Runs in the exiting thread, after its thread_local destructors. A section that is still open is the user's bug: it
  /// is reported, and closed, because it would block every grace period of its domain for ever.
  static void thread_exits(void* value) noexcept {
    auto* r = static_cast<record*>(value);
    runtime& home = *r->home;
    if (view_.attached_to == &home) view_ = {nullptr, nullptr};
    std::uint32_t limit = 0;
    {
      const std::lock_guard lock(home.slots_mutex_);
      limit = home.slots_used_ + 1;
    }
    for (std::uint32_t slot = 1; slot < limit; ++slot) {
      section_slot& open = r->at(slot);
      if (open.word.load(std::memory_order_relaxed) == 0) continue;
      violated("S8", "thread exit", "a thread exits inside a read section (domain slot %u)", slot);
      open.nested = 0;
      open.word.store(0, std::memory_order_release);  // (r5) pairs with the grace period's scan, srcu_domain (d3)
    }
    r->in_use.store(false, std::memory_order_release);  // (r3) pairs with (r4)
  }

  std::atomic<record*> records_{nullptr};
  std::once_flag once_;
  bool ready_ = false;
  typename Platform::exit_key key_{};

  std::mutex slots_mutex_;
  std::uint32_t slots_used_ = 0;  ///< slots 1 .. slots_used_ have been taken at some time
  std::uint32_t free_count_ = 0;
  std::uint16_t free_slots_[Platform::slots] = {};

  static runtime own_;
  [[gnu::tls_model("initial-exec")]] static thread_local constinit thread_view view_;
};

template <class Platform>
constinit inline runtime<Platform> runtime<Platform>::own_{};

template <class Platform>
[[gnu::tls_model("initial-exec")]] constinit inline thread_local
    typename runtime<Platform>::thread_view runtime<Platform>::view_{nullptr, nullptr};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
