// SPDX-License-Identifier: MIT
#pragma once

// The self-check: walks everything and names the first broken invariant.
//
// It trusts nothing that it checks: leaves are counted from the pages and from the reverse mappings, links from both
// ends. Guest-mode sections may go on meanwhile; they change accessed and dirty bits only.
//
// Cost: every entry of every shadow page, every frame of every slot; for tests and for hunting.

#include <cstddef>

#include <mmunotify/base/range.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/backing.hpp>
#include <mmunotify/secondary/x86/memslots.hpp>
#include <mmunotify/secondary/x86/nested_modes.hpp>
#include <mmunotify/secondary/x86/shadow_page.hpp>
#include <mmunotify/secondary/x86/shadow_tables.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

/// Context: MMU lock, for the lifetime of the object.
class table_check {
 public:
  /// window: all brackets; zapping: those that take mappings down, the others leave them read-only.
  /// nx_huge: that of the options.
  table_check(shadow_tables& tables, const mmu_window& window, const mmu_window& zapping, bool nx_huge = false) noexcept
      : tables_(tables), slots_(tables.slots_.current()), window_(window), zapping_(zapping), nx_huge_(nx_huge) {}

  /// Returns: the first broken invariant as a sentence, or nullptr. Precondition: at rest, all brackets' starts done.
  const char* run() noexcept {
    if (tables_.flush_due_) return "a flush is due although the lock is free";
    if (tables_.retired_.size() != 0) return "an unlinked page waits although no flush is due";
    for_pages(&table_check::check_page);
    if (broken_ == nullptr && pages_ != tables_.index_.size()) broken_ = "the index has lost count of its pages";
    require(unsync_ == tables_.unsync_.size(), "the list of pages that are out of step has lost count");
    if (broken_ == nullptr && tables_.released() && pages_ != 0) broken_ = "a released MMU has shadow pages";
    for (memslot* s : slots_.slots()) check_slot(*s);
    if (broken_ == nullptr && mapped_ != leaves_) broken_ = "there are more leaves than reverse mappings, or fewer";
    if (broken_ == nullptr && table_count_ != table_pages_)
      broken_ = "the slots have lost count of the shadowed tables";
    check_roots();
    return broken_;
  }

 private:
  void fail(const char* what) noexcept {
    if (broken_ == nullptr) broken_ = what;
  }
  void require(bool holds, const char* what) noexcept {
    if (!holds) fail(what);
  }

  void for_pages(void (table_check::*check)(shadow_page&)) noexcept {
    tables_.index_.for_each([&](shadow_page& p) { (this->*check)(p); });
  }

  void check_page(shadow_page& p) noexcept {
    ++pages_;
    require(tables_.index_.find(p.frame, p.role, p.generation, p.registers) == &p,
            "a shadow page is not where the index looks for it");
    require(!p.role.invalid() && p.generation <= tables_.generation_, "a page in the index is not in use");
    if (p.role.has_table()) {
      ++table_pages_;
      require(slots_.find(p.frame) != nullptr, "a shadowed guest table is in no slot");
    }
    require(!p.unsync || (p.role.level() == 1 && p.role.has_table()), "a page is out of step that must not be");
    unsync_ += p.unsync ? 1 : 0;
    unsigned present = 0, mmio = 0;
    for (unsigned i = 0; i < entries_per_table; ++i) {
      const shadow_entry e = p.load(i);
      if (!e.present()) {
        mmio += e.is_mmio() ? 1 : 0;
        require(e == shadow_entry{} || (e.is_mmio() && p.role.level() == 1), "an entry that is not present has bits");
        continue;
      }
      ++present;
      if (e.is_leaf()) {
        check_leaf(p, i, e);
      } else {
        check_link(p, i, *e.child());
      }
    }
    if (p.role.format() != table_format::long_mode) check_32_bits(p);
    require(present == p.present && mmio == p.mmio, "a shadow page has lost count of its entries");
    p.parents.for_each([&](entry_place at) { check_parent(p, at); });
  }

  void check_parent(const shadow_page& p, entry_place at) noexcept {
    const shadow_entry e = at.page->load(at.index);
    require(e.present() && !e.is_leaf() && e.child() == &p, "a parent does not link its child");
  }

  void check_link(shadow_page& p, unsigned i, shadow_page& child) noexcept {
    require(p.role.level() > 1, "a page of the lowest level has a link");
    require(tables_.index_.find(child.frame, child.role, child.generation, child.registers) == &child,
            "a linked page is not in the index");
    require(child.parents.contains({&p, i}), "a link is missing among its page's parents");
    require(child.role.level() + 1 == p.role.level(), "a link skips a level");
    require(covers(most_below(p.role), child.role.access()), "a table grants more than the ones above it");
    require(child.role.nested() == p.role.nested(), "a link leads from one guest's tables to another's");
    require(child.generation == p.generation, "a link leads to a page of another generation");
    require(child.role.direct() || !p.role.direct(), "an indirect page hangs below a direct one");
  }

  /// What holds of the pages of guests with 32-bit addresses.
  void check_32_bits(shadow_page& p) noexcept {
    const bool narrow = p.role.format() == table_format::four_byte;
    for (unsigned i = 0; i < entries_per_table; ++i) {
      const shadow_entry e = p.load(i);
      require(p.role.level() < 3 || i < 4 || !e.present(), "a page of four entries has another one");
      if (!e.present() || e.is_leaf()) continue;
      const shadow_page& child = *e.child();
      const unsigned quadrant = narrow && child.role.has_table() ? (p.role.level() == 3 ? i : i % 2) : 0;
      require(child.role.quadrant() == quadrant, "a link leads to another part of a table");
      if (!p.role.has_links_alone()) continue;
      require(narrow ? child.frame == p.frame
                     : (p.registers[i % 4] & pte::present) != 0 &&
                           child.frame == frame_of(gpa{p.registers[i % 4] & pte::address}),
              "a link leads to another directory than the registers");
    }
    if (!narrow || p.role.level() != 2 || !p.role.has_table()) return;
    for (unsigned i = 0; i < entries_per_table; i += 2) check_halves(p, i);
  }

  /// Entries i and i + 1 are one entry of the guest's.
  void check_halves(shadow_page& p, unsigned i) noexcept {
    const shadow_entry first = p.load(i), second = p.load(i + 1);
    if (!first.present() || !second.present()) return;
    const auto has_table = [](shadow_entry e) { return !e.is_leaf() && e.child()->role.has_table(); };
    const auto start = [&](shadow_entry e, unsigned n) { return e.is_leaf() ? p.leaf_frame(n) : e.child()->frame; };
    require(has_table(first) == has_table(second), "an entry of the guest's is half a table");
    const std::uint64_t apart = has_table(first) ? 0 : frames_at(2);
    require(start(first, i) + apart == start(second, i + 1), "the halves of a guest's entry do not belong together");
  }

  /// What may be granted below: CR0.WP=0 lets the supervisor write what no level grants.
  static rights most_below(const page_role& r) noexcept {
    return changed(r.access(), r.wp() ? 0 : rights::write_bit, 0);
  }

  void check_leaf(shadow_page& p, unsigned i, shadow_entry e) noexcept {
    ++leaves_;
    const gfn frame = p.leaf_frame(i);
    const unsigned level = p.role.level();
    memslot* const slot = slots_.find(frame);
    require(level <= top_leaf_level, "a leaf is above the highest level that maps pages");
    if (slot == nullptr) return fail("a leaf maps a frame outside all slots");
    if (level > 1 && broken_ == nullptr) check_large(*slot, frame, level, e);
    if (broken_ != nullptr) return;
    require(slot->mappings(frame, level).contains({&p, i}), "a leaf is missing in the reverse mapping");
    const auto host = static_cast<std::uintptr_t>(slot->config().host_of(frame).value);
    const range bytes{host, host + (frames_at(level) << page_shift)};
    require(!zapping_.open_hits(bytes), "a leaf is inside an open bracket");
    require(!p.role.direct() || frame == p.frame + i * frames_at(level),
            "a direct page maps a frame that is not its own");
    require(e.may_write() || !e.allows().writable(), "a leaf is writable although it may not be written");
    if (e.may_write()) {
      require(!window_.open_hits(bytes), "a leaf may be written inside an open bracket");
      require(!tables_.index_.write_protected(frame), "a shadowed guest table is mapped writable");
      require(!slot->config().read_only, "a read-only slot is mapped writable");
    }
    require(hardware_takes(p.role, e), "a leaf for a nested guest is none of its format");
    require(covers(most_below(p.role), e.allows()), "a leaf grants more than the tables above it");
    require(!p.role.direct() || (e.guest_user() == p.role.guest_user() && e.key() == p.role.key()),
            "a direct page's leaf differs from its role");
  }

  void check_large(memslot& slot, gfn frame, unsigned level, shadow_entry e) noexcept {
    const std::uint64_t mask = frames_at(level) - 1;
    require((frame.value & mask) == 0 && (e.frame().value & mask) == 0, "a large leaf is not aligned");
    require(slot.config().contains(frame + mask), "a large leaf reaches beyond its slot");
    if (broken_ != nullptr) return;
    require(slot.table_count(frame, level) == 0, "a shadowed guest table is part of a large leaf");
    require(slot.log() == nullptr, "a large leaf is in a slot whose writes are logged");
    require(!nx_huge_ || !e.allows().executable(), "a large leaf may be executed");
  }

  void check_slot(memslot& s) noexcept {
    const memslot_config& c = s.config();
    for (unsigned level = 1; level <= top_leaf_level; ++level) {
      for (gfn f = aligned_to(c.base, level); f < c.end(); f = f + frames_at(level)) check_list(s, f, level);
    }
  }

  void check_list(memslot& s, gfn f, unsigned level) noexcept {
    entry_list& l = s.mappings(f, level);
    require(l.empty() != s.listed(f, level), "the set of mapped frames differs from the reverse mappings");
    std::size_t n = 0;
    l.for_each([&](entry_place at) {
      ++n;
      const shadow_entry e = at.page->load(at.index);
      require(e.present() && e.is_leaf(), "a reverse mapping names no leaf");
      require(at.page->leaf_frame(at.index) == f, "a reverse mapping names another frame's leaf");
      require(at.page->role.level() == level, "a reverse mapping names a leaf of another level");
    });
    require(n == l.count(), "a reverse mapping has lost count");
    mapped_ += n;
    if (level == 3) {
      table_count_ += s.table_count(f, level);
    }
  }

  void check_roots() noexcept {
    tables_.gate_.for_each_locked([&](vcpu_port& port) {
      port.for_each_root([&](const shadow_page& p) {
        bool found = false;
        tables_.index_.for_each([&](const shadow_page& q) { found = found || &q == &p; });
        if (!found) return fail("a vCPU's root is no shadow page of this VM");
        require(p.role.may_be_root(), "a vCPU's root is not a top table");
        require(p.generation == tables_.generation_, "a vCPU's root is obsolete");
      });
    });
  }

  shadow_tables& tables_;
  const memslot_snapshot& slots_;
  const mmu_window& window_;
  const mmu_window& zapping_;
  const bool nx_huge_;
  const char* broken_ = nullptr;
  std::size_t pages_ = 0;
  std::size_t leaves_ = 0;
  std::size_t mapped_ = 0;
  std::size_t unsync_ = 0;
  std::size_t table_pages_ = 0;
  std::size_t table_count_ = 0;
};

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
