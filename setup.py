"""Builds gptdist and its libraries: gptdist/_C.so where a C++ compiler is, gptdist/_C_cuda.so where nvcc is too.

    pip install --no-build-isolation -e .

A failed build never fails the install: its cause goes to stderr and to gptdist/_build_error.txt, one line for each
library, and the package runs on its PyTorch reference ops. Environment variables:

    GPTDIST_CUDA=0 | 1       skip the CUDA library; require it. Unset: build it if nvcc is there
    CUDA_HOME                the toolkit whose nvcc is used. Unset: the nvcc on PATH, or /usr/local/cuda
    GPTDIST_CUDA_ARCHS=80;90 the GPUs to make machine code for; `ptx`: none, drivers compile at the first launch.
                             Unset: DEFAULT_ARCHS. The PTX is always in the library
    GPTDIST_PTXVM=1          the test instruments: _ptxvm (runs PTX on the CPU), _vm (the CUDA ops on it)
    GPTDIST_REQUIRE_EXT=1    fail where a library that was to be built is not
    MAX_JOBS                 limits parallel compilation
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available

ROOT = Path(__file__).resolve().parent
os.chdir(ROOT)

REQUIRES = [
    "torch>=2.11",
    "numpy>=1.26",
    "tiktoken>=0.7",
    "tokenizers>=0.19",
    "safetensors>=0.4.3",
    "jsonargparse>=4.35",
    "pyyaml",
    "rich>=13",
    "tensorboard>=2.14",
    "matplotlib>=3.8",
    "ninja",
    "pybind11",
]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus_client>=0.20"]
DATA = ["pyarrow>=14", "py3langid>=0.3", "backports.zstd; python_version < '3.14'"]  # Parquet, languages, .zst
EXTRAS = {
    "deepspeed": ["deepspeed>=0.16"],
    "serve": SERVE,
    "data": DATA,
    "evaluate": ["lm_eval>=0.4.13"],
    "convert": ["gguf>=0.17"],
    "wandb": ["wandb>=0.17"],
    "test": [
        *SERVE,
        "httpx>=0.27",
        "openai>=1.40",
        "playwright>=1.40",
        "schemathesis>=4",
        "pytest",
        "pytest-xdist>=3.6",
        "hypothesis",
        "transformers>=4.45",
        "peft>=0.13",
        "gguf>=0.17",
        "sacrebleu",
        *DATA,
        "ruff",
        "nvidia-cuda-cuobjdump; sys_platform == 'linux'",
        "nvidia-cuda-nvdisasm; sys_platform == 'linux'",
    ],
}

TARGET_VERSION = "0x020b000000000000"  # torch 2.11: the oldest whose stable ABI the libraries may use
DEFAULT_ARCHS = ("80", "90", "100", "120")  # A100, H100, B200, RTX 50; those that nvcc knows
INSTRUMENTS = ("_ptxvm", "_vm")  # for tests
LIBRARIES = ("_C", "_C_cuda", *INSTRUMENTS)
TEST_DEVICE = ("csrc/ptxvm/fake_cudart.cpp", "csrc/ptxvm/test_device.cpp")  # the rest of ptxvm/ is the PTX machine

CXX_FLAGS = ["-O3", "-Wall", "-fvisibility=hidden"]
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-I", str(ROOT / "csrc")]


class BuildProblem(Exception):
    """Why a library is not built, in one line."""


def setting(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "")
    if value not in ("", *allowed):
        raise SystemExit(f"gptdist: {name}={value!r} is unknown: use {' or '.join(allowed)}, or unset it")
    return value


# the libraries


def torch_library(name: str, sources: list[str], **kwargs) -> CppExtension:
    """A plain shared object, free of Python, loaded by torch.ops.load_library; torch's stable ABI only."""
    return CppExtension(
        f"gptdist.{name}",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("TORCH_TARGET_VERSION", TARGET_VERSION)],
        py_limited_api=True,  # links no libtorch_python
        **kwargs,
    )


def c_library() -> CppExtension:
    # Without the two floating-point flags a compiler may not turn the kernels' selects into vector code.
    flags = [*CXX_FLAGS, "-fno-math-errno", "-fno-trapping-math"]
    sources = ["csrc/ops.cpp", *Path("csrc").glob("ops_cpu_*.cpp"), *Path("csrc/cpu").glob("*.cpp")]
    return torch_library("_C", sorted(map(str, sources)), extra_compile_args=flags)


def cuda_library() -> CppExtension:
    """The CUDA ops. Its CUDA runtime is static and hidden: it loads without a driver, and beside any other runtime."""
    return torch_library(
        "_C_cuda",
        ["csrc/ops_cuda.cpp"],
        extra_compile_args=CXX_FLAGS,
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,-z,defs"],
    )


def ptx_machine() -> Extension:
    import pybind11

    sources = sorted(str(path) for path in Path("csrc/ptxvm").glob("*.cpp") if str(path) not in TEST_DEVICE)
    includes = [pybind11.get_include(), str(ROOT / "csrc")]
    # Its fp32 arithmetic is PTX's, which rounds a product before it adds it; loops over 32 lanes become vector code.
    flags = ["-std=c++20", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-g0"]
    return Extension(
        "gptdist._ptxvm", sources, include_dirs=includes, extra_compile_args=[*CXX_FLAGS, *flags], language="c++"
    )


def test_device() -> CppExtension:
    """The CUDA library's own tensor code and kernel objects, on CPU tensors and a runtime that calls back."""
    return torch_library("_vm", [*TEST_DEVICE], extra_compile_args=CXX_FLAGS, extra_link_args=["-Wl,-z,defs"])


def libraries() -> list[Extension]:
    """What the environment asks for and this machine may be able to build."""
    wanted, nvcc = setting("GPTDIST_CUDA", ("0", "1")), nvcc_path().exists()
    cuda = wanted == "1" or (wanted != "0" and nvcc)
    found = [c_library()]
    if cuda:
        found.append(cuda_library())
    if setting("GPTDIST_PTXVM", ("0", "1")) == "1":
        found.append(ptx_machine())
        if cuda:
            found.append(test_device())
    return found


# nvcc


def nvcc_path() -> Path:
    """Where nvcc is, or would be. (torch's own search gives up where torch is built without CUDA.)"""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = None if home else shutil.which("nvcc")
    return Path(found) if found else Path(home or "/usr/local/cuda") / "bin" / "nvcc"


def nvcc_says(*arguments: str) -> str:
    try:
        result = subprocess.run([nvcc_path(), *arguments], capture_output=True, text=True, check=False, timeout=120)
    except OSError as error:
        raise BuildProblem(f"no nvcc: {nvcc_path()} does not run ({error.strerror})") from error
    if result.returncode != 0:
        lines = (result.stderr + result.stdout).strip().splitlines() or ["no output"]
        raise BuildProblem(f"'nvcc {shlex.join(arguments)}' exits with {result.returncode}: {lines[0]}")
    return result.stdout + result.stderr


def requested_archs() -> list[str] | None:
    """GPTDIST_CUDA_ARCHS as numbers; none for `ptx`; None where it is not set."""
    value = os.environ.get("GPTDIST_CUDA_ARCHS", "")
    if value in ("", "ptx"):
        return [] if value else None
    archs = [arch.strip() for arch in re.split("[;,]", value)]
    for arch in archs:
        if not re.fullmatch(r"[1-9]\d{1,2}", arch) or int(arch) < 80:
            raise SystemExit(
                f"gptdist: GPTDIST_CUDA_ARCHS={value!r}: {arch!r} is no architecture of 80 or newer; "
                "expected numbers as in '80;90', or 'ptx' alone"
            )
    return archs


def code_flags() -> list[str]:
    """One pass of the front end: the PTX of compute_80 goes into the library, and feeds the code of every target."""
    archs = requested_archs()
    known = [] if archs == [] else re.findall(r"sm_(\d+)", nvcc_says("--list-gpu-code"))
    if archs is None:
        archs = [arch for arch in DEFAULT_ARCHS if arch in known]
    for arch in archs:
        if arch not in known:
            raise BuildProblem(f"{nvcc_path()} makes no code for sm_{arch} (GPTDIST_CUDA_ARCHS)")
    codes = ["compute_80", *(f"sm_{arch}" for arch in archs)]
    return ["-gencode", f"arch=compute_80,code=[{','.join(codes)}]"]


def cuda_library_dirs() -> list[str]:
    """Where nvcc would look for the runtime: its own answer serves every layout of a toolkit."""
    line = re.search(r"^#\$ LIBRARIES=(.*)$", nvcc_says("--dryrun", "-x", "cu", "-E", os.devnull), re.MULTILINE)
    words = shlex.split(line.group(1)) if line else []
    return [word.removeprefix("-L") for word in words if word.startswith("-L") and not word.endswith("stubs")]


def cuda_include_dirs() -> list[str]:
    line = re.search(r"^#\$ INCLUDES=(.*)$", nvcc_says("--dryrun", "-x", "cu", "-E", os.devnull), re.MULTILINE)
    words = shlex.split(line.group(1)) if line else []
    return [word.removeprefix("-I") for word in words if word.startswith("-I")]


def compile_cuda(folder: Path) -> list[str]:
    """Compile csrc/cuda/*.cu into `folder`, what changed only (all of it where ninja is missing); the objects."""
    sources = sorted(Path("csrc/cuda").glob("*.cu"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    threads = ["--threads", str(jobs // len(sources))] if jobs >= 2 * len(sources) else []  # one for each target
    compiler = os.environ.get("CXX") or os.environ.get("CC")
    host = ["-ccbin", shlex.split(compiler)[-1]] if compiler else []
    command = [str(nvcc_path()), *CUDA_FLAGS, *code_flags(), *threads, *host]
    folder.mkdir(parents=True, exist_ok=True)
    if is_ninja_available():
        rule = shlex.join(command).replace("$", "$$")
        lines = [f"rule nvcc\n  command = {rule} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"]
        pairs = zip(objects, sources, strict=True)
        lines += [f"build {ninja_path(made)}: nvcc {ninja_path(ROOT / source)}" for made, source in pairs]
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        run_compiler(["ninja", "-C", str(folder), "-j", str(jobs)])
    else:
        commands = [[*command, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run_compiler, commands))
    return [str(path) for path in objects]


def ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def run_compiler(command: list[str]):
    sys.stdout.flush()
    result = subprocess.run(command, stderr=subprocess.STDOUT, check=False)
    if result.returncode != 0:
        raise BuildProblem(f"'{Path(command[0]).name}' exits with {result.returncode}")


# the build


@contextmanager
def captured_output(text: list[str]):
    """Collect what the compilers write to file descriptor 1 in `text`, and pass it on."""
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            output = file.read()
            os.write(1, output)
            text.append(output.decode(errors="replace"))


def compiler_problem() -> str:
    """Why the C++ compiler cannot be used, or the empty string."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        return f"no C++ compiler: {command[0]} is not found (install g++ or clang++, or set CXX)"
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        return f"no C++ compiler: '{shlex.join(command)} --version' exits with {result.returncode} (see CXX)"
    return ""


def cause(error: BaseException, output: str) -> str:
    """One line: the first compiler or linker error, else the exception."""
    pattern = r"^.*(?:\berror\b|\bfatal\b|undefined reference|cannot find).*$"
    first = re.search(pattern, output, re.MULTILINE | re.IGNORECASE)
    line = first.group(0) if first else (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the build failed: {line.strip()}"


class OptionalBuild(BuildExtension):
    """BuildExtension in which each library may fail by itself, and that keeps its objects between builds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, no_python_abi_suffix=True, **kwargs)
        self.problems: dict[str, str] = {}  # of a library
        self.cuda_objects: list[str] | BuildProblem | None = None

    def initialize_options(self):
        super().initialize_options()
        self.editable_mode = False

    def finalize_options(self):
        super().finalize_options()
        # An editable install hands over a new temporary directory each time; ninja needs the old objects.
        self.build_temp = str(ROOT / "build" / f"temp-{sys.implementation.cache_tag}")
        self.force = True  # always link: a library half written by a build that was killed looks up to date

    def run(self):
        requested_archs()  # a value that means nothing is the user's error, not a failed build
        in_place = self.inplace or self.editable_mode  # read now: a failing super().run() leaves inplace changed
        package = ROOT / "gptdist" if in_place else Path(self.build_lib) / "gptdist"
        problem = compiler_problem()
        if not problem:
            try:
                super().run()
            except (Exception, SystemExit) as error:  # before or after any library
                problem = cause(error, "")
        if problem:
            self.problems = {ext.name.removeprefix("gptdist."): problem for ext in self.extensions}
            self._forget_failures()
        self._report(package)

    def build_extensions(self):
        super().build_extensions()
        self._forget_failures()  # before anything copies them

    def build_extension(self, ext):
        name, output = ext.name.removeprefix("gptdist."), []
        try:
            with captured_output(output):
                if name in ("_C_cuda", "_vm"):
                    self._add_cuda(ext)
                super().build_extension(ext)
        except (Exception, SystemExit) as error:
            self.problems[name] = cause(error, "".join(output))

    def _add_cuda(self, ext):
        """The kernels' objects, compiled once for both libraries."""
        if self.cuda_objects is None:
            try:
                self.cuda_objects = compile_cuda(Path(self.build_temp) / "cuda")
            except BuildProblem as problem:
                self.cuda_objects = problem
                raise
        if isinstance(self.cuda_objects, BuildProblem):
            raise BuildProblem("its kernels are those of _C_cuda, which failed")
        ext.extra_objects = self.cuda_objects
        ext.library_dirs = [*ext.library_dirs, *cuda_library_dirs()]
        ext.include_dirs = [*ext.include_dirs, *cuda_include_dirs()]

    def copy_file(self, source, target, *args, **kwargs):
        """By one rename: whoever has the old library mapped keeps it, and no half of the new one is ever seen."""
        temporary = f"{target}.new"
        result = super().copy_file(source, temporary, *args, **kwargs)
        os.replace(temporary, target)
        return target, result[1]

    def _forget_failures(self):
        built = [ext for ext in self.extensions if ext.name.removeprefix("gptdist.") not in self.problems]
        self.extensions = self.distribution.ext_modules = built

    def _report(self, package: Path):
        """Write down the failures; remove libraries of earlier builds, which would not match these sources."""
        built = {ext.name for ext in self.extensions}
        for name in LIBRARIES:
            if f"gptdist.{name}" not in built:
                (package / f"{name}.so").unlink(missing_ok=True)
        note = package / "_build_error.txt"
        note.unlink(missing_ok=True)
        if not self.problems:
            return
        package.mkdir(parents=True, exist_ok=True)
        note.write_text("".join(f"{name}: {problem}\n" for name, problem in self.problems.items()))
        for name, problem in self.problems.items():
            instead = "" if name in INSTRUMENTS else "; its ops run on the PyTorch reference ops"
            print(f"gptdist: {name}: {problem}{instead}", file=sys.stderr)
        if os.environ.get("GPTDIST_REQUIRE_EXT") == "1":
            raise SystemExit(f"gptdist: {len(self.problems)} of its libraries failed (GPTDIST_REQUIRE_EXT=1)")
        if "_C_cuda" in self.problems and os.environ.get("GPTDIST_CUDA") == "1":
            raise SystemExit("gptdist: the CUDA library failed (GPTDIST_CUDA=1)")


def version() -> str:
    text = (ROOT / "gptdist" / "__init__.py").read_text()
    match = re.search(r'__version__ = "([^"]+)"', text)
    return match.group(1) if match else "0.0.0"


setup(
    name="gptdist",
    version=version(),
    description="Train, fine-tune and serve GPT models, from a laptop's CPU to a cluster",
    python_requires=">=3.11",
    packages=find_packages(include=["gptdist", "gptdist.*"]),
    package_data={"gptdist": ["_build_error.txt", "serve/page.html"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["gptdist = gptdist.cli:main"]},
    ext_modules=libraries(),
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
