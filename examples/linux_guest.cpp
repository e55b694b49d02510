// SPDX-License-Identifier: MIT

// linux_guest: a real Linux guest's page tables, shadowed under fire.
//
// The page tables of a running Linux were captured with everything that they map. Here several vCPUs touch every one
// of these translations, and others, through a shadow MMU, while the primary MMU swaps, migrates, protects, unmaps,
// moves and re-maps the memory behind them as fast as it can, and the shadow MMU itself is unregistered and registered
// again. Meanwhile its owner logs the guest's writes, harvests the log, and throws all shadow tables away. Each access
// is judged in guest mode against what must be there (guest.hpp). Once a second all stand still, and both MMUs' tables
// are verified.
//
// Exit status: 0 nothing was wrong, 1 something was, 2 bad options or an unusable capture.

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "capture.hpp"
#include "capture_replay.hpp"
#include "guest.hpp"
#include "standstill.hpp"

namespace {

using namespace mmunotify;
using clock_type = std::chrono::steady_clock;

struct options {
  std::uint64_t seconds = 10;
  std::uint64_t vcpus = 4;
  std::uint64_t changers = 2;
  std::uint64_t seed = 1;
  std::uint64_t accesses = 0;  ///< per vCPU; 0: as many as fit into the time
  std::string capture = MMUNOTIFY_DEFAULT_CAPTURE;
};

constexpr const char usage[] =
    "usage: linux_guest [--seconds N] [--vcpus N] [--changers N] [--seed N] [--accesses N] [--capture FILE]\n"
    "\n"
    "Runs a captured Linux guest's page tables on a shadow MMU while the primary MMU changes everything behind it.\n"
    "  --seconds N     how long (default 10)\n"
    "  --vcpus N       threads that touch guest memory, 1 to 64 (default 4)\n"
    "  --changers N    threads that change the primary's tables, 1 to 16 (default 2)\n"
    "  --seed N        of all random choices (default 1)\n"
    "  --accesses N    stop when each vCPU has made so many accesses, whatever the time\n"
    "  --capture FILE  page tables of a guest, in any paging mode (default: one of tests/data/x86/linux)\n"
    "\n"
    "Exit status: 0 nothing was wrong, 1 something was, 2 bad options or an unusable capture.\n";

class random_source {
 public:
  explicit random_source(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t operator()() { return engine_(); }
  std::uint64_t below(std::uint64_t n) { return engine_() % n; }
  bool one_in(std::uint64_t n) { return below(n) == 0; }

 private:
  std::mt19937_64 engine_;
};

/// One recorded translation, or one page of a large one.
struct target {
  std::uint64_t number = 0;  ///< of the translation
  gva address{};
  gpa physical{};
  bool user = false;
  bool writable = false;
};

/// The recorded translations by number.
class translation_list {
 public:
  explicit translation_list(const capture::linux_tables& t) : runs_(t.runs) {
    for (const auto& r : runs_) {
      first_.push_back(count_);
      count_ += r.count;
    }
  }
  std::uint64_t size() const { return count_; }

  /// The translation with this number; of a large page the 4 KiB page that `page` selects. (The first one where the
  /// guest is larger than what we sign: a machine of many gigabytes is not to fill ours.)
  target at(std::uint64_t number, std::uint64_t page) const {
    const auto after = std::upper_bound(first_.begin(), first_.end(), number);
    const auto& r = runs_[static_cast<std::size_t>(after - first_.begin()) - 1];
    const std::uint64_t i = number - *(after - 1);
    std::uint64_t inside = (page % (std::uint64_t{1} << (r.page_shift - page_shift))) << page_shift;
    if ((r.pa + i * r.pa_stride + inside) / page_size >= guest::most_signed_pages) inside = 0;
    return {number, gva{r.va + i * r.va_stride + inside}, gpa{r.pa + i * r.pa_stride + inside},
            (r.flags & capture::mapping::user) != 0, (r.flags & capture::mapping::writable) != 0};
  }

  /// True if the address lies in a recorded translation, as far as this mask goes (captures sign-extend 32 bits).
  bool covers(gva a, std::uint64_t mask) const {
    for (const auto& r : runs_) {
      const std::uint64_t size = std::uint64_t{1} << r.page_shift;
      const std::uint64_t offset = (a.value - r.va) & mask;
      if (r.count == 0) continue;
      if (r.va_stride == 0 || r.count == 1) {
        if (offset < size) return true;
      } else if (offset / r.va_stride < r.count && offset % r.va_stride < size) {
        return true;
      }
    }
    return false;
  }

 private:
  const std::vector<capture::translation_run>& runs_;
  std::vector<std::uint64_t> first_;
  std::uint64_t count_ = 0;
};

/// What the threads count.
struct tally {
  std::atomic<std::uint64_t> accesses{0}, mismatches{0}, guest_faults{0}, refused{0}, tracked{0}, released{0},
      starved{0}, changes{0}, detached{0}, harvested{0};
};

template <class Mode>
class show {
  using mmu_type = x86::shadow_mmu<guest::primary_type, Mode>;
  using vcpu_type = x86::vcpu<mmu_type>;

 public:
  show(const options& o, guest::machine& m) : options_(o), machine_(m), list_(m.tables()), mmu_(m.primary()) {
    touched_ = std::vector<std::atomic<bool>>(list_.size());
    random_source random(o.seed);
    while (hot_.size() < hot_count) hot_.push_back(list_.at(random.below(list_.size()), random()));
  }

  /// Returns: the exit status.
  int run() {
    if (const errc e = mmu_.add_slot({.id = 0, .base = gfn{0}, .pages = machine_.pages(), .host = {guest::ram_base}});
        e != errc::ok) {
      std::fprintf(stderr, "linux_guest: the guest's memory slot: %s\n", to_string(e));
      return 2;
    }
    if (!attach()) return 2;
    std::vector<std::thread> vcpus;
    std::vector<std::thread> others;
    for (std::uint64_t i = 0; i < options_.vcpus; ++i) vcpus.emplace_back([this, i] { run_vcpu(i); });
    for (std::uint64_t i = 0; i < options_.changers; ++i) others.emplace_back([this, i] { run_changer(i); });
    others.emplace_back([this] { run_detacher(); });
    others.emplace_back([this] { run_owner(); });
    watch();
    for (auto& t : vcpus) t.join();
    stop_.store(true);
    for (auto& t : others) t.join();
    return finish();
  }

 private:
  static constexpr std::size_t hot_count = 192;
  static constexpr std::uint64_t too_many = 20;  ///< mismatches after which there is no more to learn
  static constexpr int stalled_after = 20;       ///< seconds

  // --- vCPUs. -----------------------------------------------------------------------------------------------------

  void run_vcpu(std::uint64_t me) {
    vcpu_type cpu{mmu_};
    errc e = cpu.set_registers(machine_.registers());
    for (; e == errc::no_memory; e = cpu.set_registers(machine_.registers())) reclaim();  // PDPTEs are read
    if (e != errc::ok) {
      mismatch({}, "the vCPU refuses the captured registers");
      stop_.store(true);
    }
    random_source random(options_.seed * 1000 + me);
    std::uint64_t next = list_.size() / options_.vcpus * me;
    standstill::worker worker(all_);
    for (std::uint64_t n = 0; !stop_.load(std::memory_order_relaxed); ++n) {
      worker.pass();
      if (options_.accesses != 0 && n >= options_.accesses) break;
      if (random.one_in(16)) {
        touch_unlisted(cpu, random);
      } else if (random.one_in(2)) {
        touch(cpu, hot_[random.below(hot_.size())], random);
      } else {
        touch(cpu, list_.at(next % list_.size(), random()), random);
        ++next;
      }
      if (n % 64 == 0) tally_.accesses.fetch_add(64, std::memory_order_relaxed);
    }
    running_.fetch_sub(1);
  }

  /// An access to a recorded translation, and what it must come to.
  void touch(vcpu_type& cpu, const target& t, random_source& random) {
    const bool write = random.one_in(4);
    // Users' pages are for users, as SMAP has it; now and then a user tries the kernel's.
    const bool as_user = t.user || random.one_in(32);
    cpu.set_cpl(as_user ? 3 : 0);
    const gfn f = frame_of(t.physical);
    const bool allowed = (!write || t.writable) && (!as_user || t.user);
    const unsigned code = 1U | (write ? 2U : 0U) | (as_user ? 4U : 0U);
    while (!stop_.load(std::memory_order_relaxed)) {
      const std::uint32_t changes = machine_.has(f) ? machine_.book(f).changes.load(std::memory_order_acquire) : 0;
      const char* wrong = nullptr;
      const auto look = [&](std::byte* at) noexcept { wrong = judge(f, at, write, allowed); };
      const x86::outcome o = cpu.access(t.address, write ? x86::access::write : x86::access::read, look);
      if (again_later(o)) continue;
      if (o.what == x86::outcome::done) touched_[t.number].store(true, std::memory_order_relaxed);
      if (wrong == nullptr) wrong = judge(o, t, f, changes, allowed, code);
      if (wrong != nullptr) mismatch(t, wrong);
      if (o.what == x86::outcome::write_tracked && wrong == nullptr) rewrite_table(t, f);
      return;
    }
  }

  /// In guest mode. Judged twice, so that a mapping that goes away under the access has time to show.
  const char* judge(gfn f, std::byte* at, bool write, bool allowed) noexcept {
    if (!allowed) return "a forbidden access went through";
    if (!machine_.has(f)) return "an access beyond the memory went through";
    std::byte* const page = at - (reinterpret_cast<std::uintptr_t>(at) & page_mask);
    const char* const wrong = write ? machine_.judge_write(f, page) : machine_.judge_read(f, page);
    return wrong != nullptr ? wrong : machine_.judge_read(f, page);
  }

  /// Every outcome but success, held against the capture.
  const char* judge(const x86::outcome& o, const target& t, gfn f, std::uint32_t changes, bool allowed, unsigned code) {
    switch (o.what) {
      case x86::outcome::done: return nullptr;
      case x86::outcome::page_fault:
        tally_.guest_faults.fetch_add(1, std::memory_order_relaxed);
        if (allowed) return "an allowed access faults";
        return o.code.bits == code ? nullptr : "the page fault has another error code";
      case x86::outcome::write_tracked:
        return machine_.has(f) && machine_.book(f).is_table ? nullptr : "a page that is no table is tracked";
      case x86::outcome::not_mapped:
        tally_.refused.fetch_add(1, std::memory_order_relaxed);
        if (!machine_.has(f)) return o.address.page() == t.physical ? nullptr : "MMIO at another address";
        // Only while the primary had it unmapped or read-only.
        return (changes & 1) != 0 || machine_.book(f).changes.load(std::memory_order_acquire) != changes
                   ? nullptr
                   : "an access was refused although the page was mapped all the time";
      default: return "an outcome that cannot be";
    }
  }

  /// The MMU is unregistered, or memory is short: the access is tried again.
  bool again_later(const x86::outcome& o) {
    if (o.what == x86::outcome::released) {
      tally_.released.fetch_add(1, std::memory_order_relaxed);
    } else if (o.what == x86::outcome::no_memory) {
      tally_.starved.fetch_add(1, std::memory_order_relaxed);
      reclaim();
    } else {
      return false;
    }
    std::this_thread::yield();
    return true;
  }

  /// The guest writes to a table of its own that is shadowed: an entry gets the value that it has, accessed.
  void rewrite_table(const target& t, gfn f) {
    const std::size_t index = 256;
    std::uint64_t word = machine_.captured_word(f, index);
    if ((word & 1) != 0) word |= 0x20;
    if (Mode::levels == 2 && (word >> 32 & 1) != 0) word |= 0x20'0000'0000;  // two entries of 4 bytes
    tally_.tracked.fetch_add(1, std::memory_order_relaxed);
    const errc e = mmu_.guest_write(base_of(f) + 8 * index, std::as_bytes(std::span(&word, 1)));
    if (e != errc::ok && e != errc::released && e != errc::no_memory) mismatch(t, "a table cannot be written");
  }

  void touch_unlisted(vcpu_type& cpu, random_source& random) {
    // Near a recorded one, or anywhere.
    gva a = random.one_in(2) ? gva{random()} : list_.at(random.below(list_.size()), 0).address + (random() >> 36);
    if (Mode::levels == 0 || list_.covers(a, Mode::address_bits == 32 ? UINT32_MAX : UINT64_MAX)) return;
    cpu.set_cpl(0);
    while (!stop_.load(std::memory_order_relaxed)) {
      const auto nothing = [](std::byte*) noexcept {};
      const x86::outcome o = cpu.access(a, x86::access::read, nothing);
      if (again_later(o)) continue;
      const bool faulted = (o.what == x86::outcome::page_fault && o.code.bits == 0) ||
                           (o.what == x86::outcome::general_protection && !Mode::canonical(a));
      if (!faulted) mismatch({.address = a}, "an address that is not mapped does not fault");
      tally_.guest_faults.fetch_add(1, std::memory_order_relaxed);
      return;
    }
  }

  void mismatch(const target& t, const char* what) {
    if (tally_.mismatches.fetch_add(1) < 5) {
      std::fprintf(stderr, "MISMATCH at va %#llx, pa %#llx: %s\n", static_cast<unsigned long long>(t.address.value),
                   static_cast<unsigned long long>(t.physical.value), what);
    }
    if (tally_.mismatches.load() >= too_many) stop_.store(true);
  }

  // --- The primary, at full speed. ----------------------------------------------------------------------------------

  void run_changer(std::uint64_t me) {
    random_source random(options_.seed * 77 + me);
    standstill::worker worker(all_);
    while (!stop_.load(std::memory_order_relaxed)) {
      worker.pass();
      const std::uint64_t first =
          random.one_in(4) ? random.below(machine_.pages()) : frame_of(hot_[random.below(hot_.size())].physical).value;
      if (first >= machine_.pages()) continue;
      const std::uint64_t last = std::min(machine_.pages(), first + 1 + random.below(16));
      change(random.below(12), first, last, me);
      tally_.changes.fetch_add(1, std::memory_order_relaxed);
    }
  }

  void change(std::uint64_t what, std::uint64_t first, std::uint64_t last, std::uint64_t me) {
    auto& primary = machine_.primary();
    const range r{guest::machine::host(gfn{first}), guest::machine::host(gfn{last})};
    // Refusals are part of the game: swap may be full, a neighbour may have the range unmapped at the moment.
    switch (what) {
      case 0:
      case 1:
      case 2: static_cast<void>(primary.swap_out(r)); break;
      case 3:
      case 4:
      case 5: static_cast<void>(primary.migrate(r)); break;
      case 6: static_cast<void>(primary.clear_flush_young(r)); break;
      case 7: static_cast<void>(primary.test_young(r) || primary.clear_young(r)); break;
      case 8:
      case 9: reshape(first, last, me, &show::protect_a_while); break;
      case 10: reshape(first, last, me, &show::move_a_while); break;
      default: reshape(first, last, me, &show::unmap_a_while); break;
    }
  }

  /// Whether and how pages are mapped: each page has one changer that may do that, and tables stay as they are.
  void reshape(std::uint64_t first, std::uint64_t last, std::uint64_t me, void (show::*how)(gfn, range)) {
    for (std::uint64_t f = first; f < std::min(first + 4, last); ++f) {
      auto& book = machine_.book(gfn{f});
      if (book.is_table || !book.is_signed || f % options_.changers != me) continue;
      book.changes.fetch_add(1, std::memory_order_acq_rel);
      (this->*how)(gfn{f}, {guest::machine::host(gfn{f}), guest::machine::host(gfn{f + 1})});
      book.changes.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  void must(errc e, gfn f, const char* what) {
    if (e != errc::ok) mismatch({.physical = base_of(f)}, what);
  }

  void protect_a_while(gfn f, range r) {
    auto& book = machine_.book(f);
    must(machine_.primary().protect(r, protection::read), f, "the primary cannot protect");
    book.read_only.store(true, std::memory_order_release);
    if (f.value % 8 == 0) std::this_thread::yield();
    book.read_only.store(false, std::memory_order_release);
    must(machine_.primary().protect(r, protection::read_write), f, "the primary cannot unprotect");
  }

  void move_a_while(gfn f, range r) {
    auto& book = machine_.book(f);
    const std::uintptr_t aside = guest::aside_base + static_cast<std::uintptr_t>(f.value * page_size);
    if (machine_.primary().move(r, aside) != errc::ok) return;  // no memory for the tables of the place
    book.unmapped.store(true, std::memory_order_release);
    if (f.value % 8 == 0) std::this_thread::yield();
    book.unmapped.store(false, std::memory_order_release);
    must(machine_.primary().move({aside, aside + page_size}, r.first), f, "the primary cannot move back");
  }

  void unmap_a_while(gfn f, range r) {
    auto& book = machine_.book(f);
    if (!book.is_volatile) return;
    must(machine_.primary().unmap(r), f, "the primary cannot unmap");
    book.unmapped.store(true, std::memory_order_release);
    if (f.value % 8 == 3) std::this_thread::yield();
    book.unmapped.store(false, std::memory_order_release);
    must(machine_.primary().map(r, protection::read_write), f, "the primary cannot map");
    while (!machine_.sign(f)) reclaim();
  }

  /// No frame is free: some pages go to the swap store.
  void reclaim() {
    const std::uint64_t first = next_victim_.fetch_add(64, std::memory_order_relaxed) % machine_.pages();
    const std::uint64_t last = std::min(machine_.pages(), first + 64);
    static_cast<void>(machine_.primary().swap_out({guest::machine::host(gfn{first}), guest::machine::host(gfn{last})}));
  }

  // --- The shadow MMU comes and goes. -------------------------------------------------------------------------------

  bool attach() {
    const auto held = machine_.primary().lock_tables();
    if (const errc e = machine_.primary().space().register_subscriber(node_, held); e != errc::ok) {
      std::fprintf(stderr, "linux_guest: the shadow MMU cannot be registered: %s\n", to_string(e));
      return false;
    }
    mmu_.resume();
    return true;
  }

  void run_detacher() {
    std::uint64_t next = 4096;
    standstill::worker worker(all_);
    while (!stop_.load(std::memory_order_relaxed)) {
      worker.pass();
      if (tally_.accesses.load(std::memory_order_relaxed) < next) {
        std::this_thread::yield();
        continue;
      }
      next = tally_.accesses.load(std::memory_order_relaxed) + 20000;
      if (machine_.primary().space().unregister(node_) != errc::ok || !attach()) {
        mismatch({}, "the shadow MMU cannot leave or come back");
        stop_.store(true);
      }
      tally_.detached.fetch_add(1, std::memory_order_relaxed);
    }
  }

  // --- The owner of the VM. -----------------------------------------------------------------------------------------

  /// As in a live migration that is begun, goes on for a while, and is given up.
  void run_owner() {
    constexpr x86::dirty_tracking ways[] = {x86::dirty_tracking::write_protect, x86::dirty_tracking::dirty_bits,
                                            x86::dirty_tracking::off};
    std::vector<std::uint64_t> words(x86::dirty_log::words_for(machine_.pages()));
    random_source random(options_.seed * 31);
    std::uint64_t next = 2048;
    standstill::worker worker(all_);
    for (std::uint64_t round = 0; !stop_.load(std::memory_order_relaxed); ++round) {
      worker.pass();
      while (tally_.accesses.load(std::memory_order_relaxed) < next && !stop_.load(std::memory_order_relaxed)) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        worker.pass();
      }
      next = tally_.accesses.load(std::memory_order_relaxed) + 1000;
      const x86::dirty_tracking way = ways[round / 8 % 3];
      if (round % 8 == 0 && mmu_.log_writes(0, way) != errc::ok) mismatch({}, "the guest's writes cannot be logged");
      if (way != x86::dirty_tracking::off) {
        if (mmu_.harvest_writes(0, words) != errc::ok) mismatch({}, "the log of writes cannot be harvested");
        for (const std::uint64_t w : words) tally_.harvested += static_cast<std::uint64_t>(std::popcount(w));
      }
      if (random.one_in(32)) mmu_.zap_all();
      static_cast<void>(mmu_.clear_young({guest::ram_base, UINTPTR_MAX}));
    }
  }

  // --- Watching.
  // ------------------------------------------------------------------------------------------------------

  double elapsed() const { return std::chrono::duration<double>(clock_type::now() - started_).count(); }

  /// Until every vCPU has stopped. A machine on which nothing moves any more is broken, too: it says so and ends.
  void watch() {
    double next = 1;
    double moved = 0;
    double stopped = 0;
    std::uint64_t seen = 0;
    while (running_.load() != 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      const double now = elapsed();
      const std::uint64_t accesses = tally_.accesses.load();
      if (accesses != seen) moved = now;
      seen = accesses;
      if (!stop_.load()) stopped = now;
      if (now - moved > stalled_after || now - stopped > stalled_after / 2) {
        std::fprintf(stderr, "MISMATCH: %s\n", stop_.load() ? "a vCPU does not stop" : "no access comes to an end");
        std::_Exit(1);
      }
      if (options_.accesses == 0 && now >= static_cast<double>(options_.seconds)) stop_.store(true);
      if (now < next) continue;
      next += 1;
      if (!stop_.load()) verify_at_rest();
      std::printf("%4.0f s  %12llu accesses  %6llu detached  %llu mismatches\n", now,
                  static_cast<unsigned long long>(accesses), static_cast<unsigned long long>(tally_.detached.load()),
                  static_cast<unsigned long long>(tally_.mismatches.load()));
      std::fflush(stdout);
    }
    seconds_ = elapsed();
  }

  void verify_at_rest() {
    if (all_.run(std::chrono::seconds(stalled_after), [this] { verify(); })) {
      ++rests_;
    } else {
      std::fprintf(stderr, "MISMATCH: a thread does not come to rest\n");
      std::_Exit(1);
    }
  }
  void verify() {
    if (const char* broken = mmu_.verify(); broken != nullptr) mismatch({}, broken);
    if (const char* broken = machine_.primary().verify(); broken != nullptr) mismatch({}, broken);
  }

  int finish() {
    verify();
    const std::uint64_t wrong_pages = machine_.count_wrong_pages();
    if (wrong_pages != 0) mismatch({}, "pages do not hold what the guest wrote");
    auto& space = machine_.primary().space();
    if (space.unregister(node_) != errc::ok) mismatch({}, "the shadow MMU cannot leave");
    if (mmu_.page_count() != 0) mismatch({}, "shadow pages are left after the release");
    print(space.observer());
    return tally_.mismatches.load() == 0 ? 0 : 1;
  }

  void print(const observe::counters& seen) {
    std::uint64_t touched = 0;
    for (const auto& t : touched_) touched += t.load() ? 1U : 0U;
    const auto row = [](const char* name, std::uint64_t value) {
      std::printf("  %-34s %14llu\n", name, static_cast<unsigned long long>(value));
    };
    const auto shadow = mmu_.statistics();
    const auto primary = machine_.primary().statistics();
    const std::uint64_t accesses = tally_.accesses.load();
    std::printf("\n%s, %s, %llu vCPUs, %llu changers, seed %llu, %.1f s\n", options_.capture.c_str(),
                capture::to_string(machine_.tables().mode), static_cast<unsigned long long>(options_.vcpus),
                static_cast<unsigned long long>(options_.changers), static_cast<unsigned long long>(options_.seed),
                seconds_);
    row("accesses checked", accesses);
    row("translations recorded", list_.size());
    row("translations checked", touched);
    row("verified while all stood still", rests_);
    row("mismatches", tally_.mismatches.load());
    row("guest page faults, as recorded", tally_.guest_faults.load());
    row("refused while not mapped", tally_.refused.load());
    row("writes to shadowed tables", tally_.tracked.load());
    row("shadow faults", shadow.faults);
    row("fault retries", shadow.retries);
    row("leaves installed", shadow.installs);
    row("zaps", shadow.zapped);
    row("frames harvested as written", tally_.harvested.load());
    row("  made writable without the lock", shadow.fast_writes);
    row("known for MMIO without a walk", shadow.mmio_hits);
    row("remote flushes", shadow.flushes);
    row("changes by the primary", tally_.changes.load());
    row("  swapped out", primary.swapped_out);
    row("  migrated", primary.migrated);
    row("  unmapped", primary.unmapped);
    row("  moved", primary.moved);
    row("brackets", seen.total(observe::occurrence::bracket));
    row("callbacks", seen.total(observe::occurrence::callback));
    row("grace periods, notifier", seen.total(observe::occurrence::grace_period));
    row("grace periods, guest mode", mmu_.gate().domain().grace_periods());
    row("unregistered and registered again", tally_.detached.load());
    row("accesses per second", static_cast<std::uint64_t>(static_cast<double>(accesses) / seconds_));
  }

  options options_;
  guest::machine& machine_;
  translation_list list_;
  std::vector<target> hot_;
  std::vector<std::atomic<bool>> touched_;
  mmu_type mmu_;
  subscriber<mmu_type> node_{mmu_};
  tally tally_;
  standstill all_;
  std::uint64_t rests_ = 0;
  std::atomic<std::uint64_t> next_victim_{0};
  std::atomic<bool> stop_{false};
  std::atomic<std::uint64_t> running_{options_.vcpus};
  clock_type::time_point started_ = clock_type::now();
  double seconds_ = 0;
};

/// Returns: an error sentence, or nothing.
std::string parse_number(std::string_view name, const char* text, std::uint64_t least, std::uint64_t most,
                         std::uint64_t& value) {
  if (text == nullptr) return std::string(name) + " needs a number";
  const char* const end = text + std::strlen(text);
  const auto [stopped, error] = std::from_chars(text, end, value);
  if (error != std::errc{} || stopped != end || value < least || value > most) {
    return std::string(name) + " takes a number from " + std::to_string(least) + " to " + std::to_string(most) +
           ", not \"" + text + "\"";
  }
  return {};
}

std::string parse(int argc, char** argv, options& o) {
  for (int i = 1; i < argc; i += 2) {
    const std::string_view name = argv[i];
    const char* const value = i + 1 < argc ? argv[i + 1] : nullptr;
    std::string wrong;
    if (name == "--seconds")
      wrong = parse_number(name, value, 1, 1'000'000, o.seconds);
    else if (name == "--vcpus")
      wrong = parse_number(name, value, 1, 64, o.vcpus);
    else if (name == "--changers")
      wrong = parse_number(name, value, 1, 16, o.changers);
    else if (name == "--seed")
      wrong = parse_number(name, value, 0, ~std::uint64_t{0}, o.seed);
    else if (name == "--accesses")
      wrong = parse_number(name, value, 1, ~std::uint64_t{0}, o.accesses);
    else if (name == "--capture")
      value != nullptr ? o.capture = value : wrong = "--capture needs a file";
    else
      wrong = "there is no option " + std::string(name);
    if (!wrong.empty()) return wrong;
  }
  return {};
}

int refuse(const std::string& why) {
  std::fprintf(stderr, "linux_guest: %s\n", why.c_str());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0) return std::fputs(usage, stdout) < 0 ? 2 : 0;
  }
  options o;
  if (const std::string wrong = parse(argc, argv, o); !wrong.empty())
    return refuse(wrong + " (--help shows the options)");
  auto loaded = capture::load(o.capture);
  if (!loaded) return refuse(loaded.error);
  auto* const tables = std::get_if<capture::linux_tables>(&loaded.value);
  if (tables == nullptr) return refuse(o.capture + ": it does not hold the tables of a Linux guest");
  if (tables->translations == 0) return refuse(o.capture + ": the guest maps nothing");
  const capture::mode mode = tables->mode;
  guest::machine machine(std::move(*tables));
  if (const std::string wrong = machine.power_on(); !wrong.empty()) return refuse(o.capture + ": " + wrong);
  int status = 2;
  capture::with_walked_mode(mode, [&]<class Mode>(std::type_identity<Mode>) { status = show<Mode>(o, machine).run(); });
  return status;
}
