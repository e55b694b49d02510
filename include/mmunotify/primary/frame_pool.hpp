// SPDX-License-Identifier: MIT
#pragma once

// The physical memory of a software primary MMU: a contiguous arena of 4 KiB frames with reference counts.
//
// A frame is in exactly one of these states; the word that says so changes in one atomic step.
//
//   free    word 0            in the free list; its 4 KiB hold the poison
//   held    held_bit          an operation has it: just allocated, or withdrawn and to be freed when its bracket ends
//   mapped  a count           so many page-table entries point to it, of one address space or of several
//   pinned  a count           on loan; may come with either, and alone it keeps a withdrawn frame alive
//
//        allocate        install           the last withdraw         drop, or the last unpin
//   free ---------> held --------> mapped ------------------> held -------------------------> free
//                                   |  ^
//                                   +--+ share, withdraw
//
// A frame that several entries share leaves with the last of them. An earlier one has lost it for good when it is
// withdrawn: its own bracket's start has returned by then, so that nobody behind it uses the frame any more.
//
// Frames also come in blocks: block_frames in a row, aligned, for a huge page. A block is no more than its frames; each
// has its own word and is freed by itself.
//
// A freed frame is filled with frame_pool::poison and goes to the far end of the list, so that a secondary that kept
// a mapping for too long reads nonsense for as long as possible. Before a frame is used again its poison is checked:
// writes through stale mappings are counted. Under AddressSanitizer a free frame is poisoned in the shadow as well,
// and any touch of it is reported where it happens.
//
// Context: every member may be called from any thread. Those that change the free list take a short lock, inside
// which nothing sleeps, and which is the innermost of all locks. Limits: 2^32 - 2 frames, 2^31 - 1 entries and as many
// loans each.

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
  /// The frames of a block: 2 MiB.
  static constexpr std::size_t block_frames = 512;
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
  /// How many entries point to it; stale on arrival unless all that do are locked. Preconditions: contains(f).
  std::uint64_t maps(pfn f) const noexcept { return (at(f).word.load(std::memory_order_relaxed) & map_mask) / map_one; }
  /// How many references are on loan; stale on arrival. Preconditions: contains(f).
  std::uint64_t pins(pfn f) const noexcept { return at(f).word.load(std::memory_order_relaxed) & pin_mask; }
  bool mapped(pfn f) const noexcept { return maps(f) != 0; }
  /// Whom the frame was given to, for device pages and exclusive access. Context: whoever holds its entry's lock.
  const void* owner(pfn f) const noexcept { return at(f).owner.load(std::memory_order_relaxed); }
  void set_owner(pfn f, const void* owner) noexcept { at(f).owner.store(owner, std::memory_order_relaxed); }

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
    make_usable(f);
    return {f};
  }

  /// Takes block_frames frames in a row, of which the first is a multiple of block_frames. Returns: the first, all
  /// held, contents undefined; none if there are no such. Cost: looks at the whole pool, under its lock.
  [[nodiscard]] pfn allocate_block() noexcept {
    std::size_t first = 0;
    {
      const std::lock_guard lock{mutex_};
      while (first + block_frames <= size_ && !free_block_locked(first)) first += block_frames;
      if (first + block_frames > size_) return none;
      take_block_locked(first);
    }
    for (std::size_t i = 0; i < block_frames; i += 1) make_usable(static_cast<std::uint32_t>(first + i));
    return {first};
  }

  /// held -> mapped, by one. Context: the lock of the entry that will point to f is held.
  void install(pfn f) noexcept { at(f).word.fetch_add(map_one - held_bit, std::memory_order_relaxed); }
  /// One more entry points to it. Context: the lock of one that does is held.
  void share(pfn f) noexcept { at(f).word.fetch_add(map_one, std::memory_order_relaxed); }
  /// One entry less points to it. Returns: true if it was the last: the frame is held, and the caller's to drop.
  /// Context: that entry's lock is held, or it points elsewhere by now.
  [[nodiscard]] bool withdraw(pfn f) noexcept {
    std::uint64_t w = at(f).word.load(std::memory_order_relaxed);
    bool last = false;
    do {
      last = (w & map_mask) == map_one;
      // (fp4) release pairs with (fp5): this entry's reads of the contents happen before the one that stays writes.
      //       acquire pairs with (fp4) of the others: they happen before the frame is poisoned.
    } while (!at(f).word.compare_exchange_weak(w, last ? w - map_one + held_bit : w - map_one,
                                               std::memory_order_acq_rel, std::memory_order_relaxed));
    return last;
  }
  /// No other entry points to it. Context: the lock of the one that does is held: a true answer stays true.
  bool sole(pfn f) const noexcept {
    // (fp5) acquire pairs with (fp4).
    return (at(f).word.load(std::memory_order_acquire) & map_mask) == map_one;
  }

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
  /// Context: the lock of an entry that points to f is held: if it is the sole one, a false answer stays false; if not,
  /// nobody who borrows it meanwhile may write.
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
  static constexpr std::uint64_t map_one = std::uint64_t{1} << 31;
  static constexpr std::uint64_t pin_mask = map_one - 1;
  static constexpr std::uint64_t map_mask = held_bit - map_one;
  static constexpr std::uint32_t nil = UINT32_MAX;
  static constexpr std::align_val_t alignment{page_size};

  struct frame {
    std::atomic<std::uint64_t> word{0};
    std::atomic<std::uint64_t> generation{0};
    std::atomic<const void*> owner{nullptr};
    std::uint32_t next = nil;
  };

  frame& at(pfn f) noexcept { return frames_[f.value]; }
  const frame& at(pfn f) const noexcept { return frames_[f.value]; }

  /// A frame that has just been taken out of the list is touched for the first time.
  void make_usable(std::uint32_t f) noexcept {
    if (!intact(f)) stale_writes_.fetch_add(1, std::memory_order_relaxed);
    allow(arena_ + f * page_size, page_size);
  }

  bool free_block_locked(std::size_t first) const noexcept {
    std::uint64_t used = 0;
    for (std::size_t i = 0; i < block_frames; i += 1) used |= frames_[first + i].word.load(std::memory_order_relaxed);
    return used == 0;
  }

  /// Goes through the list and makes it anew, without the block. Context: the block is free.
  void take_block_locked(std::size_t first) noexcept {
    std::uint32_t f = head_;
    std::size_t left = free_;
    free_ = 0;
    for (; left != 0; left -= 1) {
      const std::uint32_t following = frames_[f].next;  // append changes the links behind f only
      if (f - first < block_frames) {
        frames_[f].word.store(held_bit, std::memory_order_relaxed);
      } else {
        append(f);
      }
      f = following;
    }
  }

  /// Frees a frame that is held and that nobody else knows.
  void recycle(std::uint32_t f) noexcept {
    fill_page(arena_ + f * page_size, poison);
    forbid(arena_ + f * page_size, page_size);
    frames_[f].generation.fetch_add(1, std::memory_order_relaxed);
    frames_[f].owner.store(nullptr, std::memory_order_relaxed);
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
