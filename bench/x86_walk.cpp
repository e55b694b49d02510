// SPDX-License-Identifier: MIT

// What a walk of guest page tables costs beside the loads that it cannot do without.
//
// The baseline is the same descent by hand, for the mode: load, mask, load, and nothing else. No present bit, no
// reserved bits, no rights, no accessed bits; it returns an address. The walker does all of that and returns each entry
// and its place besides. Both read the same tables, which lie in the first-level cache, with accessed and dirty bits
// set already.
//
// Two ways to ask. "after": each address depends on the translation before it, as when a fault or an emulated access is
// waited for; this is what the goal is about. "beside": the addresses are known beforehand, so that the processor
// overlaps walks and what counts is the number of instructions, of which the baseline has few.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include <mmunotify/secondary/x86/control_registers.hpp>
#include <mmunotify/secondary/x86/guest_walker.hpp>

#include "ratios.hpp"

namespace {

using namespace mmunotify;
namespace pte = x86::pte;

constexpr std::uint64_t memory_bytes = 1U << 16;
constexpr std::size_t page_count = 64;  ///< their leaves are half a kilobyte of one table
constexpr std::int64_t batch = 1024;

/// A few tables and nothing around them: reads are unchecked, since what memory costs is not what is measured.
struct flat_memory {
  alignas(4096) std::array<std::byte, memory_bytes> bytes{};

  template <class Entry>
  bool read_entry(gpa where, Entry& value) const noexcept {
    __builtin_memcpy(&value, bytes.data() + where.value, sizeof value);
    return true;
  }
  template <class Entry>
  x86::exchange_result compare_exchange_entry(gpa where, Entry, Entry desired) noexcept {
    __builtin_memcpy(bytes.data() + where.value, &desired, sizeof desired);
    return x86::exchange_result::done;
  }
};

/// Tables of one mode: level l's at l * 0x1000, `page_count` pages behind one last-level table.
template <class Mode>
struct guest {
  using entry = typename Mode::entry_type;
  static constexpr std::uint64_t first_va = Mode::address_bits > 32 ? 0x0000'1234'5600'0000 : 0xc800'0000;

  std::unique_ptr<flat_memory> memory = std::make_unique<flat_memory>();
  x86::walk_context context;
  std::vector<std::uint64_t> addresses;
  std::uint64_t sum = 0;  ///< of the translations of all addresses

  guest() {
    context.cr3 = Mode::levels * 0x1000;
    constexpr std::uint64_t bits = pte::present | pte::writable | pte::user | pte::accessed | pte::dirty;
    for (unsigned l = Mode::levels; l > 1; --l) {
      const bool register_image = Mode::top_in_registers && l == Mode::levels;
      put(l, first_va, std::uint64_t{0x1000} * (l - 1) | (register_image ? pte::present : bits & ~pte::dirty));
    }
    for (std::size_t i = 0; i < page_count; ++i) {
      const std::uint64_t page = i * 29 % page_count, va = first_va + page * page_size + i * 8;
      const std::uint64_t frame = 0x10'0000 + i * 7 * page_size;
      put(1, va, frame | bits);
      addresses.push_back(va);
      sum += frame + i * 8;
    }
    if constexpr (Mode::top_in_registers) static_cast<void>(x86::load_pdptes(*memory, context));
  }

 private:
  void put(unsigned level, std::uint64_t va, std::uint64_t value) {
    memory->compare_exchange_entry(gpa{level * 0x1000 + Mode::index({va}, level) * sizeof(entry)}, entry{},
                                   static_cast<entry>(value));
  }
};

/// The descent by hand.
template <class Mode>
[[gnu::noinline]] std::uint64_t bare(const guest<Mode>& g, std::uint64_t va) {
  using entry = typename Mode::entry_type;
  const std::byte* const m = g.memory->bytes.data();
  const auto load = [m](std::uint64_t at) {
    entry e{};
    __builtin_memcpy(&e, m + at, sizeof e);
    return std::uint64_t{e};
  };
  constexpr std::uint64_t frame = sizeof(entry) == 4 ? 0xffff'f000 : 0x000f'ffff'ffff'f000;
  std::uint64_t e = 0;
  if constexpr (sizeof(entry) == 4) {
    e = load((g.context.cr3 & frame) + (va >> 22 & 0x3ff) * 4) & frame;
    e = load(e + (va >> 12 & 0x3ff) * 4) & frame;
  } else {
    if constexpr (Mode::top_in_registers) {
      e = g.context.pdptes[va >> 30 & 3] & frame;
    } else {
      e = g.context.cr3 & frame;
      if constexpr (Mode::levels == 5) e = load(e + (va >> 48 & 0x1ff) * 8) & frame;
      e = load(e + (va >> 39 & 0x1ff) * 8) & frame;
      e = load(e + (va >> 30 & 0x1ff) * 8) & frame;
    }
    e = load(e + (va >> 21 & 0x1ff) * 8) & frame;
    e = load(e + (va >> 12 & 0x1ff) * 8) & frame;
  }
  return e | (va & 0xfff);
}

/// Delivers the whole result in memory, and the address in a register as the baseline does.
template <class Mode>
[[gnu::noinline]] std::uint64_t walked(const x86::guest_walker<Mode>& w, flat_memory& m, std::uint64_t va,
                                       x86::access how, x86::walk_result& result) {
  return (new (&result) x86::walk_result(w.walk(m, {va}, how)))->address.value;
}

/// f(va) translates. Chained: each address waits for the translation before it, of which the top bits are zero.
template <bool Chained, class Mode, class F>
void measure(benchmark::State& state, const guest<Mode>& g, F f) {
  std::uint64_t sum = 0, last = 0;
  std::int64_t rounds = 0;
  while (state.KeepRunningBatch(batch)) {
    for (std::int64_t round = 0; round < batch; round += page_count) {
      for (const std::uint64_t va : g.addresses) {
        last = f(Chained ? va + (last >> 52) : va);
        sum += last;
      }
    }
    rounds += batch / static_cast<std::int64_t>(page_count);
  }
  if (sum != g.sum * static_cast<std::uint64_t>(rounds)) state.SkipWithError("a translation was wrong");
}

template <bool Chained, class Mode>
void add_walks(const std::string& group) {
  const auto g = std::make_shared<guest<Mode>>();
  ratios::add(group + "/loads_alone", [g](benchmark::State& s) {
    measure<Chained>(s, *g, [&](std::uint64_t va) { return bare<Mode>(*g, va); });
  });
  const auto walk = [g](benchmark::State& s, x86::access how, const x86::walk_context& c) {
    const x86::guest_walker<Mode> walker{c};
    x86::walk_result r{};
    measure<Chained>(s, *g, [&](std::uint64_t va) { return walked<Mode>(walker, *g->memory, va, how, r); });
    if (!r || r.entry_values[0] != r.leaf() || r.unmarked) s.SkipWithError("a result was wrong");
  };
  ratios::add(group + "/read", [=](benchmark::State& s) { walk(s, x86::access::read, g->context); });
  ratios::add(group + "/write", [=](benchmark::State& s) { walk(s, x86::access::write, g->context); });
  ratios::add(group + "/user_write_keys", [=](benchmark::State& s) {
    x86::walk_context c = g->context;
    c.cpl = 3;
    c.smep = c.smap = c.pke = true;
    walk(s, x86::access::write, c);
  });
}

ratios::goal goal_of(const std::string& mode, const std::string& what) {
  return {"a walk after another, " + mode + ", " + what + " / the loads alone", "after/" + mode + "/" + what, 1.3,
          "after/" + mode + "/loads_alone"};
}

}  // namespace

int main(int argc, char** argv) {
  add_walks<true, x86::two_level>("after/two_level");
  add_walks<true, x86::pae>("after/pae");
  add_walks<true, x86::long_mode_4>("after/long_4");
  add_walks<true, x86::long_mode_5>("after/long_5");
  add_walks<false, x86::two_level>("beside/two_level");
  add_walks<false, x86::pae>("beside/pae");
  add_walks<false, x86::long_mode_4>("beside/long_4");
  add_walks<false, x86::long_mode_5>("beside/long_5");
  const int status = ratios::run(argc, argv);
  std::vector<ratios::goal> goals;
  for (const char* mode : {"two_level", "pae", "long_4", "long_5"}) {
    for (const char* what : {"read", "write", "user_write_keys"}) goals.push_back(goal_of(mode, what));
  }
  ratios::print_goals(goals);
  return status;
}
