"""Whether a reader asks only what the base tells as well, by the line that reads."""

import sys

from paramlora.model.asked import asks_the_base


class Asked:
    """Tells of each read of `weight` whether its reader asks the base."""

    def __init__(self):
        self.told = []

    @property
    def weight(self):
        self.told.append(asks_the_base(sys._getframe(1), "weight"))
        return self

    dtype = shape = T = None

    def size(self, *_):
        return self

    def sum(self):
        return self


# read outside of any assertion, whose lines pytest writes anew


def test_a_type_or_a_shape_that_is_asked_at_once_is_the_bases():
    asked = Asked()
    found = [asked.weight.dtype, asked.weight.shape, asked.weight.size(0)]
    assert found == [None, None, asked] and asked.told == [True] * 3


def test_whoever_has_the_tensor_has_the_sum():
    asked, name = Asked(), "weight"
    weight = asked.weight
    found = [weight.dtype]  # a line later: by then it is had
    found += [asked.weight.T, asked.weight.sum(), asked.weight]
    found += [getattr(asked, name).dtype]  # what a call reads goes on in no line
    assert found == [None, None, asked, asked, None] and asked.told == [False] * 5
