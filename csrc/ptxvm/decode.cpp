// Statements, scopes, labels, calls; the layout of a kernel's memory.
#include "decode.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>
#include <utility>

namespace ptxvm {

namespace {

std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> parts;
  for (size_t from = 0; from <= text.size();) {
    size_t to = text.find('.', from);
    if (to == std::string_view::npos) to = text.size();
    parts.push_back(text.substr(from, to - from));
    from = to + 1;
  }
  return parts;
}

}  // namespace

bool Statement::has(std::string_view part) const { return std::find(parts.begin(), parts.end(), part) != parts.end(); }

Decoder::Decoder(const Source& source, Program& program, const std::map<std::string, uint64_t>& module_addresses)
    : source_(source), program_(program), module_addresses_(module_addresses) {
  program_.constants.push_back({file_space(4), 0, 1});  // offset 0: the predicate that is always true
  program_.register_bytes = 64;
}

void Decoder::fail(const std::string& what) const {
  throw ParseError("kernel " + program_.name + ", PTX line " + std::to_string(current_ ? current_->line : 0) + ": " +
                   what + (current_ ? " in '" + source_.statement(current_->first, current_->last) + "'" : ""));
}

// ---- statements ----

void Decoder::open_scope(bool is_function) {
  scopes_.emplace_back();
  scopes_.back().is_function = is_function;
}

void Decoder::close_scope() {
  Scope scope = std::move(scopes_.back());
  scopes_.pop_back();
  for (Fixup& fixup : scope.fixups) {
    const auto label = scope.labels.find(fixup.label);
    if (label == scope.labels.end()) {
      if (scope.is_function)
        throw ParseError("kernel " + program_.name + ", PTX line " + std::to_string(fixup.line) + ": label '" +
                         fixup.label + "' does not exist");
      scopes_.back().fixups.push_back(fixup);
    } else if (fixup.table) {
      (*fixup.table)[fixup.index] = uint32_t(label->second);
    } else {
      program_.code[fixup.inst].target = uint32_t(label->second);
    }
  }
  if (scope.is_function)
    for (size_t inst : scope.returns) program_.code[inst].target = uint32_t(program_.code.size());
  else if (!scopes_.empty())  // labels of an inner scope cannot be reached from outside; ret leaves the function
    scopes_.back().returns.insert(scopes_.back().returns.end(), scope.returns.begin(), scope.returns.end());
}

void Decoder::declare_registers(size_t& at) {
  const std::vector<Token>& tokens = source_.tokens();
  const int line = tokens[at].line;
  uint8_t bytes = 0;
  for (++at; tokens[at].text[0] == '.'; ++at) {
    if (tokens[at].text == ".v2" || tokens[at].text == ".v4")
      throw ParseError("PTX line " + std::to_string(line) + ": vector registers are unsupported");
    bytes = tokens[at].text == ".pred" ? 0 : uint8_t(std::max(2u, type_bytes(tokens[at].text, line)));
  }
  for (; tokens[at].text != ";"; ++at) {
    if (tokens[at].text == ",") continue;
    const std::string name(tokens[at].text);
    if (tokens[at + 1].text == "<") {
      const int64_t count = parse_integer(tokens[at + 2].text, line);
      for (int64_t i = 0; i < count; ++i) {
        const std::string numbered = name + std::to_string(i);
        scopes_.back().symbols[numbered] = {Symbol::kRegister, new_register(numbered, bytes), Space::kGeneric, 0};
      }
      at += 3;
    } else {
      scopes_.back().symbols[name] = {Symbol::kRegister, new_register(name, bytes), Space::kGeneric, 0};
    }
  }
  ++at;
}

void Decoder::declare_variable(const Variable& variable) {
  Symbol symbol{Symbol::kVariable, {}, variable.space, 0};
  if (variable.space == Space::kShared) {
    const uint32_t at = uint32_t(round_up(program_.shared_bytes, variable.align));
    symbol.address = kFirstOffset + at;
    program_.shared_bytes = at + uint32_t(variable.bytes);
  } else {  // .local, and .param of a call: both per lane
    const uint32_t at = uint32_t(round_up(program_.local_bytes, std::max(variable.align, 1u)));
    symbol.address = kFirstOffset + at;
    program_.local_bytes = at + uint32_t(variable.bytes);
    if (variable.space == Space::kParam) symbol.space = Space::kArgument;
  }
  scopes_.back().symbols[variable.name] = symbol;
}

size_t Decoder::directive(size_t at, size_t end) {
  const std::vector<Token>& tokens = source_.tokens();
  const std::string_view word = tokens[at].text;
  const int line = tokens[at].line;
  if (word == ".reg") {
    declare_registers(at);
  } else if (word == ".shared" || word == ".local" || word == ".param") {
    const Variable variable = source_.declaration(at);
    if (variable.space == Space::kShared && variable.bytes == 0)
      fail("a shared array without a size inside a function");
    declare_variable(variable);
  } else if (word == ".loc" || word == ".file") {
    while (at < end && tokens[at].line == line) ++at;
  } else if (word == ".pragma") {
    while (tokens[at].text != ";") ++at;
    ++at;
  } else {
    throw ParseError("kernel " + program_.name + ", PTX line " + std::to_string(line) + ": directive '" +
                     std::string(word) + "' is unsupported inside a function");
  }
  return at;
}

void Decoder::body(size_t begin, size_t end) {
  const std::vector<Token>& tokens = source_.tokens();
  for (size_t at = begin; at < end;) {
    const Token& token = tokens[at];
    if (token.text == "{") {
      open_scope(false);
      ++at;
    } else if (token.text == "}") {
      close_scope();
      ++at;
    } else if (token.text == ";") {
      ++at;
    } else if (token.kind == Token::kWord && tokens[at + 1].text == ":") {
      scopes_.back().labels[std::string(token.text)] = program_.code.size();
      at += 2;
      if (tokens[at].text == ".branchtargets") {
        std::vector<std::string> targets;
        for (++at; tokens[at].text != ";"; ++at)
          if (tokens[at].text != ",") targets.emplace_back(tokens[at].text);
        scopes_.back().branch_targets[std::string(token.text)] = targets;
        ++at;
      }
    } else if (token.kind == Token::kWord && token.text[0] == '.') {
      at = directive(at, end);
    } else {
      at = instruction(at, end);
    }
  }
}

size_t Decoder::instruction(size_t at, size_t end) {
  const std::vector<Token>& tokens = source_.tokens();
  Statement statement;
  statement.first = at;
  statement.line = tokens[at].line;
  for (statement.last = at; statement.last < end && tokens[statement.last].text != ";";) ++statement.last;
  const Statement* outer = std::exchange(current_, &statement);
  if (tokens[at].text == "@") {
    statement.guarded = true;
    ++at;
    if (tokens[at].text == "!") {
      statement.guard.negated = true;
      ++at;
    }
    statement.guard.kind = Operand::kSymbol;
    statement.guard.name = tokens[at++].text;
  }
  if (tokens[at].kind != Token::kWord) fail("expected an instruction, got '" + std::string(tokens[at].text) + "'");
  statement.op = tokens[at++].text;
  statement.parts = split(statement.op);
  while (at < statement.last) {
    if (tokens[at].text == ",")
      ++at;
    else
      statement.operands.push_back(operand(at));
  }
  reads_.clear();
  writes_.clear();
  if (statement.parts[0] == "call") {
    call(statement);
    current_ = outer;
    return statement.last + 1;
  }
  Inst inst;
  const auto table_form = [&](const FormTable& table) {
    const auto form = table.find(statement.op);
    if (form == table.end()) return false;
    apply(form->second, statement, inst);
    return true;
  };
  if (statement.parts[0] == "mov")
    decode_mov(statement, inst);
  else if (!decode_control(statement, inst) && !table_form(alu_forms()) && !table_form(float_forms()) &&
           !table_form(half_forms()) && !table_form(warp_forms()) && !table_form(tensor_forms()) &&
           !decode_matrix(*this, statement, inst) && !decode_convert(*this, statement, inst) &&
           !decode_memory(*this, statement, inst))
    fail("instruction '" + statement.op + "' is unsupported");
  emit(statement, inst);
  current_ = outer;
  return statement.last + 1;
}

void Decoder::emit(const Statement& statement, Inst inst) {
  inst.line = statement.line;
  inst.first_token = statement.first;
  inst.last_token = statement.last;
  const auto [place, added] = opcode_index_.try_emplace(statement.op, uint32_t(program_.opcodes.size()));
  if (added) program_.opcodes.push_back(statement.op);
  inst.opcode = place->second;
  if (statement.guarded) {
    const Register& guard = find_register(statement.guard.name);
    if (guard.bytes != 0) fail("the guard is not a predicate");
    inst.guard = guard.offset;
    inst.guard_negated = statement.guard.negated;
    // Read by every active lane, also those that it switches off: first in the list, checked apart.
    reads_.insert(reads_.begin(), guard.number);
  }
  std::vector<uint32_t> numbers = reads_;
  numbers.insert(numbers.end(), writes_.begin(), writes_.end());
  inst.read_count = uint16_t(reads_.size());
  inst.write_count = uint16_t(writes_.size());
  if (!numbers.empty()) inst.reads = list(std::move(numbers));
  program_.code.push_back(inst);
}

void Decoder::branch_to(const std::string& label, size_t inst, std::vector<uint32_t>* table, size_t index) {
  scopes_.back().fixups.push_back({label, inst, table, index, current_->line});
}

// bra, brx.idx, ret, exit, trap and the barriers of a block.
bool Decoder::decode_control(const Statement& statement, Inst& inst) {
  const std::string_view base = statement.parts[0];
  inst.cls = Class::kControl;
  if (base == "bra") {
    inst.kind = Kind::kBranch;
    if (statement.operands.size() != 1 || statement.operands[0].kind != Operand::kSymbol) fail("expected one label");
    branch_to(std::string(statement.operands[0].name), program_.code.size(), nullptr, 0);
  } else if (statement.op == "brx.idx" || statement.op == "brx.idx.uni") {
    inst.kind = Kind::kBranchTable;
    inst.a = source(statement.operands.at(0), 'w');
    const std::string name(statement.operands.at(1).name);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend() && !inst.list; ++scope) {
      const auto targets = scope->branch_targets.find(name);
      if (targets == scope->branch_targets.end()) continue;
      inst.imm = int64_t(targets->second.size());
      inst.list = list(std::vector<uint32_t>(targets->second.size()));
      for (size_t i = 0; i < targets->second.size(); ++i)
        branch_to(targets->second[i], program_.code.size(), program_.lists.back().get(), i);
    }
    if (!inst.list) fail("branch targets '" + name + "' are not declared above");
  } else if (base == "ret" || base == "exit") {
    const bool inlined = base == "ret" && !call_stack_.empty();
    inst.kind = inlined ? Kind::kBranch : Kind::kExit;
    if (inlined) scopes_.back().returns.push_back(program_.code.size());
  } else if (base == "trap") {
    inst.run = [](Warp& warp, const Inst&, uint32_t exec) {
      if (exec) warp.fault("trap", __builtin_ctz(exec), "the kernel executed trap");
    };
  } else if ((base == "bar" || base == "barrier") && !statement.has("warp") && !statement.has("cluster")) {
    inst.kind = Kind::kBarrier;
    inst.cls = Class::kBarrier;
    const bool aligned = base == "bar" || statement.has("aligned");
    const bool is_reduction = statement.has("red");
    size_t at = 0;
    if (is_reduction) {
      inst.imm = statement.has("popc") ? 1 : statement.has("and") ? 2 : 3;
      inst.d = destination(statement.operands.at(at++), inst.imm == 1 ? 'w' : 'p');
    }
    inst.a = source(statement.operands.at(at++), 'w');
    const size_t operands_left = statement.operands.size() - at - (is_reduction ? 1 : 0);
    if (operands_left > 0) inst.target = source(statement.operands[at++], 'w');
    if (is_reduction) inst.b = source(statement.operands.at(at++), 'p');
    inst.flags = aligned;
    inst.flags2 = statement.has("arrive");
    if (!statement.has("sync") && !statement.has("arrive") && !is_reduction) return false;
  } else {
    return false;
  }
  return true;
}

namespace {

template <class T>
void copy(Warp& warp, const Inst& inst, uint32_t exec) {
  const T* a = warp.reg<T>(inst.a);
  T* d = warp.reg<T>(inst.d);
  if (exec == kFullMask) {
    if (a != d) std::memcpy(d, a, sizeof(T) * kLanes);
    return;
  }
  for (int lane = 0; lane < kLanes; ++lane) d[lane] = exec >> lane & 1 ? a[lane] : d[lane];
}

void copy_predicate(Warp& warp, const Inst& inst, uint32_t exec) {
  uint32_t& d = warp.pred(inst.d);
  d = (d & ~exec) | (warp.pred(inst.a) & exec);
}

// d = {list...}, elements of flags bytes each, the first in the low bits.
void pack(Warp& warp, const Inst& inst, uint32_t exec) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(exec >> lane & 1)) continue;
    uint8_t* to = warp.regs + inst.d + lane * inst.flags * inst.count;
    for (int i = 0; i < inst.count; ++i)
      std::memcpy(to + i * inst.flags, warp.regs + inst.list[i] + lane * std::max<int>(inst.flags, 2), inst.flags);
  }
}

void unpack(Warp& warp, const Inst& inst, uint32_t exec) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(exec >> lane & 1)) continue;
    uint8_t from[16];
    std::memcpy(from, warp.regs + inst.a + lane * inst.flags * inst.count, size_t(inst.flags * inst.count));
    for (int i = 0; i < inst.count; ++i) {
      uint64_t value = 0;
      std::memcpy(&value, from + i * inst.flags, inst.flags);
      std::memcpy(warp.regs + inst.list[i] + lane * std::max<int>(inst.flags, 2), &value, std::max<int>(inst.flags, 2));
    }
  }
}

}  // namespace

void Decoder::decode_mov(const Statement& statement, Inst& inst) {
  inst.cls = Class::kMove;
  if (statement.operands.size() != 2 || statement.parts.size() != 2) fail("expected mov.type d, a");
  const Operand& to = statement.operands[0];
  const Operand& from = statement.operands[1];
  const std::string_view type = statement.parts[1];
  if (type == "pred") {
    inst.run = copy_predicate;
    inst.a = source(from, 'p');
    inst.d = destination(to, 'p');
    return;
  }
  const uint8_t bytes = uint8_t(type_bytes(type, statement.line));
  const char letter = bytes == 2 ? 'h' : bytes == 4 ? (type == "f32" ? 'f' : 'w') : (type == "f64" ? 'g' : 'l');
  if (bytes != 2 && bytes != 4 && bytes != 8) fail("mov of " + std::to_string(bytes * 8) + " bits is unsupported");
  if (to.kind == Operand::kVector || from.kind == Operand::kVector) {
    const bool packs = from.kind == Operand::kVector;
    const std::vector<Operand>& elements = packs ? from.elements : to.elements;
    inst.count = uint8_t(elements.size());
    if (elements.size() != 2 && elements.size() != 4) fail("expected a vector of 2 or 4 elements");
    inst.flags = uint8_t(bytes / inst.count);
    const char element = inst.flags == 4 ? 'w' : 'h';
    std::vector<uint32_t> places;
    for (const Operand& one : elements) places.push_back(packs ? source(one, element) : destination(one, element));
    inst.list = list(places);
    inst.run = packs ? pack : unpack;
    (packs ? inst.d : inst.a) = packs ? destination(to, letter) : source(from, letter);
    return;
  }
  inst.run = bytes == 2 ? copy<uint16_t> : bytes == 4 ? copy<uint32_t> : copy<uint64_t>;
  inst.a = source(from, letter);
  inst.d = destination(to, letter);
}

// A call is the callee's body in place, with registers of its own; arguments are per-lane memory.
void Decoder::call(const Statement& statement) {
  const Operand *results = nullptr, *arguments = nullptr, *callee = nullptr;
  for (const Operand& one : statement.operands) {
    if (one.kind == Operand::kVector)
      (callee ? arguments : results) = &one;
    else if (!callee)
      callee = &one;
    else
      fail("indirect calls are unsupported");
  }
  if (!callee || callee->kind != Operand::kSymbol) fail("expected the name of a function");
  const std::string name(callee->name);
  if (name == "__assertfail" || name == "vprintf") {
    Inst inst;
    inst.cls = Class::kControl;
    inst.run = name == "vprintf" ? Handler([](Warp& warp, const Inst&, uint32_t exec) {
      if (exec) warp.fault("unsupported", __builtin_ctz(exec), "printf has nowhere to print to");
    })
                                 : Handler([](Warp& warp, const Inst&, uint32_t exec) {
                                     if (exec)
                                       warp.fault("trap", __builtin_ctz(exec), "an assertion of the kernel failed");
                                   });
    Statement plain = statement;
    if (results)
      for (const Operand& one : results->elements)
        if (!find(one.name)) fail("'" + std::string(one.name) + "' is not declared");
    emit(plain, inst);
    return;
  }
  const Function* function = source_.function(name);
  if (!function || !function->has_body) fail("function '" + name + "' is not defined in this module");
  if (std::find(call_stack_.begin(), call_stack_.end(), name) != call_stack_.end())
    fail("recursion (into " + name + ") is unsupported");
  if (statement.guarded) fail("a guarded call is unsupported");
  const auto bind = [&](const std::vector<Variable>& formals, const Operand* actuals,
                        std::unordered_map<std::string, Symbol>& symbols) {
    if (formals.size() != (actuals ? actuals->elements.size() : 0)) fail("wrong number of arguments for " + name);
    for (size_t i = 0; i < formals.size(); ++i) {
      const Operand& actual = actuals->elements[i];
      const Symbol* symbol = actual.kind == Operand::kSymbol ? find(actual.name) : nullptr;
      if (!symbol) fail("an argument of " + name + " is not a declared name");
      symbols[formals[i].name] = *symbol;
    }
  };
  std::unordered_map<std::string, Symbol> symbols;
  bind(function->results, results, symbols);
  bind(function->parameters, arguments, symbols);
  call_stack_.push_back(name);
  open_scope(true);
  scopes_.back().symbols = std::move(symbols);
  body(function->begin, function->end);
  close_scope();
  call_stack_.pop_back();
}

// ---- a kernel ----

void Decoder::layout_parameters(const Function& entry) {
  uint64_t offset = 0;
  for (const Variable& parameter : entry.parameters) {
    offset = round_up(offset, parameter.align);
    program_.parameter_offsets.push_back(uint32_t(offset));
    program_.parameters.push_back(parameter);
    scopes_.back().symbols[parameter.name] = {Symbol::kVariable, {}, Space::kParam, offset};
    offset += parameter.bytes;
  }
  program_.parameter_bytes = uint32_t(offset);
}

// Shared memory: module-scope variables that the kernel, or a function it could call, names; then those declared
// inside; then all dynamic arrays, which start at the same place.
void Decoder::layout_shared(const Function& entry) {
  const std::vector<Token>& tokens = source_.tokens();
  std::unordered_set<std::string_view> used;
  std::vector<size_t> inside;  // declarations
  for (const Function& function : source_.functions()) {
    if (!function.has_body || (function.is_entry && function.name != entry.name)) continue;
    for (size_t at = function.begin; at < function.end; ++at) {
      used.insert(tokens[at].text);
      if (tokens[at].text == ".shared") inside.push_back(at);
    }
  }
  uint64_t dynamic_align = 16;
  for (const Variable& variable : source_.variables()) {
    if (variable.space != Space::kShared || !used.count(variable.name)) continue;
    if (variable.bytes > 0)
      declare_variable(variable);
    else
      dynamic_align = std::max<uint64_t>(dynamic_align, variable.align);
  }
  uint64_t end = program_.shared_bytes;
  for (size_t at : inside) {
    const Variable variable = source_.declaration(at);
    end = round_up(end, variable.align) + variable.bytes;
  }
  program_.dynamic_offset = uint32_t(round_up(end, dynamic_align));
  for (const Variable& variable : source_.variables())
    if (variable.space == Space::kShared && variable.bytes == 0)
      scopes_.back().symbols[variable.name] = {
          Symbol::kVariable, {}, Space::kShared, kFirstOffset + program_.dynamic_offset};
}

void Decoder::run(const Function& entry) {
  program_.name = entry.name;
  program_.source = &source_;
  program_.max_threads = entry.max_threads;
  open_scope(false);  // module scope
  for (const auto& [name, address] : module_addresses_)
    scopes_.back().symbols[name] = {Symbol::kVariable, {}, Space::kGlobal, address};
  for (const Variable& variable : source_.variables())
    if (variable.space == Space::kConst) {
      const auto known = scopes_.back().symbols.find(variable.name);
      if (known != scopes_.back().symbols.end()) known->second.space = Space::kConst;
    }
  layout_shared(entry);
  open_scope(true);
  layout_parameters(entry);
  body(entry.begin, entry.end);
  Statement last;  // falling off the end leaves the kernel
  last.op = "ret";
  last.line = source_.tokens()[entry.end].line;
  last.first = entry.end;
  last.last = entry.end + 1;
  reads_.clear();
  writes_.clear();
  Inst leave;
  leave.kind = Kind::kExit;
  leave.cls = Class::kControl;
  emit(last, leave);
  close_scope();
  scopes_.clear();
}

std::unique_ptr<Program> decode(const Source& source, const std::string& kernel,
                                const std::map<std::string, uint64_t>& module_addresses) {
  const Function* function = source.function(kernel);
  if (!function || !function->is_entry || !function->has_body)
    throw ParseError("the module has no kernel '" + kernel + "'");
  auto program = std::make_unique<Program>();
  Decoder(source, *program, module_addresses).run(*function);
  return program;
}

std::vector<std::string> supported_forms() {
  std::vector<std::string> names;
  for (const FormTable* table : {&alu_forms(), &float_forms(), &half_forms(), &warp_forms(), &tensor_forms()})
    for (const auto& [name, form] : *table) names.push_back(name);
  for (const char* name :
       {"bra", "bra.uni", "brx.idx", "call", "call.uni", "ret", "exit", "trap", "bar.sync", "bar.arrive",
        "bar.red.popc.u32", "bar.red.and.pred", "bar.red.or.pred", "barrier.sync", "barrier.sync.aligned", "mov",
        "ldmatrix.sync.aligned.m8n8.num{.trans}.shared.b16", "stmatrix.sync.aligned.m8n8.num{.trans}.shared.b16"})
    names.push_back(name);
  list_convert_forms(names);
  list_memory_forms(names);
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace ptxvm
