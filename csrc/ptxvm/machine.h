// The machine's state: a decoded kernel (Program), its lanes' registers (Warp), its block's shared memory (Block) and
// the launch (Machine).
//
// A register is an array over the 32 lanes, at a byte offset in the warp's register file: 64, 128 or 256 bytes for 16,
// 32 and 64-bit registers, and one 32-bit mask for a predicate. Immediates and special registers (%tid.x, ...) have
// places in the same file, filled before the first instruction, so that an instruction only ever sees offsets.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "parse.h"

namespace ptxvm {

constexpr int kLanes = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

// Generic addresses: host addresses are global; these windows, which no host address falls in, are the rest.
// Addresses in shared and local space start at kFirstOffset, so that a zero address is out of bounds.
constexpr uint64_t kSharedWindow = 0x0100'0000'0000'0000, kLocalWindow = 0x0200'0000'0000'0000,
                   kParamWindow = 0x0300'0000'0000'0000, kWindowMask = 0xff00'0000'0000'0000;
constexpr uint64_t kFirstOffset = 1024;

struct Warp;
struct Inst;
using Handler = void (*)(Warp& warp, const Inst& inst, uint32_t exec);

enum class Kind : uint8_t {
  kPlain,        // lane-wise: nothing but its handler
  kBranch,       // to `target`
  kBranchTable,  // to table[a]
  kExit,
  kBarrier,   // bar.* / barrier.*
  kWarpSync,  // waits for the lanes of a member mask, then its handler
  kWholeWarp  // needs all 32 lanes (mma, ldmatrix)
};

enum class Class : uint8_t {
  kInteger,
  kFloat,
  kHalf,
  kSpecial,
  kConvert,
  kMove,
  kPredicate,
  kGlobal,
  kShared,
  kLocal,
  kParam,
  kAsync,
  kAtomic,
  kShuffle,
  kTensor,
  kMatrixLoad,
  kBarrier,
  kControl,
  kCount
};
const char* class_name(Class c);
constexpr int64_t kWarpBarrier = -77;  // Inst::imm of bar.warp.sync, among the warp-synchronous kind

struct Inst {
  Handler run = nullptr;
  uint32_t d = 0, a = 0, b = 0, c = 0;       // offsets in the register file: destination and sources
  uint32_t guard = 0;                        // offset of the guarding predicate; 0 is the always-true one
  uint32_t target = 0;                       // branch: instruction; barrier: offset of the count, or 0
  int64_t imm = 0;                           // address offset, or what the handler defines
  const uint32_t* list = nullptr;            // further operands: vector elements, branch targets, ...
  const uint32_t* reads = nullptr;           // register numbers, for the poison check
  uint16_t read_count = 0, write_count = 0;  // the written ones follow the read ones
  Kind kind = Kind::kPlain;
  Class cls = Class::kInteger;
  bool guard_negated = false;
  Space space = Space::kGeneric;
  uint8_t bytes = 0, count = 1;  // memory: bytes of an element, elements of a vector
  uint8_t flags = 0;             // what the handler defines
  uint8_t flags2 = 0;
  bool wide_address = true;    // the base register has 64 bits
  uint8_t widths[2] = {0, 0};  // bytes of destination and source registers where they may differ from the type
  int line = 0;
  uint32_t opcode = 0;  // index in Program::opcodes
  size_t first_token = 0, last_token = 0;
};

struct Program {
  Program() = default;
  Program(const Program&) = delete;
  std::string name;
  const Source* source = nullptr;
  std::vector<Inst> code;
  std::vector<std::string> opcodes;
  std::vector<std::string> register_names;  // by register number
  std::vector<std::unique_ptr<std::vector<uint32_t>>> lists;
  struct Constant {
    uint32_t offset, bytes;  // bytes 0: a predicate
    uint64_t value;
  };
  std::vector<Constant> constants;
  // Special registers: name and place of those that the kernel reads.
  std::map<std::string, uint32_t> specials;
  uint32_t register_bytes = 0;  // whole file
  uint32_t shared_bytes = 0;    // static
  uint32_t dynamic_offset = 0;  // where .extern .shared starts, relative to kFirstOffset
  uint32_t local_bytes = 0;     // per lane
  std::vector<Variable> parameters;
  std::vector<uint32_t> parameter_offsets;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 0;
};

struct Fault {
  std::string kind, message, kernel, instruction;
  int line = 0;
  std::array<uint32_t, 3> block{}, thread{};
};

// Who touched a byte range last, for the race detector.
struct Access {
  uint32_t stamp = 0;  // the warp's clock
  uint32_t epoch = 0;  // shared: number of whole-block barriers; global: block number + 1. 0: nobody
  uint16_t warp = 0;
  uint8_t lane = 0;    // kManyLanes: several lanes of the warp
  uint8_t strong = 0;  // atomic or volatile: does not race with others like it
};
constexpr uint8_t kManyLanes = 255;

struct Shadow {
  Access write, read, other_read;  // reads of two different warps: a third replaces other_read
};

// A word whose bytes were touched apart has one Shadow per byte.
struct ShadowMap {
  std::vector<Shadow> words;
  std::vector<uint32_t> split;  // word -> index in bytes + 1, or 0
  std::vector<std::array<Shadow, 4>> bytes;
};

struct Buffer {
  uint64_t address, bytes;
  bool writable;
  std::string label;
  std::unique_ptr<ShadowMap> shadow;  // global_races
};

struct Copy {  // one lane's cp.async on its way
  uint32_t group;
  uint32_t offset;  // in shared memory, kFirstOffset taken off
  uint8_t lane, bytes;
  uint8_t data[16];
};

enum class Wait : uint8_t { kNone, kLanes, kBarrier };

struct Group {  // lanes of a warp at one instruction
  uint32_t pc, mask;
  Wait wait = Wait::kNone;
};

struct Block;
struct Machine;

struct Warp {
  uint8_t* regs = nullptr;
  uint32_t* written = nullptr;  // register number -> lanes that wrote it
  Block* block = nullptr;
  Machine* machine = nullptr;
  uint32_t index = 0;
  uint32_t live = 0, active = 0, pc = 0;
  std::vector<Group> others;
  uint32_t min_other = UINT32_MAX;  // smallest pc of a runnable group in `others`
  bool has_waiting = false;
  bool blocked = false;  // all live lanes wait at a barrier
  // Clock for the race detector: accesses of warp v with a stamp below seen[v] happened before now.
  uint32_t stamp = 1;
  std::vector<uint32_t> seen;
  std::unique_ptr<std::array<std::array<uint32_t, kLanes>, kLanes>> lane_seen;  // partial bar.warp.sync since then
  std::vector<Copy> copies;
  std::array<uint32_t, kLanes> copy_groups{};  // committed so far
  std::vector<uint8_t> local, local_valid;

  template <class T>
  T* reg(uint32_t offset) const {
    return reinterpret_cast<T*>(regs + offset);
  }
  uint32_t& pred(uint32_t offset) const { return *reinterpret_cast<uint32_t*>(regs + offset); }
  [[noreturn]] void fault(const char* kind, int lane, const std::string& detail) const;
};

struct BarrierState {
  uint32_t expected = 0;  // threads; 0: all that live
  uint32_t arrived = 0;   // threads
  bool in_use = false, counted = false;
  std::vector<Warp*> waiting;
  bool arrivals_only = false;
  uint32_t true_count = 0, lanes = 0;  // of bar.red's predicate
  std::vector<uint32_t> joined;        // clocks of all that arrived
};

enum : uint8_t { kAbsent = 0, kValid = 1, kInFlight = 2 };  // state of a byte of shared memory

struct Block {
  std::array<uint32_t, 3> id{};
  uint32_t number = 0, threads = 0;
  std::vector<Warp> warps;
  std::array<BarrierState, 16> barriers;
  std::vector<uint8_t> shared, state;
  ShadowMap shadow;
  uint32_t epoch = 1;
};

struct Counters {
  uint64_t load_sectors = 0, load_ideal = 0, load_bytes = 0;
  uint64_t store_sectors = 0, store_ideal = 0, store_bytes = 0;
  uint64_t async_sectors = 0, async_ideal = 0, async_bytes = 0;
  uint64_t atomic_sectors = 0, atomic_ideal = 0, atomic_bytes = 0;
  uint64_t shared_wavefronts = 0, shared_ideal = 0, shared_accesses = 0;
  uint64_t mma = 0, blocks = 0, instructions = 0, lane_instructions = 0;
};

struct Launch {
  std::array<uint32_t, 3> grid{1, 1, 1}, block{1, 1, 1};
  std::vector<uint8_t> parameters;
  uint32_t shared_bytes = 0;
  std::vector<Buffer> buffers;
  uint64_t seed = 0;
  bool races = true, global_races = false, poison_error = true, shuffle_blocks = false;
  uint64_t first_block = 0, last_block = UINT64_MAX;
  uint64_t max_instructions = 0;
};

struct Machine {
  Machine(const Program& program, Launch launch);
  void run();

  const Program& program;
  Launch launch;
  Counters counters;
  std::vector<uint64_t> executed, executed_lanes;  // by instruction
  Buffer* last_buffer = nullptr;
  std::array<uint32_t, 3> current_block{};
  Buffer* find_buffer(uint64_t address, uint64_t bytes);

 private:
  void run_block(uint64_t number);
  void start_block(uint64_t number);
  bool run_warp(Warp& warp, uint32_t budget);
  void regroup(Warp& warp);
  void branch(Warp& warp, const Inst& inst, uint32_t taken);
  void leave(Warp& warp, uint32_t lanes);
  bool warp_sync(Warp& warp, const Inst& inst, uint32_t exec);
  bool arrive(Warp& warp, const Inst& inst, uint32_t exec);
  void check_barriers();
  void release(uint32_t id);
  [[noreturn]] void deadlock();
  [[noreturn]] void poison(const Warp& warp, const Inst& inst, uint32_t exec);
  void park(Warp& warp, uint32_t mask, Wait wait);

  Block block_;
  std::vector<uint8_t> registers_;
  std::vector<uint32_t> written_;
  std::mt19937_64 random_;
};

enum class Touch : uint8_t { kRead, kWrite };

// memory.cpp
struct Touches {  // what a warp instruction does to memory, for the checks of one lane
  Touch touch;
  bool strong;              // atomic, volatile, relaxed, ...
  const uint64_t* address;  // by lane
  uint32_t exec;
  const uint8_t* data;  // what a store writes, `stride` bytes a lane; nullptr: not known
  uint32_t stride;
  bool collective = false;  // lanes read each other's bytes: the reader is the whole warp
};
// Bounds, poison and races of one lane's access to shared memory; where its bytes are.
uint8_t* shared_at(Warp& warp, int lane, uint64_t offset, uint32_t bytes, const Touches& touches);
void count_wavefronts(Warp& warp, const uint64_t* address, uint32_t exec, uint32_t bytes);

// decode.cpp
std::unique_ptr<Program> decode(const Source& source, const std::string& kernel,
                                const std::map<std::string, uint64_t>& module_addresses);

std::string hex(uint64_t value);

}  // namespace ptxvm
