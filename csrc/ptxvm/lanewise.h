// Handlers of lane-wise instructions from a function of one lane's values. Results are computed for all 32 lanes, so
// that the loops vectorise, and only the executing lanes' are kept: functions must not trap on any bits.
#pragma once

#include <cstring>
#include <string>

#include "decode.h"

namespace ptxvm {

template <class D>
inline void keep(Warp& warp, uint32_t offset, const D (&result)[kLanes], uint32_t exec) {
  D* d = warp.reg<D>(offset);
  if (exec == kFullMask) {
    std::memcpy(d, result, sizeof(result));
    return;
  }
  for (int lane = 0; lane < kLanes; ++lane) d[lane] = exec >> lane & 1 ? result[lane] : d[lane];
}

inline void keep_predicate(Warp& warp, uint32_t offset, uint32_t result, uint32_t exec) {
  uint32_t& d = warp.pred(offset);
  d = (d & ~exec) | (result & exec);
}

template <class D, class A, class F>
void run1(Warp& warp, const Inst& inst, uint32_t exec) {
  const A* a = warp.reg<A>(inst.a);
  D result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = F{}(a[lane]);
  keep(warp, inst.d, result, exec);
}

template <class D, class A, class B, class F>
void run2(Warp& warp, const Inst& inst, uint32_t exec) {
  const A* a = warp.reg<A>(inst.a);
  const B* b = warp.reg<B>(inst.b);
  D result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = F{}(a[lane], b[lane]);
  keep(warp, inst.d, result, exec);
}

template <class D, class A, class B, class C, class F>
void run3(Warp& warp, const Inst& inst, uint32_t exec) {
  const A* a = warp.reg<A>(inst.a);
  const B* b = warp.reg<B>(inst.b);
  const C* c = warp.reg<C>(inst.c);
  D result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = F{}(a[lane], b[lane], c[lane]);
  keep(warp, inst.d, result, exec);
}

// Like run3, for functions that also want the instruction's immediate.
template <class D, class A, class F>
void run3_imm(Warp& warp, const Inst& inst, uint32_t exec) {
  const A *a = warp.reg<A>(inst.a), *b = warp.reg<A>(inst.b), *c = warp.reg<A>(inst.c);
  D result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = F{}(a[lane], b[lane], c[lane], inst.imm);
  keep(warp, inst.d, result, exec);
}

template <class A, class F>
inline uint32_t compare_lanes(const A* a, const A* b) {
  uint8_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = F{}(a[lane], b[lane]);
  uint32_t mask = 0;
  for (int lane = 0; lane < kLanes; ++lane) mask |= uint32_t(result[lane]) << lane;
  return mask;
}

// setp: p[|q] = (a ? b) [op c]; list[0] is q. imm: 0 none, 1 and, 2 or, 3 xor.
inline void keep_comparison(Warp& warp, const Inst& inst, uint32_t exec, uint32_t result) {
  uint32_t other = ~result;
  if (inst.imm) {
    const uint32_t c = warp.pred(inst.c);
    const auto join = [&](uint32_t x) { return inst.imm == 1 ? x & c : inst.imm == 2 ? x | c : x ^ c; };
    result = join(result);
    other = join(other);
  }
  keep_predicate(warp, inst.d, result, exec);
  keep_predicate(warp, inst.list[0], other, exec);
}

template <class A, class F>
void run_setp(Warp& warp, const Inst& inst, uint32_t exec) {
  keep_comparison(warp, inst, exec, compare_lanes<A, F>(warp.reg<A>(inst.a), warp.reg<A>(inst.b)));
}

template <class D, class A, class F>
void run_set(Warp& warp, const Inst& inst, uint32_t exec) {
  const A *a = warp.reg<A>(inst.a), *b = warp.reg<A>(inst.b);
  D result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = F{}(a[lane], b[lane]) ? (std::is_floating_point_v<D> ? D(1) : D(-1)) : D(0);
  keep(warp, inst.d, result, exec);
}

class Table {
 public:
  FormTable forms;
  Class cls = Class::kInteger;

  template <class D, class A, class F>
  void unary(const std::string& name, const char* operands, F) {
    add(name, run1<D, A, F>, operands);
  }
  template <class D, class A, class B, class F>
  void binary(const std::string& name, const char* operands, F) {
    add(name, run2<D, A, B, F>, operands);
  }
  template <class D, class A, class B, class C, class F>
  void ternary(const std::string& name, const char* operands, F) {
    add(name, run3<D, A, B, C, F>, operands);
  }
  void add(const std::string& name, Handler run, const std::string& operands, int64_t imm = 0,
           Kind kind = Kind::kPlain) {
    forms[name] = Form{run, operands, cls, kind, imm};
  }
  // setp.NAME.type and its and/or/xor forms.
  template <class A, class F>
  void comparison(const std::string& name, const std::string& type, char letter, F) {
    const Class before = cls;
    cls = Class::kPredicate;
    const std::string two = std::string("p|=") + letter + letter;
    add("setp." + name + "." + type, run_setp<A, F>, two, 0);
    add("setp." + name + ".and." + type, run_setp<A, F>, two + "p", 1);
    add("setp." + name + ".or." + type, run_setp<A, F>, two + "p", 2);
    add("setp." + name + ".xor." + type, run_setp<A, F>, two + "p", 3);
    const std::string one = std::string("=") + letter + letter;
    add("set." + name + ".u32." + type, run_set<uint32_t, A, F>, "w" + one);
    add("set." + name + ".s32." + type, run_set<uint32_t, A, F>, "w" + one);
    add("set." + name + ".f32." + type, run_set<float, A, F>, "f" + one);
    cls = before;
  }
};

}  // namespace ptxvm
