// SPDX-License-Identifier: MIT

// The second translation unit of static_key.test.cpp.

#include "sync/static_key.hpp"

bool shared_key_elsewhere() noexcept { return shared_key::test(); }
bool shared_key_inline_elsewhere() noexcept { return shared_key_inline(); }
mmunotify::errc enable_shared_key_elsewhere() noexcept { return shared_key::enable(); }
void disable_shared_key_elsewhere() noexcept { shared_key::disable(); }
