// The launch: blocks one after another, warps of a block interleaved at random, lanes of a warp in lockstep.
//
// Reconvergence: of a warp's groups of lanes, the one at the smallest instruction runs; groups that meet merge. The
// compiler lays code out so that this visits the join of a branch last, except where lanes wait for each other.
#include "machine.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

namespace ptxvm {

const char* class_name(Class c) {
  static const char* const kNames[] = {"integer",   "float",   "half",   "special",     "convert", "move",
                                       "predicate", "global",  "shared", "local",       "param",   "async",
                                       "atomic",    "shuffle", "tensor", "matrix_load", "barrier", "control"};
  return kNames[int(c)];
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", (unsigned long long)value);
  return text;
}

void Warp::fault(const char* kind, int lane, const std::string& detail) const {
  const Program& program = machine->program;
  Fault fault;
  fault.kind = kind;
  fault.kernel = program.name;
  fault.block = block->id;
  const uint32_t number = index * kLanes + uint32_t(std::max(lane, 0));
  const auto& size = machine->launch.block;
  fault.thread = {number % size[0], number / size[0] % size[1], number / size[0] / size[1]};
  const Inst& inst = program.code[std::min<size_t>(pc, program.code.size() - 1)];
  fault.line = inst.line;
  fault.instruction = program.source->statement(inst.first_token, inst.last_token);
  const auto triple = [](const std::array<uint32_t, 3>& t) {
    return "(" + std::to_string(t[0]) + ", " + std::to_string(t[1]) + ", " + std::to_string(t[2]) + ")";
  };
  fault.message = std::string(kind) + ": " + detail + "\n  kernel " + fault.kernel + ", block " + triple(fault.block) +
                  ", thread " + triple(fault.thread) + " (warp " + std::to_string(index) + ", lane " +
                  std::to_string(std::max(lane, 0)) + ")\n  PTX line " + std::to_string(fault.line) + ": " +
                  fault.instruction;
  throw fault;
}

Machine::Machine(const Program& program_in, Launch launch_in) : program(program_in), launch(std::move(launch_in)) {
  executed.assign(program.code.size(), 0);
  executed_lanes.assign(program.code.size(), 0);
  std::sort(launch.buffers.begin(), launch.buffers.end(),
            [](const Buffer& a, const Buffer& b) { return a.address < b.address; });
  if (launch.global_races)
    for (Buffer& buffer : launch.buffers) {
      buffer.shadow = std::make_unique<ShadowMap>();
      buffer.shadow->words.resize((buffer.bytes + 7) / 4);
      buffer.shadow->split.resize((buffer.bytes + 7) / 4);
    }
}

Buffer* Machine::find_buffer(uint64_t address, uint64_t bytes) {
  const auto holds = [&](const Buffer& buffer) {
    const uint64_t offset = address - buffer.address;
    return address >= buffer.address && bytes <= buffer.bytes && offset <= buffer.bytes - bytes;
  };
  if (last_buffer && holds(*last_buffer)) return last_buffer;
  auto after = std::upper_bound(launch.buffers.begin(), launch.buffers.end(), address,
                                [](uint64_t at, const Buffer& buffer) { return at < buffer.address; });
  if (after == launch.buffers.begin()) return nullptr;
  Buffer& buffer = *(after - 1);
  if (!holds(buffer)) return nullptr;
  return last_buffer = &buffer;
}

void Machine::run() {
  const uint64_t all = uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  const uint64_t first = std::min(launch.first_block, all), last = std::min(launch.last_block, all);
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2], warps = (threads + kLanes - 1) / kLanes;
  // Registers of all warps of a block; the part that holds immediates is filled once.
  registers_.resize(size_t(warps) * program.register_bytes + 64);
  written_.resize(size_t(warps) * (program.register_names.size() + 1));
  uint8_t* base = registers_.data() + (64 - reinterpret_cast<uintptr_t>(registers_.data()) % 64) % 64;
  block_.threads = threads;
  block_.warps.resize(warps);
  for (uint32_t w = 0; w < warps; ++w) {
    Warp& warp = block_.warps[w];
    warp.index = w;
    warp.machine = this;
    warp.block = &block_;
    warp.regs = base + size_t(w) * program.register_bytes;
    warp.written = written_.data() + size_t(w) * (program.register_names.size() + 1);
    if (!launch.poison_error) std::memset(warp.regs, 0xcb, program.register_bytes);
    for (const Program::Constant& constant : program.constants) {
      if (constant.bytes == 0) warp.pred(constant.offset) = constant.value ? kFullMask : 0;
      for (int lane = 0; lane < kLanes; ++lane)
        std::memcpy(warp.regs + constant.offset + lane * constant.bytes, &constant.value, constant.bytes);
    }
  }
  std::vector<uint64_t> order;
  for (uint64_t number = first; number < last; ++number) order.push_back(number);
  if (launch.shuffle_blocks) {
    std::mt19937_64 random(launch.seed ^ 0x9e3779b97f4a7c15ull);
    std::shuffle(order.begin(), order.end(), random);
  }
  for (uint64_t number : order) run_block(number);
}

void Machine::start_block(uint64_t number) {
  Block& block = block_;
  block.number = uint32_t(number);
  block.id = {uint32_t(number % launch.grid[0]), uint32_t(number / launch.grid[0] % launch.grid[1]),
              uint32_t(number / launch.grid[0] / launch.grid[1])};
  current_block = block.id;
  const size_t bytes = program.dynamic_offset + launch.shared_bytes;
  block.shared.assign(bytes, 0xcb);
  block.state.assign(bytes, launch.poison_error ? kAbsent : kValid);
  if (block.epoch == 1 || block.epoch > 0x7fffffffu) {
    block.shadow.words.assign((bytes + 3) / 4, Shadow{});
    block.shadow.split.assign((bytes + 3) / 4, 0);
    block.shadow.bytes.clear();
    block.epoch = 1;
  }
  ++block.epoch;  // whatever an earlier block did is over
  for (BarrierState& barrier : block.barriers) barrier = BarrierState{};
  const std::array<uint32_t, 3>& size = launch.block;
  for (Warp& warp : block.warps) {
    const uint32_t first = warp.index * kLanes, count = std::min<uint32_t>(kLanes, block.threads - first);
    warp.live = warp.active = count == kLanes ? kFullMask : (1u << count) - 1;
    warp.pc = 0;
    warp.others.clear();
    warp.min_other = UINT32_MAX;
    warp.has_waiting = warp.blocked = false;
    warp.stamp = 1;
    warp.seen.assign(block.warps.size(), 0);
    warp.lane_seen.reset();
    warp.copies.clear();
    warp.copy_groups.fill(0);
    if (program.local_bytes) {
      warp.local.assign(size_t(program.local_bytes) * kLanes, 0xcb);
      warp.local_valid.assign(size_t(program.local_bytes) * kLanes, launch.poison_error ? kAbsent : kValid);
    }
    std::memset(warp.written, launch.poison_error ? 0 : 0xff, program.register_names.size() * 4);
    for (const auto& [name, offset] : program.specials) {
      uint32_t* to = warp.reg<uint32_t>(offset);
      const char axis = name[name.size() - 2] == '.' ? name.back() : 0;
      const int dimension = axis ? axis - 'x' : 0;
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const uint32_t thread = first + lane;
        uint32_t value = 0;
        if (name.rfind("%tid", 0) == 0) {
          const uint32_t position[] = {thread % size[0], thread / size[0] % size[1], thread / size[0] / size[1]};
          value = position[dimension];
        } else if (name.rfind("%ntid", 0) == 0)
          value = size[dimension];
        else if (name.rfind("%ctaid", 0) == 0)
          value = block.id[dimension];
        else if (name.rfind("%nctaid", 0) == 0)
          value = launch.grid[dimension];
        else if (name == "%laneid")
          value = lane;
        else if (name == "%warpid")
          value = warp.index;
        else if (name == "%nwarpid")
          value = uint32_t(block.warps.size());
        else if (name == "%nsmid")
          value = 1;
        else if (name == "%lanemask_eq")
          value = 1u << lane;
        else if (name == "%lanemask_lt")
          value = (1u << lane) - 1;
        else if (name == "%lanemask_le")
          value = uint32_t((2ull << lane) - 1);
        else if (name == "%lanemask_gt")
          value = ~uint32_t((2ull << lane) - 1);
        else if (name == "%lanemask_ge")
          value = ~((1u << lane) - 1);
        else if (name == "%dynamic_smem_size")
          value = launch.shared_bytes;
        else if (name == "%total_smem_size")
          value = uint32_t(bytes);
        if (name == "%gridid")
          reinterpret_cast<uint64_t*>(to)[lane] = 0;
        else
          to[lane] = value;
      }
    }
  }
}

void Machine::run_block(uint64_t number) {
  start_block(number);
  ++counters.blocks;
  random_.seed(launch.seed * 0x9e3779b97f4a7c15ull + number);
  const size_t count = block_.warps.size();
  for (;;) {
    // A random runnable warp, for a random number of instructions.
    const uint64_t draw = random_();
    Warp* next = nullptr;
    for (size_t i = 0, start = size_t(draw % count); i < count && !next; ++i) {
      Warp& warp = block_.warps[(start + i) % count];
      if (warp.live && !warp.blocked) next = &warp;
    }
    if (!next) {
      bool done = true;
      for (const Warp& warp : block_.warps) done &= warp.live == 0;
      if (done) return;
      deadlock();
    }
    run_warp(*next, 1 + uint32_t(draw >> 32 & 63));
  }
}

void Machine::poison(const Warp& warp, const Inst& inst, uint32_t exec) {
  for (int i = 0; i < inst.read_count; ++i) {
    const uint32_t lanes = inst.guard && i == 0 ? warp.active : exec, missing = lanes & ~warp.written[inst.reads[i]];
    if (missing)
      warp.fault("poison", std::countr_zero(missing),
                 "register " + program.register_names[inst.reads[i]] + " is read before it is written");
  }
  std::abort();
}

// Runs up to `budget` instructions; stops early where the warp waits or ends.
bool Machine::run_warp(Warp& warp, uint32_t budget) {
  const Inst* const code = program.code.data();
  uint32_t* const written = warp.written;
  uint32_t steps = 0;
  for (; steps < budget && warp.live; ++steps) {
    if (warp.pc >= warp.min_other || warp.has_waiting) regroup(warp);
    if (warp.blocked) break;
    const Inst& inst = code[warp.pc];
    const uint32_t guard = warp.pred(inst.guard);
    const uint32_t exec = warp.active & (inst.guard_negated ? ~guard : guard);
    uint32_t missing = 0;
    int i = 0;
    if (inst.guard) missing = warp.active & ~written[inst.reads[i++]];
    for (; i < inst.read_count; ++i) missing |= exec & ~written[inst.reads[i]];
    if (missing) [[unlikely]]
      poison(warp, inst, exec);
    ++executed[warp.pc];
    executed_lanes[warp.pc] += uint64_t(std::popcount(exec));
    switch (inst.kind) {
      case Kind::kPlain:
        if (exec) inst.run(warp, inst, exec);
        ++warp.pc;
        break;
      case Kind::kBranch:
        branch(warp, inst, exec);
        break;
      case Kind::kBranchTable: {
        // Lanes leave for their targets one target at a time; what is left goes on (a guard that is off).
        uint32_t left = exec;
        const uint32_t* index = warp.reg<uint32_t>(inst.a);
        const uint32_t rest = warp.active & ~exec;
        std::vector<Group> groups;
        while (left) {
          const int lane = std::countr_zero(left);
          if (index[lane] >= uint64_t(inst.imm))
            warp.fault(
                "bounds", lane,
                "brx.idx: index " + std::to_string(index[lane]) + " of " + std::to_string(inst.imm) + " targets");
          uint32_t same = 0;
          for (int other = lane; other < kLanes; ++other)
            if ((left >> other & 1) && inst.list[index[other]] == inst.list[index[lane]]) same |= 1u << other;
          groups.push_back({inst.list[index[lane]], same});
          left &= ~same;
        }
        if (rest) groups.push_back({warp.pc + 1, rest});
        warp.pc = groups[0].pc;
        warp.active = groups[0].mask;
        for (size_t g = 1; g < groups.size(); ++g) warp.others.push_back(groups[g]);
        warp.min_other = 0;  // let regroup sort it out
        break;
      }
      case Kind::kExit:
        leave(warp, exec);
        if (warp.live && warp.active) ++warp.pc;
        break;
      case Kind::kBarrier:
        if (exec)
          arrive(warp, inst, exec);
        else
          ++warp.pc;
        break;
      case Kind::kWarpSync:
        if (!exec)
          ++warp.pc;
        else
          warp_sync(warp, inst, exec);
        break;
      case Kind::kWholeWarp:
        if (exec == kFullMask)
          inst.run(warp, inst, exec);
        else if (exec)
          warp.fault("divergent-barrier", std::countr_zero(exec),
                     program.opcodes[inst.opcode] + " needs all 32 lanes, the active ones are " + hex(exec));
        ++warp.pc;
        break;
    }
    const uint32_t* const writes = inst.reads + inst.read_count;
    for (int w = 0; w < inst.write_count; ++w) written[writes[w]] |= exec;
  }
  counters.instructions += steps;
  if (launch.max_instructions && counters.instructions > launch.max_instructions)
    warp.fault("limit", 0,
               "the launch ran " + std::to_string(counters.instructions) + " warp instructions, the limit is " +
                   std::to_string(launch.max_instructions));
  return true;
}

void Machine::branch(Warp& warp, const Inst& inst, uint32_t taken) {
  const uint32_t stay = warp.active & ~taken;
  if (!taken) {
    ++warp.pc;
  } else if (!stay) {
    warp.pc = inst.target;
    if (warp.min_other != UINT32_MAX) warp.min_other = 0;  // a jump back may pass groups: look
  } else {
    warp.others.push_back({inst.target, taken});
    warp.active = stay;
    ++warp.pc;
    warp.min_other = 0;
  }
}

// The current lanes go to `others` with a wait; whichever group is first now runs.
void Machine::park(Warp& warp, uint32_t mask, Wait wait) {
  warp.others.push_back({warp.pc, mask, wait});
  warp.active &= ~mask;
  warp.has_waiting = true;
}

// Merges groups at the same instruction, and makes the runnable one with the smallest instruction current.
void Machine::regroup(Warp& warp) {
  if (warp.active) warp.others.push_back({warp.pc, warp.active});
  std::vector<Group>& groups = warp.others;
  for (size_t i = 0; i < groups.size(); ++i)
    for (size_t j = groups.size() - 1; j > i; --j)
      if (groups[i].pc == groups[j].pc && groups[i].wait != Wait::kBarrier && groups[j].wait != Wait::kBarrier) {
        groups[i].mask |= groups[j].mask;
        groups[i].wait = groups[i].wait == Wait::kLanes && groups[j].wait == Wait::kLanes ? Wait::kLanes : Wait::kNone;
        groups.erase(groups.begin() + long(j));
      }
  size_t best = groups.size();
  for (size_t i = 0; i < groups.size(); ++i)
    if (groups[i].wait == Wait::kNone && (best == groups.size() || groups[i].pc < groups[best].pc)) best = i;
  if (best == groups.size()) {
    // Everyone waits. Lanes that wait for lanes of their warp wait for ever, unless the others come out of a barrier.
    bool barrier = false;
    for (const Group& group : groups) barrier |= group.wait == Wait::kBarrier;
    warp.active = 0;
    warp.min_other = UINT32_MAX;
    if (barrier) {
      warp.blocked = true;
      return;
    }
    warp.pc = groups[0].pc;
    std::string where;
    for (const Group& group : groups)
      where +=
          (where.empty() ? "" : "; ") + hex(group.mask) + " at PTX line " + std::to_string(program.code[group.pc].line);
    warp.fault("divergent-barrier", std::countr_zero(groups[0].mask),
               "lanes wait for lanes of their member mask that never arrive: lanes " + where);
  }
  warp.pc = groups[best].pc;
  warp.active = groups[best].mask;
  groups.erase(groups.begin() + long(best));
  warp.min_other = UINT32_MAX;
  warp.has_waiting = false;
  for (const Group& group : groups) {
    if (group.wait == Wait::kNone)
      warp.min_other = std::min(warp.min_other, group.pc);
    else
      warp.has_waiting = true;
  }
}

void Machine::leave(Warp& warp, uint32_t lanes) {
  warp.live &= ~lanes;
  warp.active &= ~lanes;
  for (Group& group : warp.others) group.wait = Wait::kNone;  // who waited for these lanes looks again
  if (warp.active == 0 && warp.live) warp.min_other = 0;
  check_barriers();
}

// shfl.sync and its like: runs for every set of lanes whose member mask has arrived; the others wait.
bool Machine::warp_sync(Warp& warp, const Inst& inst, uint32_t exec) {
  const uint32_t* masks = warp.reg<uint32_t>(inst.target);
  const bool is_barrier = inst.imm == kWarpBarrier;
  const uint32_t idle = warp.active & ~exec;
  uint32_t left = exec, done = idle;
  bool freed_others = false;
  while (left) {
    const int lane = std::countr_zero(left);
    const uint32_t mask = masks[lane];
    uint32_t same = 0;
    for (uint32_t rest = left; rest; rest &= rest - 1) {
      const int other = std::countr_zero(rest);
      if (masks[other] == mask) same |= 1u << other;
    }
    if (same & ~mask)
      warp.fault("divergent-barrier", std::countr_zero(same & ~mask),
                 "the lane is not in its member mask " + hex(mask));
    left &= ~same;
    uint32_t needed = mask & warp.live, arrived = same;
    if (is_barrier && arrived != needed)  // a bar.warp.sync elsewhere with the same mask counts
      for (const Group& group : warp.others) {
        const Inst& there = program.code[group.pc];
        if (group.wait != Wait::kLanes || there.kind != Kind::kWarpSync || there.imm != kWarpBarrier) continue;
        for (uint32_t rest = group.mask; rest; rest &= rest - 1) {
          const int other = std::countr_zero(rest);
          if (warp.reg<uint32_t>(there.target)[other] == mask) arrived |= 1u << other;
        }
      }
    if (needed & ~arrived) continue;
    inst.run(warp, inst, is_barrier ? arrived : same);
    done |= same;
    if (arrived != same)  // release the lanes elsewhere
      for (size_t i = 0; i < warp.others.size(); ++i) {
        Group& group = warp.others[i];
        const uint32_t freed = group.wait == Wait::kLanes ? group.mask & arrived : 0;
        if (!freed) continue;
        const uint32_t pc = group.pc;
        freed_others = true;
        group.mask &= ~freed;
        if (group.mask == 0)
          group = {pc + 1, freed};
        else
          warp.others.push_back({pc + 1, freed});
      }
  }
  const uint32_t waiting = warp.active & ~done;
  if (waiting) {
    park(warp, waiting, Wait::kLanes);
    warp.active = done;
  }
  ++warp.pc;
  if (waiting || freed_others) warp.min_other = 0;
  return !waiting;
}

// bar.sync, bar.arrive, bar.red.
bool Machine::arrive(Warp& warp, const Inst& inst, uint32_t exec) {
  const int lane = std::countr_zero(exec);
  const bool aligned = inst.flags, only_arrives = inst.flags2;
  if (aligned && exec != warp.live)
    warp.fault("divergent-barrier", lane,
               "lanes " + hex(exec) + " of the warp are at the barrier, the live ones are " + hex(warp.live));
  const uint32_t id = warp.reg<uint32_t>(inst.a)[lane];
  if (id >= block_.barriers.size()) warp.fault("bounds", lane, "barrier " + std::to_string(id) + ", expected 0 to 15");
  if (exec != warp.active) {  // switched off by the guard: these go on
    warp.others.push_back({warp.pc + 1, warp.active & ~exec});
    warp.active = exec;
    warp.min_other = 0;
  }
  park(warp, exec, Wait::kBarrier);
  warp.min_other = 0;
  uint32_t here = 0;
  for (const Group& group : warp.others)
    if (group.wait == Wait::kBarrier) here |= group.mask;
  if (here != warp.live) return false;  // not aligned: the warp arrives with its last lane
  for (const Group& group : warp.others) {
    const Inst& there = program.code[group.pc];
    if (warp.reg<uint32_t>(there.a)[std::countr_zero(group.mask)] != id)
      warp.fault("divergent-barrier", lane, "lanes of the warp wait at different barriers");
  }
  BarrierState& barrier = block_.barriers[id];
  const uint32_t expected = inst.target ? warp.reg<uint32_t>(inst.target)[lane] : 0;
  if (inst.target && (expected == 0 || expected % kLanes))
    warp.fault("divergent-barrier", lane,
               "barrier " + std::to_string(id) + ": thread count " + std::to_string(expected) +
                   ", expected a positive multiple of 32");
  if (barrier.in_use && barrier.expected != expected)
    warp.fault("divergent-barrier", lane,
               "barrier " + std::to_string(id) + ": this warp expects " + std::to_string(expected) +
                   " threads, an earlier one " + std::to_string(barrier.expected) + " (0: all)");
  barrier.in_use = true;
  barrier.expected = expected;
  barrier.arrived += kLanes;
  if (inst.imm) {
    const uint32_t true_lanes = warp.pred(inst.b) & exec;
    barrier.true_count += uint32_t(std::popcount(true_lanes));
    barrier.lanes += uint32_t(std::popcount(exec));
  }
  if (expected && barrier.arrived > expected)
    warp.fault("divergent-barrier", lane,
               "barrier " + std::to_string(id) + ": " + std::to_string(barrier.arrived) +
                   " threads arrived, expected " + std::to_string(expected));
  warp.seen[warp.index] = ++warp.stamp;
  barrier.joined.resize(warp.seen.size());
  for (size_t i = 0; i < warp.seen.size(); ++i) barrier.joined[i] = std::max(barrier.joined[i], warp.seen[i]);
  if (only_arrives) {
    barrier.arrivals_only = true;
    for (Group& group : warp.others)
      if (group.wait == Wait::kBarrier) {
        group.wait = Wait::kNone;
        ++group.pc;
      }
  } else {
    barrier.waiting.push_back(&warp);
    warp.blocked = true;
  }
  check_barriers();
  return false;
}

void Machine::check_barriers() {
  uint32_t live_warps = 0;
  bool counted = false;
  for (uint32_t id = 0; id < block_.barriers.size(); ++id) {
    BarrierState& barrier = block_.barriers[id];
    if (!barrier.in_use) continue;
    if (!counted) {
      for (const Warp& warp : block_.warps) live_warps += warp.live != 0;
      counted = true;
    }
    const bool complete =
        barrier.expected ? barrier.arrived == barrier.expected : barrier.arrived / kLanes >= live_warps;
    if (complete) release(id);
  }
}

void Machine::release(uint32_t id) {
  BarrierState barrier = std::move(block_.barriers[id]);
  block_.barriers[id] = BarrierState{};
  size_t live_warps = 0;
  for (const Warp& warp : block_.warps) live_warps += warp.live != 0;
  if (!barrier.arrivals_only && barrier.waiting.size() == live_warps) ++block_.epoch;
  for (Warp* warp : barrier.waiting) {
    for (size_t i = 0; i < warp->seen.size(); ++i) warp->seen[i] = std::max(warp->seen[i], barrier.joined[i]);
    for (Group& group : warp->others) {
      if (group.wait != Wait::kBarrier) continue;
      const Inst& inst = program.code[group.pc];
      if (inst.imm == 1)
        for (uint32_t rest = group.mask; rest; rest &= rest - 1)
          warp->reg<uint32_t>(inst.d)[std::countr_zero(rest)] = barrier.true_count;
      if (inst.imm > 1) {
        const bool value = inst.imm == 2 ? barrier.true_count == barrier.lanes : barrier.true_count > 0;
        uint32_t& d = warp->pred(inst.d);
        d = value ? d | group.mask : d & ~group.mask;
      }
      group.wait = Wait::kNone;
      ++group.pc;
    }
    warp->blocked = false;
    warp->min_other = 0;
  }
}

void Machine::deadlock() {
  std::string where;
  Warp* first = nullptr;
  for (Warp& warp : block_.warps) {
    if (!warp.live) continue;
    for (const Group& group : warp.others) {
      if (!first) {
        first = &warp;
        warp.pc = group.pc;
      }
      const Inst& inst = program.code[group.pc];
      where += (where.empty() ? "" : "; ") + ("warp " + std::to_string(warp.index)) + " at PTX line " +
               std::to_string(inst.line) + " (" + program.source->statement(inst.first_token, inst.last_token) + ")";
    }
  }
  first->fault("deadlock", std::countr_zero(first->live), "no warp can run: " + where);
}

}  // namespace ptxvm
