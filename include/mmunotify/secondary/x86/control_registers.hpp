// SPDX-License-Identifier: MIT
#pragma once

// From control registers to a paging mode and to what a walk needs to know.
//
// The mode follows from CR0.PG, CR4.PAE, EFER.LME and CR4.LA57 together (SDM 4.1.1), so nobody has to keep it. What the
// processor refuses is refused here: `check_registers` where it raises #GP, `load_pdptes` (pae.hpp) for what CR3 points
// to, `reloads_pdptes` for when that happens.
//
//   if (check_registers(now, cpu) != errc::ok) inject #GP;
//   walk_context c = context_of(now, cpu);
//   if (reloads_pdptes(was, now) && load_pdptes(memory, c) == pdpte_load::general_protection) inject #GP;
//   visit_mode(mode_of(now), [&]<class Mode>(std::type_identity<Mode>) { guest_walker<Mode>{c}.walk(...); });
//
// References: Intel SDM vol. 3A, 2.5 (control registers), 4.1.1 and 4.1.2 (modes and their switches), 4.4.1 (PDPTEs).

#include <cstdint>
#include <type_traits>
#include <utility>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/secondary/x86/access.hpp>
#include <mmunotify/secondary/x86/entry.hpp>
#include <mmunotify/secondary/x86/no_paging.hpp>
#include <mmunotify/secondary/x86/pae.hpp>
#include <mmunotify/secondary/x86/two_level.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace x86 {

namespace cr0 {
inline constexpr std::uint64_t pe = bit(0);
inline constexpr std::uint64_t wp = bit(16);
inline constexpr std::uint64_t nw = bit(29);
inline constexpr std::uint64_t cd = bit(30);
inline constexpr std::uint64_t pg = bit(31);
}  // namespace cr0
namespace cr4 {
inline constexpr std::uint64_t pse = bit(4);
inline constexpr std::uint64_t pae = bit(5);
inline constexpr std::uint64_t pge = bit(7);
inline constexpr std::uint64_t la57 = bit(12);
inline constexpr std::uint64_t pcide = bit(17);
inline constexpr std::uint64_t smep = bit(20);
inline constexpr std::uint64_t smap = bit(21);
inline constexpr std::uint64_t pke = bit(22);
inline constexpr std::uint64_t pks = bit(24);
}  // namespace cr4
namespace efer {
inline constexpr std::uint64_t lme = bit(8);
inline constexpr std::uint64_t lma = bit(10);
inline constexpr std::uint64_t nxe = bit(11);
}  // namespace efer

/// The registers that decide about paging.
struct control_registers {
  std::uint64_t cr0 = 0, cr3 = 0, cr4 = 0, efer = 0;
  std::uint32_t pkru = 0, pkrs = 0;
};

/// What the processor can, as far as paging goes.
struct processor {
  unsigned maxphyaddr = 40;
  bool gib_pages = true;
  unsigned pse36_bits = 40;
  bool amd = false;
};

enum class paging : std::uint8_t { none, two_level, pae, long_4, long_5 };

/// EFER.LME decides and not LMA, which the processor derives from it.
constexpr paging mode_of(const control_registers& r) noexcept {
  if ((r.cr0 & cr0::pg) == 0) return paging::none;
  if ((r.cr4 & cr4::pae) == 0) return paging::two_level;
  if ((r.efer & efer::lme) == 0) return paging::pae;
  return (r.cr4 & cr4::la57) == 0 ? paging::long_4 : paging::long_5;
}

/// Returns: ok, or bad_range for registers that cannot be: #GP. PG without PE; LME and PG without PAE; PCIDs outside
/// long mode; in long mode a CR3 beyond the processor's addresses (its top bit is the no-flush bit of PCIDs).
constexpr errc check_registers(const control_registers& r, const processor& p) noexcept {
  if (p.maxphyaddr < 32 || p.maxphyaddr > 52) return errc::bad_range;
  const bool pg = (r.cr0 & cr0::pg) != 0, long_mode = pg && (r.efer & efer::lme) != 0;
  if (pg && (r.cr0 & cr0::pe) == 0) return errc::bad_range;
  if (long_mode && (r.cr4 & cr4::pae) == 0) return errc::bad_range;
  const bool pcide = (r.cr4 & cr4::pcide) != 0;
  if (pcide && !long_mode) return errc::bad_range;
  const std::uint64_t beyond = bit_range(p.maxphyaddr, pcide ? 62 : 63);
  return long_mode && (r.cr3 & beyond) != 0 ? errc::bad_range : errc::ok;
}

/// The change loads the PDPTEs anew, besides every write of CR3, which a comparison cannot see: PAE paging is on after
/// it, and one of these bits has changed (SDM 4.4.1).
constexpr bool reloads_pdptes(const control_registers& was, const control_registers& now) noexcept {
  constexpr std::uint64_t of_cr0 = cr0::cd | cr0::nw | cr0::pg;
  constexpr std::uint64_t of_cr4 = cr4::pae | cr4::pge | cr4::pse | cr4::smep;
  if (mode_of(now) != paging::pae) return false;
  return ((was.cr0 ^ now.cr0) & of_cr0) != 0 || ((was.cr4 ^ now.cr4) & of_cr4) != 0 || was.cr3 != now.cr3;
}

/// A supervisor with EFLAGS.AC clear, and no PDPTEs loaded.
constexpr walk_context context_of(const control_registers& r, const processor& p) noexcept {
  const auto on = [](std::uint64_t value, std::uint64_t flag) { return (value & flag) != 0; };
  walk_context c;
  c.cr3 = r.cr3;
  c.wp = on(r.cr0, cr0::wp);
  c.pse = on(r.cr4, cr4::pse);
  c.smep = on(r.cr4, cr4::smep);
  c.smap = on(r.cr4, cr4::smap);
  c.pke = on(r.cr4, cr4::pke);
  c.pks = on(r.cr4, cr4::pks);
  c.nxe = on(r.efer, efer::nxe);
  c.pkru = r.pkru;
  c.pkrs = r.pkrs;
  c.maxphyaddr = p.maxphyaddr;
  c.gib_pages = p.gib_pages;
  c.amd = p.amd;
  c.pse36_bits = p.pse36_bits;
  return c;
}

/// Registers and a processor of which context_of makes this context (PDPTEs, CPL and AC aside), in this mode.
constexpr control_registers controls_of(const walk_context& c, paging m) noexcept {
  const auto put = [](bool on, std::uint64_t flag) { return on ? flag : 0; };
  const bool long_mode = m == paging::long_4 || m == paging::long_5;
  control_registers r;
  r.cr0 = cr0::pe | put(m != paging::none, cr0::pg) | put(c.wp, cr0::wp);
  r.cr3 = c.cr3;
  r.cr4 = put(long_mode || m == paging::pae, cr4::pae) | put(m == paging::long_5, cr4::la57) | put(c.pse, cr4::pse) |
          put(c.smep, cr4::smep) | put(c.smap, cr4::smap) | put(c.pke, cr4::pke) | put(c.pks, cr4::pks);
  r.efer = put(long_mode, efer::lme | efer::lma) | put(c.nxe, efer::nxe);
  r.pkru = c.pkru;
  r.pkrs = c.pkrs;
  return r;
}
constexpr processor processor_of(const walk_context& c) noexcept {
  return {.maxphyaddr = c.maxphyaddr, .gib_pages = c.gib_pages, .pse36_bits = c.pse36_bits, .amd = c.amd};
}

/// Calls f(std::type_identity<Mode>{}) with the mode's policy and returns what it returns.
template <class F>
constexpr decltype(auto) visit_mode(paging m, F&& f) {
  switch (m) {
    case paging::two_level: return std::forward<F>(f)(std::type_identity<two_level>{});
    case paging::pae: return std::forward<F>(f)(std::type_identity<pae>{});
    case paging::long_4: return std::forward<F>(f)(std::type_identity<long_mode_4>{});
    case paging::long_5: return std::forward<F>(f)(std::type_identity<long_mode_5>{});
    case paging::none: break;
  }
  return std::forward<F>(f)(std::type_identity<no_paging>{});
}

}  // namespace x86
MMUNOTIFY_END_NAMESPACE
