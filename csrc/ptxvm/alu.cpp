// Integer, bit, selection and predicate instructions.
#include <algorithm>
#include <bit>
#include <limits>

#include "lanewise.h"

namespace ptxvm {

namespace {

template <class T>
struct Wider;
template <>
struct Wider<int16_t> {
  using type = int32_t;
};
template <>
struct Wider<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wider<int32_t> {
  using type = int64_t;
};
template <>
struct Wider<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wider<int64_t> {
  using type = __int128;
};
template <>
struct Wider<uint64_t> {
  using type = unsigned __int128;
};

template <class T>
T high(T a, T b) {
  return T((typename Wider<T>::type(a) * b) >> (sizeof(T) * 8));
}

// Division by zero gives all ones and the remainder the dividend, as on the hardware (the manual leaves it open).
template <class T>
T divide(T a, T b) {
  if (b == 0) return T(-1);
  if (std::is_signed_v<T> && b == T(-1)) return T(0 - std::make_unsigned_t<T>(a));
  return T(a / b);
}

template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}

// Wrapping arithmetic, in unsigned.
template <class T>
T plus(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return T(U(U(a) + U(b)));
}
template <class T>
T minus(T a, T b) {
  using U = std::make_unsigned_t<T>;
  return T(U(U(a) - U(b)));
}
template <class T>
T times(T a, T b) {
  using U = std::conditional_t<sizeof(T) == 2, uint32_t, std::make_unsigned_t<T>>;
  return T(U(a) * U(b));
}

template <class T>
T clamp(__int128 value) {
  if (value > std::numeric_limits<T>::max()) return std::numeric_limits<T>::max();
  if (value < std::numeric_limits<T>::min()) return std::numeric_limits<T>::min();
  return T(value);
}

constexpr char letter_of(size_t bytes) { return bytes == 2 ? 'h' : bytes == 4 ? 'w' : 'l'; }

std::string letters(const char* pattern, char letter) {  // "t=tt" with the type's letter for t
  std::string text(pattern);
  std::replace(text.begin(), text.end(), 't', letter);
  return text;
}

// d = a + b + carry and the like; imm: 1 reads CC.CF, 2 writes it. c is the addend of mad, list[0] is CC.CF.
template <class T, int kOp>  // 0 add, 1 sub, 2 mad.lo, 3 mad.hi
void with_carry(Warp& warp, const Inst& inst, uint32_t exec) {
  using U = std::make_unsigned_t<T>;
  const T *a = warp.reg<T>(inst.a), *b = warp.reg<T>(inst.b), *c = warp.reg<T>(inst.c);
  uint32_t& flag = warp.pred(uint32_t(inst.list[0]));
  uint32_t out = 0;
  T result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const unsigned __int128 in = inst.imm & 1 ? flag >> lane & 1 : 0;
    unsigned __int128 value;
    constexpr int kBits = sizeof(T) * 8;
    if (kOp == 0)
      value = (unsigned __int128)U(a[lane]) + U(b[lane]) + in;
    else if (kOp == 1)
      value = (unsigned __int128)U(a[lane]) - U(b[lane]) - in;
    else
      value = (unsigned __int128)U(kOp == 2 ? times(a[lane], b[lane]) : high(a[lane], b[lane])) + U(c[lane]) + in;
    result[lane] = T(U(value));
    out |= uint32_t(value >> kBits & 1) << lane;
  }
  keep(warp, inst.d, result, exec);
  if (inst.imm & 2) flag = (flag & ~exec) | (out & exec);
}

template <class T>
void integer_type(Table& table, const std::string& t) {
  using W = typename Wider<T>::type;
  const char letter = letter_of(sizeof(T));
  const std::string one = letters("t=t", letter), two = letters("t=tt", letter), three = letters("t=ttt", letter);
  const auto binary = [&](const char* name, auto f) { table.binary<T, T, T>(name + ("." + t), two.c_str(), f); };
  binary("add", [](T a, T b) { return plus(a, b); });
  binary("sub", [](T a, T b) { return minus(a, b); });
  binary("mul.lo", [](T a, T b) { return times(a, b); });
  binary("mul.hi", [](T a, T b) { return high(a, b); });
  binary("div", [](T a, T b) { return divide(a, b); });
  binary("rem", [](T a, T b) { return remainder(a, b); });
  binary("min", [](T a, T b) { return b < a ? b : a; });
  binary("max", [](T a, T b) { return a < b ? b : a; });
  table.ternary<T, T, T, T>("mad.lo." + t, three.c_str(), [](T a, T b, T c) { return plus(times(a, b), c); });
  table.ternary<T, T, T, T>("mad.hi." + t, three.c_str(), [](T a, T b, T c) { return plus(high(a, b), c); });
  table.ternary<T, T, T, T>("sad." + t, three.c_str(),
                            [](T a, T b, T c) { return plus(c, a < b ? minus(b, a) : minus(a, b)); });
  if constexpr (sizeof(T) <= 4) {
    const std::string wide = std::string(1, letter_of(2 * sizeof(T))) + letters("=tt", letter);
    table.binary<W, T, T>("mul.wide." + t, wide.c_str(), [](T a, T b) { return W(W(a) * W(b)); });
    table.ternary<W, T, T, W>("mad.wide." + t, (wide + letter_of(2 * sizeof(T))).c_str(), [](T a, T b, W c) {
      return W(std::make_unsigned_t<W>(W(a) * W(b)) + std::make_unsigned_t<W>(c));
    });
  }
  if constexpr (std::is_signed_v<T>) {
    table.unary<T, T>("abs." + t, one.c_str(), [](T a) { return a < 0 ? minus(T(0), a) : a; });
    table.unary<T, T>("neg." + t, one.c_str(), [](T a) { return minus(T(0), a); });
  }
  table.binary<T, T, uint32_t>("shr." + t, (one + "w").c_str(), [](T a, uint32_t b) {
    constexpr uint32_t kBits = sizeof(T) * 8;
    if (b >= kBits) return T(a < 0 ? -1 : 0);
    return T(a >> b);
  });
  table.comparison<T>("eq", t, letter, [](T a, T b) { return a == b; });
  table.comparison<T>("ne", t, letter, [](T a, T b) { return a != b; });
  table.comparison<T>("lt", t, letter, [](T a, T b) { return a < b; });
  table.comparison<T>("le", t, letter, [](T a, T b) { return a <= b; });
  table.comparison<T>("gt", t, letter, [](T a, T b) { return a > b; });
  table.comparison<T>("ge", t, letter, [](T a, T b) { return a >= b; });
  if constexpr (!std::is_signed_v<T>) {  // names of their own for unsigned comparisons
    table.comparison<T>("lo", t, letter, [](T a, T b) { return a < b; });
    table.comparison<T>("ls", t, letter, [](T a, T b) { return a <= b; });
    table.comparison<T>("hi", t, letter, [](T a, T b) { return a > b; });
    table.comparison<T>("hs", t, letter, [](T a, T b) { return a >= b; });
  }
  if constexpr (sizeof(T) >= 4) {
    for (int bits = 1; bits < 4; ++bits) {
      const std::string cc = bits & 2 ? ".cc" : "", c = bits & 1 ? "c" : "";
      table.add("add" + c + cc + "." + t, with_carry<T, 0>, two + "C", bits);
      table.add("sub" + c + cc + "." + t, with_carry<T, 1>, two + "C", bits);
      table.add("mad" + c + ".lo" + cc + "." + t, with_carry<T, 2>, three + "C", bits);
      table.add("mad" + c + ".hi" + cc + "." + t, with_carry<T, 3>, three + "C", bits);
    }
    // Bit fields: position and length are the low byte of their operands.
    table.ternary<T, T, uint32_t, uint32_t>("bfe." + t, (one + "ww").c_str(), [](T a, uint32_t b, uint32_t c) {
      constexpr int kBits = sizeof(T) * 8;
      using U = std::make_unsigned_t<T>;
      const int position = int(b & 255), length = int(c & 255);
      if (length == 0) return T(0);
      const int sign_at = std::min(position + length - 1, kBits - 1);
      const U sign = std::is_signed_v<T> && (U(a) >> sign_at & 1) ? U(-1) : U(0);
      U result = position < kBits ? U(a) >> position : U(0);
      const int available = std::min(length, std::max(kBits - position, 0));
      const U mask = available >= kBits ? U(-1) : (U(1) << available) - 1;
      return T((result & mask) | (sign & ~mask));
    });
    table.unary<uint32_t, T>("bfind." + t, letters("w=t", letter).c_str(), [](T a) {
      std::make_unsigned_t<T> bits = a;
      if (std::is_signed_v<T> && a < 0) bits = ~bits;
      return bits ? uint32_t(sizeof(T) * 8 - 1 - std::countl_zero(bits)) : 0xffffffffu;
    });
    table.unary<uint32_t, T>("bfind.shiftamt." + t, letters("w=t", letter).c_str(), [](T a) {
      std::make_unsigned_t<T> bits = a;
      if (std::is_signed_v<T> && a < 0) bits = ~bits;
      return bits ? uint32_t(std::countl_zero(bits)) : 0xffffffffu;
    });
  }
}

template <class T>
void bit_type(Table& table, const std::string& t) {
  const char letter = letter_of(sizeof(T));
  const std::string one = letters("t=t", letter), two = letters("t=tt", letter);
  constexpr uint32_t kBits = sizeof(T) * 8;
  table.binary<T, T, T>("and." + t, two.c_str(), [](T a, T b) { return T(a & b); });
  table.binary<T, T, T>("or." + t, two.c_str(), [](T a, T b) { return T(a | b); });
  table.binary<T, T, T>("xor." + t, two.c_str(), [](T a, T b) { return T(a ^ b); });
  table.unary<T, T>("not." + t, one.c_str(), [](T a) { return T(~a); });
  table.unary<T, T>("cnot." + t, one.c_str(), [](T a) { return T(a == 0); });
  table.binary<T, T, uint32_t>("shl." + t, (one + "w").c_str(),
                               [](T a, uint32_t b) { return T(b >= kBits ? 0 : T(a << (b % kBits))); });
  table.binary<T, T, uint32_t>("shr." + t, (one + "w").c_str(),
                               [](T a, uint32_t b) { return T(b >= kBits ? 0 : T(a >> (b % kBits))); });
  table.comparison<T>("eq", t, letter, [](T a, T b) { return a == b; });
  table.comparison<T>("ne", t, letter, [](T a, T b) { return a != b; });
  if constexpr (sizeof(T) >= 4) {
    const std::string count = letters("w=t", letter);
    table.unary<uint32_t, T>("popc." + t, count.c_str(), [](T a) { return uint32_t(std::popcount(a)); });
    table.unary<uint32_t, T>("clz." + t, count.c_str(), [](T a) { return uint32_t(std::countl_zero(a)); });
    table.unary<T, T>("brev." + t, one.c_str(), [](T a) {
      T result = 0;
      for (uint32_t i = 0; i < kBits; ++i) result |= T(T(a >> i & 1) << (kBits - 1 - i));
      return result;
    });
  }
}

// bfi.b32 f, a, b, c, d: `length` low bits of a into b at `position`. The length is list[0].
template <class T>
void insert_bits(Warp& warp, const Inst& inst, uint32_t exec) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  const T *a = warp.reg<T>(inst.a), *b = warp.reg<T>(inst.b);
  const uint32_t *positions = warp.reg<uint32_t>(inst.c), *lengths = warp.reg<uint32_t>(inst.list[0]);
  T result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t position = positions[lane] & 255, length = lengths[lane] & 255;
    const T low = length >= kBits ? T(-1) : T((T(1) << length) - 1);
    const T mask = position >= kBits ? T(0) : T(low << position);
    result[lane] = T((b[lane] & ~mask) | ((position >= kBits ? T(0) : T(a[lane] << position)) & mask));
  }
  keep(warp, inst.d, result, exec);
}

// lop3.b32 d, a, b, c, table: the table's bit (a bit, b bit, c bit).
void logic3(Warp& warp, const Inst& inst, uint32_t exec) {
  const uint32_t *a = warp.reg<uint32_t>(inst.a), *b = warp.reg<uint32_t>(inst.b), *c = warp.reg<uint32_t>(inst.c);
  uint32_t result[kLanes] = {};
  for (int row = 0; row < 8; ++row) {
    if (!(inst.imm >> row & 1)) continue;
    const uint32_t flip_a = row & 4 ? 0 : ~0u, flip_b = row & 2 ? 0 : ~0u, flip_c = row & 1 ? 0 : ~0u;
    for (int lane = 0; lane < kLanes; ++lane)
      result[lane] |= (a[lane] ^ flip_a) & (b[lane] ^ flip_b) & (c[lane] ^ flip_c);
  }
  keep(warp, inst.d, result, exec);
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15;
    uint8_t byte = uint8_t(bytes >> (8 * (pick & 7)));
    if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= uint32_t(byte) << (8 * i);
  }
  return result;
}

uint32_t permute_mode(int mode, uint32_t c) {  // the selector that a mode of prmt stands for
  static const uint16_t kSelectors[6][4] = {{0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
                                            {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
                                            {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
  return kSelectors[mode][c & 3];
}

template <int kMode>
void permute_bytes(Warp& warp, const Inst& inst, uint32_t exec) {
  const uint32_t *a = warp.reg<uint32_t>(inst.a), *b = warp.reg<uint32_t>(inst.b), *c = warp.reg<uint32_t>(inst.c);
  uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = permute(a[lane], b[lane], kMode < 0 ? c[lane] : permute_mode(kMode, c[lane]));
  keep(warp, inst.d, result, exec);
}

// dp4a / dp2a: dot products of bytes (with halves of b's bytes for dp2a), added to c.
template <class A, class B>
uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i) c += uint32_t(int32_t(A(a >> (8 * i))) * int32_t(B(b >> (8 * i))));
  return c;
}
template <class A, class B, int kHigh>
uint32_t dot2(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 2; ++i) c += uint32_t(int32_t(A(a >> (16 * i))) * int32_t(B(b >> (8 * (i + 2 * kHigh)))));
  return c;
}

// The position of the n-th set bit from `base`, upwards for a positive n.
uint32_t find_nth(uint32_t mask, uint32_t base, int32_t offset) {
  if (offset == 0) return mask >> (base & 31) & 1 ? base & 31 : 0xffffffffu;
  const int step = offset > 0 ? 1 : -1;
  int left = offset > 0 ? offset : -offset;
  for (int at = int(base & 31); at >= 0 && at < 32; at += step)
    if ((mask >> at & 1) && --left == 0) return uint32_t(at);
  return 0xffffffffu;
}

template <class T>
void select(Warp& warp, const Inst& inst, uint32_t exec) {
  const T *a = warp.reg<T>(inst.a), *b = warp.reg<T>(inst.b);
  const uint32_t p = warp.pred(inst.c);
  T result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = p >> lane & 1 ? a[lane] : b[lane];
  keep(warp, inst.d, result, exec);
}

template <class F>
void predicates(Warp& warp, const Inst& inst, uint32_t exec) {
  keep_predicate(warp, inst.d, F{}(warp.pred(inst.a), warp.pred(inst.b)), exec);
}

template <class F>
void add_predicates(Table& table, const char* name, const char* operands, F) {
  table.add(name, predicates<F>, operands);
}

void other_forms(Table& table) {
  const auto saturate = [](int32_t a, int32_t b) { return clamp<int32_t>(__int128(a) + b); };
  table.binary<int32_t, int32_t, int32_t>("add.sat.s32", "w=ww", saturate);
  table.binary<int32_t, int32_t, int32_t>("sub.sat.s32", "w=ww",
                                          [](int32_t a, int32_t b) { return clamp<int32_t>(__int128(a) - b); });
  table.ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      "shf.l.wrap.b32", "w=www",
      [](uint32_t a, uint32_t b, uint32_t c) { return uint32_t((uint64_t(b) << 32 | a) << (c & 31) >> 32); });
  table.ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      "shf.r.wrap.b32", "w=www",
      [](uint32_t a, uint32_t b, uint32_t c) { return uint32_t((uint64_t(b) << 32 | a) >> (c & 31)); });
  table.ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      "shf.l.clamp.b32", "w=www",
      [](uint32_t a, uint32_t b, uint32_t c) { return uint32_t((uint64_t(b) << 32 | a) << std::min(c, 32u) >> 32); });
  table.ternary<uint32_t, uint32_t, uint32_t, uint32_t>(
      "shf.r.clamp.b32", "w=www",
      [](uint32_t a, uint32_t b, uint32_t c) { return uint32_t((uint64_t(b) << 32 | a) >> std::min(c, 32u)); });
  table.binary<int32_t, int32_t, int32_t>(
      "mul24.lo.s32", "w=ww", [](int32_t a, int32_t b) { return int32_t((int64_t(a << 8 >> 8) * (b << 8 >> 8))); });
  table.binary<uint32_t, uint32_t, uint32_t>(
      "mul24.lo.u32", "w=ww", [](uint32_t a, uint32_t b) { return uint32_t(uint64_t(a & 0xffffff) * (b & 0xffffff)); });
  table.add("bfi.b32", insert_bits<uint32_t>, "w=wwww");
  table.add("bfi.b64", insert_bits<uint64_t>, "l=llww");
  table.add("lop3.b32", logic3, "w=wwwi");
  table.add("prmt.b32", permute_bytes<-1>, "w=www");
  table.add("prmt.b32.f4e", permute_bytes<0>, "w=www");
  table.add("prmt.b32.b4e", permute_bytes<1>, "w=www");
  table.add("prmt.b32.rc8", permute_bytes<2>, "w=www");
  table.add("prmt.b32.ecl", permute_bytes<3>, "w=www");
  table.add("prmt.b32.ecr", permute_bytes<4>, "w=www");
  table.add("prmt.b32.rc16", permute_bytes<5>, "w=www");
  const auto dot = [&](const char* name, auto f) {
    table.ternary<uint32_t, uint32_t, uint32_t, uint32_t>(name, "w=www", f);
  };
  dot("dp4a.u32.u32", [](uint32_t a, uint32_t b, uint32_t c) { return dot4<uint8_t, uint8_t>(a, b, c); });
  dot("dp4a.s32.s32", [](uint32_t a, uint32_t b, uint32_t c) { return dot4<int8_t, int8_t>(a, b, c); });
  dot("dp4a.u32.s32", [](uint32_t a, uint32_t b, uint32_t c) { return dot4<uint8_t, int8_t>(a, b, c); });
  dot("dp4a.s32.u32", [](uint32_t a, uint32_t b, uint32_t c) { return dot4<int8_t, uint8_t>(a, b, c); });
  dot("dp2a.lo.s32.s32", [](uint32_t a, uint32_t b, uint32_t c) { return dot2<int16_t, int8_t, 0>(a, b, c); });
  dot("dp2a.hi.s32.s32", [](uint32_t a, uint32_t b, uint32_t c) { return dot2<int16_t, int8_t, 1>(a, b, c); });
  dot("dp2a.lo.u32.u32", [](uint32_t a, uint32_t b, uint32_t c) { return dot2<uint16_t, uint8_t, 0>(a, b, c); });
  dot("dp2a.hi.u32.u32", [](uint32_t a, uint32_t b, uint32_t c) { return dot2<uint16_t, uint8_t, 1>(a, b, c); });
  table.ternary<uint32_t, uint32_t, uint32_t, int32_t>(
      "fns.b32", "w=www", [](uint32_t a, uint32_t b, int32_t c) { return find_nth(a, b, c); });
  table.binary<uint32_t, uint32_t, uint32_t>("bmsk.clamp.b32", "w=ww", [](uint32_t a, uint32_t b) {
    const uint64_t ones = (1ull << std::min(b, 32u)) - 1;
    return uint32_t(a >= 32 ? 0 : ones << a);
  });
  for (const char* t : {"b16", "u16", "s16", "f16"}) table.add(std::string("selp.") + t, select<uint16_t>, "h=hhp");
  for (const char* t : {"b32", "u32", "s32"}) table.add(std::string("selp.") + t, select<uint32_t>, "w=wwp");
  for (const char* t : {"b64", "u64", "s64"}) table.add(std::string("selp.") + t, select<uint64_t>, "l=llp");
  table.add("selp.f32", select<uint32_t>, "f=ffp");
  table.add("selp.f64", select<uint64_t>, "g=ggp");
  const auto chosen = [](uint32_t a, uint32_t b, int32_t c) { return c >= 0 ? a : b; };
  for (const char* t : {"b32", "u32", "s32"})
    table.ternary<uint32_t, uint32_t, uint32_t, int32_t>(std::string("slct.") + t + ".s32", "w=www", chosen);
  table.ternary<uint32_t, uint32_t, uint32_t, int32_t>("slct.f32.s32", "f=ffw", chosen);
  table.ternary<uint64_t, uint64_t, uint64_t, int32_t>(
      "slct.b64.s32", "l=llw", [](uint64_t a, uint64_t b, int32_t c) { return c >= 0 ? a : b; });
  table.ternary<uint32_t, uint32_t, uint32_t, float>("slct.f32.f32", "f=fff",
                                                     [](uint32_t a, uint32_t b, float c) { return c >= 0 ? a : b; });
  table.cls = Class::kPredicate;
  add_predicates(table, "and.pred", "p=pp", [](uint32_t a, uint32_t b) { return a & b; });
  add_predicates(table, "or.pred", "p=pp", [](uint32_t a, uint32_t b) { return a | b; });
  add_predicates(table, "xor.pred", "p=pp", [](uint32_t a, uint32_t b) { return a ^ b; });
  table.add(
      "not.pred",
      [](Warp& warp, const Inst& inst, uint32_t exec) { keep_predicate(warp, inst.d, ~warp.pred(inst.a), exec); },
      "p=p");
}

}  // namespace

const FormTable& alu_forms() {
  static const FormTable kForms = [] {
    Table table;
    bit_type<uint16_t>(table, "b16");
    bit_type<uint32_t>(table, "b32");
    bit_type<uint64_t>(table, "b64");
    integer_type<int16_t>(table, "s16");
    integer_type<uint16_t>(table, "u16");
    integer_type<int32_t>(table, "s32");
    integer_type<uint32_t>(table, "u32");
    integer_type<int64_t>(table, "s64");
    integer_type<uint64_t>(table, "u64");
    other_forms(table);
    return std::move(table.forms);
  }();
  return kForms;
}

}  // namespace ptxvm
