// gptdist._ptxvm: the machine from Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include "decode.h"
#include "half.h"
#include "machine.h"

namespace py = pybind11;

namespace ptxvm {

namespace {

// Variables of a module in host memory, as on a device: they keep their values from launch to launch.
class Storage {
 public:
  explicit Storage(const Source& source) {
    for (const Variable& variable : source.variables()) {
      if (variable.space == Space::kShared || variable.is_extern) continue;
      const size_t bytes = std::max<size_t>(variable.bytes, 1), align = std::max<size_t>(variable.align, 16);
      auto memory = std::make_unique<uint8_t[]>(bytes + align);
      const uint64_t at = (reinterpret_cast<uint64_t>(memory.get()) + align - 1) / align * align;
      addresses_[variable.name] = at;
      blocks_.push_back(std::move(memory));
    }
    for (const Variable& variable : source.variables()) {
      const auto place = addresses_.find(variable.name);
      if (place != addresses_.end()) fill(variable, place->second);
    }
  }

  const std::map<std::string, uint64_t>& addresses() const { return addresses_; }

 private:
  void fill(const Variable& variable, uint64_t at) const {
    for (size_t i = 0; i < variable.initial.size(); ++i) {
      const std::string& word = variable.initial[i];
      uint64_t bits = 0;
      if (word.rfind("0f", 0) == 0 || word.rfind("0F", 0) == 0)
        bits = std::strtoull(word.c_str() + 2, nullptr, 16);
      else if (word.rfind("0d", 0) == 0 || word.rfind("0D", 0) == 0)
        bits = std::strtoull(word.c_str() + 2, nullptr, 16);
      else if (word.find('.') != std::string::npos)
        bits = variable.element_bytes == 4 ? bits_as<uint32_t>(std::strtof(word.c_str(), nullptr))
                                           : bits_as<uint64_t>(std::strtod(word.c_str(), nullptr));
      else if (std::isdigit(uint8_t(word[0])) || word[0] == '-')
        bits = uint64_t(parse_integer(word, variable.line));
      else
        bits = symbol(word, variable.line);
      if ((i + 1) * variable.element_bytes > variable.bytes)
        throw ParseError("PTX line " + std::to_string(variable.line) + ": too many initial values for " +
                         variable.name);
      std::memcpy(reinterpret_cast<uint8_t*>(at) + i * variable.element_bytes, &bits,
                  std::min(variable.element_bytes, 8u));
    }
  }

  uint64_t symbol(std::string word, int line) const {  // name, generic(name), name+offset
    if (word.rfind("generic(", 0) == 0) {
      const size_t close = word.find(')');
      word = word.substr(8, close - 8) + word.substr(close + 1);
    }
    const size_t plus = word.find('+');
    const auto place = addresses_.find(word.substr(0, plus));
    if (place == addresses_.end())
      throw ParseError("PTX line " + std::to_string(line) + ": initial value '" + word + "' is unsupported");
    return place->second + uint64_t(plus == std::string::npos ? 0 : parse_integer(word.substr(plus + 1), line));
  }

  std::map<std::string, uint64_t> addresses_;
  std::vector<std::unique_ptr<uint8_t[]>> blocks_;
};

class Module {
 public:
  explicit Module(std::string text) : source_(std::move(text)), storage_(source_) {}

  std::vector<std::string> kernels() const {
    std::vector<std::string> names;
    for (const Function& function : source_.functions())
      if (function.is_entry && function.has_body) names.push_back(function.name);
    return names;
  }

  const Program& kernel(const std::string& name) {
    std::unique_ptr<Program>& program = programs_[name];
    if (!program) {
      try {
        program = decode(source_, name, storage_.addresses());
      } catch (...) {
        programs_.erase(name);
        throw;
      }
    }
    return *program;
  }

  // The module's own variables, as buffers.
  void add_buffers(std::vector<Buffer>& buffers) const {
    for (const Variable& variable : source_.variables()) {
      const auto place = storage_.addresses().find(variable.name);
      if (place != storage_.addresses().end() && variable.bytes)
        buffers.push_back({place->second, variable.bytes, variable.space != Space::kConst, variable.name, nullptr});
    }
  }

 private:
  Source source_;
  Storage storage_;
  std::map<std::string, std::unique_ptr<Program>> programs_;
};

using Triple = std::array<uint32_t, 3>;

py::dict results(const Machine& machine) {
  const Counters& c = machine.counters;
  std::map<std::string, uint64_t> by_class, by_opcode;
  uint64_t lanes = 0;
  for (size_t i = 0; i < machine.executed.size(); ++i) {
    if (!machine.executed[i]) continue;
    const Inst& inst = machine.program.code[i];
    by_class[class_name(inst.cls)] += machine.executed[i];
    by_opcode[machine.program.opcodes[inst.opcode]] += machine.executed[i];
    lanes += machine.executed_lanes[i];
  }
  py::dict d;
  d["instructions"] = c.instructions;
  d["lane_instructions"] = lanes;
  d["by_class"] = by_class;
  d["by_opcode"] = by_opcode;
  d["blocks"] = c.blocks;
  d["mma"] = c.mma;
  d["load_sectors"] = c.load_sectors;
  d["load_sectors_ideal"] = c.load_ideal;
  d["load_bytes"] = c.load_bytes;
  d["store_sectors"] = c.store_sectors;
  d["store_sectors_ideal"] = c.store_ideal;
  d["store_bytes"] = c.store_bytes;
  d["async_sectors"] = c.async_sectors;
  d["async_sectors_ideal"] = c.async_ideal;
  d["async_bytes"] = c.async_bytes;
  d["atomic_sectors"] = c.atomic_sectors;
  d["atomic_sectors_ideal"] = c.atomic_ideal;
  d["atomic_bytes"] = c.atomic_bytes;
  d["shared_wavefronts"] = c.shared_wavefronts;
  d["shared_wavefronts_ideal"] = c.shared_ideal;
  d["shared_accesses"] = c.shared_accesses;
  return d;
}

py::dict launch(Module& module, const std::string& name, Triple grid, Triple block, const py::bytes& params,
                uint32_t shared_bytes, const std::vector<std::tuple<uint64_t, uint64_t, bool, std::string>>& buffers,
                uint64_t seed, std::optional<std::pair<uint64_t, uint64_t>> blocks, bool races, bool global_races,
                const std::string& poison, uint64_t max_instructions, bool shuffle_blocks) {
  const Program& program = module.kernel(name);
  const std::string bytes = params;
  const uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
  if (bytes.size() != program.parameter_bytes)
    throw py::value_error(name + ": params has " + std::to_string(bytes.size()) + " bytes, expected " +
                          std::to_string(program.parameter_bytes));
  if (threads == 0 || threads > 1024)
    throw py::value_error(name + ": a block of " + std::to_string(threads) + " threads, expected 1 to 1024");
  if (program.max_threads && threads > program.max_threads)
    throw py::value_error(name + ": a block of " + std::to_string(threads) + " threads, the kernel allows " +
                          std::to_string(program.max_threads));
  if (poison != "error" && poison != "value")
    throw py::value_error("poison is '" + poison + "', expected 'error' or 'value'");
  constexpr uint64_t kMostShared = 227 * 1024;  // of any architecture so far
  if (uint64_t(program.dynamic_offset) + shared_bytes > kMostShared)
    throw py::value_error(name + ": " + std::to_string(program.dynamic_offset + uint64_t(shared_bytes)) +
                          " bytes of shared memory, no device has more than " + std::to_string(kMostShared));
  Launch setup;
  setup.grid = grid;
  setup.block = block;
  setup.parameters.assign(bytes.begin(), bytes.end());
  setup.shared_bytes = shared_bytes;
  for (const auto& [address, size, writable, label] : buffers)
    if (size) setup.buffers.push_back({address, size, writable, label, nullptr});
  module.add_buffers(setup.buffers);
  setup.seed = seed;
  if (blocks) std::tie(setup.first_block, setup.last_block) = *blocks;
  setup.races = races;
  setup.global_races = global_races;
  setup.poison_error = poison == "error";
  setup.max_instructions = max_instructions;
  setup.shuffle_blocks = shuffle_blocks;
  Machine machine(program, std::move(setup));
  {
    py::gil_scoped_release release;
    machine.run();
  }
  return results(machine);
}

}  // namespace

}  // namespace ptxvm

PYBIND11_MODULE(_ptxvm, m) {
  using namespace ptxvm;
  m.doc() = "Runs nvcc's PTX on the CPU, instruction by instruction (csrc/ptxvm/README.md).";
  static py::object fault_type = py::exception<Fault>(m, "Fault", PyExc_RuntimeError);
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const Fault& fault) {
      py::object instance = fault_type(fault.message);
      instance.attr("kind") = fault.kind;
      instance.attr("kernel") = fault.kernel;
      instance.attr("line") = fault.line;
      instance.attr("instruction") = fault.instruction;
      instance.attr("block") = py::make_tuple(fault.block[0], fault.block[1], fault.block[2]);
      instance.attr("thread") = py::make_tuple(fault.thread[0], fault.thread[1], fault.thread[2]);
      PyErr_SetObject(fault_type.ptr(), instance.ptr());
    } catch (const ParseError& parse_error) {
      PyErr_SetString(PyExc_ValueError, parse_error.what());
    }
  });

  py::class_<Program>(m, "Kernel", "A decoded kernel: its launch needs and its instructions.")
      .def_readonly("name", &Program::name)
      .def_property_readonly("params",
                             [](const Program& p) {
                               py::list list;
                               for (size_t i = 0; i < p.parameters.size(); ++i)
                                 list.append(py::make_tuple(p.parameters[i].name, p.parameter_offsets[i],
                                                            p.parameters[i].bytes, p.parameters[i].align));
                               return list;
                             })
      .def_readonly("param_bytes", &Program::parameter_bytes)
      .def_readonly("shared_bytes", &Program::shared_bytes)
      .def_readonly("local_bytes", &Program::local_bytes)
      .def_readonly("max_threads", &Program::max_threads)
      .def_property_readonly("opcodes",
                             [](const Program& p) {
                               std::map<std::string, uint64_t> counts;
                               for (size_t i = 0; i + 1 < p.code.size(); ++i) ++counts[p.opcodes[p.code[i].opcode]];
                               return counts;
                             })
      .def_property_readonly("n_instructions", [](const Program& p) { return p.code.size() - 1; });

  py::class_<Module>(m, "Module", "A PTX module; ValueError for text that is not PTX.")
      .def(py::init<std::string>(), py::arg("ptx_text"))
      .def_property_readonly("kernels", &Module::kernels)
      .def("kernel", &Module::kernel, py::arg("name"), py::return_value_policy::reference_internal,
           "The decoded kernel; ValueError names an instruction that is unsupported.")
      .def("launch", &launch, py::arg("name"), py::arg("grid"), py::arg("block"), py::arg("params"),
           py::arg("shared_bytes") = 0,
           py::arg("buffers") = std::vector<std::tuple<uint64_t, uint64_t, bool, std::string>>{}, py::arg("seed") = 0,
           py::arg("blocks") = py::none(), py::arg("races") = true, py::arg("global_races") = false,
           py::arg("poison") = "error", py::arg("max_instructions") = uint64_t(2'000'000'000),
           py::arg("shuffle_blocks") = false, "Runs the kernel and returns counters; Fault says what it did wrong.");
  m.def("supported", &supported_forms, "The instruction forms that the machine knows, sorted.");
}
