// SPDX-License-Identifier: MIT
#pragma once

// Replays captured single accesses: one processor state, one entry per level, one access, and its outcome.
//
// The tests want no mismatch, and mismatches as soon as a rule is taken away: hence the `tamper` argument, which may
// change a case before it is walked.

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <mmunotify/base/address.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>

#include "capture_formats.hpp"
#include "capture_replay.hpp"

namespace capture {

/// A processor, one entry per level, and one access that goes through them.
struct access_case {
  x86::walk_context context;
  x86::access how{};
  std::uint64_t va = 0;
  unsigned levels = 0;
  std::array<std::uint64_t, 5> entries{};  ///< [level-1]
};

/// Where the table of a level lies.
inline constexpr std::uint64_t table_of(unsigned level) noexcept { return 0x07000000 + 0x1000ULL * level; }

/// The memory of an access_case: its tables, each with one entry that is not zero. Models x86::guest_memory.
template <x86::paging_mode Mode>
class chain_memory {
 public:
  using entry_type = typename Mode::entry_type;

  explicit chain_memory(const access_case& c) noexcept : entries_{c.entries} {
    for (unsigned l = 1; l <= Mode::levels; ++l) {
      where_[l - 1] = table_of(l) + Mode::index({c.va}, l) * sizeof(entry_type);
    }
  }
  bool read_entry(mmunotify::gpa where, entry_type& value) const noexcept {
    const std::uint64_t level = (where.value - table_of(0)) >> 12;
    if (level < 1 || level > Mode::levels) return false;
    value = where.value == where_[level - 1] ? static_cast<entry_type>(entries_[level - 1]) : entry_type{0};
    return true;
  }
  x86::exchange_result compare_exchange_entry(mmunotify::gpa where, entry_type expected, entry_type desired) noexcept {
    entry_type now{};
    if (!read_entry(where, now)) return x86::exchange_result::failed;
    if (now != expected) return x86::exchange_result::changed;
    entries_[(where.value - table_of(1)) >> 12] = desired;
    return x86::exchange_result::done;
  }
  const std::array<std::uint64_t, 5>& entries() const noexcept { return entries_; }

 private:
  std::array<std::uint64_t, 5> entries_;
  std::array<std::uint64_t, 5> where_{};
};

/// What came of it.
struct access_outcome {
  x86::pdpte_load load{};  ///< of PAE, before the access; if it fails there is none
  x86::walk_result result{};
  unsigned accessed = 0;  ///< bit l-1: A newly set at level l
  unsigned dirty = 0;     ///< bit l-1: D newly set at level l
  bool clean = true;      ///< no other bit has changed
};

template <x86::paging_mode Mode>
access_outcome run_case(access_case c) {
  chain_memory<Mode> memory{c};
  access_outcome o;
  o.load = load_top<Mode>(memory, c.context);
  if (o.load != x86::pdpte_load::ok) return o;
  o.result = x86::guest_walker<Mode>{c.context}.walk(memory, {c.va}, c.how);
  for (unsigned l = 1; l <= Mode::levels; ++l) {
    const std::uint64_t changed = memory.entries()[l - 1] ^ c.entries[l - 1], set = changed & ~c.entries[l - 1];
    if ((set & x86::pte::accessed) != 0) o.accessed |= 1U << (l - 1);
    if ((set & x86::pte::dirty) != 0) o.dirty |= 1U << (l - 1);
    if ((changed & ~(x86::pte::accessed | x86::pte::dirty)) != 0 || set != changed) o.clean = false;
  }
  return o;
}

/// The same for a mode that is known at run time. Precondition: m is not mode::none.
inline access_outcome run_case(mode m, const access_case& c) {
  access_outcome o;
  with_walked_mode(m, [&]<class Mode>(std::type_identity<Mode>) {
    if constexpr (x86::paging_mode<Mode>) o = run_case<Mode>(c);
  });
  return o;
}

/// Leaves a case as it is.
struct untampered {
  void operator()(access_case&) const noexcept {}
};

// ---- random chains -------------------------------------------------------------------------------------------------

inline access_case case_of(const access_fuzz& f, const access_fuzz::row& r) noexcept {
  access_case c;
  const auto flag = [&](unsigned n) { return (r.cpu >> n & 1) != 0; };
  c.levels = levels_of(r.mode);
  c.context.cr3 = table_of(c.levels);
  c.context.wp = flag(0);
  c.context.nxe = flag(1);
  c.context.smep = flag(2);
  c.context.smap = flag(3);
  c.context.pke = flag(4);
  c.context.ac = flag(5);
  c.context.pse = r.mode != mode::two_level;
  c.context.cpl = (r.acc & 4) != 0 ? 3 : 0;
  c.context.pkru = r.pkru;
  c.context.maxphyaddr = f.maxphyaddr;
  c.context.gib_pages = f.gib_pages;
  c.context.pse36_bits = f.pse36_bits;
  constexpr x86::access kinds[] = {x86::access::read, x86::access::write, x86::access::fetch,
                                   x86::access::implicit_read};
  c.how = kinds[r.acc & 3];
  c.va = r.va;
  c.entries = r.entries;
  return c;
}

inline bool agrees(const access_fuzz::row& r, const access_outcome& o) noexcept {
  using status = access_fuzz::status;
  const bool refused = o.load == x86::pdpte_load::general_protection;
  if (refused || r.status == status::bad_pdpte) return refused && r.status == status::bad_pdpte;
  switch (r.status) {
    case status::done:
      return o.clean && o.result.status == x86::walk_status::ok && r.newly_set == (o.accessed | o.dirty << 5) &&
             (r.pa == access_fuzz::unmeasured || r.pa == o.result.address.value);
    case status::page_fault:
      return o.clean && o.accessed == 0 && o.dirty == 0 && o.result.status == x86::walk_status::page_fault &&
             o.result.code.bits == r.error_code;
    case status::general_protection: return o.result.status == x86::walk_status::general_protection;
    case status::bad_pdpte: break;
  }
  return false;
}

template <class Tamper = untampered>
void check_fuzz(const access_fuzz& f, report& out, Tamper tamper = {}) {
  for (std::size_t i = 0; i < f.rows.size(); ++i) {
    const access_fuzz::row& r = f.rows[i];
    access_case c = case_of(f, r);
    tamper(c);
    const access_outcome o = run_case(r.mode, c);
    ++out.checked;
    if (agrees(r, o)) continue;
    out.mismatch(
        "row %zu (cpu %#x, acc %u, va %#llx): expected status %u code %#x set %#x pa %#llx, "
        "found load %u status %u code %#x set %#x pa %#llx",
        i, unsigned{r.cpu}, unsigned{r.acc}, wide(r.va), unsigned(r.status), unsigned{r.error_code},
        unsigned{r.newly_set}, wide(r.pa), unsigned(o.load), unsigned(o.result.status), o.result.code.bits,
        o.accessed | o.dirty << 5, wide(o.result.address.value));
  }
}

// ---- the matrix ----------------------------------------------------------------------------------------------------

namespace detail {

inline constexpr std::uint64_t reserved_bit(bool wide_entries) noexcept { return x86::bit(wide_entries ? 51 : 21); }

/// The entry's P, W, U and NX from the three low bits of v.
inline std::uint64_t rights_bits(std::uint32_t v, bool wide_entries) noexcept {
  std::uint64_t e = x86::pte::present;
  if ((v & 1) != 0) e |= x86::pte::writable;
  if ((v & 2) != 0) e |= x86::pte::user;
  if ((v & 4) != 0 && wide_entries) e |= x86::pte::no_execute;
  return e;
}

/// Leaf values 0 to 29.
inline std::uint64_t matrix_leaf(std::uint32_t v, bool wide_entries) noexcept {
  using namespace x86;
  if (v < 24) {
    constexpr std::uint64_t used[] = {0, pte::accessed, pte::accessed | pte::dirty};
    return rights_bits(v & 7, wide_entries) | used[v >> 3];
  }
  if (v == 24) return pte::writable | pte::user | pte::accessed | pte::dirty;
  if (v == 25) return (rights_bits(7, wide_entries) ^ pte::present) | reserved_bit(wide_entries);
  return rights_bits(v & 3, wide_entries) | reserved_bit(wide_entries);
}

/// Parent values 0 to 10.
inline std::uint64_t matrix_parent(std::uint32_t v, bool wide_entries) noexcept {
  using namespace x86;
  if (v < 8) return rights_bits(v, wide_entries);
  if (v == 8) return pte::writable | pte::user;
  if (v == 9) return rights_bits(3, wide_entries) | reserved_bit(wide_entries);
  return (rights_bits(7, wide_entries) ^ pte::present) | reserved_bit(wide_entries);
}

/// Top values 0 to 5.
inline std::uint64_t matrix_top(std::uint32_t v) noexcept {
  using namespace x86;
  constexpr std::uint64_t p = pte::present, w = pte::writable, u = pte::user;
  constexpr std::uint64_t values[] = {p | w | u, p | w, p | u, p | w | u | pte::no_execute, w | u, p | w | u | bit(51)};
  return values[v];
}

/// The values that the digits of a block's entries stand for, where they are not 0, 1, 2 and so on.
inline constexpr std::uint32_t narrow_leaves[] = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27, 28, 29};
inline constexpr std::uint32_t narrow_parents[] = {0, 1, 2, 3, 8};

/// Level l > leaf level of a block, without the address. Entries above the parent and below the root have all rights.
inline std::uint64_t matrix_upper(const access_matrix& m, unsigned l, std::uint32_t parent,
                                  std::uint32_t top) noexcept {
  constexpr std::uint64_t pdptes[] = {x86::pte::present, 0};
  const bool is_parent = l == m.leaf_level + 1, is_root = l == levels_of(m.mode);
  if (m.mode == mode::pae && is_root) return pdptes[is_parent ? parent : top];
  if (m.mode < mode::pae) return matrix_parent(narrow_parents[parent], false);
  const std::uint64_t key = m.mode == mode::pae ? 0 : std::uint64_t{2} << x86::pte::protection_key_shift;
  if (is_parent) return matrix_parent(parent, true) | key;
  return is_root ? matrix_top(top) : rights_bits(3, true);
}

struct matrix_digits {
  std::uint32_t pk, smap_ac, smep, nxe, wp, access, leaf, parent, top;
};

inline matrix_digits digits_of(const access_matrix& m, std::uint64_t row) noexcept {
  std::array<std::uint32_t, 9> d{};
  const auto radices = matrix_radices(m.mode, m.leaf_level);
  for (std::size_t i = 0; i < d.size(); ++i) {
    d[i] = static_cast<std::uint32_t>(row % radices[i]);
    row /= radices[i];
  }
  return {d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7], d[8]};
}

}  // namespace detail

/// The case behind a row. Precondition: row < outcomes.size().
inline access_case case_of(const access_matrix& m, std::uint64_t row) noexcept {
  using namespace x86;
  const detail::matrix_digits d = detail::digits_of(m, row);
  const bool entries_are_wide = m.mode >= mode::pae, long_mode = m.mode >= mode::long_4;
  access_case c;
  c.levels = levels_of(m.mode);
  constexpr std::uint32_t pkru[] = {0xffffffff, 0xfffffff0, 0xfffffff4, 0xfffffff8};
  const bool cpl3 = (d.access >= 3 && d.access <= 5) || d.access == 7;
  c.context.cr3 = table_of(c.levels);
  c.context.wp = d.wp == 1;
  c.context.pse = m.mode == mode::two_level_pse;
  c.context.smep = d.smep == 1;
  c.context.smap = d.smap_ac > 0;
  c.context.pke = d.pk > 0;
  c.context.nxe = d.nxe == 1;
  c.context.ac = d.smap_ac == 2;
  c.context.cpl = cpl3 ? 3 : 0;
  c.context.pkru = pkru[d.pk];
  c.context.maxphyaddr = m.maxphyaddr;
  c.context.gib_pages = m.gib_pages;
  constexpr x86::access kinds[] = {x86::access::read, x86::access::write, x86::access::fetch};
  c.how = d.access >= 6 ? x86::access::implicit_read : kinds[d.access % 3];
  c.va = !long_mode ? 0xc8400120 : m.mode == mode::long_4 ? 0xffff923408400120 : 0xff12923408400120;
  if (c.how == x86::access::fetch) c.va += 8;

  const std::uint64_t page = (m.leaf_level < 3 ? 0x08400000 : 0) | (m.leaf_level > 1 ? pte::large : 0);
  const std::uint32_t leaf = entries_are_wide ? d.leaf : detail::narrow_leaves[d.leaf];
  c.entries[m.leaf_level - 1] = detail::matrix_leaf(leaf, entries_are_wide) | page;
  if (long_mode) c.entries[m.leaf_level - 1] |= std::uint64_t{1} << pte::protection_key_shift;
  for (unsigned l = m.leaf_level + 1; l <= c.levels; ++l) {
    const std::uint64_t e = detail::matrix_upper(m, l, d.parent, d.top);
    c.entries[l - 1] = e == 0 ? 0 : e | table_of(l - 1);
  }
  return c;
}

/// The outcome in the capture's terms; never a number that a capture holds if guest memory was changed otherwise.
inline std::uint16_t matrix_outcome(const access_matrix& m, const access_case& c, const access_outcome& o) noexcept {
  constexpr std::uint16_t impossible = 0;
  const unsigned leaf_bit = 1U << (m.leaf_level - 1);
  if (o.load != x86::pdpte_load::ok) return impossible;
  if (!o.clean || (o.dirty & ~leaf_bit) != 0) return impossible;
  if (o.result.status == x86::walk_status::page_fault) {
    const bool touched = o.accessed != 0 || o.dirty != 0;
    return touched ? impossible : static_cast<std::uint16_t>(access_matrix::fault | o.result.code.bits);
  }
  const std::uint64_t expected = 0x08400120U + (c.how == x86::access::fetch ? 8U : 0U);
  if (!o.result || o.result.address.value != expected) return impossible;
  return static_cast<std::uint16_t>(access_matrix::done | o.accessed << 8 | (o.dirty != 0 ? 1U << 13 : 0U));
}

/// Every row that the capture does not declare undecided, or one of `step` of them.
template <x86::paging_mode Mode, class Tamper = untampered>
void check_matrix(const access_matrix& m, std::type_identity<Mode>, report& out, Tamper tamper = {},
                  std::size_t step = 1) {
  for (std::size_t row = 0; row < m.outcomes.size(); row += step) {
    if (m.outcomes[row] == access_matrix::untested) {
      ++out.skipped;
      continue;
    }
    access_case c = case_of(m, row);
    tamper(c);
    const std::uint16_t found = matrix_outcome(m, c, run_case<Mode>(c));
    ++out.checked;
    if (found == m.outcomes[row]) continue;
    out.mismatch("row %zu (cpl %u, access %u, leaf %#llx, parent %#llx): expected outcome %#x, found %#x", row,
                 c.context.cpl, unsigned(c.how), wide(c.entries[m.leaf_level - 1]), wide(c.entries[m.leaf_level]),
                 unsigned{m.outcomes[row]}, unsigned{found});
  }
}

template <class Tamper = untampered>
void check_matrix(const access_matrix& m, report& out, Tamper tamper = {}, std::size_t step = 1) {
  with_walked_mode(m.mode, [&]<class Mode>(std::type_identity<Mode> mode) {
    if constexpr (x86::paging_mode<Mode>) check_matrix(m, mode, out, tamper, step);
  });
}

// ---- 4 MiB pages above 4 GiB ---------------------------------------------------------------------------------------

template <class Tamper = untampered>
void check_pse36(const pse36_translations& p, report& out, Tamper tamper = {}) {
  for (const auto& [va, pde, pa] : p.rows) {
    access_case c;
    c.levels = 2;
    c.context.cr3 = table_of(2);
    c.context.maxphyaddr = c.context.pse36_bits = pse36_translations::physical_bits;
    c.va = va;
    c.entries[1] = pde;
    tamper(c);
    const access_outcome o = run_case(mode::two_level_pse, c);
    ++out.checked;
    if (o.result && o.result.address.value == pa) continue;
    out.mismatch("va %#x pde %#x: expected pa %#llx, found status %u pa %#llx", unsigned{va}, unsigned{pde}, wide(pa),
                 unsigned(o.result.status), wide(o.result.address.value));
  }
}

}  // namespace capture
