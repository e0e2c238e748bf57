// What the memory instructions share: a warp's addresses, the checks of each state space, the counters.
#pragma once

#include <bit>

#include "decode.h"

namespace ptxvm {

struct Lanes {
  uint64_t address[kLanes];
};

template <class Body>
inline void each_lane(uint32_t exec, const Body& body) {
  for (; exec; exec &= exec - 1) body(std::countr_zero(exec));
}

void addresses(const Warp& warp, const Inst& inst, Lanes& lanes);  // of inst.a and inst.imm
[[noreturn]] void out_of_bounds(const Warp& warp, int lane, uint64_t address, uint32_t bytes);
void check_alignment(const Warp& warp, const Lanes& lanes, uint32_t exec, uint32_t bytes);
void check_global(Warp& warp, const Lanes& lanes, uint32_t exec, uint32_t bytes, const Touches& touches);
uint8_t* local_at(Warp& warp, int lane, uint64_t address, uint32_t bytes, Touch touch);
uint8_t* param_at(Warp& warp, int lane, uint64_t address, uint32_t bytes);
[[noreturn]] void shared_poison(const Warp& warp, int lane, uint64_t at, const uint8_t* state, uint32_t bytes);

// 32-byte sectors that the lanes' accesses fall in, the least that as many distinct bytes need, and those bytes.
void count_sectors(const Lanes& lanes, uint32_t exec, uint32_t bytes, uint64_t& sectors, uint64_t& ideal,
                   uint64_t& total);

// Splits lanes by what their generic address means and calls `run(space, lanes, addresses in that space)`.
template <class Run>
void by_space(const Inst& inst, uint32_t exec, Lanes& lanes, const Run& run) {
  if (inst.space != Space::kGeneric) {
    run(inst.space, exec);
    return;
  }
  while (exec) {
    const uint64_t window = lanes.address[std::countr_zero(exec)] & kWindowMask;
    uint32_t same = 0;
    each_lane(exec, [&](int lane) { same |= uint32_t((lanes.address[lane] & kWindowMask) == window) << lane; });
    exec &= ~same;
    Space space = Space::kGlobal;
    if (window == kSharedWindow) space = Space::kShared;
    if (window == kLocalWindow) space = Space::kLocal;
    if (window == kParamWindow) space = Space::kParam;
    if (space != Space::kGlobal) each_lane(same, [&](int lane) { lanes.address[lane] &= ~kWindowMask; });
    run(space, same);
  }
}

bool is_hint(std::string_view part);                   // a qualifier that changes nothing here
bool space_part(std::string_view part, Space& space);  // "shared"
bool decode_async(Decoder& decoder, const Statement& statement, Inst& inst);
bool decode_atomic(Decoder& decoder, const Statement& statement, Inst& inst);

}  // namespace ptxvm
