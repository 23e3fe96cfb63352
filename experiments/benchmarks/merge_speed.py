"""This file measures what merging costs: `mergekit-lit merge`, other tools, and the floor.

    python experiments/benchmarks/merge_speed.py --folder FOLDER --peers PYTHON
    python experiments/benchmarks/merge_speed.py --folder FOLDER --model resnet50 --experts 8

The floor is to read all inputs from a warm page cache and to write the output. Experts are timm's
ViT-B/32 (or another model) in float32 with small made-up deltas; FOLDER needs 3.2 GB for 8 of them,
7.4 GB for 20. PYTHON is an interpreter with mergekit or fusion-bench installed. Every run is a
process of its own; runs of all tools take turns.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

METHODS = ("average", "task_arithmetic", "ties", "dare", "magmax", "tsv_m", "iso_c", "wudi")
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "task_arithmetic": {"scale": 0.3},
    "ties": {"density": 0.2, "scale": 1.0},
    "dare": {"drop": 0.5, "scale": 0.3},
}
# The same method and parameters under mergekit's names.
MERGEKIT: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "average": ("linear", {"weight": 1.0}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3, "normalize": False}),
    "ties": ("ties", {"weight": 1.0, "density": 0.2}),
    "dare": ("dare_linear", {"weight": 0.3, "density": 0.5, "normalize": False}),
}
FUSION_BENCH = ("average", "task_arithmetic", "ties", "dare", "tsv_m", "iso_c")
SVD = ("tsv_m", "iso_c")


def main() -> None:
    """Build the experts, run everything in turns, print the table, remove the experts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", default="vit_base_patch32_224")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=[], help="pythons that have other tools")
    parser.add_argument("--skip", nargs="*", default=[], help="tools that are not run")
    parser.add_argument("--svd", action="store_true", help="compare with torch.linalg.svd")
    parser.add_argument("--memory", type=float, default=12.0, help="GB that other tools may take")
    parser.add_argument("--keep", action="store_true", help="leave the experts in the folder")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.run:
        run_here(json.loads(chosen.run))
        return
    files = build(chosen.folder, chosen.model, chosen.experts)
    try:
        results = measure(jobs_of(chosen, files), chosen.repeats, chosen.memory)
    finally:
        for file in [] if chosen.keep else chosen.folder.glob("*.safetensors"):
            file.unlink()
    print(table(results))
    (chosen.folder / "merge_speed.json").write_text(json.dumps(results, indent=1))


def build(folder: Path, model: str, count: int) -> list[str]:
    """Write base and experts, those that are not there yet; return their files, the base first."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{model}-{name}.safetensors" for name in ("base", *range(count))]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = timm.create_model(model, num_classes=0).state_dict()
    for seed, file in enumerate(files):
        if not file.is_file():
            draw = torch.Generator().manual_seed(seed)
            save_file({n: moved(t, seed, draw) for n, t in base.items()}, file)
    return [str(file) for file in files]


def moved(tensor: Any, seed: int, draw: Any) -> Any:
    """Return a tensor with a delta of a falling spectrum, as fine-tuning leaves it; or the base."""
    import torch

    if seed == 0 or not tensor.is_floating_point():
        return tensor.clone()
    noise = torch.randn(tensor.shape, generator=draw)
    if tensor.ndim > 1:
        rows, columns = tensor.flatten(1).shape
        rank = min(rows, columns, 64)
        strength = torch.arange(1, rank + 1) ** -0.5
        left = torch.randn(rows, rank, generator=draw) * strength
        noise = noise + 0.5 * (left @ torch.randn(rank, columns, generator=draw)).reshape(
            tensor.shape
        )
    return (tensor + 3e-4 * noise).abs() if tensor.ndim == 1 else tensor + 3e-4 * noise


def jobs_of(chosen: argparse.Namespace, files: list[str]) -> list[dict[str, Any]]:
    """Return what to run: tool, interpreter, method, and files."""
    own, svd = [("mergekit-lit", METHODS)], [("svd float32", SVD), ("svd float64", SVD)]
    known = [(sys.executable, own + (svd if chosen.svd else []))]
    for python in chosen.peers:
        others = [("mergekit", tuple(MERGEKIT)), ("fusion_bench", FUSION_BENCH)]
        known.append((python, [other for other in others if installed(python, other[0])]))
    same = {"files": files, "out": str(chosen.folder / "merged.safetensors"), "model": chosen.model}
    return [{"tool": "floor", "python": sys.executable, "method": "", **same}] + [
        {"tool": tool, "python": python, "method": method, **same}
        for method in chosen.methods
        for python, tools in known
        for tool, methods in tools
        if method in methods and tool not in chosen.skip
    ]


def installed(python: str, package: str) -> bool:
    """Return whether an interpreter finds a package."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def measure(jobs: list[dict[str, Any]], repeats: int, memory: float) -> list[dict[str, Any]]:
    """Run every job `repeats` times in turns; a job that fails is not run again."""
    for job in jobs:
        job |= {"runs": [], "failed": ""}
    for _ in range(repeats):
        for job in jobs:
            if not job["failed"]:
                told = run_apart({**job, "runs": [], "memory": memory})
                if "failed" in told:
                    job["failed"] = told["failed"]
                else:
                    job["runs"].append(told)
                print(job["tool"], job["method"], told, file=sys.stderr, flush=True)
    return jobs


def run_apart(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a process of its own and watch its memory; return its figures, or why not."""
    command = [job["python"], __file__, "--folder", ".", "--run", json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = Peak(process)
    if process.stdout is None:
        raise RuntimeError("The process must have a pipe as its output.")
    for line in process.stdout:
        if line.startswith("started"):
            peak.start()
        elif line.startswith("ended"):
            peak.stop()
            figures: dict[str, Any] = json.loads(line.removeprefix("ended"))
            process.communicate()
            return figures | {"anonymous_mb": peak.above}
    peak.stop()
    _, errors = process.communicate()
    last = (errors.strip().split("\n") or [""])[-1]
    return {"failed": "memory" if "alloc" in last.lower() or "Memory" in last else last[:200]}


class Peak(threading.Thread):
    """Samples the anonymous memory of a process from outside, where its work cannot delay it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{process.pid}/status")
        self._going = True
        self._first = self._now()
        self._most = self._first

    @property
    def above(self) -> float:
        """MB above what the process had after its imports."""
        return round(self._most - self._first, 1)

    def start(self) -> None:
        """Take the process as it is now for the zero."""
        self._first = self._most = self._now()
        super().start()

    def run(self) -> None:
        """Sample every 5 ms."""
        while self._going:
            self._most = max(self._most, self._now())
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop."""
        self._going = False

    def _now(self) -> float:
        try:
            lines = self._status.read_text().splitlines()
        except OSError:
            return 0.0
        found = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
        return found[0] / 1024 if found else 0.0


def run_here(job: Mapping[str, Any]) -> None:
    """Prepare a job (imports), do it, and print its processor and wall seconds."""
    if job["tool"] in ("mergekit", "fusion_bench"):
        limit = int(job["memory"] * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    begun = seconds()
    do = TOOLS[job["tool"]](job)
    imported, wall = seconds(), time.perf_counter()
    print("started", flush=True)
    do()
    figures = {
        "cpu_s": round(seconds() - imported, 3),
        "wall_s": round(time.perf_counter() - wall, 3),
        "import_s": round(imported - begun, 3),
        "version": version(job["tool"]),
    }
    print("ended", json.dumps(figures), flush=True)


def seconds() -> float:
    """Return the processor time of this process so far, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def version(tool: str) -> str:
    """Return the version of a tool."""
    from importlib import metadata

    names = {"fusion_bench": "fusion-bench", "floor": "numpy"}
    return metadata.version(names.get(tool, tool if tool.startswith("merge") else "torch"))


def floor(job: Mapping[str, Any]) -> Callable[[], None]:
    """Read all inputs and write as many bytes as one of them has."""
    size = Path(job["files"][0]).stat().st_size

    def do() -> None:
        buffer = bytearray(1 << 22)
        for path in job["files"]:
            with Path(path).open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        with Path(job["out"]).open("wb", buffering=0) as file:
            for _ in range(-(-size // len(buffer))):
                file.write(buffer)

    return do


def ours(job: Mapping[str, Any]) -> Callable[[], None]:
    """Run `mergekit-lit merge`."""
    import torch

    import mergekit_lit.cli.merge  # noqa: F401 - what the command imports
    from mergekit_lit.cli import main as command

    del torch
    base, *experts = job["files"]
    words = ["merge", *experts, "--base", base, "--out", job["out"], "--method", job["method"]]
    words += [f"--{key}={value}" for key, value in CONFIGS.get(job["method"], {}).items()]

    def do() -> None:
        if command(words):
            raise SystemExit("mergekit-lit failed")

    return do


def mergekit(job: Mapping[str, Any]) -> Callable[[], None]:
    """Run `mergekit-pytorch`."""
    import tempfile

    import yaml
    from mergekit.scripts.merge_raw_pytorch import main as command

    method, parameters = MERGEKIT[job["method"]]
    base, *experts = job["files"]
    config = {
        "merge_method": method,
        "models": [{"model": path} for path in experts],
        "parameters": parameters,
        **({} if method == "linear" else {"base_model": base}),
    }
    folder = Path(tempfile.mkdtemp(dir=Path(job["out"]).parent))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = [str(folder / "config.yaml"), str(folder / "out")]

    def do() -> None:
        command(args=words, standalone_mode=False)
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()

    return do


def fusion_bench(job: Mapping[str, Any]) -> Callable[[], None]:
    """Run FusionBench's algorithm on the experts as modules, and save the result."""
    import timm
    import torch
    from fusion_bench import method as algorithms
    from safetensors.torch import load_file, save_file

    make: dict[str, Callable[[], Any]] = {
        "average": algorithms.SimpleAverageAlgorithm,
        "task_arithmetic": lambda: algorithms.TaskArithmeticAlgorithm(scaling_factor=0.3),
        "ties": lambda: algorithms.TiesMergingAlgorithm(
            scaling_factor=1.0, threshold=20, remove_keys=[], merge_func="mean"
        ),
        "dare": lambda: algorithms.DareTaskArithmetic(
            scaling_factor=0.3, sparsity_ratio=0.5, only_on_linear_weights=False
        ),
        "tsv_m": algorithms.TaskSingularVectorMerging,
        "iso_c": lambda: algorithms.ISO_C_Merge(scaling_factor=1.0, exclude_keys=None),
    }
    algorithm = make[job["method"]]()

    def loaded(path: str) -> Any:
        with torch.device("meta"):
            module = timm.create_model(job["model"], num_classes=0)
        module.load_state_dict(load_file(path), assign=True)
        return module

    def do() -> None:
        names = ("_pretrained_", *(f"task{t}" for t in range(len(job["files"]) - 1)))
        pool = {name: loaded(path) for name, path in zip(names, job["files"], strict=True)}
        merged = algorithm.run(pool)
        save_file({n: t.contiguous() for n, t in merged.state_dict().items()}, job["out"])

    return do


def plain_svd(dtype: str) -> Callable[[Mapping[str, Any]], Callable[[], None]]:
    """Return the tool that does TSV-M and Iso-C by `torch.linalg.svd`, as the papers write them."""

    def tool(job: Mapping[str, Any]) -> Callable[[], None]:
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file

        merge = tsv_m if job["method"] == "tsv_m" else iso_c

        def step(deltas: Any) -> Any:
            mean = deltas.mean(dim=0)
            if deltas.ndim < 3 or min(deltas[0].flatten(1).shape) == 1:
                return mean
            matrices = deltas.flatten(2).to(getattr(torch, dtype))
            return merge(torch, matrices).reshape(mean.shape).float()

        def do() -> None:
            base, *experts = (safe_open(path, framework="pt") for path in job["files"])
            out = {}
            for name in base.keys():  # noqa: SIM118 - a file, no mapping
                start = base.get_tensor(name)
                deltas = torch.stack([expert.get_tensor(name) - start for expert in experts])
                out[name] = start + step(deltas)
            save_file(out, job["out"])

        return do

    return tool


def tsv_m(torch: Any, deltas: Any) -> Any:
    """Return polar(U) S polar(V)^T of the experts' leading singular vectors."""
    rank = min(deltas.shape[1:]) // len(deltas)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
    values = torch.cat([s[:rank] for _, s, _ in parts])
    right = torch.cat([v[:rank] for _, _, v in parts])
    p, _, q = torch.linalg.svd(left, full_matrices=False)
    a, _, b = torch.linalg.svd(right, full_matrices=False)
    return (p @ q * values) @ (a @ b)


def iso_c(torch: Any, deltas: Any) -> Any:
    """Return the sum of the deltas with its spectrum made flat."""
    u, s, v = torch.linalg.svd(deltas.sum(dim=0), full_matrices=False)
    return s.mean() * u @ v


TOOLS: Mapping[str, Callable[[Mapping[str, Any]], Callable[[], None]]] = {
    "floor": floor,
    "mergekit-lit": ours,
    "mergekit": mergekit,
    "fusion_bench": fusion_bench,
    "svd float32": plain_svd("float32"),
    "svd float64": plain_svd("float64"),
}


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: medians, and lowest and highest processor time."""
    floor_s = median(results[0]["runs"], "cpu_s")
    own = {
        job["method"]: median(job["runs"], "cpu_s")
        for job in results
        if job["tool"] == "mergekit-lit" and job["runs"]
    }
    headings = ["method", "tool", "CPU s (lowest to highest)", "over the floor", "over ours"]
    headings += ["wall s", "anonymous MB", "import CPU s"]
    rows = [headings, ["---"] * len(headings)]
    rows += [cells(job, floor_s, own.get(job["method"])) for job in results]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(job: dict[str, Any], floor_s: float, own_s: float | None) -> list[str]:
    """Return one row of the table."""
    runs = job["runs"]
    if not runs:
        return [job["method"], job["tool"], f"failed: {job['failed']}", *[""] * 5]
    name = job["tool"]
    name += "" if name.startswith(("floor", "svd")) else f" {runs[0]['version']}"
    each, cpu_s = [run["cpu_s"] for run in runs], median(runs, "cpu_s")
    return [
        job["method"] or "-",
        name,
        f"{cpu_s:.2f} ({min(each):.2f} to {max(each):.2f})",
        f"{cpu_s / floor_s:.2f}",
        f"{cpu_s / own_s:.2f}" if own_s else "",
        f"{median(runs, 'wall_s'):.2f}",
        f"{median(runs, 'anonymous_mb'):.0f}",
        f"{median(runs, 'import_s'):.1f}",
    ]


def median(runs: list[dict[str, Any]], key: str) -> float:
    """Return the median of one figure."""
    return statistics.median(run[key] for run in runs)


if __name__ == "__main__":
    main()
