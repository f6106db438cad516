// TMA: boxes of a tensor between global and shared memory.
#include "sm90.h"

namespace emu {
namespace {

constexpr uint64_t kMagic = 0x564f5443544d4150;

// Calls part(place, global address or null where it is out of bounds, bytes) for all of a box.
template <class Part>
void each_part(const TensorMap& map, uint32_t place, const int* at, Part part) {
  uint32_t count[5], index[5] = {}, elements = 1;
  for (int i = 0; i < map.rank; ++i) {
    count[i] = (map.box[i] + map.step[i] - 1) / map.step[i];
    elements *= count[i];
  }
  for (uint32_t done = 0; done < elements;) {
    const char* from = map.base;
    bool inside = true;
    for (int i = 0; i < map.rank; ++i) {
      const int64_t coordinate = int64_t(at[i]) + int64_t(index[i]) * map.step[i];
      inside = inside && coordinate >= 0 && coordinate < int64_t(map.size[i]);
      from += coordinate * int64_t(map.stride[i]);
    }
    // 16 bytes at once where they are neighbors, all of them inside.
    const uint32_t wide = 16 / map.element, here = place + done * map.element;
    const int64_t first = int64_t(at[0]) + index[0];
    const bool together = map.step[0] == 1 && here % 16 == 0 && index[0] + wide <= count[0] &&
                          first + wide <= int64_t(map.size[0]);
    const uint32_t taken = together ? wide : 1;
    part(map.swizzle ? here ^ (here >> 3 & (map.swizzle - 16)) : here, inside ? from : nullptr,
         taken * map.element);
    done += taken;
    index[0] += taken;
    for (int i = 0; i < map.rank && index[i] == count[i]; ++i)
      if (index[i] = 0; i + 1 < map.rank) ++index[i + 1];
  }
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element;
  for (int i = 0; i < map.rank; ++i) bytes *= (map.box[i] + map.step[i] - 1) / map.step[i];
  return bytes;
}

uint32_t check_tma(const TensorMap* map, uint32_t smem, int rank, const char* what, const Where& where) {
  need_sm90(what, where);
  if (map->magic != kMagic) fail(std::string(what) + ": this is not a tensor map", where);
  if (map->rank != rank)
    fail(std::string(what) + ": " + std::to_string(rank) + " coordinates for a tensor of rank " +
             std::to_string(map->rank),
         where);
  return check_shared(smem, box_bytes(*map), 128, what, where);
}

}  // namespace

std::string encode(TensorMap& map, const void* base, int element, int rank, const uint64_t* size,
                   const uint64_t* stride, const uint32_t* box, const uint32_t* step, int swizzle) {
  map = {kMagic, static_cast<const char*>(base), element, rank, swizzle, {}, {}, {}, {}};
  if (rank < 1 || rank > 5) return "rank " + std::to_string(rank);
  if (reinterpret_cast<uintptr_t>(base) % 16) return "the address is not a multiple of 16";
  if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128)
    return "swizzle " + std::to_string(swizzle);
  for (int i = 0; i < rank; ++i) {
    const std::string axis = " of axis " + std::to_string(i);
    map.size[i] = size[i];
    map.stride[i] = i ? stride[i] : uint64_t(element);
    map.box[i] = box[i];
    map.step[i] = step[i];
    if (size[i] == 0 || size[i] > uint64_t(1) << 32) return "size " + std::to_string(size[i]) + axis;
    if (i && (stride[i] % 16 || stride[i] >= uint64_t(1) << 40))
      return "stride " + std::to_string(stride[i]) + axis + ", not a multiple of 16 below 2^40";
    if (box[i] == 0 || box[i] > 256) return "box " + std::to_string(box[i]) + axis + ", not 1 to 256";
    if (step[i] == 0 || step[i] > 8)
      return "element stride " + std::to_string(step[i]) + axis + ", not 1 to 8";
  }
  const uint32_t row = box[0] * element;
  if (row % 16) return "rows of " + std::to_string(row) + " bytes, not a multiple of 16";
  if (swizzle && row > uint32_t(swizzle))
    return "rows of " + std::to_string(row) + " bytes are longer than the swizzle";
  return "";
}

void prefetch(const TensorMap* map, const Where& where) {
  need_sm90("prefetch_tensor_map", where);
  if (map->magic != kMagic) fail("prefetch_tensor_map: this is not a tensor map", where);
}

// The box goes to the same place in each of the blocks, and its bytes to the mbarrier at the same place.
void tma_load(uint32_t smem, const TensorMap* map, uint32_t address, const int* at, int rank, unsigned blocks,
              const Where& where) {
  const uint32_t own = check_tma(map, smem, rank, "tma_load", where), bytes = box_bytes(*map);
  const uint32_t own_bar = check_shared(address, 8, 8, "tma_load", where);
  if (blocks == 0 || blocks >> cluster.blocks.size())
    fail("tma_load: to blocks that the cluster does not have", where);
  const std::vector<int> corner(at, at + rank);
  each_part(*map, own, at, [&](uint32_t, const char* from, uint32_t size) {
    if (from) check_global_read(from, size, map->element, "tma_load", where);
  });
  for (int to = 0; to < int(cluster.blocks.size()); ++to) {
    if (!(blocks >> to & 1)) continue;
    const uint32_t place = same_place_in(to, own);
    Mbarrier& bar = barrier_at(same_place_in(to, own_bar), "tma_load", where);
    if (!bar.fenced) fail("tma_load: no fence_mbarrier_init after the mbarrier's initialization", where);
    const Event event{bar.agent, bar.phase + 1, where};
    sm90_reach(to, event);
    claim_shared(place, bytes, event, "tma_load", where, *self);
    ++bar.loads;
    auto finish = [&bar, map = *map, bytes, place, corner, where] {
      each_part(map, place, corner.data(), [&](uint32_t to, const char* from, uint32_t size) {
        if (from)
          std::memcpy(shared_bytes(to), from, size);
        else
          std::memset(shared_bytes(to), 0, size);
      });
      --bar.loads;
      bar.bytes -= bytes;
      end_phase_if_complete(bar, where);
    };
    if (chance())
      finish();
    else
      in_flight.push_back(finish);
  }
}

void tma_store(const TensorMap* map, uint32_t smem, const int* at, int rank, const Where& where) {
  const uint32_t place = check_tma(map, smem, rank, "tma_store", where), group = state().store_groups + 1;
  record_read(place, box_bytes(*map), {store_agent(*self), group, where}, "tma_store", where, *self, true);
  each_part(*map, place, at, [&](uint32_t, const char* to, uint32_t bytes) {
    if (!to) return;
    claim_global(const_cast<char*>(to), bytes, map->element, {written_agent(*self), group, where},
                 "tma_store", where, *self);
  });
  auto finish = [map = *map, place, corner = std::vector<int>(at, at + rank)] {
    each_part(map, place, corner.data(), [&](uint32_t from, const char* to, uint32_t bytes) {
      if (to) std::memcpy(const_cast<char*>(to), shared_bytes(from), bytes);
    });
  };
  const bool now = chance();
  if (now) finish();
  state().stores.push_back({group, now ? std::function<void()>([] {}) : finish});
}

void tma_store_wait(uint32_t left, bool written) {
  if (state().store_groups < left) return;
  const uint32_t up_to = state().store_groups - left;
  std::erase_if(state().stores, [&](const Store& store) {
    if (store.group > up_to) return false;
    store.finish();
    return true;
  });
  auto advance = [&](uint32_t& clock) { clock = std::max(clock, up_to); };
  advance(self->clock[store_agent(*self)]);
  if (written) advance(self->clock[written_agent(*self)]);
}

}  // namespace emu

void vtok::ptx::tma_store_commit() { ++emu::state().store_groups; }
