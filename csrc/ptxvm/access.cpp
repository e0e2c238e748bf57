// ld, st, cvta, isspacep, and instructions that have nothing to do here.
#include <algorithm>
#include <cstring>

#include "memory.h"

namespace ptxvm {

namespace {

enum : uint8_t { kSigned = 1, kStrong = 2 };  // Inst::flags

// Where each lane's bytes are, all checks and counters done.
void locate(Warp& warp, Space space, uint32_t exec, const Lanes& lanes, uint32_t bytes, const Touches& touches,
            uint8_t* where[kLanes]) {
  Counters& counters = warp.machine->counters;
  switch (space) {
    case Space::kShared:
      count_wavefronts(warp, lanes.address, exec, bytes);
      each_lane(exec, [&](int lane) { where[lane] = shared_at(warp, lane, lanes.address[lane], bytes, touches); });
      break;
    case Space::kLocal:
      each_lane(exec, [&](int lane) { where[lane] = local_at(warp, lane, lanes.address[lane], bytes, touches.touch); });
      break;
    case Space::kParam:
      each_lane(exec, [&](int lane) { where[lane] = param_at(warp, lane, lanes.address[lane], bytes); });
      break;
    default:
      check_global(warp, lanes, exec, bytes, touches);
      if (touches.touch == Touch::kRead)
        count_sectors(lanes, exec, bytes, counters.load_sectors, counters.load_ideal, counters.load_bytes);
      else
        count_sectors(lanes, exec, bytes, counters.store_sectors, counters.store_ideal, counters.store_bytes);
      each_lane(exec, [&](int lane) { where[lane] = reinterpret_cast<uint8_t*>(lanes.address[lane]); });
  }
}

template <class Memory, class Register>
void scatter(Warp& warp, const Inst& inst, uint32_t exec, uint8_t* const where[kLanes]) {
  for (int i = 0; i < inst.count; ++i) {
    Register* to = warp.reg<Register>(inst.list[i]);
    each_lane(exec, [&](int lane) {
      Memory value;
      std::memcpy(&value, where[lane] + size_t(i) * sizeof(Memory), sizeof(Memory));
      to[lane] = Register(value);
    });
  }
}

template <class Memory>
void scatter_to(Warp& warp, const Inst& inst, uint32_t exec, uint8_t* const where[kLanes]) {
  switch (inst.widths[0]) {
    case 2:
      return scatter<Memory, uint16_t>(warp, inst, exec, where);
    case 4:
      return scatter<Memory, uint32_t>(warp, inst, exec, where);
    default:
      return scatter<Memory, uint64_t>(warp, inst, exec, where);
  }
}

void load(Warp& warp, const Inst& inst, uint32_t exec) {
  Lanes lanes;
  addresses(warp, inst, lanes);
  const uint32_t bytes = uint32_t(inst.bytes) * inst.count;
  by_space(inst, exec, lanes, [&](Space space, uint32_t mask) {
    uint8_t* where[kLanes];
    const Touches touches{Touch::kRead, (inst.flags & kStrong) != 0, lanes.address, mask, nullptr, 0};
    locate(warp, space, mask, lanes, bytes, touches, where);
    switch (inst.bytes * 2 + (inst.flags & kSigned)) {
      case 2:
        return scatter_to<uint8_t>(warp, inst, mask, where);
      case 3:
        return scatter_to<int8_t>(warp, inst, mask, where);
      case 4:
        return scatter_to<uint16_t>(warp, inst, mask, where);
      case 5:
        return scatter_to<int16_t>(warp, inst, mask, where);
      case 8:
        return scatter_to<uint32_t>(warp, inst, mask, where);
      case 9:
        return scatter_to<int32_t>(warp, inst, mask, where);
      default:
        return scatter_to<uint64_t>(warp, inst, mask, where);
    }
  });
}

template <class Memory, class Register>
void gather(Warp& warp, const Inst& inst, uint32_t exec, uint8_t* data) {
  for (int i = 0; i < inst.count; ++i) {
    const Register* from = warp.reg<Register>(inst.list[i]);
    each_lane(exec, [&](int lane) {
      const Memory value = Memory(from[lane]);
      std::memcpy(data + lane * 16 + size_t(i) * sizeof(Memory), &value, sizeof(Memory));
    });
  }
}

template <class Memory>
void gather_from(Warp& warp, const Inst& inst, uint32_t exec, uint8_t* data) {
  switch (inst.widths[0]) {
    case 2:
      return gather<Memory, uint16_t>(warp, inst, exec, data);
    case 4:
      return gather<Memory, uint32_t>(warp, inst, exec, data);
    default:
      return gather<Memory, uint64_t>(warp, inst, exec, data);
  }
}

void store(Warp& warp, const Inst& inst, uint32_t exec) {
  Lanes lanes;
  addresses(warp, inst, lanes);
  alignas(64) uint8_t data[kLanes * 16];
  const uint32_t bytes = uint32_t(inst.bytes) * inst.count;
  switch (inst.bytes) {
    case 1:
      gather_from<uint8_t>(warp, inst, exec, data);
      break;
    case 2:
      gather_from<uint16_t>(warp, inst, exec, data);
      break;
    case 4:
      gather_from<uint32_t>(warp, inst, exec, data);
      break;
    default:
      gather_from<uint64_t>(warp, inst, exec, data);
  }
  by_space(inst, exec, lanes, [&](Space space, uint32_t mask) {
    uint8_t* where[kLanes];
    const Touches touches{Touch::kWrite, (inst.flags & kStrong) != 0, lanes.address, mask, data, 16};
    if (space == Space::kParam) warp.fault("readonly", std::countr_zero(mask), "a write to the kernel's parameters");
    locate(warp, space, mask, lanes, bytes, touches, where);
    each_lane(mask, [&](int lane) { std::memcpy(where[lane], data + lane * 16, bytes); });
  });
}

void nothing(Warp&, const Inst&, uint32_t) {}

// ---- address conversions ----

template <uint64_t kWindow>
void to_generic(Warp& warp, const Inst& inst, uint32_t exec) {
  uint64_t* d = warp.reg<uint64_t>(inst.d);
  const uint64_t* a = warp.reg<uint64_t>(inst.a);
  each_lane(exec, [&](int lane) { d[lane] = a[lane] | kWindow; });
}

template <uint64_t kWindow>
void from_generic(Warp& warp, const Inst& inst, uint32_t exec) {
  uint64_t* d = warp.reg<uint64_t>(inst.d);
  const uint64_t* a = warp.reg<uint64_t>(inst.a);
  each_lane(exec, [&](int lane) {
    if ((a[lane] & kWindowMask) != kWindow)
      warp.fault("bounds", lane, "generic address " + hex(a[lane]) + " is not in the space that cvta converts to");
    d[lane] = a[lane] & ~kWindow;
  });
}

template <uint64_t kWindow>
void is_space(Warp& warp, const Inst& inst, uint32_t exec) {
  const uint64_t* a = warp.reg<uint64_t>(inst.a);
  uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result |= uint32_t((a[lane] & kWindowMask) == kWindow) << lane;
  warp.pred(inst.d) = (warp.pred(inst.d) & ~exec) | (result & exec);
}

// ---- decoding ----

Class class_of(Space space) {
  switch (space) {
    case Space::kShared:
      return Class::kShared;
    case Space::kLocal:
      return Class::kLocal;
    case Space::kParam:
    case Space::kConst:
      return Class::kParam;
    default:
      return Class::kGlobal;
  }
}

bool decode_load_store(Decoder& decoder, const Statement& statement, Inst& inst) {
  const bool loads = statement.parts[0] == "ld" || statement.parts[0] == "ldu";
  std::string_view type;
  for (size_t i = 1; i < statement.parts.size(); ++i) {
    const std::string_view part = statement.parts[i];
    if (space_part(part, inst.space) || is_hint(part)) continue;
    if (part == "volatile" || part == "relaxed" || part == "acquire" || part == "release")
      inst.flags |= kStrong;
    else if (part == "v2" || part == "v4" || part == "v8")
      inst.count = uint8_t(part[1] - '0');
    else if (is_type("." + std::string(part)) && part != "pred" && i + 1 == statement.parts.size())
      type = part;
    else
      return false;
  }
  if (type.empty() || statement.operands.size() != 2) return false;
  inst.bytes = uint8_t(type_bytes(type, statement.line));
  if (uint32_t(inst.bytes) * inst.count > 16 || inst.bytes > 8) return false;
  if (type[0] == 's') inst.flags |= kSigned;
  const Operand& value = statement.operands[loads ? 0 : 1];
  decoder.address(statement.operands[loads ? 1 : 0], inst);
  inst.cls = class_of(inst.space);
  std::vector<uint32_t> places;
  const auto add = [&](const Operand& one) {
    uint8_t bytes = 0;
    if (loads && one.kind == Operand::kSink) {
      places.push_back(decoder.trash_register());
      return;
    }
    places.push_back(loads ? decoder.any_destination(one, bytes) : decoder.any_source(one, bytes, inst.bytes));
    if (bytes == 0 || bytes < inst.bytes) decoder.fail("register is too narrow, or a predicate");
    if (one.kind == Operand::kInteger || one.kind == Operand::kFloat) bytes = std::max<uint8_t>(inst.bytes, 2);
    if (inst.widths[0] && inst.widths[0] != bytes) decoder.fail("elements of different widths");
    inst.widths[0] = bytes;
  };
  if (value.kind == Operand::kVector) {
    if (value.elements.size() != inst.count) decoder.fail("the vector has the wrong number of elements");
    for (const Operand& one : value.elements) add(one);
  } else {
    add(value);
  }
  if (places.size() != inst.count) decoder.fail("expected a vector");
  if (inst.widths[0] == 0) inst.widths[0] = std::max<uint8_t>(inst.bytes, 2);
  inst.list = decoder.list(places);
  inst.run = loads ? load : store;
  return true;
}

bool decode_cvta(Decoder& decoder, const Statement& statement, Inst& inst) {
  const bool to_space = statement.has("to");
  Space space = Space::kGeneric;
  for (std::string_view part : statement.parts) space_part(part, space);
  if (statement.parts.back() != "u64" || statement.operands.size() != 2) return false;
  inst.cls = Class::kConvert;
  inst.a = decoder.source(statement.operands[1], 'l');
  inst.d = decoder.destination(statement.operands[0], 'l');
  switch (space) {
    case Space::kGlobal:
    case Space::kConst:
      inst.run = to_generic<0>;
      return true;
    case Space::kShared:
      inst.run = to_space ? from_generic<kSharedWindow> : to_generic<kSharedWindow>;
      return true;
    case Space::kLocal:
      inst.run = to_space ? from_generic<kLocalWindow> : to_generic<kLocalWindow>;
      return true;
    case Space::kParam:
      inst.run = to_space ? from_generic<kParamWindow> : to_generic<kParamWindow>;
      return true;
    default:
      return false;
  }
}

}  // namespace

// Qualifiers that change nothing here: cache hints and the scope of an ordering.
bool is_hint(std::string_view part) {
  for (const char* hint : {"nc",
                           "ca",
                           "cg",
                           "cs",
                           "lu",
                           "cv",
                           "wb",
                           "wt",
                           "cta",
                           "cluster",
                           "gpu",
                           "sys",
                           "weak",
                           "L1::evict_first",
                           "L1::evict_last",
                           "L1::no_allocate",
                           "L1::evict_normal",
                           "L1::evict_unchanged",
                           "L2::evict_first",
                           "L2::evict_last",
                           "L2::evict_normal",
                           "L2::64B",
                           "L2::128B",
                           "L2::256B",
                           "uniform",
                           "unified"})
    if (part == hint) return true;
  return false;
}

bool space_part(std::string_view part, Space& space) {
  if (part == "global")
    space = Space::kGlobal;
  else if (part == "shared" || part == "shared::cta")
    space = Space::kShared;
  else if (part == "local")
    space = Space::kLocal;
  else if (part == "param" || part == "param::entry" || part == "param::func")
    space = Space::kParam;
  else if (part == "const")
    space = Space::kConst;
  else
    return false;
  return true;
}

bool decode_memory(Decoder& decoder, const Statement& statement, Inst& inst) {
  const std::string_view base = statement.parts[0];
  if (base == "ld" || base == "st" || base == "ldu") return decode_load_store(decoder, statement, inst);
  if (base == "atom" || base == "red") return decode_atomic(decoder, statement, inst);
  if (base == "cvta") return decode_cvta(decoder, statement, inst);
  if (base == "cp") return decode_async(decoder, statement, inst);
  if (base == "isspacep" && statement.operands.size() == 2) {
    inst.cls = Class::kPredicate;
    inst.a = decoder.source(statement.operands[1], 'l');
    inst.d = decoder.destination(statement.operands[0], 'p');
    Space space = Space::kGeneric;
    if (!space_part(statement.parts.back(), space)) return false;
    inst.run = space == Space::kShared  ? is_space<kSharedWindow>
               : space == Space::kLocal ? is_space<kLocalWindow>
               : space == Space::kParam ? is_space<kParamWindow>
                                        : is_space<0>;
    return true;
  }
  // One block at a time, a lane's accesses in program order: fences have nothing to do. Prefetches only warm caches.
  if (base == "membar" || base == "fence" || base == "prefetch" || base == "prefetchu" || base == "nanosleep" ||
      base == "griddepcontrol") {
    if (statement.has("mbarrier_init") || statement.has("proxy") || statement.has("tensormap")) return false;
    inst.cls = Class::kControl;
    inst.run = nothing;
    return true;
  }
  return false;
}

void list_memory_forms(std::vector<std::string>& names) {
  for (const char* name :
       {"ld{.space}{.v2,.v4}.type", "st{.space}{.v2,.v4}.type", "atom{.space}.op.type", "red{.space}.op.type",
        "cp.async.ca.shared.global", "cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group",
        "cp.async.wait_all", "cvta.space.u64", "cvta.to.space.u64", "isspacep.space", "membar", "fence", "prefetch",
        "prefetchu", "nanosleep", "griddepcontrol"})
    names.push_back(name);
}

}  // namespace ptxvm
