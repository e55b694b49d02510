// SPDX-License-Identifier: MIT

// The reader of captures: what is whole is read, and what is torn or damaged is refused with a sentence. Every damaged
// byte string lies in an allocation of exactly its size, so that AddressSanitizer sees a read past its end.

#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "capture.hpp"

namespace {

using bytes = std::vector<std::uint8_t>;

const std::string data = MMUNOTIFY_TEST_DATA "/x86/";

/// One of each kind and entry size, small ones.
constexpr const char* samples[] = {"linux/lin64_pti_0.bin",
                                   "linux/lin32_2l_0.bin",
                                   "kvm_translate/kvmtr_lm4_nx0_phy40_smap0_intel.bin",
                                   "access_matrix/block4.agreed.rle",
                                   "access_fuzz/fuzz_lm4_kvm_phy36.bin",
                                   "access_fuzz/fuzz_pse32.bin"};

bytes file(const std::string& name) {
  auto loaded = capture::read_file(data + name);
  REQUIRE_MESSAGE(loaded, loaded.error);
  return std::move(loaded.value);
}

capture::loaded<capture::any> parse(std::span<const std::uint8_t> b) {
  const std::unique_ptr<std::uint8_t[]> exact{new std::uint8_t[b.size()]};
  if (!b.empty()) std::memcpy(exact.get(), b.data(), b.size());
  return capture::parse({exact.get(), b.size()}, "damaged");
}

/// Refused, with a sentence that names the file and gives a reason, and without a value.
bool refused(std::span<const std::uint8_t> b) {
  const auto result = parse(b);
  return !result && result.error.starts_with("damaged: ") && result.error.size() > 12 &&
         std::holds_alternative<std::monostate>(result.value);
}

template <class T>
void put(bytes& b, std::size_t at, T value) {
  REQUIRE(at + sizeof value <= b.size());
  std::memcpy(b.data() + at, &value, sizeof value);
}

template <class T>
T get(const bytes& b, std::size_t at) {
  T value{};
  REQUIRE(at + sizeof value <= b.size());
  std::memcpy(&value, b.data() + at, sizeof value);
  return value;
}

/// The header's 32-bit fields from `first` to `last` each get values that the file does not bear out.
void refuses_wrong_counts(const char* name, std::size_t first, std::size_t last) {
  const bytes whole = file(name);
  for (std::size_t at = first; at <= last; at += 4) {
    const auto right = get<std::uint32_t>(whole, at);
    for (const std::uint32_t wrong : {right + 1, right - 1, right ^ 0x80000000U, 0x7fffffffU, 0xffffffffU}) {
      bytes b = whole;
      put(b, at, wrong);
      CHECK_MESSAGE(refused(b), name, ": ", wrong, " at ", at);
    }
  }
}

constexpr std::size_t header = 80;

}  // namespace

TEST_CASE("every capture of the test data is read, each as what it is") {
  const auto is = [](const std::string& name, std::size_t index) {
    const auto loaded = capture::load(data + name);
    CHECK_MESSAGE(loaded, loaded.error);
    CHECK_MESSAGE(loaded.value.index() == index, name);
  };
  for (const char* n : {"lin32_2l_0", "lin32_2l_nopse_0", "lin32_pae_0", "lin64_4l_0", "lin64_4l_1", "lin64_5l_0",
                        "lin64_5l_1", "lin64_gb_0", "lin64_pti_0"}) {
    is("linux/" + std::string{n} + ".bin", 1);
  }
  for (const char* n : {"lm4_nx0_phy40_smap0", "lm4_nx1_phy40_smap1", "lm4_nx1_phy46_smap0", "none_nx0_phy40_smap0"}) {
    is("kvm_translate/kvmtr_" + std::string{n} + "_intel.bin", 2);
  }
  for (const char* n : {"0", "2", "3", "4", "5", "6", "8", "10"}) {
    is("access_matrix/block" + std::string{n} + ".agreed.rle", 3);
  }
  for (const char* n : {"leg32", "pse32", "pae", "lm4", "lm5", "lm4_kvm_phy36", "lm4_kvm_phy39", "lm4_kvm_phy40",
                        "lm4_kvm_phy46", "lm4_kvm_phy48"}) {
    is("access_fuzz/fuzz_" + std::string{n} + ".bin", 4);
  }
  is("access_fuzz/pse36.txt", 5);
}

TEST_CASE("the fields of a capture are those of its header") {
  const auto loaded = capture::load(data + "linux/lin64_gb_0.bin");
  const auto* t = std::get_if<capture::linux_tables>(&loaded.value);
  REQUIRE(t != nullptr);
  CHECK(t->mode == capture::mode::long_4);
  CHECK(t->regs.cr3 == 0x2884000);
  CHECK(t->ram_bytes == 0xa0000000);
  CHECK(t->maxphyaddr == 40);
  CHECK(t->pages.size() == 0x72);
  CHECK(t->runs.size() == 0xd1);
  CHECK(t->effective_measured);
  CHECK(t->pages.front().where == 0x1000000);
}

TEST_CASE("a file that is cut off anywhere is refused") {
  for (const std::string name : samples) {
    const bytes whole = file(name);
    const std::span all{whole};
    for (std::size_t i = 0; i < 64; ++i) CHECK_MESSAGE(refused(all.first(whole.size() * i / 64)), name, " at ", i);
    CHECK(refused(all.first(whole.size() - 1)));
    for (std::size_t n = 0; n <= header; ++n) CHECK_MESSAGE(refused(all.first(n)), name, " to ", n);
  }
}

TEST_CASE("bytes after the end are an error") {
  for (const std::string name : samples) {
    bytes b = file(name);
    b.push_back(0);
    CHECK_MESSAGE(refused(b), name);
  }
}

TEST_CASE("counts that the file does not bear out are refused before anything is allocated") {
  refuses_wrong_counts("linux/lin64_pti_0.bin", 64, 72);  // pages, runs, translations
  refuses_wrong_counts("linux/lin32_2l_0.bin", 64, 72);
  refuses_wrong_counts("kvm_translate/kvmtr_lm4_nx0_phy40_smap0_intel.bin", 64, 76);
  refuses_wrong_counts("kvm_translate/kvmtr_none_nx0_phy40_smap0_intel.bin", 64, 76);
  refuses_wrong_counts("access_matrix/block4.agreed.rle", 28, 36);  // rows, runs, bytes
  refuses_wrong_counts("access_fuzz/fuzz_pse32.bin", 20, 20);
}

TEST_CASE("fields with impossible values are refused") {
  const auto with = [](const char* name, std::size_t at, std::uint32_t value) {
    bytes b = file(name);
    put(b, at, value);
    return refused(b);
  };
  const char* guest = samples[0];
  CHECK(with(guest, 0, 0x20202020));  // magic
  CHECK(with(guest, 8, 3));           // kind
  CHECK(with(guest, 12, 6));          // mode
  CHECK(with(guest, 48, 31));         // address width
  CHECK(with(guest, 48, 53));
  CHECK(with(guest, 52, 4));           // CPL
  CHECK(with(guest, 56, 0));           // no memory
  CHECK(with(guest, 60, 0xffffffff));  // too much memory
  CHECK(with(guest, 76, 2));
  CHECK(with(guest, 24, 0xfff000));                       // CR3 names a page that is not there
  CHECK(with("access_matrix/block4.agreed.rle", 16, 3));  // leaf level
  CHECK(with("access_matrix/block4.agreed.rle", 24, 2));
  CHECK(with("access_matrix/block4.agreed.rle", 8, 3));  // the number of another block
  CHECK(with("access_matrix/block4.agreed.rle", 8, 11));
  CHECK(with("access_fuzz/fuzz_pse32.bin", 8, 0));
  CHECK(with("access_fuzz/fuzz_pse32.bin", 8, 6));
  CHECK(with("access_fuzz/fuzz_pse32.bin", 12, 53));
  CHECK(with("access_fuzz/fuzz_pse32.bin", 24, 41));  // bits of PSE-36
  CHECK(with("access_fuzz/fuzz_pse32.bin", 28, 1));
}

TEST_CASE("a random access that cannot be is refused by its number") {
  const bytes whole = file("access_fuzz/fuzz_pse32.bin");
  constexpr std::size_t row_bytes = 32 + 2 * 4;
  const auto error = [&](std::size_t row, std::size_t at, std::uint8_t value) {
    bytes b = whole;
    put(b, 32 + row * row_bytes + at, value);
    return parse(b).error;
  };
  CHECK(error(0, 0, 0) == "damaged: row 0 is damaged or torn");  // no paging
  CHECK(error(7, 0, 6) == "damaged: row 7 is damaged or torn");  // no such mode
  CHECK(error(7, 1, 0x40) == "damaged: row 7 is damaged or torn");
  CHECK(error(8, 2, 8) == "damaged: row 8 is damaged or torn");
  CHECK(error(9, 3, 4) == "damaged: row 9 is damaged or torn");
}

TEST_CASE("each random access has the entries of its own mode") {
  bytes b = file("access_fuzz/fuzz_pse32.bin");
  b.resize(32 + 40);  // one row, then one of PAE
  put(b, 20, std::uint32_t{2});
  bytes pae = file("access_fuzz/fuzz_pae.bin");
  pae.resize(32 + 32 + 3 * 8);
  b.insert(b.end(), pae.begin() + 32, pae.end());
  const auto loaded = parse(b);
  REQUIRE_MESSAGE(loaded, loaded.error);
  const auto& rows = std::get<capture::access_fuzz>(loaded.value).rows;
  REQUIRE(rows.size() == 2);
  CHECK(rows[0].mode == capture::mode::two_level_pse);
  CHECK(rows[1].mode == capture::mode::pae);
  CHECK(rows[1].entries[2] == get<std::uint64_t>(pae, 32 + 32 + 16));
  b.pop_back();
  CHECK(parse(b).error == "damaged: row 1 is damaged or torn");
}

TEST_CASE("a list of PSE-36 translations is read line by line, and refused by the number of a line") {
  const auto text = [](const std::string& t) {
    return parse(std::span(reinterpret_cast<const std::uint8_t*>(t.data()), t.size()));
  };
  const auto good = text("802de470 0c006083 30c2de470\n8006A320 0a804083 20a86a320\n");
  REQUIRE_MESSAGE(good, good.error);
  const auto& rows = std::get<capture::pse36_translations>(good.value).rows;
  REQUIRE(rows.size() == 2);
  CHECK(rows[1].va == 0x8006a320);
  CHECK(rows[1].pde == 0x0a804083);
  CHECK(rows[1].pa == 0x20a86a320);
  const std::string first = "802de470 0c006083 30c2de470\n";
  CHECK(text(first + "802de470 0c00").error == "damaged: it ends inside line 2");
  CHECK(text(first + "802de470 0c006083 30c2de470").error == "damaged: it ends inside line 2");
  for (const char* line : {"802de470  0c006083 1\n", "802de470 0c006083\n", "802de470 0c006083 x\n", "\n", " 1 2 3\n",
                           "1 83 1 \n", "00000000000000001 83 1\n", "1 83 1\r\n"}) {
    CHECK(text(first + line).error == "damaged: line 2 is not three hexadecimal numbers");
  }
  for (const char* line : {"100000000 83 1\n", "1 100000083 1\n", "1 82 1\n", "1 3 1\n", "1 83 10000000000\n"}) {
    CHECK(text(first + line).error == "damaged: line 2 is no translation by a 4 MiB page");
  }
}

TEST_CASE("PDPTEs of captured guests lose the accessed bit that QEMU gave them, and nothing else does") {
  const bytes whole = file("linux/lin32_pae_0.bin");
  const auto loaded = parse(whole);
  REQUIRE_MESSAGE(loaded, loaded.error);
  const auto& t = std::get<capture::linux_tables>(loaded.value);
  const std::uint64_t root = t.regs.cr3 & ~std::uint64_t{0x1f};
  unsigned accessed = 0;
  for (const auto& p : t.pages) {
    for (std::size_t i = 0; i < 512; ++i) {
      const bool pdpte = p.where + 8 * i >= root && p.where + 8 * i < root + 32;
      if (pdpte) CHECK((p.words[i] & 0x21) == 1);
      if (!pdpte && (p.words[i] & 0x21) == 0x21) ++accessed;
    }
  }
  CHECK(accessed > 1000);
}

TEST_CASE("a capture without its table pages is refused") {
  bytes b = file(samples[0]);
  b.resize(header);
  for (const std::size_t at : {64U, 68U, 72U}) put(b, at, std::uint32_t{0});
  CHECK(refused(b));
}

TEST_CASE("damaged table pages are refused") {
  const bytes whole = file(samples[0]);
  const auto page_bytes = [&](std::size_t at) { return std::size_t{10} + 10 * get<std::uint16_t>(whole, at + 8); };
  const std::size_t second = header + page_bytes(header);
  const auto with = [&](std::size_t at, auto value) {
    bytes b = whole;
    put(b, at, value);
    return refused(b);
  };
  CHECK(with(header, get<std::uint64_t>(whole, header) + 8));  // not aligned
  CHECK(with(header, std::uint64_t{1} << 40));                 // not in memory
  CHECK(with(header, ~std::uint64_t{0xfff}));
  CHECK(with(second, get<std::uint64_t>(whole, header)));  // twice
  CHECK(with(header + 8, std::uint16_t{513}));             // too many words
  CHECK(with(header + 8, std::uint16_t{0xffff}));
  CHECK(with(header + 10, std::uint16_t{512}));                      // no such word
  CHECK(with(header + 20, get<std::uint16_t>(whole, header + 10)));  // the same word again
}

TEST_CASE("damaged runs of translations are refused") {
  const bytes whole = file(samples[0]);
  const std::size_t last = whole.size() - 40;
  const auto with = [&](std::size_t at, auto value) {
    bytes b = whole;
    put(b, last + at, value);
    return refused(b);
  };
  CHECK(with(32, std::uint32_t{0}));
  CHECK(with(32, std::uint32_t{0xffffffff}));
  CHECK(with(36, std::uint16_t{64}));
  CHECK(with(38, std::uint16_t{0x4000}));
}

TEST_CASE("runs of outcomes that overrun their rows, or stop short, are refused") {
  const bytes whole = file("access_matrix/block4.agreed.rle");
  const auto with = [&](std::size_t at, auto value) {
    bytes b = whole;
    put(b, 40 + at, value);
    return refused(b);
  };
  REQUIRE(whole[42] < 254);
  CHECK(with(2, static_cast<std::uint8_t>(whole[42] + 1)));
  CHECK(with(2, static_cast<std::uint8_t>(whole[42] - 1)));
  CHECK(with(2, std::uint8_t{0}));
  CHECK(with(2, std::uint8_t{255}));  // a long count follows, which is nonsense
  CHECK(with(0, std::uint16_t{0xffff}));
  CHECK(with(0, std::uint16_t{0}));
}

TEST_CASE("a byte changed anywhere is read or refused, and nothing worse") {
  for (const std::string name : samples) {
    const bytes whole = file(name);
    unsigned noticed = 0;
    for (std::size_t i = 0; i < 64; ++i) {
      bytes b = whole;
      const std::size_t at = i < 32 ? i * header / 32 : whole.size() * (i - 32) / 32;
      b[at] = static_cast<std::uint8_t>(~b[at]);
      const auto result = parse(b);
      if (!result) ++noticed;
    }
    CHECK(noticed >= 8);
  }
}

TEST_CASE("a file that is not there, or is no file, is refused by name") {
  for (const std::string& path : {data + "no such file", data}) {
    const auto result = capture::load(path);
    CHECK_FALSE(result);
    CHECK(result.error.find(path) == 0);
  }
  const auto text = capture::load(data + "../README.md");
  CHECK(text.error.ends_with("it does not begin like a capture"));
}

TEST_CASE("the memory of a capture reads zero where no table lies, and fails beyond its end") {
  capture::table_page page;
  page.where = 0x2000;
  page.words[1] = 0x1122334455667788;
  capture::guest_memory memory{0x4000, {page}};
  std::uint64_t word = 1;
  std::uint32_t half = 1;
  CHECK(memory.read_entry(mmunotify::gpa{0x2008}, word));
  CHECK(word == 0x1122334455667788);
  CHECK(memory.read_entry(mmunotify::gpa{0x200c}, half));
  CHECK(half == 0x11223344);
  CHECK(memory.read_entry(mmunotify::gpa{0x3ff8}, word));
  CHECK(word == 0);
  CHECK_FALSE(memory.read_entry(mmunotify::gpa{0x4000}, word));

  using mmunotify::x86::exchange_result;
  const auto exchange = [&](std::uint64_t where, std::uint64_t expected, std::uint64_t desired) {
    return memory.compare_exchange_entry(mmunotify::gpa{where}, expected, desired);
  };
  CHECK(exchange(0x2008, 1, 2) == exchange_result::changed);
  CHECK(exchange(0x2008, 0x1122334455667788, 2) == exchange_result::done);
  CHECK(exchange(0x2008, 2, 3) == exchange_result::done);
  CHECK(exchange(0x3000, 0, 1) == exchange_result::read_only);
  CHECK(exchange(0x4000, 0, 1) == exchange_result::failed);
  CHECK(memory.pages().front().words[1] == 3);
}

TEST_CASE("a block of the matrix has as many rows as its digits have combinations") {
  const auto rows = [](capture::mode m, std::uint32_t leaf) {
    std::uint64_t n = 1;
    for (const std::uint32_t r : capture::matrix_radices(m, leaf)) n *= r;
    return n;
  };
  CHECK(rows(capture::mode::two_level, 1) == 6'240);
  CHECK(rows(capture::mode::two_level, 2) == 0);
  CHECK(rows(capture::mode::two_level_pse, 2) == 1'728);
  CHECK(rows(capture::mode::pae, 1) == 126'720);
  CHECK(rows(capture::mode::pae, 2) == 11'520);
  CHECK(rows(capture::mode::long_4, 1) == 1'520'640);
  CHECK(rows(capture::mode::long_4, 3) == 253'440);
  CHECK(rows(capture::mode::long_5, 3) == 1'520'640);
  CHECK(rows(capture::mode::long_5, 4) == 0);
  CHECK(rows(capture::mode::none, 1) == 0);
  for (std::uint32_t m = 0; m < capture::mode_count; ++m) {
    for (std::uint32_t leaf = 0; leaf < 6; ++leaf) {
      const auto mode = static_cast<capture::mode>(m);
      CHECK((rows(mode, leaf) != 0) == (capture::block_of(mode, leaf) < capture::block_count));
    }
  }
}
