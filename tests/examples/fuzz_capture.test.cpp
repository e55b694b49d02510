// SPDX-License-Identifier: MIT

// The readers of captures with what a seeded generator makes of good files: the same demands as under libFuzzer
// (fuzz_capture.cpp), with every compiler.

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fuzz_capture.hpp"

namespace {

using bytes = std::vector<std::uint8_t>;

std::uint64_t seed() {
  const char* given = std::getenv("MMUNOTIFY_SEED");
  return given != nullptr ? std::strtoull(given, nullptr, 10) : 1;
}

/// Small files of each kind and entry size.
constexpr const char* samples[] = {"linux/lin64_pti_0.bin",
                                   "linux/lin32_2l_0.bin",
                                   "linux/lin32_pae_0.bin",
                                   "access_matrix/block0.agreed.rle",
                                   "access_matrix/block2.agreed.rle",
                                   "access_matrix/block4.agreed.rle",
                                   "access_fuzz/pse36.txt"};

/// A file of many rows, shortened to few, so that a change hits one that matters.
bytes shortened(bytes whole, std::size_t header, std::size_t row, std::uint32_t rows, std::size_t count_at) {
  whole.resize(header + row * rows);
  std::memcpy(whole.data() + count_at, &rows, sizeof rows);
  return whole;
}

bytes file(const std::string& name) {
  auto loaded = capture::read_file(MMUNOTIFY_TEST_DATA "/x86/" + name);
  REQUIRE_MESSAGE(loaded, loaded.error);
  return std::move(loaded.value);
}

std::vector<bytes> seeds() {
  std::vector<bytes> all;
  for (const char* name : samples) all.push_back(file(name));
  all.push_back(shortened(file("access_fuzz/fuzz_pse32.bin"), 32, 40, 20, 20));
  all.push_back(shortened(file("access_fuzz/fuzz_pae.bin"), 32, 56, 20, 20));
  all.push_back(shortened(file("access_fuzz/fuzz_lm5.bin"), 32, 72, 20, 20));
  bytes none = file("kvm_translate/kvmtr_none_nx0_phy40_smap0_intel.bin");
  all.push_back(shortened(none, 80, 16, 20, 68));
  for (const bytes& b : all) REQUIRE(fuzz::try_bytes(b));
  return all;
}

/// One to four changes: a bit, a byte, a field, a cut, a piece moved or doubled. Most hit the header, where files are
/// thin-skinned.
bytes damaged(std::mt19937_64& random, bytes b) {
  constexpr std::uint64_t fields[] = {0, 1, 2, 255, 256, 511, 512, 513, 0x7fffffff, 0x80000000, 0xffffffff, ~0ULL};
  for (std::uint64_t changes = 1 + random() % 4; changes > 0 && !b.empty(); --changes) {
    const std::size_t within = random() % 2 == 0 ? std::min<std::size_t>(b.size(), 96) : b.size();
    const std::size_t at = random() % within;
    const std::size_t length = std::min<std::size_t>(1 + random() % 64, b.size() - at);
    const auto here = b.begin() + static_cast<std::ptrdiff_t>(at);
    switch (random() % 6) {
      case 0: b[at] = static_cast<std::uint8_t>(b[at] ^ 1U << random() % 8); break;
      case 1: b[at] = static_cast<std::uint8_t>(random()); break;
      case 2: {
        const std::uint64_t value = fields[random() % std::size(fields)];
        std::memcpy(b.data() + at, &value, std::min<std::size_t>(b.size() - at, std::size_t{1} << random() % 4));
        break;
      }
      case 3: b.resize(at); break;
      case 4: b.erase(here, here + static_cast<std::ptrdiff_t>(length)); break;
      default: {
        const bytes piece(here, here + static_cast<std::ptrdiff_t>(length));
        const std::size_t to = random() % (b.size() + 1);
        b.insert(b.begin() + static_cast<std::ptrdiff_t>(to), piece.begin(), piece.end());
        break;
      }
    }
  }
  return b;
}

/// In an allocation of exactly its size, so that AddressSanitizer sees a read past the end.
bool try_exactly(const bytes& b) {
  const std::unique_ptr<std::uint8_t[]> exact{new std::uint8_t[b.size()]};
  if (!b.empty()) std::memcpy(exact.get(), b.data(), b.size());
  return fuzz::try_bytes({exact.get(), b.size()});
}

}  // namespace

TEST_CASE("bytes that were a capture are refused with a sentence, or read and replayed, whatever has changed in them") {
  std::mt19937_64 random{seed()};
  std::uint64_t read = 0, refused = 0;
  for (const bytes& whole : seeds()) {
    for (unsigned i = 0; i < 400; ++i) (try_exactly(damaged(random, whole)) ? read : refused) += 1;
  }
  CHECK(read > 100);
  CHECK(refused > 1000);
  MESSAGE(read, " read, ", refused, " refused");
}

TEST_CASE("bytes that were never a capture are refused, behind every magic number too") {
  std::mt19937_64 random{seed()};
  const std::string magics[] = {"", "MMUORAC1\1", "MMUORAC1\2", "MMUOMTX1", "MMUOFUZ1", "8"};
  for (const std::string& magic : magics) {
    for (unsigned i = 0; i < 500; ++i) {
      bytes b(magic.begin(), magic.end());
      for (std::uint64_t n = random() % 200; n > 0; --n) b.push_back(static_cast<std::uint8_t>(random()));
      CHECK_FALSE(try_exactly(b));
    }
  }
}
