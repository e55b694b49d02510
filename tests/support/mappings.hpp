// SPDX-License-Identifier: MIT
#pragma once

// What the kernel says about this process's memory.

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

struct mapping {
  std::uintptr_t first = 0;
  std::uintptr_t last = 0;
  std::string permissions{};  ///< "r-xp"
  std::string path{};
};

/// The lines of /proc/self/maps.
inline std::vector<mapping> mappings() {
  std::vector<mapping> all;
  std::ifstream file("/proc/self/maps");
  std::string line;
  while (std::getline(file, line)) {
    mapping m;
    char dash = 0;
    std::string offset;
    std::string device;
    std::string inode;
    std::istringstream(line) >> std::hex >> m.first >> dash >> m.last >> m.permissions >> offset >> device >> inode >>
        m.path;
    all.push_back(m);
  }
  return all;
}

/// The mapping that holds the address; an empty one if there is none.
inline mapping mapping_of(const void* address) {
  const auto a = reinterpret_cast<std::uintptr_t>(address);
  for (auto& m : mappings()) {
    if (m.first <= a && a < m.last) return m;
  }
  return {};
}

inline bool is_writable_code(const mapping& m) {
  return m.permissions.find('w') != std::string::npos && m.permissions.find('x') != std::string::npos;
}
