#include "cpu/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vtok::cpu {
namespace {

// bytes; smaller blocks come from the heap, whose pages are there already
constexpr int64_t kWorthAsking = 4 << 20;
constexpr uintptr_t kPage = 4096;

}  // namespace

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kWorthAsking) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#else
  (void)data, (void)bytes;
#endif
}

void advise_huge_pages(const Tensor& output) {
  int64_t last = 0;
  for (int i = 0; i < output.rank; ++i) last += (output.size[i] - 1) * output.stride[i];
  advise_huge_pages(output.data, (last + 1) * element_size(output.dtype));
}

}  // namespace vtok::cpu
