// SPDX-License-Identifier: MIT
#pragma once

// A primary MMU whose every step is the test's: pages change hands inside brackets that the test opens itself, in any
// nesting, and what anybody sees through a mapping tells which page it is, which version of it, and whether it is still
// anybody's.
//
// Each page of the window has two words. The first names the page and its version, and changes whenever the page gets
// another frame: who sees another version looks through a mapping that should be gone. The second is the device's: what
// it stores must be found again after the page has moved. A frame that its page has left is filled with `taken_back`,
// at once or, if it is on loan, when the last reference is returned; nobody may see that, and who overwrites it is
// reported when the frame is used again.
//
// Frames are never unmapped and all their words are atomic: an adapter that is wrong reads a wrong value, and nothing
// worse, also under sanitizers.
//
// Locks: one, held for a look-up or a change and never across a hook. Cost: about a microsecond for a page.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/event.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/testing/adapter.hpp>
#include <mmunotify/testing/schedule.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing {

class stage final : public test_primary {
 public:
  /// What a frame holds that is nobody's page any more.
  static constexpr std::uint64_t taken_back = 0x6b6b6b6b6b6b6b6b;

  /// Where the words of a page are.
  static constexpr std::uintptr_t version_at(std::uint64_t page) noexcept {
    return window.first + page * page_size + page % 16 * 64;
  }
  static constexpr std::uintptr_t data_at(std::uint64_t page) noexcept { return version_at(page) + 8; }
  static constexpr std::uint64_t word_of(std::uint64_t page, std::uint64_t version) noexcept {
    return 0x5a6e'0000'0000'0000U | page << 32 | version;
  }

  stage() noexcept : arena_(static_cast<std::byte*>(::operator new(frames* page_size, alignment, std::nothrow))) {
    if (arena_ == nullptr) return;
    for (std::uint64_t p = 0; p < window_pages; ++p) place(p, 0, 0);
  }
  stage(const stage&) = delete;
  stage& operator=(const stage&) = delete;
  /// Effects: the space is released.
  ~stage() {
    static_cast<void>(space_.release());
    ::operator delete(arena_, alignment);
  }

  /// Returns: false if there was no memory for it; then it must not be used.
  bool ready() const noexcept { return arena_ != nullptr; }
  test_space& space() noexcept { return space_; }

  // --- What the adapter calls. --------------------------------------------------------------------------------------

  frame_lease pin(hva a, bool write) noexcept override {
    if (detail::current_schedule.callbacks != 0) {
      mmunotify::detail::violated("L7", "testing::stage::pin",
                                  "called in a hook: with a primary that brackets under its lock it waits for itself");
      return {.error = errc::would_deadlock};
    }
    point();
    const frame_lease lease = look_up(a, write);
    point();
    return lease;
  }
  void unpin(pfn f) noexcept override {
    const std::lock_guard lock{mutex_};
    if (f.value >= frames || frame_[f.value].pins == 0) {
      return mmunotify::detail::violated("K4", "testing::stage::unpin", "frame %llu is not on loan",
                                         static_cast<unsigned long long>(f.value));
    }
    if (--frame_[f.value].pins == 0 && !frame_[f.value].mapped) poison(f.value);
  }
  std::byte* data(pfn f) noexcept override { return arena_ + f.value % frames * page_size; }

  // --- Changes, one page at a time. Precondition of each: inside a bracket over the page. ---------------------------

  /// Effects: the page is in another frame, and of another version; its old frame is nobody's.
  void take_back(std::uint64_t page) noexcept {
    const std::lock_guard lock{mutex_};
    if (page_[page].present) leave(page);
    place(page, page_[page].version + 1, page_[page].stored);
  }
  /// Effects: the page is nowhere; the next pin() brings it back, in another frame, as another version.
  void put_away(std::uint64_t page) noexcept {
    const std::lock_guard lock{mutex_};
    if (page_[page].present) leave(page);
  }
  void set_writable(std::uint64_t page, bool writable) noexcept {
    const std::lock_guard lock{mutex_};
    page_[page].writable = writable;
  }
  /// Effects: pin() answers errc::not_mapped from now on, and the page is nowhere; or no longer.
  void set_withdrawn(std::uint64_t page, bool withdrawn) noexcept {
    const std::lock_guard lock{mutex_};
    if (withdrawn && page_[page].present) leave(page);
    page_[page].withdrawn = withdrawn;
  }

  // --- Brackets, and whole operations, each in a bracket of its own. ------------------------------------------------

  /// The plain calls. Preconditions: as those of the space.
  [[nodiscard]] test_space::ticket start(range r, event e = event::clear, const void* owner = nullptr) noexcept {
    const detail::inside_callbacks inside;
    return space_.invalidate_range_start({.range = r, .event = e, .owner = owner});
  }
  void end(test_space::ticket t) noexcept {
    const detail::inside_callbacks inside;
    space_.invalidate_range_end(t);
  }
  /// Effects: a bracket that is not blockable; inside() is called in it. Returns: false if it was refused.
  template <class Inside>
  bool try_bracketed(range r, Inside in) noexcept {
    const detail::inside_callbacks inside;
    const auto b = space_.try_invalidate(r, event::clear);
    const unsigned outer = std::exchange(detail::current_schedule.callbacks, 0);
    if (b) in();
    detail::current_schedule.callbacks = outer;
    return static_cast<bool>(b);
  }

  /// Calls change(page) for the pages of r, in a bracket over r.
  template <class Change>
  void bracketed(range r, event e, const void* owner, Change change) noexcept {
    const detail::inside_callbacks inside;
    const auto b = space_.invalidate(r, e, owner);
    for_each(r, change);
  }
  void replace(range r, event e = event::clear, const void* owner = nullptr) noexcept {
    bracketed(r, e, owner, [this](std::uint64_t p) { take_back(p); });
  }
  void swap_out(range r) noexcept {
    bracketed(r, event::clear, nullptr, [this](std::uint64_t p) { put_away(p); });
  }
  void protect(range r, bool writable) noexcept {
    bracketed(r, event::protection_vma, nullptr, [this, writable](std::uint64_t p) { set_writable(p, writable); });
  }
  void withdraw(range r) noexcept {
    bracketed(r, event::unmap, nullptr, [this](std::uint64_t p) { set_withdrawn(p, true); });
  }

  /// Effects: an in-place bracket over n pages: they get n new frames, one after the other, as other versions, which
  /// are writable or not, and the clients are told with change_entry. Returns: false if there are no such frames.
  bool replace_in_place(std::uint64_t first, std::uint64_t n, bool writable) noexcept {
    const detail::inside_callbacks inside;
    const auto b = space_.invalidate_in_place(pages_at(first, n), event::clear);
    std::uint64_t to = frames;
    {
      const std::lock_guard lock{mutex_};
      to = free_run(n);
      if (to == frames) return false;
      for (std::uint64_t i = 0; i < n; ++i) settle(first + i, to + i, page_[first + i].version + 1);
      for (std::uint64_t i = 0; i < n; ++i) page_[first + i].writable = writable;
    }
    space_.change_entry({.range = pages_at(first, n), .frame = {to}, .writable = writable});
    const std::lock_guard lock{mutex_};
    for (std::uint64_t i = 0; i < n; ++i) forsake(first + i);
    return true;
  }

  /// Effects: everybody is told that the address space dies. Nothing is taken back yet.
  void announce_release() noexcept {
    const detail::inside_callbacks inside;
    static_cast<void>(space_.release());
  }
  /// Effects: the address space dies: everybody is told, then every frame is taken back.
  void release() noexcept {
    announce_release();
    for (std::uint64_t p = 0; p < window_pages; ++p) set_withdrawn(p, true);
  }

  // --- What should be seen. -----------------------------------------------------------------------------------------

  /// Returns: what the version word of the page holds, or will when it is brought back.
  std::uint64_t expected(std::uint64_t page) noexcept {
    const std::lock_guard lock{mutex_};
    return word_of(page, page_[page].version + (page_[page].present ? 0 : 1));
  }
  /// Returns: what the device's word of the page holds.
  std::uint64_t stored(std::uint64_t page) noexcept {
    const std::lock_guard lock{mutex_};
    return page_[page].present ? load(page_[page].frame, page, 1) : page_[page].stored;
  }
  std::uint64_t on_loan() noexcept {
    const std::lock_guard lock{mutex_};
    std::uint64_t n = 0;
    for (const frame_state& f : frame_) n += f.pins;
    return n;
  }

  /// Calls f(page) for each page of the window that has a byte in r.
  template <class F>
  static void for_each(range r, F f) noexcept {
    const range hit = r.clipped_to(window);
    if (hit.empty()) return;
    for (std::uint64_t p = (hit.first - window.first) / page_size; p <= (hit.last - 1 - window.first) / page_size; ++p)
      f(p);
  }

 private:
  static constexpr std::uint64_t frames = window_pages * 6;
  static constexpr std::align_val_t alignment{page_size};

  struct page_state {
    std::uint64_t version = 0;
    std::uint64_t stored = 0;  ///< the device's word, while the page is nowhere
    std::uint64_t frame = 0;
    std::uint64_t forsaken = 0;  ///< the frame before, in the middle of replace_in_place
    bool present = false;
    bool writable = true;
    bool withdrawn = false;
  };
  struct frame_state {
    std::uint64_t pins = 0;
    bool mapped = false;
    bool used = false;  ///< it was a page before, and is filled with taken_back since
  };

  frame_lease look_up(hva a, bool write) noexcept {
    const std::lock_guard lock{mutex_};
    const auto at = static_cast<std::uintptr_t>(a.value);
    if (!window.contains(at)) return {.error = errc::not_mapped};
    const std::uint64_t p = (at - window.first) / page_size;
    if (page_[p].withdrawn) return {.error = errc::not_mapped};
    if (write && !page_[p].writable) return {.error = errc::access_denied};
    if (!page_[p].present) place(p, page_[p].version + 1, page_[p].stored);
    if (!page_[p].present) return {.error = errc::no_memory};
    frame_[page_[p].frame].pins += 1;
    return {errc::ok, {page_[p].frame}, page_[p].writable};
  }

  std::atomic_ref<std::uint64_t> word(std::uint64_t frame, std::uint64_t page, unsigned which) noexcept {
    std::byte* const at = arena_ + frame * page_size + page % 16 * 64 + std::uint64_t{which} * 8;
    return std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(at));
  }
  std::uint64_t load(std::uint64_t frame, std::uint64_t page, unsigned which) noexcept {
    return word(frame, page, which).load(std::memory_order_relaxed);
  }
  void fill(std::uint64_t frame, std::uint64_t page, std::uint64_t value) noexcept {
    for (unsigned which = 0; which < 2; ++which) word(frame, page, which).store(value, std::memory_order_relaxed);
  }
  void poison(std::uint64_t frame) noexcept {
    for (std::uint64_t p = 0; p < 16; ++p) fill(frame, p, taken_back);
    frame_[frame].used = true;
  }
  bool intact(std::uint64_t frame) noexcept {
    bool all = true;
    for (std::uint64_t p = 0; p < 16; ++p)
      all = all && load(frame, p, 0) == taken_back && load(frame, p, 1) == taken_back;
    return all;
  }
  bool is_free(std::uint64_t f) const noexcept { return !frame_[f].mapped && frame_[f].pins == 0; }

  /// The first of n free frames, of which the longest ago freed are tried first; `frames` if there are none.
  std::uint64_t free_run(std::uint64_t n) noexcept {
    for (std::uint64_t tried = 0; tried < frames; ++tried) {
      const std::uint64_t f = next_++ % frames;
      std::uint64_t run = 0;
      while (run < n && f + run < frames && is_free(f + run)) ++run;
      if (run == n) return f;
    }
    return frames;
  }
  void settle(std::uint64_t p, std::uint64_t f, std::uint64_t version) noexcept {
    if (frame_[f].used && !intact(f)) {
      mmunotify::detail::violated("O1", "testing::stage", "a frame was written after its page had been taken back");
    }
    poison(f);
    page_state& s = page_[p];
    const std::uint64_t stored = s.present ? load(s.frame, p, 1) : s.stored;
    s.forsaken = s.present ? s.frame : frames;
    s.frame = f;
    s.version = version;
    s.present = true;
    frame_[f].mapped = true;
    word(f, p, 0).store(word_of(p, version), std::memory_order_relaxed);
    word(f, p, 1).store(stored, std::memory_order_relaxed);
  }
  void place(std::uint64_t p, std::uint64_t version, std::uint64_t stored) noexcept {
    page_[p].stored = stored;
    if (const std::uint64_t f = free_run(1); f != frames) settle(p, f, version);
  }
  void forsake(std::uint64_t p) noexcept {
    const std::uint64_t f = page_[p].forsaken;
    if (f == frames) return;
    frame_[f].mapped = false;
    if (frame_[f].pins == 0) poison(f);
  }
  void leave(std::uint64_t p) noexcept {
    page_[p].stored = load(page_[p].frame, p, 1);
    page_[p].forsaken = page_[p].frame;
    page_[p].present = false;
    forsake(p);
  }

  test_space space_;
  std::byte* arena_;
  std::mutex mutex_;  ///< everything below
  std::array<page_state, window_pages> page_{};
  std::array<frame_state, frames> frame_{};
  std::uint64_t next_ = 0;
};

}  // namespace testing
MMUNOTIFY_END_NAMESPACE
