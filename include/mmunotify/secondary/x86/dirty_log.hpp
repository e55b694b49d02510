// SPDX-License-Identifier: MIT
#pragma once

// Which guest frames have been written since somebody last asked: what live migration and frame buffers need.
//
// Two ways to find out, and each slot chooses:
//   write_protect   leaves are mapped read-only; the first write marks the frame and makes its leaf writable, without
//                   the MMU lock (vcpu.hpp); a harvest costs what was written.
//   dirty_bits      leaves stay writable, the walk sets their dirty bit; a harvest looks at every mapped frame, and a
//                   write costs nothing. A leaf that is taken down hands its dirty bit to the bitmap.
// Both count writes of the MMU itself: emulated ones, and accessed and dirty bits in guest tables.
//
// Exactness. A frame is marked *after* its leaf became writable (dl1), and a harvest clears the mark *before* it
// write-protects the leaf, both under no common lock: a write is then in this harvest or in the next one, never in
// none. The other way round a harvest between mark and upgrade would take the mark, and leave a writable leaf without
// one.
//
// A log by write protection may have a ring besides: each frame that becomes marked is also pushed there, so that who
// harvests the ring pays for what was written and not for the size of the slot. A ring that is full says so, and the
// bitmap, which is always complete, has the answer.
//
// Memory: a bit per frame while a log is kept, 8 bytes per place in the ring.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

enum class dirty_tracking : std::uint8_t { off, write_protect, dirty_bits };

/// Frames in the order in which they were marked. Any thread pushes, one at a time takes.
class dirty_ring {
 public:
  /// Precondition: places > 0. valid() says whether there was memory.
  explicit dirty_ring(std::uint64_t places) noexcept
      : places_(places), slots_(new(std::nothrow) std::atomic<std::uint64_t>[places]()) {}

  bool valid() const noexcept { return slots_ != nullptr; }
  /// Frames were not pushed because there was no place, since the last reset. The bitmap has them.
  bool overflowed() const noexcept { return overflowed_.load(std::memory_order_relaxed); }
  void reset_overflow() noexcept { overflowed_.store(false, std::memory_order_relaxed); }

  /// Progress: lock-free.
  void push(std::uint64_t frame) noexcept {
    std::uint64_t t = tail_.load(std::memory_order_relaxed);
    do {
      // (dr1) acquire pairs with (dr2): the place is empty.
      if (t - head_.load(std::memory_order_acquire) >= places_) {
        overflowed_.store(true, std::memory_order_relaxed);
        return;
      }
    } while (!tail_.compare_exchange_weak(t, t + 1, std::memory_order_relaxed));
    slots_[t % places_].store(frame + 1, std::memory_order_release);  // (dr3) pairs with (dr4)
  }
  /// Returns: whether there was one. One that is being pushed may be missed, with those after it. Progress: wait-free.
  bool pop(std::uint64_t& frame) noexcept {
    const std::uint64_t h = head_.load(std::memory_order_relaxed);
    const std::uint64_t v = slots_[h % places_].load(std::memory_order_acquire);  // (dr4) pairs with (dr3)
    if (v == 0) return false;
    frame = v - 1;
    slots_[h % places_].store(0, std::memory_order_relaxed);
    head_.store(h + 1, std::memory_order_release);  // (dr2) pairs with (dr1)
    return true;
  }

 private:
  const std::uint64_t places_;
  std::unique_ptr<std::atomic<std::uint64_t>[]> slots_;
  std::atomic<std::uint64_t> head_{0};
  std::atomic<std::uint64_t> tail_{0};
  std::atomic<bool> overflowed_{false};
};

/// The marks of one slot. Frames are counted from the slot's first.
class dirty_log {
 public:
  /// Returns: an empty log, or null: no memory. ring: how many places its ring has; 0: none.
  static std::unique_ptr<dirty_log> make(dirty_tracking how, std::uint64_t frames, std::uint64_t ring = 0) noexcept {
    std::unique_ptr<dirty_log> log(new (std::nothrow) dirty_log(how, frames));
    if (log == nullptr || log->words_ == nullptr) return nullptr;
    if (ring == 0) return log;
    log->ring_.reset(new (std::nothrow) dirty_ring(ring));
    if (log->ring_ == nullptr || !log->ring_->valid()) return nullptr;
    return log;
  }

  dirty_tracking how() const noexcept { return how_; }
  /// Returns: how many words a harvest has.
  static constexpr std::uint64_t words_for(std::uint64_t frames) noexcept { return (frames + 63) / 64; }

  /// Progress: wait-free. Context: any.
  void mark(std::uint64_t i) noexcept {
    const std::uint64_t mask = std::uint64_t{1} << (i % 64);
    std::atomic<std::uint64_t>& w = words_[i / 64];
    if ((w.load(std::memory_order_relaxed) & mask) != 0) return;
    if ((w.fetch_or(mask, std::memory_order_relaxed) & mask) == 0 && ring_ != nullptr) ring_->push(i);
  }
  bool marked(std::uint64_t i) const noexcept {
    return (words_[i / 64].load(std::memory_order_relaxed) >> (i % 64) & 1) != 0;
  }
  /// Returns: the marks of frames 64 n and on, which are forgotten.
  std::uint64_t take(std::uint64_t n) noexcept { return words_[n].exchange(0, std::memory_order_relaxed); }
  /// Returns: whether the frame was marked; it is not any more.
  bool take_one(std::uint64_t i) noexcept {
    const std::uint64_t mask = std::uint64_t{1} << (i % 64);
    return (words_[i / 64].fetch_and(~mask, std::memory_order_relaxed) & mask) != 0;
  }
  /// Returns: the ring, or null.
  dirty_ring* ring() const noexcept { return ring_.get(); }

 private:
  dirty_log(dirty_tracking how, std::uint64_t frames) noexcept
      : how_(how), words_(new(std::nothrow) std::atomic<std::uint64_t>[words_for(frames)]()) {}

  const dirty_tracking how_;
  std::unique_ptr<std::atomic<std::uint64_t>[]> words_;
  std::unique_ptr<dirty_ring> ring_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
