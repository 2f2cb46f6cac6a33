"""Files made to harm, one function each, and what a child process makes of them.

python hostile_files.py build FOLDER    write every file
python hostile_files.py read FOLDER     do everything to each, and print a line of JSON
"""

import contextlib
import io
import itertools
import json
import os
import pickle
import signal
import socket
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

from tests.files import resident

SECONDS = int(os.environ.get("SECONDS", 20))  # of one action; the slowest takes four
ONE = torch.ones(1, 4)
UP = torch.ones(3, 1)
DEEP = "[" * 100_000 + "]" * 100_000
LONG = 300_000


def safe(tensors, metadata=None):
    """A safetensors file of ``{name: shape}`` in float32, or of a whole header."""
    header, at = {}, 0
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, shape in tensors.items():
        size = 4
        for side in shape:
            size *= side
        offsets = [at, at := at + size]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    return raw(json.dumps(header), struct.pack("<f", 1.0) * (at // 4))


def raw(text, data=b""):
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text + data


def pairs(names, a=".lora_A.weight", b=".lora_B.weight"):
    return {f"{n}{end}": s for n in names for end, s in ((a, (1, 4)), (b, (3, 1)))}


def native(config, names, **more):
    about = {"format": 1, "adapter": "default", "config": config, **more}
    tensors = {f"{n}.{part}": s for n in names for part, s in NATIVE_PARTS}
    return safe(tensors, {"paramlora": json.dumps(about)})


NATIVE_PARTS = (("lora_A", (1, 4)), ("lora_B", (3, 1)), ("lora_scale", ()))
NAMES = [f"model.layers.{i}.{'a' * 20}" for i in range(2_000)]
EVIL = ["(a+)+{}$", "(.*a){{20}}{}", "(a|aa)*{}b", "(.*)*.*.*{}c", "^(([a-z.0-9])+)+{}$"]
PATTERNS = [EVIL[i % len(EVIL)].format(i) for i in range(2_000)]
TOKENS = (
    ".lora_A .lora_linear_layer. parametrizations.a. .base_layer 1: . .hada_x lora_branches.0. "
    ".to_q_lora.down \n a ²"
).split(" ")
ENDS = ("", "\n", ".lora_A.weight", ".lora_down.weight", ":1:up")


def folder(place, config, tensors=None, name="adapter_config.json", metadata=None):
    place.mkdir()
    content = safe(pairs(["base_model.model.a"]) if tensors is None else tensors, metadata)
    (place / "adapter_model.safetensors").write_bytes(content)
    text = config if isinstance(config, str) else json.dumps(config)
    (place / name).write_text(text)


def peft(**config):
    return {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"], **config}


# patterns


def patterns_of_an_old_file(path):
    path.write_bytes(native({f"re:{p}": {"r": 1} for p in PATTERNS}, NAMES))


def one_pattern_of_an_old_file(path):
    path.write_bytes(native({"re:(a+)+$": {"r": 1}}, ["a" * 40 + "b"]))


def names_of_an_old_file(path):
    path.write_bytes(native({f"*.{i}.*": {"r": 1} for i in range(2_000)}, NAMES))


def a_long_name_of_an_old_file(path):
    path.write_bytes(native({"re:((ab)*c?)*": {"whole": True}}, ["ab." * (LONG // 3)]))


def parentheses_in_an_old_file(path):
    path.write_bytes(native({"re:" + "(" * 3_000 + ")" * 3_000: {"r": 1}}, ["a"]))


def parentheses_in_a_new_file(path):
    name = "re:" + "(" * 3_000 + ")" * 3_000
    shapes = {name: {"shape": [3, 4], "layout": "matrix"}}
    path.write_bytes(native({name: {"r": 1}}, [name], shapes=shapes))


def alpha_pattern(path):
    names = [f"base_model.model.{name}" for name in NAMES]
    folder(path, peft(alpha_pattern=dict.fromkeys(PATTERNS, 2)), pairs(names))


def rank_pattern(path):
    config = peft(rank_pattern=dict.fromkeys(PATTERNS, 2), target_parameters=NAMES)
    folder(path, config, pairs([f"base_model.model.{n.rpartition('.')[0]}" for n in NAMES]))


def alpha_pattern_of_a_long_name(path):
    config = peft(alpha_pattern=dict.fromkeys([p.format("") for p in EVIL], 2))
    folder(path, config, pairs(["base_model.model." + "a" * LONG + "b"]))


def target_modules(path):
    folder(path, peft(target_modules="(.*a*)*(a|b|ab)*c", exclude_modules="(a+)+$"))


def target_modules_of_parentheses(path):
    folder(path, peft(target_modules="(" * 3_000 + ")" * 3_000))


def target_modules_that_is_a_list(path):
    folder(path, peft(target_modules=[f"{n}{i}" for i in range(50) for n in NAMES]))


def modules_to_save(path):
    names = [f"base_model.model.m{i}.x.weight" for i in range(5_000)]
    tensors = {**pairs(["base_model.model.a"]), **dict.fromkeys(names, (1,))}
    folder(path, peft(modules_to_save=[f"n{i}.x" for i in range(5_000)]), tensors)


def target_parameters(path):
    names = [f"base_model.model.m{i}" for i in range(5_000)]
    folder(path, peft(target_parameters=[f"n{i}.w" for i in range(5_000)]), pairs(names))


def alpha_pattern_of_diffusers(path):
    patterns = json.dumps({"unet.r": 1, "unet.alpha_pattern": dict.fromkeys(PATTERNS, 2)})
    names = [f"unet.{name}" for name in NAMES]
    path.write_bytes(safe(pairs(names), {"lora_adapter_metadata": patterns}))


def alpha_pattern_of_torchtune(path):
    config = peft(alpha_pattern=dict.fromkeys(PATTERNS, 2))
    folder(path, config, pairs(NAMES, ".lora_a.weight", ".lora_b.weight"))


def our_own_patterns(path):
    names = [token * (LONG // len(token)) + end for token in TOKENS for end in ENDS]
    path.mkdir()
    for number, name in enumerate(names):
        content = safe({name: (1, 4), name.replace("lora_A", "lora_B"): (3, 1)})
        (path / f"{number}.safetensors").write_bytes(content)


# sizes


def a_name_twice(path):
    one = '"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    names = [*range(20_000), 19_999]
    path.write_bytes(raw("{" + ",".join(map(one.format, names)) + "}", bytes(4)))


def header_of_99_mb(path):
    path.write_bytes(raw('{"a":[' + "{}," * 33_000_000 + "{}]}"))


def header_of_48_mb(path):
    path.write_bytes(raw('{"a":[' + "{}," * 16_000_000 + "{}]}"))


def header_of_strings(path):
    path.write_bytes(raw('{"' + '\\"' * 20_000_000))


def header_of_wide_letters(path):
    path.write_bytes(raw('{"__metadata__":{"a":"' + "x" * 45_000_000 + '\U0001f600"},"b":3}'))


def header_of_tensors(path):
    one = '"{}":{{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    path.write_bytes(raw("{" + ",".join(map(one.format, range(700_000))) + "}", bytes(4)))


def metadata_of_values(path):
    about = "[" + "{}," * 15_000_000 + "{}]"
    path.write_bytes(safe(pairs(["a"]), {"paramlora": about}))


def shapes_of_many_digits(path):
    shapes = {"a": {"shape": [int("9" * 4_000)] * 2_000, "layout": "matrix"}}
    path.write_bytes(native({"a": {"r": 1}}, ["a"], shapes=shapes))


def shared_lists(path):
    value = [torch.ones(1)]
    for _ in range(40):
        value = [value, value]
    torch.save({"a.lora_A": ONE, "b": value}, path)


def shared_lists_without_tensors(path):
    value = []
    for _ in range(40):
        value = [value, value]
    torch.save({"a.lora_A": ONE, "b": value}, path)


def deep_lists(path):
    steps = b"]" * 100_000 + b"a" * 99_999  # a pickler of Python's own would not come so far
    path.write_bytes(zipped(b"\x80\x02" + steps + b"."))


def a_list_in_itself(path):
    value = [ONE]
    value.append(value)
    torch.save({"a.lora_A": ONE, "b": value}, path)


def a_long_name_of_many(path):
    torch.save({"x" * 1_000_000: [ONE] * 100_000}, path)


def many_views(path):
    whole = torch.ones(250_000)
    torch.save({f"a{i}.lora_A.weight": whole.view(1, -1) for i in range(3_000)}, path)


def many_updates_of_one_sum(path):
    tensors = {}
    for i in range(4_000):
        start = f"m{i}.parametrizations.weight"
        tensors[f"{start}.original"] = (3, 4)
        tensors |= {f"{start}.0.{part}": shape for part, shape in NATIVE_PARTS}
    path.write_bytes(safe(tensors))


def many_values(path):
    path.write_bytes(zipped(b"\x80\x02]" + b"(" + b"]" * 5_000_000 + b"e."))


def numbers_of_one_hash(path):
    longs = ((i * (2**61 - 1)).to_bytes(11, "little") for i in range(60_000))
    numbers = b"}(" + b"".join(b"\x8a\x0b" + one + b"N" for one in longs) + b"u"
    start = b"}(" + opcodes("a.lora_A") + opcodes(ONE) + opcodes("b")
    path.write_bytes(zipped(b"\x80\x02" + start + numbers + b"u."))


def codecs(path):
    value = Call("_codecs.encode", ("x" * 50, "latin1"))
    for _ in range(40):
        value = Call("_codecs.encode", (value, "hex"))
    path.write_bytes(zipped(pickled({"a": ONE, "b": value})))


def a_sparse_adapter(path):
    content = raw(json.dumps({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}))
    path.write_bytes(content)
    os.truncate(path, len(content) + 2**40)


# values


def deep_metadata(path):
    path.write_bytes(safe(pairs(["a"]), {"paramlora": DEEP}))


def deep_metadata_of_diffusers(path):
    path.write_bytes(safe(pairs(["a"]), {"lora_adapter_metadata": DEEP, "paramlora_scales": DEEP}))


def deep_config(path):
    folder(path, '{"peft_type": "LORA", "alpha_pattern": ' + DEEP + "}")


def deep_hyperparameters(path):
    folder(path, "lora_r: " + DEEP, {"a.lora_A": (1, 4)}, "hyperparameters.yaml")


def huge_alpha(path):
    folder(path, '{"peft_type": "LORA", "r": 1, "lora_alpha": 1' + "0" * 400 + "}")


def huge_alpha_pattern(path):
    folder(path, '{"peft_type": "LORA", "r": 1, "alpha_pattern": {"a": 1' + "0" * 4000 + "}}")


def huge_rank(path):
    huge = "1" + "0" * 400
    text = '{"peft_type": "LORA", "r": %s, "target_parameters": ["a.w"]}' % huge
    folder(path, text)


def huge_hyperparameters(path):
    tensors = pairs(["transformer.h.0.attn.proj"], ".lora_A", ".lora_B")
    folder(path, "lora_r: 1\nlora_alpha: 1" + "0" * 400, tensors, "hyperparameters.yaml")


def hyperparameters_of_lists(path):
    tensors = pairs(["transformer.h.0.attn.proj"], ".lora_A", ".lora_B")
    folder(path, "a: [[[[]]]]\n" * 100_000, tensors, "hyperparameters.yaml")


def shapes_that_lie(path):
    shapes = {"a": {"shape": [3, 5, 7, 7], "layout": "matrix", "groups": 3, "kind": "convolution"}}
    path.write_bytes(native({"a": {"r": 1}}, ["a"], shapes=shapes))


def groups_without_end(path):
    shapes = {"a": {"shape": [3, 4], "layout": "matrix", "groups": 2**40, "kind": "convolution"}}
    path.write_bytes(native({"a": {"r": 1}}, ["a"], shapes=shapes))


def dense_of_another_size(path):
    parts = {"lokr_w1": (1, 1_500), "lokr_w2": (1_500, 1)}
    path.write_bytes(safe({f"lora_unet_a.{leaf}": shape for leaf, shape in parts.items()}))


def product_of_another_layout(path):
    tensors = {"a.lokr_w1": (1000, 1000), "a.lokr_w2": (100, 100, 1)}
    folder(path, json.dumps({"peft_type": "LOKR", "r": 1, "alpha": 1}), tensors)


def halves_of_a_product(path):
    tensors = {"a.lokr_w1_a": (LONG, 1), "a.lokr_w1_b": (1, LONG), "a.lokr_w2": (1, 1, 1)}
    folder(path, json.dumps({"peft_type": "LOKR", "r": 1, "alpha": 1}), tensors)


def a_copy_of_another_size(path):
    names = ("lora_embedding_A", "lora_embedding_B", "base_layer.weight")
    shapes = ((1, LONG), (LONG, 1), (5, 4))
    folder(path, peft(), {f"base_model.model.a.{n}": s for n, s in zip(names, shapes)})


def huge_scale(path):
    text = '{"format": 1, "adapter": "a", "config": {"a": {"r": 1, "scale": 1' + "0" * 400 + "}}}"
    path.write_bytes(safe({f"a.{p}": s for p, s in NATIVE_PARTS}, {"paramlora": text}))


def values_that_are_deep(path):
    deep = json.loads("[" * 90 + "]" * 90)
    for name, place in (("r", deep), ("hard", deep), ("init", deep)):
        path.write_bytes(native({"a": {"r": 1, name: place}}, ["a"]))


def digits(path):
    path.mkdir()
    for number, name in enumerate(["²", "٣", "1" * 5_000, "m:²:up", f"m:{'1' * 5_000}:up"]):
        content = safe({name: (3, 1), "0": (3, 1)})
        (path / f"{number}.safetensors").write_bytes(content)
    for number, index in enumerate(["²", "٣", "1" * 5_000, "01"]):
        start = f"a.parametrizations.weight.{index}"
        tensors = {f"{start}.{part}": shape for part, shape in NATIVE_PARTS}
        tensors["a.parametrizations.weight.original"] = (3, 4)
        (path / f"key{number}.safetensors").write_bytes(safe(tensors))
    name = f"lora_unet_down_blocks.{'1' * 5_000}.resnets.0.conv1.lora_down.weight"
    (path / "sgm.safetensors").write_bytes(safe({name: (1, 4)}))


def shapes_beyond_any(path):
    entry = {"dtype": "F32", "shape": [2**62] * 63 + [0], "data_offsets": [0, 0]}
    path.write_bytes(raw(json.dumps({"a.lora_A.weight": entry, "a.lora_B.weight": entry})))


def weight_norm_without_its_second(path):
    path.write_bytes(safe({"a.parametrizations.weight.original0": (3, 4), "a.bias": (3,)}))


def nested_tensors(path):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"a.lora_A.weight": nested, "a.lora_B.weight": nested}, path)


def nested_jagged_tensors(path):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    torch.save({"a.lora_A.weight": nested, "a.lora_B.weight": nested}, path)


def sparse_and_quantised(path):
    q = torch.quantize_per_tensor(ONE, 1.0, 0, torch.qint8)
    torch.save({"a.lora_A.weight": ONE.to_sparse(), "a.lora_B.weight": q, "c": ONE}, path)


def names_that_print(path):
    path.mkdir()
    evil = ["\x1b[31mred\x1b[0m", "a\nerror: b", "a\r\x08b", "\u202eb", "x" * LONG, "x y" * LONG]
    for number, name in enumerate(evil):
        endings = [".lora_A.weight", ".lora_down.weight", ".lora_B.weight", ".x", "_lora_A"]
        for end in endings:
            content = safe({name + end: (1, 4)}, {name: name})
            (path / f"{number}{end}.safetensors").write_bytes(content)
        about = native({name: {"r": 2}}, ["a"], shapes={name: {"shape": [1]}})
        (path / f"native{number}.safetensors").write_bytes(about)
        torch.save({name: {name: 3}, "state_dict": {name: ONE.to_sparse()}}, path / f"{number}.pt")
        place = path / f"peft{number}"
        folder(place, peft(peft_type=name))
        folder(path / f"kind{number}", peft(alpha_pattern={f"{name}(": 1}))
        folder(path / f"saved{number}", peft(init_lora_weights=f"pissa{name}"))
        shard = path / f"shard{number}"
        shard.mkdir()
        index = json.dumps({"weight_map": {name: name.replace("/", "")}})
        (shard / "model.safetensors.index.json").write_text(index)


def names_that_are_no_text(path):
    torch.save({"\ud800.lora_A.weight": ONE, "\ud800.lora_B.weight": UP}, path)


def a_name_of_the_header(path):
    torch.save({"__metadata__": ONE, "a.weight": torch.ones(3, 4)}, path)


# what is no file


def fifo(path):
    os.mkfifo(path)


def zero(path):
    path.symlink_to("/dev/zero")


def listening(path):
    place = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(place)


def names_of_every_table(path):
    names = (n.replace("*", str(i)) for n in TABLE_NAMES for i in range(1_500))
    path.write_bytes(safe(pairs(names, ".lora_A.weight", ".lora_B.weight")))


def levels_without_end(path):
    levels = "_orig_mod.module.base_model.model.model.text_model." * 400
    names = [f"{levels}{i}.a" for i in range(20)] + [f"{'lora_te_' * 2_000}{i}" for i in range(20)]
    path.write_bytes(safe(pairs(names)))


def alphas_in_the_header(path):
    about = {f"part{i}.lora_alpha": "8" for i in range(50_000)}
    path.write_bytes(safe(pairs(["a"]), about))


def an_alpha_of_many_digits_in_the_header(path):
    path.write_bytes(safe(pairs(["a"]), {"lora_alpha": "9" * 100_000}))


def a_base_of_every_table(path):
    path.write_bytes(
        safe({n.replace("*", str(i)): (12, 6) for n in TABLE_NAMES for i in range(99)})
    )


def a_base_of_stacks_without_end(path):
    stacks = {f"layers.{i}.mlp.experts.{n}": (1 << 40, 0, 6) for i in range(50) for n in STACKS}
    path.write_bytes(safe(stacks))


def a_base_of_blocks_without_end(path):
    names = [f"{side}_blocks.{n}.resnets.{n}.conv1" for side in ("down", "up") for n in NUMBERS]
    path.write_bytes(safe({f"{n}.weight": (4, 6) for n in (*names, "input_blocks.999999999.0.op")}))


TABLE_NAMES = (
    "double_blocks.*.img_attn.qkv single_blocks.*.linear1 transformer_blocks.*.attn.to_q "
    "blocks.*.self_attn.q layers.*.attention.qkv joint_blocks.*.x_block.attn.qkv "
    "model.layers.*.mlp.experts.0.gate_proj transformer.resblocks.*.attn.in_proj_weight"
).split()
STACKS = ("gate_up_proj", "down_proj")
NUMBERS = (0, 1, 999_999_999, 10**30)


def fifo_as_shard(path):
    path.mkdir()
    os.mkfifo(path / "a.safetensors")
    index = json.dumps({"weight_map": {"a.weight": "a.safetensors"}})
    (path / "model.safetensors.index.json").write_text(index)


def fifo_as_index(path):
    path.mkdir()
    os.mkfifo(path / "model.safetensors.index.json")


def zero_as_index(path):
    path.mkdir()
    (path / "model.safetensors.index.json").symlink_to("/dev/zero")


def fifo_as_config(path):
    folder(path, peft())
    (path / "adapter_config.json").unlink()
    os.mkfifo(path / "adapter_config.json")


def zero_as_config(path):
    folder(path, peft())
    (path / "adapter_config.json").unlink()
    (path / "adapter_config.json").symlink_to("/dev/zero")


def fifo_as_hyperparameters(path):
    folder(path, peft())
    os.mkfifo(path / "hyperparameters.yaml")


def index_of_values(path):
    path.mkdir()
    (path / "model.safetensors.index.json").write_text("[" + "[]," * 15_000_000 + "[]]")


def config_of_values(path):
    folder(path, '{"peft_type": "LORA", "modules_to_save": [' + "{}," * 15_000_000 + "{}]}")


# memory that nobody wrote


class Call:
    """A call in a pickle, spelled with the opcodes that torch knows."""

    def __init__(self, name, arguments, op=b"R"):
        self.name, self.arguments, self.op = name, arguments, op


class Global:
    def __init__(self, name):
        self.name = name


class Stored:
    def __init__(self, key, count, kind="torch.FloatStorage", view=()):
        self.identity = ("storage", Global(kind), key, "cpu", count, *view)


class Built:
    def __init__(self, value, state):
        self.value, self.state = value, state


def opcodes(value):
    if isinstance(value, Global):
        module, _, name = value.name.rpartition(".")
        return b"c" + f"{module}\n{name}\n".encode()
    if isinstance(value, Call):
        function = opcodes(Global(value.name) if isinstance(value.name, str) else value.name)
        return function + opcodes(value.arguments) + value.op
    if isinstance(value, Stored):
        return opcodes(value.identity) + b"Q"
    if isinstance(value, Built):
        return opcodes(value.value) + opcodes(value.state) + b"b"
    if isinstance(value, torch.Tensor):
        return opcodes(tensor(value.shape))
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(k) + opcodes(v) for k, v in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1].split(b"q\x00")[0]


def tensor(shape, storage=None, offset=0, version="_v2", more=()):
    strides, step = [], 1
    for side in reversed(shape):
        strides.insert(0, step)
        step *= side
    hooks = Call("collections.OrderedDict", ())
    storage = Stored("0", step) if storage is None else storage
    arguments = (storage, offset, tuple(shape), tuple(strides), False, hooks, *more)
    return Call(f"torch._utils._rebuild_tensor{version}", arguments)


def pickled(value):
    return b"\x80\x02" + opcodes(value) + b"."


def zipped(content, records=None):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for key, data in (records or {"0": bytes(64)}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def legacy(value, keys, stored):
    system = dict(protocol_version=1001, little_endian=True, type_sizes={})
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    data = b"".join(struct.pack("<q", len(one) // 4) + one for one in stored)
    return b"".join(head) + pickled(value) + pickled(list(keys)) + data


def unwritten():
    """``{name: value}`` of tensors that hold what was in memory before."""
    storage = Stored("0", 16)
    return {
        "class": Call("torch.FloatTensor", (6, 6)),
        "new": Call("torch.FloatTensor", (6, 6), b"\x81"),
        "tensor": Call("torch.Tensor", (6, 6)),
        "cuda": Call("torch.cuda.FloatTensor", (6, 6)),
        "storage": tensor((6, 6), Call("torch.FloatStorage", (36,))),
        "untyped": tensor((6, 6), Call("torch.storage.UntypedStorage", (144,)), 0, "_v3"),
        "typed": tensor((6, 6), Call("torch.storage.TypedStorage", (36,))),
        "by type": Call(
            "torch._tensor._rebuild_from_type_v2",
            (Global("torch.FloatTensor"), Global("torch.Tensor"), (6, 6), {}),
        ),
        "twice by type": Call(
            "torch._tensor._rebuild_from_type_v2",
            (
                Global("torch._tensor._rebuild_from_type_v2"),
                Global("torch.Tensor"),
                (Global("torch.FloatTensor"), Global("torch.Tensor"), (6, 6), {}),
                {},
            ),
        ),
        "larger": tensor((6, 6), storage),
        "beyond": tensor((4, 4), storage, 1),
        "negative": tensor((4, 4), storage, -1),
        "wider": tensor((16,), storage, 0, "_v3", (Global("torch.float64"),)),
        "set": Built(tensor((4, 4), storage), (storage, 0, (6, 6), (6, 1))),
        "parameter": Built(
            Call("torch._utils._rebuild_parameter", (tensor((4, 4), storage), False, {})),
            (storage, 0, (6, 6), (6, 1)),
        ),
        "older": Call("torch._utils._rebuild_tensor", (storage, 0, (6, 6), (6, 1))),
    }


def written_memory(path):
    """Sound ones, of the same making."""
    path.mkdir()
    parts = {"a.lora_A": tensor((1, 4), Stored("0", 4)), "a.lora_B": tensor((3, 1), Stored("1", 3))}
    stored = {"0": bytes(16), "1": bytes(12)}
    (path / "zip.pt").write_bytes(zipped(pickled(parts), stored))
    old = legacy(with_views(parts), stored, stored.values())
    (path / "legacy.pt").write_bytes(old)


def unwritten_memory(path):
    path.mkdir()
    for name, value in unwritten().items():
        content = {"a.lora_A": value, "a.lora_B": tensor((4, 4), Stored("0", 16))}
        (path / f"{name}.pt").write_bytes(zipped(pickled(content)))
        old = legacy(with_views(content), ["0"], [bytes(64)])
        (path / f"{name} legacy.pt").write_bytes(old)
    one = {"a.lora_A": tensor((4, 4), Stored("0", 16, view=(None,)))}
    (path / "no bytes.pt").write_bytes(legacy(one, [], []) + bytes(64))
    view = {"a.lora_A": tensor((4, 4), Stored("0", 8, view=(("1", 0, 16),)))}
    (path / "larger view.pt").write_bytes(legacy(view, ["0"], [bytes(32)]) + bytes(64))
    (path / "short record.pt").write_bytes(zipped(pickled(one), {"0": bytes(60), "1": bytes(64)}))


def with_views(value):
    """The storages of a legacy file tell one thing more."""
    if isinstance(value, Stored):
        copy = Stored("0", 0)
        copy.identity = (*value.identity, *(() if len(value.identity) > 5 else (None,)))
        return copy
    if isinstance(value, Call):
        return Call(value.name, with_views(value.arguments), value.op)
    if isinstance(value, Built):
        return Built(with_views(value.value), with_views(value.state))
    if isinstance(value, (tuple, list)):
        return type(value)(map(with_views, value))
    if isinstance(value, dict):
        return {k: with_views(v) for k, v in value.items()}
    return value


CASES = {
    name: made
    for name, made in list(globals().items())
    if getattr(made, "__code__", None) and made.__code__.co_varnames[:1] == ("path",)
}
# the large ones once, since each of these does the same first
FEW = dict.fromkeys(
    "many_values header_of_strings names_of_an_old_file header_of_tensors metadata_of_values "
    "header_of_48_mb target_parameters header_of_wide_letters config_of_values deep_lists "
    "alpha_pattern_of_a_long_name index_of_values shapes_of_many_digits".split(),
    ("load",),
)
FEW |= dict.fromkeys(
    "patterns_of_an_old_file alpha_pattern rank_pattern alpha_pattern_of_diffusers "
    "alpha_pattern_of_torchtune modules_to_save".split(),
    ("command", "load"),
)
FEW |= {"our_own_patterns": ("command", "merge of"), "names_that_print": ("command", "merge of")}
FEW |= {"index_of_values": ("merge of",), "many_updates_of_one_sum": ("extract",)}
FEW |= {"hyperparameters_of_lists": ("load",), "halves_of_a_product": ("load",)}
FEW |= {"names_of_every_table": ("load", "kohya")}
FEW |= dict.fromkeys([name for name in CASES if name.startswith("a_base_of")], ("as base",))
_ENDING = {"fifo": ".pt", "zero": ".pt", "listening": ".safetensors"}


# the child


class Slow(BaseException):
    """An action took longer than it may."""


def late(number, frame):
    raise Slow


def actions(paramlora, out):
    from paramlora import files, formats
    from paramlora.cli import main
    from paramlora.files import adapters as interchange

    net = nn.ModuleDict({"a": nn.Linear(4, 3)})
    base = formats.base_of(net)
    adapter = paramlora.Adapter({"a": paramlora.Update(ONE, UP, shape=(3, 4))})
    safe_base = out / "base.safetensors"
    safe_base.write_bytes(safe({"a.weight": (3, 4)}))

    def command(*words):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                main(list(map(str, words)))
            except SystemExit as stop:
                return stop.code
        return 0

    def load(path):
        paramlora.load_adapter(nn.ModuleDict({"a": nn.Linear(4, 3)}), path, strict=False)

    def merge(path):
        files.merge(path, [adapter], out / "merged.safetensors", force=True)

    def convert(to):
        def one(path):
            options = formats.Options(strict=False)
            interchange.convert(path, out / "c.safetensors", to, base, options, dry_run=True)

        return one

    names = out / "names.safetensors"
    stems = [n.replace("*", str(i)).replace(".", "_") for n in TABLE_NAMES for i in range(9)]
    ends = (".lora_down.weight", ".lora_up.weight")
    names.write_bytes(safe({f"lora_unet_{n}{end}": (4, 4) for n in stems for end in ends}))

    def as_base(path):
        options = formats.Options(strict=False)
        interchange.read_adapter(names, interchange.base_of_file(path), options)

    return {
        "as base": as_base,
        "load": load,
        "merge onto": lambda path: files.merge(
            safe_base, [path], out / "m.safetensors", force=True
        ),
        "merge of": merge,
        "extract": lambda path: files.extract(path, out / "x.safetensors", force=True),
        "kohya": convert("kohya"),
        "command": lambda path: command("inspect", path),
    }


def outcome(act, path, paramlora):
    """What came of one action: "done", "refused" with the message, "fault" or "slow"."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            code = act(path)
        ends = {2: ("refused", ""), 1: ("fault", "exit 1")}
        return ends.get(code, ("done", "")) if isinstance(code, int) else ("done", "")
    except paramlora.ParamloraError as error:
        return "refused", str(error)
    except Slow:
        return "slow", ""
    except BaseException as error:
        return "fault", f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def read(place):
    import paramlora

    signal.signal(signal.SIGALRM, late)
    done = actions(paramlora, place)
    for name in CASES:
        path = found(place, name)
        inside = sorted(path.iterdir()) if path.is_dir() and not is_one(path) else [path]
        verbs = FEW.get(name, [verb for verb in done if verb != "as base"])
        for one, verb in itertools.product(inside, verbs):
            resident.restart()
            begun = time.process_time()
            kind, text = outcome(done[verb], one, paramlora)
            seconds = time.process_time() - begun
            peak = resident.peak() if resident.COUNTED else 0
            line = dict(case=name, file=one.name, act=verb, kind=kind, text=text[:5_000])
            print(json.dumps({**line, "seconds": seconds, "peak": peak}), flush=True)


def is_one(path):
    """Whether a folder is one adapter or one checkpoint, not a folder of cases."""
    names = {one.name for one in path.iterdir()}
    return bool(names & {"adapter_model.safetensors", "model.safetensors.index.json"})


def found(place, name):
    return next(p for p in place.iterdir() if p.name.partition(".")[0] == name)


def build(place):
    for name, made in CASES.items():
        ending = _ENDING.get(name, ".file")
        made(place / f"{name}{ending}")


if __name__ == "__main__":
    {"build": build, "read": read}[sys.argv[1]](Path(sys.argv[2]))
