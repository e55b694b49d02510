// SPDX-License-Identifier: MIT

// The proof for the disarmed path is the object code (D1, D2): it is read here, by objdump, instruction by instruction.
// The straight path of a function is what runs when no conditional branch is taken.
//
// With a static key the code that runs is not the code in the file (D4): there the same functions are loaded as a
// shared object, and what is read is a copy of its file into which the code has been put as it is in memory.

#include <doctest/doctest.h>

#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct instruction {
  unsigned long address;
  std::string mnemonic;
  std::string operands;
  std::string text() const { return mnemonic + " " + operands; }
};
using function = std::vector<instruction>;
using program = std::map<std::string, function>;

std::string output_of(const std::string& command) {
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), &pclose);
  REQUIRE(pipe != nullptr);
  std::string all;
  std::array<char, 4096> chunk;
  while (std::fgets(chunk.data(), static_cast<int>(chunk.size()), pipe.get()) != nullptr) all += chunk.data();
  return all;
}

std::string without_comment(std::string s) {
  s = s.substr(0, s.find('#'));
  s = s.substr(0, s.find('<'));
  while (!s.empty() && s.back() == ' ') s.pop_back();
  return s;
}

/// Every function of the file, by symbol.
program disassemble(const std::string& file) {
  program all;
  std::istringstream lines(output_of("objdump -d --no-show-raw-insn " + file));
  std::string line;
  std::string name;
  while (std::getline(lines, line)) {
    const auto open = line.find('<');
    if (line.size() > 2 && line.compare(line.size() - 2, 2, ">:") == 0 && open != std::string::npos) {
      name = line.substr(open + 1, line.size() - open - 3);
      continue;
    }
    const auto colon = line.find(":\t");
    if (colon == std::string::npos || name.empty()) continue;
    std::istringstream body(line.substr(colon + 2));
    instruction i;
    i.address = std::stoul(line.substr(0, colon), nullptr, 16);
    body >> i.mnemonic;
    std::getline(body >> std::ws, i.operands);
    if (i.mnemonic == "lock" || i.mnemonic == "rep") {
      i.mnemonic += " " + i.operands.substr(0, i.operands.find(' '));
    }
    i.operands = without_comment(i.operands);
    all[name].push_back(i);
  }
  return all;
}

const program& object() {
  static const program all = disassemble(MMUNOTIFY_SUBJECT);
  return all;
}

/// The shared object, loaded.
class live_subject {
 public:
  live_subject() : handle_(::dlopen(MMUNOTIFY_LIVE_SUBJECT, RTLD_NOW | RTLD_LOCAL)) {
    REQUIRE_MESSAGE(handle_ != nullptr, MMUNOTIFY_LIVE_SUBJECT);
  }
  ~live_subject() { ::dlclose(handle_); }
  live_subject(const live_subject&) = delete;
  live_subject& operator=(const live_subject&) = delete;

  template <class F>
  F* symbol(const char* name) const {
    return reinterpret_cast<F*>(::dlsym(handle_, name));
  }

  /// Its functions as they are in memory now.
  program code() const {
    std::ifstream in(MMUNOTIFY_LIVE_SUBJECT, std::ios::binary);
    std::string image{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    ElfW(Ehdr) head;
    REQUIRE(image.size() > sizeof head);
    std::memcpy(&head, image.data(), sizeof head);
    const link_map* loaded = nullptr;
    REQUIRE(::dlinfo(handle_, RTLD_DI_LINKMAP, &loaded) == 0);
    for (std::size_t i = 0; i < head.e_phnum; ++i) {
      ElfW(Phdr) segment;
      std::memcpy(&segment, image.data() + head.e_phoff + i * sizeof segment, sizeof segment);
      if (segment.p_type != PT_LOAD || (segment.p_flags & PF_X) == 0) continue;
      std::memcpy(image.data() + segment.p_offset, reinterpret_cast<const char*>(loaded->l_addr + segment.p_vaddr),
                  segment.p_filesz);
    }
    const std::string file = MMUNOTIFY_LIVE_SUBJECT ".live";
    std::ofstream(file, std::ios::binary).write(image.data(), static_cast<std::streamsize>(image.size()));
    return disassemble(file);
  }

 private:
  void* handle_;
};

const function& code(const program& all, const std::string& name) {
  const auto found = all.find(name);
  REQUIRE_MESSAGE(found != all.end(), name);
  return found->second;
}
const function& code(const std::string& name) { return code(object(), name); }

bool is_jump(const instruction& i) { return i.mnemonic[0] == 'j'; }
bool is_conditional(const instruction& i) { return is_jump(i) && i.mnemonic != "jmp"; }
bool is_return(const instruction& i) { return i.mnemonic.rfind("ret", 0) == 0; }
bool is_call(const instruction& i) { return i.mnemonic.rfind("call", 0) == 0; }
bool is_padding(const instruction& i) {
  return i.mnemonic.rfind("nop", 0) == 0 || i.mnemonic == "data16" || i.mnemonic == "cs";
}
bool is_locked(const instruction& i) {
  return i.mnemonic.rfind("lock", 0) == 0 || i.mnemonic.rfind("xchg", 0) == 0 ||
         i.mnemonic.find("fence") != std::string::npos;
}
/// A load and compare in one, or a load.
bool loads(const instruction& i) {
  const auto paren = i.operands.find('(');
  if (paren == std::string::npos || i.mnemonic.rfind("lea", 0) == 0 || i.mnemonic == "push") return false;
  const auto last_comma = i.operands.rfind(',');
  const bool compares = i.mnemonic.rfind("cmp", 0) == 0 || i.mnemonic.rfind("test", 0) == 0;
  return compares || (last_comma != std::string::npos && i.operands.rfind(')') < last_comma);
}
bool stores_to_stack(const instruction& i) {
  if (i.mnemonic.rfind("push", 0) == 0) return true;
  const bool moves = i.mnemonic.rfind("mov", 0) == 0;
  return moves && i.operands.size() > 6 &&
         (i.operands.compare(i.operands.size() - 6, 6, "(%rsp)") == 0 ||
          i.operands.compare(i.operands.size() - 6, 6, "(%rbp)") == 0);
}

/// What runs when no conditional branch is taken, padding left out.
function straight_path(const program& all, const std::string& name) {
  const function& f = code(all, name);
  function path;
  std::size_t at = 0;
  while (at < f.size() && path.size() < 1000) {
    const instruction& i = f[at];
    if (i.mnemonic == "jmp") {
      // An unconditional jump stays in the function, or leaves it for good (a tail call).
      unsigned long target = 0;
      std::istringstream(i.operands) >> std::hex >> target;
      const auto there = std::find_if(f.begin(), f.end(), [&](const instruction& x) { return x.address == target; });
      if (there != f.end() && there != f.begin() + static_cast<std::ptrdiff_t>(at)) {
        at = static_cast<std::size_t>(there - f.begin());
        continue;
      }
    }
    if (!is_padding(i)) path.push_back(i);
    if (is_return(i) || i.mnemonic == "jmp") return path;
    ++at;
  }
  FAIL("no end of the straight path of " << name);
  return path;
}

template <class Predicate>
long count(const function& f, Predicate p) {
  return std::count_if(f.begin(), f.end(), p);
}

/// Instructions as text, with branch targets left out.
std::vector<std::string> listing(const function& f) {
  std::vector<std::string> lines;
  for (const auto& i : f) {
    if (!is_padding(i)) lines.push_back(is_jump(i) ? i.mnemonic : i.text());
  }
  return lines;
}

struct added {
  long branches, loads, stack_stores, instructions, calls, locked;
};
added difference(const program& all, const std::string& with, const std::string& bare) {
  const function a = straight_path(all, with);
  const function b = straight_path(all, bare);
  return {count(a, is_conditional) - count(b, is_conditional),
          count(a, loads) - count(b, loads),
          count(a, stores_to_stack) - count(b, stores_to_stack),
          static_cast<long>(a.size()) - static_cast<long>(b.size()),
          count(a, is_call),
          count(a, is_locked)};
}

added difference(const std::string& with, const std::string& bare) { return difference(object(), with, bare); }

/// The place of a static key that is off: test $imm32, %eax, which nothing reads; five bytes.
std::vector<std::size_t> nops(const function& f) {
  std::vector<std::size_t> all;
  for (std::size_t i = 0; i + 1 < f.size(); ++i) {
    const bool is_test = f[i].mnemonic == "test" && f[i].operands.rfind("$0x", 0) == 0 &&
                         f[i].operands.find(",%eax") != std::string::npos;
    if (is_test && f[i + 1].address - f[i].address == 5) all.push_back(i);
  }
  return all;
}

}  // namespace

TEST_CASE("D2: with the disabled policy, the function is instruction for instruction the bare one") {
  CHECK(listing(code("store_disabled")) == listing(code("store_bare")));
  CHECK(listing(code("store_disabled_closure")) == listing(code("store_bare")));
  CHECK(listing(code("loop_disabled")) == listing(code("loop_bare")));
  CHECK(listing(code("young_disabled")) == listing(code("young_bare")));
}

TEST_CASE("D1: disarmed, start and end add a load-compare and a branch each at most, and two stores to the stack") {
  for (const std::string name : {"store_under", "store_under_page", "store_under_plain"}) {
    CAPTURE(name);
    const added a = difference(name, "store_bare");
    CHECK(a.branches >= 1);
    CHECK(a.branches <= 2);
    CHECK(a.loads >= 1);
    CHECK(a.loads <= 2);
    CHECK(a.stack_stores <= 2);
    CHECK(a.calls == 0);
    CHECK(a.locked == 0);
    MESSAGE(name << ": " << a.instructions << " instructions more, " << a.loads << " loads, " << a.branches
                 << " branches, " << a.stack_stores << " stores to the stack");
  }
}

TEST_CASE("D1: disarmed, the closure form adds load, test and branch, and no store") {
  for (const std::string body : {"store", "table"}) {
    const std::string name = body + "_under_closure";
    CAPTURE(name);
    const added a = difference(name, body + "_bare");
    CHECK(a.branches == 1);
    CHECK(a.loads == 1);
    CHECK(a.stack_stores == 0);
    CHECK(a.calls == 0);
    CHECK(a.locked == 0);
    CHECK(a.instructions <= 4);  // one: another choice of register
    MESSAGE(name << ": " << a.instructions << " instructions more");
  }
}

TEST_CASE("D1: disarmed, a young hook is a load, a compare and a branch") {
  const added a = difference("young_under", "young_bare");
  CHECK(a.branches <= 2);
  CHECK(a.loads == 1);
  CHECK(a.calls == 0);
  CHECK(a.locked == 0);
}

TEST_CASE("D1: the armed half lies out of line, in a cold section") {
  std::istringstream symbols(output_of("objdump -t -C " MMUNOTIFY_SUBJECT));
  std::string line;
  int armed = 0;
  while (std::getline(symbols, line)) {
    if (line.find(" F ") == std::string::npos) continue;
    if (line.find("_armed") == std::string::npos) continue;
    ++armed;
    CHECK_MESSAGE(line.find(".text.unlikely") != std::string::npos, line);
  }
  CHECK(armed >= 4);
}

TEST_CASE("D4: while no space of the process is armed, the closure form is one instruction of five bytes") {
  const live_subject subject;
  if (!subject.symbol<bool()>("patched")()) {
    MESSAGE("this system lets no code be changed");
    return;
  }
  const program all = subject.code();
  for (const std::string body : {"store", "table"}) {
    const std::string name = body + "_keyed_closure";
    CAPTURE(name);
    REQUIRE(nops(code(all, name)).size() == 1);
    const added a = difference(all, name, body + "_bare");
    CHECK(a.loads == 0);
    CHECK(a.branches == 0);
    CHECK(a.stack_stores == 0);
    CHECK(a.calls == 0);
    CHECK(a.locked == 0);
    // The instruction itself; and where the end of the range has to be computed, clang does that before it.
    CHECK(a.instructions >= 1);
    CHECK(a.instructions <= (body == "table" ? 1 : 2));
    MESSAGE(name << ": " << a.instructions << " instructions more");
  }
}

TEST_CASE("D4: while no space of the process is armed, the scope form loads nothing, and the young form neither") {
  const live_subject subject;
  if (!subject.symbol<bool()>("patched")()) return;
  const program all = subject.code();
  for (const std::string name : {"store_keyed", "store_keyed_plain", "young_keyed"}) {
    CAPTURE(name);
    CHECK(nops(code(all, name)).size() == 1);
    const added a = difference(all, name, name.substr(0, 5) + "_bare");
    CHECK(a.loads == 0);
    CHECK(a.branches == 0);
    CHECK(a.stack_stores <= 1);
    CHECK(a.calls == 0);
    CHECK(a.locked == 0);
    MESSAGE(name << ": " << a.instructions << " instructions more, " << a.stack_stores << " stores to the stack");
  }
}

TEST_CASE("D4: in the file, and while a space is armed, the instruction is a jump to the load") {
  const std::array<std::string, 4> names{"store_keyed", "store_keyed_closure", "table_keyed_closure", "young_keyed"};
  for (const auto& name : names) CHECK_MESSAGE(nops(code(name)).empty(), name);
  const live_subject subject;
  if (!subject.symbol<bool()>("patched")()) return;
  const program off = subject.code();
  REQUIRE(subject.symbol<bool()>("arm")());
  const program on = subject.code();
  subject.symbol<void()>("disarm")();
  const program off_again = subject.code();
  for (const auto& name : names) {
    CAPTURE(name);
    const auto at = nops(code(off, name));
    REQUIRE(at.size() == 1);
    const instruction& jump = code(on, name)[at[0]];
    CHECK(jump.mnemonic == "jmp");
    CHECK(jump.address == code(off, name)[at[0]].address);
    CHECK(code(on, name).size() == code(off, name).size());
    CHECK(listing(code(off_again, name)) == listing(code(off, name)));
  }
}

TEST_CASE("tracked, disarmed, is two stores more to the thread's own line, no call, no fence") {
  const function path = straight_path(object(), "store_tracked");
  CHECK(count(path, is_call) == 0);
  CHECK(count(path, is_locked) == 0);
}

TEST_CASE("the reader of object code sees what must not pass") {
  CHECK(difference("store_locked", "store_bare").locked == 1);
  CHECK(difference("store_calling", "store_bare").calls == 1);
  CHECK(listing(code("store_under")) != listing(code("store_bare")));
  CHECK(difference("store_tracked", "store_bare").branches > 2);
}
