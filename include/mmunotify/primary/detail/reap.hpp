// SPDX-License-Identifier: MIT
#pragma once

// Reaping: pages are taken away without waiting for anybody (Linux: the OOM reaper).
//
// The address space belongs to somebody who is to die, and the memory is wanted now. Area by area the secondaries are
// asked without blocking; where one refuses, the area is left as it is, and the next one is tried.

#include <cstddef>

#include <mmunotify/base/event.hpp>
#include <mmunotify/base/range.hpp>
#include <mmunotify/base/result.hpp>
#include <mmunotify/primary/paged_memory.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// What reap did.
struct reap_answer {
  errc error = errc::ok;
  std::size_t reaped = 0;   ///< pages, swapped ones included
  std::size_t refused = 0;  ///< areas that were left as they are, because a secondary refused
  range first_refused{};    ///< the lowest of them

  constexpr explicit operator bool() const noexcept { return error == errc::ok && refused == 0; }
};

namespace detail {

/// Context: tables held, shared. Progress: non-blocking, but for entry locks.
template <class Core>
reap_answer reap(Core& core) noexcept {
  reap_answer answer;
  paged_memory& memory = core.memory;
  for (const area& a : memory.areas().items()) {
    bool any = false;
    memory.table().for_each(a.range, [&](std::uintptr_t, page_slot&) { any = true; });
    if (!any) continue;
    withdrawn_pages gone;
    {
      const auto bracket = core.space.try_invalidate(a.range, event::clear);
      if (!bracket && !mutated(mutation::reap_despite_refusal)) {
        if (answer.refused == 0) answer.first_refused = a.range;
        answer.refused += 1;
        continue;
      }
      memory.counters().add(counter::brackets);
      answer.reaped += memory.take_away(a.range, gone);
    }
    memory.drop(gone);
  }
  memory.counters().add(counter::reaped, answer.reaped);
  return answer;
}

}  // namespace detail
MMUNOTIFY_END_NAMESPACE
