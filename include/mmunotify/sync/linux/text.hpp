// SPDX-License-Identifier: MIT
#pragma once

// Changes the machine code of the running process, a byte at a time.
//
// Written through /proc/thread-self/mem, which goes past the protection of the page: the kernel makes the process its
// own copy of the page and stores there. The mapping stays read-and-execute: no page is ever writable and executable at
// once, nor is any not executable for a moment while threads run through it, as with mprotect. Opened anew each time:
// a descriptor that is kept would be the parent's memory after fork, and anybody's after a stranger's close.
//
// After the store, other processors may still run what they have fetched before. MEMBARRIER_CMD_PRIVATE_EXPEDITED_
// SYNC_CORE makes each thread of the process execute a core-serialising instruction, which is also a full fence,
// between the call and its return (membarrier(2); Intel SDM volume 3, "Handling Self- and Cross-Modifying Code").
//
// Hardened systems refuse: a kernel started with proc_mem.force_override=never, a container without /proc, a seccomp
// filter. Each call says so.
//
// This is the Text policy of static keys (detail/key_registry.hpp):
//   prepare()      once, before the others: null, or one sentence why code cannot be changed
//   writer         scope of a batch; store(at, value) stores one byte, returns false if the system refuses
//   synchronize()  every thread runs what was stored before; returns false if the system refuses
//
// Cost (2 vCPU Zen 4 guest): opening and closing 3 us, a byte 0.9 us (2 us the first time on a page), synchronize
// 0.4 us alone and up to 10 us when other threads run.

#include <cerrno>
#include <cstdint>

#include <fcntl.h>
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mmunotify/config.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

struct linux_text {
  /// Effects: registers with the kernel; takes milliseconds once a second thread exists. Returns: null, or why not.
  static const char* prepare() noexcept {
    const long commands = ::syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);
    if (commands < 0 || (commands & MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE) == 0 || !join()) {
      return "the kernel grants no membarrier that serialises the other processors";
    }
    return nullptr;
  }

  /// Precondition: prepare() returned null, in this process or in one that it was forked from.
  [[nodiscard]] static bool synchronize() noexcept {
    const int saved = errno;
    const auto barrier = [] {
      return ::syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0) == 0;
    };
    const bool done = barrier() || (errno == EPERM && join() && barrier());  // EPERM: not registered any more
    errno = saved;
    return done;
  }

  class writer {
   public:
    writer() noexcept : saved_(errno), file_(::open("/proc/thread-self/mem", O_WRONLY | O_CLOEXEC)) {}
    ~writer() {
      if (file_ >= 0) ::close(file_);
      errno = saved_;
    }
    writer(const writer&) = delete;
    writer& operator=(const writer&) = delete;

    [[nodiscard]] bool store(const std::uint8_t* at, std::uint8_t value) noexcept {
      return file_ >= 0 && ::pwrite(file_, &value, 1, static_cast<off_t>(reinterpret_cast<std::uintptr_t>(at))) == 1;
    }

   private:
    int saved_;
    int file_;
  };

 private:
  static bool join() noexcept {
    return ::syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0) == 0;
  }
};

MMUNOTIFY_END_NAMESPACE
