// SPDX-License-Identifier: MIT
#pragma once

// The memory that a read section leaves behind: bytes per thread and domain, computed and measured.
//
// Measured: many threads enter one section of each of many domains, which exist already; what the process's resident
// set has grown by is divided by threads times domains. Slabs are committed by pages, so a thread that uses one domain
// has a whole page resident; here all words of each page are used.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "sync_sections.hpp"

namespace sync_bench {

struct memory_platform : linux_platform {};

/// Returns: bytes. Exact: the kernel walks the page tables (the counters of /proc/self/statm lag behind).
inline double resident() {
  std::ifstream file("/proc/self/smaps_rollup");
  std::string word;
  while (file >> word) {
    double kib = 0;
    if (word == "Rss:" && file >> kib) return kib * 1024;
  }
  return 0;
}

/// Where threads wait until all of them are there; `resident()` is asked while they do.
class turnstile {
 public:
  void arrive_and_wait() {
    const int round = round_.load(std::memory_order_acquire);
    arrived_.fetch_add(1, std::memory_order_acq_rel);
    round_.wait(round, std::memory_order_acquire);
  }
  void await(int n) const {
    while (arrived_.load(std::memory_order_acquire) != n) std::this_thread::yield();
  }
  void open() {
    arrived_.store(0, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }

 private:
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

/// Returns: bytes per thread and domain.
inline double measured_bytes(int threads, std::size_t domains) {
  using domain_type = basic_srcu_domain<memory_platform>;
  const auto all = std::make_unique<domain_type[]>(domains);
  turnstile gate;
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) {
    running.emplace_back([&] {
      { const basic_read_section<domain_type> s(all[0]); }  // the slab and what comes with it
      gate.arrive_and_wait();
      for (std::size_t i = 0; i < domains; ++i) const basic_read_section<domain_type> s(all[i]);
      gate.arrive_and_wait();
    });
  }
  gate.await(threads);
  const double before = resident();
  gate.open();
  gate.await(threads);
  const double after = resident();
  gate.open();
  for (std::thread& t : running) t.join();
  return (after - before) / (static_cast<double>(threads) * static_cast<double>(domains));
}

constexpr const char* bytes_computed = "bytes per thread and domain, computed";
constexpr const char* bytes_measured = "bytes per thread and domain, measured";

/// Prints, and adds the figures.
inline void report_memory() {
  constexpr int threads = 8;
  constexpr std::size_t domains = 16384;
  const double computed = sizeof(detail::section_slot);
  const double measured = measured_bytes(threads, domains);
  ratios::figure(bytes_computed, computed);
  ratios::figure(bytes_measured, measured);
  std::printf("\nmemory\n%-44s %10.2f   a page (4096) is committed for %.0f domains\n", bytes_computed, computed,
              4096 / computed);
  std::printf("%-44s %10.2f   %d threads, %zu domains\n", bytes_measured, measured, threads, domains);
  std::printf("%-44s %10zu\n", "bytes per domain", sizeof(srcu_domain));
#if MMUNOTIFY_BENCH_CK
  std::printf("%-44s %10zu   a record\n", "ck_epoch: bytes per thread and domain", bench_ck_record_size());
#endif
}

}  // namespace sync_bench
