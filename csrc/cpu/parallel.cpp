#include "cpu/parallel.h"

#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace vtok::cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();

GompParallel gomp_parallel = nullptr;
ThreadNumber gomp_thread_number = nullptr;

struct Region {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  TaskFn fn;
  void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // the first one: an exception must not leave another thread's region

  void run(int thread) noexcept {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        fn(context, task, thread);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next = tasks;
      }
    }
  }
};

void gomp_entry(void* region) { static_cast<Region*>(region)->run(gomp_thread_number()); }

}  // namespace

void parallel_tasks(int64_t tasks, int threads, TaskFn fn, void* context) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  Region region;
  region.tasks = tasks;
  region.fn = fn;
  region.context = context;
  if (threads <= 1) {
    region.run(0);
  } else if (gomp_parallel) {
    gomp_parallel(gomp_entry, &region, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    helpers.reserve(threads - 1);
    try {
      for (int t = 1; t < threads; ++t) helpers.emplace_back([&region, t] { region.run(t); });
    } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
    }
    region.run(0);
    for (auto& helper : helpers) helper.join();
  }
  if (region.failed) std::rethrow_exception(region.error);
}

bool use_openmp_runtime(const char* path) {
#if defined(__linux__)
  void* handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  if (!handle) return false;
  auto parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
  auto number = reinterpret_cast<ThreadNumber>(dlsym(handle, "omp_get_thread_num"));
  if (!parallel || !number) {
    dlclose(handle);
    return false;
  }
  gomp_thread_number = number;  // the handle stays open: the function pointers must stay valid
  gomp_parallel = parallel;
  return true;
#else
  (void)path;
  return false;
#endif
}

const char* threading_runtime() { return gomp_parallel ? "gomp" : "std::thread"; }

}  // namespace vtok::cpu
