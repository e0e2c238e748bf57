#include "parse.h"

#include <cctype>
#include <cstdlib>

namespace ptxvm {

namespace {

[[noreturn]] void fail(int line, const std::string& what) {
  throw ParseError("PTX line " + std::to_string(line) + ": " + what);
}

bool word_start(char c) { return std::isalpha(uint8_t(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }
bool word_part(char c) { return std::isalnum(uint8_t(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }

Space space_of(std::string_view word) {
  if (word == ".global") return Space::kGlobal;
  if (word == ".shared") return Space::kShared;
  if (word == ".local") return Space::kLocal;
  if (word == ".const") return Space::kConst;
  return Space::kParam;
}

bool is_space(std::string_view word) {
  return word == ".global" || word == ".shared" || word == ".local" || word == ".const" || word == ".param";
}

}  // namespace

bool is_type(std::string_view word) {
  static const char* const kTypes[] = {".b8",  ".b16", ".b32",   ".b64",  ".b128",   ".u8",  ".u16",
                                       ".u32", ".u64", ".s8",    ".s16",  ".s32",    ".s64", ".f16",
                                       ".f32", ".f64", ".f16x2", ".bf16", ".bf16x2", ".pred"};
  for (const char* type : kTypes)
    if (word == type) return true;
  return false;
}

uint32_t type_bytes(std::string_view type, int line) {
  if (!type.empty() && type[0] == '.') type.remove_prefix(1);
  if (type == "f16x2" || type == "bf16x2") return 4;
  if (type == "pred") return 1;
  size_t digits = type.find_first_of("0123456789");
  if (digits == std::string_view::npos) fail(line, "unknown type '" + std::string(type) + "'");
  return uint32_t(std::atoi(std::string(type.substr(digits)).c_str())) / 8;
}

int64_t parse_integer(std::string_view text, int line) {
  std::string digits(text);
  bool negative = false;
  if (!digits.empty() && (digits[0] == '-' || digits[0] == '+')) {
    negative = digits[0] == '-';
    digits.erase(0, 1);
  }
  if (!digits.empty() && (digits.back() == 'U' || digits.back() == 'u')) digits.pop_back();
  int base = 10;
  size_t skip = 0;
  if (digits.size() > 1 && digits[0] == '0') {
    const char mark = char(std::tolower(digits[1]));
    base = mark == 'x' ? 16 : mark == 'b' ? 2 : 8;
    skip = base == 8 ? 1 : 2;
  }
  char* end = nullptr;
  const uint64_t value = std::strtoull(digits.c_str() + skip, &end, base);
  if (*end || digits.empty()) fail(line, "'" + std::string(text) + "' is not an integer");
  return negative ? -int64_t(value) : int64_t(value);
}

Source::Source(std::string text) : text_(std::move(text)) {
  tokenize();
  parse();
}

void Source::tokenize() {
  const char* p = text_.data();
  const char* end = p + text_.size();
  int line = 1;
  const auto push = [&](Token::Kind kind, const char* from, const char* to) {
    tokens_.push_back({kind, std::string_view(from, size_t(to - from)), line});
  };
  while (p < end) {
    const char c = *p;
    if (c == '\n') {
      ++line, ++p;
    } else if (std::isspace(uint8_t(c)) || c == '\0') {
      ++p;
    } else if (c == '/' && p + 1 < end && p[1] == '/') {
      while (p < end && *p != '\n') ++p;
    } else if (c == '/' && p + 1 < end && p[1] == '*') {
      for (p += 2; p + 1 < end && !(p[0] == '*' && p[1] == '/'); ++p) line += *p == '\n';
      p += 2;
    } else if (c == '"') {
      const char* from = p++;
      while (p < end && *p != '"' && *p != '\n') p += *p == '\\' ? 2 : 1;
      push(Token::kString, from, ++p < end ? p : end);
    } else if (word_start(c)) {
      const char* from = p++;  // a directive ends at the next dot (".reg.b16"), an instruction does not
      while (p < end && !(*p == '.' && *from == '.') &&
             (word_part(*p) || (*p == ':' && p + 1 < end && p[1] == ':') || (*p == ':' && p[-1] == ':')))
        ++p;
      push(Token::kWord, from, p);
    } else if (std::isdigit(uint8_t(c))) {
      const char* from = p;
      while (p < end && (std::isalnum(uint8_t(*p)) || *p == '.')) ++p;
      push(Token::kNumber, from, p);
    } else {
      push(Token::kPunctuation, p, p + 1);
      ++p;
    }
  }
  tokens_.push_back({Token::kEnd, "", line});
}

void Source::skip_braces(size_t& at) const {
  int depth = 0;
  const int line = tokens_[at].line;
  do {
    if (tokens_[at].kind == Token::kEnd) fail(line, "'{' is never closed");
    depth += tokens_[at].text == "{";
    depth -= tokens_[at].text == "}";
    ++at;
  } while (depth > 0);
}

Variable Source::declaration(size_t& at) const {
  Variable variable;
  variable.line = tokens_[at].line;
  variable.space = space_of(tokens_[at].text);
  variable.is_register = tokens_[at].text == ".reg";
  ++at;
  uint32_t align = 0, vector = 1;
  for (; tokens_[at].kind == Token::kWord && tokens_[at].text[0] == '.'; ++at) {
    const std::string_view word = tokens_[at].text;
    if (word == ".align") {
      align = uint32_t(parse_integer(tokens_[++at].text, variable.line));
    } else if (word == ".v2" || word == ".v4") {
      vector = word == ".v2" ? 2 : 4;
    } else if (is_type(word)) {
      variable.element_bytes = type_bytes(word, variable.line);
    } else if (word != ".ptr" && !is_space(word)) {  // ".ptr .global .align 16": what a parameter points to
      fail(variable.line, "unknown word '" + std::string(word) + "' in a declaration");
    }
    if (word == ".ptr") {  // its alignment is the pointee's
      for (++at; tokens_[at].text[0] == '.'; ++at)
        if (tokens_[at].text == ".align") ++at;
      break;
    }
  }
  if (tokens_[at].kind != Token::kWord) fail(variable.line, "a declaration without a name");
  variable.name = tokens_[at++].text;
  uint64_t count = vector;
  while (tokens_[at].text == "[") {
    ++at;
    uint64_t size = 0;
    if (tokens_[at].text != "]") size = uint64_t(parse_integer(tokens_[at++].text, variable.line));
    if (tokens_[at++].text != "]") fail(variable.line, "expected ']' behind the size of " + variable.name);
    count *= size;
  }
  variable.bytes = count * variable.element_bytes;
  variable.align = align ? align : variable.element_bytes * vector;
  if (tokens_[at].text == "=") {
    for (++at; tokens_[at].text != ";"; ++at) {
      const Token& token = tokens_[at];
      if (token.kind == Token::kEnd) fail(variable.line, "the initial value of " + variable.name + " has no ';'");
      if (token.text == "{" || token.text == "}" || token.text == ",") continue;
      std::string word(token.text);
      while (tokens_[at + 1].text != "," && tokens_[at + 1].text != "}" && tokens_[at + 1].text != ";" &&
             tokens_[at + 1].kind != Token::kEnd)
        word += tokens_[++at].text;
      variable.initial.push_back(word);
    }
    if (variable.bytes == 0) variable.bytes = variable.initial.size() * variable.element_bytes;
  }
  if (tokens_[at].text == ";") ++at;
  return variable;
}

std::vector<Variable> Source::parameter_list(size_t& at) const {
  std::vector<Variable> list;
  if (tokens_[at].text != "(") return list;
  for (++at; tokens_[at].text != ")";) {
    if (tokens_[at].kind == Token::kEnd) fail(tokens_[at].line, "a parameter list is never closed");
    if (tokens_[at].text == ",") {
      ++at;
    } else {
      list.push_back(declaration(at));
    }
  }
  ++at;
  return list;
}

Function Source::parse_function(size_t& at) {
  Function function;
  function.is_entry = tokens_[at].text == ".entry";
  ++at;
  function.results = parameter_list(at);  // empty where the name comes first
  if (tokens_[at].kind != Token::kWord) fail(tokens_[at].line, "a function without a name");
  function.name = tokens_[at++].text;
  function.parameters = parameter_list(at);
  for (; tokens_[at].text != "{" && tokens_[at].text != ";"; ++at) {
    if (tokens_[at].kind == Token::kEnd) fail(tokens_[at].line, "function " + function.name + " has no body");
    if (tokens_[at].text == ".maxntid" || tokens_[at].text == ".reqntid") {
      function.max_threads = 1;
      do {
        ++at;
        function.max_threads *= uint32_t(parse_integer(tokens_[at].text, tokens_[at].line));
      } while (tokens_[at + 1].text == "," && ++at);
    }
  }
  if (tokens_[at].text == ";") {
    ++at;
    return function;
  }
  function.has_body = true;
  function.begin = at + 1;
  skip_braces(at);
  function.end = at - 1;
  return function;
}

void Source::parse() {
  if (tokens_[0].text != ".version")
    throw ParseError("not PTX: the text starts with '" + std::string(tokens_[0].text.substr(0, 40)) +
                     "', expected '.version'");
  bool is_extern = false;
  for (size_t at = 0; tokens_[at].kind != Token::kEnd;) {
    const std::string_view word = tokens_[at].text;
    const int line = tokens_[at].line;
    if (word == ".version" || word == ".address_size") {
      at += 2;
    } else if (word == ".target") {
      for (at += 2; tokens_[at].text == ","; at += 2) {
      }
    } else if (word == ".file" || word == ".pragma" || word == ".alias") {  // to the end of the line
      while (tokens_[at].line == line && tokens_[at].kind != Token::kEnd) ++at;
    } else if (word == ".section") {
      while (tokens_[at].text != "{") {
        if (tokens_[at].kind == Token::kEnd) fail(line, ".section without '{'");
        ++at;
      }
      skip_braces(at);
    } else if (word == ".extern" || word == ".visible" || word == ".weak" || word == ".common") {
      is_extern = word == ".extern";
      ++at;
      continue;
    } else if (word == ".entry" || word == ".func") {
      Function function = parse_function(at);
      const auto known = function_index_.find(function.name);
      if (known == function_index_.end()) {
        function_index_[function.name] = functions_.size();
        functions_.push_back(std::move(function));
      } else if (function.has_body) {
        functions_[known->second] = std::move(function);
      }
    } else if (is_space(word)) {
      Variable variable = declaration(at);
      variable.is_extern = is_extern;
      variables_.push_back(std::move(variable));
    } else {
      fail(line, "not PTX: unexpected '" + std::string(word.substr(0, 40)) + "' outside a function");
    }
    is_extern = false;
  }
}

const Function* Source::function(const std::string& name) const {
  const auto found = function_index_.find(name);
  return found == function_index_.end() ? nullptr : &functions_[found->second];
}

std::string Source::statement(size_t first, size_t last) const {
  if (last <= first) return "";
  const char* from = tokens_[first].text.data();
  const char* to = tokens_[last - 1].text.data() + tokens_[last - 1].text.size();
  std::string result;
  for (; from < to; ++from) {
    if (!std::isspace(uint8_t(*from)))
      result += *from;
    else if (!result.empty() && result.back() != ' ')
      result += ' ';
  }
  return result;
}

}  // namespace ptxvm
