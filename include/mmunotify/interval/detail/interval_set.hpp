// SPDX-License-Identifier: MIT
#pragma once

// The intervals of one space: who is called by a bracket. No lock, and no allocation on a bracket's way.
//
// A bracket enters (interval_context.hpp), walks the index by class and bucket, and calls the entries that hear it
// (interval_entry.hpp): the same ones, in the same order, at start and at end. It is inside one read section from start
// to end, so that what it calls stays linked. How intervals come and go: interval_roster.hpp.

#include <cstdint>

#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/interval/detail/interval_roster.hpp>
#include <mmunotify/notifier/two_pass.hpp>
#include <mmunotify/observe/observe.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

template <address_key Key>
class interval_set : public interval_roster<Key> {
  using base = interval_roster<Key>;
  using base::context_;
  using base::index_;
  using typename base::entry;

 public:
  using typename base::interval;
  using typename base::range_type;
  using invalidation_type = basic_invalidation<Key>;
  using memo = flight_memo;

  using base::base;

  // --- Brackets. Precondition of each: inside a read section of the domain, i.range is not empty. -----------------

  /// Effects: calls the starts; second passes are added to `passes`, for the caller to finish. Returns: false if i is
  /// not blockable and a client, or a turn, refused: then those who got the start have got the end, what was begun is
  /// finished, and every sequence is as before (P3, P4). Otherwise end() or cancel() with the same i and memo is due.
  template <observe::observer O>
  [[nodiscard]] bool start(const invalidation_type& i, memo& m, pending_passes<Key>& passes, O& observer) noexcept {
    if (!context_.enter(number_of(i.range.first), number_of(i.range.last), i.blockable, m)) return false;
    bool heard = false;
    std::uint64_t calls = 0;
    const entry* refused = nullptr;
    entry* last = nullptr;
    bool several = false;
    for_audience(i, m.version(), [&](entry& e) {
      several = last != nullptr;
      last = &e;
      e.owner->word_.raise();
      heard = true;
      calls += has_start_hook(e) ? 1 : 0;
      if (call_start(e, i, passes)) [[likely]]
        return true;
      if (i.blockable) [[unlikely]] {
        refused_blockable();
        return true;
      }
      refused = &e;
      return false;
    });
    if (!heard) {
      m.call_nobody();
      return true;
    }
    observer.note(observe::occurrence::callback, calls);
    if (refused == nullptr) [[likely]] {
      if (!several) m.call_one(last);
      return true;
    }
    passes.finish_all(i);
    call_ends<true>(i, m, observer, refused);
    return false;
  }

  /// Effects: calls the ends, in the order of the starts; the sequences move on.
  template <observe::observer O>
  void end(const invalidation_type& i, memo m, O& observer) noexcept {
    call_ends<false>(i, m, observer, nullptr);
  }
  /// The same for a bracket that another subscriber refused: the sequences are as before (P4).
  template <observe::observer O>
  void cancel(const invalidation_type& i, memo m, O& observer) noexcept {
    call_ends<true>(i, m, observer, nullptr);
  }

  /// Effects: asks the hook, with clipped ranges; stops at the first yes if FirstYes, else asks all and ORs (O5).
  template <bool FirstYes, observe::observer O>
  bool ask_young(young_hook<Key> hook, range_type r, O& observer) noexcept {
    bool young = false;
    std::uint64_t calls = 0;
    for_present(r, [&](entry& e) {
      const auto ask = e.owner->operations_->*hook;
      if (ask == nullptr) return true;
      ++calls;
      young |= ask(e.owner->client_, r.clipped_to(e.range));
      return !(FirstYes && young);
    });
    observer.note(observe::occurrence::callback, calls);
    return young;
  }

  /// Effects: marks the pages that somebody has accessed. Everybody is asked about the pages that it has a byte of: for
  /// all at once, or, if it cannot answer so, for each, clipped.
  template <observe::observer O>
  void ask_young_pages(basic_young_batch<Key>& batch, O& observer) noexcept
    requires paged_key<Key>
  {
    std::uint64_t calls = 0;
    for_present(batch.range(), [&](entry& e) {
      const operations<Key>& o = *e.owner->operations_;
      basic_young_batch<Key> mine = batch.part(e.range);
      if (o.young_pages != nullptr) {
        ++calls;
        o.young_pages(e.owner->client_, mine);
        return true;
      }
      const auto ask = batch.clear() ? o.clear_young : o.test_young;
      if (ask == nullptr) return true;
      mark_page_by_page(mine, [&](range_type page) {
        ++calls;
        return ask(e.owner->client_, page.clipped_to(e.range));
      });
      return true;
    });
    observer.note(observe::occurrence::callback, calls);
  }

  /// Effects: tells everybody in the range what its translation is now, each its part. Whoever covers an address now
  /// is told: after a split the upper one, though only the lower one got the start.
  template <observe::observer O>
  void change_entry(const basic_entry_change<Key>& change, O& observer) noexcept
    requires paged_key<Key>
  {
    std::uint64_t calls = 0;
    for_present(change.range, [&](entry& e) {
      const auto tell = e.owner->operations_->change_entry;
      if (tell == nullptr) return true;
      ++calls;
      tell(e.owner->client_, clipped(change, e.range));
      return true;
    });
    observer.note(observe::occurrence::callback, calls);
  }

  /// Effects: tells everybody in the range to flush what walks the primary's tables (O4). Progress: wait-free.
  template <observe::observer O>
  void invalidate_secondary_tlbs(range_type r, O& observer) noexcept {
    std::uint64_t calls = 0;
    for_present(r, [&](entry& e) {
      const auto flush = e.owner->operations_->invalidate_secondary_tlbs;
      if (flush == nullptr) return true;
      ++calls;
      flush(e.owner->client_, r.clipped_to(e.range));
      return true;
    });
    observer.note(observe::occurrence::callback, calls);
  }

  /// Effects: the space is released: calls the release hook of every interval that was not told yet.
  void release_all() noexcept {
    const std::uint64_t g = context_.clock.read();
    index_.walk(0, ~std::uint64_t{0}, [&](entry& e) {
      if (e.hears(g, context_.clock)) release_one(*e.owner);
      return true;
    });
  }
  /// Once per registration (L4).
  static void release_one(interval& n) noexcept {
    if (n.told_release_.exchange(true, std::memory_order_acq_rel)) return;  // (id3), (id4)
    if (n.operations_->release != nullptr) n.operations_->release(n.client_);
  }

  /// Calls f(interval) for those that overlap r and are registered, by class and address, until it says false.
  /// Context: f may do what a callback may do.
  template <class F>
  void for_each(range_type r, F&& f) noexcept {
    const read_section s(context_.domain);
    for_present(r, [&](entry& e) { return static_cast<bool>(f(*e.owner)); });
  }

 private:
  // --- Walks. -----------------------------------------------------------------------------------------------------

  template <class F>
  [[gnu::always_inline]] void for_overlapping(const range_type& r, std::uint64_t g, F&& f) noexcept {
    index_.walk(number_of(r.first), number_of(r.last), [&](entry& e) {
      if (!e.range.overlaps(r) || !e.hears(g, context_.clock)) return true;
      return f(e);
    });
  }
  template <class F>
  [[gnu::always_inline]] void for_audience(const invalidation_type& i, std::uint64_t g, F&& f) noexcept {
    for_overlapping(i.range, g, [&](entry& e) { return !e.owner->wants(i) || f(e); });
  }
  template <class F>
  void for_present(const range_type& r, F&& f) noexcept {
    if (!r.empty()) for_overlapping(r, context_.clock.read(), f);
  }

  static bool has_start_hook(const entry& e) noexcept {
    const operations<Key>& o = *e.owner->operations_;
    return o.try_start != nullptr || o.begin != nullptr;
  }
  /// Returns: false if the client refused.
  static bool call_start(entry& e, const invalidation_type& i, pending_passes<Key>& passes) noexcept {
    const operations<Key>& o = *e.owner->operations_;
    if (o.start != nullptr && i.blockable) [[likely]] {
      o.start(e.owner->client_, clipped(i, e.range));
      return true;
    }
    if (o.try_start != nullptr) return o.try_start(e.owner->client_, clipped(i, e.range));
    if (o.begin == nullptr) return true;
    const basic_first_pass<Key> p = o.begin(e.owner->client_, clipped(i, e.range));
    if (p.is_refused()) return false;
    if (p.token() != nullptr) passes.add(*p.token(), &finish, &e);
    return true;
  }
  static void finish(void* context, basic_two_pass_token<Key>& t, const invalidation_type& i) noexcept {
    const entry& e = *static_cast<const entry*>(context);
    e.owner->operations_->finish(e.owner->client_, t, clipped(i, e.range));
  }

  /// up_to: the last one that got the start, null for everybody.
  template <bool Cancelled, observe::observer O>
  void call_ends(const invalidation_type& i, memo m, O& observer, const entry* up_to) noexcept {
    if (m.calls_nobody()) return context_.leave(m);
    std::uint64_t calls = 0;
    const auto call = [&](entry& e) {
      interval& n = *e.owner;
      // First the word: in its end hook a client may fault again.
      if (Cancelled ? n.word_.cancel() : n.word_.lower()) [[unlikely]]
        n.wake();
      if (n.operations_->end != nullptr) {
        ++calls;
        n.operations_->end(n.client_, clipped(i, e.range));
      }
      return &e != up_to;
    };
    // What was called stays linked, and hears the bracket's version as before: it is the whole audience.
    if (auto* const one = static_cast<entry*>(m.the_one()); one != nullptr) {
      call(*one);
    } else {
      for_audience(i, m.version(), call);
    }
    context_.leave(m);
    observer.note(observe::occurrence::callback, calls);
  }
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
