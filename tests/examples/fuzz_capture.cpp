// SPDX-License-Identifier: MIT

// The readers of captures under libFuzzer: fuzz_capture [options] <new findings> <captures to begin with>

#include <cstddef>
#include <cstdint>

#include "fuzz_capture.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::try_bytes({data, size});
  return 0;
}
