// main.cpp: native {sweep | quick | fuzz | threads} [ISA,ISA... | all] [COUNT] [SEED]
//
// COUNT: calls of fuzz or rounds of threads. Exit status 0 when everything held.

#include "layer.h"

int main(int count, char **words) {
  const std::string what = count > 1 ? words[1] : "", isa = count > 2 ? words[2] : "all";
  const long long times = count > 3 ? std::atoll(words[3]) : 0;
  const uint64_t seed = count > 4 ? std::strtoull(words[4], nullptr, 10) : 1;
  const auto wanted = [&isa](const std::string &name) {
    return isa == "all" || ("," + isa + ",").find("," + name + ",") != std::string::npos;
  };
  int ran = 0;
  for (int32_t i = 0; i < deltaops_cpu_isa_count(); ++i) {
    const char *name = deltaops_cpu_isa_name(i);
    if (!wanted(name) || !deltaops_cpu_isa_runs(name)) continue;
    CHECK(deltaops_cpu_set_isa(name) == DELTAOPS_OK, "%s", deltaops_last_error());
    ++ran;
    if (what == "sweep" || what == "quick")
      test::sweep(what == "quick");
    else if (what == "fuzz")
      test::fuzz(seed, times ? times : 500);
    else if (what == "threads")
      test::threads(times ? static_cast<int>(times) : 5);
    else
      CHECK(false, "the first word must be sweep, quick, fuzz or threads, got '%s'", what.c_str());
    std::printf("%s %s ok\n", what.c_str(), name);
  }
  CHECK(ran > 0, "no instruction set called '%s' runs here", isa.c_str());
  return 0;
}
