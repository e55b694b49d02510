// SPDX-License-Identifier: MIT
#include <mmunotify/sync/marked_list.hpp>

#include <doctest/doctest.h>

#include <array>
#include <vector>

using namespace mmunotify;
using detail::marked_list;

namespace {

struct element : detail::marked_node {
  int name = 0;
};

std::vector<int> names(const marked_list::head& h) {
  std::vector<int> found;
  for (marked_list::iterator<element> it(h.load()); it != nullptr; ++it) found.push_back((*it).name);
  return found;
}

}  // namespace

TEST_CASE("O2: every set of four nodes is deleted and swept, and the others keep their order") {
  for (unsigned dead = 0; dead < 16; ++dead) {
    marked_list::head head{0};
    CHECK(marked_list::empty(head));
    std::array<element, 4> e;
    for (int i = 0; i < 4; ++i) {
      e[static_cast<std::size_t>(i)].name = i;
      marked_list::push_front(head, e[static_cast<std::size_t>(i)]);
    }
    std::vector<int> expected;
    for (int i = 3; i >= 0; --i) {
      if ((dead >> i & 1) != 0) {
        marked_list::mark(e[static_cast<std::size_t>(i)]);
      } else {
        expected.push_back(i);
      }
    }
    CHECK(names(head) == expected);  // marked ones are skipped
    for (unsigned n = 0; n < 8; ++n) CHECK(marked_list::shorter_than(head, n) == (n > 4));
    marked_list::sweep(head);
    for (unsigned n = 0; n < 8; ++n) CHECK(marked_list::shorter_than(head, n) == (n > expected.size()));
    CHECK(names(head) == expected);
    CHECK(marked_list::empty(head) == expected.empty());
  }
}

TEST_CASE("S1: a walk that stands on a node when it is deleted and swept goes on behind it") {
  marked_list::head head{0};
  std::array<element, 3> e;
  for (int i = 0; i < 3; ++i) {
    e[static_cast<std::size_t>(i)].name = i;
    marked_list::push_front(head, e[static_cast<std::size_t>(i)]);
  }
  marked_list::iterator<element> it(head.load());
  ++it;
  CHECK((*it).name == 1);
  marked_list::mark(e[1]);
  marked_list::sweep(head);
  ++it;
  CHECK((*it).name == 0);
  ++it;
  CHECK(it == nullptr);
}
