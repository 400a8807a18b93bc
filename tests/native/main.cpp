// Fuzzes the CPU kernel tables against each other, without Python; and, where an op of theirs is named, the kernels of
// a GPU, which is emulated. Exits with 0 when they agree, 1 when they do not or a sanitizer reports, 2 when it was
// called wrongly.
//
//   fuzz_kernels --calls N [--seed S] [--op NAME] [--first CASE]   at least N kernel calls
//   fuzz_kernels --self-test                                       plants mistakes, and expects to find each of them
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fuzz.h"

namespace pyfinetune {

#if defined(__x86_64__)
namespace avx2 { extern const KernelTable table; }
namespace avx512 { extern const KernelTable table; }
namespace avx512_bf16 { extern const KernelTable table; }
#endif

namespace fuzz {
namespace {

const Op* const kOps[] = {&kNf4,  &kLoraLinear, &kVarlenAttn,         &kRmsNorm, &kGlu,
                          &kRope, &kLoraThin,   &kLinearCrossEntropy, &kGpuNf4,  &kGpuLoraLinear};

constexpr int kDifference = 1, kUsage = 2, kReport = 3;  // exit codes; kReport is a sanitizer's

struct Options {
  int64_t calls = 100000;
  uint64_t seed = 1;
  int64_t first = 0;
  std::string op;
  bool self_test = false;
};

int usage(const char* problem) {
  std::fprintf(
      stderr, "%s\nusage: fuzz_kernels [--calls N] [--seed S] [--op NAME] [--first CASE] | --self-test\nops:", problem);
  for (const Op* op : kOps) std::fprintf(stderr, " %s", op->name);
  std::fprintf(stderr, "\n");
  return kUsage;
}

bool parse(int argc, char** argv, Options* options) {
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--self-test") {
      options->self_test = true;
      continue;
    }
    if (i + 1 >= argc) return false;
    const char* value = argv[++i];
    char* end = nullptr;
    const uint64_t number = std::strtoull(value, &end, 10);
    if (name == "--op") {
      options->op = value;
      continue;
    }
    if (end == value || *end) return false;
    if (name == "--calls")
      options->calls = int64_t(number);
    else if (name == "--seed")
      options->seed = number;
    else if (name == "--first")
      options->first = int64_t(number);
    else
      return false;
  }
  return true;
}

// The tables that this machine can run; the scalar one first, as the others are held to it.
std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables = {&scalar::table};
#if defined(__x86_64__)
  const KernelTable* const vectors[] = {&avx2::table, &avx512::table, &avx512_bf16::table};
  for (const KernelTable* table : vectors)
    for (const char* const* name = runnable_isas(); *name; ++name)
      if (std::strcmp(*name, table->name) == 0) tables.push_back(table);
#endif
  return tables;
}

// A case's draws depend on the seed, the op and the number alone, so that any case can be drawn again by itself.
Random random_of(uint64_t seed, const char* op, int64_t number) {
  uint64_t state = seed;
  for (const char* p = op; *p; ++p) state = Random(state + uint64_t(*p)).bits();
  return Random(Random(state).bits() + uint64_t(number));
}

void run_case(const Op& op, uint64_t seed, int64_t number, const std::vector<const KernelTable*>& tables,
              Tallies& tallies) {
  position.op = op.name;
  position.seed = seed;
  position.number = number;
  Random random = random_of(seed, op.name, number);
  Case c(random, tables, tallies);
  op.kernels[size_t(random.below(int64_t(op.kernels.size())))](c);
}

int64_t total(const Tallies& tallies) {
  int64_t calls = 0;
  for (const auto& tally : tallies) calls += tally.second;
  return calls;
}

int fuzz(const std::vector<const Op*>& ops, const Options& options) {
  const auto tables = runnable_tables();
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  Tallies tallies;
  double told = 0;
  try {
    std::vector<int64_t> next(ops.size(), options.first);
    for (size_t i = 0; total(tallies) < options.calls; i = (i + 1) % ops.size()) {
      for (int n = 0; n < ops[i]->share && total(tallies) < options.calls; ++n)
        run_case(*ops[i], options.seed, next[i]++, ops[i]->tables.empty() ? tables : ops[i]->tables, tallies);
      if (seconds() < told + 10) continue;
      told = seconds();
      std::printf("%lld of %lld calls, %.0f s\n", ll(total(tallies)), ll(options.calls), told);
      std::fflush(stdout);
    }
  } catch (const Difference& difference) {
    std::printf("DIFFERENCE: %s\n", difference.what.c_str());
    print_position();
    return kDifference;
  }
  for (const auto& tally : tallies)
    std::printf("%-22s %-12s %9lld calls\n", tally.first.first.c_str(), tally.first.second.c_str(), ll(tally.second));
  std::printf("%lld calls, seed %llu, %.0f s: no difference\n", ll(total(tallies)),
              static_cast<unsigned long long>(options.seed), seconds());
  return 0;
}

// The exit code of a process that fuzzes an op whose second table has the fault.
int run_with(const Op& op, const Fault& fault) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    if (!std::freopen("/dev/null", "w", stdout) || !std::freopen("/dev/null", "w", stderr)) _exit(kUsage);
    KernelTable broken = scalar::table;
    fault.plant(broken);
    Tallies tallies;
    try {
      const int64_t cases = op.tables.empty() ? 20000 : 500;
      for (int64_t i = 0; i < cases; ++i) run_case(op, 1, i, {&scalar::table, &broken}, tallies);
    } catch (const Difference&) {
      _exit(kDifference);
    }
    _exit(0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

int self_test(const std::vector<const Op*>& ops) {
  int missed = 0, planted = 0;
  for (const Op* op : ops)
    for (const Fault& fault : op->faults) {
#if !defined(__SANITIZE_ADDRESS__)
      if (fault.by_sanitizer) continue;
#endif
      const int code = run_with(*op, fault), wanted = fault.by_sanitizer ? kReport : kDifference;
      ++planted;
      if (code == wanted) continue;
      ++missed;
      std::printf("NOT FOUND: %s: %s (exit code %d, needs %d)\n", op->name, fault.name, code, wanted);
    }
  std::printf("self-test: %d of %d planted faults found\n", planted - missed, planted);
  return missed == 0 ? 0 : kDifference;
}

int main_with(int argc, char** argv) {
  Options options;
  if (!parse(argc, argv, &options)) return usage("unknown or incomplete option");
  std::vector<const Op*> ops;
  for (const Op* op : kOps)
    if (options.op == op->name || (options.op.empty() && (options.self_test || op->tables.empty()))) ops.push_back(op);
  if (ops.empty()) return usage("no such op");
  std::signal(SIGABRT, [](int) {
    print_position();
    _exit(kReport);
  });
  return options.self_test ? self_test(ops) : fuzz(ops, options);
}

}  // namespace
}  // namespace fuzz
}  // namespace pyfinetune

// Both sanitizers end a process that they report about by SIGABRT, so that it can say what it was doing. Kernels allocate
// nothing: there is no leak to look for, and looking needs a right that containers withhold.
extern "C" const char* __asan_default_options() { return "abort_on_error=1:detect_leaks=0"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }

int main(int argc, char** argv) { return pyfinetune::fuzz::main_with(argc, argv); }
