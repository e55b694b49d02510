// SPDX-License-Identifier: MIT

#include <mmunotify/primary/writer_gate.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <shared_mutex>
#include <thread>
#include <vector>

#include "support/threads.hpp"

using namespace mmunotify;

namespace {

TEST_CASE("a reader that comes while a writer waits is let in after the writer") {
  std::shared_mutex m;
  writer_gate gate;
  std::atomic<bool> writer_done{false};
  std::atomic<bool> reader_asks{false};
  std::atomic<bool> reader_in{false};
  bool writer_was_first = false;

  gate.lock_shared(m);  // the reader that the writer waits for
  std::jthread writer([&] {
    gate.lock(m);
    writer_done.store(true, std::memory_order_relaxed);
    m.unlock();
  });
  while (gate.waiting_writers() == 0) std::this_thread::yield();
  std::jthread reader([&] {
    reader_asks.store(true, std::memory_order_release);
    gate.lock_shared(m);
    writer_was_first = writer_done.load(std::memory_order_relaxed);
    reader_in.store(true, std::memory_order_release);
    m.unlock_shared();
  });
  wait_for(reader_asks);
  let_others_run();
  CHECK_FALSE(reader_in.load(std::memory_order_acquire));
  m.unlock_shared();
  wait_for(reader_in);
  CHECK(writer_was_first);
  CHECK(gate.waiting_writers() == 0);
}

/// A mutex that lets writers in when the test says so, and says when a reader has come through the gate.
struct doorman {
  std::atomic<int> admitted{0};
  std::atomic<int> asked{0};
  std::atomic<bool> reader{false};

  void lock() {
    const int mine = asked.fetch_add(1, std::memory_order_relaxed);
    while (admitted.load(std::memory_order_relaxed) <= mine) std::this_thread::yield();
  }
  void lock_shared() { reader.store(true, std::memory_order_release); }
};

TEST_CASE("a reader waits for one admission, not until no writer waits") {
  doorman m;
  writer_gate gate;
  std::atomic<bool> reader_asks{false};
  std::jthread first([&] { gate.lock(m); });
  std::jthread second([&] { gate.lock(m); });
  while (gate.waiting_writers() != 2) std::this_thread::yield();
  std::jthread reader([&] {
    reader_asks.store(true, std::memory_order_release);
    gate.lock_shared(m);
  });
  wait_for(reader_asks);
  let_others_run();
  CHECK_FALSE(m.reader.load(std::memory_order_acquire));
  m.admitted.store(1, std::memory_order_relaxed);
  wait_for(m.reader);
  CHECK(gate.waiting_writers() == 1);
  m.admitted.store(2, std::memory_order_relaxed);
}

TEST_CASE("a writer gets its turn however many readers keep overlapping, and readers get theirs") {
  constexpr int turns = 300;
  std::shared_mutex m;
  writer_gate gate;
  std::atomic<bool> stop{false};
  std::atomic<int> inside{0};
  std::atomic<int> wrong{0};
  std::atomic<unsigned> reads{0};
  {
    std::vector<std::jthread> readers;
    for (int i = 0; i < 3; ++i) {
      readers.emplace_back([&] {
        while (!stop.load(std::memory_order_relaxed)) {
          gate.lock_shared(m);
          inside.fetch_add(1, std::memory_order_relaxed);
          reads.fetch_add(1, std::memory_order_relaxed);
          std::this_thread::yield();  // so that another reader comes before this one leaves
          inside.fetch_sub(1, std::memory_order_relaxed);
          m.unlock_shared();
        }
      });
    }
    {
      std::vector<std::jthread> writers;
      for (int i = 0; i < 2; ++i) {
        writers.emplace_back([&] {
          for (int turn = 0; turn < turns; ++turn) {
            gate.lock(m);
            if (inside.load(std::memory_order_relaxed) != 0) wrong.fetch_add(1, std::memory_order_relaxed);
            m.unlock();
          }
        });
      }
    }
    while (reads.load(std::memory_order_relaxed) == 0) std::this_thread::yield();
    stop.store(true, std::memory_order_relaxed);
  }
  CHECK(wrong == 0);
  CHECK(gate.waiting_writers() == 0);
}

}  // namespace
