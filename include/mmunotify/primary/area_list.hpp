// SPDX-License-Identifier: MIT
#pragma once

// The areas of an address space: which ranges are mapped, and what may be done there (Linux: the VMAs).
//
// A sorted array of disjoint areas. It is never changed in place: an operation builds the list as it will be, which
// is where allocation may fail, and then swaps the two between start and end of its bracket, which cannot fail. There
// are two ways to build: cut a hole and fill it (mapping, unmapping, both halves of a move), or change what the areas
// of a range say (protecting, soft-dirty tracking). Neighbours that touch and agree are merged.
//
// Cost: finding O(log n), changing O(n) in the number of areas. Limits: for hundreds of areas, not for millions.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <utility>

#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// What an area allows.
enum class protection : std::uint8_t {
  none,        ///< mapped, and every access refused
  read,        ///< reads
  read_write,  ///< reads and writes
};

/// A range and what it allows.
struct area {
  mmunotify::range range;
  protection allows = protection::none;
  bool soft_dirty = true;  ///< all of it counts as written: it was made, or came here, since clear_soft_dirty

  constexpr area clipped_to(const mmunotify::range& r) const noexcept {
    return {range.clipped_to(r), allows, soft_dirty};
  }
  friend constexpr bool operator==(const area&, const area&) = default;
};

class area_list {
 public:
  area_list() = default;
  area_list(const area_list&) = delete;
  area_list& operator=(const area_list&) = delete;
  ~area_list() { delete[] items_; }

  std::span<const area> items() const noexcept { return {items_, size_}; }

  void swap(area_list& other) noexcept {
    std::swap(items_, other.items_);
    std::swap(size_, other.size_);
  }

  /// The area that contains the address; null if there is none.
  const area* find(std::uintptr_t a) const noexcept {
    const std::size_t i = first_ending_after(a);
    return i < size_ && items_[i].range.contains(a) ? &items_[i] : nullptr;
  }

  /// Some part of r is mapped.
  bool overlaps(const range& r) const noexcept {
    const std::size_t i = first_ending_after(r.first);
    return i < size_ && items_[i].range.overlaps(r);
  }

  /// Whether every byte of r may be read, or written.
  /// Errors: not_mapped where a byte has no area, access_denied where its area forbids the access; the lowest
  /// address decides.
  errc allows(const range& r, protection needed) const noexcept {
    std::uintptr_t reached = r.first;
    for (std::size_t i = first_ending_after(r.first); i < size_ && reached < r.last; i += 1) {
      if (reached < items_[i].range.first) return errc::not_mapped;
      if (items_[i].allows < needed) return errc::access_denied;
      reached = items_[i].range.last;
    }
    return reached < r.last ? errc::not_mapped : errc::ok;
  }

  /// Every byte of r is mapped, whatever is allowed there.
  bool covers(const range& r) const noexcept { return allows(r, protection::none) == errc::ok; }

  /// Effects: `out` becomes this list without `hole` and with `filling` in its place.
  /// Preconditions: filling is sorted, disjoint and inside hole; out is another list.
  /// Returns: false when memory ran out; out is then as it was.
  [[nodiscard]] bool replaced(const range& hole, std::span<const area> filling, area_list& out) const noexcept {
    area_list next;
    if (!next.reserve(size_ + 1 + filling.size())) return false;  // a hole splits at most one area
    for (const area& a : items()) next.append(a.clipped_to({lowest, hole.first}));
    for (const area& a : filling) next.append(a);
    for (const area& a : items()) next.append(a.clipped_to({hole.last, highest}));
    out.swap(next);
    return true;
  }

  /// Effects: `out` becomes this list, in which change(area&) has been applied to what lies in r. It may not change
  /// ranges. Preconditions: out is another list. Returns: false when memory ran out; out is then as it was.
  template <class Change>
  [[nodiscard]] bool changed(const range& r, Change change, area_list& out) const noexcept {
    area_list next;
    if (!next.reserve(size_ + 2)) return false;  // r's two ends split one area each
    for (const area& a : items()) {
      area inside = a.clipped_to(r);
      if (inside.range.empty()) {
        next.append(a);
        continue;
      }
      change(inside);
      next.append(a.clipped_to({lowest, r.first}));
      next.append(inside);
      next.append(a.clipped_to({r.last, highest}));
    }
    out.swap(next);
    return true;
  }

  /// Effects: `out` becomes what lies in r, moved so that r.first comes to lie at `to`, and soft-dirty there.
  /// Returns: false when memory ran out; out is then as it was.
  [[nodiscard]] bool shifted(const range& r, std::uintptr_t to, area_list& out) const noexcept {
    area_list next;
    if (!next.reserve(size_)) return false;
    for (const area& a : items()) {
      const range part = a.range.clipped_to(r);
      if (!part.empty()) next.append({{part.first - r.first + to, part.last - r.first + to}, a.allows});
    }
    out.swap(next);
    return true;
  }

  /// The first broken invariant, or null.
  const char* verify() const noexcept {
    for (std::size_t i = 0; i < size_; i += 1) {
      if (items_[i].range.empty()) return "an area is empty";
      if (i != 0 && items_[i].range.first < items_[i - 1].range.last) return "areas overlap or are not sorted";
    }
    return nullptr;
  }

 private:
  static constexpr std::uintptr_t lowest = 0;
  static constexpr std::uintptr_t highest = UINTPTR_MAX;

  std::size_t first_ending_after(std::uintptr_t a) const noexcept {
    const area* i = std::partition_point(items_, items_ + size_, [a](const area& x) { return x.range.last <= a; });
    return static_cast<std::size_t>(i - items_);
  }

  /// Makes room in a list that is empty and has none.
  bool reserve(std::size_t n) noexcept {
    items_ = new (std::nothrow) area[n];
    return items_ != nullptr;
  }

  /// Adds an area behind all others, into capacity that is there; an empty one is left out.
  void append(const area& a) noexcept {
    if (a.range.empty()) return;
    if (size_ != 0) {
      area& before = items_[size_ - 1];
      if (before.range.last == a.range.first && before.allows == a.allows && before.soft_dirty == a.soft_dirty) {
        before.range.last = a.range.last;
        return;
      }
    }
    items_[size_] = a;
    size_ += 1;
  }

  area* items_ = nullptr;
  std::size_t size_ = 0;
};

MMUNOTIFY_END_NAMESPACE
