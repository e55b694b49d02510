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
// Memory: a bit per frame while a log is kept.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

enum class dirty_tracking : std::uint8_t { off, write_protect, dirty_bits };

/// The marks of one slot. Frames are counted from the slot's first.
class dirty_log {
 public:
  /// Returns: an empty log, or null: no memory.
  static std::unique_ptr<dirty_log> make(dirty_tracking how, std::uint64_t frames) noexcept {
    std::unique_ptr<dirty_log> log(new (std::nothrow) dirty_log(how, frames));
    if (log == nullptr || log->words_ == nullptr) return nullptr;
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
    w.fetch_or(mask, std::memory_order_relaxed);
  }
  bool marked(std::uint64_t i) const noexcept {
    return (words_[i / 64].load(std::memory_order_relaxed) >> (i % 64) & 1) != 0;
  }
  /// Returns: the marks of frames 64 n and on, which are forgotten.
  std::uint64_t take(std::uint64_t n) noexcept { return words_[n].exchange(0, std::memory_order_relaxed); }

 private:
  dirty_log(dirty_tracking how, std::uint64_t frames) noexcept
      : how_(how), words_(new(std::nothrow) std::atomic<std::uint64_t>[words_for(frames)]()) {}

  const dirty_tracking how_;
  std::unique_ptr<std::atomic<std::uint64_t>[]> words_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
