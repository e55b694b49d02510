// SPDX-License-Identifier: MIT

#include <mmunotify/secondary/x86/nested_outcome.hpp>

#include <doctest/doctest.h>

#include "nested_fixture.hpp"

using namespace nested_test;
using x86::nested_access;
using x86::nested_outcome_of;

namespace {
constexpr nested_pointer ept_plain{.value = 0x501e};
constexpr nested_pointer ept_marking{.value = 0x505e};
constexpr nested_pointer npt{.what = nested_pointer::npt, .value = 0x5000};
constexpr l2_gpa where{0x1234};

constexpr outcome fault(std::uint32_t code) { return {.what = outcome::page_fault, .code = {code}}; }
}  // namespace

TEST_CASE("each outcome is one level's business") {
  const auto to = [](nested_outcome::kind k) { return nested_outcome{.what = k}.to(); };
  CHECK(to(nested_outcome::done) == receiver::nobody);
  for (const auto k : {nested_outcome::page_fault, nested_outcome::general_protection}) CHECK(to(k) == receiver::l2);
  for (const auto k :
       {nested_outcome::ept_violation, nested_outcome::ept_misconfiguration, nested_outcome::nested_page_fault}) {
    CHECK(to(k) == receiver::l1);
  }
  for (const auto k : {nested_outcome::write_tracked, nested_outcome::not_mapped, nested_outcome::released,
                       nested_outcome::no_memory, nested_outcome::again, nested_outcome::inactive}) {
    CHECK(to(k) == receiver::l0);
  }
}

TEST_CASE("what the fault path says to the host stays what it is") {
  const nested_access a{.where = where};
  for (const nested_pointer& p : {ept_plain, npt}) {
    CHECK(nested_outcome_of({}, a, p).what == nested_outcome::done);
    CHECK(nested_outcome_of({.what = outcome::write_tracked, .address = {8}}, a, p) ==
          elsewhere(nested_outcome::write_tracked, {8}));
    CHECK(nested_outcome_of({.what = outcome::not_mapped, .address = {8}}, a, p) ==
          elsewhere(nested_outcome::not_mapped, {8}));
    CHECK(nested_outcome_of({.what = outcome::released}, a, p).what == nested_outcome::released);
    CHECK(nested_outcome_of({.what = outcome::no_memory}, a, p).what == nested_outcome::no_memory);
    CHECK(nested_outcome_of({.what = outcome::again}, a, p).what == nested_outcome::again);
  }
}

TEST_CASE("an exit qualification says whether the access had a linear address and was the final one") {
  nested_access a{.where = where};
  CHECK(nested_outcome_of(fault(1 | 8), a, ept_plain) == violation(where, 1 | 8));
  a.linear = true;
  CHECK(nested_outcome_of(fault(1 | 8), a, ept_plain) == violation(where, 1 | 8 | 1 << 7 | 1 << 8));
  a.table = true;
  CHECK(nested_outcome_of(fault(1 | 8), a, ept_plain) == violation(where, 1 | 8 | 1 << 7));
  a.judged_as_write = true;
  CHECK(a.asked() == access::write);
  CHECK(nested_outcome_of(fault(2), a, ept_marking) == violation(where, 1 | 2 | 1 << 7));
  const nested_access marks{.where = where, .how = access::write, .table = true, .linear = true};
  CHECK(nested_outcome_of(fault(2), marks, ept_plain) == violation(where, 2 | 1 << 7));
  CHECK(nested_outcome_of(fault(2), marks, ept_marking) == violation(where, 1 | 2 | 1 << 7));
  const nested_access writes{.where = where, .how = access::write};
  CHECK(nested_outcome_of(fault(2), writes, ept_marking) == violation(where, 2));
  CHECK(nested_outcome_of(fault(ept_exit::misconfigured), writes, ept_marking) == misconfiguration(where));
}

TEST_CASE("a nested page fault says which access it was, and of an address beyond the tables that nothing is there") {
  const std::uint64_t final_bit = std::uint64_t{1} << 32, table_bit = std::uint64_t{1} << 33;
  CHECK(nested_outcome_of(fault(7), {.where = where, .how = access::write}, npt) == npf(where, 7 | final_bit));
  CHECK(nested_outcome_of(fault(7), {.where = where, .table = true, .judged_as_write = true}, npt) ==
        npf(where, 7 | table_bit));
  const outcome beyond{.what = outcome::general_protection};
  CHECK(nested_outcome_of(beyond, {.where = where}, npt) == npf(where, 4 | final_bit));
  CHECK(nested_outcome_of(beyond, {.where = where, .how = access::write}, npt) == npf(where, 2 | 4 | final_bit));
  CHECK(nested_outcome_of(beyond, {.where = where, .how = access::fetch}, npt) == npf(where, 4 | 16 | final_bit));
  nested_pointer no_nx = npt;
  no_nx.nxe = false;
  CHECK(nested_outcome_of(beyond, {.where = where, .how = access::fetch}, no_nx) == npf(where, 4 | final_bit));
  CHECK(nested_outcome_of(beyond, {.where = where, .table = true, .judged_as_write = true}, npt) ==
        npf(where, 2 | 4 | table_bit));
}
