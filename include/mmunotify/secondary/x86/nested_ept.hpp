// SPDX-License-Identifier: MIT
#pragma once

// EPT as a guest hypervisor (L1) keeps it for its own guest (L2): the policy of its entries, and the walker.
//
// Problem. EPT is no paging mode like the others: an entry is present if it allows anything, reading is a right of its
// own, accessed and dirty bits lie elsewhere and may be switched off, and there are two ways to fail. A *violation*
// says that the tables forbid the access; a *misconfiguration*, that an entry cannot be. L1 gets the first with an exit
// qualification, the second without.
//
// Contract. guest_walker<ept<Levels>> answers like the other walkers (guest_walker.hpp); the "address" is a guest
// physical one of L2, the result one of L1.
//   - Top down: an entry that allows nothing ends the walk with a violation, whatever else it holds; one that cannot be
//     ends it with a misconfiguration, before any right is looked at. Rights are judged at the leaf, over all levels.
//   - An address beyond what the levels translate is a violation.
//   - With bit 6 of the EPTP, accessed and dirty bits are set as the other walkers set them; without, they mean
//   nothing.
//   - A fault is status page_fault; its code is an exit qualification (ept_exit), or ept_exit::misconfigured.
// `rights` say user for what they call R here: a leaf of EPT can be written or fetched from without it.
//
// The context: cr3 is the EPTP; maxphyaddr, gib_pages and execute_only count, nothing else does.
//
// Limits. Not here: mode-based execute control, sub-page permissions, supervisor shadow stacks, virtualisation
// exceptions (bit 63). Memory types are checked and not followed.
//
// References: Intel SDM vol. 3C, 29.3.2 (tables 29-1 to 29-7), 29.3.3 (misconfigurations, violations, priorities),
// 29.3.5 (accessed and dirty), table 28-7 (exit qualification).

#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/access.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/page_role.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Bits of EPT entries, and of the EPTP.
namespace epte {
inline constexpr std::uint64_t read = bit(0);
inline constexpr std::uint64_t write = bit(1);
inline constexpr std::uint64_t execute = bit(2);
inline constexpr std::uint64_t memory_type = bit_range(3, 5);  ///< leaves only
inline constexpr std::uint64_t write_back = 6 << 3;
inline constexpr std::uint64_t large = bit(7);
inline constexpr std::uint64_t accessed = bit(8);
inline constexpr std::uint64_t dirty = bit(9);  ///< leaves only
}  // namespace epte
namespace eptp {
inline constexpr std::uint64_t memory_type = bit_range(0, 2);  ///< of the tables: 0 or 6
inline constexpr std::uint64_t walk_length = bit_range(3, 5);  ///< levels - 1
inline constexpr std::uint64_t accessed_dirty = bit(6);
inline constexpr std::uint64_t reserved = bit_range(7, 11);
}  // namespace eptp

/// The exit qualification of an EPT violation; what paging itself can say of it.
namespace ept_exit {
inline constexpr std::uint32_t read = bit(0);
inline constexpr std::uint32_t write = bit(1);
inline constexpr std::uint32_t fetch = bit(2);
/// The R, W and X that all entries have in common; none if one was not present.
inline constexpr std::uint32_t readable = bit(3);
inline constexpr std::uint32_t writable = bit(4);
inline constexpr std::uint32_t executable = bit(5);
inline constexpr std::uint32_t linear_valid = bit(7);  ///< the access was to a linear address
inline constexpr std::uint32_t translated = bit(8);  ///< beside it: to what it translates to, not to one of its tables
/// No bit of the qualification: it is a misconfiguration, which has none.
inline constexpr std::uint32_t misconfigured = bit(31);

constexpr std::uint32_t of(access how) noexcept { return is_fetch(how) ? fetch : is_write(how) ? write : read; }
constexpr std::uint32_t of(rights r) noexcept {
  return (r.user() ? readable : 0) | (r.writable() ? writable : 0) | (r.executable() ? executable : 0);
}
}  // namespace ept_exit

/// EPT with 4 or 5 levels. A paging_mode by name and shape; guest_walker has a walk of its own for it.
template <unsigned Levels>
  requires(Levels == 4 || Levels == 5)
struct ept {
  using entry_type = std::uint64_t;
  static constexpr unsigned levels = Levels;
  static constexpr unsigned address_bits = 12 + 9 * Levels;
  static constexpr bool top_in_registers = false;
  static constexpr bool has_keys = false;

  /// What a shadow page's role says of such a table.
  static constexpr nested_tables kind(const walk_context& c) noexcept {
    if (marks(c))
      return c.execute_only ? nested_tables::ept_accessed_dirty_execute_only : nested_tables::ept_accessed_dirty;
    return c.execute_only ? nested_tables::ept_execute_only : nested_tables::ept;
  }
  /// Accessed and dirty bits are in use.
  static constexpr bool marks(const walk_context& c) noexcept { return (c.cr3 & eptp::accessed_dirty) != 0; }
  /// A write would change nothing in the leaf.
  static constexpr bool dirty(const walk_context& c, std::uint64_t leaf) noexcept {
    return !marks(c) || (leaf & epte::dirty) != 0 || detail::mutated(detail::mutation::nested_dirty_ignored);
  }

  static constexpr unsigned page_shift(unsigned level) noexcept { return 12 + 9 * (level - 1); }
  static constexpr bool canonical(gva a) noexcept { return a.value >> address_bits == 0; }
  static constexpr gpa root(std::uint64_t pointer) noexcept { return {pointer & pte::address}; }
  static constexpr std::uint64_t index(gva a, unsigned level) noexcept { return a.value >> page_shift(level) & 0x1ff; }

  static constexpr bool present(entry_type e) noexcept { return (e & (epte::read | epte::write | epte::execute)) != 0; }
  static constexpr bool maps_page(entry_type e, unsigned level, const entry_format&) noexcept {
    return level == 1 || (level <= 3 && (e & epte::large) != 0);
  }
  /// Bits that no present entry of this level may have, a link or a leaf.
  static constexpr entry_type reserved(unsigned level, const entry_format& f) noexcept {
    const entry_type beyond = bit_range(f.maxphyaddr, 51);
    if (level >= 4) return beyond | bit_range(3, 7);
    return beyond | (level == 3 && !f.gib_pages ? epte::large : 0);
  }
  static constexpr entry_type reserved_large(unsigned level, const entry_format&) noexcept {
    return bit_range(12, page_shift(level) - 1);
  }
  /// SDM 29.3.3.1. Precondition: e is present.
  static constexpr bool misconfigured(entry_type e, unsigned level, const entry_format& f, bool execute_only) noexcept {
    if constexpr (detail::mutated(detail::mutation::ept_misconfigured_ok)) return false;
    if ((e & (epte::read | epte::write)) == epte::write) return true;
    if ((e & epte::read) == 0 && !execute_only) return true;
    if ((e & reserved(level, f)) != 0) return true;
    if (!maps_page(e, level, f)) return (e & bit_range(3, 6)) != 0;
    const std::uint64_t type = (e & epte::memory_type) >> 3;
    return type == 2 || type == 3 || type == 7 || (level > 1 && (e & reserved_large(level, f)) != 0);
  }

  static constexpr gpa table(entry_type e) noexcept { return {e & pte::address}; }
  static constexpr gpa frame(entry_type e, unsigned level) noexcept { return {e & bit_range(page_shift(level), 51)}; }
  static constexpr std::uint64_t grants(entry_type e, unsigned) noexcept {
    return (e & epte::write) | (e & epte::read) << 2 | (e & epte::execute) << 61;
  }
  static constexpr bool has_accessed(unsigned) noexcept { return true; }
  static constexpr bool fetch_reported(const entry_format&, bool) noexcept { return true; }
};

static_assert(paging_mode<ept<4>> && paging_mode<ept<5>>);
static_assert(rights_in(ept<4>::grants(epte::read | epte::write | epte::execute, 1)) == rights{});
static_assert(rights_in(ept<4>::grants(epte::execute, 1)) == rights{rights::execute_bit});

/// Whether EPT with these rights allows the access.
constexpr bool ept_allows(rights granted, access how) noexcept {
  return is_fetch(how) ? granted.executable() : is_write(how) ? granted.writable() : granted.user();
}

template <unsigned Levels>
class guest_walker<ept<Levels>> {
 public:
  using mode = ept<Levels>;
  using entry_type = std::uint64_t;

  /// Preconditions: the context's cr3 is an EPTP of so many levels; 32 <= maxphyaddr <= 52.
  explicit constexpr guest_walker(const walk_context& context) noexcept : context_{context} {}

  constexpr const walk_context& context() const noexcept { return context_; }

  /// One access. Effects: sets accessed bits, and for a write the leaf's dirty bit, if the access is allowed and the
  /// EPTP asks for them.
  template <guest_memory<entry_type> Memory>
  constexpr walk_result walk(Memory& memory, gva a, access how) const noexcept {
    walk_result r = translate(memory, a, how);
    while (r.unmarked && !mark_used(memory, how, r)) r = translate(memory, a, how);
    return r;
  }

  /// One access as it would turn out, without touching guest memory.
  template <readable_guest_memory<entry_type> Memory>
  constexpr walk_result translate(Memory& memory, gva a, access how) const noexcept {
    walk_result r{};
    r.va = a;
    if (!mode::canonical(a)) return ended(r, walk_status::page_fault, Levels + 1, ept_exit::of(how));
    gpa table = mode::root(context_.cr3);
    std::uint64_t granted = ~std::uint64_t{0};
    for (unsigned level = Levels;; --level) {
      entry_type e = 0;
      r.tables[level - 1] = table.value;
      if (!memory.read_entry(r.entry(level).where, e)) return ended(r, walk_status::memory_error, level, 0);
      r.entry_values[level - 1] = e;
      if (!mode::present(e)) return ended(r, walk_status::page_fault, level, ept_exit::of(how));
      if (mode::misconfigured(e, level, context_.format(), context_.execute_only)) {
        return ended(r, walk_status::page_fault, level, ept_exit::misconfigured);
      }
      granted &= mode::grants(e, level);
      if (mode::maps_page(e, level, context_.format())) return arrive(r, level, e, rights_in(granted), how);
      table = mode::table(e);
    }
  }

  /// As the other walkers'.
  static constexpr rights rights_above(const walk_result& r, unsigned level) noexcept {
    std::uint64_t granted = ~std::uint64_t{0};
    for (unsigned l = Levels; l > level; --l) granted &= mode::grants(r.entry_values[l - 1], l);
    return rights_in(granted);
  }
  template <readable_guest_memory<entry_type> Memory>
  static constexpr bool unchanged(Memory& memory, const walk_result& r, unsigned level) noexcept {
    entry_type now{};
    return memory.read_entry(r.entry(level).where, now) && now == r.entry(level).value;
  }

 private:
  static constexpr walk_result ended(walk_result r, walk_status why, unsigned level, std::uint32_t code) noexcept {
    r.status = why;
    r.end_level = static_cast<std::uint8_t>(level);
    r.code = {code};
    return r;
  }

  constexpr walk_result arrive(walk_result r, unsigned level, entry_type leaf, rights granted,
                               access how) const noexcept {
    r.granted = granted;
    if (!ept_allows(granted, how)) {
      return ended(r, walk_status::page_fault, level, ept_exit::of(how) | ept_exit::of(granted));
    }
    r.end_level = static_cast<std::uint8_t>(level);
    r.page_shift = static_cast<std::uint8_t>(mode::page_shift(level));
    r.address = mode::frame(leaf, level) + (r.va.value & (bit(mode::page_shift(level)) - 1));
    for (unsigned l = level; l <= Levels; ++l) r.unmarked = r.unmarked || marked(r, l, how) != r.entry_values[l - 1];
    return r;
  }

  /// The entry of this level with what the access sets.
  constexpr entry_type marked(const walk_result& r, unsigned level, access how) const noexcept {
    const entry_type e = r.entry_values[level - 1];
    if (!mode::marks(context_)) return e;
    return e | epte::accessed | (level == r.end_level && is_write(how) ? epte::dirty : 0);
  }

  /// Sets what is missing, top down. Returns: false if the guest has changed an entry.
  template <class Memory>
  constexpr bool mark_used(Memory& memory, access how, walk_result& r) const noexcept {
    r.unmarked = false;
    for (unsigned level = Levels; level >= r.end_level; --level) {
      const entry_type value = r.entry_values[level - 1], wanted = marked(r, level, how);
      if (wanted == value) continue;
      switch (memory.compare_exchange_entry(r.entry(level).where, value, wanted)) {
        case exchange_result::done: take_over(r, level, wanted); break;
        case exchange_result::changed: return false;
        case exchange_result::read_only: r.unmarked = true; break;
        case exchange_result::failed: r = ended(r, walk_status::memory_error, level, 0); return true;
      }
    }
    return true;
  }
  /// A table that maps itself has one entry for several levels.
  static constexpr void take_over(walk_result& r, unsigned level, entry_type value) noexcept {
    const gpa where = r.entry(level).where;
    for (unsigned l = r.end_level; l <= Levels; ++l) {
      if (r.entry(l).where == where) r.entry_values[l - 1] = value;
    }
  }

  walk_context context_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
