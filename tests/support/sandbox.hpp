// SPDX-License-Identifier: MIT
#pragma once

// Processes from which the system takes what this one is granted.

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdlib>

/// Effects: from now on the system call fails in this process, and in what it executes, with EPERM.
/// Returns: false if the kernel has no such filters.
inline bool deny(long number) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<unsigned>(number), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter{sizeof program / sizeof program[0], program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) == 0;
}

/// The exit status by which a child says that it could not be set up.
inline constexpr int no_sandbox = 77;

/// Runs f() in a child; its result is the child's exit status. Returns: that, or -1 if the child ended otherwise.
template <class F>
int in_child(F f) {
  const pid_t child = ::fork();
  if (child < 0) return -1;
  if (child == 0) ::_exit(f());
  int status = 0;
  while (::waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return -1;
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// Runs this very program again, one test case of it, without the system call. Returns: as in_child.
inline int again_without(long number, const char* test_case) {
  return in_child([=] {
    if (!deny(number)) return no_sandbox;
    ::execl("/proc/self/exe", "again", test_case, "--no-skip", static_cast<char*>(nullptr));
    return no_sandbox;
  });
}
