// Operands: names to places in the register file, constants, addresses; what a table form's letters ask for.
#include <algorithm>
#include <cstdlib>
#include <utility>

#include "decode.h"
#include "half.h"

namespace ptxvm {

namespace {

uint8_t letter_bytes(char type) {
  switch (type) {
    case 'h':
    case 'x':
    case 'y':
      return 2;
    case 'w':
    case 'f':
      return 4;
    case 'l':
    case 'g':
      return 8;
    default:
      return 0;
  }
}

const std::map<std::string, uint8_t, std::less<>>& special_registers() {
  static const std::map<std::string, uint8_t, std::less<>> kBytes = [] {
    std::map<std::string, uint8_t, std::less<>> bytes;
    for (const char* name : {"%tid", "%ntid", "%ctaid", "%nctaid"})
      for (const char* axis : {".x", ".y", ".z"}) bytes[std::string(name) + axis] = 4;
    for (const char* name :
         {"%laneid", "%warpid", "%nwarpid", "%lanemask_eq", "%lanemask_le", "%lanemask_lt", "%lanemask_ge",
          "%lanemask_gt", "%smid", "%nsmid", "%dynamic_smem_size", "%total_smem_size"})
      bytes[name] = 4;
    bytes["%gridid"] = 8;
    return bytes;
  }();
  return kBytes;
}

}  // namespace

uint32_t Decoder::file_space(uint32_t bytes) {
  const uint32_t align = bytes >= 64 ? 64 : 4, at = uint32_t(round_up(program_.register_bytes, align));
  program_.register_bytes = at + bytes;
  return at;
}

// ---- names ----

Decoder::Register Decoder::new_register(const std::string& name, uint8_t bytes) {
  const Register reg{file_space(bytes ? bytes * kLanes : 4), uint32_t(program_.register_names.size()), bytes};
  program_.register_names.push_back(name);
  return reg;
}

const Decoder::Symbol* Decoder::find(std::string_view name) const {
  const std::string key(name);
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->symbols.find(key);
    if (found != scope->symbols.end()) return &found->second;
    if (scope->is_function) break;  // the caller's names are not the callee's
  }
  const auto found = scopes_.front().symbols.find(key);
  return found == scopes_.front().symbols.end() ? nullptr : &found->second;
}

const Decoder::Register& Decoder::find_register(std::string_view name) const {
  const Symbol* symbol = find(name);
  if (!symbol || symbol->kind != Symbol::kRegister) fail("'" + std::string(name) + "' is not a register");
  return symbol->reg;
}

uint32_t Decoder::special(std::string_view name, uint8_t& bytes) {
  if (name == "WARP_SZ") {
    bytes = 4;
    return constant(kLanes, 4);
  }
  const auto known = special_registers().find(name);
  if (known == special_registers().end()) {
    if (name.substr(0, 6) == "%clock" || name.substr(0, 12) == "%globaltimer" || name.substr(0, 3) == "%pm")
      fail("the machine has no clock: '" + std::string(name) + "' is unsupported");
    return 0;
  }
  bytes = known->second;
  const auto place = program_.specials.find(known->first);
  if (place != program_.specials.end()) return place->second;
  return program_.specials[known->first] = file_space(bytes * kLanes);
}

uint32_t Decoder::constant(uint64_t value, uint32_t bytes) {
  if (bytes > 0 && bytes < 8) value &= (1ull << (bytes * 8)) - 1;
  const auto known = constants_.find({bytes, value});
  if (known != constants_.end()) return known->second;
  const uint32_t offset = file_space(bytes ? bytes * kLanes : 4);
  program_.constants.push_back({offset, bytes, value});
  return constants_[{bytes, value}] = offset;
}

uint32_t Decoder::carry() {
  if (!carry_) {
    const Register reg = new_register("CC.CF", 0);
    carry_ = reg.offset;
    carry_number_ = reg.number;
  }
  return carry_;
}

uint32_t Decoder::trash_register() { return trash_ ? trash_ : trash_ = file_space(8 * kLanes); }
uint32_t Decoder::trash_predicate() { return trash_predicate_ ? trash_predicate_ : trash_predicate_ = file_space(4); }

const uint32_t* Decoder::list(std::vector<uint32_t> values) {
  program_.lists.push_back(std::make_unique<std::vector<uint32_t>>(std::move(values)));
  return program_.lists.back()->data();
}

// ---- operands of one instruction ----

uint32_t Decoder::any_source(const Operand& operand, uint8_t& bytes, uint8_t type_bytes) {
  const uint8_t immediate_bytes = std::max<uint8_t>(type_bytes, 2);
  switch (operand.kind) {
    case Operand::kInteger:
      bytes = immediate_bytes;
      return constant(uint64_t(operand.integer), bytes);
    case Operand::kFloat: {
      bytes = immediate_bytes;
      if (bytes == 8) return constant(bits_as<uint64_t>(operand.number), 8);
      return constant(bits_as<uint32_t>(float(operand.number)), 4);
    }
    case Operand::kSymbol: {
      if (const uint32_t place = special(operand.name, bytes)) return place;
      const Symbol* symbol = find(operand.name);
      if (!symbol) fail("'" + std::string(operand.name) + "' is not declared");
      if (symbol->kind == Symbol::kRegister) {
        bytes = symbol->reg.bytes;
        reads_.push_back(symbol->reg.number);
        return symbol->reg.offset;
      }
      if (symbol->space == Space::kArgument) fail("the address of a call's argument is unsupported");
      bytes = immediate_bytes;
      return constant(symbol->address + uint64_t(operand.integer), bytes);
    }
    default:
      fail("an operand is of the wrong kind");
  }
}

uint32_t Decoder::source(const Operand& operand, char type) {
  const uint8_t wanted = letter_bytes(type);
  if (operand.kind == Operand::kFloat && (type == 'x' || type == 'y'))
    return constant(type == 'x' ? to_f16(operand.number).bits : to_bf16(operand.number).bits, 2);
  if (operand.kind == Operand::kFloat && wanted != 0 && (type == 'w' || type == 'l')) {  // mov.b32 %r, 0f...
    if (wanted == 4) return constant(bits_as<uint32_t>(float(operand.number)), 4);
    return constant(bits_as<uint64_t>(operand.number), 8);
  }
  if (operand.kind == Operand::kInteger && wanted == 0) return constant(operand.integer != 0, 0);
  if (operand.kind == Operand::kInteger && type == 'g') return constant(bits_as<uint64_t>(double(operand.integer)), 8);
  uint8_t bytes = 0;
  uint32_t place = any_source(operand, bytes, wanted);
  if (bytes != wanted)
    fail("operand " + std::string(operand.name) + " has " + std::to_string(bytes * 8) + " bits, expected " +
         std::to_string(wanted * 8) + " (0: a predicate)");
  if (operand.negated) {  // a `not.pred` of its own in front
    Inst negate;
    negate.run = alu_forms().at("not.pred").run;
    negate.d = file_space(4);
    negate.a = place;
    negate.cls = Class::kPredicate;
    negate.line = current_->line;
    negate.first_token = current_->first;
    negate.last_token = current_->last;
    const std::vector<uint32_t> outer_reads = std::exchange(reads_, {reads_.back()});
    const std::vector<uint32_t> outer_writes = std::exchange(writes_, {});
    Statement statement = *current_;
    statement.guarded = false;
    statement.op = "not.pred";
    emit(statement, negate);
    reads_ = outer_reads;
    writes_ = outer_writes;
    place = negate.d;
  }
  return place;
}

uint32_t Decoder::any_destination(const Operand& operand, uint8_t& bytes) {
  if (operand.kind == Operand::kSink) {
    bytes = 8;
    return trash_register();
  }
  if (operand.kind != Operand::kSymbol) fail("a destination is not a register");
  const Register& reg = find_register(operand.name);
  bytes = reg.bytes;
  writes_.push_back(reg.number);
  return reg.offset;
}

uint32_t Decoder::destination(const Operand& operand, char type) {
  if (operand.kind == Operand::kSink) return type == 'p' ? trash_predicate() : trash_register();
  uint8_t bytes = 0;
  const uint32_t place = any_destination(operand, bytes);
  if (bytes != letter_bytes(type))
    fail("destination " + std::string(operand.name) + " has " + std::to_string(bytes * 8) + " bits, expected " +
         std::to_string(letter_bytes(type) * 8) + " (0: a predicate)");
  return place;
}

void Decoder::address(const Operand& operand, Inst& inst) {
  if (operand.kind != Operand::kAddress) fail("an operand is not an address in brackets");
  inst.imm = operand.integer;
  inst.wide_address = true;
  if (operand.name.empty()) {
    inst.a = constant(0, 8);
    return;
  }
  const Symbol* symbol = find(operand.name);
  if (!symbol) fail("'" + std::string(operand.name) + "' is not declared");
  if (symbol->kind == Symbol::kRegister) {
    if (symbol->reg.bytes < 4) fail("register " + std::string(operand.name) + " is too narrow for an address");
    inst.wide_address = symbol->reg.bytes == 8;
    inst.a = symbol->reg.offset;
    reads_.push_back(symbol->reg.number);
    return;
  }
  if (inst.space == Space::kParam && symbol->space == Space::kArgument)
    inst.space = Space::kLocal;
  else if (symbol->space != inst.space && inst.space != Space::kGeneric)
    fail("variable " + std::string(operand.name) + " is in another state space");
  uint64_t address = symbol->address;
  if (inst.space == Space::kGeneric && symbol->space == Space::kShared) address |= kSharedWindow;
  if (inst.space == Space::kGeneric && symbol->space == Space::kLocal) address |= kLocalWindow;
  inst.a = constant(address, 8);
}

void Decoder::apply(const Form& form, const Statement& statement, Inst& inst) {
  inst.run = form.run;
  inst.cls = form.cls;
  inst.kind = form.kind;
  inst.imm = form.imm;
  std::vector<uint32_t> more;
  uint32_t* const scalars[] = {&inst.a, &inst.b, &inst.c};
  size_t next = 0, scalar = 0;
  bool is_destination = form.operands.find('=') != std::string::npos;
  for (size_t i = 0; i < form.operands.size(); ++i) {
    const char type = form.operands[i];
    if (type == '=') {
      is_destination = false;
      continue;
    }
    if (type == 'C') {  // the condition code, which is not written down
      more.push_back(carry());
      if (form.imm & 1) read_carry();
      if (form.imm & 2) write_carry();
      continue;
    }
    if (next >= statement.operands.size()) fail("too few operands");
    const Operand& operand = statement.operands[next++];
    const auto place = [&](const Operand& one) { return is_destination ? destination(one, type) : source(one, type); };
    const char modifier = i + 1 < form.operands.size() ? form.operands[i + 1] : 0;
    if (modifier >= '1' && modifier <= '9') {
      ++i;
      const size_t count = size_t(modifier - '0');
      if (count == 1 && operand.kind == Operand::kSymbol) {
        more.push_back(place(operand));
        continue;
      }
      if (operand.kind != Operand::kVector || operand.elements.size() != count)
        fail("expected a vector of " + std::to_string(count) + " elements");
      for (const Operand& element : operand.elements) more.push_back(place(element));
    } else if (type == 'i') {
      if (operand.kind != Operand::kInteger) fail("an operand must be an immediate");
      inst.imm = operand.integer;
    } else if (type == 'm') {
      inst.target = source(operand, 'w');
    } else if (is_destination) {
      inst.d = destination(operand, type);
      if (modifier == '|') {
        ++i;
        more.push_back(operand.partner.empty() ? trash_predicate() : destination(operand.partner[0], 'p'));
      }
    } else if (scalar < 3) {
      *scalars[scalar++] = source(operand, type);
    } else {
      more.push_back(source(operand, type));
    }
  }
  if (next != statement.operands.size()) fail("too many operands");
  if (!more.empty()) inst.list = list(std::move(more));
}

// ---- as written ----

Operand Decoder::operand(size_t& at) {
  const std::vector<Token>& tokens = source_.tokens();
  Operand result;
  const auto number = [&](const Token& token, bool negative) {
    const std::string text(token.text);
    if (text.size() > 2 && text[0] == '0' && (text[1] == 'f' || text[1] == 'F')) {
      result.kind = Operand::kFloat;
      result.float_bytes = 4;
      result.number = bits_as<float>(uint32_t(std::strtoul(text.c_str() + 2, nullptr, 16)));
    } else if (text.size() > 2 && text[0] == '0' && (text[1] == 'd' || text[1] == 'D')) {
      result.kind = Operand::kFloat;
      result.float_bytes = 8;
      result.number = bits_as<double>(uint64_t(std::strtoull(text.c_str() + 2, nullptr, 16)));
    } else if (text.find('.') != std::string::npos && text[1] != 'x') {
      result.kind = Operand::kFloat;
      result.float_bytes = 8;
      result.number = std::strtod(text.c_str(), nullptr);
    } else {
      result.kind = Operand::kInteger;
      result.integer = parse_integer(token.text, token.line);
    }
    if (negative) {
      result.integer = -result.integer;
      result.number = -result.number;
    }
  };
  if (tokens[at].text == "!") {
    result.negated = true;
    ++at;
  }
  if (tokens[at].text == "{" || tokens[at].text == "(") {
    result.kind = Operand::kVector;
    for (++at; tokens[at].text != "}" && tokens[at].text != ")";) {
      if (tokens[at].text == ",")
        ++at;
      else
        result.elements.push_back(operand(at));
    }
    ++at;
  } else if (tokens[at].text == "[") {
    ++at;
    result.kind = Operand::kAddress;
    if (tokens[at].kind == Token::kWord) result.name = tokens[at++].text;
    for (bool negative = false; tokens[at].text != "]"; ++at) {
      if (tokens[at].text == "+") continue;
      if (tokens[at].text == "-") {
        negative = !negative;
        continue;
      }
      if (tokens[at].kind != Token::kNumber) fail("unexpected '" + std::string(tokens[at].text) + "' in an address");
      const int64_t value = parse_integer(tokens[at].text, tokens[at].line);
      result.integer += negative ? -value : value;
      negative = false;
    }
    ++at;
  } else if (tokens[at].text == "-") {
    ++at;
    number(tokens[at++], true);
  } else if (tokens[at].kind == Token::kNumber) {
    number(tokens[at++], false);
  } else if (tokens[at].text == "_") {
    ++at;
  } else if (tokens[at].kind == Token::kWord) {
    result.kind = Operand::kSymbol;
    result.name = tokens[at++].text;
    if (tokens[at].text == "+" && tokens[at + 1].kind == Token::kNumber) {
      result.integer = parse_integer(tokens[at + 1].text, tokens[at].line);
      at += 2;
    }
  } else {
    fail("unexpected '" + std::string(tokens[at].text) + "'");
  }
  if (tokens[at].text == "|") {
    ++at;
    result.partner.push_back(operand(at));
  }
  return result;
}

}  // namespace ptxvm
