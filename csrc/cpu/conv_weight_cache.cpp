#include "cpu/conv_weight_cache.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd/conv_winograd.h"

namespace vtok::cpu {
namespace {

struct Entry {
  WeightKey key;
  std::shared_ptr<const float> weights;
  int64_t bytes, last_use;
};

struct Cache {
  std::mutex mutex;
  std::vector<Entry> entries;
  int64_t bytes = 0, bound = 0, hits = 0, misses = 0, clock = 0;

  void erase(size_t i) {
    bytes -= entries[i].bytes;
    entries[i] = std::move(entries.back());
    entries.pop_back();
  }
};

Cache& cache() {
  static Cache* instance = new Cache;  // never destroyed: threads may still convolve while the process exits
  return *instance;
}

bool same_layout(const WeightKey& a, const WeightKey& b) {
  return a.dtype == b.dtype && a.m == b.m && a.panel == b.panel && std::equal(a.size, a.size + 5, b.size) &&
         std::equal(a.stride, a.stride + 5, b.stride);
}
bool same_content(const WeightKey& a, const WeightKey& b) {
  return a.sum[0] == b.sum[0] && a.sum[1] == b.sum[1];
}
bool same(const WeightKey& a, const WeightKey& b) {
  return same_content(a, b) && a.taps == b.taps && same_layout(a, b);
}

// Unused for long, or what these very weights were before they changed.
bool dispensable(const Cache& c, const Entry& e, const WeightKey& newcomer) {
  return c.clock - e.last_use > kPatience || (e.key.address == newcomer.address &&
                                              same_layout(e.key, newcomer) && !same_content(e.key, newcomer));
}

bool has_room(const Cache& c, const WeightKey& key, int64_t bytes) {
  int64_t free = c.bound - c.bytes;
  for (const Entry& e : c.entries)
    if (dispensable(c, e, key)) free += e.bytes;
  return bytes <= free;
}

}  // namespace

WeightKey weight_key(const Tensor& weight, int m, int panel) {
  WeightKey key;
  key.dtype = weight.dtype;
  key.m = m;
  key.panel = panel;
  key.address = weight.data;
  std::copy(weight.size, weight.size + 5, key.size);
  std::copy(weight.stride, weight.stride + 5, key.stride);
  return key;
}

void checksum_weights(const Tensor& w, int threads, uint64_t sum[2]) {
  constexpr int64_t kSegment = 1 << 20;
  int64_t span = 1;
  for (int i = 0; i < 5; ++i) span += (w.size[i] - 1) * w.stride[i];
  const int64_t element = element_size(w.dtype);
  const char* data = static_cast<const char*>(w.data);
  std::vector<char> packed;
  int64_t bytes = span * element;
  if (span != w.numel()) {  // holes or overlaps: only the elements themselves count
    packed.reserve(w.numel() * element);
    for (int64_t o = 0; o < w.size[0]; ++o)
      for (int64_t c = 0; c < w.size[1]; ++c)
        for (int64_t t = 0; t < w.size[2]; ++t)
          for (int64_t i = 0; i < w.size[3]; ++i)
            for (int64_t j = 0; j < w.size[4]; ++j) {
              const char* at = data + element * (o * w.stride[0] + c * w.stride[1] + t * w.stride[2] +
                                                 i * w.stride[3] + j * w.stride[4]);
              packed.insert(packed.end(), at, at + element);
            }
    data = packed.data();
    bytes = int64_t(packed.size());
  }
  const int64_t segments = (bytes + kSegment - 1) / kSegment;
  std::vector<uint64_t> sums(2 * segments);
  parallel_for(segments, threads, [&](int64_t i, int) {
    const int64_t begin = i * kSegment;
    VTOK_DISPATCH(checksum(data + begin, std::min(kSegment, bytes - begin), &sums[2 * i]));
  });
  VTOK_DISPATCH(checksum(sums.data(), int64_t(sums.size() * sizeof(uint64_t)), sum));
}

bool weight_cache_enabled() {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  return c.bound > 0;
}

std::shared_ptr<const float> find_weights(const WeightKey& key) {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  ++c.clock;
  for (Entry& e : c.entries)
    if (same(e.key, key)) {
      ++c.hits;
      e.last_use = c.clock;
      e.key.address = key.address;
      return e.weights;
    }
  ++c.misses;
  return nullptr;
}

bool weight_cache_has_room(const WeightKey& key, int64_t bytes) {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  return has_room(c, key, bytes);
}

void insert_weights(const WeightKey& key, std::shared_ptr<const float> weights, int64_t bytes) {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  if (!has_room(c, key, bytes)) return;
  for (const Entry& e : c.entries)
    if (same(e.key, key)) return;  // another thread was first
  // What an update left behind goes at once; other dispensable entries only as far as room is needed.
  for (size_t i = c.entries.size(); i-- > 0;)
    if (dispensable(c, c.entries[i], key) &&
        (c.entries[i].key.address == key.address || c.bytes + bytes > c.bound))
      c.erase(i);
  c.entries.push_back({key, std::move(weights), bytes, c.clock});
  c.bytes += bytes;
}

bool weight_cache_expects(const WeightKey& key, int64_t bytes) {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  for (const Entry& e : c.entries)
    if (e.key.address == key.address && same_layout(e.key, key)) return true;
  return has_room(c, key, bytes);
}

void set_weight_cache(int64_t bytes) {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  c.bound = std::max<int64_t>(bytes, 0);
  while (c.bytes > c.bound) {
    auto oldest = std::min_element(c.entries.begin(), c.entries.end(),
                                   [](const Entry& a, const Entry& b) { return a.last_use < b.last_use; });
    c.erase(size_t(oldest - c.entries.begin()));
  }
}

void clear_weight_cache() {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  c.entries.clear();
  c.bytes = c.hits = c.misses = 0;
}

WeightCacheStats weight_cache_stats() {
  Cache& c = cache();
  std::lock_guard<std::mutex> lock(c.mutex);
  return {c.bytes, c.bound, int64_t(c.entries.size()), c.hits, c.misses};
}

}  // namespace vtok::cpu
