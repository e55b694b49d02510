// SPDX-License-Identifier: MIT
#pragma once

// What a secondary MMU may implement, and the constexpr table that calls it.
//
// A client is any class type with at least one of these hooks; names and meaning are Linux's (struct
// mmu_notifier_ops). A hook that the type lacks is a null pointer that the walk skips.
//
//   void invalidate_range_start(const basic_invalidation<Key>&)   drop every mapping in the range; when it returns,
//   none
//                                                                 is usable. May sleep if blockable.
//   bool invalidate_range_start(const basic_invalidation<Key>&)   the same; may return false to refuse, only if the
//                                                                 bracket is not blockable.
//   void invalidate_range_end(const basic_invalidation<Key>&)     mappings may be made again.
//   bool clear_flush_young(basic_range<Key>)                      test and clear "accessed", flush; was any set?
//   bool clear_young(basic_range<Key>)                            the same without a flush.
//   bool test_young(basic_range<Key>)                             only look.
//   void release()                                                drop everything and map nothing any more; called once
//                                                                 per registration, never beside itself.
//
// Every hook is called inside a read section of the space (its own, for registration and release). start and end of one
// bracket are called by one thread; brackets of several threads call the same client in parallel. Hooks must not throw,
// must not change the signature by one letter (a static_assert says which), and must not wait for the space.

#include <concepts>
#include <type_traits>

#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

// Does the type have a member of that name, whatever its signature? A derived class that inherits the name from two
// bases cannot name it: so naming it fails exactly if the client has it, too, private ones and overloads included.
#define MMUNOTIFY_DEFINE_NAMED(hook)                                \
  struct hook##_decoy {                                             \
    int hook;                                                       \
  };                                                                \
  template <class Client>                                           \
  struct hook##_probe : Client, hook##_decoy {};                    \
  template <class Client>                                           \
  concept lacks_##hook = requires { &hook##_probe<Client>::hook; }; \
  template <class Client>                                           \
  consteval bool names_##hook() {                                   \
    return !lacks_##hook<Client>;                                   \
  }

MMUNOTIFY_DEFINE_NAMED(invalidate_range_start)
MMUNOTIFY_DEFINE_NAMED(invalidate_range_end)
MMUNOTIFY_DEFINE_NAMED(clear_flush_young)
MMUNOTIFY_DEFINE_NAMED(clear_young)
MMUNOTIFY_DEFINE_NAMED(test_young)
MMUNOTIFY_DEFINE_NAMED(release)
#undef MMUNOTIFY_DEFINE_NAMED

}  // namespace detail

template <class C, class Key = std::uintptr_t>
concept has_start = requires(C& c, const basic_invalidation<Key>& i) {
  { c.invalidate_range_start(i) } -> std::same_as<void>;
};
/// A start that may refuse when the bracket is not blockable.
template <class C, class Key = std::uintptr_t>
concept has_refusing_start = requires(C& c, const basic_invalidation<Key>& i) {
  { c.invalidate_range_start(i) } -> std::same_as<bool>;
};
template <class C, class Key = std::uintptr_t>
concept has_end = requires(C& c, const basic_invalidation<Key>& i) {
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
template <class C>
concept has_release = requires(C& c) {
  { c.release() } -> std::same_as<void>;
};

/// At least one hook.
template <class C, class Key = std::uintptr_t>
concept secondary_mmu = std::is_class_v<C> && (has_start<C, Key> || has_refusing_start<C, Key> || has_end<C, Key> ||
                                               has_clear_flush_young<C, Key> || has_clear_young<C, Key> ||
                                               has_test_young<C, Key> || has_release<C>);

namespace detail {

/// The hooks of one client type. Null: the type lacks it.
template <address_key Key>
struct operations {
  bool (*start)(void*, const basic_invalidation<Key>&) noexcept = nullptr;
  void (*end)(void*, const basic_invalidation<Key>&) noexcept = nullptr;
  bool (*clear_flush_young)(void*, basic_range<Key>) noexcept = nullptr;
  bool (*clear_young)(void*, basic_range<Key>) noexcept = nullptr;
  bool (*test_young)(void*, basic_range<Key>) noexcept = nullptr;
  void (*release)(void*) noexcept = nullptr;
};

/// Selects one of the young hooks.
template <address_key Key>
using young_hook = bool (*operations<Key>::*)(void*, basic_range<Key>) noexcept;

template <class C, address_key Key>
consteval operations<Key> make_operations() {
  operations<Key> o;
  if constexpr (has_start<C, Key>) {
    o.start = [](void* c, const basic_invalidation<Key>& i) noexcept {
      static_cast<C*>(c)->invalidate_range_start(i);
      return true;
    };
  } else if constexpr (has_refusing_start<C, Key>) {
    o.start = [](void* c, const basic_invalidation<Key>& i) noexcept {
      return static_cast<C*>(c)->invalidate_range_start(i);
    };
  }
  if constexpr (has_end<C, Key>) {
    o.end = [](void* c, const basic_invalidation<Key>& i) noexcept { static_cast<C*>(c)->invalidate_range_end(i); };
  }
  if constexpr (has_clear_flush_young<C, Key>) {
    o.clear_flush_young = [](void* c, basic_range<Key> r) noexcept { return static_cast<C*>(c)->clear_flush_young(r); };
  }
  if constexpr (has_clear_young<C, Key>) {
    o.clear_young = [](void* c, basic_range<Key> r) noexcept { return static_cast<C*>(c)->clear_young(r); };
  }
  if constexpr (has_test_young<C, Key>) {
    o.test_young = [](void* c, basic_range<Key> r) noexcept { return static_cast<C*>(c)->test_young(r); };
  }
  if constexpr (has_release<C>) {
    o.release = [](void* c) noexcept { static_cast<C*>(c)->release(); };
  }
  return o;
}

/// Explains a type that is no client, or only half of one: one sentence each.
template <class C, class Key>
consteval bool check_client() {
  static_assert(std::is_class_v<C>, "mmunotify: a subscriber's client must be a class type");
  static_assert(!std::is_final_v<C>,
                "mmunotify: a subscriber's client must not be final: its hooks' signatures could not be checked");
  static_assert(!names_invalidate_range_start<C>() || has_start<C, Key> || has_refusing_start<C, Key>,
                "mmunotify: the client's invalidate_range_start must be callable as "
                "void (or bool) invalidate_range_start(const basic_invalidation<Key>&)");
  static_assert(!names_invalidate_range_end<C>() || has_end<C, Key>,
                "mmunotify: the client's invalidate_range_end must be callable as "
                "void invalidate_range_end(const basic_invalidation<Key>&)");
  static_assert(
      !names_clear_flush_young<C>() || has_clear_flush_young<C, Key>,
      "mmunotify: the client's clear_flush_young must be callable as bool clear_flush_young(basic_range<Key>)");
  static_assert(!names_clear_young<C>() || has_clear_young<C, Key>,
                "mmunotify: the client's clear_young must be callable as bool clear_young(basic_range<Key>)");
  static_assert(!names_test_young<C>() || has_test_young<C, Key>,
                "mmunotify: the client's test_young must be callable as bool test_young(basic_range<Key>)");
  static_assert(!names_release<C>() || has_release<C>,
                "mmunotify: the client's release must be callable as void release()");
  static_assert(secondary_mmu<C, Key>,
                "mmunotify: the client has no hook: give it at least one of invalidate_range_start, "
                "invalidate_range_end, clear_flush_young, clear_young, test_young, release");
  return true;
}

template <class C, address_key Key>
inline constexpr operations<Key> operations_for = make_operations<C, Key>();

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
