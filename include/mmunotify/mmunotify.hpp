// SPDX-License-Identifier: MIT
#pragma once

// The whole library in one include. Programs that care about compile time include the headers they use.

#include <mmunotify/config.hpp>

#include <mmunotify/base/address.hpp>
#include <mmunotify/base/event.hpp>
#include <mmunotify/base/frame.hpp>
#include <mmunotify/base/invalidation.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
