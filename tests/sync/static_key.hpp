// SPDX-License-Identifier: MIT
#pragma once

// What static_key.test.cpp shares with a second translation unit and with shared objects.

#include <mmunotify/sync/static_key.hpp>

using shared_key = mmunotify::static_key<"test.shared">;

/// In the COMDAT group of each translation unit; the linker keeps one.
[[gnu::noinline]] inline bool shared_key_inline() noexcept { return shared_key::test(); }

/// In static_key_second.cpp.
bool shared_key_elsewhere() noexcept;
bool shared_key_inline_elsewhere() noexcept;
mmunotify::errc enable_shared_key_elsewhere() noexcept;
void disable_shared_key_elsewhere() noexcept;

/// What a shared object of static_key_plugin.cpp exports, under the name "plugin".
struct static_key_plugin {
  bool (*test)();
  bool (*maybe)();
  bool (*first_seen)();  ///< what an initialiser of the shared object saw
  bool (*enable)();
  void (*disable)();
  mmunotify::key_patching_state (*patching)();
};
