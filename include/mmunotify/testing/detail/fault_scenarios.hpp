// SPDX-License-Identifier: MIT
#pragma once

// Scenarios about faults: everything that a primary can do, at every point of an access, and an access at every point
// of everything that a primary can do (schedule.hpp).

#include <cstdint>

#include <mmunotify/testing/detail/trial.hpp>
#include <mmunotify/testing/schedule.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing::detail {

/// The page of these scenarios, and what is done over and around it.
inline constexpr std::uint64_t disputed = 5;
inline constexpr range disputed_range = pages_at(disputed);
inline constexpr range around_it = pages_at(disputed - 2, 5);
inline constexpr unsigned point_limit = 200;  ///< no operation has that many points

/// How the access begins.
enum class access_kind : std::uint8_t { load_unmapped, load_mapped, store_unmapped };
inline constexpr access_kind all_accesses[] = {access_kind::load_unmapped, access_kind::load_mapped,
                                               access_kind::store_unmapped};
constexpr const char* to_string(access_kind k) noexcept {
  constexpr const char* names[] = {"a load of an unmapped page", "a load of a mapped page", "a store"};
  return names[static_cast<unsigned>(k)];
}

/// Effects: an access of this kind with script(trial) at its point n, and what it saw checked: what was there before or
/// what is there now, never what is nobody's. Returns: whether the script ran.
template <class Factory, class Script>
bool disturbed_access(trial<Factory>& t, access_kind kind, unsigned n, Script script) noexcept {
  const std::uint64_t before = t.primary.expected(disputed);
  access_result r;
  const bool ran = interject(
      n, [&] { script(t); },
      [&] { r = kind == access_kind::store_unmapped ? t.store(disputed, 77) : t.load(disputed); });
  if (kind != access_kind::store_unmapped && r.error == errc::ok) {
    t.verdict.that(r.value == before || r.value == t.primary.expected(disputed), "O1",
                   "%s, disturbed at point %u, saw %llx, which is not the page", to_string(kind), n,
                   static_cast<unsigned long long>(r.value));
  }
  return ran;
}

/// Runs before(trial), an access with script(trial) at point n, after(trial), for each kind and each n.
template <class Factory, class Before, class Script, class After>
void at_every_point(Factory& factory, judge& j, Before before, Script script, After after) noexcept {
  for (const access_kind kind : all_accesses) {
    bool reached = true;
    for (unsigned n = 0; reached && n < point_limit && !j.failed(); ++n) {
      trial<Factory> t(factory, j);
      if (t.failed()) return;
      if (kind == access_kind::load_mapped) static_cast<void>(t.sees(disputed, "access", "at first"));
      before(t);
      reached = disturbed_access(t, kind, n, script);
      if (!t.failed()) after(t);
    }
  }
}

inline constexpr auto nothing = [](auto&) noexcept {};

/// C1: a bracket that begins and ends in the middle of a fault makes the fault retry.
template <class Factory>
void bracket_in_the_middle(Factory& factory, judge& j) noexcept {
  const auto sees = [](auto& t) {
    static_cast<void>(t.sees(disputed, "C1", "a bracket ran in the middle of a fault"));
  };
  at_every_point(
      factory, j, nothing, [](auto& t) { t.primary.replace(disputed_range); }, sees);
  at_every_point(
      factory, j, nothing, [](auto& t) { t.primary.replace(around_it, event::unmap); }, sees);
  at_every_point(
      factory, j, nothing, [](auto& t) { t.primary.swap_out(window); }, sees);
  at_every_point(
      factory, j, nothing,
      [](auto& t) {  // more of them than a bounded history remembers
        t.primary.replace(disputed_range);
        for (unsigned i = 0; i < 200; ++i) t.primary.replace(pages_at(20));
      },
      sees);
  at_every_point(
      factory, j, nothing,
      [](auto& t) {
        const auto a = t.primary.start(around_it);
        const auto b = t.primary.start(disputed_range);
        t.primary.take_back(disputed);
        t.primary.end(a);
        t.primary.end(b);
      },
      sees);
}

/// O1: a bracket that begins in the middle of a fault and is still open keeps the page from being mapped.
template <class Factory>
void bracket_begins_in_the_middle(Factory& factory, judge& j) noexcept {
  for (const range r : {disputed_range, around_it, window}) {
    test_space::ticket open{};
    bool started = false;
    at_every_point(
        factory, j, nothing,
        [&](auto& t) {
          open = t.primary.start(r);
          started = true;
          t.primary.take_back(disputed);
        },
        [&](auto& t) {
          if (!std::exchange(started, false)) return;
          static_cast<void>(t.closed(disputed_range, "O1", "a bracket began in the middle of a fault"));
          t.primary.end(open);
          static_cast<void>(t.sees(disputed, "O1", "the bracket has ended"));
        });
  }
}

/// C1: a fault that began in an open bracket, which ends in its middle, retries. O1: or not yet, if another is open.
template <class Factory>
void bracket_ends_in_the_middle(Factory& factory, judge& j) noexcept {
  test_space::ticket open{}, other{};
  const auto begin = [&](auto& t) {
    open = t.primary.start(around_it);
    other = t.primary.start(disputed_range);
  };
  bool ended = false;
  at_every_point(
      factory, j, begin,
      [&](auto& t) {
        t.primary.take_back(disputed);
        t.primary.end(other);
        t.primary.end(open);
        ended = true;
      },
      [&](auto& t) {
        if (std::exchange(ended, false)) {
          static_cast<void>(t.sees(disputed, "C1", "a bracket ended in the middle of a fault"));
          return;
        }
        t.primary.end(other);
        t.primary.end(open);
      });
  at_every_point(
      factory, j, begin,
      [&](auto& t) {
        t.primary.take_back(disputed);
        t.primary.end(open);
        ended = true;
      },
      [&](auto& t) {
        static_cast<void>(t.closed(disputed_range, "O1", "one of two brackets ended in the middle of a fault"));
        if (!std::exchange(ended, false)) t.primary.end(open);
        t.primary.take_back(disputed);
        t.primary.end(other);
        static_cast<void>(t.sees(disputed, "C1", "both brackets have ended"));
      });
}

/// O1: rights that are withdrawn in the middle of a fault are not there afterwards; nor is the page that is unmapped.
template <class Factory>
void rights_withdrawn_in_the_middle(Factory& factory, judge& j) noexcept {
  if constexpr (hears_of<typename trial<Factory>::client_type>(event::protection_vma)) {
    bool done = false;
    at_every_point(
        factory, j, nothing,
        [&](auto& t) {
          t.primary.protect(around_it, false);
          done = true;
        },
        [&](auto& t) {
          if (!std::exchange(done, false)) return;
          const bool first = t.store(disputed, 1).error == errc::ok, second = t.store(disputed, 1).error == errc::ok;
          t.verdict.that(!first && !second, "C1", "write access was withdrawn in the middle of a fault, and is there");
        });
  }
  bool gone = false;
  at_every_point(
      factory, j, nothing,
      [&](auto& t) {
        t.primary.withdraw(around_it);
        gone = true;
      },
      [&](auto& t) {
        if (!std::exchange(gone, false)) return;
        t.verdict.that(t.load(disputed).error != errc::ok && !t.mapped(disputed), "C1",
                       "the page was unmapped in the middle of a fault, and is mapped");
      });
}

/// O1, L9: the adapter leaves in the middle of a fault; the fault must not map, and not make up for it afterwards.
template <class Factory>
void leaving_in_the_middle(Factory& factory, judge& j) noexcept {
  bool left = false;
  at_every_point(
      factory, j, nothing,
      [&](auto& t) {
        t.detach();
        left = true;
      },
      [&](auto& t) {
        if (!std::exchange(left, false)) return;
        static_cast<void>(t.gone(window, "L1", "the adapter was unregistered in the middle of a fault"));
        t.verdict.that(t.load(disputed).error != errc::ok && !t.mapped(disputed), "L1",
                       "the adapter is unregistered, and maps");
      });
  at_every_point(
      factory, j, nothing,
      [&](auto& t) {
        t.detach();
        t.primary.replace(window);  // which nobody tells it
        t.attach();
      },
      [&](auto& t) { static_cast<void>(t.sees(disputed, "L9", "unregistered and back in the middle of a fault")); });
  at_every_point(
      factory, j, nothing,
      [&](auto& t) {
        t.primary.release();
        left = true;
      },
      [&](auto& t) {
        if (!std::exchange(left, false)) return;
        static_cast<void>(t.gone(window, "L3", "the space was released in the middle of a fault"));
        t.verdict.that(t.load(disputed).error != errc::ok && !t.mapped(disputed), "L3",
                       "the space is released, and a fault maps");
      });
}

/// O1: an access at every point of start and of end.
template <class Factory>
void access_in_the_middle_of_a_bracket(Factory& factory, judge& j) noexcept {
  for (const bool mapped : {false, true}) {
    for (const bool in_start : {true, false}) {
      bool reached = true;
      for (unsigned n = 0; reached && n < point_limit && !j.failed(); ++n) {
        trial<Factory> t(factory, j);
        if (t.failed()) return;
        if (mapped) static_cast<void>(t.fill());
        const auto access = [&] {
          const access_result a = t.load(disputed);
          t.verdict.that(a.error != errc::ok || a.value == t.primary.expected(disputed), "O1",
                         "an access in the middle of a bracket's %s saw what is not there", in_start ? "start" : "end");
        };
        test_space::ticket open{};
        const auto start = [&] { open = t.primary.start(around_it); };
        if (in_start) {
          reached = interject(n, access, start);
        } else {
          start();
        }
        static_cast<void>(t.gone(around_it, "O1", "start has returned"));
        stage::for_each(around_it, [&](std::uint64_t p) { t.primary.take_back(p); });
        const auto end = [&] { t.primary.end(open); };
        if (in_start) {
          end();
        } else {
          reached = interject(n, access, end);
        }
        static_cast<void>(t.sees_all(window, "O1", "an access was in the middle of a bracket"));
      }
    }
  }
}

/// P5, O3: a bracket at every point of another one's start and end, as of two threads. A bystander, who is asked after
/// the adapter, has a point between the two passes of it.
template <class Factory>
void two_brackets_at_once(Factory& factory, judge& j) noexcept {
  bool reached = true;
  for (unsigned n = 0; reached && n < point_limit && !j.failed(); ++n) {
    bystander other{};
    subscriber<bystander> node{other};
    trial<Factory> t(factory, j, false);
    if (t.primary.space().register_subscriber(node) != errc::ok) return;
    t.attach();
    if (t.failed() || !t.fill()) return;
    test_space::ticket open{};
    const auto replace = [&] { t.primary.replace(pages_at(disputed, 3)); };
    reached = interject(n, replace, [&] { open = t.primary.start(around_it); });
    static_cast<void>(t.closed(around_it, "P5", "another bracket was in the middle of a start"));
    reached = interject(n, replace, [&] { t.primary.end(open); }) || reached;
    static_cast<void>(t.sees_all(window, "P5", "another bracket was in the middle of this one"));
    static_cast<void>(t.primary.space().unregister(node));
  }
}

/// L1, L3: an access at every point of leaving and coming.
template <class Factory>
void access_in_the_middle_of_leaving(Factory& factory, judge& j) noexcept {
  for (const bool by_release : {false, true}) {
    bool reached = true;
    for (unsigned n = 0; reached && n < point_limit && !j.failed(); ++n) {
      trial<Factory> t(factory, j);
      if (t.failed() || !t.fill()) return;
      reached = interject(
          n,
          [&] {
            static_cast<void>(t.load(disputed));
            t.verdict.that(t.load(disputed).value != stage::taken_back, "O1", "an access saw a frame that is nobody's");
          },
          [&] { by_release ? t.primary.release() : t.detach(); });
      static_cast<void>(t.gone(window, by_release ? "L3" : "L1", "an access was in the middle of leaving"));
      if (by_release || t.failed()) continue;
      t.primary.replace(window);
      reached = interject(
                    n, [&] { static_cast<void>(t.load(disputed)); }, [&] { t.attach(); }) ||
                reached;
      static_cast<void>(t.sees_all(window, "L9", "an access was in the middle of coming back"));
    }
  }
}

}  // namespace testing::detail
MMUNOTIFY_END_NAMESPACE
