// SPDX-License-Identifier: MIT
#pragma once

// Interleavings on demand: "and at this very moment another thread does that", without another thread.
//
// A race of two threads is an order of steps. Here a thread marks the places where another one could come in between
// (points), and a test says at which of them a script runs, in the same thread. Trying every point of an operation is
// trying every order of the operation and the script: in microseconds, without luck, the same on each machine.
//
//   for (unsigned n = 0; interject(n, [&] { primary.replace(page); }, [&] { adapter.access(page); }); ++n) check();
//
// The kit's primary has points in pin(), before and after the look-up. An adapter that can choose its mutex uses
// testing::mutex, which has one before it locks and one after it unlocks; then also orders are tried in which the
// adapter has dropped its lock. Nothing runs at a point while the thread holds such a mutex: there, no other thread
// that needs it would get further either.
//
// Limits: a script runs as a whole; two operations that each wait for a step of the other need real threads (rounds in
// conformance.hpp; there, points give way to other threads at random).

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE
namespace testing {
namespace detail {

/// What a thread is in the middle of.
struct thread_schedule {
  void (*script)(void*) = nullptr;  ///< runs at a point
  void* context = nullptr;
  unsigned countdown = 0;      ///< the points before that one
  unsigned held = 0;           ///< mutexes of the kit that this thread has locked
  unsigned callbacks = 0;      ///< calls of the kit into the space that are going on
  std::uint64_t restless = 0;  ///< not 0: the state of the generator that decides where to give way
};
inline thread_local thread_schedule current_schedule;

/// While it lives, the thread counts as being inside the hooks.
class inside_callbacks {
 public:
  inside_callbacks() noexcept { current_schedule.callbacks += 1; }
  ~inside_callbacks() { current_schedule.callbacks -= 1; }
  inside_callbacks(const inside_callbacks&) = delete;
  inside_callbacks& operator=(const inside_callbacks&) = delete;
};

}  // namespace detail

/// Effects: another thread could come in here. A script that is due runs; a restless thread may yield.
inline void point() noexcept {
  detail::thread_schedule& t = detail::current_schedule;
  if (t.held != 0) return;
  if (t.script != nullptr) {
    if (t.countdown != 0) {
      t.countdown -= 1;
      return;
    }
    const unsigned outer = std::exchange(t.callbacks, 0);  // the script plays another thread
    std::exchange(t.script, nullptr)(t.context);
    t.callbacks = outer;
  } else if (t.restless != 0) {
    t.restless = t.restless * 6364136223846793005U + 1442695040888963407U;
    if (t.restless >> 62 == 0) std::this_thread::yield();
  }
}

/// Effects: body(), and script() at its point number n, counted from 0, if there are as many.
/// Returns: whether the script ran. Preconditions: this thread is not inside another interject; neither throws.
template <class Script, class Body>
bool interject(unsigned n, Script&& script, Body&& body) noexcept {
  detail::thread_schedule& t = detail::current_schedule;
  t.context = const_cast<void*>(static_cast<const void*>(&script));
  t.countdown = n;
  t.script = [](void* s) { (*static_cast<std::remove_reference_t<Script>*>(s))(); };
  body();
  return std::exchange(t.script, nullptr) == nullptr;
}

/// For a program that replaces operator new: call this in it. Effects: an allocation inside a hook is reported: the
/// bracket may be there to free memory, and the allocator wait for it.
inline void note_allocation() noexcept {
  if (detail::current_schedule.callbacks == 0) return;
  const unsigned callbacks = std::exchange(detail::current_schedule.callbacks, 0);
  mmunotify::detail::violated("L7", "testing::note_allocation", "a hook allocates, and may wait for its own bracket");
  detail::current_schedule.callbacks = callbacks;
}

/// A std::mutex with points. A thread that locks it twice is reported instead of hanging.
class mutex {
 public:
  mutex() = default;
  mutex(const mutex&) = delete;
  mutex& operator=(const mutex&) = delete;

  void lock() noexcept {
    point();
    if (mine()) {
      mmunotify::detail::violated("L7", "testing::mutex::lock", "the thread holds this mutex and waits for itself");
      depth_ += 1;
      return;
    }
    mutex_.lock();
    taken();
  }
  [[nodiscard]] bool try_lock() noexcept {
    point();
    if (mine() || !mutex_.try_lock()) return false;
    taken();
    return true;
  }
  void unlock() noexcept {
    if (depth_ != 0) {
      depth_ -= 1;
      return;
    }
    owner_.store(std::thread::id(), std::memory_order_relaxed);
    detail::current_schedule.held -= 1;
    mutex_.unlock();
    point();
  }

 private:
  // Relaxed: only the thread itself can have stored its own ID.
  bool mine() const noexcept { return owner_.load(std::memory_order_relaxed) == std::this_thread::get_id(); }
  void taken() noexcept {
    owner_.store(std::this_thread::get_id(), std::memory_order_relaxed);
    detail::current_schedule.held += 1;
  }

  std::mutex mutex_;
  std::atomic<std::thread::id> owner_{};
  unsigned depth_ = 0;  ///< of locks that would have waited for themselves; the owner's
};

}  // namespace testing
MMUNOTIFY_END_NAMESPACE
