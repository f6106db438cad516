#include "cpu/token_packing.h"

#include "bindings/caster.h"

void vtok::bind_token_packing(pybind11::module_& m) {
  m.def("router_scores", [](Tensor video, Tensor reconstruction, Tensor scores, int64_t frames, int64_t rows,
                            int64_t columns, int threads) {
    launch([&] { return cpu::router_scores(video, reconstruction, scores, frames, rows, columns, threads); });
  });
  m.def("select_tokens", [](Tensor scores, Tensor budget, Tensor keep, bool strictly, int threads) {
    launch([&] { return cpu::select_tokens(scores, budget, keep, strictly, threads); });
  });
  m.def("count_tokens", [](Tensor mask, Tensor cu_seqlens, int threads) {
    launch([&] { return cpu::count_tokens(mask, cu_seqlens, threads); });
    return static_cast<const int32_t*>(cu_seqlens.data)[mask.size[0]];
  });
  m.def("pack_tokens", [](Tensor tokens, Tensor mask, Tensor values, Tensor indices, int threads) {
    launch([&] { return cpu::pack_tokens(tokens, mask, values, indices, threads); });
  });
  m.def("unpack_tokens", [](Tensor values, Tensor mask, Tensor fill, Tensor dense, int threads) {
    launch([&] { return cpu::unpack_tokens(values, mask, fill, dense, threads); });
  });
}
