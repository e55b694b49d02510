// SPDX-License-Identifier: MIT
#pragma once

// One run of guest frames and what the MMU knows of each: its reverse mappings, and whether it may be mapped large.
//
// Reverse mappings are kept by the level of the leaf: a 2 MiB leaf is one entry in a list of level 2, not 512. Per
// level a frame_set says which lists are not empty, so that an invalidation costs what is mapped and not what it spans.
// A frame that holds a shadowed guest table is counted in the large frames around it: those may not be mapped large,
// because the table's frame must be write-protected by itself.
//
// Memory per 4 KiB frame: 8 bytes and 1 bit, mapped or not; a 512th of that for level 2.
// Everything is under the MMU lock, but for what says otherwise.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/dirty_log.hpp>
#include <mmunotify/secondary/x86/frame_set.hpp>
#include <mmunotify/secondary/x86/rmap.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// The highest level at which a shadow leaf can be: 1 GiB.
inline constexpr unsigned top_leaf_level = 3;

/// 4 KiB frames that a leaf of this level maps: 1, 512, 512 * 512.
constexpr std::uint64_t frames_at(unsigned level) noexcept { return std::uint64_t{1} << (9 * (level - 1)); }
/// The first frame of the large frame around f.
constexpr gfn aligned_to(gfn f, unsigned level) noexcept { return {f.value & ~(frames_at(level) - 1)}; }

/// What a user says about a slot.
struct memslot_config {
  unsigned id = 0;          ///< the user's name for it
  gfn base{};               ///< the first guest frame
  std::uint64_t pages = 0;  ///< 4 KiB pages
  hva host{};               ///< the first host byte, aligned to pages
  bool read_only = false;   ///< guest writes are not mapped; they are reported to the caller

  friend constexpr bool operator==(const memslot_config&, const memslot_config&) = default;

  constexpr gfn end() const noexcept { return base + pages; }
  constexpr bool contains(gfn f) const noexcept { return f >= base && f < end(); }
  /// Precondition: contains(f).
  constexpr hva host_of(gfn f) const noexcept { return host + ((f - base) << page_shift); }
  constexpr range host_range() const noexcept {
    return {static_cast<std::uintptr_t>(host.value), static_cast<std::uintptr_t>(host.value + (pages << page_shift))};
  }
};

class memslot {
 public:
  const memslot_config& config() const noexcept { return config_; }

  /// The leaves of this level that map the frame. Preconditions: config().contains(f); 1 <= level <= top_leaf_level.
  entry_list& mappings(gfn f, unsigned level = 1) noexcept { return lists(level)[place(f, level)]; }

  /// Preconditions: as mappings(); the stock is not empty.
  void add_mapping(gfn f, unsigned level, entry_place at, stock<rmap_chunk>& chunks) noexcept {
    entry_list& l = mappings(f, level);
    if (l.empty()) mapped_[level - 1].insert(place(f, level));
    l.add(at, chunks);
  }
  /// Returns: whether it was there.
  bool remove_mapping(gfn f, unsigned level, entry_place at, stock<rmap_chunk>& chunks) noexcept {
    entry_list& l = mappings(f, level);
    const bool was = l.remove(at, chunks);
    if (was && l.empty()) mapped_[level - 1].erase(place(f, level));
    return was;
  }

  /// Calls f(level, first gfn, entry_list&) for each list that is not empty and maps a frame of [first, last); f may
  /// empty the list. Preconditions: the frames are in the slot. Context: MMU lock; or a section of the flush domain,
  /// and then lists may be empty or missing.
  template <class F>
  void for_each_mapped(gfn first, gfn last, F&& f) {
    for (unsigned level = 1; level <= top_leaf_level; ++level) {
      mapped_[level - 1].for_each_in(
          place(first, level), place(last + (frames_at(level) - 1), level), [&](std::uint64_t i) {
            const gfn at{((config_.base.value >> (9 * (level - 1))) + i) << (9 * (level - 1))};
            f(level, at, lists(level)[i]);
          });
    }
  }
  template <class F>
  void for_each_mapped(F&& f) {
    for_each_mapped(config_.base, config_.end(), f);
  }
  /// Returns: a list of leaves larger than 4 KiB that is not empty, and their level; the largest ones first. nullptr:
  /// there is none.
  entry_list* large_mappings(unsigned& level) noexcept {
    for (level = top_leaf_level; level > 1; --level) {
      if (const std::uint64_t i = mapped_[level - 1].next(0); i != frame_set::none) return &lists(level)[i];
    }
    return nullptr;
  }
  /// Whether the set says that a list of this level is not empty. For the self-check.
  bool listed(gfn f, unsigned level) const noexcept { return mapped_[level - 1].contains(place(f, level)); }

  // --- Shadowed tables. ---------------------------------------------------------------------------------------------

  /// Effects: the frame holds one shadowed guest table more, or one less.
  void count_table(gfn f, int change) noexcept {
    for (unsigned level = 2; level <= top_leaf_level; ++level) tables(f, level) += static_cast<std::uint32_t>(change);
  }
  std::uint32_t table_count(gfn f, unsigned level) const noexcept { return tables_[level - 2][place(f, level)]; }

  /// Returns: whether the large frame around f may be mapped by one leaf: it is in the slot as a whole, guest and host
  /// are aligned alike, no table in it is shadowed, and no writes are logged.
  bool may_be_large(gfn f, unsigned level) const noexcept {
    const std::uint64_t mask = frames_at(level) - 1;
    const gfn first = aligned_to(f, level);
    if (table_count(f, level) != 0 && !detail::mutated(detail::mutation::large_over_table)) return false;
    return first >= config_.base && first + mask < config_.end() &&
           ((config_.base.value ^ config_.host.value >> page_shift) & mask) == 0 && log() == nullptr;
  }

  // --- The dirty log. -----------------------------------------------------------------------------------------------

  /// Returns: the log, or null. Context: MMU lock, or a section of the domain of the slots.
  dirty_log* log() const noexcept { return log_.load(std::memory_order_acquire); }  // (msl1) pairs with (msl2)
  bool logs(dirty_tracking how) const noexcept {
    const dirty_log* const l = log();
    return l != nullptr && l->how() == how;
  }
  /// Effects: if a log is kept, the frame counts as written. Context: as log().
  void mark_dirty(gfn f) const noexcept {
    if (dirty_log* const l = log(); l != nullptr) l->mark(f - config_.base);
  }

 private:
  friend class memslots;
  explicit memslot(const memslot_config& c) noexcept : config_(c) {}
  ~memslot() { delete log_.load(std::memory_order_relaxed); }
  friend struct std::default_delete<memslot>;

  /// Returns: false: no memory.
  bool allocate() noexcept {
    for (unsigned level = 1; level <= top_leaf_level; ++level) {
      const std::uint64_t n = place(config_.end() + (frames_at(level) - 1), level);
      lists_[level - 1].reset(new (std::nothrow) entry_list[n]);
      if (lists_[level - 1] == nullptr || !mapped_[level - 1].make(n)) return false;
      if (level == 1) continue;
      tables_[level - 2].reset(new (std::nothrow) std::uint32_t[n]());
      if (tables_[level - 2] == nullptr) return false;
    }
    return true;
  }

  /// Context: MMU lock, for the exchange; the old log is freed after the readers' grace period.
  std::unique_ptr<dirty_log> exchange_log(std::unique_ptr<dirty_log> next) noexcept {
    // (msl2) release pairs with (msl1).
    return std::unique_ptr<dirty_log>(log_.exchange(next.release(), std::memory_order_acq_rel));
  }

  std::uint64_t place(gfn f, unsigned level) const noexcept {
    const unsigned shift = 9 * (level - 1);
    return (f.value >> shift) - (config_.base.value >> shift);
  }
  entry_list* lists(unsigned level) noexcept { return lists_[level - 1].get(); }
  std::uint32_t& tables(gfn f, unsigned level) noexcept { return tables_[level - 2][place(f, level)]; }

  const memslot_config config_;
  std::array<std::unique_ptr<entry_list[]>, top_leaf_level> lists_;
  std::array<frame_set, top_leaf_level> mapped_;
  std::array<std::unique_ptr<std::uint32_t[]>, top_leaf_level - 1> tables_;
  std::atomic<dirty_log*> log_{nullptr};
};

/// What a ring has given.
struct written_frames {
  errc error = errc::ok;  ///< again: the ring had no place for some frames: harvest the bitmap, once
  std::size_t count = 0;
};
/// Returns: why the ring of this slot, null if there is none, cannot be harvested; or ok. Context: MMU lock.
inline errc ring_error(const memslot* slot) noexcept {
  if (slot == nullptr) return errc::not_registered;
  if (slot->log() == nullptr || slot->log()->ring() == nullptr) return errc::disabled;
  return slot->log()->ring()->overflowed() ? errc::again : errc::ok;
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
