// SPDX-License-Identifier: MIT
#include <mmunotify/sync/static_key.hpp>

#include <doctest/doctest.h>

#include <dlfcn.h>
#include <sys/syscall.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <mmunotify/sync/linux/platform.hpp>

#include "support/contract_recorder.hpp"
#include "support/mappings.hpp"
#include "support/sandbox.hpp"
#include "support/threads.hpp"
#include "sync/static_key.hpp"

using namespace mmunotify;

namespace {

using first_key = static_key<"test.first">;
using second_key = static_key<"test.second">;

[[gnu::noinline]] bool first_is_on() { return first_key::test(); }
[[gnu::noinline]] bool first_may_be_on() { return first_key::maybe(); }
[[gnu::noinline]] bool second_is_on() { return second_key::test(); }

/// The first byte of each site of a key in this executable.
std::vector<const std::uint8_t*> sites_of(const std::string& name) {
  std::vector<const std::uint8_t*> all;
  for (const auto* e = __start_mmunotify_sites; e != __stop_mmunotify_sites; ++e) {
    if (e->key().name == name && e->site() != nullptr) all.push_back(e->site());
  }
  return all;
}
bool all_are(const std::vector<const std::uint8_t*>& sites, std::uint8_t byte) {
  for (const auto* s : sites) {
    if (*static_cast<const volatile std::uint8_t*>(s) != byte) return false;
  }
  return true;
}

bool live() {
  const key_patching_state state = key_patching();
  if (!state.live) MESSAGE("tests are loads: " << std::string(state.sentence));
  return state.live;
}

}  // namespace

TEST_CASE("a key is off at first; enable and disable nest and count") {
  CHECK_FALSE(first_is_on());
  CHECK_FALSE(first_key::enabled());
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 3; ++i) {
      CHECK(first_key::enable() == errc::ok);
      CHECK(first_is_on());
      CHECK(first_may_be_on());
      CHECK(first_key::enabled());
    }
    CHECK_FALSE(second_is_on());  // another key
    for (int i = 0; i < 3; ++i) {
      CHECK(first_is_on());
      first_key::disable();
    }
    CHECK_FALSE(first_is_on());
    CHECK_FALSE(first_key::enabled());
  }
}

TEST_CASE("disabling more often than enabling is reported, and changes nothing") {
  const contract_recorder recorder;
  first_key::disable();
  CHECK(recorder.rules() == std::vector<std::string>{"D4"});
  CHECK(recorder.sentence().find("test.first") != std::string::npos);
  CHECK_FALSE(first_is_on());
  CHECK(first_key::enable() == errc::ok);
  CHECK(first_is_on());
  first_key::disable();
  CHECK_FALSE(first_is_on());
}

TEST_CASE("where code is patched, a test of a key that is off is a no-op of five bytes, and else a jump") {
  if (!live()) return;
  const auto sites = sites_of("test.first");
  REQUIRE(sites.size() >= 2);
  CHECK(all_are(sites, 0xa9));
  CHECK_FALSE(first_may_be_on());
  REQUIRE(first_key::enable() == errc::ok);
  CHECK(all_are(sites, 0xe9));
  first_key::disable();
  CHECK(all_are(sites, 0xa9));
}

TEST_CASE("a key is one key in all translation units, and in inline functions of both") {
  CHECK_FALSE(shared_key_inline());
  CHECK_FALSE(shared_key_elsewhere());
  CHECK(enable_shared_key_elsewhere() == errc::ok);
  CHECK(shared_key_inline());
  CHECK(shared_key_inline_elsewhere());
  CHECK(shared_key_elsewhere());
  CHECK(shared_key::test());
  CHECK(shared_key::enable() == errc::ok);
  disable_shared_key_elsewhere();
  CHECK(shared_key_elsewhere());
  shared_key::disable();
  CHECK_FALSE(shared_key_inline());
  CHECK_FALSE(shared_key_inline_elsewhere());
  CHECK_FALSE(shared_key_elsewhere());
}

namespace {

/// What the flipping thread promises at the moment: 4 n + 1 on, 4 n + 3 off, even: between the two.
std::atomic<std::uint64_t> promise{3};

/// Threads that run through tests until they are told to stop, and compare each answer with the promise.
class runners {
 public:
  explicit runners(int count, bool (*test)()) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this, test] { run(test); });
  }
  /// Returns: how many answers were wrong.
  std::uint64_t finish() {
    stop_.store(true, std::memory_order_relaxed);
    for (auto& t : threads_) t.join();
    threads_.clear();
    return wrong_.load();
  }
  std::uint64_t checked() const { return checked_.load(); }

 private:
  void run(bool (*test)()) {
    std::uint64_t checked = 0;
    std::uint64_t wrong = 0;
    while (!stop_.load(std::memory_order_relaxed)) {
      const std::uint64_t before = promise.load(std::memory_order_acquire);
      const bool answer = test();
      const std::uint64_t after = promise.load(std::memory_order_acquire);
      if (before != after || before % 2 == 0) continue;
      ++checked;
      if (answer != (before % 4 == 1)) ++wrong;
    }
    checked_.fetch_add(checked);
    wrong_.fetch_add(wrong);
  }

  std::atomic<bool> stop_{false};
  std::atomic<std::uint64_t> checked_{0};
  std::atomic<std::uint64_t> wrong_{0};
  std::vector<std::thread> threads_;
};

void next_promise() { promise.fetch_add(1, std::memory_order_release); }

/// On and off again, keeping each promise for a moment, which is sometimes long.
template <class Key>
void flip(int round) {
  const auto keep = [round] {
    if (round % 64 == 0) std::this_thread::yield();
    for (int i = 0; i < round % 64; ++i) linux_platform::relax();
  };
  next_promise();
  REQUIRE(Key::enable() == errc::ok);
  next_promise();
  keep();
  next_promise();
  Key::disable();
  next_promise();
  keep();
}

}  // namespace

TEST_CASE("D4: threads run through a test while it flips 10 000 times, and each answer is right") {
  promise.store(3);
  std::atomic<int> writable_code{0};
  int writable_before = 0;
  for (const auto& m : mappings()) writable_before += is_writable_code(m) ? 1 : 0;
  std::atomic<bool> stop{false};
  std::uint64_t looks = 0;
  std::thread watcher([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      int writable = 0;
      for (const auto& m : mappings()) writable += is_writable_code(m) ? 1 : 0;
      if (writable > writable_before) writable_code.fetch_add(1);
      ++looks;
    }
  });
  runners first(2, &first_is_on);
  for (int i = 0; i < 5000; ++i) flip<first_key>(i);
  CHECK(first.finish() == 0);
  stop.store(true);
  watcher.join();
  CHECK(first.checked() > 0);
  CHECK(looks > 0);
  // No page is writable and executable at any moment. (Valgrind, where nothing is patched, has such pages of its own.)
  if (live()) CHECK(writable_code.load() == 0);
  CHECK_FALSE(first_is_on());
  for (const auto* s : sites_of("test.first")) CHECK(mapping_of(s).permissions.substr(0, 3) == "r-x");
}

TEST_CASE("two threads that enable and disable a key never see it off in between") {
  std::atomic<int> wrong{0};
  std::array<std::thread, 2> threads;
  for (auto& t : threads) {
    t = std::thread([&] {
      for (int i = 0; i < 2000; ++i) {
        if (second_key::enable() != errc::ok || !second_is_on()) wrong.fetch_add(1);
        second_key::disable();
      }
    });
  }
  for (auto& t : threads) t.join();
  CHECK(wrong.load() == 0);
  CHECK_FALSE(second_is_on());
}

TEST_CASE("a child that was forked flips its own code, not its parent's") {
  const int status = in_child([] {
    if (first_key::enable() != errc::ok || !first_is_on()) return 1;
    return 0;  // and leaves it on
  });
  CHECK(status == 0);
  CHECK_FALSE(first_is_on());
  CHECK_FALSE(first_key::enabled());
  CHECK(first_key::enable() == errc::ok);
  CHECK(first_is_on());
  first_key::disable();
}

// --- Shared objects. ------------------------------------------------------------------------------------------------

namespace {

class loaded {
 public:
  explicit loaded(const char* path) : path_(path), handle_(::dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    REQUIRE_MESSAGE(handle_ != nullptr, path);
  }
  ~loaded() {
    ::dlclose(handle_);
    // Really gone, or nothing is shown. (Sanitizers keep what they have seen.)
    WARN(::dlopen(path_, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD) == nullptr);
  }
  loaded(const loaded&) = delete;
  loaded& operator=(const loaded&) = delete;

  const static_key_plugin& operator*() const {
    return *static_cast<const static_key_plugin*>(::dlsym(handle_, "plugin"));
  }
  const static_key_plugin* operator->() const { return &**this; }

 private:
  const char* path_;
  void* handle_;
};

const char* const plugins[] = {MMUNOTIFY_PLUGINS};

}  // namespace

TEST_CASE("a shared object with hidden symbols and a scope of its own tests the same key") {
  for (const char* path : plugins) {
    CAPTURE(path);
    {
      const loaded plugin(path);
      CHECK(plugin->patching().live == key_patching().live);
      CHECK_FALSE(plugin->first_seen());
      CHECK_FALSE(plugin->test());
      CHECK(plugin->maybe() == !key_patching().live);
      CHECK(shared_key::enable() == errc::ok);
      CHECK(plugin->test());
      CHECK(plugin->maybe());
      CHECK(plugin->enable());
      shared_key::disable();
      CHECK(shared_key_inline());
      CHECK(plugin->test());
      plugin->disable();
      CHECK_FALSE(shared_key_inline());
      CHECK_FALSE(plugin->test());
    }
    REQUIRE(shared_key::enable() == errc::ok);  // with the plugin's sites gone
    CHECK(shared_key_inline());
    {
      const loaded plugin(path);
      CHECK(plugin->first_seen());  // it comes while the key is on
      CHECK(plugin->test());
    }
    shared_key::disable();
    CHECK_FALSE(shared_key_inline());
  }
}

TEST_CASE("shared objects of several compilers come and go while the key flips, and each answer is right") {
  promise.store(3);
  std::atomic<bool> stop{false};
  std::atomic<int> wrong{0};
  std::atomic<int> loads{0};
  std::thread loader([&] {
    while (!stop.load(std::memory_order_relaxed)) {
      std::vector<std::unique_ptr<loaded>> all;
      for (const char* path : plugins) {
        all.push_back(std::make_unique<loaded>(path));
        loads.fetch_add(1, std::memory_order_release);
        for (int i = 0; i < 50; ++i) {
          for (const auto& plugin : all) {
            const std::uint64_t before = promise.load(std::memory_order_acquire);
            const bool answer = (*plugin)->test();
            if (before == promise.load(std::memory_order_acquire) && before % 2 == 1 && answer != (before % 4 == 1)) {
              wrong.fetch_add(1);
            }
          }
        }
      }
    }
  });
  runners here(1, &shared_key_inline_elsewhere);
  for (int i = 0; loads.load(std::memory_order_acquire) < 300; ++i) flip<shared_key>(i);
  CHECK(here.finish() == 0);
  stop.store(true);
  loader.join();
  CHECK(wrong.load() == 0);
}

// --- Systems that refuse. -------------------------------------------------------------------------------------------

TEST_CASE("tests are loads" * doctest::skip()) {  // run by the next case where the system refuses
  CHECK_FALSE(key_patching().live);
  CHECK(std::string(key_patching().sentence).size() > 10);
  CHECK(all_are(sites_of("test.first"), 0xe9));
  CHECK_FALSE(first_is_on());
  CHECK(first_may_be_on());
  promise.store(3);
  runners first(2, &first_is_on);
  for (int i = 0; i < 1000; ++i) flip<first_key>(i);
  CHECK(first.finish() == 0);
  for (const char* path : plugins) {
    const loaded plugin(path);
    CHECK_FALSE(plugin->test());
    CHECK(plugin->enable());
    CHECK(shared_key_inline());
    plugin->disable();
    CHECK_FALSE(shared_key_inline());
  }
}

TEST_CASE("a system that refuses gets loads instead, and everything else is the same") {
  if (!live()) return;
  for (const long call : {long{SYS_membarrier}, long{SYS_pwrite64}}) {
    CAPTURE(call);
    const int status = again_without(call, "-tc=tests are loads");
    if (status == no_sandbox) {
      MESSAGE("no seccomp here");
    } else {
      CHECK(status == 0);
    }
  }
}

TEST_CASE("a system that withdraws its grant makes enable fail, and the key stays off; a key that is on stays on") {
  if (!live()) return;
  for (const long call : {long{SYS_membarrier}, long{SYS_pwrite64}}) {
    CAPTURE(call);
    const int status = in_child([call] {
      if (second_key::enable() != errc::ok) return 1;
      if (!deny(call)) return no_sandbox;
      if (first_key::enable() != errc::refused_by_system) return 2;
      if (first_is_on() || first_key::enabled()) return 3;
      if (!second_is_on() || second_key::enable() != errc::ok) return 4;
      second_key::disable();
      if (!second_is_on()) return 5;
      second_key::disable();
      if (second_is_on()) return 6;
      return 0;
    });
    if (status == no_sandbox) {
      MESSAGE("no seccomp here");
    } else {
      CHECK(status == 0);
    }
  }
}

// --- The registry, over text that is written down. -----------------------------------------------------------------

namespace {

/// Text whose changes are logged, and refused at a chosen call.
struct logged_text {
  static inline std::vector<std::string> log{};
  static inline int refuse_at = -1;  ///< the call that fails, counted from 0; -1: none
  static inline int calls = 0;
  static inline const char* unprepared = nullptr;
  static inline bool executes_stale_code = false;
  static inline std::atomic<std::uint64_t>* watched = nullptr;

  static void reset() {
    log.clear();
    refuse_at = -1;
    calls = 0;
    unprepared = nullptr;
    executes_stale_code = false;
  }
  static bool note(std::string what) {
    if (watched != nullptr) what += watched->load() != 0 ? " on" : " off";
    log.push_back(what);
    return calls++ != refuse_at;
  }
  static const char* prepare() noexcept { return unprepared; }
  static bool synchronize() noexcept { return note("barrier"); }
  struct writer {
    bool store(const std::uint8_t* at, std::uint8_t value) noexcept {
      if (!note(value == 0xe9 ? "jump" : "no-op")) return false;
      *const_cast<std::uint8_t*>(at) = value;
      return true;
    }
  };
};

/// A module made of bytes: the site of a probe, two of one key, one of another.
struct byte_module {
  std::array<std::uint8_t, 4> code{0xe9, 0xe9, 0xe9, 0xe9};
  detail::key_copy probe{"probe", {1}};
  detail::key_copy key{"key"};
  detail::key_copy other{"other"};
  std::array<detail::key_entry, 4> entries{};
  detail::key_module module{};
  static inline byte_module* probed = nullptr;

  byte_module() {
    const std::array<detail::key_copy*, 4> keys{&probe, &key, &other, &key};
    const auto distance = [](const void* from, const void* to) {
      return static_cast<std::int32_t>(static_cast<const char*>(to) - static_cast<const char*>(from));
    };
    for (std::size_t i = 0; i < code.size(); ++i) {
      entries[i] = {distance(&entries[i].code, &code[i]), distance(&entries[i].copy, keys[i])};
    }
    module.first = entries.data();
    module.last = entries.data() + entries.size();
    module.probe_copy = &probe;
    module.probe = [] { return logged_text::executes_stale_code || probed->code[0] == 0xe9; };
    probed = this;
    logged_text::reset();
    logged_text::watched = &key.count;
  }
  ~byte_module() { logged_text::watched = nullptr; }
  byte_module(const byte_module&) = delete;
  byte_module& operator=(const byte_module&) = delete;

  using bytes = std::array<std::uint8_t, 4>;
};

using log_type = std::vector<std::string>;
using logged_registry = detail::key_registry<logged_text>;
constexpr std::uint8_t jump = 0xe9;
constexpr std::uint8_t nop = 0xa9;

}  // namespace

TEST_CASE("T1, T2, T3: no-op only while the count is 0, count up after the barrier, no-op after the barrier") {
  logged_registry registry;
  byte_module m;
  registry.join(m.module);
  CHECK(m.module.refusal == nullptr);
  CHECK(m.code == byte_module::bytes{jump, nop, nop, nop});
  logged_text::log.clear();
  REQUIRE(registry.enable(m.key, m.module) == errc::ok);
  CHECK(logged_text::log == log_type{"jump off", "jump off", "barrier off"});
  CHECK(m.code == byte_module::bytes{jump, jump, nop, jump});
  CHECK(m.key.count.load() == 1);
  logged_text::log.clear();
  REQUIRE(registry.enable(m.key, m.module) == errc::ok);
  CHECK(registry.disable(m.key, m.module));
  CHECK(logged_text::log.empty());
  CHECK(registry.disable(m.key, m.module));
  CHECK(logged_text::log == log_type{"barrier off", "no-op off", "no-op off"});
  CHECK(m.code == byte_module::bytes{jump, nop, nop, nop});
  CHECK_FALSE(registry.disable(m.key, m.module));
}

TEST_CASE("a refusal at any call leaves a key that is off, or one that is on, and never a no-op of a key that is on") {
  for (int at = 0; at < 12; ++at) {
    CAPTURE(at);
    logged_registry registry;
    byte_module m;
    logged_text::refuse_at = at;
    registry.join(m.module);
    for (int round = 0; round < 3; ++round) {
      const errc e = registry.enable(m.key, m.module);
      CHECK((e == errc::ok || e == errc::refused_by_system));
      CHECK((m.key.count.load() != 0) == (e == errc::ok));
      if (e == errc::ok) {
        CHECK((m.code[1] == jump && m.code[3] == jump));
        CHECK(registry.disable(m.key, m.module));
      }
      CHECK(m.key.count.load() == 0);
    }
  }
}

TEST_CASE("a failed barrier is made up for by the next enable, though every site is a jump already") {
  logged_registry registry;
  byte_module m;
  registry.join(m.module);
  logged_text::log.clear();
  logged_text::calls = 0;
  logged_text::refuse_at = 2;
  REQUIRE(registry.enable(m.key, m.module) == errc::refused_by_system);
  logged_text::log.clear();
  REQUIRE(registry.enable(m.key, m.module) == errc::ok);
  CHECK(logged_text::log == log_type{"barrier off"});
}

TEST_CASE("a module is refused with a sentence: no barrier, no write, a write that is not executed") {
  const auto refusal = [](auto prepare) {
    logged_registry registry;
    byte_module m;
    prepare(m);
    registry.join(m.module);
    CHECK(m.code == byte_module::bytes{jump, jump, jump, jump});
    CHECK(registry.enable(m.key, m.module) == errc::ok);  // loads
    CHECK(m.key.count.load() == 1);
    return std::string(m.module.refusal == nullptr ? "" : m.module.refusal);
  };
  CHECK(refusal([](byte_module&) { logged_text::unprepared = "no barrier"; }) == "no barrier");
  CHECK(refusal([](byte_module&) { logged_text::refuse_at = 0; }).find("no write") != std::string::npos);
  CHECK(refusal([](byte_module&) { logged_text::executes_stale_code = true; }).find("not what is executed") !=
        std::string::npos);
  CHECK(refusal([](byte_module& m) { m.module.probe_copy = nullptr; }).find("lost") != std::string::npos);
}

TEST_CASE("a module that leaves has jumps again; one that comes learns what is on") {
  logged_registry registry;
  byte_module first;
  registry.join(first.module);
  REQUIRE(registry.enable(first.key, first.module) == errc::ok);
  byte_module second;
  registry.join(second.module);
  CHECK(second.key.count.load() == 1);
  CHECK(second.other.count.load() == 0);
  CHECK(second.code == byte_module::bytes{jump, jump, nop, jump});
  CHECK(registry.disable(second.key, second.module));  // one key
  CHECK(first.key.count.load() == 0);
  CHECK(second.code == byte_module::bytes{jump, nop, nop, nop});
  registry.leave(second.module);
  registry.leave(second.module);
  CHECK(second.code == byte_module::bytes{jump, jump, jump, jump});
  CHECK(first.code == byte_module::bytes{jump, nop, nop, nop});
  REQUIRE(registry.enable(first.key, first.module) == errc::ok);
  CHECK(second.key.count.load() == 0);  // it hears of nothing any more
}
