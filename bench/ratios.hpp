// SPDX-License-Identifier: MIT
#pragma once

// Reports ratios, not figures: the machines are shared and noisy, and only what was measured in the same run,
// interleaved, may be compared.
//
// A bench names its cases "group/variant"; the first variant of a group is its baseline. Repetitions of all cases are
// interleaved at random; the table gives each case's median, its spread, and the median of its ratio to the baseline.
// A case that finds its own answer wrong calls SkipWithError; then the program says so and fails.

#include <algorithm>
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
      const std::string name = r.run_name.function_name;
      if (times_.find(name) == times_.end()) order_.push_back(name);
      times_[name].push_back(r.threads > 1 ? r.GetAdjustedRealTime() : r.GetAdjustedCPUTime());
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
      const auto& t = times_.at(name);
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
      if (times_.count(n) != 0) found.push_back(n);
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
  std::map<std::string, std::vector<double>> times_;
  bool failed_ = false;
};

/// Registers a case; the order of the calls is the order of the table.
template <class F>
benchmark::internal::Benchmark* add(const std::string& name, F f) {
  reporter::registered().push_back(name);
  return benchmark::RegisterBenchmark(name.c_str(), f);
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
