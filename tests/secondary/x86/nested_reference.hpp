// SPDX-License-Identifier: MIT
#pragma once

// The rules of a guest hypervisor's tables, EPT and NPT, written down one after the other, with none of the library's
// code: what an access of the nested guest comes to, what the processor would say of it, and which entries it marks.
// And a walk of the nested guest's own tables, which are wherever the reader says: reference_walk.hpp judges.

#include <array>
#include <cstdint>
#include <vector>

#include "reference_walk.hpp"

namespace nested_test {

/// L1's tables and its processor.
struct second_level {
  bool npt = false;
  unsigned levels = 4;
  std::uint64_t root = 0;
  bool marks = false;         ///< EPT: accessed and dirty bits
  bool execute_only = false;  ///< EPT
  bool nx = true;             ///< NPT
  bool gib_pages = true;
  unsigned width = 40;
};

struct second_answer {
  enum kind { ok, forbidden, misconfigured, unreadable };
  kind what = ok;
  std::uint64_t address = 0;        ///< ok: of L1; unreadable: of the entry
  std::uint64_t info = 0;           ///< forbidden: the low bits of the qualification, or of the error code
  unsigned level = 0;               ///< of the leaf
  std::vector<std::uint64_t> used;  ///< where the entries are, leaf last; empty if not ok
};

inline bool one(std::uint64_t e, unsigned n) { return (e >> n & 1) != 0; }
inline bool any(std::uint64_t e, unsigned first, unsigned last) {
  for (unsigned n = first; n <= last; ++n) {
    if (one(e, n)) return true;
  }
  return false;
}

/// The entry cannot be: EPT's misconfigurations, NPT's reserved bits.
inline bool cannot_be(const second_level& t, std::uint64_t e, unsigned level, bool leaf) {
  if (t.width < 52 && any(e, t.width, 51)) return true;
  const unsigned lowest = 12 + 9 * (level - 1);
  if (t.npt) {
    if (!t.nx && one(e, 63)) return true;
    if (level >= 4 && (one(e, 7) || one(e, 8))) return true;
    if (level == 3 && one(e, 7) && !t.gib_pages) return true;
    return leaf && level > 1 && any(e, 13, lowest - 1);
  }
  if (one(e, 1) && !one(e, 0)) return true;
  if (one(e, 2) && !one(e, 1) && !one(e, 0) && !t.execute_only) return true;
  if (!leaf) return any(e, 3, 6) || (level >= 3 && one(e, 7));
  const unsigned type = static_cast<unsigned>(e >> 3 & 7);
  if (type != 0 && type != 1 && type != 4 && type != 5 && type != 6) return true;
  return level > 1 && any(e, 12, lowest - 1);
}

/// One access. read(address of L1, value&) -> bool.
template <class Read>
second_answer second_walk(const second_level& t, std::uint64_t a, bool reads, bool writes, bool fetches, Read&& read) {
  second_answer r;
  // A write of NPT is no read in its error code; EPT's qualification says both where both are asked.
  const std::uint64_t asked = t.npt ? (writes ? 2U : 0U) | 4U | (fetches && t.nx ? 16U : 0U)
                                    : (reads ? 1U : 0U) | (writes ? 2U : 0U) | (fetches ? 4U : 0U);
  const auto ends = [&](second_answer::kind what, std::uint64_t info) {
    r.what = what;
    r.info = info;
    r.used.clear();
    return r;
  };
  if (a >> (12 + 9 * t.levels) != 0) return ends(second_answer::forbidden, asked);
  std::uint64_t table = t.root;
  bool r_all = true, w_all = true, x_all = true;
  for (unsigned level = t.levels;; --level) {
    const std::uint64_t where = table + 8 * (a >> (12 + 9 * (level - 1)) & 511);
    std::uint64_t e = 0;
    if (!read(where, e)) {
      r.address = where;
      return ends(second_answer::unreadable, 0);
    }
    r.used.push_back(where);
    if (t.npt ? !one(e, 0) : !any(e, 0, 2)) return ends(second_answer::forbidden, asked);
    const bool large = one(e, 7) && (level == 2 || (level == 3 && t.gib_pages));
    const bool leaf = level == 1 || large;
    if (cannot_be(t, e, level, leaf)) {
      return t.npt ? ends(second_answer::forbidden, asked | 1 | 8) : ends(second_answer::misconfigured, 0);
    }
    r_all = r_all && one(e, t.npt ? 2 : 0);
    w_all = w_all && one(e, 1);
    x_all = x_all && (t.npt ? !t.nx || !one(e, 63) : one(e, 2));
    if (!leaf) {
      table = e & 0xffffffffff000;
      continue;
    }
    const bool bad = (reads && !r_all) || (writes && !w_all) || (fetches && !x_all) || (t.npt && !r_all);
    if (bad) {
      const std::uint64_t have = (r_all ? 8U : 0U) | (w_all ? 16U : 0U) | (x_all ? 32U : 0U);
      return ends(second_answer::forbidden, t.npt ? asked | 1 : asked | have);
    }
    const std::uint64_t size = std::uint64_t{1} << (12 + 9 * (level - 1));
    r.level = level;
    r.address = (e & 0xffffffffff000 & ~(size - 1)) | (a & (size - 1));
    return r;
  }
}

struct first_answer {
  bool unreadable = false;  ///< the reader had no entry; what it knows is its own
  walk_test::reference_outcome judged{};
  struct mark {
    std::uint64_t where = 0, value = 0;
  };
  std::vector<mark> marks;  ///< entries that the access changes, top down, and to what
};

/// A linear address of the nested guest. levels: as in reference_case. pdptes: of PAE, if they are in registers.
/// read(its physical address, bytes, value&) -> bool.
template <class Read>
first_answer first_walk(const mmunotify::x86::walk_context& c, unsigned levels, std::uint64_t va,
                        mmunotify::x86::access how, const std::array<std::uint64_t, 4>* pdptes, Read&& read) {
  using walk_test::reference_outcome;
  walk_test::reference_case k{.c = c, .how = how, .va = levels < 4 ? va & 0xffffffff : va, .levels = levels};
  first_answer r;
  std::array<std::uint64_t, 5> where{};
  const unsigned bits = levels == 2 ? 10 : 9, bytes = levels == 2 ? 4 : 8;
  std::uint64_t table = c.cr3 & (levels == 2 ? 0xfffff000 : levels == 3 ? 0xffffffe0 : 0xffffffffff000);
  for (unsigned level = levels;; --level) {
    // What is below is not known yet, and counts as not present: another answer than that is final.
    r.judged = walk_test::reference_walk(k).run();
    const bool above = level == levels || (k.entries[level] & 1) != 0;
    if (r.judged.what != reference_outcome::page_fault || (r.judged.code & 1) != 0 || !above || level == 0) break;
    const std::uint64_t index = k.va >> (12 + bits * (level - 1)) & ((1U << bits) - 1);
    where[level - 1] = table + bytes * index;
    if (levels == 3 && level == 3 && pdptes != nullptr) {
      k.entries[2] = (*pdptes)[index];
    } else if (!read(where[level - 1], bytes, k.entries[level - 1])) {
      r.unreadable = true;
      return r;
    }
    table = k.entries[level - 1] & (levels == 2 ? 0xfffff000 : 0xffffffffff000);
  }
  if (r.judged.what == reference_outcome::done) {
    for (unsigned level = levels; level > 0; --level) {
      if (r.judged.entries[level - 1] != k.entries[level - 1])
        r.marks.push_back({where[level - 1], r.judged.entries[level - 1]});
    }
  }
  if (r.judged.what == reference_outcome::bad_pdpte) {  // not in registers: the walk finds it
    using mmunotify::x86::access;
    r.judged.what = reference_outcome::page_fault;
    r.judged.code = 1 | 8 | (how == access::write ? 2U : 0U) | (c.cpl == 3 ? 4U : 0U) |
                    (how == access::fetch && (c.nxe || c.smep) ? 16U : 0U);
  }
  return r;
}

/// What a load of the PDPTEs from there comes to. Returns: false: #GP. Precondition: they can be read.
inline bool may_be_loaded(const std::array<std::uint64_t, 4>& pdptes, unsigned width) {
  for (const std::uint64_t e : pdptes) {
    if (one(e, 0) && (any(e, 1, 2) || any(e, 5, 8) || any(e, width, 63))) return false;
  }
  return true;
}

}  // namespace nested_test
