// SPDX-License-Identifier: MIT
#pragma once

// A capture's translations as the shadow MMU makes them: a second translator for capture::check_linux_capture.
//
// The guest's memory is address space that is reserved and not committed; where an access lands in it says which
// guest-physical page it reached. Nothing changes behind the guest here: that is what linux_guest does.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include <sys/mman.h>

#include <mmunotify/mmunotify.hpp>

#include "capture_replay.hpp"

namespace capture {

/// A provider whose frames are the pages of one reserved range, for as long as it lives.
class reserved_memory {
 public:
  static constexpr std::uint64_t base = 0x10'0000'0000;  ///< the host virtual address of guest page 0

  explicit reserved_memory(std::uint64_t bytes) noexcept : bytes_(bytes) {
    void* const p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    memory_ = p == MAP_FAILED ? nullptr : static_cast<std::byte*>(p);
  }
  reserved_memory(const reserved_memory&) = delete;
  reserved_memory& operator=(const reserved_memory&) = delete;
  ~reserved_memory() {
    if (memory_ != nullptr) ::munmap(memory_, bytes_);
  }

  explicit operator bool() const noexcept { return memory_ != nullptr; }

  mmunotify::frame_lease pin(mmunotify::hva a, bool) noexcept {
    if (a.value < base || a.value - base >= bytes_) return {};
    return {mmunotify::errc::ok, mmunotify::pfn{(a.value - base) / mmunotify::page_size}, true};
  }
  void unpin(mmunotify::pfn) noexcept {}
  std::byte* data(mmunotify::pfn f) noexcept { return memory_ + f.value * mmunotify::page_size; }

  /// The guest-physical address of a byte of it.
  std::uint64_t address_of(const std::byte* at) const noexcept { return static_cast<std::uint64_t>(at - memory_); }

 private:
  std::uint64_t bytes_;
  std::byte* memory_;
};

/// The shadow MMU as a translator. It knows the address and the effective rights; the leaf's other flags and the size
/// of its page it does not keep, so these it takes from the walker.
template <class Mode>
class shadow_translator {
  using mmu_type = x86::shadow_mmu<reserved_memory, Mode>;

 public:
  explicit shadow_translator(const linux_tables& t)
      : walker_(t), memory_(std::make_unique<reserved_memory>(t.ram_bytes)) {
    if (!*memory_) return;
    for (const auto& page : t.pages) {
      std::memcpy(memory_->data({page.where / mmunotify::page_size}), page.words.data(), sizeof page.words);
    }
    mmu_ = std::make_unique<mmu_type>(*memory_);
    const x86::memslot_config all{
        .id = 0, .base = {0}, .pages = t.ram_bytes / mmunotify::page_size, .host = {reserved_memory::base}};
    cpu_ = std::make_unique<x86::vcpu<mmu_type>>(*mmu_);
    x86::walk_context c = context_of(t.regs, t.maxphyaddr);
    c.smap = c.smep = c.pke = c.pks = false;  // what is mapped, not what one access may do
    ready_ = mmu_->add_slot(all) == mmunotify::errc::ok && cpu_->set_registers(c) == mmunotify::errc::ok;
  }

  /// Returns: false if memory was short, or the slot or the registers were refused; then it must not be used.
  explicit operator bool() const noexcept { return ready_; }
  /// The first broken invariant of the shadow MMU, or null.
  const char* verify() { return mmu_->verify(); }

  mapping operator()(std::uint64_t va) {
    mapping m = walker_(va);
    const reached supervisor = reach(va, 0, x86::access::read);
    if (!supervisor.allowed) return {};
    m.mapped = true;
    m.pa = supervisor.pa;
    m.flags = static_cast<std::uint16_t>(m.flags & ~(mapping::user | mapping::writable));
    if (agrees(reach(va, 3, x86::access::read), m.pa)) m.flags |= mapping::user;
    if (agrees(reach(va, 0, x86::access::write), m.pa)) m.flags |= mapping::writable;
    return m;
  }

 private:
  struct reached {
    bool allowed = false;
    std::uint64_t pa = 0;
  };

  static bool agrees(const reached& r, std::uint64_t pa) { return r.allowed && r.pa == pa; }

  reached reach(std::uint64_t va, unsigned cpl, x86::access how) {
    cpu_->set_cpl(cpl);
    reached r;
    const auto look = [&](std::byte* at) noexcept { r = {true, memory_->address_of(at)}; };
    const x86::outcome o = cpu_->access({va}, how, look);
    // Beyond the memory the access is the owner's business, and so is a write to a table: the address is known.
    if (o.what == x86::outcome::not_mapped || o.what == x86::outcome::write_tracked) r = {true, o.address.value};
    return r;
  }

  walker_translator<Mode> walker_;
  std::unique_ptr<reserved_memory> memory_;
  std::unique_ptr<mmu_type> mmu_;
  std::unique_ptr<x86::vcpu<mmu_type>> cpu_;
  bool ready_ = false;
};

}  // namespace capture
