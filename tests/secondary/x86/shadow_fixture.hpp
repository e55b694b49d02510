// SPDX-License-Identifier: MIT
#pragma once

// A host, a guest and their tables for the tests of the shadow MMU: everything happens when the test says so.
//
// scripted_host lends frames with numbers that mean nothing to anybody else; what pin() does besides is a script of the
// test's, which can run whole brackets in the middle of a fault. guest_ram builds guest page tables.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <mmunotify/secondary/x86/shadow_mmu.hpp>

namespace shadow_test {

using namespace mmunotify;
using x86::access;
using x86::outcome;
namespace pte = x86::pte;

inline constexpr hva ram_base{0x7f0000000000};
inline constexpr std::uint64_t rw = pte::present | pte::writable;
inline constexpr std::uint64_t rwu = rw | pte::user;
inline constexpr std::uint64_t used = pte::accessed | pte::dirty;

/// A primary without tables of its own: the test is the primary.
class scripted_host {
 public:
  struct alignas(4096) frame {
    std::array<std::byte, page_size> bytes{};
  };

  /// Runs in pin(), after the lease was decided: what happens while a fault looks its page up.
  std::function<void(hva, bool)> during_pin;
  /// Runs at the beginning of unpin().
  std::function<void()> during_unpin;
  /// What pin() answers for a page, if not ok.
  std::map<std::uint64_t, errc> refuses;
  /// Pages that are lent for reading only.
  std::map<std::uint64_t, bool> read_only;

  frame_lease pin(hva a, bool write) noexcept {
    const std::uint64_t page = a.page().value;
    frame_lease lease = decide(page, write);
    if (lease) ++pins[lease.frame.value];
    if (during_pin) {
      const auto script = std::exchange(during_pin, nullptr);  // a script does not run inside itself
      script(a.page(), write);
      if (!during_pin) during_pin = keep ? script : nullptr;
    }
    return lease;
  }
  void unpin(pfn f) noexcept {
    if (during_unpin) during_unpin();
    --pins[f.value];
  }
  std::byte* data(pfn f) noexcept {
    const auto at = frames.find(f.value);
    return at == frames.end() ? nullptr : at->second->bytes.data();
  }

  /// The page gets a frame, zeroed, with a number that nobody could guess.
  pfn place(hva page) {
    const std::uint64_t number = next_number;
    next_number += 0x1003;
    frames[number] = std::make_unique<frame>();
    pages[page.value] = number;
    return {number};
  }
  /// The contents move to another frame; the old one is filled with nonsense and kept, so that stale use shows.
  pfn migrate(hva page) {
    const std::uint64_t old = pages.at(page.value);
    const pfn fresh = place(page);
    frames[fresh.value]->bytes = frames[old]->bytes;
    frames[old]->bytes.fill(std::byte{0x6b});
    return fresh;
  }
  /// Aligned frames with consecutive numbers for 2^shift bytes; those that are `touched` (from the first on) exist.
  void place_run(hva first, unsigned shift, std::uint64_t touched) {
    const std::uint64_t n = std::uint64_t{1} << (shift - page_shift);
    next_number = (next_number + 2 * n) & ~(n - 1);
    for (std::uint64_t i = 0; i < n && i < touched; ++i) frames[next_number + i] = std::make_unique<frame>();
    for (std::uint64_t i = 0; i < n && i < touched; ++i) pages[first.value + i * page_size] = next_number + i;
    next_number += n;
    runs[first.value] = shift;
  }
  /// The run falls apart: its frames stay, but may be replaced one by one.
  void split_run(hva first) { runs.erase(first.value); }

  unsigned mapping_shift(hva a) noexcept {
    for (const unsigned shift : {30U, 21U}) {
      const auto run = runs.find(a.value >> shift << shift);
      if (run != runs.end() && run->second == shift) return shift;
    }
    return page_shift;
  }

  void remove(hva page) { pages.erase(page.value); }
  pfn at(hva page) const { return {pages.at(page.value)}; }
  bool has(hva page) const { return pages.count(page.value) != 0; }
  std::byte* bytes(hva a) { return frames.at(pages.at(a.page().value))->bytes.data() + a.offset(); }

  /// Frames on loan.
  long on_loan() const {
    long n = 0;
    for (const auto& [number, count] : pins) n += count;
    return n;
  }

  bool keep = false;  ///< the script runs at every pin, not only at the next
  std::map<std::uint64_t, std::unique_ptr<frame>> frames;
  std::map<std::uint64_t, std::uint64_t> pages;  ///< host page -> frame
  std::map<std::uint64_t, unsigned> runs;        ///< first host page of a run -> its shift
  std::map<std::uint64_t, long> pins;
  std::uint64_t next_number = 0xabcde;

 protected:
  frame_lease decide(std::uint64_t page, bool write) {
    if (const auto no = refuses.find(page); no != refuses.end()) return {.error = no->second};
    if (pages.count(page) == 0) return {.error = errc::not_mapped};
    const bool writable = read_only.count(page) == 0;
    if (write && !writable) return {.error = errc::access_denied};
    return {errc::ok, {pages.at(page)}, writable};
  }
};

static_assert(frame_provider<scripted_host> && x86::large_frame_provider<scripted_host>);
static_assert(!x86::prefetch_provider<scripted_host>);

/// The same, and it can be asked without waiting.
class prefetching_host : public scripted_host {
 public:
  /// Runs in try_pin(), before it answers.
  std::function<void(hva)> during_try;
  /// Pages that would have to be waited for.
  std::set<std::uint64_t> busy;

  frame_lease try_pin(hva a) noexcept {
    const std::uint64_t page = a.page().value;
    if (during_try) {
      const auto script = std::exchange(during_try, nullptr);
      script(a.page());
      if (!during_try) during_try = script;
    }
    if (busy.count(page) != 0) return {.error = errc::again};
    const frame_lease lease = decide(page, false);
    if (lease) ++pins[lease.frame.value];
    return lease;
  }
};

static_assert(x86::prefetch_provider<prefetching_host>);

/// A VM with one slot of `pages` pages at guest frame 0, page tables in its upper half, root at the first of them.
/// Modes: what the MMU is for; Mode: how the test writes tables.
template <class Mode, class Modes = Mode, class Host = scripted_host>
struct machine_of {
  using mmu_type = x86::shadow_mmu<Host, Modes>;
  using cpu_type = x86::vcpu<mmu_type>;
  using entry = typename Mode::entry_type;
  static constexpr std::uint64_t pages = 64;
  static constexpr std::uint64_t first_table = 32;

  Host host;
  mmu_type mmu;
  std::uint64_t next_table = first_table;
  std::uint64_t root = new_table();

  explicit machine_of(std::uint64_t slot_pages = pages, const x86::mmu_options& o = {}) : mmu(host, o) {
    for (std::uint64_t i = 0; i < pages; ++i) host.place(ram_base + i * page_size);
    slot_error = mmu.add_slot({.id = 1, .base = {0}, .pages = slot_pages, .host = ram_base});
  }
  errc slot_error = errc::ok;

  static hva host_of(gpa a) { return ram_base + a.value; }
  std::uint64_t new_table() { return next_table++ * page_size; }
  std::byte* now(gpa a) { return host.bytes(host_of(a)); }

  template <class Word>
  Word read(gpa a) {
    return std::atomic_ref<Word>(*reinterpret_cast<Word*>(host.bytes(host_of(a)))).load();
  }
  template <class Word>
  errc write(gpa a, Word value) {
    return mmu.guest_write(a, std::as_bytes(std::span<const Word>(&value, 1)));
  }
  std::uint64_t read64(gpa a) { return read<std::uint64_t>(a); }
  errc write64(gpa a, std::uint64_t value) { return write(a, value); }
  /// The entry's place; tables on the way are made, with these bits (PDPTEs have none but P).
  template <class M = Mode>
  gpa entry_at(gva a, unsigned level, std::uint64_t top, std::uint64_t upper_bits = rwu) {
    using word = typename M::entry_type;
    gpa table{top};
    for (unsigned l = M::levels;; --l) {
      const gpa where = table + M::index(a, l) * sizeof(word);
      if (l == level) return where;
      const std::uint64_t bits = M::top_in_registers && l == M::levels ? pte::present : upper_bits;
      if ((read<word>(where) & pte::present) == 0) {
        static_cast<void>(write(where, static_cast<word>(new_table() | bits)));
      }
      table = M::table(read<word>(where));
    }
  }
  /// Maps a to `to` by an entry of this level.
  template <class M = Mode>
  gpa map(gva a, gpa to, std::uint64_t bits = rwu, unsigned level = 1) {
    const gpa where = entry_at<M>(a, level, root);
    static_cast<void>(
        write(where, static_cast<typename M::entry_type>(to.value | bits | (level > 1 ? pte::large : 0))));
    return where;
  }
  void start(range r, event e = event::unmap) { mmu.invalidate_range_start({.range = r, .event = e}); }
  void end(range r, event e = event::unmap) { mmu.invalidate_range_end({.range = r, .event = e}); }
  /// A whole bracket that replaces the frame behind the page.
  void migrate(gpa page) {
    const range r = x86::page_range(host_of(page));
    start(r);
    host.migrate(host_of(page));
    end(r);
  }
  std::string broken() {
    const char* what = mmu.verify();
    return what == nullptr ? "" : what;
  }
};

using machine = machine_of<x86::long_mode_4>;
using mmu_type = machine::mmu_type;
using cpu_type = machine::cpu_type;

/// The host address that the access would use; null if it did not come to pass.
struct seen {
  outcome result;
  std::byte* at = nullptr;
};
template <class Cpu, class Address = gva>
seen touch(Cpu& cpu, Address a, access how) {
  seen s;
  s.result = cpu.access(a, how, [&](std::byte* at) noexcept { s.at = at; });
  return s;
}

inline std::uint64_t seed() {
  const char* given = std::getenv("MMUNOTIFY_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 1;
}

}  // namespace shadow_test
