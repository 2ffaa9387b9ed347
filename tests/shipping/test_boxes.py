"""What widths add to each other, against picking every number by hand."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from taildropout.shipping.boxes import added, box_of, is_within, put, runs_of, size_of, taken


@st.composite
def nested_boxes(draw):
    """A shape, and what stays of it at each of three widths: any indices of the next wider one."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    keep, widths = [set(range(size)) for size in shape], []
    for _ in range(3):
        keep = [draw(st.sets(st.sampled_from(sorted(one)))) if one else one for one in keep]
        widths.insert(0, [sorted(one) for one in keep])
    return shape, widths


@given(nested_boxes())
def test_what_each_width_adds_makes_up_the_widest(case):
    shape, widths = case
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    boxes = [box_of(shape, {d: runs_of(one) for d, one in enumerate(keep)}) for keep in widths]
    assert all(is_within(a, b) for a, b in pairwise(boxes))
    for which, (keep, widest) in enumerate(zip(widths, boxes, strict=True)):
        expected = tensor
        for dim, indices in enumerate(keep):
            expected = expected.index_select(dim, torch.tensor(indices, dtype=torch.int64))
        assert_close(taken(tensor, widest), expected)
        target = torch.full(size_of(widest), -1)
        count, narrower = 0, None
        for box in boxes[: which + 1]:
            for block in added(narrower, box):
                numbers = taken(tensor, block)
                count += numbers.numel()
                put(target, numbers, widest, block)
            narrower = box
        assert_close(target, expected)
        assert count == expected.numel()  # none of them twice


def test_what_is_not_nested_is_told():
    first, last = box_of([4, 2], {0: [0, 2]}), box_of([4, 2], {0: [1, 4]})
    assert not is_within(first, last)
    assert is_within(first, box_of([4, 2], {0: [0, 3]}))
