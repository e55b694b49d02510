// SPDX-License-Identifier: MIT
#pragma once

// Which slots lie in a range of host addresses? Each bracket asks; a virtual machine may have thousands of slots.
//
// Slots may overlap in the host (the same pages at two places of the guest), so a sorted array alone does not answer: a
// slot that begins far before the range may reach into it. So each element also knows how far the part of the array
// reaches of which it is the middle: the array is a balanced interval tree without a pointer (Linux: hva_tree).
//
// Immutable once made: a part of a snapshot of the slots (memslots.hpp), published and freed with it.
// Cost: a question looks at O(log n) elements, and at O(log n) more for each slot that it finds; fewer when these are
// neighbours. Memory: 32 bytes per slot. A successor is a copy.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <span>

#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/memslot.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

class host_index {
 public:
  host_index() = default;
  host_index(const host_index&) = delete;
  host_index& operator=(const host_index&) = delete;

  std::size_t size() const noexcept { return count_; }

  /// Effects: holds the slots of `old` without `going`, with `coming` (null: none). Returns: false: no memory.
  /// Precondition: empty.
  bool succeed(const host_index& old, const memslot* going, memslot* coming) noexcept {
    items_.reset(new (std::nothrow) item[old.count_ + 1]);
    if (items_ == nullptr) return false;
    const item fresh = coming != nullptr ? item{coming->config().host_range(), 0, coming} : item{};
    for (const item& i : std::span(old.items_.get(), old.count_)) {
      if (coming != nullptr && fresh.host.first < i.host.first) {
        items_[count_++] = fresh;
        coming = nullptr;
      }
      if (i.slot != going) items_[count_++] = i;
    }
    if (coming != nullptr) items_[count_++] = fresh;
    static_cast<void>(reach(0, count_));
    return true;
  }

  /// Calls f(memslot&) for each slot with a byte in the range, by host address. Returns: elements that it looked at.
  template <class F>
  std::size_t for_each_in(range r, F&& f) const {
    return r.empty() ? 0 : visit(0, count_, r, f);
  }

 private:
  struct item {
    range host{};
    std::uintptr_t reach = 0;  ///< the highest end in the part of which this is the middle
    memslot* slot = nullptr;
  };

  std::uintptr_t reach(std::size_t first, std::size_t last) noexcept {
    if (first == last) return 0;
    const std::size_t middle = first + (last - first) / 2;
    const std::uintptr_t below = std::max(reach(first, middle), reach(middle + 1, last));
    item& i = items_[middle];
    i.reach = detail::mutated(detail::mutation::shallow_host_index) ? i.host.last : std::max(below, i.host.last);
    return i.reach;
  }

  template <class F>
  std::size_t visit(std::size_t first, std::size_t last, range r, F& f) const {
    std::size_t seen = 0;
    while (first != last) {
      const std::size_t middle = first + (last - first) / 2;
      const item& i = items_[middle];
      ++seen;
      if (i.reach <= r.first) break;
      seen += visit(first, middle, r, f);
      if (i.host.first >= r.last) break;
      if (i.host.last > r.first) f(*i.slot);
      first = middle + 1;
    }
    return seen;
  }

  std::unique_ptr<item[]> items_;
  std::size_t count_ = 0;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
