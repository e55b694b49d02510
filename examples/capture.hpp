// SPDX-License-Identifier: MIT
#pragma once

// Reads captures: page tables of real guests, with what a processor made of them (formats: tests/data/README.md).
//
// A capture may be torn, damaged or not a capture at all. Every count is held against the bytes that are there before
// anything is allocated or read, every field against the values it can have, and what is left over at the end is an
// error too: a file is read completely or refused with one sentence that names it and the reason.
//
//   auto c = capture::load("guest.bin");
//   if (!c) return std::fprintf(stderr, "%s\n", c.error.c_str()), 2;
//   if (auto* tables = std::get_if<capture::linux_tables>(&c.value)) ...

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <mmunotify/secondary/x86/entry.hpp>

#include "capture_formats.hpp"

namespace capture {

/// A value, or one sentence about why there is none.
template <class T>
struct loaded {
  T value{};
  std::string error;

  explicit operator bool() const noexcept { return error.empty(); }
};

namespace detail {

/// No real capture comes near these; they bound what a damaged one can make us allocate.
inline constexpr std::uint32_t max_pages = 1U << 16;
inline constexpr std::uint64_t max_translations = std::uint64_t{1} << 26;
inline constexpr long max_file_bytes = 1L << 28;

/// Takes little-endian values off a byte string. Past the end it yields zeros and remembers that it was asked.
class byte_reader {
 public:
  explicit byte_reader(std::span<const std::uint8_t> bytes) noexcept : left_{bytes} {}

  template <class T>
  T take() noexcept {
    static_assert(std::endian::native == std::endian::little, "the files are little-endian");
    T value{};
    if (left_.size() < sizeof(T)) {
      torn_ = true;
      left_ = {};
      return value;
    }
    std::memcpy(&value, left_.data(), sizeof(T));
    left_ = left_.subspan(sizeof(T));
    return value;
  }
  std::uint8_t u8() noexcept { return take<std::uint8_t>(); }
  std::uint16_t u16() noexcept { return take<std::uint16_t>(); }
  std::uint32_t u32() noexcept { return take<std::uint32_t>(); }
  std::uint64_t u64() noexcept { return take<std::uint64_t>(); }

  bool torn() const noexcept { return torn_; }
  std::size_t left() const noexcept { return left_.size(); }
  /// Are there `count` things of at least `bytes` bytes?
  bool holds(std::uint64_t count, std::uint64_t bytes) const noexcept { return count <= left_.size() / bytes; }

 private:
  std::span<const std::uint8_t> left_;
  bool torn_ = false;
};

inline std::string too_many(const char* what, std::uint64_t count) {
  return "it announces " + std::to_string(count) + " " + what + " and is too short for them";
}

inline std::string hex(std::uint64_t v) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

/// Each parse_* returns what is wrong, or nothing.
inline std::string check_processor(std::uint32_t raw_mode, std::uint32_t maxphyaddr, std::uint64_t ram_bytes) {
  if (raw_mode >= mode_count) return "there is no paging mode " + std::to_string(raw_mode);
  if (maxphyaddr < 32 || maxphyaddr > 52) return std::to_string(maxphyaddr) + " physical address bits are impossible";
  if (ram_bytes > std::uint64_t{1} << 52) return "the size of its memory is impossible";
  return {};
}

inline std::string parse_page(byte_reader& in, std::uint64_t ram_bytes, table_page& page) {
  page.where = in.u64();
  const std::uint32_t n = in.u16();
  if (in.torn()) return "it ends inside a table page";
  if ((page.where & 0xfff) != 0) return "the table page at " + hex(page.where) + " is not aligned";
  if (ram_bytes < 4096 || page.where > ram_bytes - 4096) {
    return "the table page at " + hex(page.where) + " is not in memory";
  }
  if (n > 512) return "the table page at " + hex(page.where) + " lists " + std::to_string(n) + " words";
  if (!in.holds(n, 10)) return "it ends inside the table page at " + hex(page.where);
  for (std::uint32_t i = 0, next = 0; i < n; ++i) {
    const std::uint32_t index = in.u16();
    if (index < next || index >= 512) return "the words of the table page at " + hex(page.where) + " are out of order";
    page.words[index] = in.u64();
    next = index + 1;
  }
  return {};
}

inline std::string parse_pages(byte_reader& in, std::uint32_t count, mode m, std::uint64_t cr3, std::uint64_t ram_bytes,
                               std::vector<table_page>& pages) {
  if (!in.holds(count, 10)) return too_many("table pages", count);
  if (count > max_pages) return "it announces " + std::to_string(count) + " table pages, which nobody has";
  for (std::uint32_t i = 0; i < count; ++i) {
    if (auto wrong = parse_page(in, ram_bytes, pages.emplace_back()); !wrong.empty()) return wrong;
  }
  const auto by_address = [](const table_page& a, const table_page& b) { return a.where < b.where; };
  if (!std::is_sorted(pages.begin(), pages.end(), by_address)) std::sort(pages.begin(), pages.end(), by_address);
  const auto twin = std::adjacent_find(pages.begin(), pages.end(),
                                       [](const table_page& a, const table_page& b) { return a.where == b.where; });
  if (twin != pages.end()) return "the table page at " + hex(twin->where) + " occurs twice";
  const std::uint64_t root = cr3 & mmunotify::x86::bit_range(12, m < mode::long_4 ? 31 : 51);
  if (m != mode::none && std::none_of(pages.begin(), pages.end(), [&](const auto& p) { return p.where == root; })) {
    return "the root table at " + hex(root) + " is missing";
  }
  return {};
}

inline registers parse_registers(byte_reader& in) {
  registers r;
  r.cr0 = in.u64();
  r.cr3 = in.u64();
  r.cr4 = in.u64();
  r.efer = in.u64();
  return r;
}

inline std::string parse_runs(byte_reader& in, std::uint32_t count, linux_tables& out) {
  if (!in.holds(count, 40)) return too_many("runs of translations", count);
  std::uint64_t total = 0;
  out.runs.reserve(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    translation_run& r = out.runs.emplace_back();
    r.va = in.u64();
    r.pa = in.u64();
    r.va_stride = in.u64();
    r.pa_stride = in.u64();
    r.count = in.u32();
    r.page_shift = in.u16();
    r.flags = in.u16();
    total += r.count;
    const bool size_known = r.page_shift == 12 || r.page_shift == 21 || r.page_shift == 22 || r.page_shift == 30;
    if (r.count == 0) return "run " + std::to_string(i) + " is empty";
    if (!size_known) return "run " + std::to_string(i) + " has pages of 2^" + std::to_string(r.page_shift) + " bytes";
    if ((r.flags & 0x7801) != 0) return "run " + std::to_string(i) + " has unknown flags " + hex(r.flags);
  }
  if (total > max_translations) return "it has " + std::to_string(total) + " translations, which nobody has";
  if (total != out.translations) {
    return "it announces " + std::to_string(out.translations) + " translations and has " + std::to_string(total);
  }
  return {};
}

/// QEMU marks the PDPTEs of PAE as accessed when it walks through them. No processor does; the bit is reserved, and
/// with it they could not be loaded.
inline void unmark_pdptes(linux_tables& t) {
  namespace x86 = mmunotify::x86;
  const std::uint64_t where = x86::pae::root(t.regs.cr3).value;
  for (table_page& p : t.pages) {
    if (p.where != (where & ~std::uint64_t{0xfff})) continue;
    for (std::size_t i = 0; i < 4; ++i) p.words[(where & 0xfff) / 8 + i] &= ~x86::pte::accessed;
  }
}

inline std::string parse(byte_reader& in, linux_tables& out) {
  const std::uint32_t raw_mode = in.u32();
  out.regs = parse_registers(in);
  out.maxphyaddr = in.u32();
  out.cpl = in.u32();
  out.ram_bytes = in.u64();
  const std::uint32_t pages = in.u32(), runs = in.u32();
  out.translations = in.u32();
  const std::uint32_t measured = in.u32();
  if (in.torn()) return "it ends inside its header";
  if (auto wrong = check_processor(raw_mode, out.maxphyaddr, out.ram_bytes); !wrong.empty()) return wrong;
  if (out.cpl > 3 || measured > 1) return "its header is damaged";
  out.mode = static_cast<mode>(raw_mode);
  out.effective_measured = measured == 1;
  auto wrong = parse_pages(in, pages, out.mode, out.regs.cr3, out.ram_bytes, out.pages);
  if (!wrong.empty()) return wrong;
  if (out.mode == mode::pae) unmark_pdptes(out);
  return parse_runs(in, runs, out);
}

inline std::string parse(byte_reader& in, kvm_translations& out) {
  const std::uint32_t raw_mode = in.u32();
  out.regs = parse_registers(in);
  out.maxphyaddr = in.u32();
  const std::uint32_t amd = in.u32();
  out.ram_bytes = in.u64();
  const std::uint32_t pages = in.u32(), answers = in.u32(), changed = in.u32(), zero = in.u32();
  if (in.torn()) return "it ends inside its header";
  if (auto wrong = check_processor(raw_mode, out.maxphyaddr, out.ram_bytes); !wrong.empty()) return wrong;
  if (amd > 1 || zero != 0) return "its header is damaged";
  out.mode = static_cast<mode>(raw_mode);
  out.amd = amd == 1;
  auto wrong = parse_pages(in, pages, out.mode, out.regs.cr3, out.ram_bytes, out.pages);
  if (!wrong.empty()) return wrong;
  if (!in.holds(answers, 16)) return too_many("translations", answers);
  out.answers.resize(answers);
  for (auto& a : out.answers) a = {in.u64(), in.u64()};
  if (!in.holds(changed, 16)) return too_many("changed words", changed);
  out.changed.resize(changed);
  for (auto& w : out.changed) {
    w = {in.u64(), in.u64()};
    if ((w.where & 7) != 0) return "the changed word at " + hex(w.where) + " is not aligned";
  }
  return {};
}

inline bool possible_outcome(std::uint16_t o) noexcept {
  if (o == access_matrix::untested) return true;
  if ((o & access_matrix::fault) != 0) return o < 2 * access_matrix::fault;
  return (o & access_matrix::done) != 0 && (o & 0x80ff) == 0;
}

inline std::string parse_outcomes(byte_reader& in, std::uint32_t runs, std::uint64_t rows,
                                  std::vector<std::uint16_t>& out) {
  if (!in.holds(runs, 3)) return too_many("runs of outcomes", runs);
  out.reserve(rows);
  for (std::uint32_t i = 0; i < runs; ++i) {
    const std::uint16_t outcome = in.u16();
    const std::uint8_t small = in.u8();
    const std::uint32_t count = small == 255 ? in.u32() : small;
    if (in.torn()) return "it ends inside a run of outcomes";
    if (!possible_outcome(outcome)) return "there is no outcome " + hex(outcome);
    if (count == 0 || count > rows - out.size()) return "run " + std::to_string(i) + " does not fit into its rows";
    out.insert(out.end(), count, outcome);
  }
  if (out.size() != rows) return "its runs end after " + std::to_string(out.size()) + " of its rows";
  return {};
}

inline std::string parse(byte_reader& in, access_matrix& out) {
  out.block = in.u32();
  const std::uint32_t raw_mode = in.u32();
  out.leaf_level = in.u32();
  out.maxphyaddr = in.u32();
  const std::uint32_t gib = in.u32(), rows = in.u32(), runs = in.u32(), bytes = in.u32();
  if (in.torn()) return "it ends inside its header";
  if (auto wrong = check_processor(raw_mode, out.maxphyaddr, 0); !wrong.empty()) return wrong;
  if (gib > 1) return "its header is damaged";
  out.mode = static_cast<mode>(raw_mode);
  out.gib_pages = gib == 1;
  std::uint64_t expected = 1;
  for (const std::uint32_t radix : matrix_radices(out.mode, out.leaf_level)) expected *= radix;
  if (expected == 0) return "there is no block with leaves at level " + std::to_string(out.leaf_level) + " in its mode";
  if (out.block != block_of(out.mode, out.leaf_level)) return "it is not block " + std::to_string(out.block);
  if (rows != expected) {
    return "its block has " + std::to_string(expected) + " rows and it announces " + std::to_string(rows);
  }
  if (bytes != in.left()) {
    return "it announces " + std::to_string(bytes) + " bytes of runs and has " + std::to_string(in.left());
  }
  return parse_outcomes(in, runs, rows, out.outcomes);
}

/// A row and its entries, as many and as wide as its mode has. Returns: false if it is damaged or torn.
inline bool parse_row(byte_reader& in, access_fuzz::row& r) {
  const std::uint8_t row_mode = in.u8();
  r.cpu = in.u8();
  r.acc = in.u8();
  const std::uint8_t status = in.u8();
  r.error_code = in.u16();
  r.newly_set = in.u16();
  r.pkru = in.u32();
  r.sources = in.u32();
  r.va = in.u64();
  r.pa = in.u64();
  if (row_mode == 0 || row_mode >= mode_count || r.cpu > 0x3f || r.acc > 7 || status > 3) return false;
  r.mode = static_cast<mode>(row_mode);
  r.status = static_cast<access_fuzz::status>(status);
  const bool wide = r.mode >= mode::pae;
  for (unsigned l = 0; l < levels_of(r.mode); ++l) r.entries[l] = wide ? in.u64() : in.u32();
  return !in.torn();
}

inline std::string parse(byte_reader& in, access_fuzz& out) {
  const std::uint32_t raw_mode = in.u32();
  out.maxphyaddr = in.u32();
  const std::uint32_t gib = in.u32(), rows = in.u32();
  out.pse36_bits = in.u32();
  const std::uint32_t zero = in.u32();
  if (in.torn()) return "it ends inside its header";
  if (auto wrong = check_processor(raw_mode, out.maxphyaddr, 0); !wrong.empty()) return wrong;
  if (gib > 1 || zero != 0 || raw_mode == 0 || out.pse36_bits > 40) return "its header is damaged";
  out.mode = static_cast<mode>(raw_mode);
  out.gib_pages = gib == 1;
  if (!in.holds(rows, 32 + 2 * 4)) return too_many("rows", rows);  // of the smallest mode; each row is checked again
  out.rows.resize(rows);
  for (std::uint32_t i = 0; i < rows; ++i) {
    if (!parse_row(in, out.rows[i])) return "row " + std::to_string(i) + " is damaged or torn";
  }
  return {};
}

inline int hex_digit(std::uint8_t c) noexcept {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/// Takes hexadecimal digits, 1 to 16 of them, and the character `end` behind them.
inline bool parse_hex(byte_reader& in, char end, std::uint64_t& value) {
  value = 0;
  for (unsigned digits = 0;; ++digits) {
    const std::uint8_t c = in.u8();
    if (in.torn()) return false;
    const int digit = hex_digit(c);
    if (digit < 0) return digits > 0 && c == static_cast<std::uint8_t>(end);
    if (digits == 16) return false;
    value = value << 4 | static_cast<std::uint64_t>(digit);
  }
}

/// Lines `va pde pa`.
inline std::string parse(byte_reader& in, pse36_translations& out) {
  constexpr std::uint64_t page = mmunotify::x86::pte::present | mmunotify::x86::pte::large;
  while (in.left() > 0) {
    std::uint64_t va = 0, pde = 0, pa = 0;
    const std::string line = "line " + std::to_string(out.rows.size() + 1);
    if (!parse_hex(in, ' ', va) || !parse_hex(in, ' ', pde) || !parse_hex(in, '\n', pa)) {
      return in.torn() ? "it ends inside " + line : line + " is not three hexadecimal numbers";
    }
    if (va > UINT32_MAX || pde > UINT32_MAX || (pde & page) != page || pa >> pse36_translations::physical_bits != 0) {
      return line + " is no translation by a 4 MiB page";
    }
    out.rows.push_back({static_cast<std::uint32_t>(va), static_cast<std::uint32_t>(pde), pa});
  }
  return {};
}

}  // namespace detail

/// Reads a capture from memory. `name` is for the error's sentence.
inline loaded<any> parse(std::span<const std::uint8_t> bytes, const std::string& name) {
  detail::byte_reader in{bytes};
  char magic[8];
  for (char& c : magic) c = static_cast<char>(in.u8());
  const auto is = [&](const char* expected) { return !in.torn() && std::memcmp(magic, expected, 8) == 0; };
  loaded<any> result;
  const auto as = [&](auto kind) {
    result.error = detail::parse(in, kind);
    if (result.error.empty() && in.torn()) result.error = "it is too short";
    if (result.error.empty() && in.left() != 0) result.error = std::to_string(in.left()) + " bytes follow its end";
    if (result.error.empty()) result.value = std::move(kind);
  };
  if (is("MMUORAC1")) {
    const std::uint32_t kind = in.u32();
    if (kind == 1) {
      as(linux_tables{});
    } else if (kind == 2) {
      as(kvm_translations{});
    } else {
      result.error = "there is no kind " + std::to_string(kind) + " of capture";
    }
  } else if (is("MMUOMTX1")) {
    as(access_matrix{});
  } else if (is("MMUOFUZ1")) {
    as(access_fuzz{});
  } else if (!bytes.empty() && detail::hex_digit(bytes.front()) >= 0) {
    in = detail::byte_reader{bytes};
    as(pse36_translations{});
  } else {
    result.error = "it does not begin like a capture";
  }
  if (!result) result.error = name + ": " + result.error;
  return result;
}

/// The bytes of a file.
inline loaded<std::vector<std::uint8_t>> read_file(const std::string& path) {
  loaded<std::vector<std::uint8_t>> result;
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file{std::fopen(path.c_str(), "rb"), &std::fclose};
  if (file == nullptr) {
    result.error = path + ": it cannot be opened: " + std::generic_category().message(errno);
    return result;
  }
  std::array<std::uint8_t, 1U << 16> chunk;
  while (const std::size_t n = std::fread(chunk.data(), 1, chunk.size(), file.get())) {
    result.value.insert(result.value.end(), chunk.data(), chunk.data() + n);
    if (result.value.size() > static_cast<std::size_t>(detail::max_file_bytes)) {
      result.error = path + ": it is too long for a capture";
      return result;
    }
  }
  if (std::ferror(file.get()) != 0)
    result.error = path + ": it cannot be read: " + std::generic_category().message(errno);
  return result;
}

/// Reads a capture from a file; the kind is found by its first bytes.
inline loaded<any> load(const std::string& path) {
  auto bytes = read_file(path);
  if (bytes) return parse(bytes.value, path);
  loaded<any> result;
  result.error = bytes.error;
  return result;
}

}  // namespace capture
