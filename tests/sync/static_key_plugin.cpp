// SPDX-License-Identifier: MIT

// A shared object with tests of its own of the key that static_key.test.cpp flips.

#include "sync/static_key.hpp"

namespace {

const bool seen_by_initialiser = shared_key::test();

}  // namespace

extern "C" [[gnu::visibility("default")]] const static_key_plugin plugin;
const static_key_plugin plugin = {
    [] { return shared_key_inline(); }, [] { return shared_key::maybe(); },
    [] { return seen_by_initialiser; }, [] { return shared_key::enable() == mmunotify::errc::ok; },
    [] { shared_key::disable(); },      [] { return mmunotify::key_patching(); },
};
