// SPDX-License-Identifier: MIT

#include <mmunotify/notifier/disabled.hpp>
#include <mmunotify/notifier/keyed.hpp>
#include <mmunotify/primary/reference_mmu.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "support/contract_recorder.hpp"
#include "support/threads.hpp"

using namespace mmunotify;

namespace {

using mmu_type = reference_mmu<>;

constexpr std::uintptr_t base = 0x7000'0000;
constexpr std::uintptr_t at(std::uintptr_t page) { return base + page * page_size; }
constexpr range pages(std::uintptr_t first, std::uintptr_t last) { return {at(first), at(last)}; }

/// The seed that this run printed; each random test counts up from it.
std::uint64_t run_seed() {
  const char* const text = std::getenv("MMUNOTIFY_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 1;
}

errc put(mmu_type& mmu, std::uintptr_t page, std::uint64_t value) {
  return mmu.write(at(page), std::as_bytes(std::span{&value, 1}));
}
std::uint64_t get(mmu_type& mmu, std::uintptr_t page) {
  std::uint64_t value = ~std::uint64_t{0};
  REQUIRE(mmu.read(at(page), std::as_writable_bytes(std::span{&value, 1})) == errc::ok);
  return value;
}

/// Writes down every callback, and what the tables say about some pages during it.
struct recorder_hooks {
  struct note {
    bool start;
    invalidation what;
    std::vector<translation> seen;
    std::size_t free;
  };

  explicit recorder_hooks(mmu_type& m) : mmu(m) {}

  void invalidate_range_start(const invalidation& i) noexcept {
    write(true, i);
    if (inside) inside();
  }
  void invalidate_range_end(const invalidation& i) noexcept { write(false, i); }
  bool clear_young(range) noexcept { return ++asked_clear, std::exchange(young, false); }
  bool clear_flush_young(range) noexcept { return ++asked_flush, std::exchange(young, false); }
  bool test_young(range) noexcept { return ++asked_test, young; }
  void release() noexcept {
    ++released;
    if (inside) inside();
  }

  void write(bool start, const invalidation& i) {
    note n{start, i, {}, mmu.frames().free_count()};
    for (const std::uintptr_t page : watched) n.seen.push_back(mmu.translate_locked(hva{at(page)}));
    notes.push_back(n);
  }

  /// Checks that the notes from `first` on are one bracket of this kind, and returns its two ends.
  std::pair<note, note> bracket(std::size_t first, range r, event e, const void* owner = nullptr) const {
    REQUIRE(notes.size() >= first + 2);
    const note& start = notes[first];
    const note& end = notes[first + 1];
    CHECK(start.start);
    CHECK_FALSE(end.start);
    for (const note* n : {&start, &end}) {
      CHECK(n->what.range == r);
      CHECK(n->what.event == e);
      CHECK(n->what.owner == owner);
      CHECK(n->what.blockable);
    }
    return {start, end};
  }

  mmu_type& mmu;
  std::vector<std::uintptr_t> watched;
  std::vector<note> notes;
  void (*inside)() = nullptr;
  bool young = false;
  int asked_clear = 0, asked_flush = 0, asked_test = 0, released = 0;
};

/// A client that is registered as long as it lives.
template <class Client>
struct registered : Client {
  explicit registered(mmu_type& m) : Client(m) {
    const auto held = m.lock_tables();
    REQUIRE(m.space().register_subscriber(node, held) == errc::ok);
  }
  ~registered() { static_cast<void>(Client::mmu.space().unregister(node)); }
  registered(const registered&) = delete;
  registered& operator=(const registered&) = delete;

  subscriber<Client> node{*this};
};
using recorder = registered<recorder_hooks>;

/// Four pages mapped for writing; 0 to 2 touched, page i holding 100 + i.
struct four_pages {
  explicit four_pages(std::size_t frames = 16, std::size_t swap = 16) : mmu(frames, swap) {
    REQUIRE(mmu.map(pages(0, 4), protection::read_write) == errc::ok);
    for (std::uintptr_t page = 0; page < 3; ++page) REQUIRE(put(mmu, page, 100 + page) == errc::ok);
  }
  translation look(std::uintptr_t page) {
    const std::shared_lock held{mmu.tables()};
    return mmu.translate_locked(hva{at(page)});
  }
  mmu_type mmu;
};

TEST_CASE("a page appears when it is touched, filled with zeros, and keeps what is written") {
  mmu_type mmu{4};
  REQUIRE(mmu.map(pages(0, 2), protection::read_write) == errc::ok);
  CHECK(mmu.statistics().faults == 0);
  std::array<std::byte, page_size> whole;
  whole.fill(std::byte{1});
  REQUIRE(mmu.read(at(0), whole) == errc::ok);
  for (const std::byte b : whole) REQUIRE(b == std::byte{0});
  CHECK(put(mmu, 0, 42) == errc::ok);
  CHECK(get(mmu, 0) == 42);
  CHECK(mmu.statistics().faults == 1);
  CHECK(mmu.statistics().zero_filled == 1);
  CHECK(mmu.frames().free_count() == 3);
  CHECK(mmu.verify() == nullptr);
}

TEST_CASE("accesses of any size and alignment cross pages") {
  mmu_type mmu{4};
  REQUIRE(mmu.map(pages(0, 4), protection::read_write) == errc::ok);
  std::vector<std::byte> model(4 * page_size);
  small_random random{7};
  for (int i = 0; i < 300; ++i) {
    const std::uint64_t first = random.below(model.size());
    std::vector<std::byte> piece(random.below(std::min<std::uint64_t>(model.size() - first, 9000)) + 1);
    if (random.below(2) == 0) {
      for (std::byte& b : piece) b = static_cast<std::byte>(random());
      REQUIRE(mmu.write(base + first, piece) == errc::ok);
      std::copy(piece.begin(), piece.end(), model.begin() + static_cast<std::ptrdiff_t>(first));
    } else {
      REQUIRE(mmu.read(base + first, piece) == errc::ok);
      REQUIRE(std::memcmp(piece.data(), model.data() + first, piece.size()) == 0);
    }
  }
  CHECK(mmu.verify() == nullptr);
}

TEST_CASE("bad input gets an error value and changes nothing") {
  four_pages f;
  mmu_type& mmu = f.mmu;
  recorder r{mmu};
  const std::vector<area> areas{mmu.areas_locked().begin(), mmu.areas_locked().end()};
  const primary_statistics before = mmu.statistics();
  const std::uintptr_t top = std::numeric_limits<std::uintptr_t>::max() & ~page_mask;

  const std::vector<range> bad = {
      {at(1), at(1)},     {at(2), at(1)},
      {at(0) + 1, at(1)}, {at(0), at(1) + 8},
      {top, 0},           {top, page_size},
      {at(0), top},       {page_table::address_limit, page_table::address_limit + page_size}};
  for (const range& b : bad) {
    CHECK(mmu.map(b, protection::read) == errc::bad_range);
    CHECK(mmu.unmap(b) == errc::bad_range);
    CHECK(mmu.protect(b, protection::read) == errc::bad_range);
    CHECK(mmu.move(b, at(20)) == errc::bad_range);
    CHECK(mmu.swap_out(b) == errc::bad_range);
    CHECK(mmu.migrate(b) == errc::bad_range);
    CHECK(mmu.clear_young(b).error == errc::bad_range);
    CHECK(mmu.clear_flush_young(b).error == errc::bad_range);
    CHECK(mmu.test_young(b).error == errc::bad_range);
  }
  for (const std::uintptr_t to : {at(20) + 1, top, top - 2 * page_size, std::uintptr_t{page_table::address_limit}}) {
    CHECK(mmu.move(pages(0, 4), to) == errc::bad_range);
  }
  CHECK(mmu.move(pages(0, 2), at(1)) == errc::overlap);
  CHECK(mmu.move(pages(1, 3), at(0)) == errc::overlap);
  CHECK(mmu.move(pages(0, 2), at(0)) == errc::overlap);
  CHECK(mmu.move(pages(3, 5), at(20)) == errc::not_mapped);
  CHECK(mmu.map(pages(3, 5), protection::read) == errc::overlap);
  CHECK(mmu.map(pages(8, 9), protection{7}) == errc::access_denied);
  CHECK(mmu.protect(pages(0, 1), protection{7}) == errc::access_denied);
  CHECK(mmu.protect(pages(3, 5), protection::read) == errc::not_mapped);
  CHECK(mmu.unmap(pages(4, 9)) == errc::not_mapped);
  CHECK(mmu.swap_out(pages(4, 9)) == errc::not_mapped);
  CHECK(mmu.migrate(pages(4, 9)) == errc::not_mapped);
  CHECK(mmu.test_young(pages(4, 9)).error == errc::not_mapped);

  std::uint64_t word = 5;
  std::array<std::byte, 16> some{};
  CHECK(mmu.load(hva{at(0) + 4}, word) == errc::bad_range);
  CHECK(mmu.compare_exchange(hva{at(0) + 4}, word, std::uint64_t{1}) == errc::bad_range);
  CHECK(mmu.load(hva{at(4)}, word) == errc::not_mapped);
  CHECK(mmu.load(hva{top}, word) == errc::bad_range);
  CHECK(mmu.pin(hva{at(4)}, false).error == errc::not_mapped);
  CHECK(mmu.pin(hva{top}, false).error == errc::bad_range);
  CHECK(mmu.read(at(4) - 8, some) == errc::not_mapped);
  CHECK(mmu.write(at(4) - 8, some) == errc::not_mapped);
  CHECK(mmu.write(std::numeric_limits<std::uintptr_t>::max() - 7, some) == errc::bad_range);
  CHECK(mmu.read(at(9), std::span<std::byte>{}) == errc::ok);

  CHECK(word == 5);
  CHECK(r.notes.empty());
  CHECK(std::vector<area>{mmu.areas_locked().begin(), mmu.areas_locked().end()} == areas);
  CHECK(mmu.statistics().faults == before.faults);
  CHECK(mmu.statistics().brackets == before.brackets);
  for (std::uintptr_t page = 0; page < 3; ++page) CHECK(get(mmu, page) == 100 + page);
  CHECK(mmu.verify() == nullptr);
}

TEST_CASE("what the area forbids is refused, and a lease says what it allows") {
  four_pages f;
  mmu_type& mmu = f.mmu;
  REQUIRE(mmu.protect(pages(1, 2), protection::read) == errc::ok);
  REQUIRE(mmu.protect(pages(2, 3), protection::none) == errc::ok);
  std::uint64_t word = 101;
  CHECK(mmu.areas_locked().size() == 4);

  const frame_lease readable = mmu.pin(hva{at(1)}, false);
  REQUIRE(readable);
  CHECK_FALSE(readable.writable);
  mmu.unpin(readable.frame);
  const frame_lease writable = mmu.pin(hva{at(0)}, false);
  REQUIRE(writable);
  CHECK(writable.writable);
  mmu.unpin(writable.frame);
  CHECK(mmu.pin(hva{at(1)}, true).error == errc::access_denied);
  CHECK(mmu.pin(hva{at(2)}, false).error == errc::access_denied);
  CHECK(put(mmu, 1, 1) == errc::access_denied);
  CHECK(mmu.compare_exchange(hva{at(1)}, word, std::uint64_t{1}) == errc::access_denied);
  CHECK(mmu.load(hva{at(2)}, word) == errc::access_denied);
  std::array<std::byte, 2 * page_size> two{};
  CHECK(mmu.write(at(0), two) == errc::access_denied);
  CHECK(get(mmu, 0) == 100);
  CHECK(get(mmu, 1) == 101);
  REQUIRE(mmu.protect(pages(0, 4), protection::read_write) == errc::ok);
  CHECK(mmu.areas_locked().size() == 1);
  CHECK(get(mmu, 2) == 102);
}

TEST_CASE("unmap changes the tables inside one unmap bracket and frees the frames after its end") {
  four_pages f;
  recorder r{f.mmu};
  r.watched = {1, 2};
  const std::size_t free = f.mmu.frames().free_count();
  REQUIRE(f.mmu.unmap(pages(1, 6)) == errc::ok);
  const auto [start, end] = r.bracket(0, pages(1, 6), event::unmap);
  CHECK(r.notes.size() == 2);
  CHECK(start.seen[0].present);
  CHECK(start.seen[1].present);
  CHECK(end.seen[0].error == errc::not_mapped);
  CHECK(end.seen[1].error == errc::not_mapped);
  CHECK(end.free == free);
  CHECK(f.mmu.frames().free_count() == free + 2);
  CHECK(get(f.mmu, 0) == 100);
  CHECK(f.mmu.verify() == nullptr);
  CHECK(f.mmu.statistics().unmapped == 2);
}

TEST_CASE("protect changes the area inside one protection bracket") {
  four_pages f;
  recorder r{f.mmu};
  r.watched = {1};
  REQUIRE(f.mmu.protect(pages(1, 2), protection::read) == errc::ok);
  const auto [start, end] = r.bracket(0, pages(1, 2), event::protection_vma);
  CHECK(r.notes.size() == 2);
  CHECK(start.seen[0].allows == protection::read_write);
  CHECK(end.seen[0].allows == protection::read);
  CHECK(end.seen[0].frame == start.seen[0].frame);
}

TEST_CASE("move brackets what it destroys at the destination, then the old range, and keeps frames and contents") {
  four_pages f;
  recorder r{f.mmu};
  REQUIRE(f.mmu.map(pages(9, 12), protection::read) == errc::ok);
  const frame_lease doomed = f.mmu.pin(hva{at(10)}, false);
  REQUIRE(doomed);
  f.mmu.unpin(doomed.frame);
  r.watched = {0, 10};
  const std::size_t free = f.mmu.frames().free_count();
  REQUIRE(f.mmu.move(pages(0, 3), at(10)) == errc::ok);
  REQUIRE(r.notes.size() == 4);
  const auto [destroy, destroyed] = r.bracket(0, pages(10, 13), event::unmap);
  CHECK(destroy.seen[1].present);
  CHECK(destroyed.seen[1].error == errc::not_mapped);
  CHECK(destroyed.seen[0].present);
  CHECK(destroyed.free == free);
  const auto [start, end] = r.bracket(2, pages(0, 3), event::unmap);
  CHECK(start.free == free + 1);
  CHECK(start.seen[0].present);
  CHECK(start.seen[1].error == errc::not_mapped);
  CHECK(end.seen[0].error == errc::not_mapped);
  CHECK(end.seen[1].present);
  CHECK(end.seen[1].frame == start.seen[0].frame);
  for (std::uintptr_t page = 0; page < 3; ++page) CHECK(get(f.mmu, 10 + page) == 100 + page);
  CHECK(f.mmu.statistics().moved == 3);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("move to an empty place takes one bracket, and swapped pages move as well") {
  four_pages f;
  REQUIRE(f.mmu.swap_out(pages(1, 2)) == errc::ok);
  recorder r{f.mmu};
  REQUIRE(f.mmu.move(pages(0, 3), at(1000)) == errc::ok);
  r.bracket(0, pages(0, 3), event::unmap);
  CHECK(r.notes.size() == 2);
  CHECK(f.look(1001).swapped);
  CHECK(get(f.mmu, 1001) == 101);
  CHECK(f.mmu.pin(hva{at(1)}, false).error == errc::not_mapped);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("swap_out changes the tables inside a clear bracket, and a fault brings the contents back") {
  four_pages f;
  recorder r{f.mmu};
  r.watched = {0, 1, 3};
  const std::size_t free = f.mmu.frames().free_count();
  REQUIRE(f.mmu.swap_out(pages(0, 4)) == errc::ok);
  const auto [start, end] = r.bracket(0, pages(0, 4), event::clear);
  CHECK(start.seen[0].present);
  CHECK(end.seen[0].swapped);
  CHECK(end.seen[1].swapped);
  CHECK_FALSE(end.seen[2].swapped);
  CHECK(end.free == free);
  CHECK(f.mmu.frames().free_count() == free + 3);
  CHECK(f.mmu.swap().free_count() == 13);
  CHECK(f.mmu.swap_out(pages(0, 4)) == errc::ok);
  CHECK(r.notes.size() == 2);  // nothing is present: nothing changes
  for (std::uintptr_t page = 0; page < 3; ++page) CHECK(get(f.mmu, page) == 100 + page);
  CHECK(f.mmu.swap().free_count() == 16);
  CHECK(f.mmu.statistics().swapped_out == 3);
  CHECK(f.mmu.statistics().swapped_in == 3);
  CHECK(f.mmu.statistics().faults == 6);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("migrate moves the contents to fresh frames, bracketed as clear, or as migrate for an owner") {
  four_pages f;
  recorder r{f.mmu};
  r.watched = {0};
  const int device = 0;
  const std::size_t free = f.mmu.frames().free_count();
  for (const void* owner : {static_cast<const void*>(nullptr), static_cast<const void*>(&device)}) {
    r.notes.clear();
    REQUIRE(f.mmu.migrate(pages(0, 2), owner) == errc::ok);
    const auto [start, end] = r.bracket(0, pages(0, 2), owner == nullptr ? event::clear : event::migrate, owner);
    CHECK(start.seen[0].present);
    CHECK(end.seen[0].present);
    CHECK(start.seen[0].frame != end.seen[0].frame);
    CHECK(end.free == free - 2);  // the old frames and the new ones
    CHECK(f.mmu.frames().free_count() == free);
  }
  for (std::uintptr_t page = 0; page < 3; ++page) CHECK(get(f.mmu, page) == 100 + page);
  CHECK(f.mmu.statistics().migrated == 4);
  CHECK(f.mmu.verify() == nullptr);
}

/// Writes to a frame when it is told to let go, as a secondary may until its start callback returns.
struct last_writer {
  void invalidate_range_start(const invalidation&) noexcept { word_at<std::uint64_t>(frame).store(777); }
  std::byte* frame = nullptr;
};

TEST_CASE("contents are copied after start: what a secondary writes until then is kept") {
  for (const bool swap : {false, true}) {
    four_pages f;
    last_writer w;
    subscriber<last_writer> node{w};
    const frame_lease lease = f.mmu.pin(hva{at(0)}, true);
    REQUIRE(lease);
    w.frame = f.mmu.data(lease.frame);
    f.mmu.unpin(lease.frame);
    {
      const auto held = f.mmu.lock_tables();
      REQUIRE(f.mmu.space().register_subscriber(node, held) == errc::ok);
    }
    REQUIRE((swap ? f.mmu.swap_out(pages(0, 1)) : f.mmu.migrate(pages(0, 1))) == errc::ok);
    REQUIRE(f.mmu.space().unregister(node) == errc::ok);
    CHECK(get(f.mmu, 0) == 777);
    CHECK(f.mmu.verify() == nullptr);
  }
}

TEST_CASE("a page on loan is skipped by swap_out and migrate, and counted") {
  four_pages f;
  const frame_lease lease = f.mmu.pin(hva{at(1)}, true);
  REQUIRE(lease);
  CHECK(f.mmu.swap_out(pages(0, 3)) == errc::ok);
  CHECK(f.look(1).frame == lease.frame);
  CHECK(f.look(0).swapped);
  CHECK(f.mmu.migrate(pages(0, 3)) == errc::ok);
  CHECK(f.look(1).frame == lease.frame);
  CHECK(f.mmu.statistics().skipped_pinned == 2);
  CHECK(f.mmu.swap().free_count() == 14);  // what was planned for it is given back
  CHECK(f.mmu.verify() == nullptr);
  f.mmu.unpin(lease.frame);
  CHECK(f.mmu.swap_out(pages(0, 3)) == errc::ok);
  CHECK(f.look(1).swapped);
  CHECK(get(f.mmu, 1) == 101);
}

TEST_CASE("try_pin lends what is there, changes nothing, and waits for nobody") {
  four_pages f;
  REQUIRE(f.mmu.swap_out(pages(2, 3)) == errc::ok);
  CHECK_FALSE(f.mmu.clear_young(pages(1, 2)).error != errc::ok);
  const auto faults = f.mmu.statistics().faults;
  const frame_lease lease = f.mmu.try_pin(hva{at(1)});
  REQUIRE(lease);
  CHECK(lease.frame == f.look(1).frame);
  CHECK(lease.writable == f.look(1).writable);
  CHECK_FALSE(f.mmu.test_young(pages(1, 2)).young);
  CHECK(f.mmu.migrate(pages(1, 2)) == errc::ok);  // it is on loan
  CHECK(f.look(1).frame == lease.frame);
  f.mmu.unpin(lease.frame);
  CHECK(f.mmu.try_pin(hva{at(2)}).error == errc::again);  // swapped out, and stays so
  CHECK(f.look(2).swapped);
  CHECK(f.mmu.try_pin(hva{at(40)}).error == errc::not_mapped);
  CHECK(f.mmu.try_pin(hva{UINTPTR_MAX - 8}).error == errc::bad_range);
  REQUIRE(f.mmu.map(pages(50, 52), protection::read) == errc::ok);
  CHECK(f.mmu.try_pin(hva{at(50)}).error == errc::again);  // not touched yet
  REQUIRE(f.mmu.protect(pages(1, 2), protection::none) == errc::ok);
  CHECK(f.mmu.try_pin(hva{at(1)}).error == errc::access_denied);
  frame_lease busy{};
  {
    const auto held = f.mmu.lock_tables();
    std::thread([&] { busy = f.mmu.try_pin(hva{at(0)}); }).join();
  }
  CHECK(busy.error == errc::again);
  CHECK(f.mmu.statistics().faults == faults);
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(f.mmu.try_pin(hva{at(0)}).error == errc::released);
}

TEST_CASE("an unmapped frame on loan lives until it is given back, and is nobody's page") {
  four_pages f;
  const frame_lease lease = f.mmu.pin(hva{at(1)}, true);
  REQUIRE(f.mmu.pin(hva{at(1)}, false));
  const std::size_t free = f.mmu.frames().free_count();
  REQUIRE(f.mmu.unmap(pages(0, 4)) == errc::ok);
  CHECK(f.mmu.frames().free_count() == free + 2);
  REQUIRE(f.mmu.map(pages(0, 4), protection::read_write) == errc::ok);
  CHECK(get(f.mmu, 1) == 0);
  CHECK(word_at<std::uint64_t>(f.mmu.data(lease.frame)).load() == 101);
  CHECK(f.mmu.frames().pins(lease.frame) == 2);
  CHECK(f.mmu.verify() == nullptr);
  f.mmu.unpin(lease.frame);
  CHECK(f.mmu.frames().generation(lease.frame) == 0);
  f.mmu.unpin(lease.frame);
  CHECK(f.mmu.frames().generation(lease.frame) == 1);
  CHECK(f.mmu.statistics().pins == 2);
  CHECK(f.mmu.statistics().unpins == 2);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("giving back what was not lent is a contract failure and changes nothing") {
  four_pages f;
  const contract_recorder contracts;
  f.mmu.unpin(pfn{0});
  f.mmu.unpin(pfn{1000});
  CHECK(contracts.rules() == std::vector<std::string>{"K4", "K4"});
  CHECK(f.mmu.statistics().unpins == 0);
  CHECK(f.mmu.verify() == nullptr);
}

TEST_CASE("an address space that dies with a frame on loan is a contract failure") {
  const contract_recorder contracts;
  {
    four_pages f;
    REQUIRE(f.mmu.pin(hva{at(0)}, true));
  }
  CHECK(contracts.rules() == std::vector<std::string>{"K4"});
}

TEST_CASE("young is what the primary or a secondary has accessed; clearing asks all, testing stops at a yes") {
  four_pages f;
  recorder r{f.mmu};
  CHECK(f.mmu.test_young(pages(0, 1)));
  CHECK(r.asked_test == 0);
  CHECK(f.mmu.clear_young(pages(0, 1)));
  CHECK(r.asked_clear == 1);
  CHECK_FALSE(f.mmu.test_young(pages(0, 1)));
  CHECK(r.asked_test == 1);
  CHECK(f.mmu.test_young(pages(0, 2)));  // page 1 still is
  CHECK(f.mmu.clear_flush_young(pages(0, 4)));
  CHECK(r.asked_flush == 1);
  r.young = true;
  CHECK(f.mmu.test_young(pages(0, 4)));
  CHECK(f.mmu.clear_flush_young(pages(0, 4)));
  CHECK_FALSE(f.mmu.clear_young(pages(0, 4)));
  CHECK(get(f.mmu, 2) == 102);
  CHECK(f.mmu.test_young(pages(2, 3)));
  CHECK(r.notes.empty());
}

TEST_CASE("O5: young pages are answered page by page, those of secondaries among them, and cleared when asked") {
  four_pages f;
  recorder r{f.mmu};
  std::array<std::uint64_t, 1> bits{};
  CHECK(f.mmu.young_pages(pages(0, 4), bits, true) == errc::ok);
  CHECK(bits[0] == 0b0111);
  bits[0] = 0b1000;
  CHECK(f.mmu.young_pages(pages(0, 4), bits, false) == errc::ok);
  CHECK(bits[0] == 0b1000);  // marks are added
  r.young = true;
  CHECK(get(f.mmu, 1) == 101);
  bits[0] = 0;
  CHECK(f.mmu.young_pages(pages(1, 3), bits, false) == errc::ok);
  CHECK(bits[0] == 0b11);
  CHECK(r.notes.empty());
  CHECK(f.mmu.young_pages(pages(0, 65), bits, false) == errc::bad_range);
  CHECK(f.mmu.young_pages({at(0) + 1, at(1)}, bits, false) == errc::bad_range);
  CHECK(f.mmu.young_pages(pages(9, 10), bits, false) == errc::not_mapped);
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(f.mmu.young_pages(pages(0, 4), bits, false) == errc::released);
}

TEST_CASE("compare_exchange and load are atomic, follow the page, and say what they found") {
  four_pages f;
  std::uint64_t expected = 100;
  CHECK(f.mmu.compare_exchange(hva{at(0)}, expected, std::uint64_t{7}) == errc::ok);
  CHECK(f.mmu.compare_exchange(hva{at(0)}, expected, std::uint64_t{8}) == errc::again);
  CHECK(expected == 7);
  REQUIRE(f.mmu.swap_out(pages(0, 1)) == errc::ok);
  CHECK(f.mmu.compare_exchange(hva{at(0)}, expected, std::uint64_t{9}) == errc::ok);
  std::uint64_t value = 0;
  CHECK(f.mmu.load(hva{at(0)}, value) == errc::ok);
  CHECK(value == 9);
  std::uint32_t half = 0;
  CHECK(f.mmu.compare_exchange(hva{at(0) + 4}, half, std::uint32_t{1}) == errc::ok);
  CHECK(f.mmu.load(hva{at(0) + 4}, half) == errc::ok);
  CHECK(half == 1);
  CHECK(f.mmu.load(hva{at(0) + 2}, half) == errc::bad_range);
}

TEST_CASE("when frames or swap run out, nothing is half-done, at any size of the pool") {
  constexpr std::uintptr_t n = 4;
  for (std::size_t frames = 0; frames <= 2 * n; ++frames) {
    for (std::size_t slots = 0; slots <= n; ++slots) {
      CAPTURE(frames);
      CAPTURE(slots);
      mmu_type mmu{frames, slots};
      recorder r{mmu};
      REQUIRE(mmu.map(pages(0, n), protection::read_write) == errc::ok);
      std::array<std::byte, n * page_size> all;
      all.fill(std::byte{0x11});
      const errc wrote = mmu.write(at(0), all);
      CHECK(wrote == (frames < n ? errc::no_memory : errc::ok));
      const std::size_t present = std::min<std::size_t>(frames, n);
      CHECK(mmu.frames().free_count() == frames - present);
      const std::byte expected{static_cast<unsigned char>(wrote == errc::ok ? 0x11 : 0)};
      if (present < n) CHECK(mmu.pin(hva{at(present)}, false).error == errc::no_memory);
      CHECK(mmu.migrate(pages(0, n)) == (frames - present < present ? errc::no_memory : errc::ok));
      CHECK(mmu.frames().free_count() == frames - present);
      const std::size_t migrated = frames - present < present || present == 0 ? 0 : 2;
      CHECK(r.notes.size() == migrated);
      CHECK(mmu.swap_out(pages(0, n)) == (slots < present ? errc::no_memory : errc::ok));
      CHECK(r.notes.size() == migrated + (slots < present || present == 0 ? 0 : 2));
      CHECK(mmu.swap().free_count() == (slots < present ? slots : slots - present));
      for (std::uintptr_t page = 0; page < present; ++page) {
        std::byte b{};
        REQUIRE(mmu.read(at(page) + 100, {&b, 1}) == errc::ok);
        CHECK(b == expected);
      }
      CHECK(mmu.verify() == nullptr);
    }
  }
}

mmu_type* called_back = nullptr;
mmu_type* other_mmu = nullptr;
std::vector<errc> answers;

TEST_CASE("L7: calls from inside a callback, which would wait for themselves, are refused") {
  four_pages f;
  recorder r{f.mmu};
  called_back = &f.mmu;
  r.inside = [] {
    mmu_type& mmu = *called_back;
    std::byte b{};
    std::uint64_t w = 0;
    answers = {mmu.map(pages(30, 31), protection::read),
               mmu.unmap(pages(0, 1)),
               mmu.protect(pages(0, 1), protection::read),
               mmu.move(pages(0, 1), at(30)),
               mmu.swap_out(pages(0, 1)),
               mmu.migrate(pages(0, 1)),
               mmu.pin(hva{at(0)}, false).error,
               mmu.read(at(0), {&b, 1}),
               mmu.write(at(0), {&b, 1}),
               mmu.load(hva{at(0)}, w),
               mmu.compare_exchange(hva{at(0)}, w, w),
               mmu.clear_young(pages(0, 1)).error,
               mmu.map_huge({page_table::block_size, 2 * page_table::block_size}, protection::read),
               mmu.clear_soft_dirty(pages(0, 1)),
               mmu.soft_dirty(pages(0, 1)).error,
               mmu.collapse(pages(0, 1)),
               mmu.merge_equal(pages(0, 1)).error,
               mmu.migrate_to_device(pages(0, 1), &mmu),
               mmu.migrate_to_system(pages(0, 1), &mmu),
               mmu.make_exclusive(pages(0, 1), &mmu),
               mmu.find_owned(hva{at(0)}, &mmu, false).error,
               mmu.reap().error,
               mmu.fork(*other_mmu),
               other_mmu->fork(mmu),
               mmu.exit()};
    if (mmu.verify() == nullptr) answers.push_back(errc::ok);
  };
  const std::vector<errc> refused(25, errc::would_deadlock);
  mmu_type other{f.mmu.memory()};
  other_mmu = &other;
  REQUIRE(f.mmu.unmap(pages(3, 4)) == errc::ok);
  CHECK(answers == refused);
  answers.clear();
  REQUIRE(f.mmu.migrate(pages(0, 1)) == errc::ok);
  CHECK(answers == refused);
  answers.clear();
  REQUIRE(f.mmu.exit() == errc::ok);
  CHECK(r.released == 1);
  CHECK(answers == refused);
}

TEST_CASE("exit releases the secondaries, then frees everything; afterwards every call is refused") {
  four_pages f;
  mmu_type& mmu = f.mmu;
  recorder r{mmu};
  REQUIRE(mmu.swap_out(pages(2, 3)) == errc::ok);
  r.notes.clear();
  const frame_lease lease = mmu.pin(hva{at(0)}, true);
  REQUIRE(lease);
  called_back = &mmu;
  static std::size_t free_at_release = 0;
  r.inside = [] { free_at_release = called_back->frames().free_count(); };
  REQUIRE(mmu.exit() == errc::ok);
  CHECK(r.released == 1);
  CHECK(free_at_release == 14);
  CHECK(mmu.frames().free_count() == 15);
  CHECK(mmu.swap().free_count() == 16);
  mmu.unpin(lease.frame);
  CHECK(mmu.frames().free_count() == 16);
  CHECK(mmu.exit() == errc::ok);
  CHECK(r.released == 1);

  std::uint64_t w = 0;
  CHECK(mmu.map(pages(0, 1), protection::read) == errc::released);
  CHECK(mmu.unmap(pages(0, 1)) == errc::released);
  CHECK(mmu.protect(pages(0, 1), protection::read) == errc::released);
  CHECK(mmu.move(pages(0, 1), at(9)) == errc::released);
  CHECK(mmu.swap_out(pages(0, 1)) == errc::released);
  CHECK(mmu.migrate(pages(0, 1)) == errc::released);
  CHECK(mmu.clear_young(pages(0, 1)).error == errc::released);
  CHECK(mmu.clear_flush_young(pages(0, 1)).error == errc::released);
  CHECK(mmu.test_young(pages(0, 1)).error == errc::released);
  CHECK(mmu.pin(hva{at(0)}, false).error == errc::released);
  CHECK(mmu.load(hva{at(0)}, w) == errc::released);
  CHECK(mmu.compare_exchange(hva{at(0)}, w, w) == errc::released);
  CHECK(put(mmu, 0, 1) == errc::released);
  CHECK(mmu.read(at(0), std::as_writable_bytes(std::span{&w, 1})) == errc::released);
  CHECK(mmu.verify() == nullptr);
}

/// What random single-threaded operations should have led to.
struct model {
  struct page {
    protection allows;
    std::uint64_t content = 0;
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
};

/// One random operation on both. Every error must be the one that the model predicts.
void random_step(mmu_type& mmu, model& m, small_random& random) {
  const std::uintptr_t first = random.below(24);
  const std::uintptr_t last = first + 1 + random.below(8);
  const auto allows = static_cast<protection>(random.below(3));
  const bool any = m.any(first, last);
  switch (random.below(9)) {
    case 0: {
      REQUIRE(mmu.map(pages(first, last), allows) == (any ? errc::overlap : errc::ok));
      for (std::uintptr_t p = first; !any && p < last; ++p) m.pages[p] = {allows};
      break;
    }
    case 1:
      REQUIRE(mmu.unmap(pages(first, last)) == (any ? errc::ok : errc::not_mapped));
      m.erase(first, last);
      break;
    case 2: {
      const bool all = m.all(first, last);
      REQUIRE(mmu.protect(pages(first, last), allows) == (all ? errc::ok : errc::not_mapped));
      for (std::uintptr_t p = first; all && p < last; ++p) m.pages[p].allows = allows;
      break;
    }
    case 3: {
      const std::uintptr_t to = random.below(24);
      const std::uintptr_t size = last - first;
      const bool overlap = to < last && first < to + size;
      const bool all = m.all(first, last);
      const errc expected = overlap ? errc::overlap : all ? errc::ok : errc::not_mapped;
      REQUIRE(mmu.move(pages(first, last), at(to)) == expected);
      if (expected != errc::ok) break;
      m.erase(to, to + size);
      for (std::uintptr_t p = first; p < last; ++p) m.pages[p - first + to] = m.pages[p];
      m.erase(first, last);
      break;
    }
    case 4: REQUIRE(mmu.swap_out(pages(first, last)) == (any ? errc::ok : errc::not_mapped)); break;
    case 5: REQUIRE(mmu.migrate(pages(first, last)) == (any ? errc::ok : errc::not_mapped)); break;
    default: {
      const std::uint64_t value = random();
      const auto found = m.pages.find(first);
      const errc expected = found == m.pages.end()                           ? errc::not_mapped
                            : found->second.allows != protection::read_write ? errc::access_denied
                                                                             : errc::ok;
      REQUIRE(put(mmu, first, value) == expected);
      if (expected == errc::ok) found->second.content = value;
    }
  }
}

TEST_CASE("random operations lead to what a naive model says") {
  for (std::uint64_t seed = run_seed(); seed != run_seed() + 40; ++seed) {
    CAPTURE(seed);
    mmu_type mmu{64, 32};
    model m;
    small_random random{seed};
    for (int step = 0; step < 250; ++step) {
      random_step(mmu, m, random);
      if (step % 10 != 0) continue;
      for (std::uintptr_t p = 0; p < 32; ++p) {
        const auto found = m.pages.find(p);
        std::uint64_t value = 0;
        const errc e = mmu.load(hva{at(p)}, value);
        REQUIRE((e == errc::not_mapped) == (found == m.pages.end()));
        if (e == errc::not_mapped) continue;
        REQUIRE((e == errc::access_denied) == (found->second.allows == protection::none));
        if (e == errc::ok) REQUIRE(value == found->second.content);
      }
      REQUIRE(mmu.verify() == nullptr);
    }
  }
}

/// The least secondary MMU: a table under a lock, filled by faults with a collision check over the whole space.
class mirror_hooks {
 public:
  static constexpr std::size_t reach = 32;

  explicit mirror_hooks(mmu_type& m) : mmu(m) {}

  void invalidate_range_start(const invalidation& i) noexcept {
    const std::lock_guard lock{mutex_};
    ++open_;
    for (std::size_t p = 0; p < reach; ++p) {
      if (i.range.contains(at(p))) table_[p] = nullptr;
    }
  }
  void invalidate_range_end(const invalidation&) noexcept {
    const std::lock_guard lock{mutex_};
    --open_;
    ++sequence_;
  }
  void release() noexcept {
    const std::lock_guard lock{mutex_};
    table_.fill(nullptr);
    dead_ = true;
  }

  /// Calls f(frame) under the lock with the page mapped. Returns: false if it could not be mapped.
  template <class Function>
  bool touch(std::size_t page, Function f) {
    for (int attempt = 0; attempt < 50; ++attempt) {
      std::uint64_t before = 0;
      {
        const std::lock_guard lock{mutex_};
        if (table_[page] != nullptr) return f(table_[page]), true;
        before = sequence_;
      }
      const frame_lease lease = mmu.pin(hva{at(page)}, true);
      if (!lease) return false;
      bool done = false;
      {
        const std::lock_guard lock{mutex_};
        if (open_ == 0 && sequence_ == before && !dead_) {
          table_[page] = mmu.data(lease.frame);
          f(table_[page]);
          done = true;
        }
      }
      mmu.unpin(lease.frame);
      if (done) return true;
    }
    return false;
  }

  mmu_type& mmu;

 private:
  std::mutex mutex_;
  std::array<std::byte*, reach> table_{};
  unsigned open_ = 0;
  std::uint64_t sequence_ = 0;
  bool dead_ = false;
};
using small_mirror = registered<mirror_hooks>;

constexpr std::uintptr_t stable = 8;     // pages 0 to 7 stay, wherever their frames are
constexpr std::uintptr_t changing = 24;  // pages 8 to 23 come and go
constexpr std::size_t torture_frames = 96;

/// The second word of a page of the changing part tells which page it is, modulo 8; moves keep that.
bool tag_is_right(std::byte* frame, std::uintptr_t page) {
  const std::uint64_t tag = 0x1000 + page % 8;
  const auto word = word_at<std::uint64_t>(frame + 8);
  std::uint64_t found = 0;
  return word.compare_exchange_strong(found, tag, std::memory_order_relaxed) || found == tag;
}

struct torture {
  mmu_type mmu{torture_frames, torture_frames};
  small_mirror mirror{mmu};
  std::array<std::atomic<std::uint64_t>, stable> added{};
  std::atomic<int> wrong{0};

  torture() {
    REQUIRE(mmu.map(pages(0, stable), protection::read_write) == errc::ok);
    REQUIRE(mmu.map(pages(stable, changing), protection::read_write) == errc::ok);
  }

  void expect(bool right) {
    if (!right) wrong.fetch_add(1, std::memory_order_relaxed);
  }

  void secondary(std::uint64_t seed, int steps) {
    small_random random{seed};
    for (int i = 0; i < steps; ++i) {
      const std::uintptr_t page = random.below(changing);
      if (page < stable) {
        if (mirror.touch(page,
                         [](std::byte* f) { word_at<std::uint64_t>(f).fetch_add(1, std::memory_order_relaxed); })) {
          added[page].fetch_add(1, std::memory_order_relaxed);
        }
      } else {
        mirror.touch(page, [&](std::byte* f) { expect(tag_is_right(f, page)); });
      }
    }
  }

  /// `me` is where in a page this thread keeps words of its own.
  void primary_pages(std::uint64_t seed, std::uintptr_t me, int steps) {
    small_random random{seed};
    std::array<std::uint64_t, stable> mine{};
    for (int i = 0; i < steps; ++i) {
      const std::uintptr_t first = random.below(changing - 1);
      const range r = pages(first, first + 1 + random.below(changing - first));
      switch (random.below(6)) {
        case 0: static_cast<void>(mmu.swap_out(r)); break;
        case 3: write_and_read(random.below(stable), me, mine); break;
        case 1: static_cast<void>(mmu.migrate(r)); break;
        case 2: static_cast<void>(mmu.clear_young(r)); break;
        default: add_by_primary(random.below(stable));
      }
    }
  }

  /// The last value that this thread wrote is still there, wherever the page has been since.
  void write_and_read(std::uintptr_t page, std::uintptr_t me, std::array<std::uint64_t, stable>& mine) {
    std::uint64_t found = 0;
    expect(mmu.read(at(page) + me, std::as_writable_bytes(std::span{&found, 1})) == errc::ok);
    expect(found == mine[page]);
    mine[page] += 1;
    expect(mmu.write(at(page) + me, std::as_bytes(std::span{&mine[page], 1})) == errc::ok);
  }

  void add_by_primary(std::uintptr_t page) {
    std::uint64_t expected = 0;
    errc e = mmu.load(hva{at(page)}, expected);
    while (e == errc::ok || e == errc::again) {
      e = mmu.compare_exchange(hva{at(page)}, expected, expected + 1);
      if (e == errc::ok) break;
    }
    expect(e == errc::ok);
    added[page].fetch_add(1, std::memory_order_relaxed);
  }

  void fault(std::uintptr_t page) {
    const frame_lease lease = mmu.pin(hva{at(page)}, true);
    if (lease) mmu.unpin(lease.frame);
  }

  void primary_structure(std::uint64_t seed, int steps) {
    small_random random{seed};
    for (int i = 0; i < steps; ++i) {
      const std::uintptr_t first = stable + random.below(8);
      const range r = pages(first, first + 1 + random.below(3));
      switch (random.below(4)) {
        case 0: static_cast<void>(mmu.unmap(r)); break;
        case 1:
          static_cast<void>(mmu.map(r, protection::read_write));
          fault(first);  // so that there is something to move
          break;
        case 2: static_cast<void>(mmu.move(r, r.first + 8 * page_size)); break;
        default: static_cast<void>(mmu.move({r.first + 8 * page_size, r.last + 8 * page_size}, r.first));
      }
    }
  }
};

TEST_CASE("O1: many threads change, fault and write at once, and no write is lost or goes astray") {
  constexpr int steps = 3000;
  for (std::uint64_t seed = run_seed(); seed != run_seed() + 3; ++seed) {
    CAPTURE(seed);
    torture t;
    {
      std::vector<std::jthread> threads;
      threads.emplace_back([&] { t.secondary(10 * seed, 4 * steps); });
      threads.emplace_back([&] { t.secondary(10 * seed + 1, 4 * steps); });
      threads.emplace_back([&] { t.primary_pages(10 * seed + 2, 128, steps); });
      threads.emplace_back([&] { t.primary_pages(10 * seed + 3, 256, steps); });
      threads.emplace_back([&] { t.primary_structure(10 * seed + 4, steps); });
      threads.emplace_back([&] {
        for (int i = 0; i < 20; ++i) t.expect(t.mmu.verify() == nullptr);
      });
    }
    CHECK(t.wrong == 0);
    for (std::uintptr_t page = 0; page < stable; ++page) CHECK(get(t.mmu, page) == t.added[page]);
    const char* broken = t.mmu.verify();
    CHECK_MESSAGE(broken == nullptr, broken);
    const primary_statistics s = t.mmu.statistics();
    CHECK(s.pins == s.unpins);
    CHECK(s.stale_writes == 0);
    CHECK(s.migrated > 0);
    CHECK(s.swapped_in > 0);
    CHECK(s.moved > 0);
  }
}

TEST_CASE("exit beside faults and changes ends them all, and several exits are one") {
  for (std::uint64_t seed = run_seed(); seed != run_seed() + 20; ++seed) {
    torture t;
    {
      std::vector<std::jthread> threads;
      threads.emplace_back([&] { t.secondary(seed, 200); });
      threads.emplace_back([&] {
        while (t.mmu.migrate(pages(0, changing)) != errc::released) {
        }
      });
      for (int i = 0; i < 2; ++i) {
        threads.emplace_back([&] {
          let_others_run();
          t.expect(t.mmu.exit() == errc::ok);
          t.expect(t.mmu.swap_out(pages(0, 1)) == errc::released);
        });
      }
    }
    CHECK(t.wrong == 0);
    CHECK(t.mmu.frames().free_count() == torture_frames);
    CHECK(t.mmu.swap().free_count() == torture_frames);
    CHECK(t.mmu.verify() == nullptr);
  }
}

struct silent {
  void release() noexcept { ++released; }
  int released = 0;
};

TEST_CASE("L7: an exit inside an open bracket is refused, and the address space lives on") {
  reference_mmu<address_space<arming::tracked>> mmu{8};
  silent s;
  subscriber<silent> node{s};
  REQUIRE(mmu.space().register_subscriber(node) == errc::ok);
  REQUIRE(mmu.map(pages(0, 4), protection::read_write) == errc::ok);
  {
    const contract_recorder contracts;
    [[maybe_unused]] const auto bracket = mmu.space().invalidate(pages(0, 1), event::clear);
    CHECK(mmu.exit() == errc::would_deadlock);
  }
  CHECK(s.released == 0);
  CHECK(mmu.pin(hva{at(4)}, true).error == errc::not_mapped);
  CHECK(mmu.unmap(pages(0, 4)) == errc::ok);
  CHECK(mmu.exit() == errc::ok);
  CHECK(s.released == 1);
}

TEST_CASE("a primary with no lock to offer, and one whose notifier is compiled out, work alike") {
  reference_mmu<address_space<arming::tracked>> tracked{8};
  REQUIRE(tracked.map(pages(0, 4), protection::read_write) == errc::ok);
  std::array<std::byte, 3 * page_size> three{};
  REQUIRE(tracked.write(at(0), three) == errc::ok);
  CHECK(tracked.swap_out(pages(0, 4)) == errc::ok);
  CHECK(tracked.unmap(pages(0, 2)) == errc::ok);
  CHECK(tracked.verify() == nullptr);
  CHECK(tracked.exit() == errc::ok);
  CHECK(tracked.frames().free_count() == 8);

  reference_mmu<address_space<disabled>> alone{8};
  REQUIRE(alone.map(pages(0, 4), protection::read_write) == errc::ok);
  REQUIRE(alone.write(at(0), three) == errc::ok);
  CHECK(alone.migrate(pages(0, 4)) == errc::ok);
  CHECK(alone.test_young(pages(0, 4)));
  CHECK(alone.verify() == nullptr);
  CHECK(alone.exit() == errc::ok);
}

template <class Space>
void every_operation() {
  physical_memory ram{2048, 16, 8};
  reference_mmu<Space> mmu{ram}, child{ram};
  const std::uintptr_t block = page_table::block_size;
  const range small{0, 4 * page_size}, large{block, 2 * block};
  std::array<std::byte, 3 * page_size> three{};
  std::array<std::uint64_t, 1> bits{};
  REQUIRE(mmu.map(small, protection::read_write) == errc::ok);
  REQUIRE(mmu.map_huge(large, protection::read_write) == errc::ok);
  REQUIRE(mmu.write(0, three) == errc::ok);
  CHECK(mmu.young_pages(small, bits, true) == errc::ok);
  CHECK(mmu.fork(child) == errc::ok);
  CHECK(mmu.merge_equal(small).merged == 2);
  CHECK(mmu.write(0, three) == errc::ok);
  CHECK(mmu.clear_soft_dirty(small) == errc::ok);
  CHECK_FALSE(mmu.soft_dirty(small));
  CHECK(mmu.migrate_to_device(small, &mmu) == errc::ok);
  CHECK(mmu.find_owned(hva{0}, &mmu, true));
  CHECK(mmu.migrate_to_system(small, &mmu) == errc::ok);
  CHECK(mmu.make_exclusive(small, &mmu) == errc::ok);
  CHECK(mmu.read(0, three) == errc::ok);
  CHECK(mmu.protect({block, block + page_size}, protection::read) == errc::ok);
  CHECK(mmu.protect(large, protection::read_write) == errc::ok);
  CHECK(mmu.collapse(large) == errc::ok);
  CHECK(child.reap());
  reference_mmu<Space>* const family[] = {&mmu, &child};
  CHECK(reference_mmu<Space>::verify(family) == nullptr);
}

TEST_CASE("every operation works without a lock to offer, behind a static key, and with the notifier compiled out") {
  every_operation<address_space<arming::tracked>>();
  every_operation<address_space<arming::keyed<std::shared_mutex>>>();
  every_operation<address_space<disabled>>();
}

}  // namespace
