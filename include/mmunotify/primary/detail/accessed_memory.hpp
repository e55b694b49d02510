// SPDX-License-Identifier: MIT
#pragma once

// The half of reference_mmu that leaves areas as they are: what secondaries use, accesses by the primary, young bits.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <span>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/base/young_batch.hpp>
#include <mmunotify/primary/detail/bracketed_memory.hpp>
#include <mmunotify/primary/frame_access.hpp>
#include <mmunotify/primary/paged_memory.hpp>
#include <mmunotify/primary/physical_memory.hpp>
#include <mmunotify/primary/statistics.hpp>
#include <mmunotify/primary/tables_lock.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// Whether anybody, primary or secondary, has accessed a range.
struct young_answer {
  errc error = errc::ok;
  bool young = false;

  constexpr explicit operator bool() const noexcept { return young; }
};

/// Whether anybody may have written to a range since clear_soft_dirty.
struct soft_dirty_answer {
  errc error = errc::ok;
  bool dirty = false;

  constexpr explicit operator bool() const noexcept { return dirty; }
};

namespace detail {

template <notifying_space Space>
class accessed_memory {
 public:
  using space_type = Space;

  accessed_memory(const accessed_memory&) = delete;
  accessed_memory& operator=(const accessed_memory&) = delete;

  // --- For secondaries, and who registers them. ---------------------------------------------------------------------

  /// The address space whose brackets this primary runs.
  Space& space() noexcept { return core_.space; }
  /// The lock under which it runs them. Calls of this class must not be made while it is held.
  std::shared_mutex& tables() noexcept { return lock_.mutex(); }
  /// tables(), exclusive: the witness that register_subscriber wants. Unlike a plain lock it is not starved by faults.
  [[nodiscard]] std::unique_lock<std::shared_mutex> lock_tables() noexcept { return lock_.witness(); }

  /// Effects: faults the page in if need be, takes one reference, marks the page young. For a write the page is copied
  /// if it is shared, and is soft-dirty then; a page that a device has comes back. These run brackets of their own.
  /// Returns: a lease; `writable` says that writes need no fault now.
  /// Errors: not_mapped, access_denied, no_memory, released, bad_range (beyond the address limit), would_deadlock.
  /// Progress: blocking. Context: may sleep; without the secondary's own lock; not in a callback.
  frame_lease pin(hva a, bool write) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in); e != errc::ok) return {.error = e};
    frame_lease lease;
    lease.error = core_.with_page(static_cast<std::uintptr_t>(a.value), write, [&](pfn f, bool writable) {
      memory_.frames().pin(f);
      lease.frame = f;
      lease.writable = writable;
      return errc::ok;
    });
    if (lease) memory_.counters().add(counter::pins);
    return lease;
  }

  /// Effects: takes one reference of a page that is there, for reading, and changes nothing: it faults nothing in,
  /// waits for nobody, and the page is not young for it. Returns: as pin(). Errors: again (it is not there, or somebody
  /// changes it or the areas); bad_range, not_mapped, access_denied, released, would_deadlock. Progress: lock-free.
  frame_lease try_pin(hva a) noexcept {
    const tables_lock::try_shared in{lock_};
    if (const errc e = core_.admitted(in); e != errc::ok) return {.error = e};
    const auto at = static_cast<std::uintptr_t>(a.value);
    if (!memory_.whole().contains(at)) return {.error = errc::bad_range};
    const area* const covering = memory_.areas().find(at);
    if (covering == nullptr) return {.error = errc::not_mapped};
    if (covering->allows < protection::read) return {.error = errc::access_denied};
    page_slot* const slot = memory_.table().find(at);
    if (slot == nullptr) return {.error = errc::again};
    const locked_entry entry{*slot, std::try_to_lock};
    if (!entry || !entry.value.present()) return {.error = errc::again};
    memory_.frames().pin(entry.value.frame());
    memory_.counters().add(counter::pins);
    return {errc::ok, entry.value.frame(), entry.value.writable()};
  }

  /// Returns: log2 of the size of the mapping that a's page is part of: 21 of a huge page, else 12. It may be stale on
  /// arrival: a huge page that ends is bracketed as a whole, first. Progress: as pin(). Context: as pin().
  unsigned mapping_shift(hva a) noexcept {
    const tables_lock::shared in{lock_};
    const auto at = static_cast<std::uintptr_t>(a.value);
    const bool known = core_.admitted(in) == errc::ok && memory_.whole().contains(at);
    return known && memory_.table().huge(at) ? 21 : page_shift;
  }

  /// Effects: gives one reference back. Preconditions: pin() or try_pin() of this object lent it (checked as far as a
  /// count can).
  /// Progress: takes the pool's short lock when the frame is freed. Context: any, callbacks and release hooks included.
  void unpin(pfn f) noexcept {
    if (!memory_.frames().unpin(f)) {
      detail::violated("K4", "reference_mmu::unpin", "frame %llu is not on loan",
                       static_cast<unsigned long long>(f.value));
      return;
    }
    memory_.counters().add(counter::unpins);
  }

  /// The frame's 4 KiB; word_at, load_bytes and store_bytes access them. Stable while the frame is pinned, or mapped
  /// under the notifier's protection. Preconditions: f came from pin(). Progress: wait-free. Context: any.
  std::byte* data(pfn f) noexcept { return memory_.frames().data(f); }

  // --- Young bits. Context: as pin(). They run beside each other, and beside faults.
  // ----------------------------------

  /// Effects: clears "accessed" for r here and in every secondary, without a flush there.
  /// Returns: whether any page was young anywhere. Errors: bad_range, not_mapped, released, would_deadlock.
  young_answer clear_young(range r) noexcept {
    return ask_young(r, true, [&] { return core_.space.clear_young(r); });
  }
  /// The same, and secondaries flush.
  young_answer clear_flush_young(range r) noexcept {
    return ask_young(r, true, [&] { return core_.space.clear_flush_young(r); });
  }
  /// Returns: whether any page of r is young anywhere; secondaries are asked only if none is here. Errors: as above.
  young_answer test_young(range r) noexcept {
    return ask_young(r, false, [&] { return core_.space.test_young(r); });
  }

  /// Effects: sets the bits of the pages of r that are young anywhere, and leaves the others: bit n % 64 of word n / 64
  /// for page n. With `clear`, nobody has accessed them afterwards, without a flush. Errors: bad_range (also if there
  /// are not enough bits), not_mapped, released, would_deadlock.
  errc young_pages(range r, std::span<std::uint64_t> bits, bool clear) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return e;
    if (!young_batch::fits(r, bits)) return errc::bad_range;
    if (!memory_.areas().overlaps(r)) return errc::not_mapped;
    young_batch batch{r, bits, clear};
    memory_.each_young(r, clear, [&](std::uintptr_t page) { batch.mark(page); });
    return core_.space.young_pages(r, bits, clear);
  }

  /// Returns: whether somebody may have written to r since clear_soft_dirty: the processor, a secondary, or a device;
  /// or r was mapped or moved since. Errors: bad_range, not_mapped (nothing in r is), released, would_deadlock.
  soft_dirty_answer soft_dirty(range r) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return {e, false};
    if (!memory_.areas().overlaps(r)) return {errc::not_mapped, false};
    return {errc::ok, memory_.soft_dirty(r)};
  }

  // --- Access by the primary itself. Each faults pages in, as pin(), and marks them young. Context: as pin().
  // ---------

  /// Effects: copies out.size() bytes from a. Each aligned 8-byte word is one that was there; nothing orders words.
  /// Errors: bad_range (wraps, or beyond the address limit), not_mapped, access_denied, no_memory, released,
  /// would_deadlock; `out` is then untouched.
  errc read(std::uintptr_t a, std::span<std::byte> out) noexcept {
    return transfer(a, out.size(), false, [&](std::byte* frame, std::size_t done, std::size_t n) {
      load_bytes(out.data() + done, frame, n);
    });
  }

  /// Effects: copies in.size() bytes to a. Errors: as read(); nothing is written then.
  errc write(std::uintptr_t a, std::span<const std::byte> in) noexcept {
    return transfer(a, in.size(), true, [&](std::byte* frame, std::size_t done, std::size_t n) {
      store_bytes(frame, in.data() + done, n);
    });
  }

  /// Effects: one atomic acquire load of 4 or 8 bytes. Errors: as read(); bad_range also if a is not aligned.
  template <frame_word Word>
  errc load(hva a, Word& value) noexcept {
    return with_word<Word>(a, false, [&](std::atomic_ref<Word> word) {
      // (rm1) acquire pairs with (rm2).
      value = word.load(std::memory_order_acquire);
      return errc::ok;
    });
  }

  /// Effects: if the word at a is `expected`, it becomes `desired`, atomically, in the frame that is the page at that
  /// moment: no migration, swap or unmap comes between. Otherwise `expected` becomes what was found.
  /// Errors: again (it was not `expected`); else as load(), and access_denied if the area does not allow writes.
  template <frame_word Word>
  errc compare_exchange(hva a, Word& expected, Word desired) noexcept {
    return with_word<Word>(a, true, [&](std::atomic_ref<Word> word) {
      // (rm2) release pairs with (rm1), acquire with (rm2) of others: guest tables are built and linked with these.
      return word.compare_exchange_strong(expected, desired, std::memory_order_acq_rel, std::memory_order_acquire)
                 ? errc::ok
                 : errc::again;
    });
  }

 protected:
  using core = bracketed_memory<Space>;

  accessed_memory(std::size_t frames, std::size_t swap_slots, std::size_t device_pages) noexcept
      : own_(std::in_place, frames, swap_slots, device_pages), core_(*own_) {}
  explicit accessed_memory(physical_memory& shared) noexcept : core_(shared) {}
  ~accessed_memory() = default;

 private:
  template <class Ask>
  young_answer ask_young(const range& r, bool clear, Ask ask) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in, r); e != errc::ok) return {e, false};
    if (!memory_.areas().overlaps(r)) return {errc::not_mapped, false};
    const bool here = memory_.young(r, clear);
    const bool elsewhere = (clear || !here) && ask();  // clearing asks everybody
    return {errc::ok, here || elsewhere};
  }

  template <frame_word Word, class Function>
  errc with_word(hva a, bool write, Function f) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in); e != errc::ok) return e;
    if (a.value % sizeof(Word) != 0) return errc::bad_range;
    return core_.with_page(static_cast<std::uintptr_t>(a.value), write, [&](pfn frame, bool) {
      return f(word_at<Word>(memory_.frames().data(frame) + a.offset()));
    });
  }

  template <class Copy>
  errc transfer(std::uintptr_t a, std::size_t n, bool write, Copy copy) noexcept {
    const tables_lock::shared in{lock_};
    if (const errc e = core_.admitted(in); e != errc::ok) return e;
    const auto pin_page = [&](std::uintptr_t page, pfn& pinned) {
      return core_.with_page(page, write, [&](pfn f, bool) {
        memory_.frames().pin(f);
        pinned = f;
        return errc::ok;
      });
    };
    return memory_.transfer(a, n, write, pin_page, copy);
  }

  std::optional<physical_memory> own_;  ///< empty: shared with others

 protected:
  core core_;
  tables_lock& lock_ = core_.lock;
  paged_memory& memory_ = core_.memory;
};

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
