// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/memslot.hpp>

#include <doctest/doctest.h>

#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>

using namespace mmunotify;
using x86::entry_list;
using x86::entry_place;
using x86::memslot;

namespace {
struct fixture {
  srcu_domain domain;
  x86::memslots slots{domain};
  std::mutex lock;
  std::unique_ptr<x86::shadow_page> page = std::make_unique<x86::shadow_page>();
  x86::stock<x86::rmap_chunk> chunks;
  memslot* slot = nullptr;

  /// A slot whose guest frames and host pages differ by this many frames.
  fixture(std::uint64_t base, std::uint64_t pages, std::uint64_t host_frame) {
    CHECK(chunks.fill(4) == errc::ok);
    CHECK(slots.add({.id = 1, .base = {base}, .pages = pages, .host = {host_frame << page_shift}}, lock) == errc::ok);
    slot = slots.current().find({base});
  }
  auto mapped(std::uint64_t first, std::uint64_t last) {
    std::vector<std::tuple<unsigned, std::uint64_t>> found;
    slot->for_each_mapped({first}, {last},
                          [&](unsigned level, gfn f, entry_list&) { found.emplace_back(level, f.value); });
    return found;
  }
};
using found = std::vector<std::tuple<unsigned, std::uint64_t>>;
}  // namespace

TEST_CASE("a range of frames names the lists that map one of them, by level, and no empty one") {
  fixture f(1000, 5000, 1000);
  CHECK(f.mapped(1000, 6000) == found{});
  f.slot->add_mapping({1000}, 1, {f.page.get(), 1}, f.chunks);
  f.slot->add_mapping({1024}, 2, {f.page.get(), 2}, f.chunks);
  f.slot->add_mapping({1536}, 2, {f.page.get(), 3}, f.chunks);
  f.slot->add_mapping({5999}, 1, {f.page.get(), 4}, f.chunks);
  CHECK(f.mapped(1000, 6000) == found{{1, 1000}, {1, 5999}, {2, 1024}, {2, 1536}});
  CHECK(f.mapped(1000, 1024) == found{{1, 1000}});
  CHECK(f.mapped(1001, 1025) == found{{2, 1024}});
  CHECK(f.mapped(1535, 1536) == found{{2, 1024}});
  CHECK(f.mapped(1535, 1537) == found{{2, 1024}, {2, 1536}});
  CHECK(f.mapped(2048, 5999) == found{});
  CHECK_FALSE(f.slot->remove_mapping({1024}, 2, {f.page.get(), 9}, f.chunks));
  CHECK(f.slot->remove_mapping({1024}, 2, {f.page.get(), 2}, f.chunks));
  CHECK_FALSE(f.slot->listed({1024}, 2));
  f.slot->add_mapping({1000}, 1, {f.page.get(), 8}, f.chunks);
  CHECK(f.slot->remove_mapping({1000}, 1, {f.page.get(), 1}, f.chunks));
  CHECK(f.slot->listed({1000}, 1));
  CHECK(f.mapped(1000, 6000) == found{{1, 1000}, {1, 5999}, {2, 1536}});
}

TEST_CASE("a large frame lies in its slot as a whole, aligned in guest and host alike, with no table and no log") {
  {
    fixture f(1000, 5000, 1000 + 512 * 7);
    CHECK_FALSE(f.slot->may_be_large({1023}, 2));  // begins before the slot
    CHECK(f.slot->may_be_large({1024}, 2));
    CHECK(f.slot->may_be_large({1535}, 2));
    CHECK_FALSE(f.slot->may_be_large({5999}, 2));  // ends behind it
    CHECK_FALSE(f.slot->may_be_large({1024}, 3));
    f.slot->count_table({1030}, 1);
    f.slot->count_table({1031}, 1);
    CHECK_FALSE(f.slot->may_be_large({1024}, 2));
    CHECK(f.slot->may_be_large({1536}, 2));
    f.slot->count_table({1030}, -1);
    CHECK_FALSE(f.slot->may_be_large({1500}, 2));
    f.slot->count_table({1031}, -1);
    CHECK(f.slot->may_be_large({1500}, 2));
    const auto nothing = [](memslot&) {};
    CHECK(f.slots.set_log(1, x86::dirty_tracking::dirty_bits, 0, f.lock, nothing) == errc::ok);
    CHECK_FALSE(f.slot->may_be_large({1500}, 2));
    CHECK(f.slots.set_log(1, x86::dirty_tracking::off, 0, f.lock, nothing) == errc::ok);
    CHECK(f.slot->may_be_large({1500}, 2));
    CHECK(f.slots.set_log(2, x86::dirty_tracking::off, 0, f.lock, nothing) == errc::not_registered);
  }
  fixture g(1000, 5000, 1001);
  CHECK_FALSE(g.slot->may_be_large({1024}, 2));
  fixture h(0, 3 * 512 * 512, 512 * 512);
  CHECK(h.slot->may_be_large({512 * 512}, 3));
  fixture i(0, 3 * 512 * 512, 512);
  CHECK_FALSE(i.slot->may_be_large({512 * 512}, 3));
  CHECK(i.slot->may_be_large({512 * 512}, 2));
}

TEST_CASE("marks are kept while there is a log, by the frame's place in the slot") {
  fixture f(1000, 100, 0);
  f.slot->mark_dirty({1000});  // nobody listens
  const auto nothing = [](memslot&) {};
  CHECK(f.slots.set_log(1, x86::dirty_tracking::write_protect, 0, f.lock, nothing) == errc::ok);
  CHECK(f.slot->logs(x86::dirty_tracking::write_protect));
  CHECK_FALSE(f.slot->logs(x86::dirty_tracking::dirty_bits));
  CHECK(f.slot->log()->take(0) == 0);
  f.slot->mark_dirty({1000});
  f.slot->mark_dirty({1065});
  CHECK(f.slot->log()->marked(65));
  CHECK(f.slot->log()->take(0) == 1);
  CHECK(f.slot->log()->take(0) == 0);
  CHECK(f.slot->log()->take(1) == 2);
}
