// SPDX-License-Identifier: MIT
#pragma once

// What captures contain (formats: tests/data/README.md), and the guest memory that one describes.

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <variant>
#include <vector>

#include <mmunotify/base/address.hpp>
#include <mmunotify/secondary/x86/control_registers.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>

namespace capture {

/// The numbers are those in the files.
enum class mode : std::uint32_t { none, two_level, two_level_pse, pae, long_4, long_5 };

inline constexpr std::uint32_t mode_count = 6;

constexpr const char* to_string(mode m) noexcept {
  constexpr const char* names[mode_count] = {"no paging", "two levels", "two levels with PSE",
                                             "PAE",       "4 levels",   "5 levels"};
  return names[static_cast<std::uint32_t>(m) % mode_count];
}

/// The number of levels, which is that of the root; 0 without paging.
constexpr unsigned levels_of(mode m) noexcept {
  constexpr unsigned levels[mode_count] = {0, 2, 2, 3, 4, 5};
  return levels[static_cast<std::uint32_t>(m) % mode_count];
}

/// The library's name for it.
constexpr mmunotify::x86::paging paging_of(mode m) noexcept {
  using mmunotify::x86::paging;
  constexpr paging names[mode_count] = {paging::none, paging::two_level, paging::two_level,
                                        paging::pae,  paging::long_4,    paging::long_5};
  return names[static_cast<std::uint32_t>(m) % mode_count];
}

/// How many bits a linear address has.
constexpr unsigned address_bits_of(mode m) noexcept { return m == mode::long_4 ? 48 : m == mode::long_5 ? 57 : 32; }

struct registers {
  std::uint64_t cr0 = 0, cr3 = 0, cr4 = 0, efer = 0;
};

/// A page of guest memory that is used as a table, as 512 little-endian words.
struct table_page {
  std::uint64_t where = 0;
  std::array<std::uint64_t, 512> words{};
};

/// `count` translations at regular distances: va + i * va_stride -> pa + i * pa_stride, modulo 2^64.
struct translation_run {
  std::uint64_t va = 0, pa = 0, va_stride = 0, pa_stride = 0;
  std::uint32_t count = 0;
  std::uint16_t page_shift = 0;
  std::uint16_t flags = 0;  ///< leaf bits 1..8; 9: user and 10: writable over all levels; 15: NX of the leaf
};

/// The tables of a running Linux, and everything that they map.
struct linux_tables {
  capture::mode mode{};
  registers regs;
  std::uint32_t maxphyaddr = 0, cpl = 0;
  std::uint64_t ram_bytes = 0;
  std::uint32_t translations = 0;
  bool effective_measured = false;  ///< flags 9 and 10 were measured, not computed
  std::vector<table_page> pages;    ///< ascending
  std::vector<translation_run> runs;
};

/// Tables filled at random, and what KVM translates with them.
struct kvm_translations {
  static constexpr std::uint64_t none = ~std::uint64_t{0};
  struct answer {
    std::uint64_t va = 0, pa = 0;  ///< pa: none if there is no translation
  };
  struct word {
    std::uint64_t where = 0, value = 0;
  };
  capture::mode mode{};
  registers regs;
  std::uint32_t maxphyaddr = 0;
  bool amd = false;
  std::uint64_t ram_bytes = 0;
  std::vector<table_page> pages;  ///< ascending; before the translations
  std::vector<answer> answers;
  std::vector<word> changed;  ///< every word that is different after all translations
};

/// Every combination of settings, entries and accesses, and its outcome.
struct access_matrix {
  static constexpr std::uint16_t untested = 0xfffd;
  static constexpr std::uint16_t fault = 1U << 6;  ///< bits 0..5: error code
  static constexpr std::uint16_t done = 1U << 14;  ///< bits 8..12: A newly set at levels 1..5; 13: D in the leaf
  std::uint32_t block = 0;
  capture::mode mode{};
  std::uint32_t leaf_level = 0, maxphyaddr = 0;
  bool gib_pages = false;
  std::vector<std::uint16_t> outcomes;  ///< by row
};

/// Random chains of entries, one access each.
struct access_fuzz {
  enum class status : std::uint8_t { done, page_fault, general_protection, bad_pdpte };
  static constexpr std::uint64_t unmeasured = ~std::uint64_t{0};
  struct row {
    capture::mode mode{};
    std::uint8_t cpu = 0;  ///< bits: 0 WP, 1 NXE, 2 SMEP, 3 SMAP, 4 PKE, 5 EFLAGS.AC
    std::uint8_t acc = 0;  ///< bits 0..1: read, write, fetch, implicit read; bit 2: CPL 3
    access_fuzz::status status{};
    std::uint16_t error_code = 0;
    std::uint16_t newly_set = 0;  ///< bit l-1: A of level l; bit 4+l: D of level l
    std::uint32_t pkru = 0, sources = 0;
    std::uint64_t va = 0, pa = 0;
    std::array<std::uint64_t, 5> entries{};  ///< [level-1]
  };
  capture::mode mode{};
  std::uint32_t maxphyaddr = 0;
  bool gib_pages = false;
  std::uint32_t pse36_bits = 0;
  std::vector<row> rows;
};

/// Translations by 4 MiB pages that lie above 4 GiB.
struct pse36_translations {
  struct row {
    std::uint32_t va = 0, pde = 0;
    std::uint64_t pa = 0;
  };
  static constexpr unsigned physical_bits = 40;  ///< of the processor that was asked
  std::vector<row> rows;
};

using any =
    std::variant<std::monostate, linux_tables, kvm_translations, access_matrix, access_fuzz, pse36_translations>;

/// The number of the block of a mode and leaf level; block_count if there is none.
inline constexpr std::uint32_t block_count = 11;
constexpr std::uint32_t block_of(mode m, std::uint32_t leaf_level) noexcept {
  constexpr struct {
    capture::mode m;
    std::uint32_t leaf;
  } blocks[block_count] = {{mode::two_level, 1}, {mode::two_level_pse, 1}, {mode::two_level_pse, 2}, {mode::pae, 1},
                           {mode::pae, 2},       {mode::long_4, 1},        {mode::long_4, 2},        {mode::long_4, 3},
                           {mode::long_5, 1},    {mode::long_5, 2},        {mode::long_5, 3}};
  for (std::uint32_t i = 0; i < block_count; ++i) {
    if (blocks[i].m == m && blocks[i].leaf == leaf_level) return i;
  }
  return block_count;
}

/// How many values each digit of a matrix row has, the least significant first: protection keys, SMAP with AC, SMEP,
/// NXE, WP, access, leaf, parent, top. All zero if there is no such block.
constexpr std::array<std::uint32_t, 9> matrix_radices(mode m, std::uint32_t leaf_level) noexcept {
  const bool long_mode = m == mode::long_4 || m == mode::long_5, wide = long_mode || m == mode::pae;
  const unsigned root = levels_of(m);
  if (block_of(m, leaf_level) == block_count) return {};
  const std::uint32_t leaf = wide ? 30 : leaf_level == 1 ? 13 : 18;
  const bool pdpte_parent = m == mode::pae && leaf_level == 2;
  const std::uint32_t parent = leaf_level == root ? 1 : !wide ? 5 : pdpte_parent ? 2 : 11;
  const std::uint32_t top = root <= leaf_level + 1 ? 1 : long_mode ? 6 : 2;
  return {long_mode ? 4U : 1U, 3, 2, wide ? 2U : 1U, 2, 8, leaf, parent, top};
}

/// Guest memory of a capture: the table pages are there, the rest of the RAM reads as zero, and beyond it is nothing.
/// For one thread. Models x86::guest_memory for 4- and 8-byte entries.
class guest_memory {
 public:
  /// Preconditions: the pages are aligned, distinct and ascending, as the reader delivers them.
  guest_memory(std::uint64_t ram_bytes, std::vector<table_page> pages)
      : ram_bytes_{ram_bytes}, pages_{std::move(pages)} {}

  template <class Entry>
  bool read_entry(mmunotify::gpa where, Entry& value) const noexcept {
    value = 0;
    if (where.value >= ram_bytes_) return false;
    const std::size_t page = find(where);
    if (page < pages_.size()) std::memcpy(&value, bytes_of(pages_[page]) + where.offset(), sizeof value);
    return true;
  }

  template <class Entry>
  mmunotify::x86::exchange_result compare_exchange_entry(mmunotify::gpa where, Entry expected, Entry desired) noexcept {
    using mmunotify::x86::exchange_result;
    Entry now{};
    if (!read_entry(where, now)) return exchange_result::failed;
    if (now != expected) return exchange_result::changed;
    const std::size_t page = find(where);
    if (page == pages_.size()) return exchange_result::read_only;
    std::memcpy(bytes_of(pages_[page]) + where.offset(), &desired, sizeof desired);
    return exchange_result::done;
  }

  std::uint64_t ram_bytes() const noexcept { return ram_bytes_; }
  const std::vector<table_page>& pages() const noexcept { return pages_; }  ///< ascending

 private:
  /// The index of the page, or pages_.size().
  std::size_t find(mmunotify::gpa where) const noexcept {
    const auto at = std::lower_bound(pages_.begin(), pages_.end(), where.page().value,
                                     [](const table_page& p, std::uint64_t a) { return p.where < a; });
    const bool found = at != pages_.end() && at->where == where.page().value;
    return found ? static_cast<std::size_t>(at - pages_.begin()) : pages_.size();
  }
  static char* bytes_of(table_page& page) noexcept { return reinterpret_cast<char*>(page.words.data()); }
  static const char* bytes_of(const table_page& page) noexcept {
    return reinterpret_cast<const char*>(page.words.data());
  }

  std::uint64_t ram_bytes_;
  std::vector<table_page> pages_;
};

static_assert(mmunotify::x86::guest_memory<guest_memory, std::uint64_t> &&
              mmunotify::x86::guest_memory<guest_memory, std::uint32_t>);

}  // namespace capture
