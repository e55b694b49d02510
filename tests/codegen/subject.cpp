// SPDX-License-Identifier: MIT

// Functions whose object code is compared, see object_code.test.cpp. Compiled as a user would: optimised, nothing else.
// Each body comes bare, and with a hook in each form.

#include <cstdint>
#include <shared_mutex>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/notifier/keyed.hpp>

using mmunotify::event;
using under = mmunotify::address_space<mmunotify::arming::under<std::shared_mutex>>;
using keyed = mmunotify::address_space<mmunotify::arming::keyed<std::shared_mutex>>;
using tracked = mmunotify::address_space<mmunotify::arming::tracked>;
using none = mmunotify::address_space<mmunotify::disabled>;

extern "C" {

// One store: the smallest change there is.
void store_bare(std::uintptr_t* entry) { *entry = 0; }
void store_disabled(std::uintptr_t* entry, none& space, std::uintptr_t a) {
  const auto inv = space.invalidate({a, a + 4096}, event::unmap);
  *entry = 0;
}
void store_disabled_closure(std::uintptr_t* entry, none& space, std::uintptr_t a) {
  space.bracketed({a, a + 4096}, event::unmap, [=] { *entry = 0; });
}
void store_under(std::uintptr_t* entry, under& space, std::uintptr_t a) {
  const auto inv = space.invalidate({a, a + 4096}, event::unmap);
  *entry = 0;
}
void store_under_page(std::uintptr_t* entry, under& space, std::uintptr_t a) {
  const auto inv = space.invalidate_page(a, event::clear);
  *entry = 0;
}
void store_under_plain(std::uintptr_t* entry, under& space, std::uintptr_t a) {
  const auto ticket = space.invalidate_range_start({{a, a + 4096}, event::unmap, nullptr, true});
  *entry = 0;
  space.invalidate_range_end(ticket);
}
void store_under_closure(std::uintptr_t* entry, under& space, std::uintptr_t a) {
  space.bracketed({a, a + 4096}, event::unmap, [=] { *entry = 0; });
}
void store_keyed(std::uintptr_t* entry, keyed& space, std::uintptr_t a) {
  const auto inv = space.invalidate({a, a + 4096}, event::unmap);
  *entry = 0;
}
void store_keyed_plain(std::uintptr_t* entry, keyed& space, std::uintptr_t a) {
  const auto ticket = space.invalidate_range_start({{a, a + 4096}, event::unmap, nullptr, true});
  *entry = 0;
  space.invalidate_range_end(ticket);
}
void store_keyed_closure(std::uintptr_t* entry, keyed& space, std::uintptr_t a) {
  space.bracketed({a, a + 4096}, event::unmap, [=] { *entry = 0; });
}
void store_tracked(std::uintptr_t* entry, tracked& space, std::uintptr_t a) {
  const auto inv = space.invalidate({a, a + 4096}, event::unmap);
  *entry = 0;
}

// A loop over entries, the body that uses the range as well.
void loop_bare(std::uintptr_t* table, std::uintptr_t first, std::uintptr_t last) {
  for (std::uintptr_t a = first; a < last; a += 4096) table[(a >> 12) & 511] &= ~std::uintptr_t{1};
}
void loop_disabled(std::uintptr_t* table, std::uintptr_t first, std::uintptr_t last, none& space) {
  const auto inv = space.invalidate({first, last}, event::protection_vma);
  for (std::uintptr_t a = first; a < last; a += 4096) table[(a >> 12) & 511] &= ~std::uintptr_t{1};
}

// A loop over a whole table, in a closure of two words: what fits in registers never sees the stack.
void table_bare(std::uintptr_t* table, std::uintptr_t mask) {
  for (std::uintptr_t i = 0; i < 512; ++i) table[i * 8] &= mask;
}
void table_under_closure(std::uintptr_t* table, std::uintptr_t mask, under& space) {
  space.bracketed({0, 512 * 4096}, event::protection_vma, [=] {
    for (std::uintptr_t i = 0; i < 512; ++i) table[i * 8] &= mask;
  });
}
void table_keyed_closure(std::uintptr_t* table, std::uintptr_t mask, keyed& space) {
  space.bracketed({0, 512 * 4096}, event::protection_vma, [=] {
    for (std::uintptr_t i = 0; i < 512; ++i) table[i * 8] &= mask;
  });
}
void table_keyed(std::uintptr_t* table, std::uintptr_t mask, keyed& space) {
  const auto inv = space.invalidate({0, 512 * 4096}, event::protection_vma);
  for (std::uintptr_t i = 0; i < 512; ++i) table[i * 8] &= mask;
}

// Young hooks.
bool young_bare() { return false; }
bool young_disabled(none& space, std::uintptr_t a) { return space.clear_flush_young({a, a + 4096}); }
bool young_keyed(keyed& space, std::uintptr_t a) { return space.test_young({a, a + 4096}); }
bool young_under(under& space, std::uintptr_t a) { return space.test_young({a, a + 4096}); }

// For the subject that is loaded: whether its code is patched, and a space that arms the process.
bool patched() { return mmunotify::key_patching().live; }
bool arm() { return mmunotify::arming::any_armed::enable() == mmunotify::errc::ok; }
void disarm() { mmunotify::arming::any_armed::disable(); }

// What must not pass: a hook with a locked instruction, and one with a call.
void store_locked(std::uintptr_t* entry, std::uintptr_t* count) {
  __atomic_fetch_add(count, 1, __ATOMIC_SEQ_CST);
  *entry = 0;
}
[[gnu::weak]] void somewhere();
void store_calling(std::uintptr_t* entry) {
  somewhere();
  *entry = 0;
}
}
