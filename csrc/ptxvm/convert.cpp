// cvt: every pair of integer and floating-point types, all rounding modes, saturation, and pairs of 16-bit values.
#include <cmath>
#include <limits>

#include "half.h"
#include "lanewise.h"

namespace ptxvm {

namespace {

enum class Type : uint8_t { kU8, kS8, kU16, kS16, kU32, kS32, kU64, kS64, kF16, kBf16, kF32, kF64, kNone };

const char* const kTypeNames[] = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64"};

Type type_of(std::string_view name) {
  for (int i = 0; i < int(Type::kNone); ++i)
    if (name == kTypeNames[i]) return Type(i);
  return Type::kNone;
}

uint8_t bytes_of(Type type) {
  static const uint8_t kBytes[] = {1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8};
  return kBytes[int(type)];
}

bool is_integer(Type type) { return type < Type::kF16; }
bool is_signed(Type type) { return is_integer(type) && int(type) % 2 == 1; }

// Inst::imm of a conversion.
constexpr int64_t kModeMask = 7, kSat = 8, kFtz = 16, kToInteger = 32, kRelu = 64;
Rounding mode_of(const Inst& inst) { return Rounding(inst.imm & kModeMask); }

// An integer as a double, to odd where it does not fit.
double integer_to_double(unsigned __int128 magnitude, bool negative) {
  uint64_t bits = uint64_t(magnitude);
  int shift = 0;
  bool lost = false;
  while (bits >> 53) {
    lost |= bits & 1;
    bits >>= 1;
    ++shift;
  }
  const double value = std::ldexp(double(bits | uint64_t(lost)), shift);
  return negative ? -value : value;
}

double round_to_integer(double x, Rounding mode) {
  switch (mode) {
    case Rounding::kNearest:
      return std::nearbyint(x);
    case Rounding::kZero:
      return std::trunc(x);
    case Rounding::kDown:
      return std::floor(x);
    case Rounding::kUp:
      return std::ceil(x);
    case Rounding::kNearestAway:
      return std::round(x);
  }
  return x;
}

// One lane's value on its way: an integer or a double.
struct Any {
  __int128 integer;
  double real;
};

Any read(const uint8_t* at, Type type) {
  const auto load = [&](auto value) {
    std::memcpy(&value, at, sizeof(value));
    return value;
  };
  switch (type) {
    case Type::kU8:
      return {load(uint8_t{}), 0};
    case Type::kS8:
      return {load(int8_t{}), 0};
    case Type::kU16:
      return {load(uint16_t{}), 0};
    case Type::kS16:
      return {load(int16_t{}), 0};
    case Type::kU32:
      return {load(uint32_t{}), 0};
    case Type::kS32:
      return {load(int32_t{}), 0};
    case Type::kU64:
      return {load(uint64_t{}), 0};
    case Type::kS64:
      return {load(int64_t{}), 0};
    case Type::kF16:
      return {0, to_double(load(F16{}))};
    case Type::kBf16:
      return {0, to_double(load(Bf16{}))};
    case Type::kF32:
      return {0, load(float{})};
    default:
      return {0, load(double{})};
  }
}

__int128 lowest_of(Type type) { return is_signed(type) ? -(__int128(1) << (bytes_of(type) * 8 - 1)) : 0; }
__int128 highest_of(Type type) { return (__int128(1) << (bytes_of(type) * 8 - (is_signed(type) ? 1 : 0))) - 1; }

uint64_t to_integer(double x, Type type, Type from, Rounding mode) {
  if (std::isnan(x)) {  // zero, unless 64 bits take part: then the sign bit alone
    const bool wide = from == Type::kF64 || type == Type::kS64 || type == Type::kU64;
    return wide ? 1ull << (bytes_of(type) * 8 - 1) : 0;
  }
  x = round_to_integer(x, mode);
  if (x <= double(lowest_of(type))) return uint64_t(lowest_of(type));
  if (x >= double(highest_of(type))) return uint64_t(highest_of(type));
  return uint64_t(__int128(x));
}

uint64_t to_real(double x, Type type, Rounding mode) {
  switch (type) {
    case Type::kF16:
      return to_f16(x, mode).bits;
    case Type::kBf16:
      return to_bf16(x, mode).bits;
    case Type::kF32:
      return bits_as<uint32_t>(to_f32(x, mode));
    default:
      return bits_as<uint64_t>(x);
  }
}

double flushed(double x, Type type) {
  if (type != Type::kF32 || !(std::fabs(x) < std::numeric_limits<float>::min())) return x;
  return std::copysign(0.0, x);
}

// d = a, types in flags (to) and flags2 (from), register widths in widths. Any pair, a lane at a time.
void convert(Warp& warp, const Inst& inst, uint32_t exec) {
  const Type to = Type(inst.flags), from = Type(inst.flags2);
  const Rounding mode = mode_of(inst);
  const bool ftz = inst.imm & kFtz, sat = inst.imm & kSat;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(exec >> lane & 1)) continue;
    Any value = read(warp.regs + inst.a + lane * inst.widths[1], from);
    uint64_t bits = 0;
    if (is_integer(from) && is_integer(to)) {
      if (sat) value.integer = std::min(std::max(value.integer, lowest_of(to)), highest_of(to));
      bits = uint64_t(value.integer);
    } else {
      if (is_integer(from)) {
        const bool negative = value.integer < 0;
        const auto magnitude = (unsigned __int128)(negative ? -value.integer : value.integer);
        value.real = integer_to_double(magnitude, negative);
        if (to == Type::kF64) value.real = negative ? -double(magnitude) : double(magnitude);
      }
      if (ftz && !is_integer(from)) value.real = flushed(value.real, from);
      if (is_integer(to)) {
        bits = to_integer(value.real, to, from, mode);
      } else {
        if (inst.imm & kToInteger) value.real = round_to_integer(value.real, mode);
        if (sat) value.real = value.real > 0 ? std::fmin(value.real, 1) : 0;
        if (inst.imm & kRelu && value.real < 0) value.real = 0;
        bits = to_real(value.real, to, inst.imm & kToInteger ? Rounding::kNearest : mode);
        if (ftz && to == Type::kF32) bits = bits_as<uint32_t>(float(flushed(bits_as<float>(uint32_t(bits)), to)));
      }
    }
    if (is_integer(to)) {  // a wider register holds the value extended by its sign
      const int unused = 64 - bytes_of(to) * 8;
      bits = is_signed(to) ? uint64_t(int64_t(bits << unused) >> unused) : bits << unused >> unused;
    }
    std::memcpy(warp.regs + inst.d + lane * inst.widths[0], &bits, inst.widths[0]);
  }
}

template <class D, class S>
void convert_plain(Warp& warp, const Inst& inst, uint32_t exec) {  // what a C++ conversion does
  const S* a = warp.reg<S>(inst.a);
  D result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = D(a[lane]);
  keep(warp, inst.d, result, exec);
}

// d = {a in the high half, b in the low half}
template <bool kBf16>
void convert_pair(Warp& warp, const Inst& inst, uint32_t exec) {
  const float *a = warp.reg<float>(inst.a), *b = warp.reg<float>(inst.b);
  uint32_t result[kLanes];
  const Rounding mode = mode_of(inst);
  const bool relu = inst.imm & kRelu;
  if (kBf16 && mode == Rounding::kNearest && !relu) {
    for (int lane = 0; lane < kLanes; ++lane)
      result[lane] = uint32_t(bf16_nearest(a[lane])) << 16 | bf16_nearest(b[lane]);
  } else {
    const auto half = [&](float x) {
      if (relu && x < 0) x = 0;
      return uint32_t(kBf16 ? to_bf16(x, mode).bits : to_f16(x, mode).bits);
    };
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = half(a[lane]) << 16 | half(b[lane]);
  }
  keep(warp, inst.d, result, exec);
}

void convert_to_bf16(Warp& warp, const Inst& inst, uint32_t exec) {  // cvt.rn.bf16.f32
  const float* a = warp.reg<float>(inst.a);
  uint16_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = bf16_nearest(a[lane]);
  keep(warp, inst.d, result, exec);
}

void convert_from_bf16(Warp& warp, const Inst& inst, uint32_t exec) {  // cvt.f32.bf16
  const uint16_t* a = warp.reg<uint16_t>(inst.a);
  float result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = to_float(Bf16{a[lane]});
  keep(warp, inst.d, result, exec);
}

void convert_to_tf32(Warp& warp, const Inst& inst, uint32_t exec) {  // 10 mantissa bits stay
  const float* a = warp.reg<float>(inst.a);
  uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = narrow<10, 8>(a[lane], mode_of(inst)) << 13;
  keep(warp, inst.d, result, exec);
}

Handler fast(Type to, Type from) {
  if (to == Type::kU64 && from == Type::kU32) return convert_plain<uint64_t, uint32_t>;
  if (to == Type::kS64 && from == Type::kS32) return convert_plain<int64_t, int32_t>;
  if ((to == Type::kU32 || to == Type::kS32) && (from == Type::kU64 || from == Type::kS64))
    return convert_plain<uint32_t, uint64_t>;
  if ((to == Type::kU32 || to == Type::kS32) && from == Type::kU16) return convert_plain<uint32_t, uint16_t>;
  if ((to == Type::kU16 || to == Type::kS16) && (from == Type::kU32 || from == Type::kS32))
    return convert_plain<uint16_t, uint32_t>;
  if (to == Type::kF32 && from == Type::kBf16) return convert_from_bf16;
  if (to == Type::kF64 && from == Type::kF32) return convert_plain<double, float>;
  return nullptr;
}

Handler fast_nearest(Type to, Type from) {
  if (to == Type::kF32 && from == Type::kS32) return convert_plain<float, int32_t>;
  if (to == Type::kF32 && from == Type::kU32) return convert_plain<float, uint32_t>;
  if (to == Type::kBf16 && from == Type::kF32) return convert_to_bf16;
  return nullptr;
}

}  // namespace

bool decode_convert(Decoder& decoder, const Statement& statement, Inst& inst) {
  if (statement.parts[0] != "cvt" || statement.parts.size() < 3) return false;
  inst.cls = Class::kConvert;
  bool rounds = false;
  for (size_t i = 1; i + 2 < statement.parts.size(); ++i) {
    const std::string_view part = statement.parts[i];
    static const std::pair<const char*, Rounding> kModes[] = {
        {"rn", Rounding::kNearest}, {"rz", Rounding::kZero},         {"rm", Rounding::kDown},
        {"rp", Rounding::kUp},      {"rna", Rounding::kNearestAway}, {"rni", Rounding::kNearest},
        {"rzi", Rounding::kZero},   {"rmi", Rounding::kDown},        {"rpi", Rounding::kUp}};
    bool known = false;
    for (const auto& [name, mode] : kModes)
      if (part == name) {
        inst.imm |= int64_t(mode) | (part.back() == 'i' ? kToInteger : 0);
        rounds = known = true;
      }
    if (part == "sat")
      inst.imm |= kSat;
    else if (part == "ftz")
      inst.imm |= kFtz;
    else if (part == "relu")
      inst.imm |= kRelu;
    else if (!known)
      return false;
  }
  const std::string_view to_name = statement.parts[statement.parts.size() - 2], from_name = statement.parts.back();
  if (to_name == "bf16x2" || to_name == "f16x2") {
    if (from_name != "f32" || statement.operands.size() != 3 || !rounds) return false;
    inst.run = to_name == "bf16x2" ? convert_pair<true> : convert_pair<false>;
    inst.a = decoder.source(statement.operands[1], 'f');
    inst.b = decoder.source(statement.operands[2], 'f');
    inst.d = decoder.destination(statement.operands[0], 'w');
    return true;
  }
  if (statement.operands.size() != 2) return false;
  if (to_name == "tf32") {
    if (from_name != "f32" || !rounds) return false;
    inst.run = convert_to_tf32;
    inst.a = decoder.source(statement.operands[1], 'f');
    inst.d = decoder.destination(statement.operands[0], 'w');
    return true;
  }
  const Type to = type_of(to_name), from = type_of(from_name);
  if (to == Type::kNone || from == Type::kNone) return false;
  inst.flags = uint8_t(to);
  inst.flags2 = uint8_t(from);
  inst.a = decoder.any_source(statement.operands[1], inst.widths[1], bytes_of(from));
  inst.d = decoder.any_destination(statement.operands[0], inst.widths[0]);
  if (inst.widths[0] < bytes_of(to) || inst.widths[1] < bytes_of(from) || inst.widths[0] == 0)
    decoder.fail("a register is narrower than the type");
  inst.run = convert;
  if (inst.widths[0] == bytes_of(to) && inst.widths[1] == bytes_of(from)) {
    Handler quick = (inst.imm & ~kModeMask) == 0 && !rounds ? fast(to, from) : nullptr;
    if (rounds && inst.imm == int64_t(Rounding::kNearest)) quick = fast_nearest(to, from);
    if (quick) inst.run = quick;
  }
  return true;
}

void list_convert_forms(std::vector<std::string>& names) {
  for (const char* to : kTypeNames)
    for (const char* from : kTypeNames) names.push_back(std::string("cvt{.rounding}{.ftz}{.sat}.") + to + "." + from);
  for (const char* name : {"cvt.rounding{.relu}.bf16x2.f32", "cvt.rounding{.relu}.f16x2.f32", "cvt.rounding.tf32.f32"})
    names.push_back(name);
}

}  // namespace ptxvm
