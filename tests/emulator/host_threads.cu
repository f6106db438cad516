// Host code of launch.cuh between threads: for test_host_state.py. Both threads launch one kernel with different
// amounts of shared memory, and neither launches before the other has done what it does about permission.
#include <condition_variable>
#include <mutex>
#include <thread>

#include "cuda/device.h"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.cuh"
#include "tensor.h"

namespace vtok::cuda {
namespace {

template <bool kExact>  // two kernels, for a grant outlives a test
__global__ void fill(int* out, int value) {
  if (threadIdx.x == 0) ptx::st_global(out, value);
}

}  // namespace

// `exact`: grants what each launch needs, as a launcher must not.
Status two_threads(const Tensor& out, int small, int large, bool exact, Queue queue) {
  std::mutex mutex;
  std::condition_variable changed;
  int granted = 0;
  emu::after_attribute = [&] {
    std::unique_lock<std::mutex> lock(mutex);
    ++granted;
    changed.notify_all();
    // one grant serves both threads where it is given once
    changed.wait_for(lock, std::chrono::milliseconds(exact ? 5000 : 100), [&] { return granted == 2; });
  };
  Status results[2];
  auto run = [&](int i, int bytes) {
    results[i] = use(queue);
    if (results[i].ok() && exact) {
      if (i == 1) {  // the large one first, then the small one takes it back
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait_for(lock, std::chrono::seconds(5), [&] { return granted == 1; });
      }
      results[i] =
          status_of(cudaFuncSetAttribute(fill<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "");
      cudaLaunchConfig_t config = {dim3(1), dim3(32), size_t(bytes), nullptr, nullptr, 0};
      if (results[i].ok())
        results[i] =
            status_of(cudaLaunchKernelEx(&config, fill<true>, static_cast<int*>(out.data) + i, i + 1), "");
      return;
    }
    if (results[i].ok())
      results[i] = VTOK_LAUNCH(fill<false>, dim3(1), dim3(32), size_t(bytes), nullptr,
                               static_cast<int*>(out.data) + i, i + 1);
  };
  std::thread first(run, 0, large), second(run, 1, small);
  first.join();
  second.join();
  emu::after_attribute = nullptr;
  return results[0].ok() ? results[1] : results[0];
}

// One launch by the calling thread.
Status one_launch(const Tensor& out, Queue queue) {
  VTOK_RETURN_IF_ERROR(use(queue));
  return VTOK_LAUNCH(fill<false>, dim3(1), dim3(32), 60 << 10, nullptr, static_cast<int*>(out.data), 1);
}

// A tensor map encoded by a fresh thread, with or without use().
Status cold_encode(const Tensor& t, bool with_device, Queue queue) {
  Status result;
  std::thread([&] {
    if (with_device && !(result = use(queue)).ok()) return;
    TensorMap map;
    result = encode(map, t.data, {DType::f32, 2, {8, 4}, {4, 32}, {8, 4}, {1, 1}, 32});
  }).join();
  return result;
}

}  // namespace vtok::cuda
