// SPDX-License-Identifier: MIT
#pragma once

// The constexpr table by which a client type's hooks are called, and the sentences for a type that is no client.

#include <type_traits>

#include <mmunotify/config.hpp>
#include <mmunotify/notifier/hooks.hpp>

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
MMUNOTIFY_DEFINE_NAMED(invalidate_begin)
MMUNOTIFY_DEFINE_NAMED(invalidate_finish)
MMUNOTIFY_DEFINE_NAMED(invalidate_range_end)
MMUNOTIFY_DEFINE_NAMED(change_entry)
MMUNOTIFY_DEFINE_NAMED(invalidate_secondary_tlbs)
MMUNOTIFY_DEFINE_NAMED(clear_flush_young)
MMUNOTIFY_DEFINE_NAMED(clear_young)
MMUNOTIFY_DEFINE_NAMED(test_young)
MMUNOTIFY_DEFINE_NAMED(young_pages)
MMUNOTIFY_DEFINE_NAMED(existing_range)
MMUNOTIFY_DEFINE_NAMED(release)
#undef MMUNOTIFY_DEFINE_NAMED

template <class Key>
struct no_young_batch {};
/// basic_young_batch, for keys that have pages.
template <class Key>
struct young_batch_of {
  using type = no_young_batch<Key>;
};
template <paged_key Key>
struct young_batch_of<Key> {
  using type = basic_young_batch<Key>;
};

/// The hooks of one client type. Null: the type lacks it.
template <address_key Key>
struct operations {
  using invalidation_type = basic_invalidation<Key>;
  using batch = typename young_batch_of<Key>::type;

  void (*start)(void*, const invalidation_type&) noexcept = nullptr;      ///< of what is blockable
  bool (*try_start)(void*, const invalidation_type&) noexcept = nullptr;  ///< there with start; false: refused
  basic_first_pass<Key> (*begin)(void*, const invalidation_type&) noexcept = nullptr;
  void (*finish)(void*, basic_two_pass_token<Key>&, const invalidation_type&) noexcept = nullptr;
  void (*end)(void*, const invalidation_type&) noexcept = nullptr;
  void (*change_entry)(void*, const basic_entry_change<Key>&) noexcept = nullptr;
  void (*invalidate_secondary_tlbs)(void*, basic_range<Key>) noexcept = nullptr;
  bool (*clear_flush_young)(void*, basic_range<Key>) noexcept = nullptr;
  bool (*clear_young)(void*, basic_range<Key>) noexcept = nullptr;
  bool (*test_young)(void*, basic_range<Key>) noexcept = nullptr;
  void (*young_pages)(void*, batch&) noexcept = nullptr;
  void (*existing_range)(void*, basic_range<Key>) noexcept = nullptr;
  void (*release)(void*) noexcept = nullptr;
};

/// Selects one of the young hooks.
template <address_key Key>
using young_hook = bool (*operations<Key>::*)(void*, basic_range<Key>) noexcept;

inline void refused_blockable() noexcept {
  violated("P3", "invalidate_range_start", "a client refused a start that is blockable; it counts as done");
}

/// How the hooks of C are called that get the invalidation I.
template <class C, address_key Key, class I>
consteval void set_bracket_operations(operations<Key>& o) {
  using base = basic_invalidation<Key>;
  if constexpr (has_start<C, Key, I>) {
    o.start = [](void* c, const base& i) noexcept {
      static_cast<C*>(c)->invalidate_range_start(static_cast<const I&>(i));
    };
    o.try_start = [](void* c, const base& i) noexcept {
      static_cast<C*>(c)->invalidate_range_start(static_cast<const I&>(i));
      return true;
    };
  } else if constexpr (has_refusing_start<C, Key, I>) {
    o.start = [](void* c, const base& i) noexcept {
      if (!static_cast<C*>(c)->invalidate_range_start(static_cast<const I&>(i))) refused_blockable();
    };
    o.try_start = [](void* c, const base& i) noexcept {
      return static_cast<C*>(c)->invalidate_range_start(static_cast<const I&>(i));
    };
  } else if constexpr (has_begin<C, Key, I>) {
    o.begin = [](void* c, const base& i) noexcept {
      return static_cast<C*>(c)->invalidate_begin(static_cast<const I&>(i));
    };
    o.finish = [](void* c, basic_two_pass_token<Key>& t, const base& i) noexcept {
      static_cast<C*>(c)->invalidate_finish(t, static_cast<const I&>(i));
    };
  }
  if constexpr (has_end<C, Key, I>) {
    o.end = [](void* c, const base& i) noexcept { static_cast<C*>(c)->invalidate_range_end(static_cast<const I&>(i)); };
  }
}

template <class C, address_key Key, class I>
consteval operations<Key> make_operations() {
  operations<Key> o;
  set_bracket_operations<C, Key, I>(o);
  if constexpr (has_change_entry<C, Key>) {
    o.change_entry = [](void* c, const basic_entry_change<Key>& e) noexcept { static_cast<C*>(c)->change_entry(e); };
  }
  if constexpr (has_invalidate_secondary_tlbs<C, Key>) {
    o.invalidate_secondary_tlbs = [](void* c, basic_range<Key> r) noexcept {
      static_cast<C*>(c)->invalidate_secondary_tlbs(r);
    };
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
  if constexpr (has_young_pages<C, Key>) {
    o.young_pages = [](void* c, basic_young_batch<Key>& b) noexcept { static_cast<C*>(c)->young_pages(b); };
  }
  if constexpr (has_existing_range<C, Key>) {
    o.existing_range = [](void* c, basic_range<Key> r) noexcept { static_cast<C*>(c)->existing_range(r); };
  }
  if constexpr (has_release<C>) {
    o.release = [](void* c) noexcept { static_cast<C*>(c)->release(); };
  }
  return o;
}

/// Explains a type that is no client, or only half of one: one sentence each.
template <class C, class Key, class I>
consteval bool check_client() {
  static_assert(std::is_class_v<C>, "mmunotify: a subscriber's client must be a class type");
  static_assert(!std::is_final_v<C>,
                "mmunotify: a subscriber's client must not be final: its hooks' signatures could not be checked");
  static_assert(!names_invalidate_range_start<C>() || has_start<C, Key, I> || has_refusing_start<C, Key, I>,
                "mmunotify: the client's invalidate_range_start must be callable as "
                "void (or bool) invalidate_range_start(const basic_invalidation<Key>&)");
  static_assert((!names_invalidate_begin<C>() && !names_invalidate_finish<C>()) || has_begin<C, Key, I>,
                "mmunotify: a two-pass client needs both, callable as "
                "basic_first_pass<Key> invalidate_begin(const basic_invalidation<Key>&) and "
                "void invalidate_finish(basic_two_pass_token<Key>&, const basic_invalidation<Key>&)");
  static_assert(!names_invalidate_begin<C>() || !names_invalidate_range_start<C>(),
                "mmunotify: the client has invalidate_range_start and invalidate_begin: a start has one pass or two");
  static_assert(!names_invalidate_range_end<C>() || has_end<C, Key, I>,
                "mmunotify: the client's invalidate_range_end must be callable as "
                "void invalidate_range_end(const basic_invalidation<Key>&)");
  static_assert(!names_change_entry<C>() || has_change_entry<C, Key>,
                "mmunotify: the client's change_entry must be callable as "
                "void change_entry(const basic_entry_change<Key>&)");
  static_assert(!names_invalidate_secondary_tlbs<C>() || has_invalidate_secondary_tlbs<C, Key>,
                "mmunotify: the client's invalidate_secondary_tlbs must be callable as "
                "void invalidate_secondary_tlbs(basic_range<Key>)");
  static_assert(
      !names_clear_flush_young<C>() || has_clear_flush_young<C, Key>,
      "mmunotify: the client's clear_flush_young must be callable as bool clear_flush_young(basic_range<Key>)");
  static_assert(!names_clear_young<C>() || has_clear_young<C, Key>,
                "mmunotify: the client's clear_young must be callable as bool clear_young(basic_range<Key>)");
  static_assert(!names_test_young<C>() || has_test_young<C, Key>,
                "mmunotify: the client's test_young must be callable as bool test_young(basic_range<Key>)");
  static_assert(!names_young_pages<C>() || has_young_pages<C, Key>,
                "mmunotify: the client's young_pages must be callable as void young_pages(basic_young_batch<Key>&), "
                "and the keys must have pages");
  static_assert(!names_existing_range<C>() || has_existing_range<C, Key>,
                "mmunotify: the client's existing_range must be callable as void existing_range(basic_range<Key>)");
  static_assert(!names_release<C>() || has_release<C>,
                "mmunotify: the client's release must be callable as void release()");
  static_assert(secondary_mmu<C, Key, I>,
                "mmunotify: the client has no hook: give it at least one of invalidate_range_start, invalidate_begin "
                "and invalidate_finish, invalidate_range_end, change_entry, invalidate_secondary_tlbs, "
                "clear_flush_young, clear_young, test_young, young_pages, release");
  return true;
}

template <class C, address_key Key, class I = basic_invalidation<Key>>
inline constexpr operations<Key> operations_for = make_operations<C, Key, I>();

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
