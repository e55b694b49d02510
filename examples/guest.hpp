// SPDX-License-Identifier: MIT
#pragma once

// A captured Linux guest on a primary MMU of ours, and what every one of its pages must hold.
//
// Guest RAM is one area of the primary. Each page begins with two words: a signature, made from its frame number, and a
// count of the writes that the guest made to it. Table pages hold the captured tables instead. Beside the memory a book
// is kept, which says what an access must find; an access is judged inside guest mode, against the book:
//   - the signature is that of the page that the capture says the address leads to: not another page's, not the poison
//     of a freed frame;
//   - the write count is not below what the book had before (a write that went to a frame on its way out is lost);
//   - nobody reads what is unmapped, nobody writes what is read-only, from the moment on when the primary's call has
//     returned.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <shared_mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <mmunotify/mmunotify.hpp>

#include "capture.hpp"
#include "capture_replay.hpp"

namespace guest {

using namespace mmunotify;

using space_type = address_space<arming::under<std::shared_mutex>, observe::counters>;
using primary_type = reference_mmu<space_type>;

inline constexpr std::uintptr_t ram_base = 0x10'0000'0000;    ///< where the primary maps guest RAM
inline constexpr std::uintptr_t aside_base = 0x20'0000'0000;  ///< where pages are moved to, and back from
inline constexpr std::uint64_t most_signed_pages = 1U << 15;  ///< beyond, pages are zero until somebody writes
inline constexpr std::uint64_t most_frames = most_signed_pages + (1U << 13);

/// What the book knows of one guest frame.
struct page_book {
  std::atomic<std::uint64_t> writes{0};   ///< guest writes that are complete
  std::atomic<std::uint32_t> changes{0};  ///< odd while the primary changes whether, or how, the page is mapped
  std::atomic<bool> unmapped{false};      ///< the primary's unmap has returned, its map has not been called
  std::atomic<bool> read_only{false};     ///< the same for its protect
  bool is_table = false;
  bool is_signed = false;
  bool is_volatile = false;  ///< the guest leaves it as it is, so it can be unmapped and filled again

  bool counts_writes() const noexcept { return is_signed && !is_volatile; }
};

/// The signature of a page; never 0, and unlike any poison.
constexpr std::uint64_t signature(gfn f) noexcept {
  std::uint64_t x = (f.value + 1) * 0x9e3779b97f4a7c15U;
  x ^= x >> 29;
  return (x * 0xbf58476d1ce4e5b9U) | 1;
}

class machine {
 public:
  explicit machine(capture::linux_tables tables)
      : tables_(std::move(tables)),
        pages_(tables_.ram_bytes / page_size),
        book_(std::make_unique<page_book[]>(pages_)),
        primary_(std::min(pages_, most_frames) + tables_.pages.size() + 64, std::min(pages_, 2 * most_signed_pages)) {}

  /// Effects: maps the RAM and fills it. Returns: an error sentence, or nothing.
  std::string power_on() {
    if (pages_ == 0) return "the guest has no memory";
    if (primary_.map({ram_base, ram_base + pages_ * page_size}, protection::read_write) != errc::ok) {
      return "its memory cannot be mapped";
    }
    for (const auto& t : tables_.pages) {
      page_book& b = book(gfn{t.where / page_size});
      b.is_table = true;
      if (primary_.write(host(gfn{t.where / page_size}), std::as_bytes(std::span(t.words))) != errc::ok) {
        return "its tables do not fit into memory";
      }
    }
    for (std::uint64_t i = 0; i < std::min(pages_, most_signed_pages); ++i) {
      page_book& b = book(gfn{i});
      if (b.is_table) continue;
      b.is_signed = true;
      b.is_volatile = i % 4 == 3;
      if (!sign(gfn{i})) return "its pages do not fit into memory";
    }
    return {};
  }

  /// Writes a page's signature and a write count of 0.
  bool sign(gfn f) {
    const std::array<std::uint64_t, 2> words{signature(f), 0};
    return primary_.write(host(f), std::as_bytes(std::span(words))) == errc::ok;
  }

  primary_type& primary() noexcept { return primary_; }
  const capture::linux_tables& tables() const noexcept { return tables_; }
  std::uint64_t pages() const noexcept { return pages_; }
  bool has(gfn f) const noexcept { return f.value < pages_; }
  page_book& book(gfn f) noexcept { return book_[f.value]; }
  static std::uintptr_t host(gfn f) noexcept { return ram_base + static_cast<std::uintptr_t>(f.value * page_size); }

  /// The captured word of a table page; 0 for other pages.
  std::uint64_t captured_word(gfn f, std::size_t index) const noexcept {
    const auto at = std::lower_bound(tables_.pages.begin(), tables_.pages.end(), f.value * page_size,
                                     [](const capture::table_page& p, std::uint64_t a) { return p.where < a; });
    return at != tables_.pages.end() && at->where == f.value * page_size ? at->words[index] : 0;
  }

  /// The registers of a vCPU of this guest. PKRU is not captured; Linux gives every page of these guests key 0.
  x86::walk_context registers() const noexcept { return capture::context_of(tables_.regs, tables_.maxphyaddr); }

  /// Judges a read in guest mode. Returns: null, or what is wrong.
  const char* judge_read(gfn f, const std::byte* page) noexcept {
    page_book& b = book(f);
    if (b.unmapped.load(std::memory_order_acquire)) return "read of a page that is unmapped";
    if (b.is_table) return judge_table(f, page);
    const std::uint32_t before = b.changes.load(std::memory_order_acquire);
    const std::uint64_t floor = b.writes.load(std::memory_order_acquire);
    const std::uint64_t sign = word(page, 0).load(std::memory_order_acquire);
    const std::uint64_t writes = word(page, 1).load(std::memory_order_acquire);
    const bool refilled = b.is_volatile && ((before & 1) != 0 || b.changes.load(std::memory_order_acquire) != before);
    if (sign == 0 && (!b.is_signed || refilled)) return nullptr;
    if (!b.is_signed || sign != signature(f)) return "the page holds what is not its own";
    return writes < floor ? "a write was lost" : nullptr;
  }

  /// Writes in guest mode: counts, in the page and in the book. Returns: null, or what is wrong.
  const char* judge_write(gfn f, std::byte* page) noexcept {
    page_book& b = book(f);
    if (b.read_only.load(std::memory_order_acquire)) return "write to a page that is read-only";
    if (const char* wrong = judge_read(f, page); wrong != nullptr || !b.counts_writes()) return wrong;
    word(page, 1).fetch_add(1, std::memory_order_acq_rel);
    b.writes.fetch_add(1, std::memory_order_acq_rel);
    return nullptr;
  }

  /// When nobody runs any more. Returns: how many pages do not hold exactly what the book says.
  std::uint64_t count_wrong_pages() {
    std::uint64_t wrong = 0;
    for (std::uint64_t i = 0; i < pages_; ++i) {
      const page_book& b = book_[i];
      if (!b.is_signed) continue;
      std::array<std::uint64_t, 2> words{};
      const bool readable = primary_.read(host(gfn{i}), std::as_writable_bytes(std::span(words))) == errc::ok;
      wrong += !readable || words[0] != signature(gfn{i}) || words[1] != b.writes.load() ? 1U : 0U;
    }
    return wrong;
  }

 private:
  static std::atomic_ref<std::uint64_t> word(const std::byte* page, std::size_t i) noexcept {
    return word_at<std::uint64_t>(const_cast<std::byte*>(page) + 8 * i);
  }

  /// A table page holds what was captured, but for accessed and dirty bits, which the MMU sets. With entries of 4 bytes
  /// a word is two of them.
  const char* judge_table(gfn f, const std::byte* page) noexcept {
    const bool narrow = tables_.mode == capture::mode::two_level || tables_.mode == capture::mode::two_level_pse;
    const std::uint64_t accessed_and_dirty = narrow ? 0x60'0000'0060 : 0x60;
    for (const std::size_t i : {std::size_t{0}, std::size_t{511}}) {
      const std::uint64_t now = word(page, i).load(std::memory_order_acquire);
      if ((now & ~accessed_and_dirty) != (captured_word(f, i) & ~accessed_and_dirty)) {
        return "the table page holds what is not its own";
      }
    }
    return nullptr;
  }

  capture::linux_tables tables_;
  std::uint64_t pages_;
  std::unique_ptr<page_book[]> book_;
  primary_type primary_;
};

}  // namespace guest
