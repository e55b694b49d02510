// SPDX-License-Identifier: MIT

// All operations of reference_mmu at once: against a naive model, one after another; and on many threads.
//
//   primary.mix -ns -tc="torture*"      the long version; MMUNOTIFY_TORTURE_SECONDS says how long

#include "mmu_fixture.hpp"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <thread>

#include "support/threads.hpp"

using namespace mmu_tests;

namespace {

std::uint64_t number_from(const char* variable, std::uint64_t otherwise) {
  const char* const text = std::getenv(variable);
  return text != nullptr && *text != 0 ? std::strtoull(text, nullptr, 10) : otherwise;
}
std::uint64_t run_seed() { return number_from("MMUNOTIFY_SEED", 1); }

// --- One after another, with a model that knows nothing of frames. --------------------------------------------------

/// What an address space must look like from outside.
struct model {
  struct page {
    protection allows = protection::read_write;
    std::uint64_t content = 0;
    bool dirty = true;
    bool unsure = false;  ///< an operation failed half-way through faulting in for writes
  };
  std::map<std::uintptr_t, page> pages;

  bool all(std::uintptr_t first, std::uintptr_t last) const {
    return std::distance(pages.lower_bound(first), pages.lower_bound(last)) ==
           static_cast<std::ptrdiff_t>(last - first);
  }
  bool any(std::uintptr_t first, std::uintptr_t last) const {
    return pages.lower_bound(first) != pages.lower_bound(last);
  }
  void erase(std::uintptr_t first, std::uintptr_t last) {
    pages.erase(pages.lower_bound(first), pages.lower_bound(last));
  }
  template <class Function>
  void each(std::uintptr_t first, std::uintptr_t last, Function f) {
    for (auto i = pages.lower_bound(first); i != pages.lower_bound(last); ++i) f(i->second);
  }
  errc access(std::uintptr_t p, bool write) const {
    const auto found = pages.find(p);
    if (found == pages.end()) return errc::not_mapped;
    return found->second.allows < (write ? protection::read_write : protection::read) ? errc::access_denied : errc::ok;
  }
};

/// An address space, its model, and a secondary.
struct member {
  explicit member(physical_memory& ram) : mmu(ram), secondary(mmu) {}
  mmu_type mmu;
  mirror secondary;
  model expected;
};

/// Some relatives that share too little memory. Every operation either does what the model says, or answers no_memory
/// and has changed nothing that the model can see.
class family {
 public:
  /// Even seeds have little memory, odd ones so much that blocks are found.
  explicit family(std::uint64_t seed) : ram_(seed % 2 == 0 ? 3 * block + 200 : 24 * block, 300, 40), random_(seed) {
    for (auto& m : members_) m = std::make_unique<member>(ram_);
    members_[2]->secondary.keeps_in_place = false;
    // Something to begin with, so that most steps find a page.
    for (auto& m : members_) {
      first_ = 0;
      last_ = 2 * block;
      REQUIRE(m->mmu.map(r(), protection::read_write) == errc::ok);
      fill(m->expected, protection::read_write);
    }
  }

  void step() {
    member& m = *members_[random_.below(members_.size())];
    first_ = near();
    last_ = first_ + 1 + random_.below(8);
    if (random_.below(6) == 0) {
      first_ = random_.below(3) * block;
      last_ = first_ + block;
    }
    const std::uint64_t kind = random_.below(40);
    if (kind == 0) {
      whole_spaces(m);
    } else if (kind == 1) {
      make_huge(m);
    } else if (kind < 5) {
      areas(m);
    } else if (kind < 15) {
      pages_of(m);
    } else {
      accesses(m);
    }
    for (const auto& each : members_) REQUIRE(each->secondary.agrees());
  }

  void check() {
    mmu_type* const all[] = {&members_[0]->mmu, &members_[1]->mmu, &members_[2]->mmu};
    const char* const broken = mmu_type::verify(all);
    REQUIRE_MESSAGE(broken == nullptr, broken);
    for (const auto& m : members_) {
      for (int i = 0; i < 12; ++i) check_page(*m, near());
    }
  }

  void finish() {
    for (auto& m : members_) m.reset();
    CHECK(ram_.frames.free_count() == ram_.frames.size());
    CHECK(ram_.swap.free_count() == ram_.swap.size());
    CHECK(ram_.device.free_count() == ram_.device.size());
  }

 private:
  /// A page near an end of one of three blocks.
  std::uintptr_t near() {
    const std::uintptr_t centre = random_.below(4) * block;
    return centre + random_.below(12) + (centre == 0 ? 0 : block - 6) - (centre == 0 ? 0 : block);
  }
  range r() const { return mmu_tests::pages(first_, last_); }
  /// True if it was done, false if there was no memory; every other answer must be the expected one.
  static bool done(errc e, errc expected = errc::ok) {
    if (e == errc::no_memory) return false;
    REQUIRE(e == expected);
    return e == errc::ok;
  }

  void areas(member& m) {
    model& x = m.expected;
    const bool any = x.any(first_, last_);
    const auto allows = static_cast<protection>(1 + random_.below(2));
    switch (random_.below(7)) {
      case 0:
      case 1:
        if (!done(m.mmu.map(r(), allows), any ? errc::overlap : errc::ok)) return;
        return fill(x, allows);
      case 2: {
        const bool aligned = first_ % block == 0 && last_ % block == 0;
        if (!done(m.mmu.map_huge(r(), allows), !aligned ? errc::bad_range : any ? errc::overlap : errc::ok)) return;
        return fill(x, allows);
      }
      case 3:
        if (done(m.mmu.unmap(r()), any ? errc::ok : errc::not_mapped)) x.erase(first_, last_);
        return;
      case 4: return move(m);
      default:
        if (!done(m.mmu.protect(r(), allows), x.all(first_, last_) ? errc::ok : errc::not_mapped)) return;
        x.each(first_, last_, [&](model::page& p) { p.allows = allows; });
    }
  }
  void fill(model& x, protection allows) {
    for (std::uintptr_t p = first_; p < last_; ++p) x.pages[p] = {.allows = allows};
  }
  void move(member& m) {
    model& x = m.expected;
    const std::uintptr_t size = last_ - first_;
    const std::uintptr_t to = size == block && random_.below(2) == 0 ? random_.below(3) * block : near();
    const bool overlap = to < last_ && first_ < to + size;
    const errc expected = overlap ? errc::overlap : x.all(first_, last_) ? errc::ok : errc::not_mapped;
    if (!done(m.mmu.move(r(), at(to)), expected)) return;
    x.erase(to, to + size);
    for (std::uintptr_t p = first_; p < last_; ++p) {
      x.pages[p - first_ + to] = x.pages[p];
      x.pages[p - first_ + to].dirty = true;
    }
    x.erase(first_, last_);
  }

  /// A block that is huge at the end, by mapping or by collapsing, unless there is no memory for it.
  void make_huge(member& m) {
    first_ = random_.below(3) * block;
    last_ = first_ + block;
    model& x = m.expected;
    if (random_.below(2) == 0) {
      if (x.any(first_, last_)) REQUIRE(m.mmu.unmap(r()) == errc::ok);
      x.erase(first_, last_);
      if (done(m.mmu.map_huge(r(), protection::read_write))) fill(x, protection::read_write);
      return;
    }
    if (!x.all(first_, last_)) return;
    REQUIRE(m.mmu.protect(r(), protection::read_write) == errc::ok);
    REQUIRE(m.mmu.clear_soft_dirty(r()) == errc::ok);
    x.each(first_, last_, [](model::page& p) { p = {.content = p.content, .dirty = false}; });
    std::byte all[block];  // one of each page, so that no device has any
    for (std::uintptr_t p = first_; p < last_; ++p) {
      if (!done(m.mmu.read(at(p), {&all[p - first_], 1}))) return;
    }
    done(m.mmu.collapse(r()));
  }

  void whole_spaces(member& m) {
    switch (random_.below(8)) {
      case 0: {
        auto& child = members_[random_.below(members_.size())];
        if (child.get() == &m) return;
        child.reset();
        child = std::make_unique<member>(ram_);
        if (done(m.mmu.fork(child->mmu))) child->expected = m.expected;
        return;
      }
      case 1: {
        m.secondary.refuse(random_.below(2) == 0);
        const reap_answer answer = m.mmu.reap();
        REQUIRE(answer.error == errc::ok);
        if (answer) m.expected.each(0, ~std::uintptr_t{0}, [](model::page& p) { p.content = 0; });
        m.secondary.refuse(false);
        // Entries are gone, and with them what they knew of writes; refused areas are not.
        m.expected.each(0, ~std::uintptr_t{0}, [](model::page& p) { p.unsure = true; });
        if (!answer) reread(m);
        return;
      }
      default:
        if (!done(m.mmu.clear_soft_dirty(r()), m.expected.any(first_, last_) ? errc::ok : errc::not_mapped)) return;
        m.expected.each(first_, last_, [](model::page& p) { p.dirty = p.unsure = false; });
    }
  }
  /// Some areas were reaped and some were not: a page is as it was, or zero.
  static void reread(member& m) {
    for (auto& [page, p] : m.expected.pages) {
      std::uint64_t found = 0;
      const errc e = m.mmu.load(hva{at(page)}, found);
      if (e != errc::ok) continue;
      REQUIRE((found == p.content || found == 0));
      p.content = found;
    }
  }

  void pages_of(member& m) {
    model& x = m.expected;
    const errc expected = x.any(first_, last_) ? errc::ok : errc::not_mapped;
    const void* const device = &m.secondary;
    switch (random_.below(8)) {
      case 0: done(m.mmu.swap_out(r()), expected); return;
      case 1: done(m.mmu.migrate(r()), expected); return;
      case 2: done(m.mmu.migrate_to_device(r(), device), expected); return;
      case 3: done(m.mmu.migrate_to_system(r(), device), expected); return;
      case 4: {
        bool writable = x.all(first_, last_);
        x.each(first_, last_, [&](model::page& p) { writable = writable && p.allows == protection::read_write; });
        const errc e = m.mmu.make_exclusive(r(), device);
        REQUIRE((e == errc::no_memory || (e == errc::ok) == writable));
        if (e == errc::ok) x.each(first_, last_, [](model::page& p) { p.dirty = true; });
        if (e == errc::no_memory) x.each(first_, last_, [](model::page& p) { p.unsure = true; });
        return;
      }
      case 5: done(m.mmu.merge_equal(r()).error, expected); return;
      case 6: done(m.mmu.collapse(r()), expected); return;
      default: REQUIRE(m.mmu.clear_young(r()).error == expected);
    }
  }

  void accesses(member& m) {
    const std::uintptr_t p = first_;
    const bool write = random_.below(2) == 0;
    const errc expected = m.expected.access(p, write);
    const std::uint64_t value = random_.below(3);  // few values, so that pages are equal now and then
    if (random_.below(2) == 0) {
      std::uint64_t found = 0;
      const errc e = write ? put(m.mmu, p, value) : m.mmu.load(hva{at(p)}, found);
      if (!done(e, expected)) return;
      if (write) return wrote(m, p, value);
      REQUIRE(found == m.expected.pages[p].content);
      return;
    }
    std::uint64_t found = 0;
    const bool could = m.secondary.access(at(p), write, [&](std::atomic_ref<std::uint64_t> word) {
      found = word.load(std::memory_order_relaxed);
      if (write) word.store(value, std::memory_order_relaxed);
    });
    if (!could) {
      // The fault may have taken the page's first write, and then there was no memory.
      if (expected == errc::ok) m.expected.pages[p].unsure = true;
      return;
    }
    REQUIRE(expected == errc::ok);
    REQUIRE(found == m.expected.pages[p].content);
    if (write) wrote(m, p, value);
  }
  static void wrote(member& m, std::uintptr_t p, std::uint64_t value) {
    m.expected.pages[p].content = value;
    m.expected.pages[p].dirty = true;
    m.expected.pages[p].unsure = false;
  }

  static void check_page(member& m, std::uintptr_t p) {
    const auto found = m.expected.pages.find(p);
    const soft_dirty_answer dirty = m.mmu.soft_dirty(mmu_tests::pages(p, p + 1));
    REQUIRE((dirty.error == errc::not_mapped) == (found == m.expected.pages.end()));
    if (found == m.expected.pages.end()) return;
    if (!found->second.unsure) REQUIRE(dirty.dirty == found->second.dirty);
    std::uint64_t value = 0;
    if (done(m.mmu.load(hva{at(p)}, value))) REQUIRE(value == found->second.content);
  }

  physical_memory ram_;
  std::array<std::unique_ptr<member>, 3> members_;
  small_random random_;
  std::uintptr_t first_ = 0, last_ = 0;
};

// ThreadSanitizer looks at every byte of the free frames that verify looks at.
constexpr int seeds = MMUNOTIFY_TSAN ? 2 : 6;
constexpr int check_every = MMUNOTIFY_TSAN ? 256 : 32;
constexpr int fork_count = MMUNOTIFY_TSAN ? 15 : 40;

void random_family(std::uint64_t seed, int steps) {
  CAPTURE(seed);
  family f{seed};
  for (int step = 0; step < steps; ++step) {
    CAPTURE(step);
    f.step();
    if (step % check_every == 0) f.check();
  }
  f.finish();
}

TEST_CASE("O1: random operations of relatives that share memory lead to what a naive model says") {
  for (std::uint64_t seed = run_seed(); seed != run_seed() + seeds; ++seed) random_family(seed, 1500);
}

// --- On many threads. ------------------------------------------------------------------------------------------------

constexpr std::array<std::uintptr_t, 5> stable{0, 1, 5, 100, 511};
constexpr std::uintptr_t changing = 2 * block;  // pages from here come and go
constexpr std::size_t writers = 2;

/// One address space that two writers, a changer and a forker work on. Each writer counts in words of its own, in pages
/// that stay; every word must be where its writer left it, and in a child where it was at the fork.
struct turmoil {
  physical_memory ram{16 * block, 400, 64};
  mmu_type mmu{ram};
  mirror secondary{mmu};
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::atomic<std::uint64_t> forks{0};
  frame_lease lent{};  ///< the changer's
  std::array<std::array<std::atomic<std::uint64_t>, stable.size()>, writers> intended{}, written{};

  turmoil() { REQUIRE(mmu.map(pages(0, block), protection::read_write) == errc::ok); }

  void expect(bool right) {
    if (!right) wrong.fetch_add(1, std::memory_order_relaxed);
  }
  static std::uintptr_t word_of(std::size_t writer, std::size_t i) { return at(stable[i]) + 64 * writer + 8; }

  /// Adds one to a word of the writer's own, as the processor or as the secondary, and checks what was there.
  void write_one(std::size_t me, std::size_t i, bool as_secondary) {
    const std::uint64_t before = written[me][i].load(std::memory_order_relaxed);
    intended[me][i].store(before + 1, std::memory_order_seq_cst);
    bool done = false;
    if (as_secondary) {
      done = secondary.access(word_of(me, i), true, [&](std::atomic_ref<std::uint64_t> word) {
        expect(word.load(std::memory_order_relaxed) == before);
        word.store(before + 1, std::memory_order_relaxed);
      });
    } else {
      std::uint64_t found = before;
      const errc e = mmu.compare_exchange(hva{word_of(me, i)}, found, before + 1);
      expect(e == errc::ok || e == errc::no_memory || e == errc::access_denied);
      done = e == errc::ok;
    }
    if (done) written[me][i].store(before + 1, std::memory_order_seq_cst);
  }
  void writer(std::size_t me, std::uint64_t seed) {
    small_random random{seed};
    while (!stop.load(std::memory_order_relaxed)) {
      const std::size_t i = random.below(stable.size());
      write_one(me, i, random.below(2) == 0);
      std::uint64_t found = 0;
      if (mmu.load(hva{word_of(me, i)}, found) == errc::ok) {
        expect(found == written[me][i].load(std::memory_order_relaxed));
      }
    }
  }

  void change(mmu_type& m, small_random& random, const void* owner) {
    const std::uintptr_t first = random.below(3) == 0 ? 0 : stable[random.below(stable.size())];
    const range r = pages(first, random.below(3) == 0 ? block : first + 1);
    switch (random.below(10)) {
      case 0: expect_done(m.swap_out(r)); break;
      case 1: expect_done(m.migrate(r)); break;
      case 2: expect_done(m.migrate_to_device(r, owner)); break;
      case 3: expect_done(m.migrate_to_system(r, owner)); break;
      case 4: {
        const errc e = m.make_exclusive(pages(first, first + 1), owner);
        expect(e == errc::ok || e == errc::no_memory || e == errc::access_denied);
        break;
      }
      case 5: expect_done(m.merge_equal(r).error); break;
      case 6: expect_done(m.collapse(r)); break;
      case 7: expect_done(m.clear_soft_dirty(r)); break;
      case 8: expect_done(m.protect(r, protection::read)); [[fallthrough]];
      default: expect_done(m.protect(pages(0, block), protection::read_write));
    }
  }
  void expect_done(errc e) { expect(e == errc::ok || e == errc::no_memory); }

  void changer(std::uint64_t seed) {
    small_random random{seed};
    while (!stop.load(std::memory_order_relaxed)) {
      change(mmu, random, &secondary);
      const range r = pages(changing + random.below(8), changing + 8 + random.below(4));
      switch (random.below(4)) {
        case 0: static_cast<void>(mmu.map(r, protection::read_write)); break;
        case 1: static_cast<void>(mmu.unmap(r)); break;
        case 2: static_cast<void>(mmu.move(r, r.first + 64 * page_size)); break;
        default: borrow(r.first, random);
      }
    }
    if (lent) mmu.unpin(lent.frame);
  }
  /// One frame after another is on loan, while its page is moved or unmapped.
  void borrow(std::uintptr_t a, small_random& random) {
    if (lent) mmu.unpin(lent.frame);
    lent = mmu.pin(hva{random.below(2) == 0 ? a : at(stable[random.below(stable.size())])}, random.below(2) == 0);
  }

  using snapshot = std::array<std::array<std::uint64_t, stable.size()>, writers>;
  static snapshot of(const std::array<std::array<std::atomic<std::uint64_t>, stable.size()>, writers>& words) {
    snapshot s{};
    for (std::size_t w = 0; w < writers; ++w) {
      for (std::size_t i = 0; i < stable.size(); ++i) s[w][i] = words[w][i].load(std::memory_order_seq_cst);
    }
    return s;
  }

  /// A child holds what the parent had at one moment of the fork, whatever both do afterwards.
  void live(mmu_type& child, const snapshot& least, const snapshot& most, small_random& random) {
    mirror of_child{child};
    snapshot seen{};
    bool known[writers][stable.size()] = {};
    for (int step = 0; step < 40; ++step) {
      const std::size_t w = random.below(writers);
      const std::size_t i = random.below(stable.size());
      std::uint64_t found = 0;
      const bool could = of_child.access(word_of(w, i), false, [&](std::atomic_ref<std::uint64_t> word) {
        found = word.load(std::memory_order_relaxed);
      });
      if (could && known[w][i]) expect(found == seen[w][i]);
      if (could && !known[w][i]) expect(least[w][i] <= found && found <= most[w][i]);
      if (could) {
        known[w][i] = true;
        seen[w][i] = found;
        const bool wrote = of_child.access(word_of(w, i), true, [&](std::atomic_ref<std::uint64_t> word) {
          word.store(found + 1'000'000, std::memory_order_relaxed);
        });
        if (wrote) seen[w][i] = found + 1'000'000;
      }
      change(child, random, &of_child);
      expect(of_child.agrees());
    }
    const char* const broken = child.verify();
    expect(broken == nullptr);
  }
  void forker(std::uint64_t seed, int steps) {
    small_random random{seed};
    for (int step = 0; step < steps; ++step) {
      mmu_type child{ram};
      const snapshot least = of(written);
      const errc e = mmu.fork(child);
      const snapshot most = of(intended);
      expect_done(e);
      if (e != errc::ok) continue;
      forks.fetch_add(1, std::memory_order_relaxed);
      live(child, least, most, random);
      if (random.below(4) != 0) continue;
      mmu_type grandchild{ram};
      expect_done(child.fork(grandchild));
      expect(child.exit() == errc::ok);
    }
  }

  void finish() {
    CHECK(wrong == 0);
    REQUIRE(mmu.protect(pages(0, block), protection::read_write) == errc::ok);
    for (std::size_t w = 0; w < writers; ++w) {
      for (std::size_t i = 0; i < stable.size(); ++i) {
        std::uint64_t found = 0;
        REQUIRE(mmu.load(hva{word_of(w, i)}, found) == errc::ok);
        CHECK(found == written[w][i]);
      }
    }
    CHECK(secondary.agrees());
    sound(mmu);
    const primary_statistics s = mmu.statistics();
    CHECK(s.pins == s.unpins);
    CHECK(s.stale_writes == 0);
    CHECK(forks > 0);
    REQUIRE(mmu.exit() == errc::ok);
    CHECK(ram.frames.free_count() == ram.frames.size());
    CHECK(ram.swap.free_count() == ram.swap.size());
    CHECK(ram.device.free_count() == ram.device.size());
  }
};

void many_threads(std::uint64_t seed, int forks) {
  CAPTURE(seed);
  turmoil t;
  {
    std::vector<std::jthread> threads;
    threads.emplace_back([&] { t.writer(0, seed * 10); });
    threads.emplace_back([&] { t.writer(1, seed * 10 + 1); });
    threads.emplace_back([&] { t.changer(seed * 10 + 2); });
    threads.emplace_back([&] {
      t.forker(seed * 10 + 3, forks);
      t.stop.store(true, std::memory_order_relaxed);
    });
  }
  t.finish();
}

TEST_CASE("O1: with everything at once on many threads, every write is where its writer left it, in children too") {
  for (std::uint64_t seed = run_seed(); seed != run_seed() + 2; ++seed) many_threads(seed, fork_count);
}

TEST_CASE("torture: the same for longer, with one seed after another" * doctest::skip()) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(number_from("MMUNOTIFY_TORTURE_SECONDS", 4));
  for (std::uint64_t seed = run_seed() + 1000; std::chrono::steady_clock::now() < end; ++seed) {
    many_threads(seed, 200);
    random_family(seed, 2000);
  }
}

}  // namespace
