"""What a checkpoint holds of a run: weights or adapters, optimizer states by parameter name, random state; and back.

`checkpoint.py` is how it gets to the disk without being lost on the way.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from moai_llm.runtime import MoaiError
from moai_llm.training import lora
from moai_llm.training.optim import place_state

STATE = "training_state"  # the folder of what only a resumed run needs
Tensors = dict[str, torch.Tensor]


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights (of a model with adapters: those alone), optimizer and random state of a sound checkpoint; returns
    what `save` was given as `state`.

    Raises:
        MoaiError: the checkpoint is of another model.
    """
    if lora.has_adapters(model):
        lora.load_adapter(path / lora.FOLDER, model)
    else:
        _load_weights(path, model)
    _load_optimizer(load_file(path / STATE / "optimizer.safetensors"), model, optimizer)
    state = json.loads((path / STATE / "state.json").read_text(encoding="utf-8"))
    _set_rng_state(state.pop("rng"))
    return state


def _load_weights(path: Path, model: nn.Module) -> None:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights.update(load_file(file))
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # shapes
        raise MoaiError(f"{path} is a checkpoint of another model: {str(error).splitlines()[1].strip()}") from None
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise MoaiError(f"{path} is a checkpoint of another model: {[*unexpected, *missing][:3]} ...")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """{"exp_avg/model.norm.weight": tensor, ...}: by parameter name, so that the order of groups does not matter.

    A number of Python becomes a 64-bit scalar, and a number again when it is read: torch's own counters have 32 bits.
    A tensor that several parameters share, such as the quantisation map of 8-bit states, is written for each of them.
    """
    tensors: dict[str, torch.Tensor] = {}
    written = set()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, (int, float)):
                value = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
            tensor = value.detach().contiguous()
            tensors[f"{key}/{name}"] = tensor.clone() if tensor.data_ptr() in written else tensor
            written.add(tensor.data_ptr())
    return tensors


def _load_optimizer(tensors: dict[str, torch.Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        if name not in parameters:
            raise MoaiError(f"the optimizer state names {name}, which this model does not have")
        parameter, number = parameters[name], tensor.dim() == 0 and tensor.dtype in (torch.int64, torch.float64)
        value = tensor.item() if number else place_state(optimizer, parameter, key, tensor)
        optimizer.state[parameter][key] = value


def rng_state() -> dict[str, Any]:
    python = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
        "torch": _bytes_to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = [_bytes_to_text(t) for t in torch.cuda.get_rng_state_all()]
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numbers, position, has_gauss, value = state["numpy"]
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), position, has_gauss, value))
    torch.set_rng_state(_text_to_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([_text_to_bytes(t) for t in state["cuda"]])


def _bytes_to_text(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().tobytes()).decode()


def _text_to_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
