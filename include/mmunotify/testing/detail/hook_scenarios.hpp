// SPDX-License-Identifier: MIT
#pragma once

// Scenarios about the hooks that a client need not have, and about its life.

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>

#include <mmunotify/testing/detail/trial.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing::detail {

template <class Factory>
inline constexpr bool can_clear_young = has_clear_young<typename trial<Factory>::client_type> ||
                                        has_clear_flush_young<typename trial<Factory>::client_type>;

/// Effects: clears "accessed" in r, by the strongest hook that the client has. Returns: the answer.
template <class Factory>
bool clear_young_of(trial<Factory>& t, range r) noexcept {
  const inside_callbacks inside;
  if constexpr (has_clear_flush_young<typename trial<Factory>::client_type>) {
    return t.primary.space().clear_flush_young(r);
  } else {
    return t.primary.space().clear_young(r);
  }
}

/// O5: what was accessed is young, what was not is not.
template <class Factory>
void young_is_what_was_accessed(trial<Factory>& t) noexcept {
  const auto young = [&](range r) {
    const inside_callbacks inside;
    return t.primary.space().test_young(r);
  };
  constexpr std::uint64_t p = 6;
  t.verdict.that(!young(window), "O5", "nothing was accessed, and something is said to be young");
  if (!t.sees(p, "access", "at first")) return;
  const std::uintptr_t at = pages_at(p).first;
  t.verdict.that(young(pages_at(p)), "O5", "page 6 was accessed, and is said to be old");
  t.verdict.that(young({at, at + 1}) && young({at + page_size - 1, at + page_size}) && young({0, UINTPTR_MAX}), "O5",
                 "page 6 was accessed, and a range that has a part of it is said to be old");
  t.verdict.that(!young(pages_at(p - 1)) && !young(pages_at(p + 1)) && !young(pages_at(0, p)), "O5",
                 "only page 6 was accessed, and a range beside it is said to be young");
  t.verdict.that(young(pages_at(p)), "O5", "asking whether page 6 is young has made it old");
}

/// O5: clearing answers truly, clears exactly that, and what is accessed afterwards is young again.
template <class Factory>
void young_until_cleared(trial<Factory>& t) noexcept {
  constexpr bool tells = has_test_young<typename trial<Factory>::client_type>;
  constexpr std::uint64_t p = 6, q = 9;
  if (!t.sees(p, "access", "at first") || !t.sees(q, "access", "at first")) return;
  t.verdict.that(clear_young_of(t, pages_at(p)), "O5", "page 6 was accessed, and clearing says that it was not");
  t.verdict.that(!clear_young_of(t, pages_at(p)), "O5", "page 6 was cleared, and clearing it again finds it young");
  if constexpr (tells) {
    t.verdict.that(!t.primary.space().test_young(pages_at(p)), "O5", "page 6 was cleared, and is said to be young");
    t.verdict.that(t.primary.space().test_young(pages_at(q)), "O5", "page 6 was cleared, and page 9 has become old");
  }
  t.verdict.that(clear_young_of(t, {0, UINTPTR_MAX}), "O5", "page 9 was accessed, and clearing all finds nothing");
  if constexpr (!has_clear_flush_young<typename trial<Factory>::client_type>) {
    t.primary.replace(pages_at(p));  // nobody flushes: what the device still holds it uses without setting the bit
  }
  if (!t.sees(p, "O1", "after clearing")) return;
  t.verdict.that(clear_young_of(t, pages_at(p)), "O5", "page 6 was accessed after clearing, and is said to be old");
}

/// O5: the batch form marks exactly the pages that were accessed.
template <class Factory>
void young_batches(trial<Factory>& t) noexcept {
  constexpr std::uint64_t pattern = 0x8421'00f1U & ((std::uint64_t{1} << window_pages) - 1);
  for (std::uint64_t p = 0; p < window_pages; ++p) {
    if ((pattern >> p & 1) != 0 && !t.sees(p, "access", "at first")) return;
  }
  const auto ask = [&](bool clear) {
    std::array<std::uint64_t, 1> bits{};
    const inside_callbacks inside;
    static_cast<void>(t.primary.space().young_pages(window, bits, clear));
    return bits[0];
  };
  const auto must_be = [&](std::uint64_t found, std::uint64_t wanted, const char* when) {
    t.verdict.that(found == wanted, "O5", "%s: the young pages are %llx, and said to be %llx", when,
                   static_cast<unsigned long long>(wanted), static_cast<unsigned long long>(found));
  };
  if constexpr (has_test_young<typename trial<Factory>::client_type> ||
                has_young_pages<typename trial<Factory>::client_type>) {
    must_be(ask(false), pattern, "a batch");
  }
  must_be(ask(true), pattern, "a batch that clears");
  must_be(ask(true), 0, "a batch after one that clears");
}

/// O1: a client that keeps its mappings in an in-place bracket has the new ones when change_entry has returned.
template <class Factory>
void changes_in_place(trial<Factory>& t) noexcept {
  for (const bool writable : {true, false}) {
    for (const std::uint64_t n : {std::uint64_t{1}, std::uint64_t{3}}) {
      if (!t.fill()) return;
      t.verdict.that(t.primary.replace_in_place(8, n, writable), "access", "the kit has run out of frames");
      if (!t.sees_all(window, "O1", "pages were replaced in place")) return;
      const access_result r = t.store(8, 5);
      if (!writable) {
        t.verdict.that(r.error != errc::ok, "O1", "page 8 was replaced by a read-only one, and a store succeeds");
      }
      t.primary.replace(pages_at(8, n));
      if (!t.sees_all(window, "O1", "a bracket after a replacement in place")) return;
      t.primary.protect(pages_at(8, n), true);
    }
  }
  t.primary.replace(window);  // a page that nobody has mapped
  t.verdict.that(t.primary.replace_in_place(12, 2, true), "access", "the kit has run out of frames");
  static_cast<void>(t.sees_all(window, "O1", "an unmapped page was replaced in place"));
}

/// O1: what an open bracket has dropped stays dropped, though another bracket, in place, tells what is there now.
template <class Factory>
void changes_in_place_beside(trial<Factory>& t) noexcept {
  changer other{t.primary};
  subscriber<changer> node{other};
  const errc registered = t.primary.space().register_subscriber(node);  // older than the adapter: called after it
  t.verdict.that(registered == errc::ok, "access", "another client cannot register: %s", to_string(registered));
  t.attach();
  const auto bracketed = [&](const char* when) {
    const auto open = t.primary.start(pages_at(8, 3));
    if (other.pages == 0) t.verdict.that(t.primary.replace_in_place(8, 2, true), "access", "there are no frames left");
    static_cast<void>(t.gone(pages_at(8, 3), "O1", when));
    stage::for_each(pages_at(8, 3), [&](std::uint64_t p) { t.primary.take_back(p); });
    static_cast<void>(t.closed(pages_at(8, 3), "O1", when));
    t.primary.end(open);
    return t.sees_all(window, "O1", when);
  };
  if (t.fill() && bracketed("pages were replaced in place in an open bracket")) {
    other.pages = 2;
    static_cast<void>(bracketed("pages were replaced in place while a bracket started"));
    t.verdict.that(other.pages == 0 || t.failed(), "access", "there are no frames left");
  }
  static_cast<void>(t.primary.space().unregister(node));
}

/// O4: what the device cached of the range is forgotten.
template <class Factory>
void flushes_the_device(trial<Factory>& t) noexcept {
  const auto flush = [&](range r) {
    const inside_callbacks inside;
    t.primary.space().invalidate_secondary_tlbs(r);
  };
  for (const range r : {pages_at(3), pages_at(0, 5), pages_at(window_pages - 2, 2), range{0, UINTPTR_MAX}}) {
    if (!t.fill()) return;
    flush(r);
    static_cast<void>(t.gone(r, "O4", "the device's TLB was flushed"));
  }
  static_cast<void>(t.fill());
}

/// L3: a released space leaves nothing mapped, nothing can be mapped, nobody can register, and leaving is legal (L5).
template <class Factory>
void released(trial<Factory>& t) noexcept {
  if (!t.fill()) return;
  t.primary.announce_release();
  static_cast<void>(t.gone(window, "L3", "the space is released"));
  for (std::uint64_t p = 0; p < window_pages && !t.failed(); ++p) {
    t.verdict.that(t.load(p).error != errc::ok && !t.mapped(p), "L3", "the space is released, and page %u can be used",
                   static_cast<unsigned>(p));
  }
  t.primary.release();
  t.verdict.that(t.load(5).error != errc::ok && !t.mapped(5), "L3", "the pages are gone, and one can be used");
  t.detach();
  const errc e = t.adapter().attach(t.primary.space());
  t.verdict.that(e == errc::released, "L6", "attaching to a released space: %s", to_string(e));
  t.verdict.that(t.load(3).error != errc::ok && !t.mapped(3), "L6", "refused by a released space, it maps");
}

/// L1, L9: unregistered, nothing is mapped, and what happens meanwhile is not missed when it is registered again.
template <class Factory>
void leaves_and_comes_back(trial<Factory>& t) noexcept {
  for (unsigned round = 0; round < 3; ++round) {
    if (!t.fill()) return;
    t.detach();
    static_cast<void>(t.gone(window, "L1", "the adapter is unregistered"));
    t.verdict.that(t.load(3).error != errc::ok && !t.mapped(3), "L1", "the adapter is unregistered, and maps");
    t.primary.replace(window);
    if (t.failed()) return;
    t.attach();
    if (!t.sees_all(window, "L9", "registered again")) return;
    t.primary.replace(pages_at(round, 4));
  }
  static_cast<void>(t.sees_all(window, "L9", "registered for the third time"));
}

/// P7: who is not registered yet maps nothing, not even while it is registering and a bracket is in flight.
template <class Factory>
void not_usable_before_registered(trial<Factory>& t) noexcept {
  const auto unused = [&](const char* when) {
    t.verdict.that(t.load(4).error != errc::ok && !t.mapped(4), "P7", "%s: an access makes a mapping", when);
  };
  unused("never registered");
  const auto open = t.primary.start(window);  // in flight, and hears nobody
  std::thread registering([&] { t.attach(); });
  while (!t.primary.space().armed() && !t.failed()) std::this_thread::yield();
  unused("a bracket was in flight when the registration began");
  for (std::uint64_t p = 0; p < window_pages; ++p) t.primary.take_back(p);
  t.primary.end(open);
  registering.join();
  static_cast<void>(t.fill());
}

}  // namespace testing::detail
MMUNOTIFY_END_NAMESPACE
