// wgmma: products of a warpgroup.
#include "sm90.h"

namespace emu {
namespace {

// A tile in shared memory by its descriptor, of rows (of M or N) by 32 bytes of k; in chunks of 16 bytes, which
// are 8 or 16 of k, or 8 rows where it is transposed: elements of two bytes then.
struct Tile {
  // bytes; a chunk's place follows from them as the PTX manual's canonical layouts say
  uint32_t start, lead, stride;
  uint32_t width;  // of a swizzled line
  bool transposed;

  Tile(const Operand& operand, const Where& where) : transposed(operand.transposed) {
    const uint64_t descriptor = operand.descriptor;
    const int swizzle = int(descriptor >> 62);
    if (swizzle == 0) fail("wgmma: the emulator knows swizzled tiles only", where);
    width = 256 >> swizzle;
    start = uint32_t(descriptor & 0x3fff) << 4;
    lead = uint32_t(descriptor >> 16 & 0x3fff) << 4;
    stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 49 & 7) fail("wgmma: the emulator knows base offset 0 only", where);
    if ((start - start % width) % (8 * width))
      fail("wgmma: a tile swizzled over " + std::to_string(width) + " bytes must start at a multiple of " +
               std::to_string(8 * width),
           where);
  }
  // k innermost: lines of one row, 8 rows to the next by `stride`. Transposed: lines of one k, 8 of k to the
  // next by `stride`, and a line's rows to the next ones by `lead`. `k` in units of two bytes.
  uint32_t chunk(int row, int k) const {
    const int line = width / 2;  // elements
    const uint32_t address = transposed
                                 ? start + row / line * lead + k / 8 * stride + k % 8 * width + row % line * 2
                                 : start + row / 8 * stride + row % 8 * width + k * 2;
    return address ^ (address >> 3 & (width - 16));
  }
};

// The value of element `at` behind `from`.
float element_at(const void* from, int at, const Element& element) {
  uint16_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(from) + at * element.bytes, element.bytes);
  return element.value(bits);
}

// values[row * depth + k], with a depth of 32 bytes. A warp reads its 16 rows of the left operand, each warp all
// of the right one.
std::vector<float> read_tile(const Tile& tile, int rows, const Element& element, int group, bool all_warps,
                             const Where& where) {
  const int depth = 32 / element.bytes;
  std::vector<float> values(rows * depth);
  const Event event{wgmma_agent(group), warpgroups[group].groups + 1, where};
  const int rows_of_chunk = tile.transposed ? 8 : 1, k_of_chunk = tile.transposed ? 1 : 8;
  for (int row = 0; row < rows; row += rows_of_chunk)
    for (int k = 0; k < 16; k += k_of_chunk) {
      const uint32_t place = check_shared(tile.chunk(row, k), 16, 16, "wgmma", where);
      for (int warp = all_warps ? 0 : row / 16; warp < (all_warps ? 4 : row / 16 + 1); ++warp)
        record_read(place, 16, event, "wgmma", where, cluster.threads[128 * group + 32 * warp], true);
      for (int i = 0; i < 16 / element.bytes; ++i)
        values[tile.transposed ? (row + i) * depth + k : row * depth + k * 2 / element.bytes + i] =
            element_at(shared_bytes(place), i, element);
    }
  return values;
}

// The left operand from registers: as that of mma_m16n8k16, or m16n8k32, for each warp's 16 rows. A register
// has the elements of four bytes of k.
template <class Offers>
std::vector<float> read_registers(const Offers& offers, const Element& element) {
  const int depth = 32 / element.bytes, wide = 4 / element.bytes;
  std::vector<float> values(64 * depth);
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < wide; ++e) {
        const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i % 2),
                  k = wide * (t % 4) + depth / 2 * (i / 2) + e;
        values[row * depth + k] = element_at(&offers[t]->a.registers[i], e, element);
      }
  return values;
}

bool same(const Fragment& f) { return !std::memcmp(f.seen, f.a, sizeof f.seen); }

// Registers of the left operand must be as they were at the last fence, and stay so until the product is
// waited for.
void check_fragment(const uint32_t* a, uint32_t group, const Where& where) {
  auto& known = state().fragments;
  auto own = std::find_if(known.begin(), known.end(), [&](const Fragment& x) { return x.a == a; });
  if (own == known.end()) {
    known.push_back({a, {}, 0, true});
    own = known.end() - 1;
  } else if (!same(*own)) {
    fail(own->landed
             ? "wgmma: registers of the left operand changed since the last wgmma_fence"
             : "wgmma: registers of the left operand changed before the product has read them: no wgmma_wait",
         where);
  }
  own->group = group;
  own->landed = false;
  std::memcpy(own->seen, a, sizeof own->seen);
}

}  // namespace

// Whatever their values: a load that brings the same ones is as wrong.
void sm90_overwrites(const uint32_t* registers, int count, const char* what, const Where& where) {
  if (config.capability != 90) return;
  for (const Fragment& f : state().fragments)
    if (!f.landed && registers < f.a + 4 && f.a < registers + count)
      fail(std::string(what) + ": into registers that a product under way still reads: no wgmma_wait", where);
}

void wgmma_fence(const Where& where) {
  warpgroup("wgmma_fence", 0, where, [](Warpgroup&, int**) {});
  state().fenced = true;
  for (Accumulator& a : state().accumulators)
    if (a.landed) a.seen.assign(a.d, a.d + a.value.size());
  for (Fragment& f : state().fragments)
    if (f.landed) std::memcpy(f.seen, f.a, sizeof f.seen);
}

void wgmma_commit(const Where& where) {
  warpgroup("wgmma_commit", 0, where, [](Warpgroup& group, int**) { ++group.groups; });
}

void wgmma_wait(uint32_t left, const Where& where) {
  warpgroup("wgmma_wait", 0, where, [](Warpgroup&, int**) {});
  const uint32_t groups = warpgroups[self->id / 128].groups;
  if (groups < left) return;
  const uint32_t up_to = groups - left;
  for (Accumulator& a : state().accumulators) {
    if (a.landed || a.group > up_to) continue;
    std::copy(a.value.begin(), a.value.end(), a.d);
    a.seen = a.value;
    a.landed = true;
  }
  for (Fragment& f : state().fragments) {
    if (f.landed || f.group > up_to) continue;
    if (!same(f)) fail("wgmma: registers of the left operand changed before wgmma_wait", where);
    f.landed = true;
  }
  uint32_t& clock = self->clock[wgmma_agent(self->id / 128)];
  clock = std::max(clock, up_to);
}

void wgmma(float* d, int n, Operand a, Operand b, bool accumulate, Element element, const Where& where) {
  struct Offer {
    float* d;
    Operand a, b;
    bool accumulate;
  };
  need_sm90("wgmma", where);
  if (!state().fenced) fail("wgmma: no wgmma_fence before the first product", where);
  auto& known = state().accumulators;
  auto own = std::find_if(known.begin(), known.end(), [&](const Accumulator& x) { return x.d == d; });
  if (own == known.end()) {
    known.push_back({d, {}, std::vector<float>(d, d + n / 2), 0, true});
    own = known.end() - 1;
  }
  if (own->landed) {
    if (accumulate && std::memcmp(own->seen.data(), d, n / 2 * sizeof(float)))
      fail("wgmma: registers changed since the last wgmma_fence", where);
    own->value.assign(d, d + n / 2);
  }
  const int group_number = self->id / 128;
  if (a.registers) check_fragment(a.registers, warpgroups[group_number].groups + 1, where);
  warpgroup("wgmma", Offer{d, a, b, accumulate}, where, [&](Warpgroup& group, Offer** offers) {
    for (int i = 0; i < 128; ++i)
      if (offers[i]->a.descriptor != a.descriptor || offers[i]->b.descriptor != b.descriptor ||
          offers[i]->accumulate != accumulate)
        fail("wgmma: threads have different descriptors", where);
    const int depth = 32 / element.bytes;
    const auto left = a.registers ? read_registers(offers, element)
                                  : read_tile(Tile(a, where), 64, element, group_number, false, where);
    const auto right = read_tile(Tile(b, where), n, element, group_number, true, where);
    for (int t = 0; t < 128; ++t) {
      auto& all = states[128 * group_number + t].accumulators;
      Accumulator& to =
          *std::find_if(all.begin(), all.end(), [&](const Accumulator& x) { return x.d == offers[t]->d; });
      to.value.resize(n / 2);
      for (int i = 0; i < n / 2; ++i) {
        const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2),
                  column = 8 * (i / 4) + 2 * (t % 4) + i % 2;
        float sum = accumulate ? to.value[i] : 0;
        for (int k = 0; k < depth; ++k) sum += left[row * depth + k] * right[column * depth + k];
        to.value[i] = sum;
      }
      to.group = group.groups + 1;
      to.landed = false;
      std::fill(to.d, to.d + n / 2, NAN);  // until they are waited for
    }
  });
}

}  // namespace emu
