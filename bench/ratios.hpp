// SPDX-License-Identifier: MIT
#pragma once

// Reports ratios, not figures: the machines are shared and noisy, and only what was measured in the same run,
// interleaved, may be compared.
//
// A bench names its cases "group/variant"; the first variant of a group is its baseline. Repetitions of all cases are
// interleaved at random; the table gives each case's median, its spread, and the ratio of its median to the baseline's.
// A case that finds its own answer wrong calls SkipWithError; then the program says so and fails.
//
// Times are the CPU time of the thread, which does not count what others take away; a case that waits asks for
// UseRealTime(). With several threads both are per operation of one thread.
//
// A bench may state goals: a case's median, or its ratio to another case of the same run, and what it should not
// exceed. They are printed after the table. A goal that is missed is not a failure: the machine may be busy or another.

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <map>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include <benchmark/benchmark.h>

namespace ratios {

inline double median(std::vector<double> v) {
  if (v.empty()) return 0;
  std::sort(v.begin(), v.end());
  return v.size() % 2 == 1 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}

/// Every figure of this run: the times of the cases in ns, and what figure() added.
inline std::map<std::string, std::vector<double>>& figures() {
  static std::map<std::string, std::vector<double>> all;
  return all;
}

class reporter : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }

  void ReportRuns(const std::vector<Run>& runs) override {
    for (const Run& r : runs) {
      if (r.error_occurred) {
        std::printf("WRONG ANSWER in %s: %s\n", r.benchmark_name().c_str(), r.error_message.c_str());
        failed_ = true;
        continue;
      }
      if (r.run_type != Run::RT_Iteration) continue;
      const std::string& name = r.run_name.function_name;
      if (figures().find(name) == figures().end()) order_.push_back(name);
      figures()[name].push_back(time_of(r));
    }
  }

  void Finalize() override {
    std::printf("%-44s %10s %21s %8s\n", "case", "median ns", "min .. max", "ratio");
    std::string group;
    double baseline = 0;
    auto names = sorted();
    std::stable_sort(names.begin(), names.end(),
                     [&](const std::string& a, const std::string& b) { return group_rank(a) < group_rank(b); });
    for (const std::string& name : names) {
      const auto& t = figures().at(name);
      const std::string g = name.substr(0, name.rfind('/'));
      if (g != group) {
        group = g;
        baseline = median(t);
        std::printf("\n");
      }
      std::printf("%-44s %10.2f %9.2f .. %9.2f %8.3f\n", name.c_str(), median(t), *std::min_element(t.begin(), t.end()),
                  *std::max_element(t.begin(), t.end()), baseline > 0 ? median(t) / baseline : 0.0);
    }
    std::fflush(stdout);
  }

  bool failed() const { return failed_; }

 private:
  /// The library divides by the operations of all threads: the CPU time, a sum, as it should, and the real time too.
  static double time_of(const Run& r) {
    const bool real = !r.run_name.time_type.empty();
    return real ? r.GetAdjustedRealTime() * static_cast<double>(r.threads) : r.GetAdjustedCPUTime();
  }

  /// The place of the first case of the name's group.
  static std::size_t group_rank(const std::string& name) {
    const std::string group = name.substr(0, name.rfind('/') + 1);
    const auto& all = registered();
    return static_cast<std::size_t>(
        std::find_if(all.begin(), all.end(), [&](const std::string& n) { return n.rfind(group, 0) == 0; }) -
        all.begin());
  }

  /// Groups in the order in which they were registered, whatever the interleaving did.
  std::vector<std::string> sorted() const {
    std::vector<std::string> names = registered();
    std::vector<std::string> found;
    for (const auto& n : names) {
      if (figures().count(n) != 0) found.push_back(n);
    }
    for (const auto& n : order_) {
      if (std::find(found.begin(), found.end(), n) == found.end()) found.push_back(n);
    }
    return found;
  }

 public:
  static std::vector<std::string>& registered() {
    static std::vector<std::string> names;
    return names;
  }

 private:
  std::vector<std::string> order_;
  bool failed_ = false;
};

/// Registers a case; the order of the calls is the order of the table.
template <class F>
benchmark::internal::Benchmark* add(const std::string& name, F f) {
  reporter::registered().push_back(name);
  return benchmark::RegisterBenchmark(name.c_str(), f);
}

/// Adds a figure that is not a time, for goals.
inline void figure(const std::string& name, double value) { figures()[name] = {value}; }

/// What a bench hopes for.
struct goal {
  std::string sentence;
  std::string name;         ///< a case or figure
  double limit;             ///< of its median, or of the ratio
  std::string relative_to;  ///< the case that the ratio is to; empty: none

  /// Prints one line.
  void print() const {
    const auto found = figures().find(name);
    const auto base = figures().find(relative_to);
    const bool measured = found != figures().end() && (relative_to.empty() || base != figures().end());
    if (!measured) {
      std::printf("%-72s %10s %10.2f  not measured\n", sentence.c_str(), "-", limit);
      return;
    }
    const double value = median(found->second) / (relative_to.empty() ? 1 : median(base->second));
    std::printf("%-72s %10.2f %10.2f  %s\n", sentence.c_str(), value, limit, value <= limit ? "ok" : "missed");
  }
};

inline void print_goals(const std::vector<goal>& goals) {
  std::printf("\n%-72s %10s %10s\n", "goal", "figure", "at most");
  for (const goal& g : goals) g.print();
  std::fflush(stdout);
}

/// Runs everything that was added. Returns: the program's exit status.
inline int run(int argc, char** argv) {
  std::vector<std::string> arguments(argv, argv + argc);
  const auto given = [&](std::string_view flag) {
    return std::any_of(arguments.begin(), arguments.end(), [&](const std::string& a) { return a.rfind(flag, 0) == 0; });
  };
  if (!given("--benchmark_repetitions")) arguments.emplace_back("--benchmark_repetitions=21");
  if (!given("--benchmark_min_time")) arguments.emplace_back("--benchmark_min_time=0.02");
  arguments.emplace_back("--benchmark_enable_random_interleaving=true");
  std::vector<char*> raw;
  for (std::string& a : arguments) raw.push_back(a.data());
  int count = static_cast<int>(raw.size());
  benchmark::Initialize(&count, raw.data());
  if (benchmark::ReportUnrecognizedArguments(count, raw.data())) return 2;
  reporter r;
  if (benchmark::RunSpecifiedBenchmarks(&r) == 0) {
    std::fprintf(stderr, "no case matches the filter\n");
    return 2;
  }
  return r.failed() ? 1 : 0;
}

}  // namespace ratios
