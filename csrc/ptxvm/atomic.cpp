// atom and red: lanes in ascending order.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "memory.h"

namespace ptxvm {

namespace {

enum class Atomic : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };
enum class Value : uint8_t { kUnsigned, kSigned, kF32, kF64, kF16, kF16x2, kBf16, kBf16x2 };

template <class T>
uint64_t combine_integer(Atomic op, uint64_t old_bits, uint64_t b_bits, uint64_t c_bits) {
  const T old = T(old_bits), b = T(b_bits);
  switch (op) {
    case Atomic::kAdd:
      return uint64_t(old) + uint64_t(b);
    case Atomic::kMin:
      return uint64_t(std::min(old, b));
    case Atomic::kMax:
      return uint64_t(std::max(old, b));
    case Atomic::kAnd:
      return old_bits & b_bits;
    case Atomic::kOr:
      return old_bits | b_bits;
    case Atomic::kXor:
      return old_bits ^ b_bits;
    case Atomic::kExch:
      return b_bits;
    case Atomic::kCas:
      return old == b ? c_bits : old_bits;
    case Atomic::kInc:
      return old >= b ? 0 : uint64_t(old) + 1;
    case Atomic::kDec:
      return old == 0 || old > b ? b_bits : uint64_t(old) - 1;
  }
  return 0;
}

template <class F>
double combine_float(Atomic op, F a, F b) {
  if (op == Atomic::kMin) return std::fmin(to_double(a), to_double(b));
  if (op == Atomic::kMax) return std::fmax(to_double(a), to_double(b));
  return add_to_odd(to_double(a), to_double(b));
}

uint16_t combine_half(Atomic op, bool bf16, uint16_t a, uint16_t b) {
  if (op != Atomic::kAdd && op != Atomic::kMin && op != Atomic::kMax) return b;
  return bf16 ? to_bf16(combine_float(op, Bf16{a}, Bf16{b})).bits : to_f16(combine_float(op, F16{a}, F16{b})).bits;
}

uint64_t combine(Atomic op, Value value, uint32_t bytes, uint64_t old, uint64_t b, uint64_t c) {
  if (op == Atomic::kExch) return b;
  switch (value) {
    case Value::kF32: {
      const float x = bits_as<float>(uint32_t(old)), y = bits_as<float>(uint32_t(b));
      const float result = op == Atomic::kMin ? std::fmin(x, y) : op == Atomic::kMax ? std::fmax(x, y) : x + y;
      return bits_as<uint32_t>(result);
    }
    case Value::kF64:
      return bits_as<uint64_t>(bits_as<double>(old) + bits_as<double>(b));
    case Value::kF16:
      return combine_half(op, false, uint16_t(old), uint16_t(b));
    case Value::kBf16:
      return combine_half(op, true, uint16_t(old), uint16_t(b));
    case Value::kF16x2:
    case Value::kBf16x2: {
      const bool bf16 = value == Value::kBf16x2;
      return combine_half(op, bf16, uint16_t(old), uint16_t(b)) |
             uint64_t(combine_half(op, bf16, uint16_t(old >> 16), uint16_t(b >> 16))) << 16;
    }
    case Value::kSigned:
      return bytes == 8 ? combine_integer<int64_t>(op, old, b, c) : combine_integer<int32_t>(op, old, b, c);
    case Value::kUnsigned:
      break;
  }
  if (bytes == 8) return combine_integer<uint64_t>(op, old, b, c);
  if (bytes == 2) return combine_integer<uint16_t>(op, old, b, c);
  return combine_integer<uint32_t>(op, old, b, c);
}

// d (0: none) = [a]; [a] = op([a], b, c). Lanes in ascending order. flags: Atomic, flags2: Value.
void atomic(Warp& warp, const Inst& inst, uint32_t exec) {
  Lanes lanes;
  addresses(warp, inst, lanes);
  Counters& counters = warp.machine->counters;
  by_space(inst, exec, lanes, [&](Space space, uint32_t mask) {
    const Touches touches{Touch::kWrite, true, lanes.address, mask, nullptr, 0};
    if (space == Space::kShared)
      count_wavefronts(warp, lanes.address, mask, inst.bytes);
    else if (space == Space::kGlobal) {
      check_global(warp, lanes, mask, inst.bytes, touches);
      count_sectors(lanes, mask, inst.bytes, counters.atomic_sectors, counters.atomic_ideal, counters.atomic_bytes);
    } else
      warp.fault("unsupported", std::countr_zero(mask), "an atomic on local memory or parameters");
    each_lane(mask, [&](int lane) {
      uint8_t* at = reinterpret_cast<uint8_t*>(lanes.address[lane]);
      if (space == Space::kShared) {
        const uint64_t offset = lanes.address[lane] - kFirstOffset;
        if (offset + inst.bytes <= warp.block->state.size() && offset < warp.block->state.size())
          for (uint32_t i = 0; i < inst.bytes; ++i)
            if (warp.block->state[offset + i] != kValid)
              shared_poison(warp, lane, offset, warp.block->state.data() + offset, inst.bytes);
        at = shared_at(warp, lane, lanes.address[lane], inst.bytes, touches);
      }
      const auto value = [&](uint32_t place) {
        uint64_t bits = 0;
        std::memcpy(&bits, warp.regs + place + lane * inst.bytes, inst.bytes);
        return bits;
      };
      uint64_t old = 0;
      std::memcpy(&old, at, inst.bytes);
      const uint64_t result =
          combine(Atomic(inst.flags), Value(inst.flags2), inst.bytes, old, value(inst.b), inst.c ? value(inst.c) : 0);
      std::memcpy(at, &result, inst.bytes);
      if (inst.d) std::memcpy(warp.regs + inst.d + lane * inst.bytes, &old, inst.bytes);
    });
  });
}

}  // namespace

bool decode_atomic(Decoder& decoder, const Statement& statement, Inst& inst) {
  static const std::pair<const char*, Atomic> kOps[] = {
      {"add", Atomic::kAdd}, {"min", Atomic::kMin}, {"max", Atomic::kMax},   {"and", Atomic::kAnd},
      {"or", Atomic::kOr},   {"xor", Atomic::kXor}, {"exch", Atomic::kExch}, {"cas", Atomic::kCas},
      {"inc", Atomic::kInc}, {"dec", Atomic::kDec}};
  const bool has_result = statement.parts[0] == "atom";
  bool op_known = false;
  std::string_view type;
  for (size_t i = 1; i < statement.parts.size(); ++i) {
    const std::string_view part = statement.parts[i];
    if (space_part(part, inst.space) || is_hint(part) || part == "noftz" || part == "relaxed" || part == "acquire" ||
        part == "release" || part == "acq_rel")
      continue;
    const auto op = std::find_if(std::begin(kOps), std::end(kOps), [&](const auto& one) { return part == one.first; });
    if (op != std::end(kOps)) {
      inst.flags = uint8_t(op->second);
      op_known = true;
    } else if (i + 1 == statement.parts.size()) {
      type = part;
    } else {
      return false;
    }
  }
  static const std::pair<const char*, Value> kTypes[] = {
      {"b16", Value::kUnsigned}, {"b32", Value::kUnsigned}, {"b64", Value::kUnsigned}, {"u32", Value::kUnsigned},
      {"u64", Value::kUnsigned}, {"s32", Value::kSigned},   {"s64", Value::kSigned},   {"f32", Value::kF32},
      {"f64", Value::kF64},      {"f16", Value::kF16},      {"f16x2", Value::kF16x2},  {"bf16", Value::kBf16},
      {"bf16x2", Value::kBf16x2}};
  const auto value =
      std::find_if(std::begin(kTypes), std::end(kTypes), [&](const auto& one) { return type == one.first; });
  if (!op_known || value == std::end(kTypes)) return false;
  inst.flags2 = uint8_t(value->second);
  inst.bytes = uint8_t(type_bytes(type, statement.line));
  inst.cls = Class::kAtomic;
  const char letter = inst.bytes == 2 ? 'h' : inst.bytes == 4 ? 'w' : 'l';
  const Atomic op = Atomic(inst.flags);
  const size_t sources = op == Atomic::kCas ? 2 : 1, first = has_result ? 1 : 0;
  if (statement.operands.size() != first + 1 + sources) return false;
  decoder.address(statement.operands[first], inst);
  inst.b = decoder.source(statement.operands[first + 1], letter);
  if (sources == 2) inst.c = decoder.source(statement.operands[first + 2], letter);
  if (has_result && statement.operands[0].kind != Operand::kSink)
    inst.d = decoder.destination(statement.operands[0], letter);
  inst.run = atomic;
  return true;
}

}  // namespace ptxvm
