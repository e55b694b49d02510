// SPDX-License-Identifier: MIT
#pragma once

// What a secondary MMU may implement. A client is any class type with at least one of these hooks; names and meaning
// are Linux's (struct mmu_notifier_ops) where it has them. A hook that the type lacks is a null pointer that the walk
// skips.
//
//   void invalidate_range_start(const basic_invalidation<Key>&)   drop every mapping in the range; no usable one is
//                                                                 left when it returns. May sleep if blockable.
//   bool invalidate_range_start(const basic_invalidation<Key>&)   the same; may return false to refuse, only if the
//                                                                 bracket is not blockable: see below.
//   basic_first_pass<Key> invalidate_begin(const basic_invalidation<Key>&)     instead of start, in two passes: begin,
//   void invalidate_finish(basic_two_pass_token<Key>&, const basic_invalidation<Key>&)   and wait; see two_pass.hpp.
//   void invalidate_range_end(const basic_invalidation<Key>&)     mappings may be made again.
//   void change_entry(const basic_entry_change<Key>&)             the translation in an in-place bracket is a new one:
//                                                                 put it in the place of the old. For a client whose
//                                                                 start keeps its mappings if invalidation::in_place.
//                                                                 Only of an old that still stands: what another
//                                                                 bracket, open now, has dropped stays dropped, also if
//                                                                 a TLB still has it.
//   void invalidate_secondary_tlbs(basic_range<Key>)              a device that walks the primary's tables: flush what
//                                                                 it cached. Must not sleep: called under page-table
//                                                                 locks. A range up to the last key means all.
//   bool clear_flush_young(basic_range<Key>)                      test and clear "accessed", flush; was any set?
//   bool clear_young(basic_range<Key>)                            the same without a flush.
//   bool test_young(basic_range<Key>)                             only look.
//   void young_pages(basic_young_batch<Key>&)                     the same for each page: see young_batch.hpp. A
//                                                                 client without it is asked page by page with one of
//                                                                 the two before.
//   void existing_range(basic_range<Key>)                         at registration: what the primary has mapped already.
//   void release()                                                drop everything and map nothing any more; called once
//                                                                 per registration, never beside itself.
//
// A refused start (P3). The walk stops at the client that refuses: those that come behind it (O2: intervals by size and
// address, then subscribers, newest first) get neither start nor end. Then, before the primary gets its answer,
// everybody who got the start gets exactly one end, in the order of the starts, and the one that refused is among them:
// so count the bracket first, refuse then, and let the end take the count back, as after a start that was served. Two
// passes: those who have begun finish first (O3); the one that refused has no token, and finishes nothing, but gets its
// end. A client must leave its mappings as they were when it refuses, and its faults need not retry (P4): the primary
// changes nothing. A bracket that a fault's turn refuses (C8) calls nobody. To refuse what is blockable is a contract
// failure: the start counts as served, and the end comes when the bracket ends.
//
// Every hook is called inside a read section of the space (its own, for registration and release). start and end of one
// bracket are called by one thread; brackets of several threads call the same client in parallel. Hooks must not throw,
// must not change the signature by one letter (a static_assert says which), and must not wait for the space.

#include <concepts>
#include <type_traits>

#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/young_batch.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/notifier/two_pass.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

// I: the invalidation that the hooks get, basic_invalidation<Key> or derived from it.

template <class C, class Key = std::uintptr_t, class I = basic_invalidation<Key>>
concept has_start = requires(C& c, const I& i) {
  { c.invalidate_range_start(i) } -> std::same_as<void>;
};
/// A start that may refuse when the bracket is not blockable.
template <class C, class Key = std::uintptr_t, class I = basic_invalidation<Key>>
concept has_refusing_start = requires(C& c, const I& i) {
  { c.invalidate_range_start(i) } -> std::same_as<bool>;
};
/// In two passes.
template <class C, class Key = std::uintptr_t, class I = basic_invalidation<Key>>
concept has_begin = requires(C& c, const I& i, basic_two_pass_token<Key>& t) {
  { c.invalidate_begin(i) } -> std::same_as<basic_first_pass<Key>>;
  { c.invalidate_finish(t, i) } -> std::same_as<void>;
};
template <class C, class Key = std::uintptr_t, class I = basic_invalidation<Key>>
concept has_end = requires(C& c, const I& i) {
  { c.invalidate_range_end(i) } -> std::same_as<void>;
};
template <class C, class Key = std::uintptr_t>
concept has_clear_flush_young = requires(C& c, basic_range<Key> r) {
  { c.clear_flush_young(r) } -> std::same_as<bool>;
};
template <class C, class Key = std::uintptr_t>
concept has_clear_young = requires(C& c, basic_range<Key> r) {
  { c.clear_young(r) } -> std::same_as<bool>;
};
template <class C, class Key = std::uintptr_t>
concept has_test_young = requires(C& c, basic_range<Key> r) {
  { c.test_young(r) } -> std::same_as<bool>;
};
template <class C, class Key = std::uintptr_t>
concept has_young_pages = paged_key<Key> && requires(C& c, basic_young_batch<Key>& b) {
  { c.young_pages(b) } -> std::same_as<void>;
};
template <class C, class Key = std::uintptr_t>
concept has_change_entry = requires(C& c, const basic_entry_change<Key>& e) {
  { c.change_entry(e) } -> std::same_as<void>;
};
template <class C, class Key = std::uintptr_t>
concept has_invalidate_secondary_tlbs = requires(C& c, basic_range<Key> r) {
  { c.invalidate_secondary_tlbs(r) } -> std::same_as<void>;
};
template <class C, class Key = std::uintptr_t>
concept has_existing_range = requires(C& c, basic_range<Key> r) {
  { c.existing_range(r) } -> std::same_as<void>;
};
template <class C>
concept has_release = requires(C& c) {
  { c.release() } -> std::same_as<void>;
};

/// At least one hook that a space calls.
template <class C, class Key = std::uintptr_t, class I = basic_invalidation<Key>>
concept secondary_mmu =
    std::is_class_v<C> &&
    (has_start<C, Key, I> || has_refusing_start<C, Key, I> || has_begin<C, Key, I> || has_end<C, Key, I> ||
     has_change_entry<C, Key> || has_invalidate_secondary_tlbs<C, Key> || has_clear_flush_young<C, Key> ||
     has_clear_young<C, Key> || has_test_young<C, Key> || has_young_pages<C, Key> || has_release<C>);

MMUNOTIFY_END_NAMESPACE
