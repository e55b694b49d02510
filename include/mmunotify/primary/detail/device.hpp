// SPDX-License-Identifier: MIT
#pragma once

// Pages that a device has: in its own memory, or in a frame that it uses alone (Linux: device-private pages and
// device-exclusive entries of HMM).

#include <cstddef>
#include <cstdint>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/event.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/paged_memory.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// A page that belongs to a device, as its owner finds it. Stale on arrival, like a pinned page: the owner checks for
/// collisions (invalidation_window) under its own lock before it uses `data`, and lets go when a start says so. It
/// holds no reference: from its table, the page is protected by the notifier alone.
struct owned_page {
  errc error = errc::not_mapped;  ///< ok: the other members count
  bool on_device = false;         ///< in the device's memory; else in a frame that the owner has for itself
  pfn frame{};                    ///< a page of the device's, or a frame
  std::byte* data = nullptr;      ///< its 4 KiB

  constexpr explicit operator bool() const noexcept { return error == errc::ok; }
};

namespace detail {

/// Context: tables held, shared.
inline owned_page find_owned(paged_memory& memory, std::uintptr_t a, const void* owner, bool write) noexcept {
  if (!paged_memory::whole().contains(a)) return {.error = errc::bad_range};
  const area* const covering = memory.areas().find(a);
  if (covering == nullptr) return {};
  if (covering->allows < (write ? protection::read_write : protection::read)) return {.error = errc::access_denied};
  page_slot* const slot = memory.table().reach(a);
  if (slot == nullptr) return {.error = errc::no_memory};
  locked_entry entry{*slot};
  const bool on_device = entry.value.device();
  if (!on_device && !entry.value.exclusive()) return {};
  frame_pool& pool = on_device ? memory.device() : memory.frames();
  const pfn f = entry.value.frame();
  if (pool.owner(f) != owner) return {};
  if (write) entry.value = entry.value.with(page_entry::soft_dirty_bit);
  return {errc::ok, on_device, f, pool.data(f)};
}

/// The pages of r that are writable and not on loan become the owner's. Context: tables held, in a bracket.
inline void give_exclusive(paged_memory& memory, const range& r, const void* owner) noexcept {
  memory.table().for_each(r, [&](std::uintptr_t, page_slot& slot) {
    locked_entry entry{slot};
    if (!entry.value.present() || !entry.value.writable()) return;  // another thread was faster
    if (memory.frames().on_loan(entry.value.frame())) {
      memory.counters().add(counter::skipped_pinned);
      return;
    }
    memory.frames().set_owner(entry.value.frame(), owner);
    entry.value = entry.value.without(page_entry::present_bit | page_entry::writable_bit | page_entry::young_bit)
                      .with(page_entry::exclusive_bit);
    memory.counters().add(counter::made_exclusive);
  });
}

/// Effects: all pages of r are faulted in for writing, then made exclusive in one bracket. Errors: as pin.
/// Context: tables held, shared.
template <class Core>
errc make_exclusive(Core& core, const range& r, const void* owner) noexcept {
  if (const errc e = core.memory.areas().allows(r, protection::read_write); e != errc::ok) return e;
  for (std::uintptr_t page = r.first; page != r.last; page += page_size) {
    const errc e = core.with_page(page, true, [](pfn, bool) { return errc::ok; });
    if (e != errc::ok) return e;
  }
  core.split_touching(r);
  core.change(r, event::exclusive, owner, [&](withdrawn_pages&) { give_exclusive(core.memory, r, owner); });
  return errc::ok;
}

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
