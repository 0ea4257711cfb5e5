// team.cpp: csrc/cpu/team.h's team made of std::thread, for ThreadSanitizer.
//
// GCC's libgomp waits on futexes that ThreadSanitizer cannot see, so under it every OpenMP barrier
// looks like a race and real races drown. Here threads meet at a mutex and a condition, which it
// follows exactly; what runs between the barriers is the core's own code. In a file of its own, so
// that no template of the standard library is compiled with an ISA file's flags.

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace deltaops {
namespace {

struct Meeting {
  std::mutex mutex;
  std::condition_variable all_here;
  int size = 1, waiting = 0;
  long round = 0;

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const long mine = round;
    if (++waiting == size) {
      waiting = 0;
      ++round;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return round != mine; });
    }
  }
};

thread_local Meeting *meeting = nullptr;

}  // namespace

void test_team(int threads, void (*body)(const void *, int), const void *context) {
  Meeting here;
  here.size = threads;
  const auto run = [&](int self) {
    meeting = &here;
    body(context, self);
    meeting = nullptr;
  };
  std::vector<std::thread> others;
  for (int self = 1; self < threads; ++self) others.emplace_back(run, self);
  run(0);
  for (std::thread &other : others) other.join();
}

void test_barrier() { meeting->wait(); }

}  // namespace deltaops
