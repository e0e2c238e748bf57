// mma.sync, ldmatrix, stmatrix.
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX manual, "Matrix fragments for mma.m16n8k16" and its like). A is
// rows x k, B is k x columns, C and D are 16 x 8. 16-bit operands, two values of neighbouring k a register:
//   A  register r: row g + 8 (r & 1), k = 2t + 8 (r >> 1) + {0, 1}
//   B  register r: column g,          k = 2t + 8 r + {0, 1}
//   C  value v:    row g + 8 (v >> 1), column 2t + (v & 1)
// tf32 operands, one value a register: k = t + 4 (r >> 1) for A, t + 4 r for B.
//
// Products are exact and added to C in fp32, k ascending, one rounding each. Tensor cores add several products at once
// with a truncating internal format that is not documented and not modelled.
#include <bit>

#include "half.h"
#include "lanewise.h"

namespace ptxvm {

namespace {

enum class Operands { kBf16, kF16, kTf32 };

using Row = float __attribute__((vector_size(32)));  // eight columns

// A register over the lanes is a matrix of 8 rows (g), kPerRegister values of each of 4 lanes (t) beside each other.
template <Operands kType>
inline void unfold(const Warp& warp, uint32_t place, float (&values)[8][kType == Operands::kTf32 ? 4 : 8]) {
  constexpr int kCount = kType == Operands::kTf32 ? kLanes : 2 * kLanes;
  float* to = &values[0][0];
  if constexpr (kType == Operands::kTf32) {
    const uint32_t* from = warp.reg<uint32_t>(place);
    for (int i = 0; i < kCount; ++i) to[i] = bits_as<float>(from[i] & 0xffffe000u);
  } else {
    const uint16_t* from = warp.reg<uint16_t>(place);
    for (int i = 0; i < kCount; ++i)
      to[i] = kType == Operands::kBf16 ? to_float(Bf16{from[i]}) : to_float(F16{from[i]});
  }
}

// list: d, a, b, c. kHalfSum: C and D are f16, two a register.
template <Operands kType, int kDepth, bool kHalfSum>
void mma(Warp& warp, const Inst& inst, uint32_t) {
  ++warp.machine->counters.mma;
  constexpr int kStep = kType == Operands::kTf32 ? 4 : 8;  // k in one register of a row
  constexpr int kB = kDepth / kStep, kA = 2 * kB, kC = kHalfSum ? 2 : 4;
  const uint32_t *d = inst.list, *a = d + kC, *b = a + kA, *c = b + kB;
  float rows[kA][8][kStep], values[8][kStep];
  for (int r = 0; r < kA; ++r) unfold<kType>(warp, a[r], rows[r]);
  Row columns[kDepth];
  for (int r = 0; r < kB; ++r) {
    unfold<kType>(warp, b[r], values);
    for (int k = 0; k < kStep; ++k)
      for (int n = 0; n < 8; ++n) columns[r * kStep + k][n] = values[n][k];
  }
  for (int half = 0; half < 2; ++half) {  // rows 0 to 7, 8 to 15
    Row sums[8];
    for (int g = 0; g < 8; ++g)
      for (int t = 0; t < 4; ++t)
        for (int e = 0; e < 2; ++e)
          sums[g][2 * t + e] = kHalfSum ? to_float(F16{warp.reg<uint16_t>(c[half])[8 * g + 2 * t + e]})
                                        : warp.reg<float>(c[kHalfSum ? 0 : 2 * half + e])[4 * g + t];
    for (int k = 0; k < kDepth; ++k)
#pragma GCC unroll 8
      for (int g = 0; g < 8; ++g) sums[g] += rows[2 * (k / kStep) + half][g][k % kStep] * columns[k];
    for (int g = 0; g < 8; ++g)
      for (int t = 0; t < 4; ++t)
        for (int e = 0; e < 2; ++e) {
          if (kHalfSum)
            warp.reg<uint16_t>(d[half])[8 * g + 2 * t + e] = to_f16(sums[g][2 * t + e]).bits;
          else
            warp.reg<float>(d[kHalfSum ? 0 : 2 * half + e])[4 * g + t] = sums[g][2 * t + e];
        }
  }
}

// Eight rows of 16 bytes a matrix, row i of matrix m at the address of lane 8 m + i. A lane gets (gives) two 16-bit
// elements a matrix: row lane / 4, columns 2 (lane % 4) + {0, 1}; transposed, rows and columns trade places.
template <bool kTransposed, bool kStores>
void matrix_move(Warp& warp, const Inst& inst, uint32_t) {
  const int count = inst.count;
  uint64_t address[kLanes];
  for (int lane = 0; lane < 8 * count; ++lane) {
    const uint64_t base = inst.wide_address ? warp.reg<uint64_t>(inst.a)[lane] : warp.reg<uint32_t>(inst.a)[lane];
    address[lane] = base + uint64_t(inst.imm);
    if (!inst.wide_address) address[lane] = uint32_t(address[lane]);
    address[lane] &= ~kWindowMask;
  }
  const uint32_t exec = count == 4 ? kFullMask : (1u << (8 * count)) - 1;
  count_wavefronts(warp, address, exec, 16);
  Touches touches{kStores ? Touch::kWrite : Touch::kRead, false, address, exec, nullptr, 0};
  touches.collective = true;
  for (int m = 0; m < count; ++m) {
    uint8_t* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = shared_at(warp, 8 * m + i, address[8 * m + i], 16, touches);
    uint32_t* values = warp.reg<uint32_t>(inst.list[m]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      uint8_t* first = kTransposed ? rows[column] + 2 * row : rows[row] + 2 * column;
      uint8_t* second = kTransposed ? rows[column + 1] + 2 * row : first + 2;
      uint16_t pair[2];
      if (kStores) {
        std::memcpy(pair, &values[lane], 4);
        std::memcpy(first, &pair[0], 2);
        std::memcpy(second, &pair[1], 2);
      } else {
        std::memcpy(&pair[0], first, 2);
        std::memcpy(&pair[1], second, 2);
        std::memcpy(&values[lane], pair, 4);
      }
    }
  }
}

}  // namespace

bool decode_matrix(Decoder& decoder, const Statement& statement, Inst& inst) {
  const bool loads = statement.parts[0] == "ldmatrix";
  if (!loads && statement.parts[0] != "stmatrix") return false;
  bool transposed = false, shape = false, type = false;
  int count = 0;
  for (size_t i = 1; i < statement.parts.size(); ++i) {
    const std::string_view part = statement.parts[i];
    if (part == "sync" || part == "aligned" || part == "shared" || part == "shared::cta") continue;
    if (part == "m8n8")
      shape = true;
    else if (part == "trans")
      transposed = true;
    else if (part == "x1" || part == "x2" || part == "x4")
      count = part[1] - '0';
    else if (part == "b16")
      type = true;
    else
      return false;
  }
  if (!shape || !type || !count || statement.operands.size() != 2) return false;
  const Operand& values = statement.operands[loads ? 0 : 1];
  inst.space = Space::kShared;
  decoder.address(statement.operands[loads ? 1 : 0], inst);
  std::vector<uint32_t> places;
  std::vector<Operand> elements = values.elements;
  if (values.kind != Operand::kVector) elements = {values};
  if (elements.size() != size_t(count)) decoder.fail("expected " + std::to_string(count) + " registers");
  for (const Operand& one : elements)
    places.push_back(loads ? decoder.destination(one, 'w') : decoder.source(one, 'w'));
  inst.list = decoder.list(places);
  inst.count = uint8_t(count);
  inst.cls = Class::kMatrixLoad;
  inst.kind = Kind::kWholeWarp;
  inst.run = loads ? (transposed ? matrix_move<true, false> : matrix_move<false, false>)
                   : (transposed ? matrix_move<true, true> : matrix_move<false, true>);
  return true;
}

const FormTable& tensor_forms() {
  static const FormTable kForms = [] {
    Table table;
    table.cls = Class::kTensor;
    const auto add = [&](const std::string& name, Handler run, const char* operands) {
      table.add("mma.sync.aligned." + name, run, operands, 0, Kind::kWholeWarp);
    };
    add("m16n8k16.row.col.f32.bf16.bf16.f32", mma<Operands::kBf16, 16, false>, "f4=w4w2f4");
    add("m16n8k16.row.col.f32.f16.f16.f32", mma<Operands::kF16, 16, false>, "f4=w4w2f4");
    add("m16n8k16.row.col.f16.f16.f16.f16", mma<Operands::kF16, 16, true>, "w2=w4w2w2");
    add("m16n8k8.row.col.f32.bf16.bf16.f32", mma<Operands::kBf16, 8, false>, "f4=w2w1f4");
    add("m16n8k8.row.col.f32.f16.f16.f32", mma<Operands::kF16, 8, false>, "f4=w2w1f4");
    add("m16n8k8.row.col.f16.f16.f16.f16", mma<Operands::kF16, 8, true>, "w2=w2w1w2");
    add("m16n8k8.row.col.f32.tf32.tf32.f32", mma<Operands::kTf32, 8, false>, "f4=w4w2f4");
    add("m16n8k4.row.col.f32.tf32.tf32.f32", mma<Operands::kTf32, 4, false>, "f4=w2w1f4");
    return std::move(table.forms);
  }();
  return kForms;
}

}  // namespace ptxvm
