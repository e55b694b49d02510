// SPDX-License-Identifier: MIT
#pragma once

// For the model checker: stands before the real header in its include path. The names are there, the system calls are
// not; the programs use model::platform.

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
struct linux_platform;
MMUNOTIFY_END_NAMESPACE
