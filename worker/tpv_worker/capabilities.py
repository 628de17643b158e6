"""What this worker can do, as the registry is told. Runs in a process of its own: asking a GPU takes hold of it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import transformers
from huggingface_hub.constants import HF_HUB_CACHE

import tpv
from tpv.schemas.workers import WorkerReport
from tpv_worker import lab
from tpv_worker.settings import Settings


def capabilities(settings: Settings) -> WorkerReport:
    return WorkerReport(
        name=settings.name,
        device=settings.device,
        memory=min(filter(None, (_memory(settings.device), settings.memory_limit)), default=None),
        dtypes=_dtypes(settings.device),
        models=_models(settings.model_directories),
        concurrency=settings.concurrency or len(slots(settings.device, settings.processes)),
        queues=settings.queues,
        versions={
            "tpv-registry": tpv.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def devices(device: str) -> list[str]:
    """The devices that attempts are given: `cuda` is every GPU that CUDA_VISIBLE_DEVICES shows to this process."""
    if device != "cuda":
        return [device]
    if not torch.cuda.device_count():
        raise RuntimeError("there is no GPU here that this process may use")
    return [f"cuda:{place}" for place in range(torch.cuda.device_count())]


def slots(device: str, processes: int) -> list[tuple[str, ...]]:
    """The devices of each attempt, one for each of its processes; on a CPU they have the same one."""
    each = devices(device) * (processes if device == "cpu" else 1)
    if len(each) % processes:
        raise RuntimeError(
            f"{processes} processes of an attempt need {processes} GPUs, or a multiple; {device!r} is {', '.join(each)}"
        )
    return [tuple(each[i : i + processes]) for i in range(0, len(each), processes)]


def _memory(device: str) -> int | None:
    """Bytes of the device; of a CPU those of the machine, or of the container where that has less."""
    if device.startswith("cuda"):
        return min(torch.cuda.get_device_properties(each).total_memory for each in devices(device))
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (limit := container.read_text().strip()).isdigit():
        limits.append(int(limit))
    return min(limits)


def _dtypes(device: str) -> list[str]:
    """Those that the device computes with natively; a CPU emulates the short ones, many times slower."""
    if not device.startswith("cuda"):
        return ["float32"]
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["float32", "float16", *(["bfloat16"] if native else [])]


def _models(directories: list[Path]) -> list[str]:
    """Base models that are here: the lab's, those in the allowed directories, and those of the hub's cache."""
    local = [path.parent for directory in directories for path in sorted(directory.glob("*/config.json"))]
    cached = sorted(Path(HF_HUB_CACHE).glob("models--*")) if Path(HF_HUB_CACHE).is_dir() else []
    hub = [path.name.removeprefix("models--").replace("--", "/") for path in cached]
    return [lab.BASE_MODEL, *map(str, local), *hub][:1000]
