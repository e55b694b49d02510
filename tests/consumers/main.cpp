// SPDX-License-Identifier: MIT

// What a program that depends on the library looks like; the projects next to this file differ in how they find it.

#include <mmunotify/mmunotify.hpp>

#include <cstdio>

int main() {
  const mmunotify::range here{0x1000, 0x2000};
  std::printf("mmunotify %d.%d.%d\n", MMUNOTIFY_VERSION_MAJOR, MMUNOTIFY_VERSION_MINOR, MMUNOTIFY_VERSION_PATCH);
  return here.overlaps({0x1fff, 0x3000}) && !here.overlaps({0x2000, 0x3000}) ? 0 : 1;
}
