// SPDX-License-Identifier: MIT
#pragma once

// Following the guest: what it does to its page tables and to the registers that lead to them.
//
//   guest_write   a write to a shadowed table, which faults and is emulated: the shadows of what it touches go at once
//   synchronise   the guest has flushed its TLB: tables that it wrote freely (unsync.hpp) are compared with their
//                 shadows
//   invalidate    the same for one address
//   load_pdptes   it has written a control register, and the PDPTEs of PAE paging are loaded
//
// All of it in the order of a fault (fault.hpp): pin first, which may sleep; then look again under the MMU lock whether
// what was pinned is what is there now.

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <thread>
#include <type_traits>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/nested_modes.hpp>
#include <mmunotify/secondary/x86/outcome.hpp>
#include <mmunotify/secondary/x86/shadow_modes.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>
#include <mmunotify/secondary/x86/tlb.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// What the MMU knows of a vCPU. Context: its owner thread, but for the port.
struct vcpu_state {
  walk_context context{};
  paging mode = paging::none;  ///< means something to an MMU for every_mode alone
  vcpu_port port{};
  fault_stock stock{};
};

template <frame_provider Provider, shadowed_modes Modes>
class table_follower {
 public:
  table_follower(backing<Provider> b, shadow_tables& tables, mmu_counters& counters) noexcept
      : backing_(b), tables_(tables), counters_(counters) {}

  /// Effects: writes guest memory for the guest, each aligned 8-byte word in one piece; where it hits a shadowed table,
  /// exactly the shadows of the entries that it touches are gone, on every vCPU, when it returns. (K5)
  /// Errors: bad_range (wraps), not_mapped (no slot, or the host has nothing), access_denied (read-only), released,
  /// no_memory; pages before the one that failed are written. Context: as fault.
  errc guest_write(gpa where, std::span<const std::byte> bytes) noexcept {
    if (bytes.size() > UINT64_MAX - where.value) return errc::bad_range;
    while (!bytes.empty()) {
      const auto room = static_cast<std::size_t>(page_size - where.offset());
      const auto piece = bytes.first(bytes.size() < room ? bytes.size() : room);
      const errc e = write_in_page(where, piece);
      if (e == errc::again) {
        counters_.add(mmu_counters::retries);
        std::this_thread::yield();
        continue;
      }
      if (e != errc::ok) return e;
      bytes = bytes.subspan(piece.size());
      where = where + piece.size();
    }
    return errc::ok;
  }

  /// Effects: tables that the guest had written freely when it is called are in step with their shadows: the guest has
  /// flushed its TLB. Context: as fault.
  void synchronise(const vcpu_state& v) noexcept {
    std::array<gfn, sync_batch> frames;
    for (std::size_t left = tables_.unsync_count(); left > 0; left -= left < sync_batch ? left : sync_batch) {
      std::size_t n = 0;
      {
        const std::lock_guard locked{tables_.lock()};
        n = tables_.unsync_frames(frames);
      }
      if (n == 0) return;
      in_mode<Modes>(v.mode, [&]<class Mode>(std::type_identity<Mode>) noexcept {
        synchronise<Mode>(v.context, std::span(frames).first(n));
      });
    }
  }

  /// Effects: the guest has flushed this address alone: its entry, if it may be out of step, is gone.
  /// Context: the vCPU's thread, outside guest mode, without the MMU lock.
  void invalidate(vcpu_state& v, gva a) noexcept {
    if (tables_.unsync_count() == 0) return;
    const std::lock_guard locked{tables_.lock()};
    for (shadow_page* p = v.port.root(); p != nullptr;) {
      const unsigned i = shadow_index(a, p->role.level());
      if (p->role.level() == 1) {
        if (p->unsync) tables_.drop(*p, i);
        break;
      }
      const shadow_entry e = p->load(i);
      p = e.present() && !e.is_leaf() ? e.child() : nullptr;
    }
    tables_.commit();
  }

  /// Effects: what a write of the context's CR3 does in PAE paging. Returns: ok, or bad_range: a reserved bit, #GP; or
  /// why they cannot be read; the context is as before then. Context: as a fault.
  errc load_pdptes(walk_context& c) noexcept {
    while (true) {
      loading memory{walked_tables<Provider>(backing_), {}};
      walk_context loaded = c;
      const pdpte_load result = x86::load_pdptes(memory, loaded);
      if (result == pdpte_load::memory_error) {
        if (memory.tables.error() != errc::again) return memory.tables.error();
      } else if (stands(memory, pae::root(c.cr3))) {
        if (result == pdpte_load::general_protection) return errc::bad_range;
        c = loaded;
        return errc::ok;
      }
      counters_.add(mmu_counters::retries);
      std::this_thread::yield();
    }
  }

 private:
  /// Keeps what it reads, so that it can be compared under the lock.
  struct loading {
    walked_tables<Provider> tables;
    std::array<std::uint64_t, 4> values{};

    bool read_entry(gpa where, std::uint64_t& value) noexcept {
      const bool ok = tables.read_entry(where, value);
      values[where.value / 8 % 4] = value;
      return ok;
    }
  };

  /// The four registers were all there at one moment.
  bool stands(loading& memory, gpa first) noexcept {
    const std::lock_guard locked{tables_.lock()};
    for (std::size_t i = 0; i < memory.values.size(); ++i) {
      if (!memory.tables.unchanged_locked({first + 8 * i, memory.values[i]})) return false;
    }
    return true;
  }

  static constexpr std::size_t sync_batch = 4;

  template <walked_mode Mode>
  void synchronise(const walk_context& c, std::span<const gfn> frames) noexcept {
    std::array<pinned_frame<Provider>, sync_batch> pins;
    for (std::size_t i = 0; i < frames.size(); ++i) {
      if (pins[i].pin(backing_, frames[i], false) != errc::ok) pins[i].reset();
    }
    const std::lock_guard locked{tables_.lock()};
    for (const gfn f : frames) tables_.protect_unsync(f);
    for (std::size_t i = 0; i < frames.size(); ++i) {
      const bool readable = pins[i] && pins[i].stands_locked(backing_);
      tables_.settle(frames[i], [&](const shadow_page& p, unsigned n, shadow_entry e) noexcept -> bool {
        if (p.role.nested() != nested_tables::none)
          return readable && nested_follows(p, n, e, entry_of<long_mode_4>(pins[i], p.role, n));
        if constexpr (Mode::levels == 0) {
          return false;
        } else {
          if (!readable || !p.role.read_like(shadow_layout<Mode>::root_role(c))) return false;
          return follows<Mode>(c, p, n, e, entry_of<Mode>(pins[i], p.role, n));
        }
      });
    }
  }

  /// The guest's entry behind entry n of a shadow page of level 1.
  template <paging_mode Mode>
  static typename Mode::entry_type entry_of(const pinned_frame<Provider>& table, page_role role, unsigned n) noexcept {
    using entry_type = typename Mode::entry_type;
    entry_type* const first = reinterpret_cast<entry_type*>(table.data());
    const std::atomic_ref<entry_type> word(first[shadow_layout<Mode>::guest_index(role, n)]);
    return word.load(std::memory_order_acquire);  // (bk2) pairs with (bk1)
  }

  /// Whether the guest's entry, as it is now, still allows all that the leaf does.
  template <paging_mode Mode>
  static bool follows(const walk_context& c, const shadow_page& p, unsigned n, shadow_entry leaf,
                      typename Mode::entry_type entry) noexcept {
    if constexpr (detail::mutated(detail::mutation::stale_sync)) return true;
    const std::uint64_t needed = pte::present | pte::accessed | (leaf.may_write() ? pte::dirty : 0);
    if ((entry & (Mode::reserved(1, c.format()) | needed)) != needed) return false;
    if (frame_of(Mode::frame(entry, 1)) != p.leaf_frame(n)) return false;
    if (Mode::has_keys && (entry & pte::protection_key) >> pte::protection_key_shift != leaf.key()) return false;
    const rights granted = rights_in(Mode::grants(entry, 1)) & p.role.access();
    if (leaf.may_write() && !granted.writable()) return false;
    return covers(granted, leaf.allows()) && leaf.guest_user() == granted.user();
  }

  errc write_in_page(gpa where, std::span<const std::byte> bytes) noexcept {
    if (tables_.released()) return errc::released;
    pinned_frame<Provider> page;
    if (const errc e = page.pin(backing_, frame_of(where), true); e != errc::ok) return e;
    const std::lock_guard locked{tables_.lock()};
    if (tables_.released()) return errc::released;
    if (!page.stands_locked(backing_)) return errc::again;
    const auto offset = static_cast<std::size_t>(where.offset());
    store_in_words(page.data(), offset, bytes);
    tables_.slots().find(page.frame())->mark_dirty(page.frame());
    const auto first = static_cast<unsigned>(offset), last = static_cast<unsigned>(offset + bytes.size() - 1);
    static_cast<void>(tables_.zap_written(page.frame(), first, last));
    tables_.commit();
    return errc::ok;
  }

  backing<Provider> backing_;
  shadow_tables& tables_;
  mmu_counters& counters_;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
