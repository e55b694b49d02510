// SPDX-License-Identifier: MIT
#pragma once

// The host memory behind the guest's, for the MMU itself: guest page tables, and emulated guest writes.
//
// Guest tables are ordinary guest memory, backed by pages of the primary that come and go. To read an entry, its page
// is pinned. A pin keeps the *frame*, but not its being the page behind the address. Two things make it exact:
//   - what is written (accessed and dirty bits, emulated writes) is written under the MMU lock after checking that no
//     invalidation has touched the page since before it was pinned. While we hold that lock none can begin, so the
//     frame is the page, and the write cannot be lost or land in a page that is someone else's by now;
//   - what was read outside the lock is read again under it, with the same check, before anything is built on it.
// So the provider is never called under the lock (K5), and needs nothing but pin, unpin and data.
//
// Cost: one pin per level of a walk, held until the fault is over.

#include <array>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Keyed by host virtual address (see memslots.hpp on K2).
using mmu_window = invalidation_window<std::uintptr_t>;

/// The bytes of a page, as the window counts them.
constexpr range page_range(hva page) noexcept {
  const auto first = static_cast<std::uintptr_t>(page.value);
  return {first, first + page_size};
}

/// Effects: copies bytes into a frame, each aligned 8-byte word in one atomic step; a word that is covered in part
/// keeps its other bytes. Preconditions: frame is aligned to 8, offset + bytes.size() <= page_size.
inline void store_in_words(std::byte* frame, std::size_t offset, std::span<const std::byte> bytes) noexcept {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const std::size_t within = (offset + done) % 8;
    const std::size_t n = bytes.size() - done < 8 - within ? bytes.size() - done : 8 - within;
    std::atomic_ref<std::uint64_t> word(*reinterpret_cast<std::uint64_t*>(frame + (offset + done - within)));
    std::uint64_t was = word.load(std::memory_order_relaxed);
    std::uint64_t wanted = 0;
    do {
      wanted = was;
      std::memcpy(reinterpret_cast<std::byte*>(&wanted) + within, bytes.data() + done, n);
      // (bk1) release pairs with (bk2): a table is filled before the entry that links it.
    } while (!word.compare_exchange_weak(was, wanted, std::memory_order_release, std::memory_order_relaxed));
    done += n;
  }
}

/// A provider that has frames larger than 4 KiB.
///   mapping_shift(a)  log2 of the size of an aligned run of host pages around `a` that one aligned run of frames with
///                     consecutive numbers backs, all with the same rights; at least 12. May be stale on arrival: what
///                     ends it is bracketed over all of the run. Context: as pin, and a's page is pinned.
template <class P>
concept large_frame_provider = frame_provider<P> && requires(P& p, hva a) {
  { p.mapping_shift(a) } noexcept -> std::same_as<unsigned>;
};

/// Returns: the highest level at which the host has the page in one piece, if guest and host frame lie alike in it; the
/// provider is not asked if they do not, as most small ones.
template <frame_provider Provider>
unsigned host_level(Provider& provider, const host_page& page, pfn frame, gfn guest) noexcept {
  if constexpr (large_frame_provider<Provider>) {
    if (((frame.value ^ guest.value) & (frames_at(2) - 1)) != 0) return 1;
    const unsigned shift = provider.mapping_shift(page.address);
    return shift < 21 ? 1 : shift < 30 ? 2 : 3;
  } else {
    return 1;
  }
}

/// What is needed to reach guest memory, and to know whether what was reached is still it.
template <frame_provider Provider>
struct backing {
  Provider& provider;
  memslots& slots;
  mmu_window& window;
  std::mutex& lock;  ///< the MMU lock

  /// Returns: the frame is still at that host page, and no bracket over it is open or has run since. (K1)
  /// Context: MMU lock.
  bool stands_locked(gfn frame, const host_page& at, mmu_window::snapshot since) const noexcept {
    return memslots::lookup_in(slots.current(), frame) == at && !window.retry(since, page_range(at.address));
  }
};

/// A guest frame, pinned. Gives the pin back at the end.
template <frame_provider Provider>
class pinned_frame {
 public:
  pinned_frame() = default;
  pinned_frame(const pinned_frame&) = delete;
  pinned_frame& operator=(const pinned_frame&) = delete;
  ~pinned_frame() { reset(); }

  void reset() noexcept {
    if (provider_ != nullptr && lease_) provider_->unpin(lease_.frame);
    provider_ = nullptr;
    lease_ = {};
  }

  /// Effects: looks the frame up and pins it. Errors: not_mapped (no slot), access_denied (a write, and the slot or the
  /// host forbids it), again (an open or finished bracket is known already), those of the provider.
  /// Context: may sleep; without the MMU lock, outside guest mode.
  errc pin(backing<Provider>& b, gfn frame, bool write) noexcept {
    reset();
    frame_ = frame;
    since_ = b.window.read_begin();  // before the look-ups: both are checked against it under the lock
    at_ = b.slots.lookup(frame);
    if (!at_) return at_.error;
    if (write && at_.read_only) return errc::access_denied;
    lease_ = b.provider.pin(at_.address, write);
    if (!lease_) return lease_.error;
    provider_ = &b.provider;
    written_ = write;
    if (write && !lease_.writable) return errc::access_denied;
    return b.window.check_retry(since_, page_range(at_.address)) ? errc::again : errc::ok;
  }

  explicit operator bool() const noexcept { return provider_ != nullptr; }
  gfn frame() const noexcept { return frame_; }
  const host_page& at() const noexcept { return at_; }
  const frame_lease& lease() const noexcept { return lease_; }
  mmu_window::snapshot since() const noexcept { return since_; }
  bool for_write() const noexcept { return written_; }
  /// Precondition: pinned.
  std::byte* data() const noexcept { return provider_->data(lease_.frame); }
  /// Context: MMU lock.
  bool stands_locked(const backing<Provider>& b) const noexcept { return b.stands_locked(frame_, at_, since_); }

 private:
  Provider* provider_ = nullptr;  ///< null: nothing is pinned
  gfn frame_{};
  host_page at_{};
  frame_lease lease_{};
  mmu_window::snapshot since_ = 0;
  bool written_ = false;
};

/// Guest memory as the walker wants it; keeps every table of the walk pinned until it ends. Entry: that of the mode.
template <frame_provider Provider, std::unsigned_integral Entry = std::uint64_t>
class walked_tables {
 public:
  explicit walked_tables(backing<Provider>& b) noexcept : backing_(b) {}

  /// Why read_entry or compare_exchange_entry failed last. again: not the guest's fault, start anew.
  errc error() const noexcept { return error_; }

  /// Context: without the MMU lock.
  bool read_entry(gpa where, Entry& value) noexcept {
    pinned_frame<Provider>* const f = table(frame_of(where));
    if (f == nullptr) return false;
    value = word(*f, where).load(std::memory_order_acquire);  // (bk2) pairs with (bk1)
    return true;
  }

  /// Context: without the MMU lock, which it takes.
  exchange_result compare_exchange_entry(gpa where, Entry expected, Entry desired) noexcept {
    pinned_frame<Provider>* const f = table(frame_of(where));
    if (f == nullptr) return exchange_result::failed;
    if (!f->for_write()) {
      const errc e = f->pin(backing_, frame_of(where), true);
      if (e == errc::access_denied) return read_only(*f, where);
      if (e != errc::ok) return fail(*f, e);
    }
    const std::lock_guard locked{backing_.lock};
    if (!f->stands_locked(backing_)) return failed_with(errc::again);
    const bool swapped = word(*f, where).compare_exchange_strong(expected, desired, std::memory_order_relaxed);
    if (swapped) backing_.slots.current().find(f->frame())->mark_dirty(f->frame());
    return swapped ? exchange_result::done : exchange_result::changed;
  }

  /// Returns: the entry still has this value, in the page that is there now. Context: MMU lock.
  bool unchanged_locked(const walked_entry& e) noexcept {
    pinned_frame<Provider>* const f = find(frame_of(e.where));
    return f != nullptr && f->stands_locked(backing_) &&
           word(*f, e.where).load(std::memory_order_acquire) == e.value;  // (bk2) pairs with (bk1)
  }

 private:
  static constexpr std::size_t capacity = 6;

  static std::atomic_ref<Entry> word(const pinned_frame<Provider>& f, gpa where) noexcept {
    return std::atomic_ref<Entry>(*reinterpret_cast<Entry*>(f.data() + where.offset()));
  }

  pinned_frame<Provider>* find(gfn frame) noexcept {
    for (auto& f : pinned_) {
      if (f && f.frame() == frame) return &f;
    }
    return nullptr;
  }

  /// The table's pin; a walk that started again may need another place than it had.
  pinned_frame<Provider>* table(gfn frame) noexcept {
    if (pinned_frame<Provider>* const f = find(frame); f != nullptr) return f;
    pinned_frame<Provider>& f = pinned_[next_++ % capacity];
    error_ = f.pin(backing_, frame, false);
    if (error_ == errc::ok) return &f;
    f.reset();
    return nullptr;
  }

  exchange_result failed_with(errc e) noexcept {
    error_ = e;
    return exchange_result::failed;
  }
  exchange_result fail(pinned_frame<Provider>& f, errc e) noexcept {
    f.reset();
    return failed_with(e);
  }
  /// ROM: the table stays pinned for reading.
  exchange_result read_only(pinned_frame<Provider>& f, gpa where) noexcept {
    const errc e = f.pin(backing_, frame_of(where), false);
    return e == errc::ok ? exchange_result::read_only : fail(f, e);
  }

  backing<Provider>& backing_;
  std::array<pinned_frame<Provider>, capacity> pinned_{};
  std::size_t next_ = 0;
  errc error_ = errc::ok;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
