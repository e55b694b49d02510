// SPDX-License-Identifier: MIT
#pragma once

// A fresh stage with a fresh adapter on it, and the questions that every scenario asks.

#include <cstdint>
#include <optional>
#include <thread>
#include <type_traits>
#include <utility>

#include <mmunotify/config.hpp>
#include <mmunotify/testing/adapter.hpp>
#include <mmunotify/testing/detail/judge.hpp>
#include <mmunotify/testing/stage.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing::detail {

template <class Factory>
using adapter_of = std::remove_cvref_t<decltype(*std::declval<Factory&>()(std::declval<test_primary&>()))>;

/// Whether a client type hears of brackets with this event.
template <class Client>
constexpr bool hears_of(event e) noexcept {
  if constexpr (requires { Client::events.contains(e); }) {
    return Client::events.contains(e);
  } else {
    return true;
  }
}

template <class Factory>
class trial {
 public:
  using adapter_type = adapter_of<Factory>;
  using client_type = typename adapter_type::client_type;
  static constexpr bool precise = claims_precision<adapter_type>;
  static constexpr unsigned patience = 64;  ///< attempts that may collide although no bracket is open

  /// Effects: the adapter is made, and attached unless that is the scenario's business.
  trial(Factory& factory, judge& j, bool attached = true) noexcept : verdict(j), adapter_(factory(primary)) {
    if (attached) attach();
  }
  trial(const trial&) = delete;
  trial& operator=(const trial&) = delete;
  ~trial() {
    if (attached_) detach();
    adapter_.reset();
    if (!verdict.failed()) {
      verdict.that(primary.on_loan() == 0, "K4", "the adapter is gone and %llu frames are still on loan",
                   static_cast<unsigned long long>(primary.on_loan()));
    }
  }

  adapter_type& adapter() noexcept { return **adapter_; }
  bool failed() const noexcept { return verdict.failed(); }

  void attach() noexcept {
    const errc e = adapter().attach(primary.space());
    attached_ = verdict.that(e == errc::ok, "L9", "attach failed: %s", to_string(e));
  }
  void detach() noexcept {
    attached_ = false;
    const errc e = adapter().detach(primary.space());
    verdict.that(e == errc::ok, "L5", "detach failed: %s", to_string(e));
  }
  /// Effects: the adapter has gone from the space by itself, or was never there.
  void forget() noexcept { attached_ = false; }

  bool mapped(std::uint64_t page) noexcept { return adapter().mapped(stage::version_at(page)); }
  access_result load(std::uint64_t page) noexcept { return adapter().access(stage::version_at(page), false, 0); }
  access_result store(std::uint64_t page, std::uint64_t value) noexcept {
    return adapter().access(stage::data_at(page), true, value);
  }

  /// Effects: loads the page until that does not collide any more; no bracket is open over it. It must come to the
  /// page that is there, or the rule is broken.
  bool sees(std::uint64_t page, const char* rule, const char* when) noexcept {
    access_result r = load(page);
    for (unsigned n = 0; n < patience && r.error == errc::again; ++n) r = load(page);
    const auto p = static_cast<unsigned>(page);
    if (r.error != errc::ok) {
      return verdict.that(false, r.error == errc::again ? "C2" : rule, "%s: page %u cannot be accessed: %s", when, p,
                          to_string(r.error));
    }
    return verdict.that(r.value == primary.expected(page), rule, "%s: page %u shows %llx and holds %llx", when, p,
                        static_cast<unsigned long long>(r.value),
                        static_cast<unsigned long long>(primary.expected(page)));
  }
  /// The same for the pages of r.
  bool sees_all(range r, const char* rule, const char* when) noexcept {
    bool all = true;
    stage::for_each(r, [&](std::uint64_t p) { all = all && sees(p, rule, when); });
    return all;
  }
  /// Effects: every page is mapped.
  bool fill() noexcept { return sees_all(window, "access", "at first"); }

  /// None of r may be mapped.
  bool gone(range r, const char* rule, const char* when) noexcept {
    bool all = true;
    stage::for_each(r, [&](std::uint64_t p) {
      all = all && verdict.that(!mapped(p), rule, "%s: page %u is still mapped", when, static_cast<unsigned>(p));
    });
    return all;
  }
  /// A bracket is open over r: accesses must not bring a mapping into being, nor see what is not there.
  bool closed(range r, const char* rule, const char* when) noexcept {
    bool all = gone(r, rule, when);
    stage::for_each(r, [&](std::uint64_t p) {
      if (!all) return;
      const access_result a = load(p);
      all = verdict.that(!mapped(p), rule, "%s: an access to page %u has made a mapping", when,
                         static_cast<unsigned>(p)) &&
            verdict.that(a.error != errc::ok || a.value == primary.expected(p), rule,
                         "%s: an access to page %u saw what is not there", when, static_cast<unsigned>(p));
    });
    return all;
  }
  /// Everything outside r is mapped as before, if the adapter claims so.
  bool undisturbed(range r, const char* when) noexcept {
    bool all = true;
    if constexpr (precise) {
      stage::for_each(window, [&](std::uint64_t p) {
        if (pages_at(p).overlaps(r)) return;
        all = all && verdict.that(mapped(p), "C4", "%s: page %u, outside of the bracket, has lost its mapping", when,
                                  static_cast<unsigned>(p));
      });
    }
    return all;
  }

  judge& verdict;
  stage primary{};

 private:
  std::optional<decltype(std::declval<Factory&>()(std::declval<test_primary&>()))> adapter_;
  bool attached_ = false;
};

/// A client with a point in its first pass.
struct bystander {
  first_pass invalidate_begin(const invalidation&) noexcept {
    point();
    return first_pass::complete();
  }
  void invalidate_finish(two_pass_token&, const invalidation&) noexcept {}
};

/// A client in whose start, once, somebody replaces pages in place, as another thread might just then.
struct changer {
  void invalidate_range_start(const invalidation& i) noexcept {
    if (i.in_place || pages == 0) return;
    const std::uint64_t n = std::exchange(pages, 0);
    if (!primary.replace_in_place(8, n, true)) pages = n;
  }
  stage& primary;
  std::uint64_t pages = 0;  ///< from page 8 on
};

/// A client that refuses what it may.
struct refuser {
  bool invalidate_range_start(const invalidation& i) noexcept { return i.blockable; }
};

}  // namespace testing::detail
MMUNOTIFY_END_NAMESPACE
