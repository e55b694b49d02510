// SPDX-License-Identifier: MIT
#pragma once

// The question which pages of a range were accessed, answered for all of them at once: one bit per page.
//
// A primary that looks for cold pages asks about long ranges; page by page, every question would be a call of every
// client, each with its lock.

#include <cstddef>
#include <cstdint>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// Bit n % 64 of word n / 64 belongs to page n of the range; of a part, to the page that it is of the whole. Marks are
/// added: what is set stays. One thread's.
template <paged_key Key>
class basic_young_batch {
 public:
  /// Preconditions: the range is not empty; fits(range, bits).
  constexpr basic_young_batch(basic_range<Key> range, std::span<std::uint64_t> bits, bool clear) noexcept
      : range_(range), bits_(bits), clear_(clear) {}

  /// Returns: true if the range is whole pages and there is a bit for each.
  static constexpr bool fits(basic_range<Key> r, std::span<const std::uint64_t> bits) noexcept {
    const std::uint64_t length = distance(r.first, r.last);
    return !r.empty() && distance(Key{}, r.first) % page_of_keys<Key> == 0 && length % page_of_keys<Key> == 0 &&
           (length / page_of_keys<Key> + 63) / 64 <= bits.size();
  }

  /// Returns: the pages of which r has a byte, with their own bits. Precondition: there are some.
  constexpr basic_young_batch part(const basic_range<Key>& r) const noexcept {
    const basic_range<Key> common = range_.clipped_to(r);
    const std::uint64_t first = distance(range_.first, common.first) / page_of_keys<Key>;
    const std::uint64_t last = (distance(range_.first, common.last) - 1) / page_of_keys<Key> + 1;
    basic_young_batch p{{page(first), page(last)}, bits_, clear_};
    p.first_bit_ = first_bit_ + first;
    return p;
  }

  constexpr basic_range<Key> range() const noexcept { return range_; }
  constexpr std::uint64_t pages() const noexcept { return distance(range_.first, range_.last) / page_of_keys<Key>; }
  /// Returns: true if "accessed" is to be cleared as well.
  constexpr bool clear() const noexcept { return clear_; }
  /// The first key of page n.
  constexpr Key page(std::uint64_t n) const noexcept { return static_cast<Key>(range_.first + n * page_of_keys<Key>); }

  /// Effects: the page that holds the key was accessed. A key outside of the range is nobody's page, and ignored.
  constexpr void mark(Key key) noexcept {
    if (!range_.contains(key)) return;
    const std::uint64_t n = first_bit_ + distance(range_.first, key) / page_of_keys<Key>;
    bits_[n / 64] |= std::uint64_t{1} << n % 64;
  }
  constexpr bool marked(std::uint64_t n) const noexcept {
    const std::uint64_t bit = first_bit_ + n;
    return (bits_[bit / 64] >> bit % 64 & 1) != 0;
  }

 private:
  static constexpr std::uint64_t distance(Key from, Key to) noexcept { return static_cast<std::uint64_t>(to - from); }

  basic_range<Key> range_;
  std::span<std::uint64_t> bits_;
  bool clear_;
  std::uint64_t first_bit_ = 0;
};

using young_batch = basic_young_batch<std::uintptr_t>;

namespace detail {

/// Effects: marks the pages for which ask(range of the page) says yes; where nothing is cleared, only those are asked
/// about that nobody has marked (O5).
template <paged_key Key, class Ask>
void mark_page_by_page(basic_young_batch<Key>& batch, Ask ask) {
  for (std::uint64_t p = 0; p < batch.pages(); ++p) {
    if (!batch.clear() && batch.marked(p)) continue;
    const Key first = batch.page(p);
    if (ask(basic_range<Key>{first, static_cast<Key>(first + page_of_keys<Key>)})) batch.mark(first);
  }
}

}  // namespace detail

MMUNOTIFY_END_NAMESPACE
