// SPDX-License-Identifier: MIT
#pragma once

// Arming policies: how a bracket finds out that nobody listens, and how registration excludes brackets in flight.
//
// The arming race (P7). When the first subscriber arrives, brackets may be in flight that saw nobody. They will not
// call it, and it must not map anything that they are about to pull away. So registration must not return before they
// are over.
//   under<Mutex>  The primary runs every bracket while it holds Mutex, shared or exclusively, as every software MMU
//                 does. register_subscriber demands a lock that owns Mutex exclusively: so none is in flight, by
//                 construction. Disarmed, a bracket is one load, one compare, one branch, and 8 bytes. Checked builds
//                 count open brackets and catch a primary that breaks its word.
//   tracked       No lock to offer. Every bracket is a read section, two plain stores; registration publishes the node
//                 and waits for one grace period.
//   disabled      Compiled out: nothing is left.
//
// The registry of an `under` space exists only while it is armed. A bracket that has loaded its address may be late:
// the registry may have been detached, and may serve another space. So registries come from a pool and are never
// unmapped, and a bracket looks again, inside the section, whether the space still names it. Dekker: the last leaver
// stores "disarmed", then waits for a grace period (heavy fence), then gives the registry back; the bracket enters the
// section (light fence), then looks again.
//
// A gate is a policy's mechanism inside an address space. Its hot half is inlined into the primary and must stay as
// small as it is; its armed half is cold, out of line, and takes and returns values: a bracket whose address escapes
// would be spilled to the stack field by field.

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/notifier/detail/registry.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// A lock object that, while it is held, excludes all other holders of Mutex: std::unique_lock, std::lock_guard.
template <class Lock, class Mutex>
concept exclusive_lock_of = std::same_as<Lock, std::unique_lock<Mutex>> || std::same_as<Lock, std::lock_guard<Mutex>> ||
                            std::same_as<Lock, std::scoped_lock<Mutex>>;

namespace detail {

/// True if the witness owns its mutex now. A lock_guard always does.
template <class Lock>
bool owns(const Lock& lock) noexcept {
  if constexpr (requires {
                  { lock.owns_lock() } -> std::convertible_to<bool>;
                }) {
    return lock.owns_lock();
  } else {
    return true;
  }
}

/// What an armed bracket remembers from its start to its end; in a cell of its thread, so that the caller keeps one
/// word in a register and nothing on its stack.
template <address_key Key, class Platform>
struct open_bracket {
  basic_invalidation<Key> i;
  registry<Key, Platform>* audience;
  std::uint64_t version;  ///< 0: nobody is called at the end
  void* intervals;        ///< what the intervals remember of it
};

/// Returns: false, after saying so, if the bracket is not open, or not one of this registry and thread. (Checked
/// builds; whether it was ended before is looked at always.)
template <address_key Key, class Platform>
[[gnu::always_inline]] inline bool is_open(const open_bracket<Key, Platform>& b) noexcept {
  const bool open = b.audience != nullptr && (!MMUNOTIFY_CHECKED || b.audience->domain().held_by_this_thread());
  if (!open) [[unlikely]] {
    violated("P2", "address_space::invalidate_range_end", "the bracket has ended before, or is another thread's");
  }
  return open;
}

/// Precondition: inside the registry's section, whose begin returned the slab. Never null: a thread that opens more
/// brackets than it has cells is reported, and ends.
template <address_key Key, class Platform>
[[gnu::always_inline]] inline open_bracket<Key, Platform>* make_bracket(registry<Key, Platform>& r,
                                                                        std::byte* slab) noexcept {
  static_assert(sizeof(open_bracket<Key, Platform>) <= sizeof(typename thread_cells<Platform::cells>::cell));
  void* const cell = r.domain().cells(slab).take();
  if (cell == nullptr) [[unlikely]] {
    violated("P5", "address_space::invalidate", "one thread has %zu brackets open, and cannot have more",
             std::size_t{Platform::cells});
    std::abort();
  }
  auto* const b = new (cell) open_bracket<Key, Platform>;
  b->audience = &r;
  b->version = r.version();
  b->intervals = nullptr;
  return b;
}

/// How a bracket starts.
enum class manner : std::uint8_t {
  blocking,
  nonblocking,  ///< clients may refuse
  in_place,     ///< translations are replaced and told by change_entry
};

template <address_key Key>
[[gnu::always_inline]] inline void describe(basic_invalidation<Key>& i, basic_range<Key> r, event e, const void* owner,
                                            manner m) noexcept {
  i.range = r;
  i.event = e;
  i.owner = owner;
  i.blockable = m != manner::nonblocking;
  i.in_place = m == manner::in_place;
}

/// Registries that serve no space at the moment. They are never given back to the system (see above).
template <address_key Key, class Platform = linux_platform>
class registry_pool {
 public:
  struct entry : registry<Key, Platform> {
    entry* next = nullptr;
  };

  /// Returns: nullptr if memory is exhausted.
  static entry* take() noexcept {
    {
      const std::lock_guard lock(mutex_);
      if (first_ != nullptr) return std::exchange(first_, first_->next);
    }
    return new (std::nothrow) entry;
  }

  static void give_back(entry* e) noexcept {
    const std::lock_guard lock(mutex_);
    e->next = std::exchange(first_, e);
  }

 private:
  static inline constinit typename Platform::mutex mutex_{};
  static inline constinit entry* first_ = nullptr;
};

}  // namespace detail

namespace arming {

template <class Mutex>
struct under {
  using mutex = Mutex;
};
struct tracked {};

}  // namespace arming

/// The policy of a space that is compiled out.
struct disabled {};

MMUNOTIFY_END_NAMESPACE
