// SPDX-License-Identifier: MIT
#pragma once

// Merging equal pages (Linux: KSM).
//
// Pages are sorted by a hash of their contents, which may change meanwhile; so equality is decided where nobody can
// write. The page that is kept is write-protected in a bracket of its own; the other one is write-protected, compared
// and replaced inside its bracket. Both are event::clear, as in Linux, and in place: secondaries that can keep what
// they map. The tables are held exclusive throughout, so that neither the processor nor a fault comes in between. A
// write to a merged page copies it, as after fork; a page that is write-protected in vain is writable again with its
// next write.

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <mmunotify/base/event.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/primary/nothrow_array.hpp>
#include <mmunotify/primary/paged_memory.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// What merge_equal did.
struct merge_answer {
  errc error = errc::ok;
  std::size_t merged = 0;  ///< pages that gave up their frame

  constexpr explicit operator bool() const noexcept { return error == errc::ok; }
};

namespace detail {

template <class Core>
class merging {
 public:
  /// Context: tables exclusive.
  explicit merging(Core& core) noexcept : core_(core), memory_(core.memory) {}

  /// Errors: no_memory; nothing has changed then.
  merge_answer run(const range& r) noexcept {
    std::size_t n = 0;
    memory_.table().for_each(r, [&](std::uintptr_t a, page_slot&) { n += candidate(a) ? 1U : 0U; });
    if (!pages_.reserve(n)) return {errc::no_memory, 0};
    memory_.table().for_each(r, [&](std::uintptr_t a, page_slot&) {
      if (candidate(a) && pages_.size() != n) pages_.push_back({hash(frame_at(a)), a});
    });
    std::sort(pages_.begin(), pages_.end(),
              [](const page& a, const page& b) { return a.hash != b.hash ? a.hash < b.hash : a.at < b.at; });
    merge_answer answer;
    for (std::size_t first = 0, next = 1; next < pages_.size(); next += 1) {
      if (pages_[first].hash != pages_[next].hash) first = next;  // what is not equal after all is left alone
      if (first != next && merge(pages_[first].at, pages_[next].at)) answer.merged += 1;
    }
    memory_.counters().add(counter::merged, answer.merged);
    return answer;
  }

 private:
  struct page {
    std::uint64_t hash;
    std::uintptr_t at;
  };

  page_entry entry_at(std::uintptr_t a) noexcept { return memory_.table().peek(a); }
  pfn frame_at(std::uintptr_t a) noexcept { return entry_at(a).frame(); }
  bool candidate(std::uintptr_t a) noexcept { return entry_at(a).present() && !memory_.frames().on_loan(frame_at(a)); }

  /// FNV-1a over words; secondaries may be writing.
  std::uint64_t hash(pfn f) noexcept {
    std::byte* const data = memory_.frames().data(f);
    std::uint64_t h = 0xcbf29ce484222325U;
    for (std::size_t i = 0; i < page_size; i += 8) {
      h = (h ^ word_at<std::uint64_t>(data + i).load(std::memory_order_relaxed)) * 0x100000001b3U;
    }
    return h;
  }

  /// Preconditions: nobody writes to either.
  bool equal(std::uintptr_t a, std::uintptr_t b) noexcept {
    return std::memcmp(memory_.frames().data(frame_at(a)), memory_.frames().data(frame_at(b)), opaque_page_size()) == 0;
  }

  /// Returns: whether the page at b has got the frame of that at a.
  bool merge(std::uintptr_t a, std::uintptr_t b) noexcept {
    if (frame_at(a) == frame_at(b)) return false;
    for (const std::uintptr_t at : {a, b}) {
      if (memory_.table().huge(at)) core_.split(page_table::block_of(at).first);
    }
    if (entry_at(a).writable()) {
      core_.change_in_place(paged_memory::page_of(a), [&](withdrawn_pages&) { write_protect(a); });
    }
    bool merged = false;
    const bool early = mutated(mutation::merge_compares_early) && equal(a, b);
    core_.change_in_place(paged_memory::page_of(b), [&](withdrawn_pages& gone) {
      if (!candidate(a) || !candidate(b)) return;
      if (entry_at(b).writable()) write_protect(b);
      merged = early || equal(a, b);
      if (merged) replace(a, b, gone);
    });
    return merged;
  }

  void write_protect(std::uintptr_t a) noexcept {
    memory_.write_protect(paged_memory::page_of(a));
    core_.tell(paged_memory::page_of(a), frame_at(a), false);
  }

  void replace(std::uintptr_t a, std::uintptr_t b, withdrawn_pages& gone) noexcept {
    const pfn kept = frame_at(a);
    const pfn old = frame_at(b);
    memory_.frames().share(kept);
    {
      locked_entry entry{*memory_.table().reach(b)};
      entry.value = entry.value.at(kept);
    }
    core_.tell(paged_memory::page_of(b), kept, false);
    memory_.withdraw(memory_.frames(), old, gone);
  }

  Core& core_;
  paged_memory& memory_;
  nothrow_array<page> pages_;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
