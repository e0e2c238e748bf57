// The race detector: per 4-byte word (per byte where bytes were touched apart) the last write and the last reads, and
// whether a new access is ordered behind them.
//
// Order comes from barriers only. Every warp has a clock that advances at each barrier it passes; `seen[v]` is how far
// warp v's clock is known to have come, so an access of warp v with a smaller stamp happened before. Between lanes of
// one warp only bar.warp.sync (and a block barrier) orders memory: lockstep does not, nor do shuffles and votes.
#pragma once

#include <algorithm>

#include "machine.h"

namespace ptxvm {

// Is `earlier` ordered before what `lane` of `warp` does now? Shared memory: another epoch is. Global memory: accesses
// of other blocks never are.
template <bool kGlobal>
inline bool ordered(const Warp& warp, int lane, const Access& earlier, uint32_t epoch) {
  if (earlier.epoch != epoch) return !kGlobal || earlier.epoch == 0;
  if (earlier.warp != warp.index) return earlier.stamp < warp.seen[earlier.warp];
  if (earlier.lane == lane || earlier.stamp < warp.seen[warp.index]) return true;
  return warp.lane_seen && lane < kLanes && earlier.lane < kLanes &&
         earlier.stamp < (*warp.lane_seen)[size_t(lane)][earlier.lane];
}

template <bool kGlobal>
inline void note_read(Shadow& shadow, const Access& now) {
  Access* slot = &shadow.read;
  const auto taken = [&](const Access& by) {
    return (kGlobal ? by.epoch != 0 : by.epoch == now.epoch) && (by.warp != now.warp || by.epoch != now.epoch);
  };
  if (taken(*slot)) slot = &shadow.other_read;
  if (slot->epoch == now.epoch && slot->warp == now.warp && slot->stamp == now.stamp) {
    if (slot->lane != now.lane) slot->lane = kManyLanes;
    slot->strong &= now.strong;
  } else {
    *slot = now;
  }
}

// The access that `now` races with, or nullptr; notes `now`.
template <bool kGlobal>
inline const Access* note(const Warp& warp, int lane, Shadow& shadow, const Access& now, Touch touch) {
  const auto races = [&](const Access& earlier) {
    return !ordered<kGlobal>(warp, lane, earlier, now.epoch) && !(earlier.strong && now.strong);
  };
  if (races(shadow.write)) return &shadow.write;
  if (touch == Touch::kRead) {
    note_read<kGlobal>(shadow, now);
    return nullptr;
  }
  if (races(shadow.read)) return &shadow.read;
  if (races(shadow.other_read)) return &shadow.other_read;
  // An atomic behind the same lane's plain write leaves that write exposed.
  const Access& last = shadow.write;
  const bool exposed = last.epoch == now.epoch && last.warp == now.warp && last.stamp == now.stamp && !last.strong;
  shadow.write = now;
  if (exposed) shadow.write.strong = 0;
  shadow.read.epoch = shadow.other_read.epoch = 0;
  return nullptr;
}

// All bytes of [offset, offset + bytes): calls `report(byte offset, earlier access, it was a write)` for a race;
// `report` returns whether to go on.
template <bool kGlobal, class Report>
inline void note_bytes(Warp& warp, int lane, ShadowMap& map, uint64_t offset, uint32_t bytes, uint32_t epoch,
                       Touch touch, bool strong, const Report& report) {
  const Access now{warp.stamp, epoch, uint16_t(warp.index), uint8_t(lane), uint8_t(strong)};
  const auto check = [&](Shadow& shadow, uint64_t at) {
    if (const Access* earlier = note<kGlobal>(warp, lane, shadow, now, touch)) {
      report(at, *earlier, earlier == &shadow.write);
      shadow.write = now;  // forgiven
    }
  };
  // The usual case of shared memory: nobody wrote since the last barrier, and this warp's read is on record.
  const auto known = [&](uint64_t word) {
    const Shadow& shadow = map.words[word];
    const auto mine = [&](const Access& read) {
      return read.epoch == epoch && read.stamp == now.stamp && read.warp == now.warp && !read.strong &&
             (read.lane == now.lane || read.lane == kManyLanes);
    };
    return shadow.write.epoch != epoch && map.split[word] == 0 && (mine(shadow.read) || mine(shadow.other_read));
  };
  if (!kGlobal && touch == Touch::kRead && bytes == 16) {
    const uint64_t word = offset / 4;
    if (known(word) && known(word + 1) && known(word + 2) && known(word + 3)) return;
  }
  for (uint64_t at = offset; at < offset + bytes;) {
    const uint64_t word = at / 4, end = std::min(offset + bytes, word * 4 + 4);
    const bool whole = end - at == 4;
    if (whole && map.split[word] == 0) [[likely]] {
      check(map.words[word], at);
    } else {
      if (map.split[word] == 0) {
        const Shadow& all = map.words[word];
        map.bytes.push_back({all, all, all, all});
        map.split[word] = uint32_t(map.bytes.size());
      }
      for (uint64_t byte = at; byte < end; ++byte) check(map.bytes[map.split[word] - 1][byte % 4], byte);
    }
    at = end;
  }
}

}  // namespace ptxvm
