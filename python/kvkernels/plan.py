"""What sequences share, as the attention ops take it."""

from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """Which sequences have which tokens in common: from `plan_prefix` or `plan_decode`, for every layer of a step.

    nodes  int32 [2 B, 5], (first, last, begin, end, parent): sequences order[first] ... order[last - 1] have the tokens
           begin ... end - 1 in common, and before them those of node `parent` (-1: none). first == last: unused
    order  int32 [B], the sequences, those of a node side by side; empty ones last
    leaf   int32 [B], the node with the last tokens of each sequence; from it up through the parents stand all of them.
           -1: an empty sequence

    Made for one page table, its lengths and Tq: made again when those change, in place of the old one under a graph.
    """

    nodes: Tensor
    order: Tensor
    leaf: Tensor
