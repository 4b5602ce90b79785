"""Everything about a model and the process that an action may leave a trace in, in a form that can be compared."""

from __future__ import annotations

import random
import signal

import numpy as np
import torch
from torch import nn


def trace_of(model: nn.Module) -> dict[str, object]:
    """Return identities and bits of everything in a model."""
    trace: dict[str, object] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        trace[f"{name}: class"] = id(type(module)), id(module)
        for key, value in vars(module).items():
            if isinstance(value, dict):
                trace[f"{name}.{key}"] = id(value), [(k, id(v)) for k, v in value.items()]
            else:
                trace[f"{name}.{key}"] = value if isinstance(value, (bool, int, float, str)) else id(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        trace[f"{name}: tensor"] = _tensor(tensor)
        trace[f"{name}: gradient"] = None if tensor.grad is None else (id(tensor.grad), _tensor(tensor.grad))
    return trace


def trace_of_process() -> dict[str, object]:
    """Return the settings and random numbers of the process."""
    state = np.random.get_state()
    return {
        "torch's random numbers": torch.get_rng_state().numpy().tobytes(),
        "random numbers of GPUs": _random_numbers_of_gpus(),
        "Python's random numbers": random.getstate(),
        "NumPy's random numbers": (state[1].tobytes(), *state[2:]),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "SIGINT": signal.getsignal(signal.SIGINT),
        "hooks on all modules": [len(hooks) for hooks in _global_hooks()],
    }


def _random_numbers_of_gpus() -> list[bytes]:
    return [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else []


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Return the names of what differs."""
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]


def _tensor(tensor: torch.Tensor) -> tuple[object, ...]:
    place = id(tensor), tensor.dtype, tensor.requires_grad, tuple(tensor.shape), tensor.stride(), tensor.data_ptr()
    if not tensor.numel() or tensor.is_meta:
        return *place, b""
    return *place, tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _global_hooks() -> list[dict[int, object]]:
    own = torch.nn.modules.module
    return [getattr(own, name) for name in dir(own) if name.startswith("_global_") and name.endswith("_hooks")]
