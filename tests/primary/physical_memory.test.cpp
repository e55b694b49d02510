// SPDX-License-Identifier: MIT

#include <mmunotify/primary/physical_memory.hpp>

#include <doctest/doctest.h>

#include <string>
#include <vector>

#include <mmunotify/primary/reference_mmu.hpp>

#include "support/contract_recorder.hpp"

using namespace mmunotify;

namespace {

TEST_CASE("memory counts its users, and each of its three kinds has the size that was asked for") {
  physical_memory ram{4, 3, 2};
  CHECK(ram.frames.size() == 4);
  CHECK(ram.swap.size() == 3);
  CHECK(ram.device.size() == 2);
  CHECK(ram.users() == 0);
  {
    const reference_mmu<> a{ram};
    const reference_mmu<> b{ram};
    CHECK(ram.users() == 2);
  }
  CHECK(ram.users() == 0);
  reference_mmu<> own{8, 4, 2};
  CHECK(own.memory().users() == 1);
  CHECK(own.memory().device.size() == 2);
}

TEST_CASE("memory that dies before its users is a contract failure") {
  const contract_recorder contracts;
  {
    physical_memory ram{1, 1};
    ram.add_user();
  }
  CHECK(contracts.rules() == std::vector<std::string>{"bad input"});
}

TEST_CASE("memory that cannot be had is none, and every operation says so") {
  constexpr std::size_t too_large = std::size_t{1} << 40;
  physical_memory none{too_large, too_large, too_large};
  CHECK(none.frames.size() == 0);
  reference_mmu<> mmu{none};
  CHECK(mmu.map({page_size, 2 * page_size}, protection::read_write) == errc::ok);
  CHECK(mmu.pin(hva{page_size}, true).error == errc::no_memory);
  CHECK(mmu.map_huge({page_table::block_size, 2 * page_table::block_size}, protection::read) == errc::no_memory);
  CHECK(mmu.make_exclusive({page_size, 2 * page_size}, &none) == errc::no_memory);
  CHECK(mmu.verify() == nullptr);
}

}  // namespace
