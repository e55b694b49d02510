// SPDX-License-Identifier: MIT

#include <doctest/doctest.h>

#include <cstdint>

#include <mmunotify/secondary/x86/access.hpp>

using namespace mmunotify;
using how = x86::access;

namespace {

constexpr how all[] = {how::read, how::write, how::fetch, how::implicit_read, how::implicit_write};

constexpr bool by_itself(how a) { return a == how::implicit_read || a == how::implicit_write; }
constexpr bool writes(how a) { return a == how::write || a == how::implicit_write; }

}  // namespace

TEST_CASE("the rights that forbid an access are those of the manual, for every setting") {
  unsigned wrong = 0;
  for (unsigned v = 0; v < 128; ++v) {
    x86::walk_context c;
    c.wp = (v & 1) != 0;
    c.smep = (v & 2) != 0;
    c.smap = (v & 4) != 0;
    c.ac = (v & 8) != 0;
    c.cpl = v >> 4 & 3;
    for (const how a : all) {
      for (std::uint8_t bits = 0; bits < 8; ++bits) {
        const x86::rights r{bits};
        const bool fetch = a == how::fetch, supervisor = c.cpl < 3 || by_itself(a);
        bool allowed = true;
        if (!supervisor && !r.user()) allowed = false;
        if (writes(a) && !r.writable() && (!supervisor || c.wp)) allowed = false;
        if (fetch && !r.executable()) allowed = false;
        if (fetch && supervisor && r.user() && c.smep) allowed = false;
        if (!fetch && supervisor && r.user() && c.smap && (by_itself(a) || !c.ac)) allowed = false;
        wrong += x86::contains(x86::forbidden_rights(c, a), r) == allowed ? 1 : 0;
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("the keys that forbid an access are those of the manual, PKRU's for user pages and PKRS's for the others") {
  unsigned wrong = 0;
  for (unsigned v = 0; v < 64; ++v) {
    for (unsigned key = 0; key < 16; ++key) {
      for (unsigned rights = 0; rights < 4; ++rights) {
        x86::walk_context c;
        c.pke = (v & 1) != 0;
        c.pks = (v & 2) != 0;
        c.wp = (v & 4) != 0;
        c.cpl = (v & 8) != 0 ? 3 : 0;
        const bool user_page = (v & 16) != 0, others_forbidden = (v & 32) != 0;
        const std::uint32_t others = others_forbidden ? ~(3U << 2 * key) : 0;
        (user_page ? c.pkru : c.pkrs) = others | rights << 2 * key;
        (user_page ? c.pkrs : c.pkru) = 0xffffffff;
        for (const how a : all) {
          const bool in_force = user_page ? c.pke : c.pks, supervisor = c.cpl == 0 || by_itself(a);
          const bool by_ad = (rights & 1) != 0, by_wd = (rights & 2) != 0 && writes(a) && (!supervisor || c.wp);
          const bool expected = in_force && a != how::fetch && (by_ad || by_wd);
          const bool found = (x86::forbidden_keys(c, a, user_page) >> 2 * key & 1) != 0;
          wrong += found == expected ? 0 : 1;
        }
      }
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("an implicit access is a supervisor's at every privilege level") {
  x86::walk_context c;
  for (c.cpl = 0; c.cpl < 4; ++c.cpl) {
    for (const how a : all) CHECK(x86::is_user(a, c) == (c.cpl == 3 && !by_itself(a)));
  }
}
