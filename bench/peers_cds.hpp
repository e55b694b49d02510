// SPDX-License-Identifier: MIT
#pragma once

// libcds: its general-purpose URCU with a buffer. A section is a full fence and a thread-local look-up.

#define CDS_THREADING_CXX11  // the faster of its thread-local storages
#include <cds/init.h>
#include <cds/urcu/general_buffered.h>

#include "sync_sections.hpp"

namespace sync_bench {

struct cds_library {
  using rcu = cds::urcu::gc<cds::urcu::general_buffered<>>;

  cds_library() { cds::Initialize(); }
  ~cds_library() { cds::Terminate(); }
  cds_library(const cds_library&) = delete;
  cds_library& operator=(const cds_library&) = delete;

  static void require() {
    static const cds_library library;
    static const rcu singleton;
  }
};

struct cds_section : kind {
  void begin() {
    cds_library::require();
    cds::threading::Manager::attachThread();
  }
  void end() { cds::threading::Manager::detachThread(); }
  MMUNOTIFY_BENCH_INLINE std::uint64_t read(std::uint64_t) {
    cds_library::rcu::access_lock();
    const std::uint64_t value = read_payload();
    cds_library::rcu::access_unlock();
    return value;
  }
  void synchronize() { cds_library::rcu::synchronize(); }
};

}  // namespace sync_bench
