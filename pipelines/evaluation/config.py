"""What `grpo eval` can be asked for."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config import flat_fields
from pipelines.evaluation.extractors import EXTRACTORS
from pipelines.tasks import get_task
from pipelines.templates import check_template
from rollout.engine import EngineConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """`grpo eval`: accuracy of a checkpoint, or of a served model, on a task."""

    model: str = ""
    """Folder of a Hugging Face checkpoint."""
    server: str = ""
    """Address of an OpenAI-compatible server in place of a checkpoint, as `http://host:8000/v1`."""
    server_model: str = ""
    """Name under which the server offers the model."""
    server_api: Literal["completions", "chat"] = "completions"
    """The server's endpoint: `completions` continues the prompt's exact text, `chat` gets the bare question."""
    system: str = ""
    """System message of the chat endpoint."""
    concurrency: int = 32
    """Requests to the server at a time."""
    timeout_s: float = 600.0
    """Longest wait for one answer of the server."""
    task: str = "gsm8k"
    """Name of the task."""
    template: str = ""
    """Prompt template; the task's own if none is given, `chat` for the tokenizer's."""
    shots: int = 0
    """Worked examples of the task before the question."""
    data: str | None = None
    """File or hub id; without it the task generates its rows or names its own hub id."""
    split: str = "test"
    """Split of a hub data set."""
    limit: int = 0
    """Problems to evaluate, 0 for all of a data set; generated tasks need a number."""
    reward: tuple[str, ...] = ()
    """Rewards, `[weight*]name` or `[weight*]path/to/file.py:function`; the task's own if none is given."""
    extractors: tuple[str, ...] = ()
    """Ways of reading the answer to put side by side: strict, flexible, boxed, answer, default; all of them for gsm8k.
    """
    num_samples: int = 1
    """Completions per problem."""
    pass_k: tuple[int, ...] = ()
    """The k of pass@k and cons@k; 1, 2, 4, ... up to num_samples if none is given."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that together have this probability; 1 for all."""
    top_k: int = 0
    """Draw from this many most probable tokens; 0 for all."""
    max_tokens: int = 0
    """Longest completion, 0 for the task's own."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion and are no part of it, besides the end-of-text token."""
    max_bad_share: float = 0.01
    """Share of malformed rows that may be skipped."""
    seed: int = 0
    """Of sampling, and of generated rows."""
    rescore: str = ""
    """Folder of an earlier evaluation whose completions are judged again; nothing is sampled."""
    retry_failed: bool = False
    """Sample again what failed in the evaluation that is continued."""
    out: str = "runs/eval"
    """Folder for the results."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """The engines."""

    def __post_init__(self) -> None:
        task = get_task(self.task)
        if self.limit < 0 or self.max_tokens < 0:
            name = "limit" if self.limit < 0 else "max_tokens"
            raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.num_samples < 1 or self.concurrency < 1 or not self.timeout_s > 0:
            raise ValueError(
                f"need num_samples >= 1, concurrency >= 1 and timeout_s > 0, got {self.num_samples}, "
                f"{self.concurrency} and {self.timeout_s}"
            )
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples={self.num_samples} greedy completions are all the same; set --temperature")
        if wrong := [k for k in self.pass_k if not 1 <= k <= self.num_samples]:
            raise ValueError(f"pass_k: {wrong[0]} is not between 1 and num_samples={self.num_samples}")
        if unknown := [name for name in self.extractors if name not in EXTRACTORS]:
            raise ValueError(f"unknown extractor {unknown[0]!r}; known: {', '.join(EXTRACTORS)}")
        if self.template:
            check_template(self.template)
        if bool(self.server) != bool(self.server_model):
            raise ValueError("server and server_model belong together: where to ask, and for which model")
        if self.server and self.model:
            raise ValueError(f"model={self.model!r} and server={self.server!r}: give one of them")
        if (self.server_api == "chat" or self.system) and not self.server:
            raise ValueError("server_api and system are for a server: give --server and --server-model")
        if self.server_api == "chat" and (self.template or self.shots):
            raise ValueError("template and shots have no effect at the chat endpoint, which gets the bare question")
        if self.server and self.template == "chat":
            raise ValueError("template 'chat' needs the model's tokenizer: set --server-api chat instead")
        if self.system and self.server_api != "chat":
            raise ValueError("system is for the chat endpoint: set --server-api chat")
        if self.data is None and task.make_rows is not None and self.limit < 1 and not self.rescore:
            raise ValueError(f"task {task.name} generates its problems: say how many with --limit")

    @property
    def tokens_per_completion(self) -> int:
        return self.max_tokens or get_task(self.task).max_tokens

    @property
    def shown_extractors(self) -> tuple[str, ...]:
        return self.extractors or (EXTRACTORS if self.task == "gsm8k" else ())


NOT_DECIDING = (
    "out", "retry_failed", "concurrency", "timeout_s",
    *(f"engine.{name}" for name in flat_fields(EngineConfig())
      if name not in ("kind", "dtype", "max_model_len", "num_speculative_tokens")),
)  # fmt: skip
"""Fields that change how fast an evaluation is and where it is, not what comes out."""
OF_JUDGING = ("task", "reward", "extractors", "pass_k", "rescore", "out")
"""Fields that have a say when completions are judged again."""
