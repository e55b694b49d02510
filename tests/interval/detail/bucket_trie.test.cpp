// SPDX-License-Identifier: MIT

// The index against a plain list: every question over a small universe, random ones over the whole key space, by point,
// range and gap, and what is left when everything has gone. Harder than the kernel's lib/interval_tree_test.c, after
// which it is modelled: all sizes from one byte to everything, questions at every edge, removal in between.

#include <mmunotify/interval/detail/bucket_trie.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "support/threads.hpp"

using namespace mmunotify;
using detail::bucket_place;
using detail::marked_list;

namespace {

struct item : detail::marked_node {
  item() = default;
  item(std::uint64_t a, std::uint64_t b) : first(a), last(b) {}
  std::uint64_t first = 0;
  std::uint64_t last = 0;
  void* leaf = nullptr;
};
using trie = detail::bucket_trie<item>;

struct index_under_test {
  srcu_domain domain;
  trie index{domain};
  std::vector<item*> present;

  void insert(item& i) {
    const read_section s(domain);
    const auto place = bucket_place::of(i.first, i.last);
    auto* const leaf = index.pin_leaf(place);
    REQUIRE(leaf != nullptr);
    trie::mark_used(leaf, place.bucket);
    marked_list::push_front(leaf->list(place.bucket), i);
    i.leaf = leaf;
    present.push_back(&i);
  }
  /// The item may be inserted again after a grace period.
  void remove(item& i) {
    const read_section s(domain);
    auto* const leaf = static_cast<trie::node*>(i.leaf);
    marked_list::mark(i);
    marked_list::sweep(leaf->list(bucket_place::of(i.first, i.last).bucket));
    index.unpin(leaf);
    std::erase(present, &i);
  }
  std::vector<const item*> ask(std::uint64_t first, std::uint64_t last) {
    const read_section s(domain);
    std::vector<const item*> found;
    index.walk(first, last, [&](const item& i) {
      if (i.first < last && first < i.last) found.push_back(&i);
      return true;
    });
    return found;
  }
  /// The answer is what the list says, each once, by class and bucket.
  void check(std::uint64_t first, std::uint64_t last) {
    std::vector<const item*> found = ask(first, last);
    CHECK(std::is_sorted(found.begin(), found.end(), [](const item* a, const item* b) {
      const auto x = bucket_place::of(a->first, a->last);
      const auto y = bucket_place::of(b->first, b->last);
      return std::pair(x.size_class, x.bucket) < std::pair(y.size_class, y.bucket);
    }));
    std::vector<const item*> expected;
    for (const item* i : present) {
      if (i->first < last && first < i->last) expected.push_back(i);
    }
    std::sort(found.begin(), found.end());
    std::sort(expected.begin(), expected.end());
    CHECK_MESSAGE(found == expected, "a question [", first, ", ", last, ")");
  }
};

std::uint64_t seed() {
  const char* const given = std::getenv("MMUNOTIFY_SEED");
  const std::uint64_t s = given != nullptr ? std::strtoull(given, nullptr, 0) : 1;
  std::printf("MMUNOTIFY_SEED=%llu\n", static_cast<unsigned long long>(s));
  return s;
}

/// A range of a random size class, anywhere.
std::pair<std::uint64_t, std::uint64_t> some_range(small_random& random, unsigned bits) {
  const std::uint64_t limit = ~std::uint64_t{0} >> (64 - bits);
  const std::uint64_t first = random() & limit;
  const std::uint64_t length = (random() >> (63 - random.below(bits))) & limit;
  const std::uint64_t last = first < limit - length ? first + length + 1 : limit;
  return first < last ? std::pair(first, last) : std::pair(limit - 1, limit);
}

}  // namespace

TEST_CASE("C4: in a universe of eight keys every set of two intervals answers every question") {
  for (std::uint64_t a = 0; a < 8; ++a)
    for (std::uint64_t b = a + 1; b <= 8; ++b)
      for (std::uint64_t c = 0; c < 8; ++c)
        for (std::uint64_t d = c + 1; d <= 8; ++d) {
          index_under_test t;
          item x(a, b);
          item y(c, d);
          t.insert(x);
          t.insert(y);
          for (std::uint64_t first = 0; first < 8; ++first) {
            for (std::uint64_t last = first + 1; last <= 9; ++last) t.check(first, last);
          }
          t.remove(x);
          for (std::uint64_t first = 0; first < 8; ++first) t.check(first, first + 1);
          t.remove(y);
          CHECK(t.index.empty());
        }
}

TEST_CASE("C4: random intervals of every size answer as a list does, while they come and go") {
  small_random random(seed());
  for (const unsigned bits : {7U, 12U, 20U, 40U, 64U}) {
    index_under_test t;
    std::deque<item> items(160);
    for (int round = 0; round < 3; ++round) {
      for (item& i : items) {
        if (random.below(3) == 0) continue;
        std::tie(i.first, i.last) = some_range(random, bits);
        t.insert(i);
      }
      for (int q = 0; q < 400; ++q) {
        const auto [first, last] = some_range(random, bits);
        t.check(first, last);
      }
      t.check(0, ~std::uint64_t{0});
      // Every edge: one key before, at, and behind both ends of each interval.
      const std::vector<item*> all = t.present;
      for (const item* i : all) {
        for (const std::uint64_t edge : {i->first, i->last}) {
          if (edge > 0) t.check(edge - 1, edge);
          if (edge < ~std::uint64_t{0}) t.check(edge, edge + 1);
        }
      }
      for (item* i : all) {
        t.remove(*i);
        if (random.below(8) == 0) t.check(i->first, i->last);
      }
      CHECK(t.index.empty());
      t.domain.synchronize();
    }
  }
}

TEST_CASE("C4: the gaps between disjoint intervals are found as gaps, key by key") {
  small_random random(seed());
  index_under_test t;
  std::deque<item> items;
  std::vector<bool> covered(1 << 14);
  for (std::uint64_t at = 0; at + 300 < covered.size();) {
    at += random.below(200);
    const std::uint64_t length = 1 + random.below(90);
    items.emplace_back(at, at + length);
    for (std::uint64_t k = at; k < at + length; ++k) covered[k] = true;
    at += length;
    t.insert(items.back());
  }
  for (std::uint64_t k = 0; k < covered.size(); ++k) CHECK(t.ask(k, k + 1).empty() == !covered[k]);
  // Spans: from each key to the next change.
  for (std::uint64_t k = 0; k < covered.size();) {
    std::uint64_t end = k;
    while (end < covered.size() && covered[end] == covered[k]) ++end;
    CHECK(t.ask(k, end).empty() == !covered[k]);
    k = end;
  }
  for (item& i : items) t.remove(i);
  CHECK(t.index.empty());
}

TEST_CASE("C4: the ends of the key space, and intervals longer than half of it") {
  constexpr std::uint64_t max = ~std::uint64_t{0};
  index_under_test t;
  item whole(0, max);
  item upper((std::uint64_t{1} << 63) - 5, max);
  item last(max - 1, max);
  item first(0, 1);
  for (item* i : {&whole, &upper, &last, &first}) t.insert(*i);
  for (const std::uint64_t at : {std::uint64_t{0}, std::uint64_t{1}, (std::uint64_t{1} << 63) - 6,
                                 (std::uint64_t{1} << 63) - 5, (std::uint64_t{1} << 63) + 5, max - 2, max - 1}) {
    t.check(at, at + 1);
    t.check(0, at + 1);
    t.check(at, max);
  }
  for (item* i : {&whole, &upper, &last, &first}) t.remove(*i);
  CHECK(t.index.empty());
}

TEST_CASE("C6: who comes late to a node that has become empty does not get in") {
  srcu_domain domain;
  trie index(domain);
  const auto place = bucket_place::of(0x1000, 0x2000);
  const read_section s(domain);  // keeps what is unlinked
  trie::node* const leaf = index.pin_leaf(place);
  REQUIRE(leaf != nullptr);
  CHECK(trie::pin(leaf));
  index.unpin(leaf);
  CHECK_FALSE(index.empty());
  index.unpin(leaf);
  CHECK(index.empty());
  CHECK_FALSE(trie::pin(leaf));
  trie::node* const another = index.pin_leaf(place);
  CHECK(another != leaf);
  index.unpin(another);
  CHECK(index.empty());
}

TEST_CASE("C6: a node that becomes empty goes, while others are about to use it") {
  // Both threads come and go in one leaf, so that each frees the path that the other walks.
  srcu_domain domain;
  trie index(domain);
  constexpr int rounds = 30'000;
  std::atomic<int> lost{0};
  std::atomic<int> ready{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      std::deque<item> items;  // none is used twice
      const std::uint64_t first = 0x7000'0000'0000 + static_cast<std::uint64_t>(t) * 0x1000;
      const auto place = bucket_place::of(first, first + 0x1000);
      ready.fetch_add(1);
      while (ready.load() < 2) std::this_thread::yield();
      for (int round = 0; round < rounds; ++round) {
        item& i = items.emplace_back(first, first + 0x1000);
        const read_section s(domain);
        trie::node* const leaf = index.pin_leaf(place);
        if (leaf == nullptr) return lost.store(rounds);
        trie::mark_used(leaf, place.bucket);
        marked_list::push_front(leaf->list(place.bucket), i);
        int found = 0;
        index.walk(first, first + 0x1000, [&](const item& x) {
          found += &x == &i ? 1 : 0;
          return true;
        });
        if (found != 1) lost.fetch_add(1);
        marked_list::mark(i);
        marked_list::sweep(leaf->list(place.bucket));
        index.unpin(leaf);
      }
      domain.synchronize();
    });
  }
  for (auto& t : threads) t.join();
  CHECK(lost.load() == 0);
  CHECK(index.empty());
}
