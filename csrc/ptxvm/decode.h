// Statements of a PTX function to instructions. decode.cpp owns names, scopes, labels and calls; alu.cpp, convert.cpp,
// memory.cpp and tensor.cpp say which instruction forms exist and which handler runs each.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace ptxvm {

struct Operand {
  enum Kind : uint8_t { kRegister, kInteger, kFloat, kSymbol, kAddress, kVector, kSink } kind = kSink;
  bool negated = false;           // !%p
  std::string_view name;          // register or symbol (of an address: its base, or empty)
  int64_t integer = 0;            // value, or what is added to a symbol or an address
  double number = 0;              // kFloat
  uint8_t float_bytes = 0;        // of a 0f / 0d literal, else 8
  std::vector<Operand> elements;  // {..}
  std::vector<Operand> partner;   // d|p: the p
};

struct Statement {
  std::string op;                       // as written
  std::vector<std::string_view> parts;  // op split at dots
  std::vector<Operand> operands;
  Operand guard;
  bool guarded = false;
  int line = 0;
  size_t first = 0, last = 0;  // tokens
  bool has(std::string_view part) const;
};

inline uint64_t round_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

// How the operands of a table form look: destinations, '=', sources. One letter each:
//   h w l: 16, 32, 64-bit integers or bits     x y: f16, bf16     f g: f32, f64     p: predicate
//   i: an immediate     m: a member mask
//   C: the carry flag CC.CF, implied
// A digit behind a letter makes a vector of so many; '|' behind a destination allows a predicate partner.
// Scalar destinations and sources become d, a, b, c in order (the rest, vectors and partners go to Inst::list).
struct Form {
  Handler run;
  std::string operands;
  Class cls;
  Kind kind = Kind::kPlain;
  int64_t imm = 0;
};
using FormTable = std::unordered_map<std::string, Form>;

class Decoder {
 public:
  Decoder(const Source& source, Program& program, const std::map<std::string, uint64_t>& module_addresses);
  void run(const Function& entry);

  // For the decoders of single instructions. Each records the register for the poison check.
  uint32_t source(const Operand& operand, char type);
  uint32_t destination(const Operand& operand, char type);
  uint32_t any_source(const Operand& operand, uint8_t& bytes, uint8_t type_bytes);  // a register wider than the type
  uint32_t any_destination(const Operand& operand, uint8_t& bytes);
  void address(const Operand& operand, Inst& inst);  // a, imm, wide_address; and the space of a .param variable
  uint32_t constant(uint64_t value, uint32_t bytes);
  uint32_t carry();  // the condition code register CC.CF
  void read_carry() { reads_.push_back(carry_number_); }
  void write_carry() { writes_.push_back(carry_number_); }
  const uint32_t* list(std::vector<uint32_t> values);
  void apply(const Form& form, const Statement& statement, Inst& inst);
  [[noreturn]] void fail(const std::string& what) const;  // about the current statement
  uint32_t trash_register();
  uint32_t trash_predicate();

 private:
  struct Register {
    uint32_t offset, number;
    uint8_t bytes;  // 0: predicate
  };
  struct Symbol {
    enum Kind : uint8_t { kRegister, kVariable } kind;
    Register reg;
    Space space;
    uint64_t address;
  };
  struct Fixup {
    std::string label;
    size_t inst;
    std::vector<uint32_t>* table;  // of a brx.idx, or nullptr
    size_t index;
    int line;
  };
  struct Scope {
    std::unordered_map<std::string, Symbol> symbols;
    std::unordered_map<std::string, size_t> labels;
    std::vector<Fixup> fixups;
    std::unordered_map<std::string, std::vector<std::string>> branch_targets;
    std::vector<size_t> returns;  // instructions that leave an inlined function
    bool is_function = false;
  };

  void body(size_t begin, size_t end);
  size_t directive(size_t at, size_t end);
  size_t instruction(size_t at, size_t end);
  Operand operand(size_t& at);
  void declare_registers(size_t& at);
  void declare_variable(const Variable& variable);
  Register new_register(const std::string& name, uint8_t bytes);
  const Symbol* find(std::string_view name) const;
  const Register& find_register(std::string_view name) const;
  uint32_t special(std::string_view name, uint8_t& bytes);
  void open_scope(bool is_function);
  void close_scope();
  void emit(const Statement& statement, Inst inst);
  bool decode_control(const Statement& statement, Inst& inst);
  void decode_mov(const Statement& statement, Inst& inst);
  void call(const Statement& statement);
  void branch_to(const std::string& label, size_t inst, std::vector<uint32_t>* table, size_t index);
  void layout_parameters(const Function& entry);
  void layout_shared(const Function& entry);
  uint32_t file_space(uint32_t bytes);

  const Source& source_;
  Program& program_;
  const std::map<std::string, uint64_t>& module_addresses_;
  std::vector<Scope> scopes_;
  std::map<std::pair<uint32_t, uint64_t>, uint32_t> constants_;
  std::map<std::string, uint32_t> opcode_index_;
  std::vector<uint32_t> reads_, writes_;
  std::vector<std::string> call_stack_;
  const Statement* current_ = nullptr;
  uint32_t carry_ = 0, carry_number_ = 0, trash_ = 0, trash_predicate_ = 0;
};

const FormTable& alu_forms();     // integer, predicate and move forms
const FormTable& float_forms();   // f32, f64
const FormTable& half_forms();    // f16, bf16, and pairs of them
const FormTable& warp_forms();    // shfl, vote, match, redux, bar.warp.sync, activemask
const FormTable& tensor_forms();  // mma
bool decode_matrix(Decoder& decoder, const Statement& statement, Inst& inst);   // ldmatrix, stmatrix
bool decode_convert(Decoder& decoder, const Statement& statement, Inst& inst);  // cvt
bool decode_memory(Decoder& decoder, const Statement& statement, Inst& inst);   // ld, st, atom, red, cp.async, ...
void list_convert_forms(std::vector<std::string>& names);
void list_memory_forms(std::vector<std::string>& names);
std::vector<std::string> supported_forms();

}  // namespace ptxvm
