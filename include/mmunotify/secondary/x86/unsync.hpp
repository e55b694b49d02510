// SPDX-License-Identifier: MIT
#pragma once

// Shadow pages that are out of step with their guest tables, on purpose.
//
// A guest fills page tables by the thousand, at fork and exec, and to notice each write is to stop it each time. But
// the guest itself must tell the processor before it can rely on a change, by INVLPG or by loading CR3: until then a
// TLB may hold the old translation. So a lowest-level table may be written freely while its shadow plays the TLB, and
// is compared with it at the guest's next flush. Upper tables are always in step: what is below them could not be
// found.
//
// The order at a flush: write-protect the frame, flush, compare, in one hold of the MMU lock (fault_path::synchronise).
// After the flush nobody can write the table; what is read then stays true until the next write fault.
// A page that is out of step and that somebody comes to by a new way is emptied first (shadow_tables::get): a TLB would
// hold nothing for that way.
//
// This list: the pages in the order in which they got out of step. Under the MMU lock, but for size().

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

class unsync_list {
 public:
  unsync_list() = default;
  unsync_list(const unsync_list&) = delete;
  unsync_list& operator=(const unsync_list&) = delete;

  std::size_t size() const noexcept { return size_.load(std::memory_order_relaxed); }

  /// Precondition: the page is in no such list.
  void add(shadow_page& p) noexcept {
    p.unsync = true;
    p.next_unsync = nullptr;
    *last_ = &p;
    last_ = &p.next_unsync;
    size_.store(size() + 1, std::memory_order_relaxed);
  }

  /// Precondition: the page is in this list. Cost: those before it; pages leave in the order in which they came,
  /// mostly.
  void remove(shadow_page& p) noexcept {
    shadow_page** link = &first_;
    while (*link != &p) link = &(*link)->next_unsync;
    *link = p.next_unsync;
    if (last_ == &p.next_unsync) last_ = link;
    p.unsync = false;
    size_.store(size() - 1, std::memory_order_relaxed);
  }

  /// Effects: frames[0] and on: the tables of the first pages, each once. Returns: how many.
  std::size_t oldest(std::span<gfn> frames) const noexcept {
    std::size_t n = 0;
    for (const shadow_page* p = first_; p != nullptr && n < frames.size(); p = p->next_unsync) {
      const auto known = frames.first(n);
      if (std::find(known.begin(), known.end(), p->frame) == known.end()) frames[n++] = p->frame;
    }
    return n;
  }

 private:
  shadow_page* first_ = nullptr;
  shadow_page** last_ = &first_;
  std::atomic<std::size_t> size_{0};
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
