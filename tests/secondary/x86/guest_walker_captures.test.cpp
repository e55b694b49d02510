// SPDX-License-Identifier: MIT

// The walker against what processors answered (data: tests/data/README.md), every file of every kind, and the same with
// a rule taken away, which has to be noticed.

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <mmunotify/secondary/x86/control_registers.hpp>

#include "capture.hpp"
#include "capture_access.hpp"
#include "capture_replay.hpp"

using namespace mmunotify;
namespace pte = x86::pte;
using capture::access_case;

namespace {

const std::string data = MMUNOTIFY_TEST_DATA "/x86/";

/// The files of a folder whose names end so, in order.
std::vector<std::string> files(const std::string& folder, const std::string& end) {
  std::vector<std::string> names;
  for (const auto& f : std::filesystem::directory_iterator(data + folder)) {
    if (f.path().string().ends_with(end)) names.push_back(folder + "/" + f.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

template <class Capture>
Capture capture_file(const std::string& name) {
  auto loaded = capture::load(data + name);
  REQUIRE_MESSAGE(loaded, loaded.error);
  Capture* c = std::get_if<Capture>(&loaded.value);
  REQUIRE(c != nullptr);
  return std::move(*c);
}

void expect_agreement(const std::string& name, const capture::report& r) {
  std::string lines;
  for (const auto& line : r.first) lines += "\n  " + line;
  CHECK_MESSAGE(r.mismatches == 0, name, ": ", r.mismatches, " of ", r.checked, lines);
}

/// Mismatches if each case is tampered with before it is walked.
template <class Tamper>
std::uint64_t matrix_mismatches(const std::string& block, Tamper tamper) {
  capture::report r;
  const auto m = capture_file<capture::access_matrix>("access_matrix/block" + block + ".agreed.rle");
  capture::check_matrix(m, r, tamper, m.outcomes.size() > 100'000 ? 17 : 1);  // no divisor of a digit's count
  return r.mismatches;
}
template <class Tamper>
std::uint64_t fuzz_mismatches(const std::string& name, Tamper tamper) {
  capture::report r;
  capture::check_fuzz(capture_file<capture::access_fuzz>("access_fuzz/fuzz_" + name + ".bin"), r, tamper);
  return r.mismatches;
}

}  // namespace

TEST_CASE("every translation of captured Linux guests is found, and nothing in between, in five modes") {
  std::uint64_t translations = 0, holes = 0;
  unsigned modes = 0;
  for (const std::string& name : files("linux", ".bin")) {
    const auto t = capture_file<capture::linux_tables>(name);
    capture::report r;
    capture::with_walked_mode(t.mode, [&]<class Mode>(std::type_identity<Mode>) {
      capture::check_linux_capture(t, capture::walker_translator<Mode>{t}, r);
    });
    expect_agreement(name, r);
    CHECK(r.checked == t.translations);
    translations += r.checked;
    holes += r.holes;
    modes |= 1U << static_cast<unsigned>(t.mode);
  }
  CHECK(translations == 479'581);
  CHECK(modes == 0b111110);
  MESSAGE(translations, " translations, ", holes, " addresses without one");
}

TEST_CASE("a capture without paging maps every address to itself and has no gaps") {
  capture::linux_tables t;
  t.ram_bytes = 1U << 24;
  t.maxphyaddr = 40;
  t.translations = 3;
  t.runs = {{.va = 0x1000, .pa = 0x1000, .va_stride = 0x1000, .pa_stride = 0x1000, .count = 2, .page_shift = 12},
            {.va = 0x9000, .pa = 0x8000, .count = 1, .page_shift = 12}};
  capture::report r;
  capture::check_linux_capture(t, capture::walker_translator<x86::no_paging>{t}, r);
  CHECK(r.checked == 3);
  CHECK(r.holes == 0);
  CHECK(r.mismatches == 1);
}

TEST_CASE("walks of captured Linux guests set what is missing and find nothing missing the second time") {
  for (const std::string& name : files("linux", "_0.bin")) {
    const auto t = capture_file<capture::linux_tables>(name);
    capture::with_walked_mode(t.mode, [&]<class Mode>(std::type_identity<Mode>) {
      capture::guest_memory memory{t.ram_bytes, t.pages};
      x86::walk_context c = capture::context_of(t.regs, t.maxphyaddr);
      c.smap = c.pke = c.wp = false;
      REQUIRE(capture::load_top<Mode>(memory, c) == x86::pdpte_load::ok);
      const x86::guest_walker<Mode> w{c};
      unsigned wrong = 0;
      for (const auto& run : t.runs) {
        const auto first = w.walk(memory, {run.va}, x86::access::write);
        const auto second = w.translate(memory, {run.va}, x86::access::write);
        if (!first || !second || first.address != second.address || first.leaf() != second.leaf()) ++wrong;
        if (!second.dirty() || (second.leaf() & pte::accessed) == 0) ++wrong;
        for (unsigned level = first.end_level; level <= Mode::levels; ++level) {
          if (!w.unchanged(memory, first, level)) ++wrong;
        }
      }
      CHECK_MESSAGE(wrong == 0, name);
    });
  }
}

TEST_CASE("the captured registers say the mode that their files say") {
  for (const std::string& name : files("linux", ".bin")) {
    const auto t = capture_file<capture::linux_tables>(name);
    const x86::control_registers r{.cr0 = t.regs.cr0, .cr3 = t.regs.cr3, .cr4 = t.regs.cr4, .efer = t.regs.efer};
    CHECK_MESSAGE(x86::mode_of(r) == capture::paging_of(t.mode), name);
    CHECK_MESSAGE(x86::check_registers(r, {.maxphyaddr = t.maxphyaddr}) == errc::ok, name);
  }
  for (const std::string& name : files("kvm_translate", ".bin")) {
    const auto k = capture_file<capture::kvm_translations>(name);
    const x86::control_registers r{.cr0 = k.regs.cr0, .cr3 = k.regs.cr3, .cr4 = k.regs.cr4, .efer = k.regs.efer};
    CHECK_MESSAGE(x86::mode_of(r) == capture::paging_of(k.mode), name);
    CHECK_MESSAGE(x86::check_registers(r, {.maxphyaddr = k.maxphyaddr}) == errc::ok, name);
  }
}

TEST_CASE("KVM's translations of random tables are found, and the same accessed bits are set") {
  std::uint64_t translations = 0, changed = 0;
  for (const std::string& name : files("kvm_translate", ".bin")) {
    const auto k = capture_file<capture::kvm_translations>(name);
    capture::report r;
    capture::with_walked_mode(k.mode, [&](auto mode) { capture::check_kvm_translations(k, mode, r); });
    expect_agreement(name, r);
    CHECK(r.checked == k.answers.size());
    translations += r.checked;
    changed += k.changed.size();
  }
  CHECK(translations == 16'000);
  CHECK(changed == 1'277);
}

TEST_CASE("a word that KVM changed outside the table pages is a mismatch") {
  auto k = capture_file<capture::kvm_translations>("kvm_translate/kvmtr_lm4_nx1_phy40_smap1_intel.bin");
  k.changed.push_back({0x8000'0000, 1});
  capture::report r;
  capture::check_kvm_translations(k, std::type_identity<x86::long_mode_4>{}, r);
  CHECK(r.mismatches == 1);
}

TEST_CASE("every combination of settings, entries and accesses has the outcome that processors gave it") {
  std::uint64_t rows = 0, skipped = 0;
  for (const std::string& name : files("access_matrix", ".rle")) {
    const auto m = capture_file<capture::access_matrix>(name);
    capture::report r;
    capture::check_matrix(m, r);
    expect_agreement(name, r);
    CHECK(r.checked + r.skipped == m.outcomes.size());
    rows += r.checked;
    skipped += r.skipped;
  }
  CHECK(rows == 6'218'592);
  CHECK(skipped == 10'176);
}

TEST_CASE("random chains of entries have the outcome that processors gave them, in five modes and six address widths") {
  std::uint64_t rows = 0;
  for (const std::string& name : files("access_fuzz", ".bin")) {
    const auto f = capture_file<capture::access_fuzz>(name);
    capture::report r;
    capture::check_fuzz(f, r);
    expect_agreement(name, r);
    rows += r.checked;
  }
  CHECK(rows == 37'343);
}

TEST_CASE("4 MiB pages above 4 GiB are where QEMU found them") {
  const auto p = capture_file<capture::pse36_translations>("access_fuzz/pse36.txt");
  capture::report r;
  capture::check_pse36(p, r);
  expect_agreement("pse36.txt", r);
  CHECK(r.checked == 200);
  capture::report without;
  capture::check_pse36(p, without, [](access_case& c) { c.context.pse36_bits = 32; });
  CHECK(without.mismatches == 200);
  capture::report narrower;
  capture::check_pse36(p, narrower, [](access_case& c) { c.context.maxphyaddr = 33; });
  CHECK(narrower.mismatches > 10);
}

TEST_CASE("the captured outcomes notice each setting that is taken away, in each mode that has it") {
  const auto notices = [](const char* blocks, auto tamper) {
    for (const char* b = blocks; *b != 0; ++b) CHECK_MESSAGE(matrix_mismatches(std::string(1, *b), tamper) > 10, *b);
  };
  notices("02346", [](access_case& c) { c.context.smep = false; });
  notices("02346", [](access_case& c) { c.context.smap = false; });
  notices("02346", [](access_case& c) { c.context.ac = false; });
  notices("02346", [](access_case& c) { c.context.wp = true; });
  notices("02346", [](access_case& c) { c.context.cpl = 0; });
  notices("02346", [](access_case& c) { c.how = x86::access::read; });
  notices("346", [](access_case& c) { c.context.nxe = true; });
  notices("346", [](access_case& c) { c.context.maxphyaddr = 52; });
  notices("6", [](access_case& c) { c.context.pke = false; });
  notices("2", [](access_case& c) { c.context.pse = false; });
  notices("2", [](access_case& c) { c.context.pse36_bits = 40, c.entries[1] &= ~std::uint64_t{1 << 21}; });
}

TEST_CASE("the random chains notice each property of the processor that is another") {
  CHECK(fuzz_mismatches("lm4", [](access_case& c) { c.context.gib_pages = false; }) > 0);
  CHECK(fuzz_mismatches("lm4", [](access_case& c) { c.context.amd = true; }) > 0);
  CHECK(fuzz_mismatches("lm4_kvm_phy36", [](access_case& c) { ++c.context.maxphyaddr; }) > 0);
  CHECK(fuzz_mismatches("leg32", [](access_case& c) { c.context.pse = true; }) > 0);
  CHECK(fuzz_mismatches("pse32", [](access_case& c) { c.context.pse = false; }) > 0);
  CHECK(fuzz_mismatches("pse32", [](access_case& c) { c.context.pse36_bits = 36; }) > 0);
  CHECK(fuzz_mismatches("pae", [](access_case& c) { c.context.maxphyaddr = 52; }) > 0);
  CHECK(fuzz_mismatches("pae", [](access_case& c) { c.entries[2] &= ~pte::accessed; }) > 0);
}
