// SPDX-License-Identifier: MIT
#pragma once

// A second walker, for comparison: the rules of the manual written down one after the other, for all modes in one
// function, with none of the library's code but its plain types. It sees one entry per level and is in no hurry.

#include <array>
#include <cstdint>

#include <mmunotify/secondary/x86/access.hpp>

namespace walk_test {

/// The number of levels says the mode: 0 none, 2 two-level, 3 PAE, 4, 5.
struct reference_case {
  mmunotify::x86::walk_context c;
  mmunotify::x86::access how{};
  std::uint64_t va = 0;
  unsigned levels = 0;
  std::array<std::uint64_t, 5> entries{};  ///< [level-1]
};

struct reference_outcome {
  enum kind { done, page_fault, general_protection, bad_pdpte };
  kind what = done;
  std::uint32_t code = 0;
  std::uint64_t pa = 0;
  unsigned leaf_level = 0;
  std::array<std::uint64_t, 5> entries{};  ///< afterwards
};

class reference_walk {
 public:
  explicit reference_walk(const reference_case& k) : k_(k), c_(k.c) { o_.entries = k.entries; }

  reference_outcome run() {
    if (k_.levels == 0) return done(k_.va & 0xffffffff);
    if (k_.levels == 3 && one(k_.entries[2], 0) && pdpte_is_bad(k_.entries[2]))
      return end(reference_outcome::bad_pdpte);
    if (k_.levels >= 4 && !canonical()) return end(reference_outcome::general_protection);
    bool w = true, u = true, nx = false;
    for (unsigned level = k_.levels; level > 0; --level) {
      const std::uint64_t e = k_.entries[level - 1];
      if (!one(e, 0)) return fault(0);
      const bool pdpte = k_.levels == 3 && level == 3;
      const bool leaf = level == 1 || (!pdpte && is_large(e, level));
      if (!pdpte && reserved(e, level, leaf)) return fault(1 | 8);
      if (!pdpte) {
        w = w && one(e, 1);
        u = u && one(e, 2);
        nx = nx || (k_.levels > 2 && c_.nxe && one(e, 63));
      }
      if (!leaf) continue;
      if (forbidden(w, u, nx) || key_forbids(e, u)) return fault(1 | (key_forbids(e, u) ? 32U : 0U));
      return mark_and_finish(e, level);
    }
    return o_;
  }

 private:
  static bool one(std::uint64_t e, unsigned n) { return (e >> n & 1) != 0; }
  static bool any(std::uint64_t e, unsigned first, unsigned last) {
    for (unsigned n = first; n <= last; ++n) {
      if (one(e, n)) return true;
    }
    return false;
  }
  bool implicit() const {
    using mmunotify::x86::access;
    return k_.how == access::implicit_read || k_.how == access::implicit_write;
  }
  bool write() const {
    using mmunotify::x86::access;
    return k_.how == access::write || k_.how == access::implicit_write;
  }
  bool fetch() const { return k_.how == mmunotify::x86::access::fetch; }
  bool user() const { return c_.cpl == 3 && !implicit(); }

  bool canonical() const {
    const unsigned highest = k_.levels == 4 ? 47 : 56;
    for (unsigned n = highest; n < 63; ++n) {
      if (one(k_.va, n) != one(k_.va, 63)) return false;
    }
    return true;
  }
  bool pdpte_is_bad(std::uint64_t e) const { return any(e, 1, 2) || any(e, 5, 8) || any(e, c_.maxphyaddr, 63); }

  bool is_large(std::uint64_t e, unsigned level) const {
    if (!one(e, 7)) return false;
    if (k_.levels == 2) return c_.pse;
    if (level == 2) return true;
    return level == 3 && c_.gib_pages;
  }
  bool reserved(std::uint64_t e, unsigned level, bool leaf) const {
    if (k_.levels == 2) {
      if (level == 1 || !leaf) return false;
      const unsigned width = c_.pse36_bits < c_.maxphyaddr ? c_.pse36_bits : c_.maxphyaddr;
      for (unsigned n = 13; n <= 21; ++n) {
        if (one(e, n) && (n == 21 || n + 19 >= width)) return true;
      }
      return false;
    }
    if (any(e, c_.maxphyaddr, 51)) return true;
    if (k_.levels == 3 && any(e, 52, 62)) return true;
    if (!c_.nxe && one(e, 63)) return true;
    if (level >= 4 && (one(e, 7) || (c_.amd && one(e, 8)))) return true;
    if (level == 3 && one(e, 7) && !c_.gib_pages) return true;
    if (leaf && level == 2) return any(e, 13, 20);
    return leaf && level == 3 && any(e, 13, 29);
  }

  bool forbidden(bool w, bool u, bool nx) const {
    if (user() && !u) return true;
    if (write() && !w && (user() || c_.wp)) return true;
    if (fetch()) return nx || (!user() && u && c_.smep);
    return !user() && u && c_.smap && (implicit() || !c_.ac);
  }
  bool key_forbids(std::uint64_t leaf, bool u) const {
    if (k_.levels < 4 || fetch() || !(u ? c_.pke : c_.pks)) return false;
    const unsigned key = static_cast<unsigned>(leaf >> 59 & 15);
    const std::uint32_t rights = u ? c_.pkru : c_.pkrs;
    if (one(rights, 2 * key)) return true;
    return one(rights, 2 * key + 1) && write() && (user() || c_.wp);
  }

  reference_outcome end(reference_outcome::kind what) {
    o_.what = what;
    return o_;
  }
  reference_outcome fault(std::uint32_t why) {
    o_.code = why | (write() ? 2U : 0U) | (user() ? 4U : 0U);
    if (fetch() && (c_.smep || (c_.nxe && k_.levels > 2))) o_.code |= 16;
    return end(reference_outcome::page_fault);
  }
  reference_outcome done(std::uint64_t pa) {
    o_.pa = pa;
    return end(reference_outcome::done);
  }
  reference_outcome mark_and_finish(std::uint64_t leaf, unsigned level) {
    for (unsigned l = level; l <= k_.levels; ++l) {
      if (k_.levels == 3 && l == 3) continue;
      o_.entries[l - 1] |= 32;
    }
    if (write()) o_.entries[level - 1] |= 64;
    o_.leaf_level = level;
    const unsigned shift = level == 1 ? 12 : k_.levels == 2 ? 22 : level == 2 ? 21 : 30;
    std::uint64_t base = 0;
    for (unsigned n = shift; n < 52; ++n) {
      if (one(leaf, n)) base |= std::uint64_t{1} << n;
    }
    if (k_.levels == 2 && level == 2) base |= (leaf >> 13 & 0xff) << 32;
    return done(base | (k_.va & ((std::uint64_t{1} << shift) - 1)));
  }

  const reference_case& k_;
  const mmunotify::x86::walk_context& c_;
  reference_outcome o_;
};

}  // namespace walk_test
