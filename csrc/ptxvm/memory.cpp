// The checks of every access (bounds, alignment, poison, races) and the counters of memory traffic.
#include "memory.h"

#include <algorithm>
#include <cstring>

#include "race.h"

namespace ptxvm {

namespace {

std::string describe(const Access& access, bool was_write) {
  return std::string(was_write ? "a write" : "a read") + " by warp " + std::to_string(access.warp) +
         (access.lane == kManyLanes ? ", several lanes" : ", lane " + std::to_string(access.lane));
}

}  // namespace

void addresses(const Warp& warp, const Inst& inst, Lanes& lanes) {
  if (inst.wide_address) {
    const uint64_t* base = warp.reg<uint64_t>(inst.a);
    for (int lane = 0; lane < kLanes; ++lane) lanes.address[lane] = base[lane] + uint64_t(inst.imm);
  } else {
    const uint32_t* base = warp.reg<uint32_t>(inst.a);
    for (int lane = 0; lane < kLanes; ++lane) lanes.address[lane] = uint32_t(base[lane] + uint32_t(inst.imm));
  }
}

// ---- global memory ----

void out_of_bounds(const Warp& warp, int lane, uint64_t address, uint32_t bytes) {
  const Buffer* nearest = nullptr;
  uint64_t distance = UINT64_MAX;
  for (const Buffer& buffer : warp.machine->launch.buffers) {
    const uint64_t away = address < buffer.address                   ? buffer.address - address
                          : address >= buffer.address + buffer.bytes ? address - (buffer.address + buffer.bytes) + 1
                                                                     : 0;
    if (away < distance) {
      distance = away;
      nearest = &buffer;
    }
  }
  std::string detail = std::to_string(bytes) + " bytes at address " + hex(address) + " are in no buffer";
  if (nearest)
    detail += "; nearest is '" + nearest->label + "', " + std::to_string(nearest->bytes) + " bytes at " +
              hex(nearest->address) + ": offset " + std::to_string(int64_t(address - nearest->address));
  warp.fault("bounds", lane, detail);
}

void check_alignment(const Warp& warp, const Lanes& lanes, uint32_t exec, uint32_t bytes) {
  uint64_t low_bits = 0;
  each_lane(exec, [&](int lane) { low_bits |= lanes.address[lane]; });
  if ((low_bits & (bytes - 1)) == 0) return;
  each_lane(exec, [&](int lane) {
    if (lanes.address[lane] & (bytes - 1))
      warp.fault("misaligned", lane,
                 "address " + hex(lanes.address[lane]) + " is not a multiple of " + std::to_string(bytes));
  });
}

void check_global(Warp& warp, const Lanes& lanes, uint32_t exec, uint32_t bytes, const Touches& touches) {
  Machine& machine = *warp.machine;
  uint64_t lowest = UINT64_MAX, highest = 0;
  each_lane(exec, [&](int lane) {
    lowest = std::min(lowest, lanes.address[lane]);
    highest = std::max(highest, lanes.address[lane]);
  });
  check_alignment(warp, lanes, exec, bytes);
  const Buffer* all = machine.find_buffer(lowest, highest - lowest + bytes);
  if (all && (all->writable || touches.touch == Touch::kRead) && !machine.launch.global_races) return;
  each_lane(exec, [&](int lane) {
    const uint64_t address = lanes.address[lane];
    Buffer* buffer = machine.find_buffer(address, bytes);
    if (!buffer) out_of_bounds(warp, lane, address, bytes);
    const std::string at = "'" + buffer->label + "' offset " + std::to_string(address - buffer->address);
    if (touches.touch == Touch::kWrite && !buffer->writable) warp.fault("readonly", lane, "a write to " + at);
    if (!buffer->shadow) return;
    const auto report = [&](uint64_t, const Access& earlier, bool was_write) {
      const uint32_t epoch = warp.block->number + 1;
      if (was_write && touches.touch == Touch::kWrite && touches.data && earlier.epoch == epoch &&
          earlier.warp == warp.index && earlier.lane < kLanes && (exec >> earlier.lane & 1) &&
          lanes.address[earlier.lane] == address &&
          std::memcmp(touches.data + earlier.lane * touches.stride, touches.data + lane * touches.stride, bytes) == 0)
        return;  // the same instruction writes the same value
      warp.fault("global-race", lane,
                 std::string(touches.touch == Touch::kWrite ? "a write to " : "a read of ") + at + " races with " +
                     describe(earlier, was_write) + " of block number " + std::to_string(earlier.epoch - 1));
    };
    note_bytes<true>(warp, lane, *buffer->shadow, address - (buffer->address & ~3ull), bytes, warp.block->number + 1,
                     touches.touch, touches.strong, report);
  });
}

void count_sectors(const Lanes& lanes, uint32_t exec, uint32_t bytes, uint64_t& sectors, uint64_t& ideal,
                   uint64_t& total) {
  uint64_t sorted[kLanes];
  int count = 0;
  bool ascending = true;
  each_lane(exec, [&](int lane) {
    sorted[count] = lanes.address[lane];
    ascending &= count == 0 || sorted[count] >= sorted[count - 1];
    ++count;
  });
  if (!ascending) std::sort(sorted, sorted + count);
  uint32_t distinct = 1, touched = 1;
  for (int i = 1; i < count; ++i) {
    distinct += sorted[i] != sorted[i - 1];
    touched += sorted[i] / 32 != sorted[i - 1] / 32;
  }
  sectors += touched;
  ideal += (uint64_t(distinct) * bytes + 31) / 32;
  total += uint64_t(distinct) * bytes;
}

// ---- shared and local memory ----

void shared_poison(const Warp& warp, int lane, uint64_t at, const uint8_t* state, uint32_t bytes) {
  uint32_t i = 0;
  while (i + 1 < bytes && state[i] == kValid) ++i;
  if (state[i] == kInFlight)
    warp.fault("async", lane,
               "shared memory at offset " + std::to_string(at + i) +
                   " is read while a cp.async to it is in flight (its thread has not waited for it)");
  warp.fault("poison", lane, "shared memory at offset " + std::to_string(at + i) + " is read before it is written");
}

uint8_t* local_at(Warp& warp, int lane, uint64_t address, uint32_t bytes, Touch touch) {
  const uint64_t at = address - kFirstOffset, size = warp.machine->program.local_bytes;
  if (at >= size || at + bytes > size)
    warp.fault("bounds", lane,
               std::to_string(bytes) + " bytes at local address " + hex(address) + ": local memory has " +
                   std::to_string(size) + " bytes from " + hex(kFirstOffset));
  if (at & (bytes - 1))
    warp.fault("misaligned", lane, "local address " + hex(address) + " is not a multiple of " + std::to_string(bytes));
  const size_t place = size_t(lane) * size + at;
  uint8_t* state = warp.local_valid.data() + place;
  if (touch == Touch::kWrite)
    std::memset(state, kValid, bytes);
  else
    for (uint32_t i = 0; i < bytes; ++i)
      if (state[i] != kValid)
        warp.fault("poison", lane,
                   "local memory at offset " + std::to_string(at + i) + " is read before it is written");
  return warp.local.data() + place;
}

uint8_t* param_at(Warp& warp, int lane, uint64_t address, uint32_t bytes) {
  std::vector<uint8_t>& block = warp.machine->launch.parameters;
  if (address >= block.size() || bytes > block.size() - address)
    warp.fault("bounds", lane,
               std::to_string(bytes) + " bytes at parameter offset " + std::to_string(address) +
                   ": the parameters have " + std::to_string(block.size()) + " bytes");
  return block.data() + address;
}

uint8_t* shared_at(Warp& warp, int lane, uint64_t address, uint32_t bytes, const Touches& touches) {
  Block& block = *warp.block;
  const uint64_t at = address - kFirstOffset;
  if (at >= block.shared.size() || at + bytes > block.shared.size())
    warp.fault("bounds", lane,
               std::to_string(bytes) + " bytes at shared address " + hex(address) + ": the block has " +
                   std::to_string(block.shared.size()) + " bytes from " + hex(kFirstOffset));
  if (at & (bytes - 1))
    warp.fault("misaligned", lane, "shared address " + hex(address) + " is not a multiple of " + std::to_string(bytes));
  uint8_t* state = block.state.data() + at;
  if (touches.touch == Touch::kRead) {
    static const uint8_t kAllValid[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const bool valid = bytes == 16 ? std::memcmp(state, kAllValid, 16) == 0 : std::memcmp(state, kAllValid, bytes) == 0;
    if (!valid) [[unlikely]]
      shared_poison(warp, lane, at, state, bytes);
  } else {
    for (uint32_t i = 0; i < bytes; ++i)
      if (state[i] == kInFlight)
        warp.fault(
            "async", lane,
            "shared memory at offset " + std::to_string(at + i) + " is written while a cp.async to it is in flight");
  }
  if (warp.machine->launch.races) {
    const auto report = [&](uint64_t, const Access& earlier, bool was_write) {
      if (was_write && touches.touch == Touch::kWrite && touches.data && earlier.warp == warp.index &&
          earlier.lane < kLanes && (touches.exec >> earlier.lane & 1) &&
          touches.address[earlier.lane] == touches.address[lane] &&
          std::memcmp(touches.data + earlier.lane * touches.stride, touches.data + lane * touches.stride, bytes) == 0)
        return;  // the same instruction writes the same value
      warp.fault("race", lane,
                 std::string(touches.touch == Touch::kWrite ? "a write to" : "a read of") +
                     " shared memory at offset " + std::to_string(at) + " (" + std::to_string(bytes) +
                     " bytes) races with " + describe(earlier, was_write) + ": no barrier between them");
    };
    note_bytes<false>(warp, touches.collective ? kManyLanes : lane, block.shadow, at, bytes, block.epoch, touches.touch,
                      touches.strong, report);
  }
  if (touches.touch == Touch::kWrite) std::memset(state, kValid, bytes);
  return block.shared.data() + at;
}

// 32 banks of 4 bytes. Up to 4 bytes a lane the warp is one wavefront, 8 bytes two halves, 16 bytes four quarters; each
// takes as many wavefronts as its busiest bank has distinct words. The ideal is one each.
void count_wavefronts(Warp& warp, const uint64_t* address, uint32_t exec, uint32_t bytes) {
  Counters& counters = warp.machine->counters;
  ++counters.shared_accesses;
  const uint32_t unit = std::max(bytes, 4u), banks = 128 / unit, phase_lanes = banks;
  for (uint32_t first = 0; first < kLanes; first += phase_lanes) {
    uint32_t phase = phase_lanes == 32 ? exec : exec >> first & ((1u << phase_lanes) - 1);
    if (!phase) continue;
    uint64_t words[kLanes];
    uint8_t load[32] = {}, next[kLanes], head[32];
    std::memset(head, 0xff, sizeof(head));
    int count = 0;
    uint8_t most = 0;
    for (; phase; phase &= phase - 1) {
      const uint64_t word = address[first + uint32_t(std::countr_zero(phase))] / unit;
      const uint32_t bank = word % banks;
      uint8_t at = head[bank];
      while (at != 0xff && words[at] != word) at = next[at];
      if (at != 0xff) continue;  // the same word: a broadcast
      words[count] = word;
      next[count] = head[bank];
      head[bank] = uint8_t(count++);
      most = std::max(most, ++load[bank]);
    }
    counters.shared_wavefronts += most;
    ++counters.shared_ideal;
  }
}

}  // namespace ptxvm
