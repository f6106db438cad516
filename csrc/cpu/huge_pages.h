// A fresh tensor of tens of megabytes costs a page fault for every 4 KiB, which can take longer than the
// kernel that fills it. Where the system gives huge pages on request, asking for them before the first write
// makes that 512 times fewer.
#pragma once
#include "tensor.h"

namespace vtok::cpu {

void advise_huge_pages(void* data, int64_t bytes);
void advise_huge_pages(const Tensor& output);

}  // namespace vtok::cpu
