// SPDX-License-Identifier: MIT
#pragma once

// One range of an interval in the index, and which brackets call it.
//
// A bracket has a version g; it must call the same entries at its start and at its end, while entries come and go, and
// keeps no list of them. An entry has the versions `born` and `dead`, and is called by those with born <= g < dead.
// Nothing is locked, so a bracket may meet an entry whose versions are not settled yet. It settles them, with a version
// that it draws itself, and so knows what it will find at its end:
//
//   insert:  link;                 b = ++clock;  born: unborn  -> b         (whoever is first)
//   remove:  dead: never->leaving; d = ++clock;  dead: leaving -> d         (whoever is first)
//
// Why that is right. All versions are drawn by read-modify-writes of one word, so whoever reads a clock of at least v
// comes after all that the one who drew v had done and seen before:
//   V1  A bracket with g >= born sees the entry linked, in both walks: born was drawn after the link had been seen.
//   V2  A bracket with g < born does not call it, whether it met it or not, whether it settled `born` itself or not:
//       what is drawn now is greater than any g that was read before. (With a version of the bracket's own past, g + 1,
//       a slow bracket would stamp the entry so that a faster one, whose start had missed it, called its end.)
//   V3  A bracket with g >= dead sees `leaving`, settles it if it has to, and does not call the entry. One that finds
//       `never` has g < dead, at its start and, since it finds that or a greater dead, at its end.
//   V4  Both words change no more once they are settled.
// An entry that leaves stays linked for a grace period: the brackets with g < dead meet it at their end. Then it is
// marked, and the list swept; where many leave at the same time, first all are marked, and one sweeps for all.
//
// Orderings: (iv1) release of a word / (iv2) acquire. The clock is seq_cst, in_flight.hpp says why.

#include <atomic>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/bucket_trie.hpp>
#include <mmunotify/interval/detail/in_flight.hpp>
#include <mmunotify/sync/marked_list.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

template <address_key Key>
class basic_interval;

namespace detail {

/// A key as a number of the same order.
template <class Key>
concept numbered_key = address_key<Key> && (std::unsigned_integral<Key> || requires(Key k) {
                         { k.value } -> std::convertible_to<std::uint64_t>;
                         requires std::unsigned_integral<decltype(k.value)>;
                       });
template <numbered_key Key>
constexpr std::uint64_t number_of(const Key& k) noexcept {
  if constexpr (std::unsigned_integral<Key>) {
    return k;
  } else {
    return k.value;
  }
}

/// 64 bytes, of which a bracket that passes by looks at the first 24.
template <address_key Key>
class interval_entry : public marked_node {
 public:
  using leaf = typename bucket_trie<interval_entry>::node;

  basic_range<Key> range{};
  basic_interval<Key>* owner = nullptr;
  leaf* place = nullptr;  ///< pinned; nullptr: not linked

  bucket_place bucket() const noexcept { return bucket_place::of(number_of(range.first), number_of(range.last)); }

  /// Precondition: linked nowhere, and nobody looks.
  void renew(basic_interval<Key>& o, const basic_range<Key>& r) noexcept {
    owner = &o;
    range = r;
    born_.store(unborn, std::memory_order_relaxed);
    dead_.store(never, std::memory_order_relaxed);
    unlinked_.store(false, std::memory_order_relaxed);
  }

  /// Returns: true if a bracket of version g calls it. The same answer at its start and its end. Progress: wait-free.
  [[gnu::always_inline]] bool hears(std::uint64_t g, version_clock& clock) noexcept {
    std::uint64_t born = born_.load(std::memory_order_acquire);  // (iv2) pairs with (iv1)
    if (born == unborn) [[unlikely]] {
      if constexpr (mutated(mutation::interval_born_behind)) {
        born = settle(born_, unborn, g + 1);
      } else {
        born = settle(born_, unborn, clock.advance());
      }
    }
    if (born > g) return false;
    std::uint64_t dead = dead_.load(std::memory_order_acquire);  // (iv2)
    if (dead == leaving) [[unlikely]]
      dead = settle(dead_, leaving, clock.advance());
    return g < dead;
  }

  /// After the link. Returns: when it was born.
  std::uint64_t bear(version_clock& clock) noexcept { return settle(born_, unborn, clock.advance()); }
  /// Brackets that start from now on do not call it. By one caller.
  void kill(version_clock& clock) noexcept {
    dead_.store(leaving, std::memory_order_seq_cst);  // (iv1) pairs with (iv2)
    settle(dead_, leaving, clock.advance());
  }
  /// Precondition: dead, and no bracket that calls it is in flight.
  void mark() noexcept { marked_list::mark(*this); }
  /// Returns: true if there is little in its bucket, so that each may sweep for itself.
  bool has_short_list() const noexcept { return marked_list::shorter_than(place->list(bucket().bucket), 8); }
  /// Effects: it is unlinked, and all that are marked in its bucket. Whoever has done that for many has done it for
  /// each. Preconditions: marked; inside a section (H1).
  void sweep() noexcept {
    if (unlinked_.load(std::memory_order_acquire)) return;  // (iv2) pairs with (iv1)
    marked_list::sweep(place->list(bucket().bucket), [](marked_node& n) {
      static_cast<interval_entry&>(n).unlinked_.store(true, std::memory_order_release);  // (iv1)
    });
  }

  /// Precondition: linked.
  std::uint64_t born() const noexcept { return born_.load(std::memory_order_acquire); }  // (iv2)

 private:
  static constexpr std::uint64_t never = ~std::uint64_t{0};
  static constexpr std::uint64_t leaving = never - 1;
  static constexpr std::uint64_t unborn = never;

  /// Returns: what the word is for good.
  static std::uint64_t settle(std::atomic<std::uint64_t>& word, std::uint64_t open, std::uint64_t version) noexcept {
    // (iv1), (iv2): seq_cst, so that who finds it settled comes after the step of the clock, for (if3).
    return word.compare_exchange_strong(open, version, std::memory_order_seq_cst) ? version : open;
  }

  std::atomic<std::uint64_t> born_{unborn};
  std::atomic<std::uint64_t> dead_{never};
  std::atomic<bool> unlinked_{false};
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
