// The bounded cache of transformed weights. An entry is found by what the weights contain (a 128-bit checksum
// of all their bytes, taken on every call), never by where they lie: writes through .data, swapped or
// reallocated weights cannot make it stale.
//
// When it is full, newcomers are refused until some entry has not been used for kPatience lookups. Evicting
// the least recently used would miss on every call once the layers of a model, used in turn, exceed the bound
// by one entry.
#pragma once
#include <memory>

#include "cpu/causal_conv3d.h"

namespace vtok::cpu {

struct WeightKey {
  uint64_t sum[2] = {};
  DType dtype = DType::f32;
  int64_t size[5] = {}, stride[5] = {};
  int m = 0;
  int panel = 0;                  // layout of the transformed weights
  uint64_t taps = 0;              // temporal taps that were summed
  const void* address = nullptr;  // no part of the identity: tells which entries an update has left behind
};

constexpr int64_t kPatience = 1024;

// A key without its checksum and taps.
WeightKey weight_key(const Tensor& weight, int m, int panel);
void checksum_weights(const Tensor& weight, int threads, uint64_t sum[2]);

bool weight_cache_enabled();
std::shared_ptr<const float> find_weights(const WeightKey& key);  // null where absent
bool weight_cache_has_room(const WeightKey& key, int64_t bytes);  // would `bytes` be admitted now?
void insert_weights(const WeightKey& key, std::shared_ptr<const float> weights, int64_t bytes);
// Whether weights at this address, of this shape, are or could be in the cache; reads no weights, so only a
// guess.
bool weight_cache_expects(const WeightKey& key, int64_t bytes);

}  // namespace vtok::cpu
