// cp.async and its groups: a copy's bytes are in flight from its issue to its thread's wait.
#include <cstring>

#include "memory.h"

namespace ptxvm {

namespace {

enum : uint8_t { kHasSize = 1, kIgnoreSource = 2 };

// cp.async [list[0]] <- [a], bytes; b: bytes to read (the rest is zero), or c: the predicate that ignores the source.
void copy_async(Warp& warp, const Inst& inst, uint32_t exec) {
  Lanes from, to;
  addresses(warp, inst, from);
  Inst target;
  target.a = inst.list[0];
  target.wide_address = inst.list[1];
  target.imm = int32_t(inst.list[2]);
  addresses(warp, target, to);
  const uint32_t bytes = inst.bytes;
  uint32_t size[kLanes], reading = 0;
  each_lane(exec, [&](int lane) {
    size[lane] = inst.flags & kHasSize ? warp.reg<uint32_t>(inst.b)[lane] : bytes;
    if (inst.flags & kIgnoreSource && (warp.pred(inst.c) >> lane & 1)) size[lane] = 0;
    if (size[lane] > bytes)
      warp.fault("bounds", lane,
                 "cp.async of " + std::to_string(bytes) + " bytes with a source size of " + std::to_string(size[lane]));
    if (size[lane]) reading |= 1u << lane;
    to.address[lane] &= ~kWindowMask;
  });
  if (reading) {
    const Touches touches{Touch::kRead, false, from.address, reading, nullptr, 0};
    uint32_t whole = 0;
    each_lane(reading, [&](int lane) { whole |= uint32_t(size[lane] == bytes) << lane; });
    if (whole) check_global(warp, from, whole, bytes, touches);
    each_lane(reading & ~whole, [&](int lane) {  // only the bytes that are read must exist
      if (from.address[lane] & (bytes - 1)) check_alignment(warp, from, 1u << lane, bytes);
      if (!warp.machine->find_buffer(from.address[lane], size[lane]))
        out_of_bounds(warp, lane, from.address[lane], size[lane]);
    });
    Counters& counters = warp.machine->counters;
    count_sectors(from, reading, bytes, counters.async_sectors, counters.async_ideal, counters.async_bytes);
  }
  count_wavefronts(warp, to.address, exec, bytes);
  const Touches touches{Touch::kWrite, false, to.address, exec, nullptr, 0};
  each_lane(exec, [&](int lane) {
    const uint64_t at = to.address[lane] - kFirstOffset;
    shared_at(warp, lane, to.address[lane], bytes, touches);
    std::memset(warp.block->state.data() + at, kInFlight, bytes);
    Copy copy{warp.copy_groups[size_t(lane)], uint32_t(at), uint8_t(lane), uint8_t(bytes), {}};
    if (size[lane]) std::memcpy(copy.data, reinterpret_cast<const void*>(from.address[lane]), size[lane]);
    warp.copies.push_back(copy);
  });
}

void land(Warp& warp, uint32_t exec, uint32_t may_stay, bool everything) {
  Block& block = *warp.block;
  size_t kept = 0;
  for (const Copy& copy : warp.copies) {
    const uint32_t committed = warp.copy_groups[copy.lane];
    const bool lands = (exec >> copy.lane & 1) && (everything || copy.group + may_stay < committed);
    if (!lands) {
      warp.copies[kept++] = copy;
      continue;
    }
    // The write happens here: it is noted again, for threads that read between the copy and the wait.
    uint8_t* state = block.state.data() + copy.offset;
    std::memset(state, kValid, copy.bytes);
    uint64_t address[kLanes];
    address[copy.lane] = copy.offset + kFirstOffset;
    const Touches touches{Touch::kWrite, false, address, 1u << copy.lane, nullptr, 0};
    uint8_t* to = shared_at(warp, copy.lane, address[copy.lane], copy.bytes, touches);
    std::memcpy(to, copy.data, copy.bytes);
  }
  warp.copies.resize(kept);
}

void commit_group(Warp& warp, const Inst&, uint32_t exec) {
  each_lane(exec, [&](int lane) { ++warp.copy_groups[size_t(lane)]; });
}

void wait_group(Warp& warp, const Inst& inst, uint32_t exec) { land(warp, exec, uint32_t(inst.imm), false); }

void wait_all(Warp& warp, const Inst&, uint32_t exec) { land(warp, exec, 0, true); }

}  // namespace

bool decode_async(Decoder& decoder, const Statement& statement, Inst& inst) {
  inst.cls = Class::kAsync;
  const std::vector<Operand>& operands = statement.operands;
  if (statement.has("bulk") || statement.has("mbarrier")) return false;
  if (statement.op == "cp.async.commit_group" || statement.op == "cp.async.wait_all") {
    inst.run = statement.parts[2] == "wait_all" ? wait_all : commit_group;
    return operands.empty();
  }
  if (statement.op == "cp.async.wait_group") {
    if (operands.size() != 1 || operands[0].kind != Operand::kInteger) decoder.fail("expected a number of groups");
    inst.run = wait_group;
    inst.imm = operands[0].integer;
    return true;
  }
  if (!(statement.has("ca") || statement.has("cg")) || !statement.has("global")) return false;
  if (operands.size() < 3 || operands[2].kind != Operand::kInteger) return false;
  for (size_t i = 2; i < statement.parts.size(); ++i) {
    Space space;
    if (!space_part(statement.parts[i], space) && !is_hint(statement.parts[i])) return false;
  }
  inst.bytes = uint8_t(operands[2].integer);
  const bool size_known = inst.bytes == 16 || (statement.has("ca") && (inst.bytes == 4 || inst.bytes == 8));
  if (!size_known) decoder.fail("cp.async copies 4, 8 or 16 bytes (.cg: 16)");
  Inst to;
  to.space = Space::kShared;
  decoder.address(operands[0], to);
  inst.space = Space::kGlobal;
  decoder.address(operands[1], inst);
  inst.list = decoder.list({to.a, uint32_t(to.wide_address), uint32_t(int32_t(to.imm))});
  if (operands.size() > 4) return false;
  if (operands.size() == 4) {
    bool is_predicate = operands[3].negated;
    if (operands[3].kind == Operand::kSymbol && !is_predicate) {
      uint8_t bytes = 0;
      const uint32_t place = decoder.any_source(operands[3], bytes, 4);
      is_predicate = bytes == 0;
      if (bytes == 8) return false;  // a cache policy
      (is_predicate ? inst.c : inst.b) = place;
    } else {
      (is_predicate ? inst.c : inst.b) = decoder.source(operands[3], is_predicate ? 'p' : 'w');
    }
    inst.flags = is_predicate ? kIgnoreSource : kHasSize;
  }
  inst.run = copy_async;
  return true;
}

}  // namespace ptxvm
