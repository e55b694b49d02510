// SPDX-License-Identifier: MIT

// The main function of every test program. Random tests take their seed from the environment variable MMUNOTIFY_SEED;
// when it is not set, one is drawn and set here, and printed either way, so that every run can be replayed.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

int main(int argc, char** argv) {
  if (std::getenv("MMUNOTIFY_SEED") == nullptr) {
    const std::string drawn = std::to_string(std::random_device{}());
    ::setenv("MMUNOTIFY_SEED", drawn.c_str(), 1);
  }
  std::printf("MMUNOTIFY_SEED=%s\n", std::getenv("MMUNOTIFY_SEED"));
  std::fflush(stdout);
  return doctest::Context(argc, argv).run();
}
