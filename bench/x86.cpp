// SPDX-License-Identifier: MIT

// What the x86 shadow MMU costs: faults, zaps, ageing, guest page-table writes, address-space switches, dirty logs; the
// memory per mapped page; and what all of that is when a million pages are mapped instead of a thousand. (Walks of
// guest tables by themselves are another bench's.)
//
// The host is as fast as one can be: an array, whose pages are always there. So these are the shadow MMU's own costs,
// without those of a primary. One vCPU, nobody else in guest mode: a flush is a grace period that waits for no reader.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <malloc.h>
#include <sys/mman.h>

#include <mmunotify/mmunotify.hpp>

#include "ratios.hpp"

namespace {

using namespace mmunotify;
using x86::access;
using x86::outcome;
namespace pte = x86::pte;

constexpr std::uint64_t rwu = pte::present | pte::writable | pte::user | pte::accessed | pte::dirty;

/// Reserved address space; frame n is page n of it.
class flat_host {
 public:
  explicit flat_host(std::uint64_t pages) : bytes_(pages * page_size) {
    void* const p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    base_ = static_cast<std::byte*>(p);
  }
  flat_host(const flat_host&) = delete;
  flat_host& operator=(const flat_host&) = delete;
  ~flat_host() { munmap(base_, bytes_); }

  static constexpr hva first{std::uint64_t{1} << 40};
  frame_lease pin(hva a, bool) noexcept { return {errc::ok, {(a - first) >> page_shift}, true}; }
  frame_lease try_pin(hva a) noexcept { return pin(a, false); }
  void unpin(pfn) noexcept {}
  std::byte* data(pfn f) noexcept { return base_ + f.value * page_size; }
  unsigned mapping_shift(hva) noexcept { return shift; }

  unsigned shift = page_shift;

 private:
  std::size_t bytes_;
  std::byte* base_;
};

using mmu_type = x86::shadow_mmu<flat_host>;
using cpu_type = x86::vcpu<mmu_type>;

/// A guest whose address n pages leads to frame n; tables lie behind the data, `roots` top tables share them.
class guest {
 public:
  static constexpr std::uint64_t roots = 8;

  /// Data pages are rounded up to 2 MiB. large: mapped by 2 MiB guest leaves on a host that has such pages. Without
  /// prefetch a fault is one leaf, which is what most cases want to know.
  explicit guest(std::uint64_t pages, bool large = false, bool prefetch = false, bool eager_split = false)
      : data_((pages + 511) / 512 * 512),
        tables_(roots + 1 + (data_ >> 18) + 1 + data_ / 512),
        host_(data_ + tables_),
        mmu_(host_, {.max_pages = (data_ + tables_) / 256 + 4096, .prefetch = prefetch, .eager_split = eager_split}) {
    if (large) host_.shift = 21;
    bytes_before_ = in_use();
    if (mmu_.add_slot({.id = 1, .base = {0}, .pages = data_ + tables_, .host = flat_host::first}) != errc::ok) {
      std::abort();
    }
    build(large);
    cpu_ = std::make_unique<cpu_type>(mmu_);
    select(0);
  }

  mmu_type& mmu() { return mmu_; }
  cpu_type& cpu() { return *cpu_; }
  std::uint64_t data() const { return data_; }
  void select(std::uint64_t root) {
    if (cpu_->set_cr3((data_ + root) * page_size) != errc::ok) std::abort();
  }
  static gva address(std::uint64_t n) { return {n * page_size}; }
  static range host_range(std::uint64_t page, std::uint64_t n) {
    const auto at = static_cast<std::uintptr_t>((flat_host::first + page * page_size).value);
    return {at, at + n * page_size};
  }
  bool fault(std::uint64_t page) { return cpu_->prefault(address(page), access::write).what == outcome::done; }
  /// As a guest does it: a page that is there needs no fault.
  bool touch_all(std::uint64_t first, std::uint64_t n, std::uint64_t step = 1) {
    for (std::uint64_t i = 0; i < n; ++i) {
      const std::uint64_t page = first + i * step;
      if (!cpu_->hits(address(page), access::write) && !fault(page)) return false;
    }
    return true;
  }
  bool fault_all(std::uint64_t first, std::uint64_t n, std::uint64_t step = 1) {
    for (std::uint64_t i = 0; i < n; ++i) {
      if (!fault(first + i * step)) return false;
    }
    return true;
  }
  void zap(range r) {
    mmu_.invalidate_range_start({.range = r});
    mmu_.invalidate_range_end({.range = r});
  }
  gpa leaf_entry(std::uint64_t page) const { return {leaf_table(page / 512) * page_size + page % 512 * 8}; }
  /// Bytes that the slot and the mappings have taken since the beginning.
  double grown() const { return in_use() - bytes_before_; }

 private:
  static double in_use() {
    const auto m = mallinfo2();
    return static_cast<double>(m.uordblks + m.hblkhd);
  }
  std::uint64_t middle_table(std::uint64_t gib) const { return data_ + roots + 1 + gib; }
  std::uint64_t leaf_table(std::uint64_t n) const { return data_ + roots + 1 + (data_ >> 18) + 1 + n; }
  void put(std::uint64_t table, std::uint64_t index, std::uint64_t value) {
    reinterpret_cast<std::uint64_t*>(host_.data({table}))[index] = value;
  }
  void build(bool large) {
    for (std::uint64_t r = 0; r < roots; ++r) put(data_ + r, 0, (data_ + roots) * page_size | rwu);
    for (std::uint64_t g = 0; g <= data_ >> 18; ++g) put(data_ + roots, g, middle_table(g) * page_size | rwu);
    for (std::uint64_t n = 0; n < data_ / 512; ++n) {
      const std::uint64_t to = large ? n * 512 * page_size | pte::large : leaf_table(n) * page_size;
      put(middle_table(n >> 9), n & 511, to | rwu);
      for (std::uint64_t i = 0; i < 512 && !large; ++i) put(leaf_table(n), i, (n * 512 + i) * page_size | rwu);
    }
  }

  std::uint64_t data_, tables_;
  flat_host host_;
  mmu_type mmu_;
  std::unique_ptr<cpu_type> cpu_;
  double bytes_before_ = 0;
};

/// Long parts are timed by the thread's CPU time, which leaves out what others take; short ones, and those that flush,
/// by the clock, which is cheaper to read and does not stop while a grace period is waited for.
class stopwatch {
 public:
  explicit stopwatch(bool long_part) : clock_(long_part ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC), started_(now()) {}
  double seconds() const { return now() - started_; }

 private:
  double now() const {
    timespec t{};
    clock_gettime(clock_, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
  }
  clockid_t clock_;
  double started_;
};

/// Registers a case that times one part of each iteration: `timed` returns whether its answer is right; `untimed` comes
/// before it and puts things back. The figure is per operation, of which one iteration has `operations`.
template <class Untimed, class Timed>
void add(const std::string& name, std::uint64_t operations, Untimed untimed, Timed timed) {
  ratios::add(name,
              [=](benchmark::State& state) {
                for (auto _ : state) {
                  if (!untimed()) state.SkipWithError("it could not be set up");
                  const stopwatch w(operations > 1);
                  const bool right = timed();
                  state.SetIterationTime(w.seconds() / static_cast<double>(operations));
                  if (!right) state.SkipWithError("wrong answer");
                }
              })
      ->UseManualTime()
      ->Iterations(static_cast<benchmark::IterationCount>(operations > 64 ? 20 : 200));
}

const auto nothing = [] { return true; };

void add_faults(const std::shared_ptr<guest>& g) {
  add(
      "fault/first in its table", 64, [=] { return g->mmu().zap_all(), true; },
      [=] { return g->fault_all(0, 64, 512); });
  add(
      "fault/fill", 512, [=] { return g->zap(guest::host_range(0, 512)), g->fault(1); },
      [=] { return g->fault_all(2, 510); });
  add(
      "fault/nothing to do", 512, [=] { return g->fault_all(0, 512); }, [=] { return g->fault_all(0, 512); });
}

/// What a prefetch saves a guest that touches neighbours, and costs one that does not.
void add_prefetch(const std::shared_ptr<guest>& alone, const std::shared_ptr<guest>& ahead) {
  const auto touch_case = [](const std::string& name, const std::shared_ptr<guest>& g, std::uint64_t n,
                             std::uint64_t step) {
    add(
        name, n, [=] { return g->zap(guest::host_range(0, n * step)), g->fault_all(n * step, 1); },
        [=] { return g->touch_all(0, n, step); });
  };
  for (const bool prefetch : {false, true}) {
    const auto& g = prefetch ? ahead : alone;
    const std::string how = prefetch ? ", prefetch" : ", without";
    touch_case("touch/512 pages in order" + how, g, 512, 1);
    touch_case("touch/every eighth page" + how, g, 512, 8);
    add(
        "touch/zap of what every eighth page has brought" + how, 1,
        [=] { return g->zap(guest::host_range(0, 512)), g->touch_all(0, 64, 8); },
        [=] { return g->zap(guest::host_range(0, 512)), true; });
  }
}

/// A bracket over one page while there are so many slots.
void add_slots(std::uint64_t slots) {
  const auto host = std::make_shared<flat_host>(1);
  const auto mmu = std::make_shared<mmu_type>(*host);
  for (std::uint64_t i = 0; i < slots; ++i) {
    const x86::memslot_config c{
        .id = static_cast<unsigned>(i), .base = {8 * i}, .pages = 8, .host = flat_host::first + 8 * i * page_size};
    if (mmu->add_slot(c) != errc::ok) std::abort();
  }
  add("slots/bracket over a page of one of " + std::to_string(slots), 64, nothing, [=] {
    for (std::uint64_t i = 0; i < 64; ++i) {
      const invalidation one{.range = guest::host_range(8 * (i * 977 % slots), 1)};
      mmu->invalidate_range_start(one);
      mmu->invalidate_range_end(one);
    }
    return host != nullptr;
  });
}

/// A log begins over 16 leaves of 2 MiB, and the guest writes to pages of one of them.
void add_splits(bool eager) {
  const auto g = std::make_shared<guest>(512 * 16, true, false, eager);
  const std::string how = eager ? ", large leaves split at once" : ", large leaves zapped";
  const auto log = [=](x86::dirty_tracking t) { return g->mmu().log_writes(1, t) == errc::ok; };
  const auto all_large = [=] { return log(x86::dirty_tracking::off) && g->fault_all(0, 16, 512); };
  add("log/beginning" + how, 1, all_large, [=] { return log(x86::dirty_tracking::write_protect); });
  add(
      "log/first write to a page" + how, 512, [=] { return all_large() && log(x86::dirty_tracking::write_protect); },
      [=] { return g->touch_all(512, 512); });
}

void add_zaps(const std::shared_ptr<guest>& g, const std::shared_ptr<guest>& large) {
  constexpr std::uint64_t gib = 512 * 512;
  const auto zapped = [=](std::uint64_t page) { return !g->cpu().hits(guest::address(page), access::read); };
  const auto zap_case = [=](const char* name, auto fill, std::uint64_t first, std::uint64_t pages) {
    add(name, 1, fill, [=] { return g->zap(guest::host_range(first, pages)), zapped(first); });
  };
  zap_case(
      "zap/4 KiB, mapped", [=] { return g->fault(5); }, 5, 1);
  zap_case("zap/4 KiB, unmapped", nothing, 5, 1);
  zap_case(
      "zap/2 MiB, all of 512 mapped", [=] { return g->fault_all(0, 512); }, 0, 512);
  zap_case("zap/2 MiB, unmapped", nothing, 0, 512);
  zap_case("zap/1 GiB, unmapped", nothing, 0, gib);
  zap_case(
      "zap/1 GiB, 1 page mapped", [=] { return g->fault(gib / 2); }, 0, gib);
  zap_case(
      "zap/1 GiB, 512 pages mapped, spread", [=] { return g->fault_all(0, 512, 512); }, 0, gib);
  zap_case(
      "zap/1 GiB, 512 pages mapped, side by side", [=] { return g->fault_all(0, 512); }, 0, gib);
  add(
      "zap/2 MiB, one large leaf", 1, [=] { return large->fault(0); },
      [=] { return large->zap(guest::host_range(0, 512)), true; });
  add(
      "zap/write access of 2 MiB, 512 mapped", 1,
      [=] { return g->zap(guest::host_range(0, 512)), g->fault_all(0, 512); },
      [=] {
        const invalidation i{.range = guest::host_range(0, 512), .event = event::soft_dirty};
        g->mmu().invalidate_range_start(i);
        g->mmu().invalidate_range_end(i);
        return g->cpu().hits(guest::address(5), access::read);
      });
}

void add_ageing(const std::shared_ptr<guest>& g) {
  const range two_mib = guest::host_range(0, 512);
  add(
      "age/test 2 MiB, all of 512 mapped and old", 1,
      [=] { return g->fault_all(0, 512) && (g->mmu().clear_young(two_mib), true); },
      [=] { return !g->mmu().test_young(two_mib); });
  add(
      "age/clear 2 MiB, all of 512 mapped", 1, [=] { return g->zap(two_mib), g->fault_all(0, 512); },
      [=] { return g->mmu().clear_young(two_mib); });
  add(
      "age/clear 1 GiB, unmapped", 1, [=] { return g->zap(guest::host_range(0, 512 * 512)), true; },
      [=] { return !g->mmu().clear_young(guest::host_range(0, 512 * 512)); });
}

void add_guest_writes(const std::shared_ptr<guest>& g) {
  const auto write = [=](gpa where, std::uint64_t value) {
    return g->mmu().guest_write(where, std::as_bytes(std::span<const std::uint64_t>(&value, 1))) == errc::ok;
  };
  add("guest write/to data", 1, nothing, [=] { return write({40 * page_size}, 1); });
  add(
      "guest write/to a table entry that is shadowed", 1, [=] { return g->fault(7); },
      [=] { return write(g->leaf_entry(7), 7 * page_size | rwu); });
  add(
      "guest write/to one of its table that is not", 1, [=] { return g->fault(8); },
      [=] { return write(g->leaf_entry(9), 9 * page_size | rwu); });
}

void add_switches(const std::shared_ptr<guest>& g) {
  for (const std::uint64_t spaces : {std::uint64_t{2}, std::uint64_t{4}, guest::roots}) {
    const std::string name = spaces > 4 ? "CR3/of more address spaces than are remembered"
                                        : "CR3/among " + std::to_string(spaces) + " address spaces";
    const auto round = [=] {
      for (std::uint64_t i = 0; i < 64 * spaces; ++i) {
        g->select(i % spaces);
        if (!g->cpu().hits(guest::address(3), access::read) && !g->fault(3)) return false;
      }
      return true;
    };
    add(name, 64 * spaces, round, round);
  }
}

void add_logs(const std::shared_ptr<guest>& g) {
  const auto words = std::make_shared<std::vector<std::uint64_t>>();
  const auto harvest = [=] {
    const auto& slot = *g->mmu().slots().current().slots()[0];
    words->resize(x86::dirty_log::words_for(slot.config().pages));
    return g->mmu().harvest_writes(1, *words) == errc::ok;
  };
  const auto log = [=](x86::dirty_tracking how) {
    return g->mmu().log_writes(1, how) == errc::ok && g->fault_all(0, 4096) && harvest();
  };
  const auto write = [=](std::uint64_t n) {
    for (std::uint64_t i = 0; i < n; ++i) {
      if (!g->cpu().hits(guest::address(8 * i), access::write)) return false;
    }
    return true;
  };
  add(
      "log/first write after a harvest", 512, [=] { return log(x86::dirty_tracking::write_protect); },
      [=] { return write(512); });
  add(
      "log/harvest by write protection, 512 of 4096 written", 1,
      [=] { return log(x86::dirty_tracking::write_protect) && write(512); },
      [=] { return harvest() && (*words)[0] != 0; });
  add(
      "log/harvest by dirty bits, 512 of 4096 written", 1,
      [=] { return log(x86::dirty_tracking::dirty_bits) && write(512); },
      [=] { return harvest() && (*words)[0] != 0; });
  add(
      "log/harvest, nothing written", 1, [=] { return log(x86::dirty_tracking::write_protect); },
      [=] { return harvest() && (*words)[0] == 0; });
}

/// The same few operations while so many pages are mapped; and the memory that these take.
void add_growth(std::uint64_t mapped) {
  const auto g = std::make_shared<guest>(mapped);
  if (!g->fault_all(0, mapped)) std::abort();
  const std::string many = std::to_string(mapped) + " mapped";
  const double bytes = (g->grown() - 8.0 * static_cast<double>(mapped)) / static_cast<double>(mapped);
  ratios::figure("bytes per page, " + many, bytes);
  add(
      "growth of a fault/" + many, 512, [=] { return g->zap(guest::host_range(0, 512)), g->fault(0); },
      [=] { return g->fault_all(1, 511); });
  add(
      "growth of a zap of 2 MiB/" + many, 1, [=] { return g->fault_all(0, 512); },
      [=] { return g->zap(guest::host_range(0, 512)), !g->cpu().hits(guest::address(5), access::read); });
  std::printf("%-44s %10.2f   beyond the 8-byte entry: reverse mapping, frame, table, slot\n",
              ("bytes per page, " + many).c_str(), bytes);
}

const std::vector<ratios::goal> goals = {
    {"zap of an unmapped GiB, ns", "zap/1 GiB, unmapped", 1000, ""},
    {"zap of a GiB with 512 pages side by side, to that of their 2 MiB", "zap/1 GiB, 512 pages mapped, side by side",
     1.2, "zap/2 MiB, all of 512 mapped"},
    {"bytes per mapped page beyond the entry, a million mapped", "bytes per page, 1000000 mapped", 24, ""},
    {"a fault with a million pages mapped, to one with a thousand", "growth of a fault/1000000 mapped", 1.5,
     "growth of a fault/1000 mapped"},
    {"a zap with a million pages mapped, to one with a thousand", "growth of a zap of 2 MiB/1000000 mapped", 1.5,
     "growth of a zap of 2 MiB/1000 mapped"},
};

}  // namespace

int main(int argc, char** argv) {
  const auto g = std::make_shared<guest>(512 * 512);
  const auto large = std::make_shared<guest>(512 * 16, true);
  add_faults(g);
  add_prefetch(g, std::make_shared<guest>(512 * 16, false, true));
  add_zaps(g, large);
  add_ageing(g);
  add_guest_writes(g);
  add_switches(g);
  add_logs(std::make_shared<guest>(8192));
  for (const bool eager : {false, true}) add_splits(eager);
  for (const std::uint64_t slots : {1U, 512U, 8192U}) add_slots(slots);
  for (const std::uint64_t mapped : {1000U, 10000U, 100000U, 1000000U}) add_growth(mapped);
  const int status = ratios::run(argc, argv);
  ratios::print_goals(goals);
  return status;
}
