// SPDX-License-Identifier: MIT

// Torture of the intervals: a primary that changes its pages, secondary MMUs that fault them in through intervals which
// come, go, grow, shrink, split and merge meanwhile, all at random, for MMUNOTIFY_TORTURE_SECONDS (default 2), first by
// themselves, then in an address space.
//
// The oracle does not look at what the code does, but at what its user may rely on:
//   O1, C1  A page has a generation. Between start and end the primary gives it a new one and declares the old one
//           freed. Who uses a mapping, under its client's lock, must never find one of a freed generation. When start
//           has returned, no client may have a mapping in the range at all.
//   P1, P2, O2  Each bracket has a record of the starts that its clients got; the ends must come in that order, each
//   once,
//           with the same clip, also after a refusal (P3).
//   C8      With a turn, read_retry is false.
//   L1      After a removal, nobody calls: a client that is told of a range outside of what it covers says so.
//   P4, C6  When all is quiet, every word is quiet, and the index is empty.
// Broken variants that it has to notice: see the negative controls in CMakeLists.txt.

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <thread>
#include <utility>
#include <vector>

#include <mmunotify/interval/detail/interval_set.hpp>

#include "interval/interval_space.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

constexpr std::uint64_t page = 0x1000;
constexpr std::uint64_t pages = 256;
constexpr std::uint64_t base = 0x7f00'0000'0000;

std::uint64_t number(const char* name, std::uint64_t otherwise) {
  const char* const given = std::getenv(name);
  return given != nullptr ? std::strtoull(given, nullptr, 0) : otherwise;
}

struct failures {
  std::atomic<std::uint64_t> count{0};
  void add(const char* what) {
    if (count.fetch_add(1) < 5) std::printf("FAILED: %s\n", what);
  }
};
failures failed;
void expect(bool good, const char* what) {
  if (!good) failed.add(what);
}

thread_local small_random* dice = nullptr;
std::uint64_t below(std::uint64_t n) { return dice->below(n); }

struct mirror;
using node = interval_notifier<mirror>;

/// The starts that one bracket has given, which wait for their ends.
struct bracket_record {
  std::vector<std::pair<const mirror*, range>> open;
  std::size_t ended = 0;
};

/// The intervals by themselves, or those of an address space.
struct facade {
  bool by_space = false;
  interval_space alone;
  address_space<arming::tracked> space;

  errc insert(node& n, range r) { return by_space ? space.insert(n, r) : alone.set.insert(n, r); }
  errc resize(node& n, range r) { return by_space ? space.resize(n, r) : alone.set.resize(n, r); }
  errc split(node& n, std::uintptr_t at, node& upper) {
    return by_space ? space.split(n, at, upper) : alone.set.split(n, at, upper);
  }
  errc remove(node& n) { return by_space ? space.remove(n) : alone.set.remove(n); }
  errc remove_async(node& n) { return by_space ? space.remove_async(n) : alone.set.remove_async(n); }
};

struct world {
  facade space;
  std::array<std::atomic<std::uint64_t>, pages> generation{};
  std::array<std::atomic<std::uint64_t>, pages> freed{};
  std::deque<mirror> mirrors;
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> brackets{0}, refusals{0}, mapped{0}, retries{0}, turns{0}, changes{0}, async{0};
};
world* all = nullptr;

/// A secondary MMU over a stretch of pages, with two intervals that share it.
struct mirror {
  std::mutex mutex;
  std::shared_mutex life;  ///< exclusively: an interval is inserted; shared: one is used for a fault
  std::uint64_t first_page = 0;
  std::uint64_t last_page = 0;
  std::array<std::uint64_t, pages> mapping{};  ///< generations; 0: none
  node low{*this};
  node high{*this};
  // Under the mutex: where faults may use which interval; nothing is mapped elsewhere, but what both cover.
  std::uint64_t low_from = 0, low_to = 0, high_from = 0, high_to = 0;
  bool leaving = false;  ///< a callback has begun to remove both

  static std::uint64_t address(std::uint64_t p) { return base + p * page; }
  static std::uint64_t page_of(std::uint64_t a) { return (a - base) / page; }

  void drop(std::uint64_t from, std::uint64_t to) {
    for (std::uint64_t p = from; p < to; ++p) mapping[p] = 0;
  }

  bool invalidate_range_start(const interval_invalidation& i) noexcept {
    auto& record = *static_cast<bracket_record*>(const_cast<void*>(i.owner));
    record.open.emplace_back(this, i.range);
    expect(i.range.first >= address(first_page) && i.range.last <= address(last_page), "C10: a clip is too large");
    std::unique_lock lock(mutex, std::defer_lock);
    if (i.blockable) {
      lock.lock();
    } else if (below(8) == 0 || !lock.try_lock()) {
      return false;
    }
    drop(page_of(i.range.first), page_of(i.range.last + page - 1));
    if (i.blockable && below(512) == 0) remove_both();
    return true;
  }
  void invalidate_range_end(const interval_invalidation& i) noexcept {
    auto& record = *static_cast<bracket_record*>(const_cast<void*>(i.owner));
    const std::size_t n = record.ended++;
    expect(n < record.open.size(), "P1: an end without a start");
    if (n < record.open.size()) {
      expect(record.open[n].first == this && record.open[n].second == i.range, "O2: ends are not as the starts were");
    }
  }

  /// From a callback, under the mutex; only if the owner has nothing in hand.
  void remove_both() noexcept {
    if (leaving || low_from == low_to) return;
    leaving = true;
    low_to = low_from;
    high_to = high_from;
    drop(first_page, last_page);
    expect(all->space.remove_async(low) == errc::ok, "L7: a callback does not find its interval");
    static_cast<void>(all->space.remove_async(high));
    all->async.fetch_add(1, std::memory_order_relaxed);
  }
};

// --- The primary.
// -------------------------------------------------------------------------------------------------------

void check_nothing_is_mapped(std::uint64_t from, std::uint64_t to) {
  for (mirror& m : all->mirrors) {
    const std::lock_guard lock(m.mutex);
    for (std::uint64_t p = from; p < to; ++p) {
      if (m.mapping[p] != 0) return failed.add("O1: a mapping is left between start and end");
    }
  }
}

void change_pages(std::uint64_t from, std::uint64_t to, unsigned depth);

void change_pages_inside(std::uint64_t from, std::uint64_t to, unsigned depth) {
  if (to - from <= 8 || below(8) == 0) check_nothing_is_mapped(from, to);
  for (std::uint64_t p = from; p < to; ++p) {
    const std::uint64_t old = all->generation[p].fetch_add(1);
    std::uint64_t seen = all->freed[p].load();
    while (seen < old && !all->freed[p].compare_exchange_weak(seen, old)) {
    }
  }
  if (depth == 0 && below(16) == 0) {  // another bracket inside this one
    const std::uint64_t at = below(pages);
    change_pages(at, std::min(pages, at + 1 + below(4)), 1);
  }
  if (below(4) == 0) std::this_thread::yield();
}

void change_pages(std::uint64_t from, std::uint64_t to, unsigned depth) {
  bracket_record record;
  // Not whole pages at the edges, so that clips are not either.
  const range r{mirror::address(from), mirror::address(to) - below(page)};
  const invalidation i{.range = r, .event = event::unmap, .owner = &record, .blockable = below(4) != 0};
  const auto inside = [&](bool open) {
    if (open) {
      expect(record.ended == 0, "P1: an end before its time");
      change_pages_inside(from, to, depth);
    } else {
      all->refusals.fetch_add(1, std::memory_order_relaxed);
    }
  };
  if (!all->space.by_space) {
    interval_space::bracket b(all->space.alone, i);
    if (b && below(16) == 0) {
      b.cancel();
    } else {
      inside(static_cast<bool>(b));
    }
  } else if (i.blockable) {
    const auto b = all->space.space.invalidate(r, i.event, i.owner);
    inside(true);
  } else {
    const auto b = all->space.space.try_invalidate(r, i.event, i.owner);
    inside(static_cast<bool>(b));
  }
  expect(record.ended == record.open.size(), "P2: a start without an end");
  all->brackets.fetch_add(1, std::memory_order_relaxed);
}

void primary() {
  while (!all->stop.load()) {
    const std::uint64_t at = below(pages);
    switch (below(16)) {
      case 0: change_pages(0, pages, 0); break;
      case 1: change_pages(at, std::min(pages, at + 1 + below(100)), 0); break;
      default: change_pages(at, std::min(pages, at + 1 + below(3)), 0); break;
    }
  }
}

// --- Faults.
// ------------------------------------------------------------------------------------------------------------

/// Returns: true if it mapped the page, or may not.
bool fault_once(mirror& m, node& n, std::uint64_t p, bool has_turn) {
  const interval_sequence s = n.read_begin();
  const std::uint64_t g = all->generation[p].load();
  if (below(4) == 0) std::this_thread::yield();
  static_cast<void>(n.check_retry(s));
  const std::lock_guard lock(m.mutex);
  const bool low = m.low_from <= p && p < m.low_to;
  const bool high = m.high_from <= p && p < m.high_to;
  if (&n == &m.low ? !low : !high) return true;
  if (n.read_retry(s)) {
    if (has_turn) failed.add("C8: a retry in spite of a turn");
    all->retries.fetch_add(1, std::memory_order_relaxed);
    return false;
  }
  m.mapping[p] = g;
  all->mapped.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void use(mirror& m, std::uint64_t p) {
  const std::lock_guard lock(m.mutex);
  if (m.mapping[p] != 0) expect(all->freed[p].load() < m.mapping[p], "O1: a mapping of a freed page is used");
}

void faults() {
  while (!all->stop.load()) {
    mirror& m = all->mirrors[below(all->mirrors.size())];
    const std::uint64_t p = m.first_page + below(m.last_page - m.first_page);
    node* n = nullptr;
    const std::shared_lock alive(m.life);
    {
      const std::lock_guard lock(m.mutex);
      if (m.low_from <= p && p < m.low_to) n = &m.low;
      if (m.high_from <= p && p < m.high_to) n = &m.high;
    }
    if (n == nullptr) continue;
    bool done = false;
    for (int attempt = 0; attempt < 3 && !done; ++attempt) done = fault_once(m, *n, p, false);
    if (!done || below(64) == 0) {
      const auto turn = n->take_turn();
      // An interval that was resized or inserted anew meanwhile is not where the turn was taken.
      if (turn) all->turns.fetch_add(1, std::memory_order_relaxed);
      static_cast<void>(fault_once(m, *n, p, false));
    }
    use(m, p);
  }
}

// --- Who owns the intervals.
// ----------------------------------------------------------------------------------------------

class owner {
 public:
  explicit owner(mirror& m) : m_(m) {}

  void one() {
    if (leaving()) {
      if (m_.low.registered() || m_.high.registered()) return std::this_thread::yield();
      const std::lock_guard lock(m_.mutex);
      m_.leaving = false;
      to_ = from_;
      split_ = false;
    }
    if (to_ == from_) return insert();
    switch (below(4)) {
      case 0: return remove();
      case 1: return split_ ? merge() : split();
      default: return split_ ? merge() : resize();
    }
  }
  void finish() {
    while (to_ != from_ || leaving()) {
      if (leaving()) {
        one();
      } else if (to_ != from_) {
        remove();
      }
    }
  }

 private:
  bool leaving() {
    const std::lock_guard lock(m_.mutex);
    return m_.leaving;
  }
  static range bytes(std::uint64_t from, std::uint64_t to) { return {mirror::address(from), mirror::address(to)}; }
  void some_pages(std::uint64_t& from, std::uint64_t& to) {
    const std::uint64_t n = m_.last_page - m_.first_page;
    from = m_.first_page + below(n);
    to = from + 1 + below(m_.last_page - from);
  }
  /// Lets faults use what is there now, unless a callback removes it.
  void allow(std::uint64_t low_from, std::uint64_t low_to, std::uint64_t high_from, std::uint64_t high_to) {
    const std::lock_guard lock(m_.mutex);
    if (m_.leaving) return;
    m_.low_from = low_from;
    m_.low_to = low_to;
    m_.high_from = high_from;
    m_.high_to = high_to;
    all->changes.fetch_add(1, std::memory_order_relaxed);
  }
  /// Nothing may be mapped outside of [from, to).
  void narrow(std::uint64_t from, std::uint64_t to) {
    const std::lock_guard lock(m_.mutex);
    if (m_.leaving) return;
    m_.low_from = std::max(m_.low_from, from);
    m_.low_to = std::max(m_.low_from, std::min(m_.low_to, to));
    m_.drop(m_.first_page, from);
    m_.drop(to, m_.last_page);
  }

  void insert() {
    some_pages(from_, to_);
    const std::lock_guard newly(m_.life);
    expect(all->space.insert(m_.low, bytes(from_, to_)) == errc::ok, "L9: an insertion fails");
    allow(from_, to_, 0, 0);
  }
  void resize() {
    std::uint64_t from = 0;
    std::uint64_t to = 0;
    some_pages(from, to);
    narrow(std::max(from, from_), std::max(std::max(from, from_), std::min(to, to_)));
    if (all->space.resize(m_.low, bytes(from, to)) != errc::ok) return;  // leaving
    from_ = from;
    to_ = to;
    allow(from, to, 0, 0);
  }
  void split() {
    if (to_ - from_ < 2) return;
    const std::uint64_t at = from_ + 1 + below(to_ - from_ - 1);
    {  // faults above use the other one from now on; what is mapped stays
      const std::lock_guard lock(m_.mutex);
      if (m_.leaving) return;
      m_.low_to = at;
    }
    const std::lock_guard newly(m_.life);
    if (all->space.split(m_.low, mirror::address(at), m_.high) != errc::ok) return;
    split_ = true;
    {
      const std::lock_guard lock(m_.mutex);
      if (m_.leaving) {  // the callback has met the lower one only
        static_cast<void>(all->space.remove_async(m_.high));
        return;
      }
    }
    allow(from_, at, at, to_);
  }
  void merge() {
    if (all->space.resize(m_.low, bytes(from_, to_)) != errc::ok) return;
    allow(from_, to_, 0, 0);
    split_ = false;
    take_away(m_.high);
  }
  void take_away(node& n) {
    if (below(2) == 0) {
      static_cast<void>(all->space.remove(n));
    } else {
      static_cast<void>(all->space.remove_async(n));
    }
    while (n.registered()) std::this_thread::yield();
  }
  void remove() {
    {
      const std::lock_guard lock(m_.mutex);
      if (m_.leaving) return;
      m_.low_to = m_.low_from;
      m_.high_to = m_.high_from;
      m_.drop(m_.first_page, m_.last_page);
    }
    take_away(m_.low);
    take_away(m_.high);
    to_ = from_;
    split_ = false;
  }

  mirror& m_;
  std::uint64_t from_ = 0;
  std::uint64_t to_ = 0;
  bool split_ = false;
};

void owners(std::size_t from, std::size_t to) {
  std::deque<owner> mine;
  for (std::size_t i = from; i < to; ++i) mine.emplace_back(all->mirrors[i]);
  while (!all->stop.load()) mine[below(mine.size())].one();
  for (owner& o : mine) o.finish();
}

}  // namespace

namespace {

void torture(bool by_space) {
  const std::uint64_t seed = number("MMUNOTIFY_SEED", 1);
  const std::uint64_t seconds = number("MMUNOTIFY_TORTURE_SECONDS", 2);
  std::printf("MMUNOTIFY_SEED=%" PRIu64 ", %" PRIu64 " s\n", seed, seconds);
  const auto w = std::make_unique<world>();
  all = w.get();
  w->space.by_space = by_space;
  for (auto& g : w->generation) g.store(1);
  constexpr std::size_t count = 12;
  for (std::size_t i = 0; i < count; ++i) {
    mirror& m = w->mirrors.emplace_back();
    // Some share their pages, some lie beside each other, one has all.
    m.first_page = i == 0 ? 0 : (i - 1) / 2 * 40;
    m.last_page = i == 0 ? pages : m.first_page + 50;
  }
  std::vector<std::thread> threads;
  const auto start = [&](auto body) {
    threads.emplace_back([body, mine = seed * 100 + threads.size()] {
      small_random random(mine);
      dice = &random;
      body();
    });
  };
  for (int i = 0; i < 2; ++i) start(primary);
  for (int i = 0; i < 2; ++i) start(faults);
  start([] { owners(0, count / 2); });
  start([] { owners(count / 2, count); });
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  while (std::chrono::steady_clock::now() < until && failed.count.load() == 0) std::this_thread::yield();
  w->stop.store(true);
  for (auto& t : threads) t.join();
  for (int i = 0; i < 4; ++i) w->space.alone.domain.barrier();
  CHECK(w->space.alone.set.empty());
  CHECK(w->space.space.barrier() == errc::ok);
  CHECK_FALSE(w->space.space.armed());
  for (mirror& m : w->mirrors) {
    CHECK((detail::collision_word::is_quiet(interval_probe::word(m.low)) ||
           detail::collision_word::is_pending(interval_probe::word(m.low))));
    CHECK_FALSE(detail::collision_word::is_active(interval_probe::word(m.low)));
    CHECK_FALSE(detail::collision_word::is_active(interval_probe::word(m.high)));
  }
  CHECK(failed.count.load() == 0);
  std::printf("%" PRIu64 " brackets, %" PRIu64 " refused, %" PRIu64 " mapped, %" PRIu64 " retries, %" PRIu64
              " turns, %" PRIu64 " changes, %" PRIu64 " removals in callbacks\n",
              w->brackets.load(), w->refusals.load(), w->mapped.load(), w->retries.load(), w->turns.load(),
              w->changes.load(), w->async.load());
  all = nullptr;
}

}  // namespace

TEST_CASE("O1: no mapping of a freed page is ever used, whatever intervals and brackets do") { torture(false); }

TEST_CASE("O1: no mapping of a freed page is ever used, whatever the intervals of a space do") { torture(true); }
