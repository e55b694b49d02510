// SPDX-License-Identifier: MIT

#include <mmunotify/base/frame.hpp>

#include <doctest/doctest.h>

#include <cstddef>

using namespace mmunotify;

namespace {

/// The least that lends frames.
struct single_frame {
  std::byte bytes[page_size] = {};
  int pins = 0;

  frame_lease pin(hva a, bool write) {
    if (a.page() != hva{0}) return {};
    if (write) return {.error = errc::access_denied};
    ++pins;
    return {.error = errc::ok, .frame = pfn{42}, .writable = false};
  }
  void unpin(pfn) noexcept { --pins; }
  std::byte* data(pfn) noexcept { return bytes; }
};
static_assert(frame_provider<single_frame>);

struct throwing_unpin : single_frame {
  void unpin(pfn) {}
};
static_assert(!frame_provider<throwing_unpin>);

struct throwing_data : single_frame {
  std::byte* data(pfn) { return bytes; }
};
static_assert(!frame_provider<throwing_data>);

struct wrong_lease : single_frame {
  pfn pin(hva, bool) { return {}; }
};
static_assert(!frame_provider<wrong_lease>);

struct wrong_bytes : single_frame {
  void* data(pfn) noexcept { return bytes; }
};
static_assert(!frame_provider<wrong_bytes>);

struct guest_frames : single_frame {
  void unpin(gfn) noexcept {}
};
static_assert(!frame_provider<guest_frames>);

static_assert(!frame_provider<int>);

// A lease is asked, never counted with.
template <class T>
concept counts = requires(T t) { t + 1; };
static_assert(!counts<frame_lease>);

}  // namespace

TEST_CASE("a lease that nobody filled in lends nothing") {
  const frame_lease lease{};
  CHECK_FALSE(lease);
  CHECK(lease.error == errc::not_mapped);
  CHECK_FALSE(lease.writable);
}

TEST_CASE("a lease is good exactly if its error is ok") {
  for (unsigned i = 0; i <= static_cast<unsigned>(errc::again); ++i) {
    const frame_lease lease{.error = static_cast<errc>(i), .frame = pfn{1}};
    CHECK(static_cast<bool>(lease) == (static_cast<errc>(i) == errc::ok));
  }
}

TEST_CASE("a provider lends by address and takes back by number, with no page in between") {
  single_frame provider;
  const frame_lease lease = provider.pin(hva{0x123}, false);
  REQUIRE(lease);
  CHECK(lease.frame == pfn{42});
  CHECK(provider.pins == 1);
  CHECK(provider.data(lease.frame) == provider.bytes);
  provider.unpin(lease.frame);
  CHECK(provider.pins == 0);
  CHECK(provider.pin(hva{0x123}, true).error == errc::access_denied);
  CHECK(provider.pin(hva{page_size}, false).error == errc::not_mapped);
}
