// SPDX-License-Identifier: MIT

#include <mmunotify/config.hpp>

#include <doctest/doctest.h>

#include <string>
#include <thread>
#include <type_traits>

namespace {

struct recorded {
  int calls = 0;
  std::string rule;
  std::string function;
  std::string sentence;
};

recorded last;  // written by the handler, which runs on the thread that broke the contract

void record(const mmunotify::contract_violation& v) noexcept {
  ++last.calls;
  last.rule = v.rule;
  last.function = v.function;
  last.sentence = v.sentence;
}

void ignore(const mmunotify::contract_violation&) noexcept {}

/// Installs a handler for a scope.
class handled {
 public:
  explicit handled(mmunotify::contract_handler h) : before_(mmunotify::set_contract_handler(h)) { last = {}; }
  ~handled() { mmunotify::set_contract_handler(before_); }
  handled(const handled&) = delete;
  handled& operator=(const handled&) = delete;

 private:
  mmunotify::contract_handler before_;
};

}  // namespace

TEST_CASE("a violation reaches the handler with its rule, its function and a formatted sentence") {
  const handled scope{&record};
  mmunotify::detail::violated("L7", "address_space::unregister", "%d brackets are open in %s", 3, "the space");
  CHECK(last.calls == 1);
  CHECK(last.rule == "L7");
  CHECK(last.function == "address_space::unregister");
  CHECK(last.sentence == "3 brackets are open in the space");
}

TEST_CASE("a sentence without values is passed on as it is") {
  const handled scope{&record};
  mmunotify::detail::violated("D1", "f", "100% of it");
  CHECK(last.sentence == "100% of it");
}

TEST_CASE("a sentence that is too long is cut and stays terminated") {
  const handled scope{&record};
  const std::string text(1000, 'x');
  mmunotify::detail::violated("D1", "f", "%s", text.c_str());
  CHECK(last.sentence == std::string(255, 'x'));
  mmunotify::detail::violated("D1", "f", text.c_str());
  CHECK(last.sentence == std::string(255, 'x'));
}

TEST_CASE("installing a handler returns the one before, and null brings the default back") {
  const mmunotify::contract_handler original = mmunotify::set_contract_handler(&record);
  CHECK((mmunotify::set_contract_handler(&ignore) == &record));
  CHECK((mmunotify::set_contract_handler(nullptr) == &ignore));
  CHECK((mmunotify::set_contract_handler(original) == &mmunotify::detail::print_and_abort));
}

TEST_CASE("a handler installed on one thread serves violations on another") {
  const handled scope{&record};
  std::thread{[] { mmunotify::detail::violated("P1", "elsewhere", "seen"); }}.join();
  CHECK(last.calls == 1);
  CHECK(last.sentence == "seen");
}

TEST_CASE("exactly one mutation is active in a mutated build, and none in the product") {
  using mmunotify::detail::mutated;
  using mmunotify::detail::mutation;
  CHECK(mutated(static_cast<mutation>(MMUNOTIFY_MUTATION)));
  int active = 0;
  for (const mutation m : {mutation::no_retry_check, mutation::unlink_before_release, mutation::no_grace_period,
                           mutation::start_after_change}) {
    active += mutated(m) ? 1 : 0;
  }
  CHECK(active == (MMUNOTIFY_MUTATION == 0 ? 0 : 1));
}

TEST_CASE("the switches have a value") {
  CHECK((MMUNOTIFY_CHECKED == 0 || MMUNOTIFY_CHECKED == 1));
  CHECK((MMUNOTIFY_TSAN == 0 || MMUNOTIFY_TSAN == 1));
#ifdef NDEBUG
  CHECK(MMUNOTIFY_CHECKED == 0);
#else
  CHECK(MMUNOTIFY_CHECKED == 1);
#endif
}

TEST_CASE("the checked and the fast library have different names for the linker") {
#if MMUNOTIFY_MUTATION
  using mmunotify::mutant::contract_violation;
#elif MMUNOTIFY_CHECKED
  using mmunotify::checked::contract_violation;
#else
  using mmunotify::fast::contract_violation;
#endif
  CHECK(std::is_same_v<contract_violation, mmunotify::contract_violation>);
}

TEST_CASE("the version is three small numbers") {
  CHECK(MMUNOTIFY_VERSION_MAJOR >= 0);
  CHECK(MMUNOTIFY_VERSION_MINOR >= 0);
  CHECK(MMUNOTIFY_VERSION_PATCH >= 0);
}
