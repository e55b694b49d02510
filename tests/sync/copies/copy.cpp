// SPDX-License-Identifier: MIT

// One copy of the library, see copy.hpp.

#include "copy.hpp"

#include <array>
#include <bit>
#include <cstring>
#include <new>

#include <mmunotify/sync/srcu_domain.hpp>

namespace {

using namespace mmunotify;

srcu_domain& at(void* domain) { return *static_cast<srcu_domain*>(domain); }

template <class T>
using bytes_of = std::array<std::byte, sizeof(T)>;

template <class T>
copy_token packed(T value) {
  static_assert(sizeof(T) <= sizeof(copy_token));
  copy_token t{};
  const auto bytes = std::bit_cast<bytes_of<T>>(value);
  std::memcpy(t.bytes, bytes.data(), bytes.size());
  return t;
}
template <class T>
T unpacked(const copy_token& t) {
  bytes_of<T> bytes;
  std::memcpy(bytes.data(), t.bytes, bytes.size());
  return std::bit_cast<T>(bytes);
}

std::size_t records() {
  std::size_t n = 0;
  detail::runtime<linux_platform>::own().for_each_record([&](auto&) {
    ++n;
    return true;
  });
  return n;
}

int look(void* domain, const std::atomic<copy_object*>& where) {
  const read_section s(at(domain));
  const copy_object* const found = where.load(std::memory_order_acquire);
  return found->faults() + found->faults();
}

bool call(void* domain, copy_job& job) {
  return at(domain).call(*new (job.head) srcu_head, [](srcu_head* h) noexcept {
    // The head is the job's first member, and the job is of standard layout.
    auto* const self = std::launder(reinterpret_cast<copy_job*>(h));
    self->function(self);
  }) == errc::ok;
}

void (*violation_sink)(const char*) noexcept = nullptr;

void on_violation(void (*f)(const char*) noexcept) {
  violation_sink = f;
  set_contract_handler(f == nullptr ? nullptr : +[](const contract_violation& v) noexcept { violation_sink(v.rule); });
}

#if defined(__clang__)
constexpr bool by_clang = true;
#else
constexpr bool by_clang = false;
#endif

const copy_interface own_interface{
    .checked = MMUNOTIFY_CHECKED,
    .clang = by_clang,
    .domain_size = sizeof(srcu_domain),
    .runtime = &detail::runtime<linux_platform>::own(),
    .make = []() -> void* { return new srcu_domain; },
    .destroy = [](void* d) { delete &at(d); },
    .grace_periods = [](void* d) { return at(d).grace_periods(); },
    .records = &records,
    .read_lock = [](void* d) { return packed(at(d).read_lock()); },
    .read_unlock = [](void* d, copy_token t) { at(d).read_unlock(unpacked<srcu_domain::section_token>(t)); },
    .lock = [](void* d) { at(d).lock(); },
    .unlock = [](void* d) { at(d).unlock(); },
    .down_read = [](void* d) { return packed(at(d).down_read()); },
    .up_read = [](void* d, copy_token t) { at(d).up_read(unpacked<srcu_domain::handoff_token>(t)); },
    .held = [](void* d) { return at(d).held_by_this_thread(); },
    .look = &look,
    .synchronize = [](void* d) { at(d).synchronize(); },
    .synchronize_expedited = [](void* d) { at(d).synchronize_expedited(); },
    .start_poll = [](void* d) { return packed(at(d).start_poll()); },
    .poll = [](void* d, copy_token c) { return at(d).poll(unpacked<srcu_domain::cookie>(c)); },
    .call = &call,
    .barrier = [](void* d) { at(d).barrier(); },
    .on_violation = &on_violation,
};

}  // namespace

extern "C" [[gnu::visibility("default")]] const copy_interface* mmunotify_test_copy() { return &own_interface; }
