// SPDX-License-Identifier: MIT
#pragma once

// The guest page walker: what the processor does between a linear address and a guest physical one, in software.
//
// Problem. A shadow MMU must answer, for one access, exactly what the hardware would: the same translation, the same
// fault with the same error code, the same accessed and dirty bits in guest memory. It then needs more than hardware
// gives: each entry it went through and its value, to find out under its lock whether the guest has changed one
// since, and the rights that the levels above a table grant, because they are part of what a shadow of it means.
//
// Contract. guest_walker<Mode> is a value made from a walk_context; `walk` answers one access.
//   - The address is checked for canonical form first: general_protection, never a page fault.
//   - Top down: an entry that is not present ends the walk with P=0, whatever else it holds; one with a reserved bit
//     set ends it with RSVD|P, before any right is looked at. Rights are judged at the leaf, over all levels together.
//   - Accessed and dirty bits change only for an access that is allowed, after all checks, top down, each by compare
//     exchange. If the guest has changed an entry in between, nothing more is written and the whole walk starts again.
//     So a fault leaves guest memory untouched, but for A bits of upper levels that were set before a collision (the
//     SDM leaves those to the implementation). A table that maps itself, one entry at several levels, is no collision.
//   - `translate` is the same judgement and writes nothing.
//   - Guest memory that cannot be read or written is the fourth outcome, memory_error; what it means to the guest is
//     the caller's business.
// Modes: long_mode_4 and long_mode_5 (entry.hpp), pae, two_level, each in its header; no_paging.hpp has the walker that
// has nothing to walk. What a mode does not have (NX, keys, PSE) its policy leaves out; the walk is the same.
//
// Limits. Whether CR3 and the control registers hold allowed values is decided where they are written
// (control_registers.hpp, pae.hpp), not here. No caching: each walk reads every level.
//
// Cost. No allocation, no virtual call, no lock; one read of guest memory per level.
// Progress: lock-free; a walk starts again only because somebody else's write to an entry succeeded.
//
// References: Intel SDM vol. 3A, 4.5 (walk), 4.6 (access rights, 4.6.2 protection keys), 4.7 (page faults), 4.8
// (accessed and dirty); AMD APM vol. 2, chapter 5; Linux arch/x86/kvm/mmu/paging_tmpl.h solves the same problem.

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/access.hpp>
#include <mmunotify/secondary/x86/entry.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// What compare_exchange_entry did.
enum class exchange_result : std::uint8_t {
  done,       ///< the entry held the expected value and holds the desired one now
  changed,    ///< the entry holds another value; nothing was written
  read_only,  ///< the memory takes no writes (ROM): the walk goes on as if the bits had been set
  failed,     ///< the memory cannot be reached
};

/// Guest memory that can be looked at.
///   read_entry(where, value)  reads the entry, which is naturally aligned, in one piece; false: it cannot be reached
template <class M, class Entry>
concept readable_guest_memory = requires(M& m, gpa where, Entry& value) {
  { m.read_entry(where, value) } noexcept -> std::same_as<bool>;
};

/// Guest memory in which the walker sets accessed and dirty bits.
///   compare_exchange_entry(where, expected, desired)  one locked compare exchange; see exchange_result
template <class M, class Entry>
concept guest_memory = readable_guest_memory<M, Entry> && requires(M& m, gpa where, Entry value) {
  { m.compare_exchange_entry(where, value, value) } noexcept -> std::same_as<exchange_result>;
};

enum class walk_status : std::uint8_t {
  ok,                  ///< the access is allowed; address, granted and the entries count
  page_fault,          ///< #PF with `code`; CR2 is the address as it was passed in
  general_protection,  ///< not canonical: #GP(0), or #SS(0) if the access was to the stack
  memory_error,        ///< the entry of level end_level is not in memory that can be used
};

/// An entry that the walk went through.
struct walked_entry {
  gpa where{};
  std::uint64_t value = 0;  ///< with the accessed and dirty bits that this walk has set
};

/// What a walk found. Trivially copyable.
struct walk_result {
  walk_status status = walk_status::ok;
  std::uint8_t end_level = 0;    ///< the level of the leaf, or of the offending entry; 0: no entry maps it (no paging)
  std::uint8_t page_shift = 0;   ///< log2 of the size of the page, 12, 21, 22 or 30 (no paging: 32); ok only
  rights granted{};              ///< by all levels together; ok, and page faults by rights
  bool unmarked = false;         ///< accessed or dirty bits are missing that this access would set: translate, or ROM
  fault_code code{};             ///< page_fault only
  gpa address{};                 ///< the translation of the very address; ok only
  std::uint8_t entry_shift = 3;  ///< log2 of the size of an entry
  gva va{};                      ///< the address, as far as the mode uses it
  /// The tables and what the walk found in them, [level-1]; zero below end_level and above the root. Of PAE's level 3
  /// these are the register and the place that it was loaded from. A walk writes every element, so they have no
  /// initialisers: to zero them first costs a fifth of a walk (gcc 12, AMD EPYC). walk_result{} is all zeros.
  std::array<std::uint64_t, 5> tables;
  std::array<std::uint64_t, 5> entry_values;

  constexpr explicit operator bool() const noexcept { return status == walk_status::ok; }
  /// Preconditions: end_level <= level <= the root's level. Where the entry lies is computed here and not by the walk,
  /// whose next load would wait for the sum: a tenth of a walk.
  constexpr walked_entry entry(unsigned level) const noexcept {
    const unsigned index_bits = 12U - entry_shift;
    const std::uint64_t index = va.value >> (12 + index_bits * (level - 1)) & (bit(index_bits) - 1);
    return {gpa{tables[level - 1] + (index << entry_shift)}, entry_values[level - 1]};
  }

  /// The members below are for results that are ok. Without paging there is no leaf, and what it would say is that
  /// writes need no trap.
  constexpr std::uint64_t leaf() const noexcept { return end_level == 0 ? pte::dirty : entry_values[end_level - 1U]; }
  constexpr bool dirty() const noexcept { return (leaf() & pte::dirty) != 0; }
  constexpr bool global() const noexcept { return (leaf() & pte::global) != 0; }  ///< needs CR4.PGE to count
  /// The leaf's PAT bit, which lies elsewhere in a large one.
  constexpr bool pat() const noexcept { return (leaf() & (page_shift == 12 ? pte::pat_4k : pte::pat_large)) != 0; }
  constexpr unsigned protection_key() const noexcept {  ///< long modes only
    return static_cast<unsigned>((leaf() & pte::protection_key) >> pte::protection_key_shift);
  }
  constexpr std::uint64_t page_bytes() const noexcept { return std::uint64_t{1} << page_shift; }
  constexpr gpa page_base() const noexcept { return {address.value & ~(page_bytes() - 1)}; }
};

/// What there is a walker for: the modes with tables, and no_paging.
template <class M>
concept walked_mode = paging_mode<M> || M::levels == 0;

/// Walks the page tables of one paging mode. A copy of the context and what follows from it; cheap to make and to copy.
template <walked_mode Mode>
class guest_walker {
 public:
  using mode = Mode;
  using entry_type = typename Mode::entry_type;

  /// Preconditions: the context's processor is in this paging mode; 32 <= maxphyaddr <= 52; in PAE, the PDPTEs are
  /// loaded.
  explicit constexpr guest_walker(const walk_context& context) noexcept
      : context_{context}, checks_keys_{Mode::has_keys && (context.pke || context.pks)} {
    // A present entry equals `present` under this mask, so that one comparison finds both kinds of bad entry.
    for (unsigned level = 1; level <= Mode::levels; ++level) {
      checked_[level - 1] = static_cast<entry_type>(Mode::reserved(level, context.format()) | pte::present);
    }
    for (unsigned a = 0; a < accesses; ++a) {
      forbidden_[a] = forbidden_rights(context, static_cast<access>(a));
      if constexpr (Mode::has_keys) {
        for (const bool user : {false, true})
          keys_[2 * a + user] = forbidden_keys(context, static_cast<access>(a), user);
      }
    }
  }

  constexpr const walk_context& context() const noexcept { return context_; }

  /// One access. Effects: sets accessed bits, and for a write the leaf's dirty bit, if the access is allowed.
  template <guest_memory<entry_type> Memory>
  constexpr walk_result walk(Memory& memory, gva va, access how) const noexcept {
    walk_result r;
    if (!look_up(memory, va, how, r)) [[unlikely]]
      mark_and_repeat(memory, va, how, r);
    return r;
  }

  /// One access as it would turn out, without touching guest memory.
  template <readable_guest_memory<entry_type> Memory>
  constexpr walk_result translate(Memory& memory, gva va, access how) const noexcept {
    walk_result r;
    static_cast<void>(look_up(memory, va, how, r));
    return r;
  }

  /// The rights that the entries above `level` grant together: all of them for the root table.
  /// Preconditions: r came from this mode, r.end_level <= level + 1 <= levels + 1.
  static constexpr rights rights_above(const walk_result& r, unsigned level) noexcept {
    std::uint64_t granted = ~std::uint64_t{0};
    for (unsigned l = Mode::levels; l > level; --l) {
      granted &= Mode::grants(static_cast<entry_type>(r.entry_values[l - 1]), l);
    }
    return rights_in(granted);
  }

  /// The entry of this level still holds what the walk left in it. An entry that cannot be read does not; one that was
  /// in a register does.
  template <readable_guest_memory<entry_type> Memory>
  static constexpr bool unchanged(Memory& memory, const walk_result& r, unsigned level) noexcept {
    if (Mode::top_in_registers && level == Mode::levels) return true;
    entry_type now{};
    return memory.read_entry(r.entry(level).where, now) && now == r.entry(level).value;
  }

 private:
  static constexpr unsigned accesses = static_cast<unsigned>(access::implicit_write) + 1;

  /// Everything but the writes to guest memory. Writes every member of r. Returns: nothing is left to be done, which is
  /// r.unmarked once more: as a value it lets a compiler keep the way of most walks apart, and r in registers on it.
  template <class Memory>
  constexpr bool look_up(Memory& memory, gva va, access how, walk_result& r) const noexcept {
    r.entry_shift = sizeof(entry_type) == 4 ? 2 : 3;
    r.va = Mode::address_bits == 32 ? gva{va.value & bit_range(0, 31)} : va;
    if (!Mode::canonical(va)) [[unlikely]]
      return end(walk_status::general_protection, Mode::levels + 1, {}, r);
    return descend<Mode::levels>(memory, va, how, Mode::root(context_.cr3), ~std::uint64_t{0}, r);
  }

  /// Goes on at the table of this level. `granted` is what the levels above have in common.
  template <unsigned Level, class Memory>
  [[gnu::always_inline]] constexpr bool descend(Memory& memory, gva va, access how, gpa table, std::uint64_t granted,
                                                walk_result& r) const noexcept {
    const std::uint64_t index = Mode::index(va, Level);
    entry_type e{};
    bool readable = true;
    if constexpr (Mode::top_in_registers && Level == Mode::levels) {
      e = context_.pdptes[index];
    } else {
      readable = memory.read_entry(table + index * sizeof(entry_type), e);
    }
    r.tables[Level - 1] = table.value;
    r.entry_values[Level - 1] = e;
    if (!readable) [[unlikely]]
      return end(walk_status::memory_error, Level, {}, r);
    if ((e & checked_[Level - 1]) != pte::present) [[unlikely]]
      return bad_entry(Level, how, r);
    granted &= Mode::grants(e, Level);
    if constexpr (Level == 1) {
      return arrive<Level>(va, how, e, granted, r);
    } else {
      if (Mode::maps_page(e, Level, context_.format())) return arrive_large<Level>(va, how, e, granted, r);
      return descend<Level - 1>(memory, va, how, Mode::table(e), granted, r);
    }
  }

  /// The leaf is a large one. Out of line, so that the way down to 4 KiB leaves is straight.
  template <unsigned Level>
  [[gnu::noinline]] constexpr bool arrive_large(gva va, access how, entry_type leaf, std::uint64_t granted,
                                                walk_result& r) const noexcept {
    if ((leaf & Mode::reserved_large(Level, context_.format())) != 0) [[unlikely]]
      return bad_entry(Level, how, r);
    return arrive<Level>(va, how, leaf, granted, r);
  }

  /// The leaf is found: judges the rights.
  template <unsigned Level>
  [[gnu::always_inline]] constexpr bool arrive(gva va, access how, entry_type leaf, std::uint64_t granted,
                                               walk_result& r) const noexcept {
    constexpr unsigned shift = Mode::page_shift(Level);
    r.granted = rights_in(granted);
    if (contains(forbidden_[static_cast<unsigned>(how)], r.granted)) [[unlikely]]
      return forbidden(Level, how, leaf, r);
    if (key_forbids(how, leaf, r.granted)) [[unlikely]]
      return forbidden(Level, how, leaf, r);
    r.status = walk_status::ok;
    r.end_level = Level;
    r.page_shift = shift;
    const std::uint64_t wanted = pte::accessed | (is_write(how) ? pte::dirty : 0);
    r.unmarked = (wanted & ~((granted & pte::accessed) | (leaf & pte::dirty))) != 0;
    r.code = {};
    r.address = Mode::frame(leaf, Level) + (va.value & (bit(shift) - 1));
    clear_unused(Level, r);
    return !r.unmarked;
  }

  /// Zeroes the entries that the walk did not go through.
  [[gnu::always_inline]] static constexpr void clear_unused(unsigned end_level, walk_result& r) noexcept {
    for (unsigned i = 0; i < r.entry_values.size(); ++i) {
      if (i + 1 < end_level || i >= Mode::levels) r.tables[i] = r.entry_values[i] = 0;
    }
  }

  constexpr bool key_forbids([[maybe_unused]] access how, [[maybe_unused]] std::uint64_t leaf,
                             [[maybe_unused]] rights granted) const noexcept {
    if constexpr (Mode::has_keys) {
      if (!checks_keys_) [[likely]]
        return false;
      const std::uint32_t keys = keys_[2 * static_cast<unsigned>(how) + granted.user()];
      return ((keys >> (leaf >> (pte::protection_key_shift - 1) & 0x1e)) & 1) != 0;
    } else {
      return false;
    }
  }

  MMUNOTIFY_COLD static constexpr bool end(walk_status why, unsigned level, fault_code code, walk_result& r) noexcept {
    r.status = why;
    r.end_level = static_cast<std::uint8_t>(level);
    r.page_shift = 0;
    r.unmarked = false;
    r.code = code;
    r.address = {};
    clear_unused(level, r);
    return true;
  }

  MMUNOTIFY_COLD constexpr bool bad_entry(unsigned level, access how, walk_result& r) const noexcept {
    const bool present = (r.entry_values[level - 1] & pte::present) != 0;
    const std::uint32_t why = present ? fault_code::reserved | fault_code::present : 0;
    return end(walk_status::page_fault, level, {why | access_bits(how)}, r);
  }

  MMUNOTIFY_COLD constexpr bool forbidden(unsigned level, access how, entry_type leaf, walk_result& r) const noexcept {
    std::uint32_t why = fault_code::present;
    if (key_forbids(how, leaf, r.granted)) why |= fault_code::protection_key;
    return end(walk_status::page_fault, level, {why | access_bits(how)}, r);
  }

  /// The part of the error code that depends on the access alone.
  constexpr std::uint32_t access_bits(access how) const noexcept {
    const bool fetch = is_fetch(how) && Mode::fetch_reported(context_.format(), context_.smep);
    return (is_write(how) ? fault_code::write : 0) | (is_user(how, context_) ? fault_code::user : 0) |
           (fetch ? fault_code::fetch : 0);
  }

  template <class Memory>
  [[gnu::noinline]] constexpr void mark_and_repeat(Memory& memory, gva va, access how, walk_result& r) const noexcept {
    while (r.unmarked && !mark_used(memory, how, r)) static_cast<void>(look_up(memory, va, how, r));
  }

  /// Sets what is missing, top down (SDM 4.8). Returns: false if the guest has changed an entry.
  template <class Memory>
  constexpr bool mark_used(Memory& memory, access how, walk_result& r) const noexcept {
    r.unmarked = false;
    for (unsigned level = Mode::levels; level >= r.end_level; --level) {
      const std::uint64_t value = r.entry_values[level - 1];
      std::uint64_t wanted = value;
      if (Mode::has_accessed(level)) wanted |= pte::accessed;
      if (level == r.end_level && is_write(how)) wanted |= pte::dirty;
      if (wanted == value) continue;
      switch (memory.compare_exchange_entry(r.entry(level).where, static_cast<entry_type>(value),
                                            static_cast<entry_type>(wanted))) {
        case exchange_result::done: take_over(level, wanted, r); break;
        case exchange_result::changed: return false;
        case exchange_result::read_only: r.unmarked = true; break;
        case exchange_result::failed: end(walk_status::memory_error, level, {}, r); return true;
      }
    }
    return true;
  }

  /// The entry of this level holds a new value. A table that maps itself has one entry for several levels.
  static constexpr void take_over(unsigned level, std::uint64_t value, walk_result& r) noexcept {
    const gpa where = r.entry(level).where;
    for (unsigned l = r.end_level; l <= Mode::levels; ++l) {
      const bool in_register = Mode::top_in_registers && l == Mode::levels;
      if (r.entry(l).where == where && !in_register) r.entry_values[l - 1] = value;
    }
  }

  walk_context context_;
  bool checks_keys_;
  std::array<entry_type, Mode::levels> checked_{};                       ///< [level-1]
  std::array<rights_set, accesses> forbidden_{};                         ///< [access]
  std::array<std::uint32_t, Mode::has_keys ? 2 * accesses : 0> keys_{};  ///< [2 * access + user page]
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
