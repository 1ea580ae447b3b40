"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on the serving runtime.

The harness brings tasks, prompts and metrics; this is the model it asks. It is an optional dependency, imported with
this module, which nothing imports but the command that needs it. Texts are tokenized as the model's tokenizer does,
its beginning-of-sequence token included where it writes one, and a text that begins with it already gets no second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from dibit.engine.config import SamplingParams
from dibit.engine.errors import ConfigError, DibitError
from dibit.engine.llm import LLM
from dibit.quantize.likelihood import (
    Continuation,
    Progress,
    Writing,
    first_token,
    likelihoods,
    text_likelihoods,
    write,
)

# Only metrics without a formula for their error are resampled, this often.
BOOTSTRAPS = 1000
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class TaskResult:
    """One task or group: `metrics` by the harness's names, with `_stderr` where it knows one."""

    task: str
    version: str
    shots: int | None
    samples: int | None
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class TaskResults:
    """Of all tasks, with the harness's version."""

    harness: str
    results: tuple[TaskResult, ...]

    def text(self) -> str:
        """A line for each metric."""
        lines = []
        for result in self.results:
            about = "" if result.samples is None else f"  ({result.samples} samples, {result.shots or 0}-shot)"
            for name, value in result.metrics.items():
                if not name.endswith("_stderr"):
                    error = result.metrics.get(f"{name}_stderr")
                    spread = "" if error is None else f" ± {error:.4f}"
                    lines.append(f"{result.task:24}  {name:16}  {value:.4f}{spread}{about}")
        return "\n".join(lines)


def run_tasks(
    llm: LLM,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> TaskResults:
    """Run `tasks` by the harness's names.

    include_path   directory with task files of one's own
    shots          examples before each question; None: as the task says
    limit          first questions of each task; None: all
    chat_template  put every question into the model's chat template
    seed           of the choice of examples
    progress       called with (answered, asked) of each kind of request

    Raises ConfigError for a task that is not known or whose data cannot be had.
    """
    from importlib.metadata import version

    manager = _manager(tasks, include_path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"task {', '.join(unknown)} is not known to lm_eval {version('lm_eval')}; `lm_eval ls tasks` lists what it "
            "has, and --include-path adds a directory with your own"
        )
    model = RuntimeLM(llm, progress)
    try:
        found = evaluator.simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            apply_chat_template=chat_template,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except DibitError:
        raise
    except Exception as error:
        if model.asked:
            raise
        raise ConfigError(
            f"the tasks cannot be prepared: {type(error).__name__}: {' '.join(str(error).split())}. Their data comes "
            "from the Hugging Face Hub; without it, write a task file that reads a local file (docs/measure.md)"
        ) from error
    return TaskResults(f"lm_eval {version('lm_eval')}", tuple(_result(name, found) for name in found["results"]))


def _manager(tasks: Sequence[str], include_path: Path | None) -> TaskManager:
    """The harness's own ten thousand tasks are read only when one of them is asked for."""
    if include_path is not None:
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if all(name in own.all_tasks for name in tasks):
            return own
    return TaskManager(include_path=None if include_path is None else str(include_path))


def _result(name: str, found: Mapping[str, Any]) -> TaskResult:
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if isinstance(value, int | float) and not isinstance(value, bool) and metric not in ("sample_len", "alias"):
            metrics[metric if filtered in ("none", "") else f"{metric} ({filtered})"] = float(value)
    counts = found.get("n-samples", {}).get(name, {})
    return TaskResult(
        task=name,
        version=str(found.get("versions", {}).get(name, "")),
        shots=found.get("n-shot", {}).get(name),
        samples=counts.get("effective"),
        metrics=_renamed(metrics),
    )


def _renamed(metrics: Mapping[str, float]) -> dict[str, float]:
    """ "acc_stderr (strict)" is the error of "acc (strict)"."""
    return {
        f"{key.replace('_stderr', '', 1)}_stderr" if "_stderr" in key else key: value for key, value in metrics.items()
    }


class RuntimeLM(TemplateLM):  # type: ignore[misc]
    """The harness's view of an LLM. `asked` says whether it has asked for anything yet."""

    def __init__(self, llm: LLM, progress: Progress | None) -> None:
        super().__init__()
        self.asked = False
        self._llm = llm
        self._progress = progress
        self._first = llm.tokenizer.encode("")

    @property
    def eot_token_id(self) -> int:
        return min(self._llm.tokenizer.eos_ids)

    @property
    def prefix_token_id(self) -> int:
        return first_token(self._llm.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return "dibit"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:  # noqa: FBT001
        if add_special_tokens is not None:
            return self._llm.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        begun = self._first and string.startswith(self._llm.tokenizer.token_text(self._first[0]))
        return self._llm.tokenizer.encode(string, add_special_tokens=not begun)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: FBT001, FBT002
        # The text as it is: white space at its end, which tokens need not keep, decides how an answer begins.
        return self._llm.tokenizer.chat_text(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str:  # noqa: FBT001, FBT002
        # The harness only notes it in its results.
        return ""

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        self.asked = True
        asked = [Continuation(tuple(context), tuple(tokens)) for _, context, tokens in requests]
        return [(one.logprob, one.greedy) for one in likelihoods(self._llm, asked, progress=self._progress)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: FBT001, FBT002
        self.asked = True
        texts = [self.tok_encode(request.args[0]) for request in requests]
        return text_likelihoods(self._llm, texts, progress=self._progress)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001, FBT002
        self.asked = True
        asked = [Writing(tuple(self.tok_encode(text)), _params(given)) for text, given in (r.args for r in requests)]
        return write(self._llm, asked, progress=self._progress)


def _params(given: Mapping[str, Any]) -> SamplingParams:
    """What a task says of writing. Raises ConfigError for what cannot be done."""
    settings = dict(normalize_gen_kwargs(dict(given)))
    stop = tuple(text for text in settings.pop("until") if text)
    max_tokens = settings.pop("max_gen_toks")
    settings.pop("do_sample", None)
    chosen = {name: settings.pop(name) for name in _SAMPLING if name in settings}
    if settings:
        raise ConfigError(
            f"a task asks for {', '.join(settings)} in its generation_kwargs; supported: until, max_gen_toks, "
            f"do_sample, {', '.join(_SAMPLING)}"
        )
    chosen.setdefault("temperature", 0.0)
    return SamplingParams(max_tokens=max_tokens, stop=stop, seed=0, **chosen)
