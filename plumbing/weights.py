"""Writing weights one at a time: a safetensors file without a second copy of the model in memory.

The library's `save_file` wants all tensors at once. A merged model is made while it is written, in a wider type than
the one in memory: all of it at once would be two or three times the run's own weights, at the very end of the run.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_tensors(path: Path, shapes: Mapping[str, torch.Size], tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    """`shapes`: name -> shape, in the order in which `tensors` come; all are stored as `dtype`.

    The format: the header's length as 8 bytes, the header as JSON (where each tensor begins and ends), the numbers.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            f.write(tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
