// f16 and bf16 instructions, one value or a pair (x2) a lane. Every result is rounded once.
#include <cmath>

#include "half.h"
#include "lanewise.h"

namespace ptxvm {

double approximate_exp2(double x);
double approximate_tanh(double x);

namespace {

inline uint16_t rounded(double value, F16) { return to_f16(value).bits; }
inline uint16_t rounded(double value, Bf16) { return to_bf16(value).bits; }

// kWidth values a lane: the register is an array of kLanes * kWidth 16-bit values.
template <class H, int kWidth, int kOperands, class F>
void run_half(Warp& warp, const Inst& inst, uint32_t exec) {
  const uint16_t *a = warp.reg<uint16_t>(inst.a), *b = warp.reg<uint16_t>(kOperands > 1 ? inst.b : inst.a),
                 *c = warp.reg<uint16_t>(kOperands > 2 ? inst.c : inst.a);
  uint16_t* d = warp.reg<uint16_t>(inst.d);
  uint16_t result[kLanes * kWidth];
  for (int i = 0; i < kLanes * kWidth; ++i) {
    if (!(exec >> (i / kWidth) & 1)) continue;
    if constexpr (kOperands == 1)
      result[i] = F{}(H{a[i]});
    else if constexpr (kOperands == 2)
      result[i] = F{}(H{a[i]}, H{b[i]});
    else
      result[i] = F{}(H{a[i]}, H{b[i]}, H{c[i]});
  }
  for (int i = 0; i < kLanes * kWidth; ++i)
    if (exec >> (i / kWidth) & 1) d[i] = result[i];
}

template <class H, int kOperands, class F>
void add(Table& table, const std::string& name, F) {
  constexpr bool kBf16 = std::is_same_v<H, Bf16>;
  const std::string type = kBf16 ? ".bf16" : ".f16", letter = kBf16 ? "y" : "x";
  std::string one = letter + "=", two = "w=";
  for (int i = 0; i < kOperands; ++i) one += letter, two += "w";
  table.add(name + type, run_half<H, 1, kOperands, F>, one);
  table.add(name + type + "x2", run_half<H, 2, kOperands, F>, two);
}

template <class H>
bool is_nan(H x) {
  return std::isnan(to_double(x));
}

template <class H, bool kMaximum, bool kKeepsNan>
uint16_t extreme(H a, H b) {
  if (is_nan(a) || is_nan(b)) {
    if (kKeepsNan || (is_nan(a) && is_nan(b))) return 0x7fff;
    return is_nan(a) ? b.bits : a.bits;
  }
  const double x = to_double(a), y = to_double(b);
  if (x == y) return kMaximum ? (a.bits >> 15 ? b.bits : a.bits) : (a.bits >> 15 ? a.bits : b.bits);
  return (x < y) != kMaximum ? a.bits : b.bits;
}

template <class H>
uint16_t relu(uint16_t bits) {
  if (is_nan(H{bits})) return 0x7fff;
  return bits >> 15 ? 0 : bits;
}

template <class H>
uint16_t saturated(uint16_t bits) {
  const double value = to_double(H{bits});
  return rounded(value > 0 ? std::fmin(value, 1) : 0, H{});
}

template <class H>
double product_sum(H a, H b, H c) {
  return add_to_odd(to_double(a) * to_double(b), to_double(c));
}

template <class H>
void arithmetic(Table& table) {
  for (const char* rounding : {"", ".rn"}) {
    add<H, 2>(table, std::string("add") + rounding,
              [](H a, H b) { return rounded(add_to_odd(to_double(a), to_double(b)), H{}); });
    add<H, 2>(table, std::string("sub") + rounding,
              [](H a, H b) { return rounded(add_to_odd(to_double(a), -to_double(b)), H{}); });
    add<H, 2>(table, std::string("mul") + rounding, [](H a, H b) { return rounded(to_double(a) * to_double(b), H{}); });
    add<H, 2>(table, std::string("add") + rounding + ".sat",
              [](H a, H b) { return saturated<H>(rounded(add_to_odd(to_double(a), to_double(b)), H{})); });
    add<H, 2>(table, std::string("sub") + rounding + ".sat",
              [](H a, H b) { return saturated<H>(rounded(add_to_odd(to_double(a), -to_double(b)), H{})); });
    add<H, 2>(table, std::string("mul") + rounding + ".sat",
              [](H a, H b) { return saturated<H>(rounded(to_double(a) * to_double(b), H{})); });
  }
  add<H, 3>(table, "fma.rn", [](H a, H b, H c) { return rounded(product_sum(a, b, c), H{}); });
  add<H, 3>(table, "fma.rn.sat", [](H a, H b, H c) { return saturated<H>(rounded(product_sum(a, b, c), H{})); });
  add<H, 3>(table, "fma.rn.relu", [](H a, H b, H c) { return relu<H>(rounded(product_sum(a, b, c), H{})); });
  add<H, 2>(table, "min", [](H a, H b) { return extreme<H, false, false>(a, b); });
  add<H, 2>(table, "max", [](H a, H b) { return extreme<H, true, false>(a, b); });
  add<H, 2>(table, "min.NaN", [](H a, H b) { return extreme<H, false, true>(a, b); });
  add<H, 2>(table, "max.NaN", [](H a, H b) { return extreme<H, true, true>(a, b); });
  add<H, 1>(table, "neg", [](H a) { return uint16_t(a.bits ^ 0x8000); });
  add<H, 1>(table, "abs", [](H a) { return uint16_t(a.bits & 0x7fff); });
  table.cls = Class::kSpecial;
  add<H, 1>(table, std::is_same_v<H, Bf16> ? "ex2.approx.ftz" : "ex2.approx",
            [](H a) { return rounded(approximate_exp2(to_double(a)), H{}); });
  add<H, 1>(table, "tanh.approx", [](H a) { return rounded(approximate_tanh(to_double(a)), H{}); });
  table.cls = Class::kHalf;
}

// setp.x2: p for the low halves, q for the high ones.
template <class H, class F>
void compare_pair(Warp& warp, const Inst& inst, uint32_t exec) {
  const uint16_t *a = warp.reg<uint16_t>(inst.a), *b = warp.reg<uint16_t>(inst.b);
  uint32_t result[2] = {0, 0};
  for (int i = 0; i < 2 * kLanes; ++i)
    result[i & 1] |= uint32_t(F{}(to_double(H{a[i]}), to_double(H{b[i]}))) << (i / 2);
  keep_predicate(warp, inst.d, result[0], exec);
  keep_predicate(warp, inst.list[0], result[1], exec);
}

template <class H, class F>
void compare_one(Warp& warp, const Inst& inst, uint32_t exec) {
  const uint16_t *a = warp.reg<uint16_t>(inst.a), *b = warp.reg<uint16_t>(inst.b);
  uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    result |= uint32_t(F{}(to_double(H{a[lane]}), to_double(H{b[lane]}))) << lane;
  keep_comparison(warp, inst, exec, result);
}

template <class H, class F>
void comparison(Table& table, const std::string& name, F) {
  constexpr bool kBf16 = std::is_same_v<H, Bf16>;
  const std::string type = kBf16 ? "bf16" : "f16", two = kBf16 ? "yy" : "xx";
  table.cls = Class::kPredicate;
  table.add("setp." + name + "." + type, compare_one<H, F>, "p|=" + two, 0);
  table.add("setp." + name + ".and." + type, compare_one<H, F>, "p|=" + two + "p", 1);
  table.add("setp." + name + ".or." + type, compare_one<H, F>, "p|=" + two + "p", 2);
  table.add("setp." + name + ".xor." + type, compare_one<H, F>, "p|=" + two + "p", 3);
  table.add("setp." + name + "." + type + "x2", compare_pair<H, F>, "p|=ww");
  table.cls = Class::kHalf;
  // set with a floating-point result is 1.0 or 0, with an integer one all ones or 0.
  const auto one = [](H a, H b) { return F{}(to_double(a), to_double(b)) ? rounded(1, H{}) : uint16_t(0); };
  const auto ones = [](H a, H b) { return F{}(to_double(a), to_double(b)) ? uint16_t(0xffff) : uint16_t(0); };
  table.add("set." + name + "." + type + "." + type, run_half<H, 1, 2, decltype(one)>, kBf16 ? "y=yy" : "x=xx");
  table.add("set." + name + "." + type + "x2." + type + "x2", run_half<H, 2, 2, decltype(one)>, "w=ww");
  table.add("set." + name + ".u32." + type + "x2", run_half<H, 2, 2, decltype(ones)>, "w=ww");
  table.add("set." + name + ".u16." + type, run_half<H, 1, 2, decltype(ones)>, kBf16 ? "h=yy" : "h=xx");
}

template <class H>
void comparisons(Table& table) {
  comparison<H>(table, "eq", [](double a, double b) { return a == b; });
  comparison<H>(table, "ne", [](double a, double b) { return a < b || a > b; });
  comparison<H>(table, "lt", [](double a, double b) { return a < b; });
  comparison<H>(table, "le", [](double a, double b) { return a <= b; });
  comparison<H>(table, "gt", [](double a, double b) { return a > b; });
  comparison<H>(table, "ge", [](double a, double b) { return a >= b; });
  comparison<H>(table, "equ", [](double a, double b) { return !(a < b || a > b); });
  comparison<H>(table, "neu", [](double a, double b) { return a != b; });
  comparison<H>(table, "ltu", [](double a, double b) { return !(a >= b); });
  comparison<H>(table, "leu", [](double a, double b) { return !(a > b); });
  comparison<H>(table, "gtu", [](double a, double b) { return !(a <= b); });
  comparison<H>(table, "geu", [](double a, double b) { return !(a < b); });
  comparison<H>(table, "num", [](double a, double b) { return a == a && b == b; });
  comparison<H>(table, "nan", [](double a, double b) { return a != a || b != b; });
}

}  // namespace

const FormTable& half_forms() {
  static const FormTable kForms = [] {
    Table table;
    table.cls = Class::kHalf;
    arithmetic<F16>(table);
    arithmetic<Bf16>(table);
    comparisons<F16>(table);
    comparisons<Bf16>(table);
    return std::move(table.forms);
  }();
  return kForms;
}

}  // namespace ptxvm
