// SPDX-License-Identifier: MIT
#pragma once

// The guest's physical memory: which guest frames are backed by which host virtual addresses.
//
// A slot maps a run of guest frames to a run of host pages. Slots never overlap in the guest; in the host they may (the
// same pages can appear at two places). Faults look slots up all the time, updates are rare: readers use an immutable
// snapshot inside a read section of the VM's domain, or under the MMU lock; an update publishes a new snapshot under
// the MMU lock and frees the old one after a grace period.
//
// K2 (start and end see the same slots) needs nothing here: the invalidation window of this MMU is keyed by *host
// virtual* address, so `end` closes what `start` opened without looking at a slot. A slot that appears between the two
// is covered as well: a fault checks the host page of its own slot against the open ranges.
//
// Removing or moving a slot zaps its mappings and publishes the new snapshot under one hold of the MMU lock. So no
// fault can install through a slot that is going: faults look their slots up again under that lock.
//
// Lock order: the writers' mutex, then the MMU lock. Never in a callback, never inside a read section of the domain.
// Cost: lookup by frame or id is a binary search, by host range one of an interval tree (host_index.hpp); an update
// copies the list of slots.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <utility>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/dirty_log.hpp>
#include <mmunotify/secondary/x86/host_index.hpp>
#include <mmunotify/secondary/x86/memslot.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// All slots at one moment, by guest frame and by host address. Immutable, but for the reverse mappings.
class memslot_snapshot {
 public:
  std::span<memslot* const> slots() const noexcept { return {slots_.get(), count_}; }
  /// Counts updates; 0 is the empty beginning.
  std::uint64_t generation() const noexcept { return generation_; }

  /// Returns: the slot that holds the frame, or nullptr.
  memslot* find(gfn f) const noexcept {
    const auto all = slots();
    const auto after =
        std::upper_bound(all.begin(), all.end(), f, [](gfn x, const memslot* s) { return x < s->config().base; });
    if (after == all.begin()) return nullptr;
    memslot* const s = *std::prev(after);
    return s->config().contains(f) ? s : nullptr;
  }

  /// Returns: the slot with this id, or nullptr.
  memslot* find_id(unsigned id) const noexcept {
    const name *const first = by_id_.get(), *const end = first + count_;
    const name* const at = std::lower_bound(first, end, id, [](const name& n, unsigned x) { return n.id < x; });
    return at != end && at->id == id ? at->slot : nullptr;
  }

  /// Calls f(memslot&, first gfn, one past the last gfn) for each run of guest frames backed by a byte of the range.
  template <class F>
  void for_each_in(range r, F&& f) const {
    by_host_.for_each_in(r, [&](memslot& s) {
      const memslot_config& c = s.config();
      const range hit = r.clipped_to(c.host_range());
      const std::uint64_t first = (hit.first - c.host.value) >> page_shift;
      const std::uint64_t last = (hit.last - 1 - c.host.value) >> page_shift;
      f(s, c.base + first, c.base + last + 1);
    });
  }

 private:
  friend class memslots;
  struct name {
    unsigned id;
    memslot* slot;
  };
  std::unique_ptr<memslot*[]> slots_;  ///< sorted by guest frame
  std::unique_ptr<name[]> by_id_;      ///< sorted
  std::size_t count_ = 0;
  host_index by_host_;
  std::uint64_t generation_ = 0;
};

/// Where a guest frame is in the host.
struct host_page {
  errc error = errc::not_mapped;  ///< ok: the other members count
  hva address{};
  bool read_only = false;

  constexpr explicit operator bool() const noexcept { return error == errc::ok; }
  friend constexpr bool operator==(const host_page&, const host_page&) = default;
};

class memslots {
 public:
  /// What a slot may hold at most: guest-physical addresses have 52 bits.
  static constexpr std::uint64_t frame_limit = std::uint64_t{1} << 40;

  explicit memslots(srcu_domain& domain) noexcept : domain_(domain), current_(&none_) {}
  memslots(const memslots&) = delete;
  memslots& operator=(const memslots&) = delete;
  ~memslots() {
    const memslot_snapshot* last = current_.load(std::memory_order_relaxed);
    for (memslot* s : last->slots()) delete s;
    if (last != &none_) delete last;
  }

  /// In whose sections snapshots stay.
  srcu_domain& domain() const noexcept { return domain_; }
  /// Returns: the slots now. Context: inside a read section of the domain, or under the MMU lock; valid as long.
  const memslot_snapshot& current() const noexcept {
    return *current_.load(std::memory_order_acquire);  // (ms1) pairs with (ms2)
  }

  /// Returns: where the frame is. May be stale on arrival. Context: anywhere but in a place that may not read-lock.
  host_page lookup(gfn f) const noexcept {
    const read_section reading{domain_};
    return lookup_in(current(), f);
  }
  /// Returns: whether writes to the frame are logged, which maps it by 4 KiB. May be stale on arrival. Context: as
  /// lookup.
  bool logs(gfn f) const noexcept {
    const read_section reading{domain_};
    const memslot* const slot = current().find(f);
    return slot != nullptr && slot->log() != nullptr;
  }
  static host_page lookup_in(const memslot_snapshot& s, gfn f) noexcept {
    const memslot* slot = s.find(f);
    if (slot == nullptr) return {};
    return {errc::ok, slot->config().host_of(f), slot->config().read_only};
  }

  /// Effects: adds a slot. update(memslot* going, generation) is called under the MMU lock before the new snapshot, of
  /// that generation, is published; `going` is null here. Errors: bad_range (empty, wrapping, beyond frame_limit, host
  /// not aligned), overlap (guest frames that another slot has), already_registered (the id), no_memory; nothing is
  /// changed then. Context: may sleep; takes the MMU lock `lock`; neither in a callback nor inside a section of the
  /// domain.
  template <class Mutex, class Update>
  errc add(const memslot_config& c, Mutex& lock, Update&& update) noexcept {
    const std::lock_guard writing{writers_};
    const memslot_snapshot& old = *current_.load(std::memory_order_relaxed);
    if (const errc e = check(old, c, nullptr); e != errc::ok) return e;
    if (find_id(old, c.id) != nullptr) return errc::already_registered;
    return replace(nullptr, &c, lock, update);
  }
  template <class Mutex>
  errc add(const memslot_config& c, Mutex& lock) noexcept {
    return add(c, lock, [](memslot*, std::uint64_t) noexcept {});
  }

  /// Effects: removes the slot; update(memslot* going, generation), as for add, must take down all that maps `going`.
  /// Errors: not_registered (no such id), no_memory; nothing is changed then. Context: as add.
  template <class Mutex, class Update>
  errc remove(unsigned id, Mutex& lock, Update&& update) noexcept {
    const std::lock_guard writing{writers_};
    memslot* const going = find_id(*current_.load(std::memory_order_relaxed), id);
    return going == nullptr ? errc::not_registered : replace(going, nullptr, lock, update);
  }

  /// Effects: the slot has another first guest frame from now on, and no log; update as for remove.
  /// Errors: those of add and remove; nothing is changed then. Context: as add.
  template <class Mutex, class Update>
  errc move(unsigned id, gfn base, Mutex& lock, Update&& update) noexcept {
    const std::lock_guard writing{writers_};
    const memslot_snapshot& old = *current_.load(std::memory_order_relaxed);
    memslot* const going = find_id(old, id);
    if (going == nullptr) return errc::not_registered;
    memslot_config c = going->config();
    c.base = base;
    if (const errc e = check(old, c, going); e != errc::ok) return e;
    return replace(going, &c, lock, update);
  }

  /// Effects: from now on writes to the slot are logged in this way, or not at all, with a ring of so many places, or
  /// none; update(memslot&) is called under the MMU lock when the new log, empty, is in place. Errors: not_registered,
  /// no_memory; nothing is changed then. Context: as add.
  template <class Mutex, class Update>
  errc set_log(unsigned id, dirty_tracking how, std::uint64_t ring, Mutex& lock, Update&& update) noexcept {
    const std::lock_guard writing{writers_};
    memslot* const slot = find_id(*current_.load(std::memory_order_relaxed), id);
    if (slot == nullptr) return errc::not_registered;
    std::unique_ptr<dirty_log> log;
    if (how != dirty_tracking::off && (log = dirty_log::make(how, slot->config().pages, ring)) == nullptr) {
      return errc::no_memory;
    }
    {
      const std::lock_guard locked{lock};
      log = slot->exchange_log(std::move(log));
      update(*slot);
    }
    domain_.synchronize();  // who marks in the old one has left
    return errc::ok;
  }

  /// Returns: the slot with this id, or nullptr. Context: as current().
  static memslot* find_id(const memslot_snapshot& s, unsigned id) noexcept { return s.find_id(id); }

 private:
  static errc check(const memslot_snapshot& s, const memslot_config& c, const memslot* except) noexcept {
    if (c.pages == 0 || c.pages > frame_limit || c.base.value > frame_limit - c.pages) return errc::bad_range;
    if (c.host.offset() != 0 || c.host.value > UINTPTR_MAX - (c.pages << page_shift)) return errc::bad_range;
    const auto all = s.slots();
    const auto ends_before = [](const memslot* a, gfn f) { return a->config().end() <= f; };
    for (auto i = std::lower_bound(all.begin(), all.end(), c.base, ends_before); i != all.end(); ++i) {
      if ((*i)->config().base >= c.end()) break;
      if (*i != except) return errc::overlap;
    }
    return errc::ok;
  }

  /// A copy of `old` without `going`, with `coming`; empty pointer: no memory.
  static std::unique_ptr<memslot_snapshot> successor(const memslot_snapshot& old, const memslot* going,
                                                     memslot* coming) noexcept {
    std::unique_ptr<memslot_snapshot> next(new (std::nothrow) memslot_snapshot);
    if (next == nullptr) return next;
    next->slots_.reset(new (std::nothrow) memslot*[old.count_ + 1]);
    next->by_id_.reset(new (std::nothrow) memslot_snapshot::name[old.count_ + 1]);
    if (next->slots_ == nullptr || next->by_id_ == nullptr) return nullptr;
    if (!next->by_host_.succeed(old.by_host_, going, coming)) return nullptr;
    copy_names(old, going, coming, next->by_id_.get());
    for (memslot* s : old.slots()) {
      if (coming != nullptr && coming->config().base < s->config().base) {
        next->slots_[next->count_++] = std::exchange(coming, nullptr);
      }
      if (s != going) next->slots_[next->count_++] = s;
    }
    if (coming != nullptr) next->slots_[next->count_++] = coming;
    next->generation_ = old.generation_ + 1;
    return next;
  }

  static void copy_names(const memslot_snapshot& old, const memslot* going, memslot* coming,
                         memslot_snapshot::name* to) noexcept {
    for (std::size_t i = 0; i < old.count_; ++i) {
      const memslot_snapshot::name& n = old.by_id_[i];
      if (coming != nullptr && coming->config().id < n.id) {
        *to++ = {coming->config().id, coming};
        coming = nullptr;
      }
      if (n.slot != going) *to++ = n;
    }
    if (coming != nullptr) *to = {coming->config().id, coming};
  }

  template <class Mutex, class Update>
  errc replace(memslot* going, const memslot_config* config, Mutex& lock, Update&& update) noexcept {
    const memslot_snapshot* const old = current_.load(std::memory_order_relaxed);
    std::unique_ptr<memslot> coming(config != nullptr ? new (std::nothrow) memslot(*config) : nullptr);
    if (config != nullptr && (coming == nullptr || !coming->allocate())) return errc::no_memory;
    std::unique_ptr<memslot_snapshot> next = successor(*old, going, coming.get());
    if (next == nullptr) return errc::no_memory;
    {
      const std::lock_guard locked{lock};
      update(going, next->generation_);
      current_.store(next.release(), std::memory_order_release);  // (ms2) pairs with (ms1)
    }
    static_cast<void>(coming.release());
    domain_.synchronize();  // readers of the old snapshot have left
    delete going;
    if (old != &none_) delete old;
    return errc::ok;
  }

  srcu_domain& domain_;
  std::mutex writers_;
  memslot_snapshot none_;
  std::atomic<const memslot_snapshot*> current_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
