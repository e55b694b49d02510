// SPDX-License-Identifier: MIT
#pragma once

// Shadow page tables: entries, roles, pages, and the index that finds a page by what it shadows.
//
// A shadow page holds what the hardware would walk in place of one guest page table (an indirect page), or of a part of
// a large guest leaf (a direct page). One guest table can have several shadow pages: everything that changes the
// meaning of its entries, besides their own bits, is in the page's *role*. What the guest's upper levels grant is in
// the role too, so that upper shadow entries restrict nothing, and two upper guest entries with different rights may
// share one lower guest table.
//
// Who may touch what: entries are atomic. A vCPU in guest mode loads them and adds accessed and dirty bits by
// compare-exchange; all else is written under the MMU lock. A page that was unlinked keeps its memory until a grace
// period of the guest-mode sections has passed.
//
// Orderings: (sp1) an entry is published with release and (sp2) loaded by walkers with acquire, so that the linked
// page's entries, zero when it was linked, are seen. (sp3) Bits are cleared with release and (sp4) set by vCPUs with
// acquire: who makes a leaf writable again after a harvest sees that its mark in the dirty log was taken.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/memory_cache.hpp>
#include <mmunotify/secondary/x86/page_role.hpp>
#include <mmunotify/secondary/x86/rmap.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

inline constexpr unsigned entries_per_table = 512;

/// Whether a has every right of b.
constexpr bool covers(rights a, rights b) noexcept { return (a & b) == b; }

/// r with the bits `more` set and the bits `less` cleared.
constexpr rights changed(rights r, std::uint8_t more, std::uint8_t less) noexcept {
  return {static_cast<std::uint8_t>((r.bits | more) & ~less)};
}

/// A 64-bit shadow entry: x86 bits where the hardware would read them, and some that it would ignore.
/// Leaf: frame number in bits 12..51, protection key in bits 59..62. Link: the address of a shadow page in bits 10..62.
/// Not present, but not zero: the guest maps a frame there that is in no slot (MMIO): guest frame in bits 12..51, in
/// bits 52..62 the generation of the slots of which that is true.
class shadow_entry {
 public:
  static constexpr std::uint64_t present_bit = 1;
  static constexpr std::uint64_t write_bit = 1 << 1;
  static constexpr std::uint64_t user_bit = 1 << 2;
  static constexpr std::uint64_t accessed_bit = 1 << 5;
  static constexpr std::uint64_t dirty_bit = 1 << 6;
  static constexpr std::uint64_t leaf_bit = 1 << 7;        ///< else a link
  static constexpr std::uint64_t guest_user_bit = 1 << 8;  ///< U in the guest, also where CR0.WP=0 made us drop ours
  static constexpr std::uint64_t mmio_bit = 1 << 9;        ///< where present_bit is clear
  /// Guest, host and tracking let the leaf be written: if write_bit is clear, only to log the first write. Whoever sees
  /// one write may set it, without the MMU lock. MUST be set where write_bit is.
  static constexpr std::uint64_t may_write_bit = 1 << 10;
  /// Of a large leaf: it may not be executed for its size alone (mmu_options::nx_huge); its parts may.
  static constexpr std::uint64_t may_execute_bit = 1 << 11;
  static constexpr std::uint64_t no_execute_bit = std::uint64_t{1} << 63;
  /// Generations of slots that an MMIO entry tells apart.
  static constexpr std::uint64_t mmio_generations = std::uint64_t{1} << 11;
  /// Frame numbers that fit.
  static constexpr std::uint64_t frame_limit = std::uint64_t{1} << 40;

  constexpr shadow_entry() = default;
  constexpr explicit shadow_entry(std::uint64_t bits) noexcept : bits_(bits) {}

  /// Precondition: frame.value < frame_limit.
  static constexpr shadow_entry leaf(pfn frame, rights r, bool guest_user) noexcept {
    return shadow_entry((frame.value << page_shift) | present_bit | leaf_bit |
                        (r.writable() ? write_bit | may_write_bit : 0) | (r.user() ? user_bit : 0) |
                        (r.executable() ? 0 : no_execute_bit) | (guest_user ? guest_user_bit : 0));
  }
  /// Precondition: frame.value < frame_limit.
  static constexpr shadow_entry mmio(gfn frame, rights r, bool guest_user, std::uint64_t generation) noexcept {
    return shadow_entry((frame.value << page_shift) | mmio_bit | (r.writable() ? write_bit : 0) |
                        (r.user() ? user_bit : 0) | (r.executable() ? 0 : no_execute_bit) |
                        (guest_user ? guest_user_bit : 0) | generation % mmio_generations << 52);
  }
  static shadow_entry link(shadow_page& child) noexcept {
    return shadow_entry(reinterpret_cast<std::uintptr_t>(&child) | present_bit);
  }

  constexpr std::uint64_t bits() const noexcept { return bits_; }
  constexpr bool present() const noexcept { return (bits_ & present_bit) != 0; }
  constexpr bool is_leaf() const noexcept { return (bits_ & leaf_bit) != 0; }
  constexpr bool accessed() const noexcept { return (bits_ & accessed_bit) != 0; }
  constexpr bool dirty() const noexcept { return (bits_ & dirty_bit) != 0; }
  constexpr bool guest_user() const noexcept { return (bits_ & guest_user_bit) != 0; }
  constexpr bool may_write() const noexcept { return (bits_ & may_write_bit) != 0; }
  constexpr bool may_execute() const noexcept { return (bits_ & may_execute_bit) != 0; }
  constexpr bool is_mmio() const noexcept { return (bits_ & (present_bit | mmio_bit)) == mmio_bit; }
  /// Precondition: is_mmio().
  constexpr gfn mmio_frame() const noexcept { return {(bits_ & pte::address) >> page_shift}; }
  constexpr bool of_generation(std::uint64_t g) const noexcept {
    if constexpr (detail::mutated(detail::mutation::stale_mmio)) return true;
    return (bits_ >> 52) % mmio_generations == g % mmio_generations;
  }
  constexpr rights allows() const noexcept { return rights_in(long_mode_4::grants(bits_, 1)); }
  /// Precondition: a leaf.
  constexpr pfn frame() const noexcept { return {(bits_ & pte::address) >> page_shift}; }
  /// The guest's. Precondition: a leaf.
  constexpr unsigned key() const noexcept {
    return static_cast<unsigned>((bits_ & pte::protection_key) >> pte::protection_key_shift);
  }
  /// Preconditions: a leaf without a key; key < 16.
  constexpr shadow_entry with_key(unsigned key) const noexcept {
    return with(std::uint64_t{key} << pte::protection_key_shift);
  }
  /// Precondition: a link.
  shadow_page* child() const noexcept {
    return reinterpret_cast<shadow_page*>(bits_ & ~std::uint64_t{shadow_page_alignment - 1});
  }
  constexpr shadow_entry with(std::uint64_t more) const noexcept { return shadow_entry(bits_ | more); }
  constexpr shadow_entry without(std::uint64_t less) const noexcept { return shadow_entry(bits_ & ~less); }

  friend constexpr bool operator==(const shadow_entry&, const shadow_entry&) = default;

 private:
  std::uint64_t bits_ = 0;
};

/// One page of shadow entries. Everything but `entries` is guarded by the MMU lock.
struct alignas(shadow_page_alignment) shadow_page {
  /// MUST be all zero before the page is linked, and again before it is unlinked for good.
  std::array<std::atomic<std::uint64_t>, entries_per_table> entries{};
  /// The (first) guest frame that a present leaf maps. MUST agree with the slot's reverse mapping. Written before the
  /// leaf; who has seen the leaf in a guest-mode section may read it until the section ends, because an entry that was
  /// present is not installed again before a flush.
  std::array<std::atomic<std::uint64_t>, entries_per_table> leaf_frames{};

  gfn frame{};  ///< the guest table; of a direct page, the first frame that it maps
  page_role role{};
  directory_registers registers{};  ///< of a page of links above PAE's directories: what it was made from
  entry_list parents;               ///< MUST hold exactly the present entries that link this page
  unsigned present = 0;             ///< MUST be the number of present entries
  unsigned mmio = 0;                ///< MUST be the number of MMIO entries
  unsigned unheard_writes = 0;   ///< guest writes since a fault last used the page; many: it is no page table any more
  std::uint64_t generation = 0;  ///< of the tables; an older one: the page is obsolete, and nothing leads to it
  /// The guest may have written the table since its entries were shadowed: what is here is what the guest's TLB would
  /// still hold. Level 1 only.
  bool unsync = false;
  /// Of a direct page: it could be one large leaf, but for the guest's fetches from it.
  bool executed = false;
  shadow_page* next_unsync = nullptr;
  shadow_page* next_in_bucket = nullptr;
  shadow_page* older = nullptr;
  shadow_page* newer = nullptr;
  shadow_page* next_spare = nullptr;

  /// Effects: a page that is on stock becomes this one. Precondition: no entry is present.
  void begin(gfn f, page_role r, std::uint64_t g, const directory_registers& of = {}) noexcept {
    frame = f;
    role = r;
    registers = of;
    unheard_writes = 0;
    generation = g;
    executed = false;
  }

  struct entry_span {
    unsigned first = 0, last = 0;  ///< both included; first > last: none
  };
  /// Returns: the shadows in this page of what lies at bytes first..last of its guest table. Of 1024 entries a page has
  /// those of its quadrant; an entry of a page directory has two neighbours.
  static constexpr entry_span shadows_of(page_role r, unsigned first, unsigned last) noexcept {
    if (r.format() != table_format::four_byte || detail::mutated(detail::mutation::wide_written_zap)) {
      return {first / 8, last / 8};
    }
    const unsigned shadows = r.level() == 1 ? 1 : 2, size = entries_per_table / shadows;
    const unsigned begin = r.quadrant() * size, end = begin + size;
    first = first / 4 < begin ? begin : first / 4;
    last = last / 4 < end ? last / 4 + 1 : end;  // not included from here on
    return first < last ? entry_span{(first - begin) * shadows, (last - begin) * shadows - 1} : entry_span{1, 0};
  }

  /// Precondition: entry i is a leaf.
  gfn leaf_frame(unsigned i) const noexcept { return {leaf_frames[i].load(std::memory_order_relaxed)}; }

  shadow_entry load(unsigned i) const noexcept {
    return shadow_entry(entries[i].load(std::memory_order_acquire));  // (sp2) pairs with (sp1)
  }
  /// Returns: the entry as it was. Context: MMU lock.
  shadow_entry exchange(unsigned i, shadow_entry e) noexcept {
    return shadow_entry(entries[i].exchange(e.bits(), std::memory_order_acq_rel));  // (sp1) pairs with (sp2)
  }
  /// Effects: the leaf maps this frame and no longer the one before; whatever else it says stays, also what a vCPU adds
  /// at the same time. Context: MMU lock.
  void replace_frame(unsigned i, pfn next) noexcept {
    std::uint64_t now = entries[i].load(std::memory_order_relaxed);
    // (sp1) release pairs with (sp2): the new frame holds what the primary copied there.
    while (!entries[i].compare_exchange_weak(now, (now & ~pte::address) | next.value << page_shift,
                                             std::memory_order_release, std::memory_order_relaxed)) {
    }
  }
  /// Returns: true if the entry was still `seen` and is now `wanted`. Progress: wait-free. Context: guest mode too.
  bool update(unsigned i, shadow_entry seen, shadow_entry wanted) noexcept {
    std::uint64_t expected = seen.bits();
    // (sp4) acquire pairs with (sp3).
    return entries[i].compare_exchange_strong(expected, wanted.bits(), std::memory_order_acquire,
                                              std::memory_order_relaxed);
  }
};

static_assert(alignof(shadow_page) == shadow_page_alignment &&
                  std::size_t{entries_per_table} * 2 <= shadow_page_alignment,
              "an entry place must fit into one word");

/// What one fault can need at most under the lock: a page per level, and a chunk for each link, for the leaf, and for
/// its seven neighbours.
struct fault_stock {
  static constexpr std::size_t enough = 5, enough_chunks = enough + 7;
  stock<shadow_page> pages;
  stock<rmap_chunk> chunks;

  bool full() const noexcept { return pages.size() >= enough && chunks.size() >= enough_chunks; }
  errc fill() noexcept {
    const errc e = pages.fill(enough);
    return e != errc::ok ? e : chunks.fill(enough_chunks);
  }
};

/// All shadow pages: by (frame, role, generation, registers), and by age. Under the MMU lock.
/// Limits: a fixed number of buckets, so that making it cannot fail; pages of one frame share a bucket.
class page_index {
 public:
  page_index() = default;
  page_index(const page_index&) = delete;
  page_index& operator=(const page_index&) = delete;

  std::size_t size() const noexcept { return size_; }
  shadow_page* oldest() const noexcept { return oldest_; }

  /// Returns: the page of this frame, role and generation, or nullptr.
  shadow_page* find(gfn frame, page_role role, std::uint64_t generation = 0,
                    const directory_registers& registers = {}) const noexcept {
    for (shadow_page* p = buckets_[bucket(frame)]; p != nullptr; p = p->next_in_bucket) {
      if (p->frame != frame || p->role != role || p->generation != generation) continue;
      if (!role.has_links_alone() || p->registers == registers) return p;
    }
    return nullptr;
  }

  /// Returns: whether the frame is a guest table that has a shadow page, so that it must stay write-protected.
  bool tracked(gfn frame) const noexcept {
    for (const shadow_page* p = buckets_[bucket(frame)]; p != nullptr; p = p->next_in_bucket) {
      if (p->frame == frame && p->role.has_table()) return true;
    }
    return false;
  }

  /// Returns: whether the frame must be mapped writable nowhere: it has a page that is not out of step with it.
  bool write_protected(gfn frame) const noexcept {
    for (const shadow_page* p = buckets_[bucket(frame)]; p != nullptr; p = p->next_in_bucket) {
      if (p->frame == frame && p->role.has_table() && !p->unsync) return true;
    }
    return false;
  }

  /// Calls f(page) for each page of the frame; f may remove that page.
  template <class F>
  void for_each_of(gfn frame, F&& f) {
    for (shadow_page* p = buckets_[bucket(frame)]; p != nullptr;) {
      shadow_page* const next = p->next_in_bucket;
      if (p->frame == frame) f(*p);
      p = next;
    }
  }

  /// Calls f(page) for each page, oldest first; f may remove that page.
  template <class F>
  void for_each(F&& f) const {
    for (shadow_page* p = oldest_; p != nullptr;) {
      shadow_page* const next = p->newer;
      f(*p);
      p = next;
    }
  }

  /// Precondition: no page that is found by the same is in.
  void insert(shadow_page& p) noexcept {
    shadow_page*& head = buckets_[bucket(p.frame)];
    p.next_in_bucket = head;
    head = &p;
    p.newer = nullptr;
    p.older = newest_;
    (newest_ != nullptr ? newest_->newer : oldest_) = &p;
    newest_ = &p;
    ++size_;
  }

  /// Precondition: the page is in.
  void remove(shadow_page& p) noexcept {
    shadow_page** link = &buckets_[bucket(p.frame)];
    while (*link != &p) link = &(*link)->next_in_bucket;
    *link = p.next_in_bucket;
    (p.older != nullptr ? p.older->newer : oldest_) = p.newer;
    (p.newer != nullptr ? p.newer->older : newest_) = p.older;
    --size_;
  }

 private:
  static constexpr std::size_t buckets = 1024;
  static constexpr std::size_t bucket(gfn frame) noexcept {
    return static_cast<std::size_t>((frame.value * 0x9e3779b97f4a7c15U) >> 54);  // the upper ten bits
  }

  std::array<shadow_page*, buckets> buckets_{};
  shadow_page* oldest_ = nullptr;
  shadow_page* newest_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
