"""EfficientQAT: Block-AP, then the step sizes of the whole model end to end.

Chen, Shao, Xu, Wang, Zhang, Gao, Zhang, Qiao and Luo, "EfficientQAT: Efficient Quantization-Aware Training for Large
Language Models", ACL 2025. The first phase (block_ap.py) is block-wise and chooses the codes; the second
(end_to_end.py) keeps them and corrects what errors of single blocks add up to. The pipeline runs the phases one after
the other, each of them resumable (two_phases.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

from dibit.quantize.end_to_end import EndToEnd
from dibit.quantize.end_to_end_loss import Objective
from dibit.quantize.methods.block_ap import BlockAP


@dataclass(frozen=True)
class EfficientQAT(BlockAP):
    """The options of Block-AP, of which `held_out` is that of both phases, and those of the second phase:

    objective     kl, the divergence from the float model's predictions, or ce, the next token as in the paper
    end_steps     optimizer steps
    end_batch     sequences in a step
    end_scale_rate, end_norm_rate  learning rates of step sizes and norms at 2 bits, in their mean size; half as much
                  with each bit more
    """

    objective: str = "kl"
    end_steps: int = 100
    end_batch: int = 4
    end_scale_rate: float = EndToEnd.scale_rate
    end_norm_rate: float = EndToEnd.norm_rate

    def __post_init__(self) -> None:
        super().__post_init__()
        self.end_to_end()

    def blocks(self) -> BlockAP:
        """The first phase."""
        return BlockAP(**{field.name: getattr(self, field.name) for field in dataclasses.fields(BlockAP)})

    def end_to_end(self) -> EndToEnd:
        """The second."""
        return EndToEnd(
            objective=cast(Objective, self.objective),
            steps=self.end_steps,
            batch=self.end_batch,
            held_out=self.held_out,
            scale_rate=self.end_scale_rate,
            norm_rate=self.end_norm_rate,
            precision=self.precision,
        )
