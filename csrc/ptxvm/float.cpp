// f32 and f64 instructions. Approximate functions are computed in double and rounded to f32: more exact than hardware.
// A NaN result is some NaN; its payload is not the hardware's.
#include <cfenv>
#include <cmath>
#include <limits>

#include "half.h"
#include "lanewise.h"

namespace ptxvm {

namespace {

template <bool kFlush>
float flush(float x) {  // .ftz: subnormals to zero of the same sign
  if (!kFlush) return x;
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

template <class T>
T saturate(T x) {  // to [0, 1]; NaN to 0
  return x > 0 ? (x < 1 ? x : T(1)) : T(0);
}

// 2^x in double, relative error below 1e-15; no branches, so that it vectorises.
double exp2_double(double x) {
  const double limited = x < -1000 ? -1000 : x > 1000 ? 1000 : x;
  const double shifted = limited + 0x1.8p52;  // the nearest integer is in the low bits
  const double f = (limited - (shifted - 0x1.8p52)) * 0.69314718055994530942;
  double p = 1 / 6227020800.0;
  constexpr double kInverse[] = {
      1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0, 1 / 5040.0, 1 / 720.0,
      1 / 120.0,       1 / 24.0,       1 / 6.0,       0.5,          1.0,         1.0};
  for (double coefficient : kInverse) p = p * f + coefficient;
  const double scale = bits_as<double>((bits_as<uint64_t>(shifted) << 52) + 0x3ff0000000000000ull);
  return x == x ? p * scale : x;
}

double tanh_double(double x) {
  const double square = x * x, near = x * (1 + square * (-1 / 3.0 + square * (2 / 15.0 + square * (-17 / 315.0))));
  const double far = 1 - 2 / (exp2_double(x * 2.8853900817779268147) + 1);
  return std::fabs(x) < 0.05 ? near : far;
}

template <class T>
T smaller(T a, T b) {  // a NaN loses; -0 < +0
  if (a != a) return b;
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T larger(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
template <class T>
T nan_or(T a, T b, T value) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : value;
}
float xor_sign(float a, float b, float magnitude) {
  const uint32_t sign = (bits_as<uint32_t>(a) ^ bits_as<uint32_t>(b)) & 0x80000000u;
  return bits_as<float>((bits_as<uint32_t>(magnitude) & 0x7fffffffu) | sign);
}

constexpr int64_t kDirectionMask = 3, kSaturates = 4, kFlushes = 8;  // Form::imm of directed(); directions rn rz rm rp

enum class Arithmetic { kAdd, kSub, kMul, kFma, kDiv, kRcp, kSqrt };

// One operation in a rounding direction of its own: slow, rare.
template <class T, Arithmetic kOp>
void directed(Warp& warp, const Inst& inst, uint32_t exec) {
  static const int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  const T* a = warp.reg<T>(inst.a);
  const T* b = inst.b ? warp.reg<T>(inst.b) : a;
  const T* c = inst.c ? warp.reg<T>(inst.c) : a;
  T result[kLanes];
  const bool flushes = inst.imm & kFlushes;
  const auto in = [&](T x) { return flushes ? T(flush<true>(float(x))) : x; };
  std::fesetround(kModes[inst.imm & kDirectionMask]);
  for (int lane = 0; lane < kLanes; ++lane) {
    volatile T x = in(a[lane]), y = in(b[lane]), z = in(c[lane]), r = 0;
    switch (kOp) {
      case Arithmetic::kAdd:
        r = x + y;
        break;
      case Arithmetic::kSub:
        r = x - y;
        break;
      case Arithmetic::kMul:
        r = x * y;
        break;
      case Arithmetic::kFma:
        r = std::fma(T(x), T(y), T(z));
        break;
      case Arithmetic::kDiv:
        r = x / y;
        break;
      case Arithmetic::kRcp:
        r = T(1) / x;
        break;
      case Arithmetic::kSqrt:
        r = std::sqrt(T(x));
        break;
    }
    result[lane] = in(r);
    if (inst.imm & kSaturates) result[lane] = saturate(result[lane]);
  }
  std::fesetround(FE_TONEAREST);
  keep(warp, inst.d, result, exec);
}

template <class T, Arithmetic kOp>
void directed_forms(Table& table, const std::string& name, const std::string& operands, bool nearest_by_default) {
  const std::string type = sizeof(T) == 4 ? ".f32" : ".f64";
  static const char* const kNames[] = {".rn", ".rz", ".rm", ".rp"};
  for (int direction = 0; direction < 4; ++direction)
    for (int flags = 0; flags < (sizeof(T) == 4 ? 4 : 1); ++flags) {
      const std::string suffix = std::string(flags & 2 ? ".ftz" : "") + (flags & 1 ? ".sat" : "") + type;
      const int64_t imm = direction | (flags & 1) * kSaturates | (flags & 2) / 2 * kFlushes;
      if ((flags & 1) && kOp >= Arithmetic::kDiv) continue;
      table.add(name + kNames[direction] + suffix, directed<T, kOp>, operands, imm);
      if (direction == 0 && nearest_by_default) table.add(name + suffix, directed<T, kOp>, operands, imm);
    }
}

template <bool kFlush>
void f32_forms(Table& table) {
  const std::string end = kFlush ? ".ftz.f32" : ".f32";
  const auto unary = [&](const std::string& name, auto f) { table.unary<float, float>(name + end, "f=f", f); };
  const auto binary = [&](const std::string& name, auto f) {
    table.binary<float, float, float>(name + end, "f=ff", f);
  };
  for (const char* rounding : {"", ".rn"}) {
    binary(std::string("add") + rounding,
           [](float a, float b) { return flush<kFlush>(flush<kFlush>(a) + flush<kFlush>(b)); });
    binary(std::string("sub") + rounding,
           [](float a, float b) { return flush<kFlush>(flush<kFlush>(a) - flush<kFlush>(b)); });
    binary(std::string("mul") + rounding,
           [](float a, float b) { return flush<kFlush>(flush<kFlush>(a) * flush<kFlush>(b)); });
  }
  for (const char* name : {"fma.rn", "mad", "mad.rn"})
    table.ternary<float, float, float, float>(name + end, "f=fff", [](float a, float b, float c) {
      return flush<kFlush>(__builtin_fmaf(flush<kFlush>(a), flush<kFlush>(b), flush<kFlush>(c)));
    });
  for (const char* name : {"div.rn", "div.full", "div.approx"})
    binary(name, [](float a, float b) { return flush<kFlush>(flush<kFlush>(a) / flush<kFlush>(b)); });
  binary("min", [](float a, float b) { return smaller(flush<kFlush>(a), flush<kFlush>(b)); });
  binary("max", [](float a, float b) { return larger(flush<kFlush>(a), flush<kFlush>(b)); });
  table.binary<float, float, float>(
      "min" + std::string(kFlush ? ".ftz" : "") + ".NaN.f32", "f=ff",
      [](float a, float b) { return nan_or(a, b, smaller(flush<kFlush>(a), flush<kFlush>(b))); });
  table.binary<float, float, float>(
      "max" + std::string(kFlush ? ".ftz" : "") + ".NaN.f32", "f=ff",
      [](float a, float b) { return nan_or(a, b, larger(flush<kFlush>(a), flush<kFlush>(b))); });
  table.binary<float, float, float>(
      "min" + std::string(kFlush ? ".ftz" : "") + ".xorsign.abs.f32", "f=ff", [](float a, float b) {
        return xor_sign(a, b, smaller(std::fabs(flush<kFlush>(a)), std::fabs(flush<kFlush>(b))));
      });
  table.binary<float, float, float>(
      "max" + std::string(kFlush ? ".ftz" : "") + ".xorsign.abs.f32", "f=ff", [](float a, float b) {
        return xor_sign(a, b, larger(std::fabs(flush<kFlush>(a)), std::fabs(flush<kFlush>(b))));
      });
  unary("abs", [](float a) { return std::fabs(flush<kFlush>(a)); });
  unary("neg", [](float a) { return -flush<kFlush>(a); });
  table.cls = Class::kSpecial;
  for (const char* name : {"rcp.approx", "rcp.rn"})
    unary(name, [](float a) { return flush<kFlush>(1 / flush<kFlush>(a)); });
  for (const char* name : {"sqrt.approx", "sqrt.rn"})
    unary(name, [](float a) { return flush<kFlush>(std::sqrt(flush<kFlush>(a))); });
  unary("rsqrt.approx", [](float a) { return flush<kFlush>(float(1 / std::sqrt(double(flush<kFlush>(a))))); });
  unary("ex2.approx", [](float a) { return flush<kFlush>(float(exp2_double(flush<kFlush>(a)))); });
  unary("lg2.approx", [](float a) { return flush<kFlush>(float(std::log2(double(flush<kFlush>(a))))); });
  unary("sin.approx", [](float a) { return flush<kFlush>(float(std::sin(double(flush<kFlush>(a))))); });
  unary("cos.approx", [](float a) { return flush<kFlush>(float(std::cos(double(flush<kFlush>(a))))); });
  table.cls = Class::kFloat;
}

// Ordered comparisons are false with a NaN, the ...u ones true.
template <class T, bool kFlush>
void comparisons(Table& table) {
  const std::string type = std::string(kFlush ? "ftz." : "") + (sizeof(T) == 4 ? "f32" : "f64");
  const char letter = sizeof(T) == 4 ? 'f' : 'g';
  const auto in = [](T x) { return kFlush ? T(flush<true>(float(x))) : x; };
  using In = decltype(in);
  const auto either_nan = [](T a, T b) { return a != a || b != b; };
  using Nan = decltype(either_nan);
  const auto add = [&](const char* name, auto f) { table.comparison<T>(name, type, letter, f); };
  add("eq", [](T a, T b) { return In{}(a) == In{}(b); });
  add("ne", [](T a, T b) { return In{}(a) != In{}(b) && !Nan{}(a, b); });
  add("lt", [](T a, T b) { return In{}(a) < In{}(b); });
  add("le", [](T a, T b) { return In{}(a) <= In{}(b); });
  add("gt", [](T a, T b) { return In{}(a) > In{}(b); });
  add("ge", [](T a, T b) { return In{}(a) >= In{}(b); });
  add("equ", [](T a, T b) { return In{}(a) == In{}(b) || Nan{}(a, b); });
  add("neu", [](T a, T b) { return In{}(a) != In{}(b); });
  add("ltu", [](T a, T b) { return !(In{}(a) >= In{}(b)); });
  add("leu", [](T a, T b) { return !(In{}(a) > In{}(b)); });
  add("gtu", [](T a, T b) { return !(In{}(a) <= In{}(b)); });
  add("geu", [](T a, T b) { return !(In{}(a) < In{}(b)); });
  add("num", [](T a, T b) { return !Nan{}(a, b); });
  add("nan", [](T a, T b) { return Nan{}(a, b); });
}

template <class T, class F>
void test_lanes(Warp& warp, const Inst& inst, uint32_t exec) {
  keep_predicate(warp, inst.d, compare_lanes<T, F>(warp.reg<T>(inst.a), warp.reg<T>(inst.a)), exec);
}

template <class T, class F>
void add_test(Table& table, const std::string& name, F) {
  table.add(name + (sizeof(T) == 4 ? ".f32" : ".f64"), test_lanes<T, F>, sizeof(T) == 4 ? "p=f" : "p=g");
}

template <class T>
void both_widths(Table& table) {
  add_test<T>(table, "testp.finite", [](T a, T) { return std::isfinite(a); });
  add_test<T>(table, "testp.infinite", [](T a, T) { return std::isinf(a); });
  add_test<T>(table, "testp.number", [](T a, T) { return a == a; });
  add_test<T>(table, "testp.notanumber", [](T a, T) { return a != a; });
  add_test<T>(table, "testp.normal", [](T a, T) { return std::isnormal(a); });
  add_test<T>(table, "testp.subnormal", [](T a, T) { return a != 0 && std::fabs(a) < std::numeric_limits<T>::min(); });
  const bool single = sizeof(T) == 4;
  table.binary<T, T, T>(single ? "copysign.f32" : "copysign.f64", single ? "f=ff" : "g=gg",
                        [](T a, T b) { return std::copysign(b, a); });
}

void f64_forms(Table& table) {
  const auto unary = [&](const char* name, auto f) { table.unary<double, double>(name, "g=g", f); };
  const auto binary = [&](const std::string& name, auto f) { table.binary<double, double, double>(name, "g=gg", f); };
  for (const char* rounding : {"", ".rn"}) {
    binary(std::string("add") + rounding + ".f64", [](double a, double b) { return a + b; });
    binary(std::string("sub") + rounding + ".f64", [](double a, double b) { return a - b; });
    binary(std::string("mul") + rounding + ".f64", [](double a, double b) { return a * b; });
  }
  for (const char* name : {"fma.rn.f64", "mad.rn.f64"})
    table.ternary<double, double, double, double>(name, "g=ggg",
                                                  [](double a, double b, double c) { return __builtin_fma(a, b, c); });
  binary("div.rn.f64", [](double a, double b) { return a / b; });
  binary("min.f64", [](double a, double b) { return smaller(a, b); });
  binary("max.f64", [](double a, double b) { return larger(a, b); });
  unary("abs.f64", [](double a) { return std::fabs(a); });
  unary("neg.f64", [](double a) { return -a; });
  unary("rcp.rn.f64", [](double a) { return 1 / a; });
  unary("rcp.approx.ftz.f64", [](double a) { return 1 / a; });
  unary("sqrt.rn.f64", [](double a) { return std::sqrt(a); });
  unary("rsqrt.approx.f64", [](double a) { return 1 / std::sqrt(a); });
  unary("rsqrt.approx.ftz.f64", [](double a) { return 1 / std::sqrt(a); });
}

template <class T>
void all_directed(Table& table) {
  const std::string t(1, sizeof(T) == 4 ? 'f' : 'g'), one = t + "=" + t, two = one + t, three = two + t;
  directed_forms<T, Arithmetic::kAdd>(table, "add", two, true);
  directed_forms<T, Arithmetic::kSub>(table, "sub", two, true);
  directed_forms<T, Arithmetic::kMul>(table, "mul", two, true);
  directed_forms<T, Arithmetic::kFma>(table, "fma", three, false);
  directed_forms<T, Arithmetic::kDiv>(table, "div", two, false);
  directed_forms<T, Arithmetic::kRcp>(table, "rcp", one, false);
  directed_forms<T, Arithmetic::kSqrt>(table, "sqrt", one, false);
}

}  // namespace

double approximate_exp2(double x) { return exp2_double(x); }
double approximate_tanh(double x) { return tanh_double(x); }

const FormTable& float_forms() {
  static const FormTable kForms = [] {
    Table table;
    table.cls = Class::kFloat;
    all_directed<float>(table);
    all_directed<double>(table);
    f32_forms<false>(table);  // the fast ones replace what they repeat
    f32_forms<true>(table);
    f64_forms(table);
    comparisons<float, false>(table);
    comparisons<float, true>(table);
    comparisons<double, false>(table);
    both_widths<float>(table);
    both_widths<double>(table);
    table.cls = Class::kSpecial;
    table.unary<float, float>("tanh.approx.f32", "f=f", [](float a) { return float(tanh_double(a)); });
    return std::move(table.forms);
  }();
  return kForms;
}

}  // namespace ptxvm
