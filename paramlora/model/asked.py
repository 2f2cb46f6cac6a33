"""Whether a reader of an adapted tensor asks only what its base tells as well: a type, a shape."""

import dis
import functools
from types import CodeType, FrameType

# attributes and methods that the sum and its base answer alike
_ALIKE = frozenset(
    ("dtype", "shape", "device", "ndim", "itemsize", "is_cuda", "is_cpu", "is_meta")
    + ("size", "dim", "numel", "element_size", "is_floating_point")
)


def asks_the_base(reader: FrameType, name: str) -> bool:
    """Whether the line that reads ``x.name`` goes on to one of those at once, as in
    ``self.wo.weight.dtype``: then nobody ever has the tensor, and no sum is needed to answer.

    Args:
        reader: the frame that reads an attribute now.
        name: of the attribute.
    """
    # the instruction that the frame is at: the attribute is read by it now
    return _goes_on(reader.f_code, reader.f_lasti, name)


@functools.lru_cache(4096)  # a program has few such places, and each is passed many times
def _goes_on(code: CodeType, at: int, name: str) -> bool:
    instructions = dis.get_instructions(code)
    reads = next((one for one in instructions if one.offset == at), None)
    then = next(instructions, None)
    # `getattr(x, name)` and others tell nothing of what follows
    if reads is None or then is None or reads.opname != "LOAD_ATTR" or reads.argval != name:
        return False
    return then.opname in ("LOAD_ATTR", "LOAD_METHOD") and then.argval in _ALIKE
