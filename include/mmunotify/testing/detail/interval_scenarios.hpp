// SPDX-License-Identifier: MIT
#pragma once

// Scenarios about intervals: their edges, and what they do under open brackets and in the middle of faults.

#include <atomic>
#include <cstdint>

#include <mmunotify/testing/detail/bracket_scenarios.hpp>
#include <mmunotify/testing/detail/fault_scenarios.hpp>
#include <mmunotify/testing/detail/random_rounds.hpp>
#include <mmunotify/testing/detail/trial.hpp>
#include <mmunotify/testing/interval_adapter.hpp>
#include <mmunotify/testing/schedule.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing::detail {

template <class Factory>
using interval_adapter_of = typename adapter_of<Factory>::interval_adapter;

/// A part of the window that has pages on both sides of it, and holds the disputed page.
inline constexpr range inner = pages_at(4, 16);

/// Effects: the trial's interval is inserted at r.
template <class Factory>
bool place(trial<Factory>& t, range r) noexcept {
  t.adapter().where = r;
  t.attach();
  return !t.failed();
}

/// Effects: the same, and waits until the space has been armed for a while: before, a fault may have to wait for all
/// brackets, once (C2). Context: no bracket is open.
template <class Factory>
bool place_and_settle(trial<Factory>& t, range r) noexcept {
  if (!place(t, r)) return false;
  static_cast<void>(t.primary.space().barrier());
  return t.sees_all(r, "access", "at first");
}

/// Pages outside of the interval can neither be mapped nor used.
template <class Factory>
bool not_its_own(trial<Factory>& t, range r, const char* rule, const char* when) noexcept {
  bool all = t.gone(r, rule, when);
  stage::for_each(r, [&](std::uint64_t p) {
    all = all && t.verdict.that(t.load(p).error != errc::ok && !t.mapped(p), rule, "%s: page %u can be used", when,
                                static_cast<unsigned>(p));
  });
  return all;
}

/// C4, C10: of each bracket the common part is dropped, all of it and nothing else; C2: one that touches the interval,
/// or lies elsewhere, disturbs no fault.
template <class Factory>
void drops_the_common_part(trial<Factory>& t) noexcept {
  if (!not_its_own(t, window, "P7", "never inserted") || !place(t, inner) ||
      !not_its_own(t, pages_at(3), "C10", "just below the interval") ||
      !not_its_own(t, pages_at(20), "C10", "just above the interval"))
    return;
  const range touching[] = {{window.first, inner.first}, {inner.last, window.last}, {inner.last, inner.last + 1}};
  for (const range r : touching) {
    t.primary.replace(inner);
    if (!t.sees_all(inner, "C10", "at first")) return;
    const auto ticket = t.primary.start(r);
    stage::for_each(inner, [&](std::uint64_t p) {
      t.verdict.that(t.mapped(p), "C4", "a bracket touches the interval, and page %u has lost its mapping",
                     static_cast<unsigned>(p));
      const access_result a = t.load(p);
      t.verdict.that(a.error == errc::ok && a.value == t.primary.expected(p), "C2",
                     "a bracket touches the interval, and an access to page %u ends with: %s", static_cast<unsigned>(p),
                     to_string(a.error));
    });
    t.primary.end(ticket);
  }
  for (const range r : edge_ranges) {
    const range common = r.clipped_to(inner);
    if (!t.sees_all(inner, "C10", "after brackets")) return;
    const auto ticket = t.primary.start(r);
    bool fine = t.gone(common, "C10", "the bracket and the interval have it in common");
    if constexpr (claims_precision<interval_adapter_of<Factory>>) {
      stage::for_each(inner, [&](std::uint64_t p) {
        fine = fine &&
               t.verdict.that(pages_at(p).overlaps(common) || t.mapped(p), "C10",
                              "page %u is outside of the bracket, and has lost its mapping", static_cast<unsigned>(p));
      });
    }
    fine = fine && t.closed(common, "C10", "the bracket and the interval have it in common");
    stage::for_each(common, [&](std::uint64_t p) { t.primary.take_back(p); });
    t.primary.end(ticket);
    if (!fine) return;
  }
  static_cast<void>(t.sees_all(inner, "C10", "after the last bracket"));
}

/// A second adapter of a scenario, attached, until it goes.
template <class Adapter>
class guest {
 public:
  guest(Adapter& a, test_space& space, judge& j) noexcept : adapter_(a), space_(space), judge_(j) {}
  guest(const guest&) = delete;
  guest& operator=(const guest&) = delete;
  ~guest() { judge_.that(adapter_.detach(space_) == errc::ok, "L5", "a second interval cannot be detached"); }

 private:
  Adapter& adapter_;
  test_space& space_;
  judge& judge_;
};

/// C2: what happens in another interval of the space, before or in the middle of a fault, does not make it retry.
template <class Factory>
void another_interval(Factory& factory, judge& j) noexcept {
  constexpr range mine = pages_at(2, 6), other = pages_at(8, 6);
  bool reached = true;
  for (unsigned n = 0; reached && n < point_limit && !j.failed(); ++n) {
    trial<Factory> t(factory, j, false);
    auto neighbour = factory(t.primary);
    neighbour->where = other;
    if (!place_and_settle(t, mine)) return;
    if (!j.that(neighbour->attach(t.primary.space()) == errc::ok, "L9", "a second interval cannot be attached")) return;
    const guest leaves(*neighbour, t.primary.space(), j);
    t.primary.replace(mine);
    if (!t.sees_all(mine, "access", "after the first bracket")) return;
    t.primary.replace(mine);
    const auto ticket = t.primary.start(pages_at(9, 2));
    t.verdict.that(t.load(2).error == errc::ok, "C2", "a bracket over another interval is open, and a fault retries");
    t.primary.end(ticket);
    access_result r;
    reached = interject(
        n, [&] { t.primary.replace(other); }, [&] { r = t.load(disputed); });
    j.that(r.error == errc::ok && r.value == t.primary.expected(disputed), "C2",
           "a bracket over another interval ran in the middle of a fault, which ends with: %s", to_string(r.error));
  }
}

/// C5, P1: an interval that is inserted under brackets is invalidated by those that overlap it, and its client hears
/// neither start nor end of them.
template <class Factory>
void inserted_under_brackets(Factory& factory, judge& j) noexcept {
  for (const bool armed : {false, true}) {
    for (const range r : {pages_at(6, 4), pages_at(2, 3), window}) {
      bystander other{};
      subscriber<bystander> node{other};
      trial<Factory> t(factory, j, false);
      if (armed && t.primary.space().register_subscriber(node) != errc::ok) return;
      const range common = r.clipped_to(inner);
      const auto first = t.primary.start(r);
      const auto second = t.primary.start(pages_at(common.first / page_size - window.first / page_size));
      if (place(t, inner)) {
        bool fine = t.closed(common, "C5", "inserted under an open bracket");
        stage::for_each(common, [&](std::uint64_t p) { t.primary.take_back(p); });
        t.primary.end(second);
        if (fine) static_cast<void>(t.closed(common, "C5", "one of two brackets that it was inserted under has ended"));
      } else {
        t.primary.end(second);
      }
      t.primary.end(first);
      if (!t.failed()) static_cast<void>(t.sees_all(inner, "C5", "the brackets that it was inserted under have ended"));
      if (!t.failed()) t.primary.replace(window);
      if (!t.failed()) static_cast<void>(t.sees_all(inner, "P1", "a bracket after those that it was inserted under"));
      if (armed) static_cast<void>(t.primary.space().unregister(node));
      if (t.failed()) return;
    }
  }
}

/// L1, L7: inside a bracket that the interval has heard of, its removal cannot be over.
template <class Factory>
void detached_in_a_bracket(trial<Factory>& t) noexcept {
  if (!place(t, inner) || !t.sees_all(inner, "access", "at first")) return;
  const auto ticket = t.primary.start(pages_at(6, 2));
  const errc e = t.adapter().detach(t.primary.space());
  t.verdict.that(e != errc::ok, "L1", "detach says that the interval is gone, and a bracket has still to call it");
  stage::for_each(pages_at(6, 2), [&](std::uint64_t p) { t.primary.take_back(p); });
  t.primary.end(ticket);
  if (e == errc::ok) return t.forget();
  if (t.failed()) return;
  t.detach();
  if (!t.failed()) static_cast<void>(not_its_own(t, inner, "L1", "detached"));
}

/// Effects: the adapter goes without waiting. Returns: false if it does not.
template <class Factory>
bool begin_to_leave(trial<Factory>& t) noexcept {
  const errc e = t.adapter().adapter().detach_later(t.primary.space());
  if (!t.verdict.that(e == errc::ok, "C6", "detach_later: %s", to_string(e))) return false;
  t.forget();
  return true;
}
/// Effects: waits until it is free.
template <class Factory>
void outwait(trial<Factory>& t) noexcept {
  while (t.adapter().adapter().attached()) static_cast<void>(t.primary.space().barrier());
}

/// C6, P2: it goes without waiting, under an open bracket and in the middle of a fault, and comes back.
template <class Factory>
void detached_later(Factory& factory, judge& j) noexcept {
  if constexpr (can_detach_later<interval_adapter_of<Factory>>) {
    {
      trial<Factory> t(factory, j, false);
      if (!place(t, inner) || !t.sees_all(inner, "access", "at first")) return;
      const auto ticket = t.primary.start(pages_at(6, 2));
      if (!begin_to_leave(t)) return t.primary.end(ticket);
      const bool fine =
          not_its_own(t, inner, "L1", "it is being removed") &&
          j.that(t.adapter().adapter().attached(), "P2", "it is free, and a bracket has still to call its end");
      stage::for_each(pages_at(6, 2), [&](std::uint64_t p) { t.primary.take_back(p); });
      t.primary.end(ticket);
      outwait(t);
      t.primary.replace(window);
      if (fine) t.attach();
      if (!t.failed()) static_cast<void>(t.sees_all(inner, "L9", "it was removed without waiting, and is back"));
    }
    bool reached = true;
    for (unsigned n = 0; reached && n < point_limit && !j.failed(); ++n) {
      trial<Factory> t(factory, j, false);
      if (!place(t, inner)) return;
      bool leaves = false;
      reached = interject(
          n, [&] { leaves = begin_to_leave(t); }, [&] { static_cast<void>(t.load(disputed)); });
      if (!reached) leaves = begin_to_leave(t);
      if (!leaves) return;
      static_cast<void>(not_its_own(t, inner, "L1", "removed without waiting in the middle of a fault"));
      outwait(t);
    }
  }
}

/// C6: shrinking, what is not covered any more is not mapped; growing, the new part waits for the brackets over it
/// (C5); what stays covered is covered all the time. Also in the middle of faults.
template <class Factory>
void resized(Factory& factory, judge& j) noexcept {
  if constexpr (can_resize<interval_adapter_of<Factory>>) {
    const auto resize = [&](trial<Factory>& t, range r) {
      const errc e = t.adapter().adapter().resize(t.primary.space(), r);
      return j.that(e == errc::ok, "C6", "resize: %s", to_string(e));
    };
    {
      trial<Factory> t(factory, j, false);
      if (!place_and_settle(t, inner)) return;
      const auto ticket = t.primary.start(pages_at(21, 2));
      if (resize(t, pages_at(6, 8)) && not_its_own(t, pages_at(4, 2), "C6", "shrunk") &&
          not_its_own(t, pages_at(14, 6), "C6", "shrunk")) {
        t.primary.replace(pages_at(0, 20));
        static_cast<void>(t.sees_all(pages_at(6, 8), "C6", "shrunk, and replaced"));
      }
      if (!t.failed() && resize(t, pages_at(8, 16))) {
        static_cast<void>(t.closed(pages_at(21, 2), "C5", "grown into an open bracket"));
      }
      stage::for_each(pages_at(21, 2), [&](std::uint64_t p) { t.primary.take_back(p); });
      t.primary.end(ticket);
      if (t.failed() || !t.sees_all(pages_at(8, 16), "C6", "grown")) return;
      t.primary.replace(window);
      if (!t.sees_all(pages_at(8, 16), "C6", "grown, and replaced")) return;
    }
    for (const bool keeps : {true, false}) {  // the page
      bool reached = true;
      for (unsigned n = 0; reached && n < point_limit && !j.failed(); ++n) {
        trial<Factory> t(factory, j, false);
        if (!place(t, inner)) return;
        const range to = keeps ? pages_at(disputed, 12) : pages_at(disputed + 1, 12);
        const auto change = [&] { static_cast<void>(resize(t, to)); };
        reached = interject(n, change, [&] { static_cast<void>(t.load(disputed)); });
        if (!reached) change();
        if (!keeps) static_cast<void>(not_its_own(t, pages_at(disputed), "C6", "shrunk in the middle of a fault"));
        t.primary.replace(window);
        static_cast<void>(t.sees_all(to, "C6", "resized in the middle of a fault"));
      }
    }
  }
}

/// C6: of an interval that is split each half has its pages, and no others.
template <class Factory>
void split_in_two(Factory& factory, judge& j) noexcept {
  if constexpr (can_split<interval_adapter_of<Factory>>) {
    constexpr range low = pages_at(4, 6), high = pages_at(10, 10);
    trial<Factory> t(factory, j, false);
    auto upper = factory(t.primary);
    if (!place_and_settle(t, inner)) return;
    const auto ticket = t.primary.start(pages_at(24));  // elsewhere: nothing waits for it
    const errc e = t.adapter().adapter().split(t.primary.space(), high.first, upper->adapter());
    if (!j.that(e == errc::ok, "C6", "split: %s", to_string(e))) return t.primary.end(ticket);
    const guest leaves(*upper, t.primary.space(), j);
    static_cast<void>(not_its_own(t, high, "C6", "split, the lower half"));
    t.primary.end(ticket);
    const auto upper_sees = [&](const char* when) {
      stage::for_each(high, [&](std::uint64_t p) {
        access_result r;
        for (unsigned n = 0; n < t.patience && r.error == errc::again; ++n)
          r = upper->access(stage::version_at(p), false, 0);
        j.that(r.error == errc::ok && r.value == t.primary.expected(p), "C6", "%s: page %u of the upper half: %s", when,
               static_cast<unsigned>(p), to_string(r.error));
      });
      j.that(upper->access(stage::version_at(5), false, 0).error != errc::ok, "C6", "the upper half has the lower one");
    };
    upper_sees("split");
    const auto over = t.primary.start(pages_at(8, 4));
    static_cast<void>(t.closed(pages_at(8, 2), "C6", "split, and a bracket is open over the middle"));
    stage::for_each(pages_at(10, 2), [&](std::uint64_t p) {
      j.that(!upper->mapped(stage::version_at(p)), "C6", "split, and a bracket is open: page %u is still mapped",
             static_cast<unsigned>(p));
    });
    stage::for_each(pages_at(8, 4), [&](std::uint64_t p) { t.primary.take_back(p); });
    t.primary.end(over);
    if (!t.failed()) static_cast<void>(t.sees_all(low, "C6", "split, the lower half"));
    if (!t.failed()) upper_sees("split, and replaced");
  }
}

/// C8: with a turn the first attempt succeeds, whatever bracket comes at any point of it. Those that wait are played by
/// others that must not, and are refused.
template <class Factory>
void in_turn(Factory& factory, judge& j) noexcept {
  if constexpr (can_take_turns<interval_adapter_of<Factory>>) {
    const auto attempt = [&](trial<Factory>& t) {
      return t.adapter().adapter().access_in_turn(stage::version_at(disputed), false, 0);
    };
    bool reached = true;
    for (unsigned n = 0; reached && n < point_limit && !j.failed(); ++n) {
      trial<Factory> t(factory, j, false);
      if (!place(t, inner)) return;
      const std::uint64_t before = t.primary.expected(disputed);
      access_result r;
      reached = interject(
          n, [&] { static_cast<void>(t.primary.try_bracketed(around_it, [&] { t.primary.take_back(disputed); })); },
          [&] { r = attempt(t); });
      j.that(r.error == errc::ok, "C8", "a fault that has its turn ends with: %s", to_string(r.error));
      j.that(r.value == before || r.value == t.primary.expected(disputed), "O1", "a fault in its turn saw %llx",
             static_cast<unsigned long long>(r.value));
      static_cast<void>(t.sees(disputed, "C8", "after a turn"));
    }
    trial<Factory> t(factory, j, false);
    if (j.failed() || !place(t, inner)) return;
    std::atomic<bool> over{false};
    const auto work = [&](unsigned i) {
      if (i == 0) {
        for (unsigned n = 0; n < 200 && !j.failed(); ++n) {
          const access_result r = attempt(t);
          j.that(r.error == errc::ok, "C8", "brackets never pause, and a fault that has its turn ends with: %s",
                 to_string(r.error));
        }
        over.store(true, std::memory_order_relaxed);
        return;
      }
      while (!over.load(std::memory_order_relaxed)) t.primary.replace(around_it);
    };
    static_cast<void>(run_threads(1, 3, work));
    static_cast<void>(t.sees_all(inner, "C8", "after many turns"));
  }
}

}  // namespace testing::detail
MMUNOTIFY_END_NAMESPACE
