// SPDX-License-Identifier: MIT
#pragma once

// The physical memory of a software primary MMU: a contiguous arena of 4 KiB frames with reference counts.
//
// A frame is in exactly one of these states; the word that says so changes in one atomic step.
//
//   free    word 0            in the free list; its 4 KiB hold the poison
//   held    held_bit          an operation has it: just allocated, or withdrawn and to be freed when its bracket ends
//   mapped  mapped_bit        one page-table entry points to it
//   pinned  a count           on loan; may come with either bit, and alone it keeps a withdrawn frame alive
//
//        allocate        install           withdraw         drop, or the last unpin
//   free ---------> held --------> mapped ---------> held -------------------------> free
//
// A freed frame is filled with frame_pool::poison and goes to the far end of the list, so that a secondary that kept
// a mapping for too long reads nonsense for as long as possible. Before a frame is used again its poison is checked:
// writes through stale mappings are counted. Under AddressSanitizer a free frame is poisoned in the shadow as well,
// and any touch of it is reported where it happens.
//
// Context: every member may be called from any thread. Those that change the free list take a short lock, inside
// which nothing sleeps, and which is the innermost of all locks. Limits: 2^32 - 2 frames.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>

#include <mmunotify/base/address.hpp>
#include <mmunotify/primary/frame_access.hpp>

#if defined(__SANITIZE_ADDRESS__)
#define MMUNOTIFY_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MMUNOTIFY_ASAN 1
#endif
#endif
#ifndef MMUNOTIFY_ASAN
#define MMUNOTIFY_ASAN 0
#endif
#if MMUNOTIFY_ASAN
#include <sanitizer/asan_interface.h>
#endif

MMUNOTIFY_BEGIN_NAMESPACE

/// Frames on their way to the free list, linked through the pool's own table: collecting them cannot fail.
class frame_chain {
 public:
  bool empty() const noexcept { return count_ == 0; }
  std::size_t size() const noexcept { return count_; }

 private:
  friend class frame_pool;
  std::uint32_t head_ = 0;
  std::size_t count_ = 0;
};

class frame_pool {
 public:
  /// What a freed frame is filled with.
  static constexpr std::byte poison{0x6b};
  /// Returned by allocate() when nothing is free.
  static constexpr pfn none{UINT64_MAX};

  /// A pool of n frames. When memory for it cannot be had, size() is 0 and every allocation fails.
  explicit frame_pool(std::size_t n) noexcept
      : arena_(n < nil ? static_cast<std::byte*>(::operator new(n* page_size, alignment, std::nothrow)) : nullptr),
        frames_(arena_ != nullptr ? new(std::nothrow) frame[n] : nullptr),
        size_(frames_ != nullptr ? n : 0) {
    for (std::size_t f = 0; f < size_; f += 1) append(static_cast<std::uint32_t>(f));
    forbid(arena_, size_ * page_size);
  }
  frame_pool(const frame_pool&) = delete;
  frame_pool& operator=(const frame_pool&) = delete;
  ~frame_pool() {
    allow(arena_, size_ * page_size);
    ::operator delete(arena_, alignment);
  }

  std::size_t size() const noexcept { return size_; }
  bool contains(pfn f) const noexcept { return f.value < size_; }
  /// The frame's 4 KiB. Preconditions: contains(f).
  std::byte* data(pfn f) noexcept { return arena_ + f.value * page_size; }
  /// How many frames are free; stale on arrival.
  std::size_t free_count() const noexcept {
    const std::lock_guard lock{mutex_};
    return free_;
  }
  /// How many frames were found written when they were used again.
  std::uint64_t stale_writes() const noexcept { return stale_writes_.load(std::memory_order_relaxed); }
  /// How often the frame was freed. Preconditions: contains(f).
  std::uint64_t generation(pfn f) const noexcept { return at(f).generation.load(std::memory_order_relaxed); }
  /// How many references are on loan; stale on arrival. Preconditions: contains(f).
  std::uint64_t pins(pfn f) const noexcept { return at(f).word.load(std::memory_order_relaxed) & pin_mask; }
  bool mapped(pfn f) const noexcept { return (at(f).word.load(std::memory_order_relaxed) & mapped_bit) != 0; }

  /// Takes the frame that was freed longest ago. Returns: a held frame, its contents undefined; none if none is free.
  [[nodiscard]] pfn allocate() noexcept {
    std::uint32_t f = nil;
    {
      const std::lock_guard lock{mutex_};
      if (free_ == 0) return none;
      f = head_;
      head_ = frames_[f].next;
      free_ -= 1;
      frames_[f].word.store(held_bit, std::memory_order_relaxed);
    }
    if (!intact(f)) stale_writes_.fetch_add(1, std::memory_order_relaxed);
    allow(arena_ + f * page_size, page_size);
    return {f};
  }

  /// held -> mapped. Context: the lock of the entry that will point to f is held.
  void install(pfn f) noexcept { at(f).word.fetch_add(mapped_bit - held_bit, std::memory_order_relaxed); }
  /// mapped -> held. Context: as install.
  void withdraw(pfn f) noexcept { at(f).word.fetch_sub(mapped_bit - held_bit, std::memory_order_relaxed); }

  /// Takes a reference. Context: the lock of the entry that points to f is held, so that f cannot be withdrawn.
  void pin(pfn f) noexcept { at(f).word.fetch_add(1, std::memory_order_relaxed); }

  /// Gives a reference back; the last one of a frame that nothing maps or holds frees it.
  /// Returns: false if there was none to give back; nothing is changed then.
  bool unpin(pfn f) noexcept {
    if (!contains(f)) return false;
    std::uint64_t w = at(f).word.load(std::memory_order_relaxed);
    std::uint64_t next = 0;
    do {
      if ((w & pin_mask) == 0) return false;
      next = w == 1 ? held_bit : w - 1;
      // (fp1) release pairs with (fp2): what this borrower did to the contents happens before the frame is replaced.
      //       acquire pairs with (fp1), (fp3): what everybody else did happens before it is poisoned and reused.
    } while (!at(f).word.compare_exchange_weak(w, next, std::memory_order_acq_rel, std::memory_order_relaxed));
    if (w == 1) recycle(static_cast<std::uint32_t>(f.value));
    return true;
  }

  /// Somebody has the mapped frame on loan, so that its contents cannot be taken elsewhere.
  /// Context: the lock of the entry that points to f is held: a false answer stays false.
  bool on_loan(pfn f) const noexcept {
    // (fp2) acquire pairs with (fp1).
    return (at(f).word.load(std::memory_order_acquire) & pin_mask) != 0;
  }

  /// Gives a held frame back: it is free now, or when the last reference on loan is returned.
  void drop(pfn f) noexcept {
    std::uint64_t w = at(f).word.load(std::memory_order_relaxed);
    // (fp3) release pairs with (fp1): what the operation did happens before the last borrower frees the frame.
    //       acquire pairs with (fp1): what the borrowers did happens before it is poisoned here.
    while (!at(f).word.compare_exchange_weak(w, w == held_bit ? held_bit : w - held_bit, std::memory_order_acq_rel,
                                             std::memory_order_relaxed)) {
    }
    if (w == held_bit) recycle(static_cast<std::uint32_t>(f.value));
  }

  /// Adds a held frame to a chain. Its link is the holder's to write until the frame is dropped.
  void push(frame_chain& chain, pfn f) noexcept {
    at(f).next = chain.head_;
    chain.head_ = static_cast<std::uint32_t>(f.value);
    chain.count_ += 1;
  }

  /// Drops every frame of the chain, and empties it.
  void drop(frame_chain& chain) noexcept {
    for (; chain.count_ != 0; chain.count_ -= 1) {
      const pfn f{chain.head_};
      chain.head_ = at(f).next;  // before drop: afterwards the link is the free list's
      drop(f);
    }
  }

  /// The first broken invariant, or null: the list is what it should be, its frames are free and untouched, and
  /// no other frame is free. Context: any; other threads may allocate and free meanwhile.
  const char* verify() const noexcept {
    const std::lock_guard lock{mutex_};
    std::size_t words = 0;
    for (std::size_t f = 0; f < size_; f += 1) words += frames_[f].word.load(std::memory_order_relaxed) == 0 ? 1 : 0;
    if (words != free_) return "a frame is neither in use nor in the free list";
    std::uint32_t f = head_;
    for (std::size_t i = 0; i < free_; i += 1) {
      if (f >= size_) return "the free list leaves the pool";
      if (frames_[f].word.load(std::memory_order_relaxed) != 0) return "a frame in the free list is in use";
      if (i + 1 == free_ && f != tail_) return "the free list does not end at its tail";
      if (!intact(f)) return "a freed frame was written";
      f = frames_[f].next;
    }
    return stale_writes() != 0 ? "a freed frame was written before it was used again" : nullptr;
  }

 private:
  static constexpr std::uint64_t held_bit = std::uint64_t{1} << 62;
  static constexpr std::uint64_t mapped_bit = std::uint64_t{1} << 63;
  static constexpr std::uint64_t pin_mask = held_bit - 1;
  static constexpr std::uint32_t nil = UINT32_MAX;
  static constexpr std::align_val_t alignment{page_size};

  struct frame {
    std::atomic<std::uint64_t> word{0};
    std::atomic<std::uint64_t> generation{0};
    std::uint32_t next = nil;
  };

  frame& at(pfn f) noexcept { return frames_[f.value]; }
  const frame& at(pfn f) const noexcept { return frames_[f.value]; }

  /// Frees a frame that is held and that nobody else knows.
  void recycle(std::uint32_t f) noexcept {
    fill_page(arena_ + f * page_size, poison);
    forbid(arena_ + f * page_size, page_size);
    frames_[f].generation.fetch_add(1, std::memory_order_relaxed);
    const std::lock_guard lock{mutex_};
    frames_[f].word.store(0, std::memory_order_relaxed);
    append(f);
  }

  void append(std::uint32_t f) noexcept {
    (free_ == 0 ? head_ : frames_[tail_].next) = f;
    tail_ = f;
    free_ += 1;
  }

  /// Nobody wrote to the frame since it was freed. A frame that never was used is taken to be so, and not touched.
  [[gnu::no_sanitize_address]] bool intact(std::uint32_t f) const noexcept {
    if (frames_[f].generation.load(std::memory_order_relaxed) == 0) return true;
    const std::byte* bytes = arena_ + f * page_size;
    unsigned different = 0;
    for (std::size_t i = 0; i < page_size; i += 1) different |= static_cast<unsigned>(bytes[i] ^ poison);
    return different == 0;
  }

  static void forbid([[maybe_unused]] const std::byte* p, [[maybe_unused]] std::size_t n) noexcept {
#if MMUNOTIFY_ASAN
    __asan_poison_memory_region(p, n);
#endif
  }
  static void allow([[maybe_unused]] const std::byte* p, [[maybe_unused]] std::size_t n) noexcept {
#if MMUNOTIFY_ASAN
    __asan_unpoison_memory_region(p, n);
#endif
  }

  std::byte* arena_;
  std::unique_ptr<frame[]> frames_;
  std::size_t size_;
  mutable std::mutex mutex_;  ///< the free list: head_, tail_, free_, and `next` and the zero words of free frames
  std::uint32_t head_ = nil;
  std::uint32_t tail_ = nil;
  std::size_t free_ = 0;
  std::atomic<std::uint64_t> stale_writes_{0};
};

MMUNOTIFY_END_NAMESPACE
