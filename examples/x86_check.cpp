// SPDX-License-Identifier: MIT

// x86_check FILE...: does the library see in captured page tables what the processor saw?
//
// Reads captures (formats: tests/data/README.md; the kind is found by the first bytes), asks the page walker what each
// one answers, for the tables of a Linux guest the shadow MMU as well, and prints one line per file, with the first
// mismatches in full.
// Exit status: 0 all agree, 1 something does not, 2 a file cannot be read.

#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <variant>

#include "capture.hpp"
#include "capture_access.hpp"
#include "capture_replay.hpp"
#include "shadow_translator.hpp"

namespace {

enum verdict : int { agrees = 0, differs = 1, unusable = 2 };

/// Through the shadow MMU.
template <class Mode>
void check_shadow(const capture::linux_tables& t, std::type_identity<Mode>, capture::report& out) {
  capture::shadow_translator<Mode> shadow{t};
  if (!shadow) return out.mismatch("the shadow MMU cannot be set up for this guest");
  capture::report shadowed;
  capture::check_linux_capture(t, shadow, shadowed);
  if (const char* broken = shadow.verify(); broken != nullptr) shadowed.mismatch("broken: %s", broken);
  out.mismatches += shadowed.mismatches;
  for (const std::string& line : shadowed.first) out.first.push_back("shadow MMU: " + line);
}

/// Linux's tables twice: by the walker, and through the shadow MMU.
void check(const capture::linux_tables& t, capture::report& out) {
  capture::with_walked_mode(t.mode, [&]<class Mode>(std::type_identity<Mode> mode) {
    capture::check_linux_capture(t, capture::walker_translator<Mode>{t}, out);
    check_shadow(t, mode, out);
  });
}
void check(const capture::kvm_translations& k, capture::report& out) {
  capture::with_walked_mode(k.mode, [&](auto mode) { capture::check_kvm_translations(k, mode, out); });
}
void check(const capture::access_matrix& m, capture::report& out) { capture::check_matrix(m, out); }
void check(const capture::access_fuzz& f, capture::report& out) { capture::check_fuzz(f, out); }
void check(const capture::pse36_translations& p, capture::report& out) { capture::check_pse36(p, out); }

template <class Capture>
verdict check_capture(const char* path, const Capture& c) {
  capture::report found;
  check(c, found);
  std::printf("%s: %llu translations, %llu mismatches\n", path, capture::wide(found.checked),
              capture::wide(found.mismatches));
  for (const std::string& line : found.first) std::printf("  %s\n", line.c_str());
  if (found.mismatches > found.first.size()) {
    std::printf("  and %llu more\n", capture::wide(found.mismatches - found.first.size()));
  }
  return found.mismatches == 0 ? agrees : differs;
}

verdict check_file(const char* path) {
  const auto loaded = capture::load(path);
  if (!loaded) {
    std::fprintf(stderr, "x86_check: %s\n", loaded.error.c_str());
    return unusable;
  }
  return std::visit(
      [&]<class Capture>(const Capture& c) {
        if constexpr (std::is_same_v<Capture, std::monostate>) {
          return unusable;
        } else {
          return check_capture(path, c);
        }
      },
      loaded.value);
}

constexpr const char usage[] =
    "usage: x86_check FILE...\n"
    "\n"
    "Walks captured x86 page tables with the library's page walker, and those of Linux guests through its shadow MMU\n"
    "too, and compares the results with what the processor answered. FILE is a capture of a Linux guest's tables, of "
    "KVM_TRANSLATE, a block of the access matrix, a file of random accesses or a list of\n"
    "PSE-36 translations, as in tests/data/x86 (formats: tests/data/README.md), of any paging mode.\n"
    "\n"
    "Exit status: 0 everything agrees, 1 there are mismatches, 2 a file cannot be used (the others still are).\n";

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0) return std::fputs(usage, stdout) < 0 ? unusable : agrees;
  }
  if (argc < 2) {
    std::fputs(usage, stderr);
    return unusable;
  }
  int worst = agrees;
  for (int i = 1; i < argc; ++i) {
    const int v = check_file(argv[i]);
    worst = v > worst ? v : worst;
  }
  return worst;
}
