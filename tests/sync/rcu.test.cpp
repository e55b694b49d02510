// SPDX-License-Identifier: MIT
#include <mmunotify/sync/rcu.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

#include "support/contract_recorder.hpp"
#include "support/domains.hpp"

using namespace mmunotify;

namespace {

int destroyed = 0;  // written by the worker, read after a barrier

struct page : rcu_obj_base<page> {
  ~page() { ++destroyed; }
};

struct recycler {
  int* recycled = nullptr;
  template <class T>
  void operator()(T* p) const {
    ++*recycled;
    delete p;
  }
};

struct recycled_page : rcu_obj_base<recycled_page, recycler> {
  int number = 0;
};

}  // namespace

TEST_CASE("S4: what was retired before a barrier has been freed when it returns, once") {
  destroyed = 0;
  auto* const p = new page;
  {
    const std::scoped_lock section(rcu_default_domain());
    CHECK(p->retire() == errc::ok);
    CHECK(destroyed == 0);
  }
  rcu_barrier();
  CHECK(destroyed == 1);
  CHECK(rcu_retire(new page) == errc::ok);
  rcu_barrier();
  CHECK(destroyed == 2);
  rcu_synchronize();
}

TEST_CASE_TEMPLATE("retire takes a deleter and a domain of any kind", Domain, MMUNOTIFY_ALL_DOMAINS) {
  Domain domain;
  int recycled = 0;
  CHECK((new recycled_page)->retire(recycler{&recycled}, domain) == errc::ok);
  CHECK(rcu_retire(new int(1), recycler{&recycled}, domain) == errc::ok);
  CHECK(rcu_retire(
            new int(1), [&](int* q) { recycler{&recycled}(q); }, domain) == errc::ok);
  rcu_barrier(domain);
  CHECK(recycled == 3);
  rcu_synchronize(domain);
}

TEST_CASE("L6: an object that is retired twice is reported, and freed once") {
  const contract_recorder recorder;
  destroyed = 0;
  srcu_domain domain;
  auto* const p = new page;
  {
    const read_section s(domain);
    CHECK(p->retire({}, domain) == errc::ok);
    CHECK(p->retire({}, domain) == errc::already_registered);
  }
  rcu_barrier(domain);
  CHECK(destroyed == 1);
  CHECK(recorder.rules() == std::vector<std::string>{"L6"});
}

TEST_CASE("a full backlog and a failed allocation change nothing") {
  destroyed = 0;
  srcu_domain domain(srcu_options{.max_backlog = 1});
  auto first = std::make_unique<page>();
  auto second = std::make_unique<page>();
  {
    const read_section s(domain);
    CHECK(first->retire({}, domain) == errc::ok);
    static_cast<void>(first.release());
    CHECK(second->retire({}, domain) == errc::again);
    CHECK(rcu_retire(second.get(), std::default_delete<page>{}, domain) == errc::again);
  }
  rcu_barrier(domain);
  CHECK(destroyed == 1);
  second.reset();
  CHECK(destroyed == 2);
}

TEST_CASE("a copy of an object is not retired with it") {
  static_assert(std::is_copy_constructible_v<recycled_page>);
  srcu_domain domain;
  int recycled = 0;
  auto* const p = new recycled_page;
  p->number = 7;
  std::unique_ptr<recycled_page> copy;
  {
    const read_section s(domain);
    CHECK(p->retire(recycler{&recycled}, domain) == errc::ok);
    copy = std::make_unique<recycled_page>(*p);
  }
  rcu_barrier(domain);
  CHECK(recycled == 1);
  CHECK(copy->number == 7);
  CHECK(copy.release()->retire(recycler{&recycled}, domain) == errc::ok);
  rcu_barrier(domain);
  CHECK(recycled == 2);
}
