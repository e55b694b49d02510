// SPDX-License-Identifier: MIT

#include <mmunotify/testing/stage.hpp>

#include <cstdint>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <mmunotify/notifier/subscriber.hpp>
#include <mmunotify/primary/frame_access.hpp>

#include "support/contract_recorder.hpp"
#include "support/recording_client.hpp"

using namespace mmunotify;
using testing::pages_at;
using testing::stage;
using testing::window;
using testing::window_pages;

namespace {

hva page(std::uint64_t p) { return {pages_at(p).first}; }
std::atomic_ref<std::uint64_t> word(stage& s, pfn f, std::uintptr_t at) {
  return word_at<std::uint64_t>(s.data(f) + at % page_size);
}
std::uint64_t shown(stage& s, pfn f, std::uint64_t p) {
  return word(s, f, stage::version_at(p)).load(std::memory_order_relaxed);
}
/// What is seen in the page, by one look.
std::uint64_t look(stage& s, std::uint64_t p) {
  const frame_lease l = s.pin(page(p), false);
  REQUIRE(l);
  const std::uint64_t seen = shown(s, l.frame, p);
  s.unpin(l.frame);
  return seen;
}

}  // namespace

TEST_CASE("every page shows which it is, and another version when it has another frame") {
  stage s;
  REQUIRE(s.ready());
  for (std::uint64_t p = 0; p < window_pages; ++p) CHECK(look(s, p) == stage::word_of(p, 0));
  s.replace(pages_at(3, 2));
  CHECK(look(s, 3) == stage::word_of(3, 1));
  CHECK(look(s, 4) == stage::word_of(4, 1));
  CHECK(look(s, 5) == stage::word_of(5, 0));
  CHECK(s.expected(3) == stage::word_of(3, 1));
}

TEST_CASE("a frame that its page has left shows nobody's word, at once or when the last reference is back") {
  stage s;
  const frame_lease once = s.pin(page(3), false);
  const pfn loose = once.frame;
  s.unpin(once.frame);
  s.replace(pages_at(3));
  CHECK(shown(s, loose, 3) == stage::taken_back);
  const frame_lease held = s.pin(page(3), false);
  s.replace(pages_at(3));
  CHECK(shown(s, held.frame, 3) == stage::word_of(3, 1));
  CHECK(s.on_loan() == 1);
  s.unpin(held.frame);
  CHECK(shown(s, held.frame, 3) == stage::taken_back);
  CHECK(s.on_loan() == 0);
}

TEST_CASE("what the device stores moves with the page") {
  stage s;
  const frame_lease l = s.pin(page(7), true);
  word(s, l.frame, stage::data_at(7)).store(42, std::memory_order_relaxed);
  s.unpin(l.frame);
  CHECK(s.stored(7) == 42);
  s.replace(pages_at(7));
  CHECK(s.stored(7) == 42);
  s.swap_out(pages_at(7));
  CHECK(s.stored(7) == 42);
  const std::uint64_t next = s.expected(7);
  CHECK(look(s, 7) == next);
  CHECK(s.stored(7) == 42);
}

TEST_CASE("pin answers what it must for pages that are elsewhere, read-only, withdrawn or gone") {
  stage s;
  CHECK(s.pin({window.first - 1}, false).error == errc::not_mapped);
  CHECK(s.pin({window.last}, false).error == errc::not_mapped);
  s.protect(pages_at(2), false);
  CHECK(s.pin(page(2), true).error == errc::access_denied);
  const frame_lease l = s.pin(page(2), false);
  CHECK(l);
  CHECK_FALSE(l.writable);
  s.unpin(l.frame);
  s.withdraw(pages_at(4));
  CHECK(s.pin(page(4), false).error == errc::not_mapped);
  s.release();
  CHECK(s.pin(page(2), false).error == errc::not_mapped);
}

TEST_CASE("pin runs out of frames like any primary") {
  stage s;
  std::vector<pfn> all;
  errc e = errc::ok;
  for (unsigned i = 0; i < 1000 && e == errc::ok; ++i) {
    const frame_lease l = s.pin(page(0), false);
    e = l.error;
    if (l) all.push_back(l.frame);
    s.swap_out(pages_at(0));
  }
  CHECK(e == errc::no_memory);
  for (const pfn f : all) s.unpin(f);
  CHECK(look(s, 0) == s.expected(0));
}

TEST_CASE("K4: a frame that is not on loan cannot be given back") {
  stage s;
  const contract_recorder recorder;
  s.unpin({0});
  s.unpin({1U << 30});
  CHECK(recorder.rules() == std::vector<std::string>{"K4", "K4"});
}

TEST_CASE("O1: a store to a frame that is nobody's is reported when the frame is used again") {
  stage s;
  const frame_lease l = s.pin(page(1), true);
  s.unpin(l.frame);
  s.replace(pages_at(1));
  word(s, l.frame, stage::data_at(1)).store(13, std::memory_order_relaxed);
  const contract_recorder recorder;
  for (unsigned i = 0; i < 400; ++i) s.replace(pages_at(2));
  CHECK(recorder.rules() == std::vector<std::string>{"O1"});
}

TEST_CASE("L7: a hook that pins is reported and refused") {
  struct pinning {
    stage* s;
    errc seen = errc::ok;
    void invalidate_range_start(const invalidation&) noexcept { seen = s->pin(page(0), false).error; }
  };
  stage s;
  pinning client{&s};
  subscriber<pinning> node{client};
  REQUIRE(s.space().register_subscriber(node) == errc::ok);
  {
    const contract_recorder recorder;
    s.replace(pages_at(5));
    CHECK(recorder.rules() == std::vector<std::string>{"L7"});
  }
  CHECK(client.seen == errc::would_deadlock);
  CHECK(s.space().unregister(node) == errc::ok);
}

TEST_CASE("each operation brackets exactly its range") {
  stage s;
  std::vector<std::string> log;
  logging_client client{log, "c"};
  subscriber<logging_client> node{client};
  REQUIRE(s.space().register_subscriber(node) == errc::ok);
  const std::string one = logging_client::text(pages_at(2, 3));
  const std::vector<std::string> both{"c:start" + one, "c:end" + one};
  const auto logged = [&] { return std::exchange(log, {}); };
  s.replace(pages_at(2, 3));
  CHECK(logged() == both);
  s.swap_out(pages_at(2, 3));
  CHECK(logged() == both);
  s.protect(pages_at(2, 3), false);
  CHECK(logged() == both);
  s.withdraw(pages_at(2, 3));
  CHECK(logged() == both);
  s.end(s.start(pages_at(2, 3)));
  CHECK(logged() == both);
  CHECK(s.try_bracketed(pages_at(2, 3), [] {}));
  CHECK(logged() == both);
  client.refuses = true;
  CHECK_FALSE(s.try_bracketed(pages_at(2, 3), [] { FAIL("refused, and gone on"); }));
  CHECK(logged() == both);
  s.release();
  CHECK(logged() == std::vector<std::string>{"c:release"});
  CHECK(s.space().unregister(node) == errc::ok);
}

TEST_CASE("a replacement in place has consecutive frames, and tells them") {
  struct told {
    std::vector<entry_change> changes;
    void invalidate_range_start(const invalidation& i) { CHECK(i.in_place); }
    void change_entry(const entry_change& c) { changes.push_back(c); }
  };
  stage s;
  told client;
  subscriber<told> node{client};
  REQUIRE(s.space().register_subscriber(node) == errc::ok);
  REQUIRE(s.replace_in_place(4, 3, false));
  REQUIRE(client.changes.size() == 1);
  CHECK(client.changes[0].range == pages_at(4, 3));
  CHECK_FALSE(client.changes[0].writable);
  for (std::uint64_t i = 0; i < 3; ++i) {
    CHECK(shown(s, client.changes[0].frame + i, 4 + i) == s.expected(4 + i));
  }
  CHECK(s.space().unregister(node) == errc::ok);
}
