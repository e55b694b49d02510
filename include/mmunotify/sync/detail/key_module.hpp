// SPDX-License-Identifier: MIT
#pragma once

// This module's end of static keys, and how the modules of a process find each other.
//
// Modules share one registry, whatever their visibility, their compiler, and the scope they were loaded into. No symbol
// can do that: hidden ones, those of dlopen(RTLD_LOCAL) and those of an executable that exports nothing are not found.
// So each module carries an ELF note that says where its key_module lies, and dl_iterate_phdr(3), which sees every
// module, finds the notes. Who comes first makes the registry, in memory that no module owns.
//
// A module joins in an initialiser of priority 101, before its others, and leaves in the destructor of the same object,
// after its others. One that has no site does not take part.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include <elf.h>
#include <link.h>
#include <sys/mman.h>

#include <mmunotify/config.hpp>
#include <mmunotify/sync/detail/key_registry.hpp>
#include <mmunotify/sync/detail/key_site.hpp>
#include <mmunotify/sync/linux/text.hpp>

// Made by the linker around the section of this name, per module because they are hidden.
extern "C" {
// NOLINTBEGIN(bugprone-reserved-identifier): the linker's names.
[[gnu::visibility("hidden")]] extern const mmunotify::detail::key_entry __start_mmunotify_sites[];
[[gnu::visibility("hidden")]] extern const mmunotify::detail::key_entry __stop_mmunotify_sites[];
// NOLINTEND(bugprone-reserved-identifier)
}

MMUNOTIFY_BEGIN_NAMESPACE
namespace detail {

using process_keys = key_registry<linux_text>;

/// Changes when the layout of key_module, key_copy or key_registry does: modules of one process must agree on it.
inline constexpr std::uint32_t key_layout = 1;

/// The key whose one site is the module's own, to try patching on. It counts as on, so that nobody else touches it.
[[gnu::visibility("hidden")]] inline constinit key_copy probe_copy{"mmunotify.probe", {1}};

/// One site of probe_copy. Its entry also makes sure that the module has a table.
[[gnu::noinline, gnu::visibility("hidden")]] inline bool run_probe() { return site_jumps<&probe_copy>(); }

[[gnu::visibility("hidden")]] inline constinit key_module this_module{__start_mmunotify_sites, __stop_mmunotify_sites,
                                                                      &run_probe, &probe_copy};

inline constexpr char key_note_name[] = "mmunotify";

/// What the linker keeps of a note: where this_module is, from here.
struct key_note {
  std::int32_t distance;

  key_module& module() const noexcept {
    return *reinterpret_cast<key_module*>(reinterpret_cast<std::uintptr_t>(this) +
                                          static_cast<std::uintptr_t>(std::intptr_t{distance}));
  }
};

/// Calls f(module) for the key modules among the notes of one segment. Returns: true as soon as f did.
template <class F>
bool for_each_note(const std::byte* at, std::size_t size, F& f) noexcept {
  const std::byte* const end = at + size;
  const auto padded = [](std::size_t n) { return (n + 3) & ~std::size_t{3}; };
  while (static_cast<std::size_t>(end - at) >= sizeof(ElfW(Nhdr))) {
    ElfW(Nhdr) head;
    std::memcpy(&head, at, sizeof head);
    const std::byte* const name = at + sizeof head;
    const std::byte* const content = name + padded(head.n_namesz);
    if (static_cast<std::size_t>(end - name) < padded(head.n_namesz) + padded(head.n_descsz)) return false;
    if (head.n_type == key_layout && head.n_namesz == sizeof key_note_name && head.n_descsz == sizeof(key_note) &&
        std::memcmp(name, key_note_name, sizeof key_note_name) == 0 &&
        f(reinterpret_cast<const key_note*>(content)->module())) {
      return true;
    }
    at = content + padded(head.n_descsz);
  }
  return false;
}

/// Calls f(module) for the key modules of the process, until it returns true. The loader keeps them while it does.
template <class F>
void for_each_module(F f) noexcept {
  ::dl_iterate_phdr(
      [](dl_phdr_info* object, std::size_t, void* p) -> int {
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const auto& segment = object->dlpi_phdr[i];
          if (segment.p_type != PT_NOTE || segment.p_align > 4) continue;
          const auto* const at = reinterpret_cast<const std::byte*>(object->dlpi_addr + segment.p_vaddr);
          if (for_each_note(at, segment.p_memsz, *static_cast<F*>(p))) return 1;
        }
        return 0;
      },
      &f);
}

/// Memory of nobody's, so that any module may be unloaded; never given back. Null if there is none.
inline void* make_registry() noexcept {
  void* const page = ::mmap(nullptr, sizeof(process_keys), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return page == MAP_FAILED ? nullptr : new (page) process_keys;
}

/// The registry that all modules of the process share. Null if memory is exhausted.
[[gnu::visibility("hidden")]] MMUNOTIFY_COLD inline process_keys* registry_of_process() noexcept {
  // The note itself, in this function so that it is in the module exactly if it is needed.
  asm volatile(
      ".pushsection .note.mmunotify,\"a?\",@note\n\t"
      ".balign 4\n\t"
      ".long 10, 4, %c0\n\t"
      ".asciz \"mmunotify\"\n\t"
      ".balign 4\n\t"
      ".long %c1 - .\n\t"
      ".popsection"
      :
      : "i"(key_layout), MMUNOTIFY_SYMBOL(&this_module));
  static_assert(sizeof key_note_name == 10 && sizeof(key_note) == 4);

  // (k3) acquire pairs with (k4): the registry is made.
  if (void* const known = this_module.registry.load(std::memory_order_acquire))
    return static_cast<process_keys*>(known);
  void* found = nullptr;
  for_each_module(
      [&](key_module& m) { return (found = m.registry.load(std::memory_order_acquire)) != nullptr; });  // (k3)
  if (found == nullptr) {
    void* const made = make_registry();
    // All who find nothing agree on the first module there is, and there on the first registry.
    const auto offer = [&](key_module& m) {
      // (k4) release pairs with (k3).
      if (m.registry.compare_exchange_strong(found, made, std::memory_order_acq_rel)) found = made;
      return true;
    };
    if (made != nullptr) for_each_module(offer);
    if (made != nullptr && found == nullptr) found = made;  // the note was lost: this module alone
    if (made != nullptr && found != made) ::munmap(made, sizeof(process_keys));
  }
  this_module.registry.store(found, std::memory_order_release);  // (k4)
  return static_cast<process_keys*>(found);
}

/// Joins and leaves.
class key_membership {
 public:
  key_membership() noexcept {
    // One entry is the probe's.
    if (this_module.last - this_module.first > 1) join();
  }
  ~key_membership() {
    if (void* const r = this_module.registry.load(std::memory_order_acquire)) {  // (k3)
      static_cast<process_keys*>(r)->leave(this_module);
    }
  }
  key_membership(const key_membership&) = delete;
  key_membership& operator=(const key_membership&) = delete;

  /// Returns: null if memory is exhausted.
  static process_keys* join() noexcept {
    process_keys* const r = registry_of_process();
    if (r != nullptr) r->join(this_module);
    return r;
  }
};

[[gnu::visibility("hidden"), gnu::init_priority(101)]] inline key_membership membership;

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
