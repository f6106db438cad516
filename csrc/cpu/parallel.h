// Threads for the CPU kernels. They are torch's own OpenMP threads wherever torch brought a GNU OpenMP
// runtime: a second pool would fight with it, because idle OpenMP threads spin for a while after each region.
// Without one, plain std::threads.
#pragma once
#include <cstdint>

namespace vtok::cpu {

using TaskFn = void (*)(void* context, int64_t task, int thread);

// Calls fn(context, task, thread) once for each task in [0, tasks), tasks handed out in order to at most
// `threads` threads; `thread` is in [0, threads) and no two calls with the same `thread` overlap. Returns
// when all are done; what a call throws is rethrown then, and the tasks not yet begun are left out.
void parallel_tasks(int64_t tasks, int threads, TaskFn fn, void* context);

// The same for a callable: parallel_for(n, threads, [&](int64_t task, int thread) { ... }).
template <class F>
void parallel_for(int64_t tasks, int threads, F&& body) {
  parallel_tasks(
      tasks, threads,
      [](void* context, int64_t task, int thread) { (*static_cast<F*>(context))(task, thread); }, &body);
}

// Uses the GNU OpenMP runtime that is already loaded from `path`. False if that file is not loaded or is
// not such a runtime.
bool use_openmp_runtime(const char* path);
const char* threading_runtime();  // "gomp" or "std::thread"

}  // namespace vtok::cpu
