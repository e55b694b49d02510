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
#include <mmunotify/base/young_batch.hpp>

#include <mmunotify/sync/lockfree_hlist.hpp>
#include <mmunotify/sync/rcu.hpp>
#include <mmunotify/sync/srcu_domain.hpp>
#include <mmunotify/sync/static_key.hpp>
#include <mmunotify/sync/static_srcu_domain.hpp>

#include <mmunotify/observe/observe.hpp>

#include <mmunotify/notifier/address_space.hpp>
#include <mmunotify/notifier/disabled.hpp>
#include <mmunotify/notifier/invalidation_window.hpp>
#include <mmunotify/notifier/keyed.hpp>
#include <mmunotify/notifier/shared_subscription.hpp>
#include <mmunotify/notifier/subscription.hpp>

#include <mmunotify/interval/interval_invalidation.hpp>
#include <mmunotify/interval/interval_notifier.hpp>

#include <mmunotify/primary/reference_mmu.hpp>

#include <mmunotify/secondary/x86/control_registers.hpp>
#include <mmunotify/secondary/x86/direct_mmu.hpp>
#include <mmunotify/secondary/x86/direct_vcpu.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>
#include <mmunotify/secondary/x86/nested_vcpu.hpp>
#include <mmunotify/secondary/x86/shadow_mmu.hpp>
#include <mmunotify/secondary/x86/vcpu.hpp>
