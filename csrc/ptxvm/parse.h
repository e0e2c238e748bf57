// PTX text to declarations: module variables, and functions whose bodies stay token ranges until they are decoded.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptxvm {

// Text that is not PTX, or an instruction outside what the machine knows. Becomes Python's ValueError.
struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Token {
  enum Kind : uint8_t { kWord, kNumber, kString, kPunctuation, kEnd } kind;
  std::string_view text;
  int line;
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam, kConst, kArgument /* of an inlined call */ };

struct Variable {
  std::string name;
  Space space = Space::kGlobal;
  bool is_extern = false;
  bool is_register = false;  // a `.reg` parameter of a function
  uint32_t align = 1;
  uint32_t element_bytes = 1;
  uint64_t bytes = 0;                // 0: an array without a size (.extern .shared name[])
  std::vector<std::string> initial;  // one word per element; the rest is zero
  int line = 0;
};

struct Function {
  std::string name;
  bool is_entry = false;
  bool has_body = false;
  std::vector<Variable> parameters, results;
  size_t begin = 0, end = 0;  // tokens inside the braces
  uint32_t max_threads = 0;   // .maxntid / .reqntid; 0: not stated
};

uint32_t type_bytes(std::string_view type, int line);  // ".f32" or "f32" -> 4
bool is_type(std::string_view word);                   // ".f32", ".pred"
int64_t parse_integer(std::string_view text, int line);

class Source {
 public:
  explicit Source(std::string text);
  const std::string& text() const { return text_; }
  const std::vector<Token>& tokens() const { return tokens_; }
  const Function* function(const std::string& name) const;
  const std::vector<Function>& functions() const { return functions_; }
  const std::vector<Variable>& variables() const { return variables_; }
  // The variable that a declaration starting at token `at` (".global", ".shared", ".param", ...) makes; moves `at`
  // behind it, and behind its ';' if there is one.
  Variable declaration(size_t& at) const;
  std::string statement(size_t first, size_t last) const;  // tokens [first, last) as written, on one line

 private:
  void tokenize();
  void parse();
  Function parse_function(size_t& at);
  std::vector<Variable> parameter_list(size_t& at) const;
  void skip_braces(size_t& at) const;

  std::string text_;
  std::vector<Token> tokens_;
  std::vector<Function> functions_;
  std::map<std::string, size_t> function_index_;
  std::vector<Variable> variables_;
};

}  // namespace ptxvm
