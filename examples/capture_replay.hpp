// SPDX-License-Identifier: MIT
#pragma once

// Replays captures: asks the library's walker what the capture says a processor answered, and reports the differences.
//
// Each check_* takes the capture and a report, which x86_check prints and the tests hold against zero. Here: tables of
// Linux and KVM_TRANSLATE; single accesses are in capture_access.hpp.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <mmunotify/base/address.hpp>
#include <mmunotify/secondary/x86/control_registers.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>

#include "capture_formats.hpp"

namespace capture {

namespace x86 = mmunotify::x86;

/// What a replay found.
struct report {
  std::uint64_t checked = 0;  ///< translations or accesses of the capture that were compared
  std::uint64_t holes = 0;    ///< addresses between its translations that were tried
  std::uint64_t skipped = 0;  ///< rows that it declares undecided
  std::uint64_t mismatches = 0;
  std::vector<std::string> first;  ///< the first few mismatches, in full
  std::size_t keep = 5;

  template <class... Values>
  void mismatch(const char* format, Values... values) {
    ++mismatches;
    if (first.size() >= keep) return;
    char text[400];
    if constexpr (sizeof...(Values) == 0) {
      std::snprintf(text, sizeof text, "%s", format);
    } else {
      std::snprintf(text, sizeof text, format, values...);
    }
    first.emplace_back(text);
  }
};

inline unsigned long long wide(std::uint64_t v) noexcept { return v; }

/// Calls f(std::type_identity<Mode>{}) with the policy of the mode.
template <class F>
void with_walked_mode(mode m, F&& f) {
  x86::visit_mode(paging_of(m), std::forward<F>(f));
}

/// The walker's view of captured registers; supervisor, EFLAGS.AC clear.
inline x86::walk_context context_of(const registers& r, std::uint32_t maxphyaddr) noexcept {
  const x86::control_registers all{.cr0 = r.cr0, .cr3 = r.cr3, .cr4 = r.cr4, .efer = r.efer};
  return x86::context_of(all, {.maxphyaddr = maxphyaddr});
}

/// Effects: what writing CR3 does besides: loads the PDPTEs of PAE. If they are refused none is present.
template <class Mode, class Memory>
x86::pdpte_load load_top(Memory& memory, x86::walk_context& c) noexcept {
  if constexpr (Mode::top_in_registers) {
    return x86::load_pdptes(memory, c);
  } else {
    return x86::pdpte_load::ok;
  }
}

// ---- tables of a running Linux -------------------------------------------------------------------------------------

/// What one translator says about an address, in the terms of a capture. A translator that does not know all the flags
/// clears their bits in `known`.
struct mapping {
  static constexpr std::uint16_t user = 1U << 9, writable = 1U << 10, no_execute = 1U << 15;
  static constexpr std::uint16_t all_flags = 0x87fe;

  bool mapped = false;
  std::uint64_t pa = 0;
  unsigned page_shift = 0;  ///< 0: without paging there are no pages
  std::uint16_t flags = 0;
  std::uint16_t known = all_flags;
};

/// The walker as a translator: `mapping operator()(std::uint64_t va)`.
template <class Mode>
class walker_translator {
 public:
  explicit walker_translator(const linux_tables& t) : memory_{t.ram_bytes, t.pages}, walker_{context_for(t)} {}

  mapping operator()(std::uint64_t va) const {
    const x86::walk_result r = walker_.translate(memory_, {va}, x86::access::read);
    if (!r) return {};
    if (Mode::levels == 0) return {.mapped = true, .pa = r.address.value, .known = 0};
    unsigned flags = static_cast<unsigned>(r.leaf() & 0x1fe);
    if (r.page_shift == 12) flags &= ~unsigned{x86::pte::pat_4k};
    if (r.granted.user()) flags |= mapping::user;
    if (r.granted.writable()) flags |= mapping::writable;
    if (sizeof(typename Mode::entry_type) == 8 && (r.leaf() & x86::pte::no_execute) != 0) flags |= mapping::no_execute;
    return {true, r.address.value, r.page_shift, static_cast<std::uint16_t>(flags)};
  }

 private:
  /// What is mapped, not what one access may do: supervisor reads of everything.
  x86::walk_context context_for(const linux_tables& t) const noexcept {
    x86::walk_context c = context_of(t.regs, t.maxphyaddr);
    c.smap = c.pke = c.pks = false;
    static_cast<void>(load_top<Mode>(memory_, c));  // refused: no translation is found
    return c;
  }

  guest_memory memory_;
  x86::guest_walker<Mode> walker_;
};

namespace detail {

struct span_of_pages {
  std::uint64_t first = 0, last = 0;  ///< the last byte is in it: the top page ends with the address space
};

/// The highest address of a mode; captures sign-extend those of 32 bits.
constexpr std::uint64_t last_address(mode m) noexcept { return address_bits_of(m) == 32 ? UINT32_MAX : UINT64_MAX; }

template <class Translator>
void check_translation(const translation_run& run, std::uint32_t i, Translator& translate, report& out) {
  const std::uint64_t va = run.va + i * run.va_stride, pa = run.pa + i * run.pa_stride;
  ++out.checked;
  for (const std::uint64_t offset : {std::uint64_t{0}, (std::uint64_t{1} << run.page_shift) - 1}) {
    const mapping m = translate(va + offset);
    if (!m.mapped) {
      return out.mismatch("va %#llx: expected pa %#llx, found no translation", wide(va + offset), wide(pa + offset));
    }
    const bool other_size = m.page_shift != 0 && m.page_shift != run.page_shift;
    if (m.pa != pa + offset || other_size || ((m.flags ^ run.flags) & m.known) != 0) {
      return out.mismatch(
          "va %#llx: expected pa %#llx page 2^%u flags %#x, "
          "found pa %#llx page 2^%u flags %#x (of %#x)",
          wide(va + offset), wide(pa + offset), unsigned{run.page_shift}, unsigned{run.flags}, wide(m.pa), m.page_shift,
          unsigned{m.flags}, unsigned{m.known});
    }
  }
}

inline std::vector<span_of_pages> spans_of(const linux_tables& t) {
  std::vector<span_of_pages> spans;
  for (const translation_run& run : t.runs) {
    for (std::uint32_t i = 0; i < run.count; ++i) {
      const std::uint64_t va = (run.va + i * run.va_stride) & last_address(t.mode);
      spans.push_back({va, va + ((std::uint64_t{1} << run.page_shift) - 1)});
    }
  }
  std::sort(spans.begin(), spans.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return spans;
}

}  // namespace detail

/// Every translation of the list, at both ends of its page, and the borders and middles of all gaps between them,
/// where nothing may be mapped; without paging there are no gaps. Context: the translator keeps its own copy of the
/// guest's memory.
template <class Translator>
void check_linux_capture(const linux_tables& t, Translator&& translate, report& out) {
  for (const translation_run& run : t.runs) {
    for (std::uint32_t i = 0; i < run.count; ++i) detail::check_translation(run, i, translate, out);
  }
  if (t.mode == mode::none) return;
  const auto nothing_at = [&](std::uint64_t va) {
    ++out.holes;
    const mapping m = translate(va);
    if (m.mapped) out.mismatch("va %#llx: expected no translation, found pa %#llx", wide(va), wide(m.pa));
  };
  const std::uint64_t top = detail::last_address(t.mode);
  std::uint64_t next = 0;
  bool full = false;
  for (const auto& span : detail::spans_of(t)) {
    if (span.first > next) {
      for (const std::uint64_t va : {next, next + (span.first - next) / 2, span.first - 1}) nothing_at(va);
    }
    next = span.last + 1;
    full = span.last >= top;
  }
  if (!full) nothing_at(next);
}

// ---- KVM_TRANSLATE -------------------------------------------------------------------------------------------------

/// What KVM_TRANSLATE does with the bits of an address that the mode does not use: it repeats the highest used one
/// where the processor would refuse (no check of canonical form), and hands them through where there is no paging.
template <class Mode>
std::uint64_t ask_as_kvm(const x86::guest_walker<Mode>& walker, guest_memory& memory, std::uint64_t va) {
  constexpr unsigned unused = 64 - Mode::address_bits;
  const auto extended = static_cast<std::uint64_t>(static_cast<std::int64_t>(va << unused) >> unused);
  const x86::walk_result r = walker.walk(memory, {extended}, x86::access::read);
  if (!r) return kvm_translations::none;
  return r.address.value | (Mode::levels == 0 ? va & ~std::uint64_t{UINT32_MAX} : 0);
}

/// Every answer, in order, and afterwards every word of the tables: what KVM says about a supervisor's read.
template <class Mode>
void check_kvm_translations(const kvm_translations& k, std::type_identity<Mode>, report& out) {
  guest_memory memory{k.ram_bytes, k.pages};
  x86::walk_context context = context_of(k.regs, k.maxphyaddr);
  context.gib_pages = false;
  context.amd = k.amd;
  context.pse36_bits = 36;  // KVM's 4 MiB pages have four bits more, whatever the width
  static_cast<void>(load_top<Mode>(memory, context));
  const x86::guest_walker<Mode> walker{context};
  for (const auto& [va, pa] : k.answers) {
    const std::uint64_t found = ask_as_kvm(walker, memory, va);
    ++out.checked;
    if (found != pa) out.mismatch("va %#llx: expected %#llx, found %#llx", wide(va), wide(pa), wide(found));
  }
  guest_memory expected{k.ram_bytes, k.pages};
  for (const auto& [where, value] : k.changed) {
    std::uint64_t before = 0;
    expected.read_entry({where}, before);
    if (expected.compare_exchange_entry(mmunotify::gpa{where}, before, value) != x86::exchange_result::done) {
      out.mismatch("word %#llx: it changed, and lies in no table page", wide(where));
    }
  }
  for (std::size_t p = 0; p < memory.pages().size(); ++p) {
    for (std::size_t i = 0; i < 512; ++i) {
      const std::uint64_t want = expected.pages()[p].words[i], have = memory.pages()[p].words[i];
      if (want != have) {
        out.mismatch("word %#llx: expected %#llx afterwards, found %#llx", wide(memory.pages()[p].where + 8 * i),
                     wide(want), wide(have));
      }
    }
  }
}

}  // namespace capture
