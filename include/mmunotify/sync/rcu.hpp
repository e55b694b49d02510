// SPDX-License-Identifier: MIT
#pragma once

// The names of C++26's <rcu> (P2545) over any domain of this library, so that code written for one reads like code for
// the other. Differences, each because a promise asks for it:
//   - domains can be made: std::rcu_domain has no public constructor;
//   - retire returns an errc: a domain may have a bounded backlog, and memory may be exhausted;
//   - sections are basic_read_section, or the domain as a Lockable, std::scoped_lock(domain).

#include <concepts>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include <mmunotify/base/result.hpp>
#include <mmunotify/config.hpp>
#include <mmunotify/sync/srcu_domain.hpp>

MMUNOTIFY_BEGIN_NAMESPACE

/// The domain of whoever does not want one of their own. Never destroyed. Each copy of the library (shared objects with
/// hidden visibility) has its own.
inline srcu_domain& rcu_default_domain() noexcept {
  alignas(srcu_domain) static std::byte memory[sizeof(srcu_domain)];
  static srcu_domain& domain = *new (memory) srcu_domain;
  return domain;
}

/// A base of objects that are freed after a grace period, without allocating for it: struct page : rcu_obj_base<page>.
template <class T, class D = std::default_delete<T>>
class rcu_obj_base : private srcu_head {
 public:
  /// Effects: d(p) once, where p is this object, after a grace period of the domain. Precondition: not retired before
  /// (L6, checked). Returns, progress, context: those of srcu_domain::call.
  template <class Domain = srcu_domain>
  errc retire(D d = D(), Domain& domain = rcu_default_domain()) noexcept {
    if (this->function == nullptr) deleter_ = std::move(d);  // call() reports that it is queued
    return domain.call(*this, [](srcu_head* h) noexcept {
      auto* const self = static_cast<rcu_obj_base*>(h);
      D deleter = std::move(self->deleter_);
      deleter(static_cast<T*>(self));
    });
  }

 protected:
  rcu_obj_base() = default;
  rcu_obj_base(const rcu_obj_base&) noexcept : srcu_head() {}
  rcu_obj_base& operator=(const rcu_obj_base&) noexcept { return *this; }
  ~rcu_obj_base() = default;

 private:
  [[no_unique_address]] D deleter_{};
};

/// Effects: d(p) once, after a grace period. Allocates. Returns: also no_memory; then nothing has happened.
template <class T, class D = std::default_delete<T>, class Domain = srcu_domain>
errc rcu_retire(T* p, D d = D(), Domain& domain = rcu_default_domain()) noexcept {
  struct retired : srcu_head {
    retired(T* q, D&& e) noexcept : object(q), deleter(std::move(e)) {}
    T* object;
    [[no_unique_address]] D deleter;
  };
  auto* const r = new (std::nothrow) retired(p, std::move(d));
  if (r == nullptr) return errc::no_memory;
  const errc e = domain.call(*r, [](srcu_head* h) noexcept {
    const std::unique_ptr<retired> self(static_cast<retired*>(h));
    self->deleter(self->object);
  });
  if (e != errc::ok) delete r;
  return e;
}

/// Effects: waits for a grace period.
template <class Domain = srcu_domain>
void rcu_synchronize(Domain& domain = rcu_default_domain()) noexcept {
  domain.synchronize();
}

/// Effects: waits until everything that was retired before has been freed.
template <class Domain = srcu_domain>
void rcu_barrier(Domain& domain = rcu_default_domain()) noexcept {
  domain.barrier();
}

MMUNOTIFY_END_NAMESPACE
