// SPDX-License-Identifier: MIT
#pragma once

// Two passes: first everybody's device begins to flush, then everybody waits. N devices flush in parallel (O3).
//
//   struct gpu {
//     struct fence : two_pass_token { ... };
//     first_pass invalidate_begin(const invalidation& i) noexcept {
//       fence* f = fences.take();                       // none left: do it all now
//       if (f == nullptr) { flush_and_wait(i.range); return first_pass::complete(); }
//       f->start(i.range);
//       return *f;
//     }
//     void invalidate_finish(two_pass_token& t, const invalidation&) noexcept { static_cast<fence&>(t).wait(); }
//   };
//
// The token is the client's memory: nothing is allocated on the way. Brackets run in parallel on one client, so each
// needs a token of its own, from invalidate_begin to invalidate_finish.

#include <atomic>
#include <cstdint>

#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {
template <address_key Key>
class pending_passes;
}

/// What a client hands over from its first pass to its second; derive from it. In use from the return of
/// invalidate_begin to the call of invalidate_finish, which may use it anew at once. 32 bytes.
template <address_key Key>
class basic_two_pass_token {
 public:
  basic_two_pass_token() = default;
  basic_two_pass_token(const basic_two_pass_token&) = delete;
  basic_two_pass_token& operator=(const basic_two_pass_token&) = delete;
  ~basic_two_pass_token() {
    if (in_use()) [[unlikely]]
      detail::violated("O3", "~two_pass_token", "a bracket still has to finish with the token");
  }

  /// May be stale on arrival.
  bool in_use() const noexcept { return used_.load(std::memory_order_relaxed); }

 private:
  friend class detail::pending_passes<Key>;

  std::atomic<bool> used_{false};
  basic_two_pass_token* next_ = nullptr;
  void (*finish_)(void*, basic_two_pass_token&, const basic_invalidation<Key>&) noexcept = nullptr;
  void* context_ = nullptr;
};

/// What invalidate_begin returns: a token to finish with, that nothing is left to do, or a refusal.
template <address_key Key>
class [[nodiscard]] basic_first_pass {
 public:
  static constexpr basic_first_pass complete() noexcept { return {}; }
  /// Only where the bracket is not blockable.
  static constexpr basic_first_pass refused() noexcept {
    basic_first_pass p;
    p.refused_ = true;
    return p;
  }
  constexpr basic_first_pass(basic_two_pass_token<Key>& token) noexcept : token_(&token) {}

  constexpr bool is_complete() const noexcept { return token_ == nullptr && !refused_; }
  constexpr bool is_refused() const noexcept { return refused_; }
  constexpr basic_two_pass_token<Key>* token() const noexcept { return token_; }

 private:
  constexpr basic_first_pass() noexcept = default;

  basic_two_pass_token<Key>* token_ = nullptr;
  bool refused_ = false;
};

using two_pass_token = basic_two_pass_token<std::uintptr_t>;
using first_pass = basic_first_pass<std::uintptr_t>;

namespace detail {

/// The second passes that one bracket owes, in the order of the first ones.
template <address_key Key>
class pending_passes {
  using token = basic_two_pass_token<Key>;

 public:
  using finisher = void (*)(void* context, token&, const basic_invalidation<Key>&) noexcept;

  void add(token& t, finisher finish, void* context) noexcept {
    // (tp1) acquire pairs with (tp2): what the bracket that had it before did is over.
    if (t.used_.exchange(true, std::memory_order_acquire)) [[unlikely]] {
      violated("O3", "invalidate_begin", "the token that a client returned is in use in another bracket");
      return;
    }
    t.finish_ = finish;
    t.context_ = context;
    t.next_ = nullptr;
    *last_ = &t;
    last_ = &t.next_;
  }

  void finish_all(const basic_invalidation<Key>& i) noexcept {
    for (token* t = first_; t != nullptr;) {
      const finisher finish = t->finish_;
      void* const context = t->context_;
      token& mine = *t;
      t = t->next_;                                        // read first: the client may use the token anew
      mine.used_.store(false, std::memory_order_release);  // (tp2) pairs with (tp1)
      finish(context, mine, i);
    }
    first_ = nullptr;
    last_ = &first_;
  }

 private:
  token* first_ = nullptr;
  token** last_ = &first_;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
