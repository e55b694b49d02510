// SPDX-License-Identifier: MIT
#include <mmunotify/notifier/hooks.hpp>

#include <doctest/doctest.h>

#include <mmunotify/base/address.hpp>
#include <mmunotify/notifier/detail/operations.hpp>

using namespace mmunotify;

namespace {

struct only_release {
  int released = 0;
  void release() { ++released; }
};
struct everything {
  int starts = 0;
  void invalidate_range_start(const invalidation&) { ++starts; }
  void invalidate_range_end(const invalidation&) {}
  bool clear_flush_young(mmunotify::range) { return true; }
  bool clear_young(mmunotify::range) { return true; }
  bool test_young(mmunotify::range) { return false; }
  void release() {}
};
struct refusing {
  bool invalidate_range_start(const invalidation& i) { return i.blockable; }
};
struct nothing {};
struct wrong_signature {
  void invalidate_range_start(int) {}
};
class private_hook {
  void release() {}

 public:
  void use() { release(); }
};
struct overloaded {
  void release() {}
  void release(int) {}
};
struct two_passes {
  first_pass invalidate_begin(const invalidation&) { return first_pass::complete(); }
  void invalidate_finish(two_pass_token&, const invalidation&) {}
};
struct begins_only {
  first_pass invalidate_begin(const invalidation&) { return first_pass::complete(); }
};
struct device_tlb {
  void invalidate_secondary_tlbs(mmunotify::range) {}
};
struct only_existing {
  void existing_range(mmunotify::range) {}
};
struct derived : invalidation {
  int more = 7;
};
struct of_derived {
  int seen = 0;
  void invalidate_range_start(const derived& i) { seen = i.more; }
};
struct by_frame {
  void invalidate_range_end(const basic_invalidation<gfn>&) {}
};

static_assert(secondary_mmu<only_release> && secondary_mmu<everything> && secondary_mmu<refusing>);
static_assert(!secondary_mmu<nothing> && !secondary_mmu<wrong_signature> && !secondary_mmu<int>);
static_assert(secondary_mmu<by_frame, gfn> && !secondary_mmu<by_frame>);
static_assert(has_refusing_start<refusing> && !has_start<refusing>);
static_assert(secondary_mmu<two_passes> && has_begin<two_passes>);
static_assert(!secondary_mmu<begins_only> && detail::names_invalidate_begin<begins_only>());
static_assert(secondary_mmu<device_tlb> && has_invalidate_secondary_tlbs<device_tlb>);
static_assert(!secondary_mmu<only_existing>);  // nothing would ever call it
static_assert(has_start<of_derived, std::uintptr_t, derived> && !has_start<of_derived>);

// What the static_asserts of a subscriber look at: a hook of the right name and the wrong signature is found.
static_assert(detail::names_invalidate_range_start<wrong_signature>());
static_assert(detail::names_release<private_hook>() && !has_release<private_hook>);
static_assert(detail::names_release<overloaded>() && has_release<overloaded>);
static_assert(!detail::names_release<nothing>());

}  // namespace

TEST_CASE("an absent hook is a null pointer, a present one calls the client") {
  constexpr const auto& none_but_release = detail::operations_for<only_release, std::uintptr_t>;
  static_assert(none_but_release.start == nullptr && none_but_release.end == nullptr);
  static_assert(none_but_release.clear_flush_young == nullptr && none_but_release.clear_young == nullptr);
  static_assert(none_but_release.test_young == nullptr);
  only_release r;
  none_but_release.release(&r);
  CHECK(r.released == 1);

  constexpr const auto& all = detail::operations_for<everything, std::uintptr_t>;
  everything e;
  all.start(&e, {{0, 1}});
  CHECK(all.try_start(&e, {{0, 1}}));
  CHECK(e.starts == 2);
  CHECK(all.clear_flush_young(&e, {0, 1}));
  CHECK(all.clear_young(&e, {0, 1}));
  CHECK_FALSE(all.test_young(&e, {0, 1}));
}

TEST_CASE("P3: a start that returns bool refuses, one that returns void cannot") {
  refusing r;
  constexpr const auto& o = detail::operations_for<refusing, std::uintptr_t>;
  CHECK(o.try_start(&r, {{0, 1}}));
  CHECK_FALSE(o.try_start(&r, {{0, 1}, event::unmap, nullptr, false}));
}

TEST_CASE("a table can be made for a derived invalidation, which the hook then gets") {
  of_derived client;
  constexpr const auto& o = detail::operations_for<of_derived, std::uintptr_t, derived>;
  const derived i{};
  CHECK(o.try_start(&client, i));
  CHECK(client.seen == 7);
}
