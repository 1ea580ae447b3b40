"""What a low-bit model predicts against what it should, over the whole vocabulary and a few tokens at a time.

Two objectives: the divergence KL(teacher ‖ model) from a float model's predictions, and the cross entropy of the next
token. Both have their gradient in closed form, softmax(model) minus softmax(teacher) or minus the one token, so a chunk
needs two or three arrays of its logits and nothing of them outlives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Objective = Literal["kl", "ce"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

# Rows of logits that exist at a time, each as long as the vocabulary.
LOGIT_ROWS = 256


@dataclass(frozen=True)
class Wanted:
    """What rows of hidden states should predict.

    labels  [R] int64, the next tokens
    teacher  [R, hidden], normalized final hidden states of the float model; None without one
    head    [vocab, hidden], the float model's, in the type in which it is multiplied
    """

    labels: Tensor
    teacher: Tensor | None
    head: Tensor | None


@dataclass(frozen=True)
class Sums:
    """Over `tokens` rows: divergence, negative log-likelihood of the labels, rows whose highest logit is the teacher's.

    `kl` and `agreed` are zero without a teacher, `agreed` also where gradients were asked for.
    """

    tokens: int = 0
    kl: float = 0.0
    nll: float = 0.0
    agreed: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.tokens + other.tokens, self.kl + other.kl, self.nll + other.nll, self.agreed + other.agreed)

    def loss(self, objective: Objective) -> float:
        return (self.kl if objective == "kl" else self.nll) / self.tokens


@torch.no_grad()
def predict(x: Tensor, head: Tensor, wanted: Wanted, *, objective: Objective | None) -> tuple[Sums, Tensor | None]:
    """Losses of the normalized hidden states x [R, hidden] float32 under `head` [vocab, hidden], in whose type it is
    multiplied; logits, sums and gradients are float32.

    objective  whose mean over the rows is to be differentiated; None for no gradient
    returns    the sums, and the gradient [R, hidden]
    """
    grad = None if objective is None else torch.empty_like(x)
    total = Sums()
    for start in range(0, x.shape[0], LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        labels = wanted.labels[rows, None]
        own = _log_softmax(_product(x[rows], head.T))
        nll = -float(own.gather(1, labels).sum(dtype=torch.float64))
        target, kl, agreed = None, 0.0, 0
        if wanted.teacher is not None and wanted.head is not None:
            theirs = _log_softmax(_product(wanted.teacher[rows], wanted.head.T))
            if grad is None:
                agreed = int((theirs.argmax(dim=1) == own.argmax(dim=1)).sum())
            target = theirs.exp()
            kl = float(torch.linalg.vecdot(target, theirs.sub_(own)).sum(dtype=torch.float64))
            del theirs
        total += Sums(own.shape[0], kl, nll, agreed)
        if grad is not None:
            # [chunk, vocab], the gradient of the logits
            slope = own.exp_()
            if objective == "kl":
                assert target is not None
                slope.sub_(target)
            else:
                slope.scatter_add_(1, labels, torch.full(labels.shape, -1.0))
            grad[rows] = _product(slope, head)
    return total, None if grad is None else grad.div_(x.shape[0])


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(b.dtype) @ b).float()


def _log_softmax(logits: Tensor) -> Tensor:
    """In place."""
    return logits.sub_(torch.logsumexp(logits, dim=1, keepdim=True))
