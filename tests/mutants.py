"""Wrong versions of the CUDA kernels, and the checks that each of them is caught.

A source mutant changes one place of a kernel that matches a pattern: a tail guard, a mask, a stride, a scale. Many
mutants are compiled by one call of nvcc, each in a namespace of its own, to PTX; its kernels then get the
shipped kernels' names, so that the shipped launchers launch them. A PTX mutant lacks one barrier or one wait.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tests import cuda_vm

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
NVCC = ("nvcc", "-ptx", "-arch=compute_80", "-std=c++17", "-O3", "--diag-suppress=177")

_SIZE = r"(args\.rows|args\.width|args\.vocabulary|args\.channels|args\.positions|args\.count|split\.head" \
        r"|split\.vectors|width|warps|tile_columns)"
_STRIDE = r"(args\.width|args\.row_stride|args\.channels|args\.positions|args\.halves|width|step|stride|row_step" \
          r"|row_blocks|threads|tiles_across|tile_columns|kVector|kNormWarps|blockDim\.[xy])"
_SCALE = r"(kLog2e|kLinear|kTwoSqrt2OverPi|kCubic|mean|rstd|mean_g|mean_g_xhat|dloss|lse|log_sum|args\.scale" \
         r"|args\.eps)"

BATCH = 16  # mutants that one call of nvcc compiles

# kind -> (pattern, replacement). Every match in device code is one mutant.
RULES: dict[str, list[tuple[str, str]]] = {
    "guard": [(rf"< {_SIZE}\b(?![.\[(*])", r"<= \1"), (rf">= {_SIZE}\b(?![.\[(*])", r"> \1"),
              (r"< (vectors|elements|count|args\.chunks)\b", r"<= \1"), (r"- first < k", "- first > k"),
              (r"thread == 0", "thread <= 1"), (r"lane == 0", "lane <= 1"), (r"lane != 0", "lane > 1")],
    "mask": [(r">= args\.threshold", "< args.threshold"), (r"== args\.ignore_index", "!= args.ignore_index"),
             (r"== own_class", "!= own_class"), (r"== own\b", "!= own"), (r"target >= 0", "target >= 1"),
             (r"inside \?", "!inside ?"), (r"ignored \?", "!ignored ?"),
             (r"== Dtype::", "!= Dtype::"), (r"<= chunk\b", "< chunk"),
             (r"aligned_to\(\w+, (?:[^()]|\([^()]*\))*\)", "true")],
    "stride": [(rf"\* {_STRIDE}\b(?!\()", r"* (\1 + 1)"), (r"p \* stride", "p * (stride + 1)"),
               (r"\+= kFoldGroups", "+= kFoldGroups + 1"), (r"\+= row_step", "+= row_step + 1"),
               (r"\+= threads", "+= threads + 1"), (r"\+= blockDim\.x", "+= blockDim.x + 1"),
               (r"\+= kTileThreads", "+= kTileThreads + 1"), (r"\+= (k(?:AdamW|Norm)\w*Threads)\b", r"+= \1 + 1"),
               (r"\* (kNormThreads|k\w+Chunk)\b", r"* (\1 + 1)"), (r"begun - 1", "begun"),
               (r"kVector \+ threadIdx", "kVector + 1 + threadIdx"), (r"- args\.first_chunks\[i\]", "")],
    "scale": [(r"float\(width\)", "float(width + 1)"), (rf"(?<=[-*+(] ){_SCALE}\b(?! =)", r"(\1 * 1.01f)"),
              (r"\b1\.0f\b(?=[ )])", "1.02f"), (r"distance > 0", "distance > 1"), (r"0xD2511F53u", "0xD2511F55u"),
              (r"0xCD9E8D57u", "0xCD9E8D59u"), (r"0x9E3779B9u", "0x9E3779B7u"), (r"0xBB67AE85u", "0xBB67AE83u"),
              (r"\bs\.(decay|beta1_complement|beta2|beta2_complement|root_correction|eps|step_size)\b",
               r"(s.\1 * 1.01f)"), (r"\* (grad_scale|values\[j\])(?=[,;])", r"* (\1 * 1.01f)"),
              (r"double\(piece\)", "double(piece * 1.01f)"), (r"\bkPhiloxRounds;", "kPhiloxRounds - 1;"),
              (r"site\) << 16", "site) << 15")],
}

# Of decode_attention.cu.
_DECODE_SIZE = r"(capacity|all_rows|rows_left|end_tile|left|rows)"
_DECODE_STRIDE = r"(args\.(?:group|kv_heads|queries|table_pages|batch|q_strides\[\d\])|all_rows|rows|keys\.share" \
                 r"|kHeadDim|kRows|kStageBytes|kPartBytes|kDecodeKeys|kWarpKeys|Part::kRowsAtOnce|kRowsAtOnce)"
_DECODE_SCALE = r"(weight|factor|subtrahend|scale_log2|values\.[xyzw])"

DECODE_RULES = {
    "guard": [(rf"< {_DECODE_SIZE}\b(?![.\[(])", r"<= \1"), (rf">= {_DECODE_SIZE}\b(?![.\[(])", r"> \1"),
              *RULES["guard"]],
    "mask": [(r"% 2 > last", "% 2 >= last"), (r"maximum == -INFINITY", "maximum == INFINITY"),
             (r"> keys\.common", "> keys.common + 1"), (r"length < 0 \|\| ", ""), (r" \|\| length > capacity", ""),
             (r"max\(min\(pages\[i\], last_page\), 0\)", "max(pages[i], 0)"),
             (r"max\(min\(pages\[i\], last_page\), 0\)", "min(pages[i], last_page)"),
             (r"min\((\(position .*), last_entry\)", r"\1"), *RULES["mask"]],
    "stride": [(r"\+= kDecodeThreads", "+= kDecodeThreads + 1"),
               (rf"(?<=\* ){_DECODE_STRIDE}(?![\w(])", r"(\1 + 1)"), (r"(?<=/ )args\.group", "(args.group + 1)"),
               *RULES["stride"]],
    "scale": [(rf"(?<=[-*] ){_DECODE_SCALE}\b", r"(\1 * 1.01f)"), *RULES["scale"]],
}


@dataclass(frozen=True)
class Kernel:
    """An instantiation that mutants are made of, as C++ writes it: `layer_norm_forward_kernel<Bf16, float, ...>`."""

    instance: str

    @property
    def template(self) -> str:
        return self.instance.partition("<")[0]


@dataclass(frozen=True)
class Mutant:
    kind: str
    file: str  # where the changed text is from
    line: str  # the changed line
    source: str  # a whole translation unit's device code
    original: str  # the same, unchanged
    kernels: tuple[Kernel, ...]  # what may be affected


def device_source(path: Path, seen: set[Path] | None = None) -> list[tuple[str, str]]:
    """(file name, line) of a source with the project's headers put in, up to its launchers; other includes stay."""
    seen = set() if seen is None else seen
    lines: list[tuple[str, str]] = []
    for line in path.read_text().splitlines():
        if re.match(r"// Launchers?\.", line):
            lines.append((path.name, "}  // namespace gptdist::cuda"))
            break
        include = re.match(r'#include "(.+)"', line)
        if include:
            header = (path.parent / include[1]).resolve()
            if not header.exists():
                header = (CUDA / include[1]).resolve()
            if header not in seen:
                seen.add(header)
                lines += device_source(header, seen)
        elif line != "#pragma once":
            lines.append((path.name, line))
    return lines


def source_mutants(path: Path, files: tuple[str, ...], kernels: list[Kernel], rules_of_kinds: dict) -> list[Mutant]:
    """Every place that a rule matches, changed, in those of `path` and its headers that are named."""
    lines = device_source(path)
    original = "\n".join(line for _, line in lines)
    mutants = []
    for number, (file, line) in enumerate(lines):
        code = line.partition("//")[0]
        if file not in files or not _is_device_code(code):
            continue
        for kind, rules in rules_of_kinds.items():
            for pattern, replacement in rules:
                for match in re.finditer(pattern, code):
                    changed = code[:match.start()] + match.expand(replacement) + code[match.end():]
                    text = "\n".join(changed if i == number else other for i, (_, other) in enumerate(lines))
                    affected = _affected(lines, number, kernels)
                    mutants.append(Mutant(kind, file, changed.strip(), text, original, affected))
    return mutants


def _is_device_code(code: str) -> bool:
    """Not a constant of the host or of the compiler, a template parameter or a launcher."""
    other = r"#|template|static_assert|__global__|__shared__|inline|return launch|if constexpr.*\{\s*$"
    return not re.match(rf"\s*({other})", code)


def _affected(lines: list[tuple[str, str]], number: int, kernels: list[Kernel]) -> tuple[Kernel, ...]:
    """The kernel whose body holds the line, or all kernels of the file for a line of a helper."""
    for i in range(number, -1, -1):
        if lines[i][1].startswith("}") and i < number:
            break
        found = re.match(r"(?:__global__.* )?(\w+_kernel)\(", lines[i][1])
        if found:
            return tuple(k for k in kernels if k.template == found[1])
    return tuple(kernels)


def compile_mutants(mutants: list[Mutant], folder: Path) -> list[str]:
    """The PTX of each mutant, its kernels under the shipped names; BATCH of them in one call of nvcc.

    It is empty where the compiler makes of it what it makes of the unchanged source: no run could tell them apart.
    """
    kernels = tuple(dict.fromkeys(kernel for mutant in mutants for kernel in mutant.kernels))
    unchanged = replace(mutants[0], source=mutants[0].original, kernels=kernels)
    todo = [*mutants, unchanged]
    *texts, original = (text for i in range(0, len(todo), BATCH) for text in _compile(todo[i:i + BATCH], folder))
    known = {kernel: _instructions(body) for kernel, body in entries(original).items()}
    return [text if any(_instructions(body) != known[kernel] for kernel, body in entries(text).items()) else ""
            for text in texts]


def _compile(mutants: list[Mutant], folder: Path) -> list[str]:
    includes, bodies = [], []
    for i, mutant in enumerate(mutants):
        source = mutant.source.replace("namespace gptdist", f"namespace {_namespace(i)}")
        own = [line for line in source.splitlines() if line.startswith("#include")]
        includes += [line for line in own if line not in includes]
        body = "\n".join(line for line in source.splitlines() if not line.startswith("#include"))
        kept = ", ".join(f"(void*){kernel.instance}" for kernel in mutant.kernels)
        bodies.append(f"{body}\nnamespace {_namespace(i)}::cuda {{ void* const kept[] = {{{kept}}}; }}")
    path = folder / "mutants.cu"
    path.write_text("\n".join(includes + bodies))
    done = subprocess.run([*NVCC, "-o", path.with_suffix(".ptx"), path], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise AssertionError(f"the mutants do not compile:\n{done.stderr[:4000]}")
    return _split(path.with_suffix(".ptx").read_text(), len(mutants))


def _instructions(body: str) -> str:
    """A kernel without the numbers that the compiler gives to labels and to its inline assembly."""
    return re.sub(r"\$L__\w+|^\s*//.*$", "", body, flags=re.MULTILINE)


def _namespace(number: int) -> str:
    return f"m{number:06d}"  # as long as "gptdist", so that mangled names differ in nothing else


def _split(ptx: str, count: int) -> list[str]:
    """A module for each mutant: the header, and the entries and variables of its namespace, renamed."""
    parts = re.split(r"\n(?=\t?// \.globl|\.visible|\.entry|\.func|\.global|\.weak|\.extern|\.const|\.shared)", ptx)
    header = parts[0]
    texts = []
    for i in range(count):
        mine = [part for part in parts[1:] if _namespace(i) in part or not re.search(r"m\d{6}4cuda", part)]
        texts.append("\n".join([header, *mine]).replace(_namespace(i), "gptdist"))
    return texts


SYNCHRONISATION = re.compile(
    r"^\s*(?:bar\.sync|bar\.red|barrier\.(?:cta\.)?(?:sync|red)|bar\.warp\.sync|cp\.async\.(?:wait|commit)\w*)"
    r"[^;]*;", re.MULTILINE)
ENTRY = re.compile(  # to the brace before the next declaration: inline assembly may have braces of its own
    r"^(?:\.visible |\.weak )?\.entry (\w+)\(.*?^\}(?=\s*(?:\Z|// \.globl|\.[a-z]))", re.MULTILINE | re.DOTALL)


def entries(ptx: str) -> dict[str, str]:
    """Kernel name -> its text, of a PTX module."""
    return {match[1]: match[0] for match in ENTRY.finditer(ptx)}


def without_synchronisation(ptx: str, kernel: str) -> list[tuple[str, str]]:
    """(what was taken away, a module with the changed kernel alone) for every barrier and wait of a kernel."""
    alone = ENTRY.sub(lambda entry: entry[0] if entry[1] == kernel else "", ptx)
    start = ENTRY.search(alone).start()
    return [(match[0].strip(), alone[:match.start()] + "\n" + alone[match.end():])
            for match in SYNCHRONISATION.finditer(alone, start)]


@dataclass(frozen=True)
class Family:
    """Mutants of csrc/cuda/`source`.cu, and what must catch them.

    changed: the files whose lines are changed, of that one and its headers. kernels: the instantiations that mutants
    are made of. cases: a case runs the shipped ops in `run()` and compares; the quick ones first. rules: as RULES.
    """

    source: str
    changed: tuple[str, ...]
    kernels: tuple[str, ...]
    cases: tuple[Callable, ...]
    rules: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: RULES)

    def mutants(self) -> list[Mutant]:
        return source_mutants(CUDA / f"{self.source}.cu", self.changed, [Kernel(k) for k in self.kernels], self.rules)


def caught_by(device: cuda_vm.Device, ptx: str, cases: tuple[Callable, ...]) -> str:
    """The kind of the first failure, or the empty string."""
    from gptdist import _ptxvm

    module = _ptxvm.Module(ptx)
    for seed, case in enumerate(cases):
        try:
            with cuda_vm.poisoned_outputs():
                case(partial(device.run, module=module, seed=seed, global_races=True))
        except _ptxvm.Fault as fault:
            return fault.kind
        except AssertionError as error:
            return str(error)
    return ""


def check_unchanged(device: cuda_vm.Device, cases: tuple[Callable, ...]) -> None:
    """Without any change the cases pass."""
    with cuda_vm.poisoned_outputs():
        for case in cases:
            case(partial(device.run, global_races=True))


def check_source(device: cuda_vm.Device, family: Family, equivalent: dict[str, str], folder: Path) -> None:
    """Every source mutant is caught, but for changed lines in `equivalent`, which must not be.

    A line of `equivalent` computes the same; the value says why.
    """
    found, report, wrong = family.mutants(), Counter(), []
    for mutant, ptx in zip(found, compile_mutants(found, folder), strict=True):
        caught = caught_by(device, ptx, family.cases) if ptx else ""
        if ptx and bool(caught) == (mutant.line in equivalent):
            wrong.append(f"{mutant.kind} {'caught' if caught else 'survives'}: {mutant.file}: {mutant.line}")
        report[caught.split()[0] if caught else "equivalent"] += 1
    print(f"{family.source}: {len(found)} source mutants: {dict(report)}")
    assert not wrong, "\n".join(wrong)
    assert report["equivalent"] < 0.2 * len(found)


def check_exceptions(families: Iterable[Family], equivalent: dict[str, str]) -> None:
    """Every line of `equivalent` is one of a mutant."""
    assert equivalent.keys() <= {mutant.line for family in families for mutant in family.mutants()}


def cases_of_kernels(device: cuda_vm.Device, cases: tuple[Callable, ...]) -> dict[str, tuple[Callable, ...]]:
    """Names of the kernels that cases launch -> the cases that do."""
    found: dict[str, tuple[Callable, ...]] = {}
    for case in cases:
        for kernel in launched(device, case):
            found[kernel] = (*found.get(kernel, ()), case)
    return found


def launched(device: cuda_vm.Device, case: Callable) -> set[str]:
    names: set[str] = set()

    @contextmanager
    def recording(**options):
        with device.run(**options) as log:
            yield log
        names.update(launch.name for launch in log.launches)

    case(recording)
    return names


def template_of(kernel: str) -> str:
    """The template's name out of a mangled one: _ZN7gptdist4cuda14dropout_kernelI... -> dropout_kernel."""
    length = re.match(r"_ZN7gptdist4cuda(\d+)", kernel)
    return kernel[length.end():][:int(length[1])]


def synchronisations(device: cuda_vm.Device, sources: set[str]) -> dict[str, int]:
    """Kernel name -> barriers and waits in it, of all that these files ship."""
    templates = [re.search(r"(\w+_kernel)\(const", (CUDA / f"{source}.cu").read_text())[1] for source in sources]
    texts = [text for text in device.ptx if any(template in text for template in templates)]
    return {kernel: len(SYNCHRONISATION.findall(body)) for text in texts for kernel, body in entries(text).items()}


def check_synchronisation(device: cuda_vm.Device, families: Iterable[Family], unneeded: dict[tuple[str, str], str],
                          kernels: str = "") -> None:
    """Each kernel that the cases launch needs every barrier and wait; they are all that ship, but for element types.

    unneeded: (template, instruction) of which one in each kernel is not needed -> why. kernels: a regular expression
    of the mangled names of those to look at.
    """
    counts = synchronisations(device, {family.source for family in families})
    counts = {kernel: count for kernel, count in counts.items() if re.search(kernels, kernel)}
    report, wrong, mutated = Counter(), [], set()
    for all_cases in dict.fromkeys(family.cases for family in families):
        for kernel, cases in cases_of_kernels(device, all_cases).items():
            if kernel not in counts:
                continue
            mutated.add((template_of(kernel), counts[kernel]))
            expected = Counter(instruction for template, instruction in unneeded if template == template_of(kernel))
            for taken, ptx in without_synchronisation(device.ptx_of(kernel), kernel):
                caught = caught_by(device, ptx, cases)
                report[caught.split()[0] if caught else "unneeded"] += 1
                if not caught:
                    expected[taken.partition(" ")[0]] -= 1
            wrong += [f"{kernel}: {abs(count)} {instruction} {'caught after all' if count > 0 else 'not caught'}"
                      for instruction, count in expected.items() if count]
    print(f"without a barrier or wait: {dict(report)}")
    assert not wrong, "\n".join(wrong)
    left_out = {kernel for kernel, count in counts.items() if count and (template_of(kernel), count) not in mutated}
    assert not left_out, f"no case runs a kernel like these: {sorted(left_out)}"
