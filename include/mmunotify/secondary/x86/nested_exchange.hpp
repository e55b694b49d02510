// SPDX-License-Identifier: MIT
#pragma once

// A and D bits of a nested guest's page table that lies in one of L1's shadowed tables.
//
// Such a frame is writable for nobody, and what the processor writes there must be followed like any other write to a
// guest table. L0 knows the entry and its new value, so it does it: in the order of a fault (fault.hpp), walk, pin,
// lock, look again, compare-exchange; then the shadows of what was written go.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/nested_modes.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// A compare-exchange of one entry, of 4 or 8 bytes; size 0: none.
struct tracked_exchange {
  std::uint64_t expected = 0, desired = 0;
  std::size_t size = 0;
};

/// Effects: the entry has the desired value if it had the expected one.
template <class Word>
bool exchange_word(std::byte* at, const tracked_exchange& x) noexcept {
  auto expected = static_cast<Word>(x.expected);
  return std::atomic_ref<Word>(*reinterpret_cast<Word*>(at))
      .compare_exchange_strong(expected, static_cast<Word>(x.desired), std::memory_order_relaxed);
}

/// Effects: if L1's tables let L2 write there: the exchange, in the page that is there now. Returns: done, whether the
/// entry had the expected value or not (who walks again sees); again; or why not, as the fault path.
/// Context: as a fault.
template <walked_mode Mode, frame_provider Provider>
outcome exchange_tracked(backing<Provider> memory, shadow_tables& tables, const walk_context& context, l2_gpa where,
                         const tracked_exchange& x) noexcept {
  walked_tables<Provider> walked(memory);
  const walk_result walk = guest_walker<Mode>(context).walk(walked, {where.value}, access::write);
  if (walk.status == walk_status::page_fault) return {.what = outcome::page_fault, .code = walk.code};
  if (walk.status == walk_status::general_protection) return {.what = outcome::general_protection};
  if (!walk) return outcome_of(walked.error(), walk.entry(walk.end_level).where);
  pinned_frame<Provider> page;
  const gfn frame = frame_of(walk.address);
  if (const errc e = page.pin(memory, frame, true); e != errc::ok) return outcome_of(e, walk.address);
  const std::lock_guard locked{memory.lock};
  if (tables.released()) return {.what = outcome::released};
  if (!page.stands_locked(memory)) return {.what = outcome::again};
  for (unsigned level = Mode::levels; level >= walk.end_level; --level) {
    if (!walked.unchanged_locked(walk.entry(level))) return {.what = outcome::again};
  }
  const auto offset = static_cast<unsigned>(walk.address.offset());
  std::byte* const at = page.data() + offset;
  if (!(x.size == 4 ? exchange_word<std::uint32_t>(at, x) : exchange_word<std::uint64_t>(at, x))) return {};
  tables.slots().find(frame)->mark_dirty(frame);
  static_cast<void>(tables.zap_written(frame, offset, offset + static_cast<unsigned>(x.size) - 1));
  tables.commit();
  return {};
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
