"""Random contexts: what stands for all the prompts that nobody lists, drawn like the tokens of encoded captions.

Each token is drawn from the Gaussian with the mean and the covariance of the captions' tokens, and each length is that
of a caption, chosen at random.
Shapes: T tokens of all captions, S tokens of one context, D text width.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from utils.learning.flow_matching import draw_generator

MOST_TOKENS = 4096  # of one kind of captions: so that thousands of captions cost no gigabytes


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """The tokens of encoded captions, one caption after another, in bf16, and how many tokens each caption has."""

    tokens_TD: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, texts: Sequence[Tensor]) -> "TokenStatistics":
        """Those of encoded captions [S, D]."""
        return cls(torch.cat([text_SD.bfloat16() for text_SD in texts]), tuple(map(len, texts)))

    @cached_property
    def _gaussian(self) -> tuple[Tensor, Tensor]:
        """The mean [D], and a root [T, D] of the covariance: root^T root. Float32."""
        tokens_TD = self.tokens_TD.float()
        mean_D = tokens_TD.mean(0)
        return mean_D, (tokens_TD - mean_D) / math.sqrt(len(tokens_TD))

    def draw(self, generator: torch.Generator) -> Tensor:
        """A context [S, D], in bf16 as encoded captions are.

        A row of independent standard normal numbers times the root has exactly the covariance of the tokens, which
        itself, [D, D], is never needed.
        """
        mean_D, root_TD = self._gaussian
        length = self.lengths[int(torch.randint(len(self.lengths), (), generator=generator))]
        normal_ST = torch.randn(length, len(root_TD), generator=generator)
        return (mean_D + normal_ST @ root_TD).bfloat16()


@dataclass(frozen=True, eq=False)
class DrawnContexts(Sequence):
    """`count` contexts [S, D], each drawn when it is asked for, and always the same from the same seed."""

    seed: int
    statistics: TokenStatistics
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        if not 0 <= number < self.count:
            raise IndexError(number)
        return self.statistics.draw(draw_generator(self.seed, "random context", number))


def first_texts(texts: Iterable[Tensor]) -> list[Tensor]:
    """The first of the encoded captions that have at most MOST_TOKENS tokens together; one of them at least."""
    chosen, tokens = [], 0
    for text_SD in texts:
        tokens += len(text_SD)
        if chosen and tokens > MOST_TOKENS:
            break
        chosen.append(text_SD)
    return chosen
