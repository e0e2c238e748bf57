// Instructions between the lanes of a warp. The machine runs a handler when all lanes of the member mask are there;
// `exec` are those lanes.
#include <algorithm>
#include <bit>

#include "lanewise.h"

namespace ptxvm {

namespace {

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

// d|p = a of another lane. b: how far; c: segment mask in bits 8 to 12, clamp in bits 0 to 4.
template <Shuffle kMode>
void shuffle(Warp& warp, const Inst& inst, uint32_t exec) {
  const uint32_t *a = warp.reg<uint32_t>(inst.a), *b = warp.reg<uint32_t>(inst.b), *c = warp.reg<uint32_t>(inst.c);
  uint32_t result[kLanes] = {}, in_range = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(exec >> lane & 1)) continue;
    const int distance = int(b[lane] & 31), clamp = int(c[lane] & 31), segment = int(c[lane] >> 8 & 31);
    const int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
    int from = 0;
    bool valid = false;
    switch (kMode) {
      case Shuffle::kUp:
        from = lane - distance;
        valid = from >= highest;
        break;
      case Shuffle::kDown:
        from = lane + distance;
        valid = from <= highest;
        break;
      case Shuffle::kButterfly:
        from = lane ^ distance;
        valid = from <= highest;
        break;
      case Shuffle::kIndex:
        from = lowest | (distance & ~segment);
        valid = from <= highest;
        break;
    }
    if (!valid) from = lane;
    if (!(exec >> from & 1))
      warp.fault("divergent-barrier", lane,
                 "the lane reads from lane " + std::to_string(from) + ", which does not take part");
    result[lane] = a[from];
    in_range |= uint32_t(valid) << lane;
  }
  keep(warp, inst.d, result, exec);
  keep_predicate(warp, inst.list[0], in_range, exec);
}

enum class Vote { kAll, kAny, kUniform };

template <Vote kMode>
void vote(Warp& warp, const Inst& inst, uint32_t exec) {
  const uint32_t yes = warp.pred(inst.a) & exec;
  const bool result = kMode == Vote::kAll ? yes == exec : kMode == Vote::kAny ? yes != 0 : yes == exec || yes == 0;
  keep_predicate(warp, inst.d, result ? kFullMask : 0, exec);
}

void broadcast(Warp& warp, const Inst& inst, uint32_t exec, uint32_t value) {
  uint32_t result[kLanes];
  std::fill(result, result + kLanes, value);
  keep(warp, inst.d, result, exec);
}

void ballot(Warp& warp, const Inst& inst, uint32_t exec) { broadcast(warp, inst, exec, warp.pred(inst.a) & exec); }

void active_mask(Warp& warp, const Inst& inst, uint32_t exec) { broadcast(warp, inst, exec, exec); }

void elect(Warp& warp, const Inst& inst, uint32_t exec) {
  const int leader = std::countr_zero(exec);
  broadcast(warp, inst, exec, uint32_t(leader));
  keep_predicate(warp, inst.list[0], 1u << leader, exec);
}

template <class T>
void match_any(Warp& warp, const Inst& inst, uint32_t exec) {
  const T* a = warp.reg<T>(inst.a);
  uint32_t result[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane)
    for (int other = 0; other < kLanes; ++other)
      if ((exec >> other & 1) && a[lane] == a[other]) result[lane] |= 1u << other;
  keep(warp, inst.d, result, exec);
}

template <class T>
void match_all(Warp& warp, const Inst& inst, uint32_t exec) {
  const T* a = warp.reg<T>(inst.a);
  bool same = true;
  for (int lane = 0; lane < kLanes; ++lane)
    if (exec >> lane & 1) same &= a[lane] == a[std::countr_zero(exec)];
  broadcast(warp, inst, exec, same ? exec : 0);
  keep_predicate(warp, inst.list[0], same ? kFullMask : 0, exec);
}

template <class T, class F>
void reduce(Warp& warp, const Inst& inst, uint32_t exec) {
  const T* a = warp.reg<T>(inst.a);
  T total = a[std::countr_zero(exec)];
  for (uint32_t rest = exec & (exec - 1); rest; rest &= rest - 1) total = F{}(total, a[std::countr_zero(rest)]);
  broadcast(warp, inst, exec, uint32_t(total));
}

template <class T, class F>
void add_reduction(Table& table, const char* name, F) {
  table.add(name, reduce<T, F>, "w=wm", 0, Kind::kWarpSync);
}

// bar.warp.sync orders memory between the lanes of its mask.
void order_lanes(Warp& warp, const Inst&, uint32_t mask) {
  ++warp.stamp;
  if (mask == warp.live) {
    warp.seen[warp.index] = warp.stamp;
    warp.lane_seen.reset();
    return;
  }
  if (!warp.lane_seen) warp.lane_seen = std::make_unique<std::array<std::array<uint32_t, kLanes>, kLanes>>();
  auto& seen = *warp.lane_seen;
  std::array<uint32_t, kLanes> joined{};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    for (int other = 0; other < kLanes; ++other)
      joined[size_t(other)] = std::max(joined[size_t(other)], seen[size_t(lane)][size_t(other)]);
    joined[size_t(lane)] = warp.stamp;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) seen[size_t(lane)] = joined;
}

}  // namespace

const FormTable& warp_forms() {
  static const FormTable kForms = [] {
    Table table;
    table.cls = Class::kShuffle;
    const auto add = [&](const char* name, Handler run, const char* operands) {
      table.add(name, run, operands, 0, Kind::kWarpSync);
    };
    add("shfl.sync.up.b32", shuffle<Shuffle::kUp>, "w|=wwwm");
    add("shfl.sync.down.b32", shuffle<Shuffle::kDown>, "w|=wwwm");
    add("shfl.sync.bfly.b32", shuffle<Shuffle::kButterfly>, "w|=wwwm");
    add("shfl.sync.idx.b32", shuffle<Shuffle::kIndex>, "w|=wwwm");
    add("vote.sync.all.pred", vote<Vote::kAll>, "p=pm");
    add("vote.sync.any.pred", vote<Vote::kAny>, "p=pm");
    add("vote.sync.uni.pred", vote<Vote::kUniform>, "p=pm");
    add("vote.sync.ballot.b32", ballot, "w=pm");
    add("match.any.sync.b32", match_any<uint32_t>, "w=wm");
    add("match.any.sync.b64", match_any<uint64_t>, "w=lm");
    add("match.all.sync.b32", match_all<uint32_t>, "w|=wm");
    add("match.all.sync.b64", match_all<uint64_t>, "w|=lm");
    add("elect.sync", elect, "w|=m");
    add_reduction<uint32_t>(table, "redux.sync.add.u32", [](uint32_t a, uint32_t b) { return a + b; });
    add_reduction<uint32_t>(table, "redux.sync.add.s32", [](uint32_t a, uint32_t b) { return a + b; });
    add_reduction<uint32_t>(table, "redux.sync.min.u32", [](uint32_t a, uint32_t b) { return std::min(a, b); });
    add_reduction<uint32_t>(table, "redux.sync.max.u32", [](uint32_t a, uint32_t b) { return std::max(a, b); });
    add_reduction<int32_t>(table, "redux.sync.min.s32", [](int32_t a, int32_t b) { return std::min(a, b); });
    add_reduction<int32_t>(table, "redux.sync.max.s32", [](int32_t a, int32_t b) { return std::max(a, b); });
    add_reduction<uint32_t>(table, "redux.sync.and.b32", [](uint32_t a, uint32_t b) { return a & b; });
    add_reduction<uint32_t>(table, "redux.sync.or.b32", [](uint32_t a, uint32_t b) { return a | b; });
    add_reduction<uint32_t>(table, "redux.sync.xor.b32", [](uint32_t a, uint32_t b) { return a ^ b; });
    table.add("activemask.b32", active_mask, "w=");
    table.cls = Class::kBarrier;
    table.add("bar.warp.sync", order_lanes, "m", kWarpBarrier, Kind::kWarpSync);
    return std::move(table.forms);
  }();
  return kForms;
}

}  // namespace ptxvm
