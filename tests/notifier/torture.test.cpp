// SPDX-License-Identifier: MIT

// Everything that an address space can do, mixed at random on several threads, against an oracle.
//
// The oracle (O1). A frame belongs to one page at a time, or to nobody; its owner word says to which, and in which
// life. A primary takes it away strictly inside a bracket, right after the start: from then on no mirror may use a
// mapping of it. Mirrors look pages up without a lock and map them under their own, with an invalidation_window, as
// drivers do. Each mirror also counts: every end had a start (P1), as many of one as of the other when it leaves (P2),
// nothing is called afterwards (L1), the release hook ran once (L4).
//
// Phases of one space each: threads change, fault, use, come, go (waiting, not waiting, shared), and in some phases the
// space is released under their feet. MMUNOTIFY_TORTURE_SECONDS: how long; MMUNOTIFY_SEED: which run.

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/notifier/keyed.hpp>
#include <mmunotify/notifier/shared_subscription.hpp>

#include "support/spaces.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

constexpr std::size_t page_count = 24;
constexpr std::size_t frame_count = 3 * page_count;

/// What is wrong; the first one counts.
struct verdict {
  std::atomic<const char*> first{nullptr};
  void expect(bool right, const char* what) noexcept {
    const char* none = nullptr;
    if (!right) first.compare_exchange_strong(none, what);
  }
};

constexpr mmunotify::range bytes_of(std::size_t page, std::size_t pages = 1) {
  return {page * page_size, (page + pages) * page_size};
}

/// Pages with a frame each, some of the time.
template <class P>
class torture_primary {
 public:
  struct frame {
    std::atomic<std::uint64_t> owner{0};  ///< life * page_count + page + 1; 0: nobody's
  };
  struct found {
    frame* of = nullptr;
    std::uint64_t owner = 0;
  };

  explicit torture_primary(verdict& v) noexcept : verdict_(v) {
    for (auto& f : frames_) free_.push_back(&f);
  }

  P primary;

  /// What a fault finds: the page's frame, put there if it has none.
  found look_up(std::size_t page) {
    const std::lock_guard lock(pool_);
    if (table_[page] == nullptr) give(page);
    return {table_[page], table_[page]->owner.load(std::memory_order_relaxed)};
  }

  /// Takes the pages' frames away in a bracket. inside: called between start and end.
  template <class Inside>
  void take(std::size_t page, std::size_t pages, event e, const void* owner, Inside inside) {
    const auto reading = primary.lock();
    std::vector<frame*> gone;
    {
      const auto inv = primary.space.invalidate(bytes_of(page, pages), e, owner);
      gone = clear(page, pages);
      inside();
    }
    free(gone);
  }
  /// The same, if nobody refuses.
  bool try_take(std::size_t page, std::size_t pages) {
    const auto reading = primary.lock();
    return try_take_locked(page, pages);
  }
  bool try_take_locked(std::size_t page, std::size_t pages) {
    std::vector<frame*> gone;
    {
      const auto inv = primary.space.try_invalidate(bytes_of(page, pages), event::clear);
      if (!inv) return false;
      gone = clear(page, pages);
    }
    free(gone);
    return true;
  }
  /// Replaces the page's frame by another.
  void replace(std::size_t page) {
    const auto reading = primary.lock();
    std::vector<frame*> gone;
    {
      const auto inv = primary.space.invalidate_in_place(bytes_of(page), event::clear);
      std::uint64_t index = 0;
      {
        const std::lock_guard lock(pool_);
        if (table_[page] == nullptr || free_.empty()) return;
        gone.push_back(table_[page]);
        give(page);
        index = static_cast<std::uint64_t>(table_[page] - frames_.data());
      }
      primary.space.change_entry({bytes_of(page), pfn{index}, true});
      gone[0]->owner.store(0, std::memory_order_release);
    }
    free(gone);
  }
  found at(pfn f) noexcept {
    frame& of = frames_[f.value];
    return {&of, of.owner.load(std::memory_order_acquire)};
  }

  verdict& result() noexcept { return verdict_; }

 private:
  /// Under the pool's lock.
  void give(std::size_t page) {
    frame* const f = free_.back();
    free_.pop_back();
    f->owner.store(++lives_ * page_count + page + 1, std::memory_order_release);
    table_[page] = f;
  }
  std::vector<frame*> clear(std::size_t page, std::size_t pages) {
    const std::lock_guard lock(pool_);
    std::vector<frame*> gone;
    for (std::size_t p = page; p < page + pages; ++p) {
      if (table_[p] == nullptr) continue;
      table_[p]->owner.store(0, std::memory_order_release);
      gone.push_back(table_[p]);
      table_[p] = nullptr;
    }
    return gone;
  }
  void free(const std::vector<frame*>& gone) {
    const std::lock_guard lock(pool_);
    free_.insert(free_.end(), gone.begin(), gone.end());
  }

  verdict& verdict_;
  std::mutex pool_;
  std::array<frame, frame_count> frames_;
  std::array<frame*, page_count> table_{};
  std::vector<frame*> free_;
  std::uint64_t lives_ = 0;
};

/// The part of a mirror that all kinds have.
template <class P>
class mirror {
 public:
  using primary_type = torture_primary<P>;

  explicit mirror(primary_type& p) noexcept : primary_(p) {}
  ~mirror() {
    expect(starts_.load() == ends_.load(), "P2: as many ends as starts");
    gone_.store(true);
  }

  void release() noexcept {
    called();
    expect(releases_.fetch_add(1) == 0, "L4: the release hook runs once per registration");
    const std::lock_guard lock(mutex_);
    active_ = false;
    mapped_ = {};
  }
  void invalidate_range_end(const invalidation& i) noexcept {
    called();
    expect(ends_.fetch_add(1) < starts_.load(), "P1: every end had a start");
    const std::lock_guard lock(mutex_);
    window_.end(i.range);
  }
  void change_entry(const entry_change& e) noexcept {
    called();
    const std::lock_guard lock(mutex_);
    const std::size_t page = e.range.first / page_size;
    if (mapped_[page].of != nullptr) mapped_[page] = primary_.at(e.frame);
  }
  bool test_young(mmunotify::range) noexcept {
    called();
    return false;
  }
  void invalidate_secondary_tlbs(mmunotify::range) noexcept { called(); }

  void activate() {
    const std::lock_guard lock(mutex_);
    window_.forget();
    active_ = releases_.load() == 0;  // the space may have been released since
  }
  void fault(std::size_t page) {
    const auto snapshot = window_.read_begin();
    const auto f = primary_.look_up(page);
    const std::lock_guard lock(mutex_);
    if (active_ && !window_.retry(snapshot, bytes_of(page))) mapped_[page] = f;
  }
  void use(std::size_t page) {
    const std::lock_guard lock(mutex_);
    const auto& m = mapped_[page];
    if (m.of == nullptr) return;
    expect(m.of->owner.load(std::memory_order_acquire) == m.owner, "O1: a page that is mapped is the primary's");
  }
  /// What an initiator does itself, since its own brackets are not told to it.
  void let_go(const mmunotify::range& r) {
    const std::lock_guard lock(mutex_);
    window_.start(r);
    drop(r);
  }
  void be_done(const mmunotify::range& r) {
    const std::lock_guard lock(mutex_);
    window_.end(r);
  }

 protected:
  void expect(bool right, const char* what) noexcept { primary_.result().expect(right, what); }
  void called() noexcept { expect(!gone_.load(), "L1: who has left is not called"); }
  void begin(const invalidation& i) noexcept {
    called();
    starts_.fetch_add(1);
    const std::lock_guard lock(mutex_);
    window_.start(i.range);
    if (!i.in_place) drop(i.range);
  }

 private:
  void drop(const mmunotify::range& r) {
    for (std::size_t p = r.first / page_size; p < (r.last + page_size - 1) / page_size; ++p) mapped_[p] = {};
  }

  primary_type& primary_;
  std::mutex mutex_;
  invalidation_window<std::uintptr_t, 4, 16> window_;
  std::array<typename primary_type::found, page_count> mapped_{};
  bool active_ = false;
  std::atomic<std::uint64_t> starts_{0};
  std::atomic<std::uint64_t> ends_{0};
  std::atomic<int> releases_{0};
  std::atomic<bool> gone_{false};
};

/// Refuses some brackets that may be refused.
template <class P>
struct refusing_mirror : mirror<P> {
  std::atomic<unsigned> asked{0};
  using mirror<P>::mirror;
  bool invalidate_range_start(const invalidation& i) noexcept {
    this->begin(i);
    return i.blockable || asked.fetch_add(1) % 3 != 0;
  }
};

/// Lets go in the second pass.
template <class P>
struct two_pass_mirror : mirror<P> {
  struct flush : two_pass_token {
    std::atomic<bool> taken{false};
  };
  std::array<flush, 2> flushes;
  using mirror<P>::mirror;
  first_pass invalidate_begin(const invalidation& i) noexcept {
    for (flush& f : flushes) {
      if (!f.taken.exchange(true)) return f;
    }
    this->begin(i);
    return first_pass::complete();
  }
  void invalidate_finish(two_pass_token& t, const invalidation& i) noexcept {
    static_cast<flush&>(t).taken.store(false);
    this->begin(i);
  }
};

template <class P>
class phase {
 public:
  phase(verdict& v, std::uint64_t seed) : primary_(v), seed_(seed) {}

  void run(bool with_release) {
    std::vector<std::thread> threads;
    threads.emplace_back([this] { change(seed_ + 1); });
    threads.emplace_back([this] { live<refusing_mirror<P>>(seed_ + 2); });
    threads.emplace_back([this] { live<two_pass_mirror<P>>(seed_ + 3); });
    threads.emplace_back([this] { share(seed_ + 4); });
    if (with_release) {
      while (steps_.load() < 200) std::this_thread::yield();
      primary_.result().expect(space().release() == errc::ok, "L3: a space is released");
    }
    for (auto& t : threads) t.join();
    primary_.result().expect(space().barrier() == errc::ok, "L8: the barrier waits");
    primary_.result().expect(!space().armed(), "D3: when the last has gone, the space is disarmed");
  }

 private:
  static constexpr int steps = 150;

  auto& space() { return primary_.primary.space; }

  void change(std::uint64_t seed) {
    small_random random(seed);
    std::array<std::uint64_t, 1> bits{};
    for (int i = 0; i < 4 * steps; ++i) {
      steps_.fetch_add(1);
      const std::size_t page = random.below(page_count);
      const std::size_t pages = 1 + random.below(page_count - page);
      switch (random.below(8)) {
        case 0: primary_.try_take(page, pages); break;
        case 1:
        case 2: primary_.replace(page); break;
        case 3:
          space().invalidate_secondary_tlbs(bytes_of(page, pages));
          static_cast<void>(space().test_young(bytes_of(page, pages)));
          static_cast<void>(space().young_pages(bytes_of(page, pages), bits, random.below(2) == 0));
          break;
        case 4:
          primary_.take(page, 1, event::unmap, nullptr, [&] { primary_.try_take_locked((page + 5) % page_count, 1); });
          break;
        default: primary_.take(page, pages, event::clear, nullptr, [] {}); break;
      }
    }
  }

  /// Registers mirrors, lets them work, and takes them away in one way or another.
  template <class Mirror>
  void live(std::uint64_t seed) {
    struct owned : subscriber<Mirror> {
      std::unique_ptr<Mirror> mine;
      owned(std::unique_ptr<Mirror> m, const subscriber_filter& f) : subscriber<Mirror>(*m, f), mine(std::move(m)) {}
      static void free(basic_subscriber<std::uintptr_t>& n) noexcept { delete static_cast<owned*>(&n); }
    };
    small_random random(seed);
    for (int i = 0; i < steps / 10; ++i) {
      steps_.fetch_add(1);
      const std::size_t first = random.below(page_count / 2);
      const std::size_t span = random.below(3) == 0 ? page_count / 2 : page_count;
      const std::size_t from = span == page_count ? 0 : first;
      auto made = std::make_unique<Mirror>(primary_);
      Mirror& client = *made;
      subscriber_filter filter;
      if (span != page_count) filter.range = bytes_of(from, span);
      if (random.below(2) == 0) filter.owner = &client;
      auto all = std::make_unique<owned>(std::move(made), filter);
      const errc e = primary_.primary.join(*all);
      if (e != errc::ok) {
        primary_.result().expect(e == errc::released, "L6: a registration fails only on a released space");
        return;
      }
      client.activate();
      for (int n = 0; n < 40; ++n) {
        const std::size_t page = from + random.below(span);
        client.fault(page);
        client.use(from + random.below(span));
        if (n % 16 == 0 && filter.owner != nullptr) migrate(client, page);
      }
      leave(std::move(all), random);
    }
  }
  template <class Mirror>
  void migrate(Mirror& client, std::size_t page) {
    client.let_go(bytes_of(page));
    primary_.take(page, 1, event::migrate, &client, [] {});
    client.be_done(bytes_of(page));
  }
  template <class Owned>
  void leave(std::unique_ptr<Owned> all, small_random& random) {
    errc e = errc::ok;
    if (random.below(2) == 0) {
      e = space().unregister(*all);
    } else {
      leaving_.fetch_add(1);
      e = space().unregister_async(*all, &Owned::free);
      static_cast<void>(all.release());
    }
    primary_.result().expect(e == errc::ok, "L5: unregister is legal at any time");
  }

  /// Users of a shared mirror come and go.
  void share(std::uint64_t seed) {
    using client = refusing_mirror<P>;
    using shared = shared_subscription<client, typename P::space_type>;
    small_random random(seed);
    shared kept;
    for (int i = 0; i < steps; ++i) {
      steps_.fetch_add(1);
      bool is_new = false;
      const auto make = [&] {
        is_new = true;
        return new (std::nothrow) client(primary_);
      };
      shared s;
      if constexpr (std::is_same_v<P, tracked_primary>) {
        s = shared::get(space(), make);
      } else {
        const std::unique_lock held(primary_.primary.tables);
        s = shared::get(space(), make, held);
      }
      if (!s) {
        primary_.result().expect(s.error() == errc::released, "L2: a get fails only on a released space");
        break;
      }
      if (kept) primary_.result().expect(&*kept == &*s, "L2: a second get returns the same client");
      if (is_new) s->activate();
      s->fault(random.below(page_count));
      s->use(random.below(page_count));
      if (random.below(4) == 0) kept = s;
      if (random.below(4) == 0) kept = {};
      if (s) leaving_.fetch_add(1);
    }
  }

  torture_primary<P> primary_;
  std::uint64_t seed_;
  std::atomic<int> steps_{0};
  std::atomic<int> leaving_{0};
};

}  // namespace

TEST_CASE_TEMPLATE("O1: everything at once; also P1, P2, L1, L4", P, under_primary, keyed_primary, tracked_primary) {
  const char* const given = std::getenv("MMUNOTIFY_TORTURE_SECONDS");
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::milliseconds(given != nullptr ? 333 * std::strtoul(given, nullptr, 10) : 700);
  verdict result;
  std::uint64_t seed = std::strtoull(std::getenv("MMUNOTIFY_SEED"), nullptr, 0);
  int phases = 0;
  // At least a few, however slow the machine is.
  while (phases < 4 || std::chrono::steady_clock::now() < end) {
    phase<P> p(result, seed);
    p.run(phases % 4 == 3);
    seed += 10;
    ++phases;
    const char* const wrong = result.first.load();
    REQUIRE_MESSAGE(!static_cast<bool>(wrong),
                    "phase " << phases << ": " << std::string(wrong != nullptr ? wrong : ""));
  }
  MESSAGE(phases << " phases");
}
