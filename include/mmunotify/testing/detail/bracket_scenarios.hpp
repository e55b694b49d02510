// SPDX-License-Identifier: MIT
#pragma once

// Scenarios about brackets: what is unmapped, for how long, and what is not.

#include <array>
#include <cstdint>
#include <iterator>

#include <mmunotify/testing/detail/trial.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing::detail {

/// Ranges whose edges are where mistakes are made.
inline constexpr range edge_ranges[] = {
    pages_at(7),
    pages_at(0),
    pages_at(window_pages - 1),
    pages_at(3, 2),
    pages_at(0, 9),
    pages_at(5, window_pages - 5),
    window,
    {window.first + 4 * page_size, window.first + 4 * page_size + 1},         // one byte, the first
    {window.first + 5 * page_size - 1, window.first + 5 * page_size},         // the last
    {window.first + 5 * page_size - 1, window.first + 5 * page_size + 1},     // one of each of two
    {window.first + 8 * page_size + 100, window.first + 11 * page_size + 1},  // crooked at both ends
    {window.first - 10 * page_size, window.first + page_size},                // beyond the window
    {window.last - 1, window.last + 100 * page_size},
    {0, UINTPTR_MAX},
};

/// The device reads what is there, and what it writes is found again after the page has moved.
template <class Factory>
void loads_and_stores(trial<Factory>& t) noexcept {
  if (!t.fill()) return;
  for (std::uint64_t p = 0; p < window_pages; ++p) {
    access_result r = t.store(p, p + 100);
    for (unsigned n = 0; n < t.patience && r.error == errc::again; ++n) r = t.store(p, p + 100);
    const auto page = static_cast<unsigned>(p);
    if (!t.verdict.that(r.error == errc::ok, "access", "a store to page %u: %s", page, to_string(r.error))) return;
    t.verdict.that(t.primary.stored(p) == p + 100, "access", "a store to page %u went elsewhere", page);
    t.primary.replace(pages_at(p));
    t.verdict.that(t.primary.stored(p) == p + 100, "O1", "a store to page %u was lost with its old frame", page);
    if (!t.sees(p, "O1", "after a bracket")) return;
  }
}

/// For each range and reason: nothing in it is mapped between start and end, before the change and after it.
template <class Factory>
void nothing_between_start_and_end(trial<Factory>& t) noexcept {
  for (unsigned e = 0; e < event_count; ++e) {
    const auto why = static_cast<event>(e);
    if (!hears_of<typename trial<Factory>::client_type>(why)) continue;
    for (const range r : edge_ranges) {
      if (!t.sees_all(window, "O1", "after brackets")) return;
      const auto ticket = t.primary.start(r, why);
      bool fine = t.closed(r, "O1", to_string(why)) && t.undisturbed(r, to_string(why));
      stage::for_each(r, [&](std::uint64_t p) { t.primary.take_back(p); });
      fine = fine && t.closed(r, "O1", "after the change, before the end");
      t.primary.end(ticket);
      if (!fine || !t.undisturbed(r, "after the end")) return;
    }
  }
  static_cast<void>(t.sees_all(window, "O1", "after the last bracket"));
}

/// C9, C4: a fault beside an open bracket neither waits nor retries.
template <class Factory>
void faults_elsewhere_go_on(trial<Factory>& t) noexcept {
  for (const range r : {pages_at(7), pages_at(3, 2), range{window.first - page_size, window.first}}) {
    const auto ticket = t.primary.start(r);
    for (std::uint64_t p = 0; p < window_pages && !t.failed(); ++p) {
      if (pages_at(p).overlaps(r)) continue;
      const access_result a = t.load(p);
      t.verdict.that(a.error == errc::ok && a.value == t.primary.expected(p), "C9",
                     "a bracket elsewhere is open, and a fault of page %u ends with: %s", static_cast<unsigned>(p),
                     to_string(a.error));
    }
    t.primary.end(ticket);
    t.primary.replace(window);
  }
}

/// P5: one bracket's end does not open what another still closes, whichever ends first.
template <class Factory>
void overlapping_brackets(trial<Factory>& t) noexcept {
  struct pair {
    range a, b;
  };
  const pair pairs[] = {{pages_at(4), pages_at(4)},    {pages_at(2, 4), pages_at(4, 4)}, {pages_at(2, 8), pages_at(4)},
                        {pages_at(4), pages_at(2, 8)}, {pages_at(4), {0, UINTPTR_MAX}},  {pages_at(3), pages_at(4)}};
  for (const pair& p : pairs) {
    for (const bool first_ends_first : {true, false}) {
      if (!t.fill()) return;
      const auto a = t.primary.start(p.a, event::unmap);
      const auto b = t.primary.start(p.b, event::clear);
      bool fine = t.closed(p.a, "P5", "two brackets are open") && t.closed(p.b, "P5", "two brackets are open");
      t.primary.end(first_ends_first ? a : b);
      const range still = first_ends_first ? p.b : p.a;
      stage::for_each(still, [&](std::uint64_t q) { t.primary.take_back(q); });
      fine = fine && t.closed(still, "P5", "one of two overlapping brackets has ended");
      t.primary.end(first_ends_first ? b : a);
      if (!fine || !t.sees_all(window, "P5", "both brackets have ended")) return;
    }
  }
}

/// P5: more brackets than anybody has room for, which end in another order than they started.
template <class Factory>
void many_brackets(trial<Factory>& t) noexcept {
  constexpr std::uint64_t n = 24;
  if (!t.fill()) return;
  std::array<test_space::ticket, n> open{};
  for (std::uint64_t p = 0; p < n; ++p) open[p] = t.primary.start(pages_at(p));
  bool fine = t.closed(pages_at(0, n), "P5", "24 brackets are open");
  for (std::uint64_t i = 0; i < n; ++i) {
    const std::uint64_t ends = i * 7 % n;
    t.primary.take_back(ends);
    t.primary.end(open[ends]);
    for (std::uint64_t j = i + 1; j < n && fine; ++j) {
      fine = t.closed(pages_at(j * 7 % n), "P5", "some of many brackets have ended");
    }
  }
  if (fine) static_cast<void>(t.sees_all(window, "P5", "all of many brackets have ended"));
}

/// The same page again and again: what is remembered of brackets is bounded, and a fault gets through at the end.
template <class Factory>
void thousands_of_brackets(trial<Factory>& t) noexcept {
  for (unsigned i = 0; i < 1000 && !t.failed(); ++i) {
    t.primary.replace(pages_at(i % window_pages, i % 3 == 0 ? 1 : 0));
    t.primary.replace(pages_at(5));
    if (i % 10 == 0) static_cast<void>(t.sees(5, "O1", "after thousands of brackets"));
  }
  static_cast<void>(t.sees_all(window, "O1", "after thousands of brackets"));
}

/// Pages that lose rights, and that go for good.
template <class Factory>
void protect_and_unmap(trial<Factory>& t) noexcept {
  if (!hears_of<typename trial<Factory>::client_type>(event::protection_vma)) return;
  // A store that collides may fail: each has some tries.
  const auto written = [&](std::uint64_t p, int tries = 1) {
    for (; tries > 0; --tries) {
      if (t.store(p, 42).error == errc::ok) return true;
    }
    return false;
  };
  if (!t.fill()) return;
  t.verdict.that(written(3, 2), "access", "a store to a writable page fails");
  t.primary.protect(pages_at(2, 2), false);
  t.verdict.that(!written(3, 2), "O1", "page 3 has been made read-only, and a store succeeds");
  if (!t.sees(3, "O1", "a page has been made read-only")) return;
  t.verdict.that(!written(3), "O1", "page 3 is read-only and mapped for reading, and a store succeeds");
  t.verdict.that(written(4, 2), "C4", "page 3 has been made read-only, and a store to page 4 fails");
  t.primary.protect(pages_at(2, 2), true);
  t.verdict.that(written(3, 3), "access", "page 3 is writable again, and a store fails");
  t.primary.withdraw(pages_at(9, 2));
  static_cast<void>(t.gone(pages_at(9, 2), "O1", "after an unmap"));
  t.verdict.that(t.load(9).error != errc::ok && !t.mapped(9), "O1", "page 9 is unmapped, and a load succeeds");
  static_cast<void>(t.sees(8, "O1", "the next page is unmapped") && t.sees(11, "O1", "the page before is unmapped"));
}

/// P3, P4: somebody else refuses; the adapter, asked before or after, has got an end, or nothing at all.
template <class Factory>
void refused_by_another(trial<Factory>& t) noexcept {
  if (!t.fill()) return;
  refuser other{};
  subscriber<refuser> node{other};
  const auto check = [&](const char* when) {
    for (const range r : {pages_at(3), pages_at(0, 6), window}) {
      t.verdict.that(!t.primary.try_bracketed(r, [] {}), "P3", "a refusal was not passed on");
      if (!t.sees_all(window, "P4", when)) return;
    }
  };
  if (t.primary.space().register_subscriber(node) == errc::ok) {  // newer than the adapter: refuses before it is asked
    check("a newer client has refused");
    static_cast<void>(t.primary.space().unregister(node));
  }
  if (t.failed()) return;
  t.detach();  // older: refuses after the adapter was asked
  if (t.primary.space().register_subscriber(node) != errc::ok) return;
  t.attach();
  if (t.fill()) check("an older client has refused");
  static_cast<void>(t.primary.space().unregister(node));
}

/// P3, P4: the adapter itself cannot serve a start now: it refuses, and nothing has changed.
template <class Factory>
void refuses_and_changes_nothing(trial<Factory>& t) noexcept {
  if constexpr (can_be_held<typename trial<Factory>::adapter_type>) {
    for (const range r : {pages_at(3), pages_at(2, 5), window}) {
      if (!t.fill()) return;
      bool served = false;
      {
        [[maybe_unused]] const auto held = t.adapter().hold();
        served = t.primary.try_bracketed(r, [&] {});
      }
      if (!served) {
        stage::for_each(window, [&](std::uint64_t p) {
          t.verdict.that(t.mapped(p), "P4", "a start was refused, and page %u has lost its mapping all the same",
                         static_cast<unsigned>(p));
        });
      }
      t.primary.replace(pages_at(4));
      if (!t.sees_all(window, "P4", "the adapter has refused a start")) return;
    }
    const bool served = t.primary.try_bracketed(pages_at(1), [&] { t.closed(pages_at(1), "O1", "not blockable"); });
    t.verdict.that(served, "P3", "a start was refused although nothing kept the adapter from serving it");
    static_cast<void>(t.fill());
  }
}

/// Whoever ignores its own migrations must not ignore those of others, nor what is no migration.
template <class Factory>
void only_own_brackets_are_ignored(trial<Factory>& t) noexcept {
  if constexpr (has_owner_name<typename trial<Factory>::adapter_type>) {
    const int stranger = 0;
    const void* const self = t.adapter().owner();
    struct one {
      event why;
      const void* owner;
    };
    const one all[] = {{event::migrate, &stranger}, {event::migrate, nullptr}, {event::exclusive, &stranger},
                       {event::exclusive, nullptr}, {event::unmap, self},      {event::clear, self}};
    for (const one& o : all) {
      if (!t.fill()) return;
      const auto ticket = t.primary.start(pages_at(6, 2), o.why, o.owner);
      stage::for_each(pages_at(6, 2), [&](std::uint64_t p) { t.primary.take_back(p); });
      const bool fine = t.closed(pages_at(6, 2), "O1", "somebody else's bracket");
      t.primary.end(ticket);
      if (!fine) return;
    }
    const auto own = t.primary.start(pages_at(6, 2), event::migrate, self);
    t.primary.end(own);
    static_cast<void>(t.fill());
  }
}

}  // namespace testing::detail
MMUNOTIFY_END_NAMESPACE
