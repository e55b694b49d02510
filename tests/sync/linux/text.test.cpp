// SPDX-License-Identifier: MIT
#include <mmunotify/sync/linux/text.hpp>

#include <doctest/doctest.h>

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <string>

#include "support/mappings.hpp"

using namespace mmunotify;

namespace {

/// A page of what looks like code: readable, executable, not writable.
class code_page {
 public:
  code_page()
      : page_(static_cast<std::uint8_t*>(
            ::mmap(nullptr, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    REQUIRE(page_ != MAP_FAILED);
  }
  ~code_page() { ::munmap(page_, 4096); }
  code_page(const code_page&) = delete;
  code_page& operator=(const code_page&) = delete;

  const std::uint8_t* at(std::size_t i) const { return page_ + i; }

 private:
  std::uint8_t* page_;
};

/// False, and a word about it, where this system refuses.
bool granted() {
  const char* const refusal = linux_text::prepare();
  if (refusal != nullptr) MESSAGE(std::string(refusal));
  return refusal == nullptr;
}

}  // namespace

TEST_CASE("a byte of code is stored, and the page stays what it is") {
  if (!granted()) return;
  const code_page page;
  const std::string before = mapping_of(page.at(0)).permissions;
  {
    linux_text::writer text;
    if (!text.store(page.at(7), 0xe9)) {
      MESSAGE("this system takes no write to code");
      return;
    }
    CHECK(text.store(page.at(8), 0xa9));
  }
  CHECK(linux_text::synchronize());
  CHECK(*static_cast<const volatile std::uint8_t*>(page.at(7)) == 0xe9);
  CHECK(*static_cast<const volatile std::uint8_t*>(page.at(8)) == 0xa9);
  CHECK(*static_cast<const volatile std::uint8_t*>(page.at(9)) == 0);
  CHECK(before == "r-xp");
  CHECK(mapping_of(page.at(0)).permissions == before);
}

TEST_CASE("a store to where nothing is mapped is refused") {
  const std::uint8_t* gone = nullptr;
  {
    const code_page page;
    gone = page.at(0);
  }
  linux_text::writer text;
  CHECK_FALSE(text.store(gone, 1));
  CHECK_FALSE(text.store(nullptr, 1));
}

TEST_CASE("preparing again is harmless, and errno is left alone") {
  errno = 77;
  if (!granted()) return;
  CHECK(linux_text::prepare() == nullptr);
  errno = 77;
  CHECK(linux_text::synchronize());
  {
    linux_text::writer text;
    static_cast<void>(text.store(nullptr, 1));
  }
  CHECK(errno == 77);
}
