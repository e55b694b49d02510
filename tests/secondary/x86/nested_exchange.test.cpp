// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/nested_exchange.hpp>

#include <doctest/doctest.h>

#include "nested_fixture.hpp"

using namespace nested_test;
using x86::tracked_exchange;

namespace {
constexpr l2_gpa a{0x3008};
constexpr gpa word{0x5008};

struct fixture : nested_machine {
  gpa leaf = second_map(a.page(), word.page());

  explicit fixture(bool with_npt = false) : nested_machine(with_npt) {
    CHECK(write64(word, 0x20'0000'0007) == errc::ok);
  }
  outcome exchange(const tracked_exchange& x, l2_gpa at = a) {
    return x86::visit_nested(pointer(), [&]<class Mode>(std::type_identity<Mode>) {
      return x86::exchange_tracked<Mode>(mmu.memory(), mmu.tables(), x86::context_of(pointer(), {}), at, x);
    });
  }
};
}  // namespace

TEST_CASE("an entry is exchanged if it holds what was expected, as wide as it is, and its page counts as written") {
  fixture f;
  CHECK(f.mmu.log_writes(1, x86::dirty_tracking::dirty_bits) == errc::ok);
  std::array<std::uint64_t, 1> words{};
  CHECK(f.exchange({8, 9, 8}) == outcome{});
  CHECK(f.read64(word) == 0x20'0000'0007);
  CHECK(f.mmu.harvest_writes(1, words) == errc::ok);
  CHECK(words[0] == 0);
  CHECK(f.exchange({7, 0x27, 4}) == outcome{});
  CHECK(f.read64(word) == 0x20'0000'0027);
  CHECK(f.exchange({0x20'0000'0027, 0x67, 8}) == outcome{});
  CHECK(f.read64(word) == 0x67);
  CHECK(f.mmu.harvest_writes(1, words) == errc::ok);
  CHECK(words[0] == 1 << 5);
  CHECK(f.host.on_loan() == 0);
}

TEST_CASE("what L1's tables or the host forbid is not exchanged") {
  fixture f;
  const tracked_exchange x{0x20'0000'0007, 0x20'0000'0027, 8};
  CHECK(f.exchange(x, {0x4000}) == outcome{.what = outcome::page_fault, .code = {ept_exit::write}});
  f.second_map(a.page(), word.page(), epte::read);
  CHECK(f.exchange(x).what == outcome::page_fault);
  f.second_map(a.page(), {2000 * page_size});
  CHECK(f.exchange(x) == outcome{.what = outcome::not_mapped, .address = {2000 * page_size + 8}});
  f.second_map(a.page(), word.page());
  f.host.read_only[f.host_of(word.page()).value] = true;
  CHECK(f.exchange(x).what == outcome::not_mapped);
  f.host.read_only.clear();
  CHECK(f.write64({f.second}, 2000 * page_size | ept_all) == errc::ok);
  CHECK(f.exchange(x) == outcome{.what = outcome::not_mapped, .address = {2000 * page_size}});
  f.mmu.release();
  CHECK(f.exchange(x).what == outcome::not_mapped);  // the table is looked for first
  CHECK(f.read64(word) == 0x20'0000'0007);
  fixture amd(true);
  CHECK(amd.exchange(x, {std::uint64_t{1} << 48}).what == outcome::general_protection);
  amd.mmu.release();
  CHECK(amd.exchange(x).what == outcome::released);
}

TEST_CASE("K1: a bracket, or a change of L1's tables, between the look-up and the exchange makes it start again") {
  for (const bool npt : {false, true}) {
    for (const bool by_l1 : {false, true}) {
      fixture f(npt);
      const tracked_exchange x{0x20'0000'0007, 0x20'0000'0027, 8};
      f.host.keep = true;
      f.host.during_pin = [&](hva at, bool) {
        if (at != f.host_of(word.page())) return;
        f.host.keep = false;
        if (by_l1) {
          f.second_map(a.page(), {0x6000});
        } else {
          f.migrate(word.page());
        }
      };
      CHECK(f.exchange(x).what == outcome::again);
      CHECK(f.read64(word) == 0x20'0000'0007);
      CHECK(f.exchange(x).what == outcome::done);
      CHECK(f.read64(word) == (by_l1 ? 0x20'0000'0007 : 0x20'0000'0027));
      CHECK(f.host.on_loan() == 0);
    }
  }
}

TEST_CASE("K2: an exchange does not go to a page that its frame has left, if only the slot has changed meanwhile") {
  for (const bool npt : {false, true}) {
    fixture f(npt);
    // L2's table is in a slot of its own, which moves to another host page; no bracket says so, and L1's tables stay.
    constexpr gpa apart{1000 * page_size};
    constexpr hva before = ram_base + 40 * page_size, after = ram_base + 41 * page_size;
    const tracked_exchange x{0, 0x20, 8};
    REQUIRE(f.mmu.add_slot({.id = 2, .base = frame_of(apart), .pages = 1, .host = before}) == errc::ok);
    f.second_map(a.page(), apart);
    static_cast<void>(f.exchange(x));  // A and D of L1's entries are set
    f.host.keep = true;
    f.host.during_pin = [&](hva at, bool write) {
      if (at != before || !write) return;
      f.host.keep = false;
      CHECK(f.mmu.remove_slot(2) == errc::ok);
      CHECK(f.mmu.add_slot({.id = 2, .base = frame_of(apart), .pages = 1, .host = after}) == errc::ok);
    };
    const tracked_exchange next{0x20, 0x60, 8};
    CHECK(f.exchange(next).what == outcome::again);
    std::uint64_t old = 0;
    std::memcpy(&old, f.host.bytes(before + a.offset()), sizeof old);
    CHECK(old == 0x20);
    CHECK(f.host.on_loan() == 0);
  }
}

TEST_CASE("an exchange in a shadowed table of L1's takes down the shadow of that entry alone") {
  fixture f;
  const l2_gpa b{0x7000}, c{0x8000};
  f.second_map(b, {0x6000});
  f.second_map(c, f.leaf.page());
  f.second_map({0x9000}, {0x9000});
  f.enter();
  CHECK(touch2(f.l2, b, access::write).at == f.now({0x6000}));
  CHECK(touch2(f.l2, l2_gpa{0x9000}, access::write).at == f.now({0x9000}));
  const std::uint64_t was = f.read64(f.second_entry(b));
  const tracked_exchange x{was, was & ~epte::write, 8};
  CHECK(f.exchange(x, c + 8 * 7).what == outcome::done);
  CHECK_FALSE(f.l2.hits(b, access::read));
  CHECK(f.l2.hits(l2_gpa{0x9000}, access::read));
  CHECK(touch2(f.l2, b, access::write).result.what == nested_outcome::ept_violation);
  CHECK(f.broken() == "");
}
