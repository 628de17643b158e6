"""When memory runs out, and the limit that an operator sets."""

from __future__ import annotations

import resource

import torch

from tpv_worker.settings import Settings

#: What allocators say in a RuntimeError of no class of its own: torch's, C++'s, oneDNN's; CUDA's and its libraries'.
_SAID = (
    *("can't allocate memory", "not enough memory", "std::bad_alloc", "could not create a memory"),
    *("CUDA error: out of memory", "_STATUS_ALLOC_FAILED"),
)


def has_run_out(error: BaseException) -> bool:
    """Whether the error says that there is no more memory, of the device or of this process."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def limit(settings: Settings) -> None:
    """Gives this process no more than TPV_MEMORY_LIMIT: of the GPU's memory, or of its own where it trains on a CPU.

    On a CPU everything counts that the process may write to, what it shares with its parent included.
    """
    if settings.memory_limit is None:
        return
    if settings.device.startswith("cuda"):
        total = torch.cuda.get_device_properties(settings.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.memory_limit / total), settings.device)
    else:
        resource.setrlimit(resource.RLIMIT_DATA, (settings.memory_limit, settings.memory_limit))
