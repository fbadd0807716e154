"""What a user may set, as frozen dataclasses. The only module that reads the environment.

Names and defaults follow llama.cpp where it has a word for the thing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs

__all__ = [
    "MAX_CONTEXT_LENGTH",
    "ChatConfig",
    "EmbedConfig",
    "Hosting",
    "Policy",
    "PoolOptions",
    "RerankConfig",
    "Role",
    "SandboxLevel",
    "VisionConfig",
    "cache_dir",
    "library_path",
    "worker_environment",
]

SandboxLevel = Literal["basic", "confined", "strict"]
"""What a worker gives up before it opens a model; see SECURITY.md.

``"basic"``: a scrubbed environment, no privileges to gain, no core dumps, no descriptors of the
host. ``"confined"``: also files, network, and other programs and processes, as far as the kernel
can take them away. ``"strict"``: all of that, or the worker does not start.
"""


# Above any real model's context (the largest known claims 10 Mi tokens). llama.cpp sets up
# bookkeeping for whatever number it is given, before it finds that memory is short.
MAX_CONTEXT_LENGTH = 1 << 24
# LLAMA_MAX_SEQ.
MAX_SEQUENCES = 256
# GGML_MAX_N_THREADS: ggml aborts above it.
_MAX_THREADS = 512


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if type(value) is not int:  # nor a bool; none but it travels to a worker
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be between {least} and {most}, not {value}")


def _path(name: str, given: object) -> str:
    path = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(path, str):  # os.PathLike may stand for bytes
        raise TypeError(f"{name} must be a name or a path, not {type(given).__name__}")
    return path


def _check_sandbox(level: str) -> None:
    if level not in get_args(SandboxLevel):
        raise ValueError(f"sandbox must be one of {get_args(SandboxLevel)}, not {level!r}")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a role's workers are watched, restarted and released. Times are in seconds."""

    start_timeout: float = 120.0
    """How long a worker may take to build its session."""
    stuck_after: float | None = 60.0
    """How long a worker with calls in flight may show no progress before it is killed; None
    never kills one. Frames, decoded tokens and looks at an abort token are progress."""
    cancel_grace: float = 2.0
    """How long a worker may go on with a call that was given up, before it is killed."""
    max_crashes: int = 3
    """Crashes within `crash_window` after which the role still gets a new worker; one more makes
    it degraded."""
    crash_window: float = 60.0
    backoff: float = 0.1
    """Pause before the second restart within the window; doubled for each further one, up to 5 s,
    and shortened at random by up to half."""
    idle_timeout: float | None = None
    """How long a worker without calls is kept; None keeps it. Pings are not calls."""
    keep_alive: bool = False
    """Never release the worker: not when it is idle, and not for the pool's memory budget."""
    max_queue: int | None = None
    """Calls in flight at most; further ones are refused with `QueueFull`. None sets no limit."""
    call_timeout: float | None = None
    """The ``timeout`` of calls that have none of their own."""

    def __post_init__(self) -> None:
        for name in ("start_timeout", "cancel_grace", "crash_window", "backoff"):
            _check_seconds(name, getattr(self, name))
        for name in ("stuck_after", "idle_timeout", "call_timeout"):
            if getattr(self, name) is not None:
                _check_seconds(name, getattr(self, name))
        _check_range("max_crashes", self.max_crashes, 0, 1 << 16)
        if self.max_queue is not None:
            _check_range("max_queue", self.max_queue, 1, 1 << 16)


def _check_policy(policy: object) -> None:
    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy, not {type(policy).__name__}")


def _check_seconds(name: str, value: float) -> None:
    try:
        fits = value >= 0  # which NaN is not
    except TypeError:
        raise TypeError(f"{name} must be a number, not {type(value).__name__}") from None
    if not fits:
        raise ValueError(f"{name} must not be negative: {value}")


_RANGES = {
    "replicas": (1, 64),
    "retry": (0, 10),
    "n_threads": (1, _MAX_THREADS),
    "n_gpu_layers": (-1, 1 << 16),
    "n_ctx": (0, MAX_CONTEXT_LENGTH),
    "n_batch": (1, MAX_CONTEXT_LENGTH),
    "n_parallel": (1, MAX_SEQUENCES),
    "n_seq_max": (1, MAX_SEQUENCES),
}


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """What the host needs to know of any role; none of it reaches the session."""

    policy: Policy | None = None
    """None takes the pool's."""
    replicas: int = 1
    """Workers at most; a call goes to the least busy one."""
    environment: Mapping[str, str] | Sequence[Mapping[str, str]] = ()
    """Variables added to the workers' environment: the same for all, or a mapping for each
    replica, such as ``[{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]``."""

    def __post_init__(self) -> None:
        if self.policy is not None:
            _check_policy(self.policy)
        for option in fields(self):
            value = getattr(self, option.name)
            is_left_open = value is None and option.default is None
            if option.name in _RANGES and not is_left_open:
                _check_range(option.name, value, *_RANGES[option.name])
        each = self.environment
        if not isinstance(each, Mapping) and len(each) not in {0, self.replicas}:
            raise ValueError(f"environment must have {self.replicas} mappings, not {len(each)}")

    def environment_of(self, replica: int) -> Mapping[str, str]:
        """The variables of one replica, counted from 0."""
        if isinstance(self.environment, Mapping):
            return self.environment
        return self.environment[replica] if self.environment else {}


@dataclass(frozen=True, kw_only=True)
class _LlamaConfig(Hosting):
    """What every llama.cpp role has in common."""

    n_threads: int | None = None
    """Threads for inference at most; None takes the CPUs this process may run on. Fewer compute
    while other processes need the CPUs, unless there is an accelerator."""
    n_gpu_layers: int = 0
    """Layers kept on an accelerator; -1 means all."""
    flash_attn: bool = True
    """Flash attention. Without it attention runs over all of a packed batch, which is slower."""
    sandbox: SandboxLevel | None = None
    """None takes ``"confined"``, or ``"basic"`` with an accelerator, whose drivers need more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sandbox is not None:
            _check_sandbox(self.sandbox)
        for name in ("model", "mmproj"):
            if hasattr(self, name):
                # Annotated as what it is from now on, since the worker reads it as that.
                object.__setattr__(self, name, _path(name, getattr(self, name)))


@dataclass(frozen=True)
class EmbedConfig(_LlamaConfig):
    """The ``embed`` role: a model name or a path to a GGUF, and how to run it."""

    model: str
    """A known name (``"minilm"``) or a path to a GGUF file."""
    n_batch: int = 2048
    """Tokens decoded together at most, so also the longest text."""
    n_seq_max: int = 64
    """Texts decoded together at most."""
    prompts: Mapping[str, str] | None = None
    """Prefixes by the name of what a text is (``"query"``, ``"document"``), besides or in place of
    those that are known for the model."""
    retry: int = 0
    """How often a call whose worker ended is made again before its caller learns of it. One whose
    worker ended while it started is not."""


@dataclass(frozen=True)
class RerankConfig(_LlamaConfig):
    """The ``rerank`` role: the path of a reranker's GGUF, and how to run it."""

    model: str
    """Path of a GGUF file."""
    n_batch: int = 2048
    """Tokens decoded together at most, so also the longest pair of query and document."""
    n_seq_max: int = 64
    """Pairs decoded together at most."""
    retry: int = 0
    """As `EmbedConfig.retry`."""


@dataclass(frozen=True)
class ChatConfig(_LlamaConfig):
    """The ``chat`` role: a model name or a path to a GGUF, and how to run it."""

    model: str
    """A known name (``"smollm2"``) or a path to a GGUF file."""
    n_ctx: int | None = None
    """Tokens that one conversation may have; 0 takes the length the model was trained with,
    None does so up to 4096."""
    n_parallel: int = 4
    """Conversations answered at once; others wait. Each takes memory for ``n_ctx`` tokens."""
    n_batch: int = 512
    """Tokens of prompts decoded together at most."""
    chat_template: str | None = None
    """A jinja template to use in place of the model's own."""


@dataclass(frozen=True)
class VisionConfig(_LlamaConfig):
    """The ``vision`` role: a chat model, the projector that lets it see, and how to run them."""

    model: str
    """A known name (``"smollm2"``) or a path to a GGUF file."""
    mmproj: str
    """Path of the projector's GGUF file, which must have been made for the model."""
    n_ctx: int | None = None
    """Context length in tokens, images included; 0 takes the length the model was trained with,
    None does so up to 4096."""
    n_batch: int = 512
    """Tokens of a prompt decoded together at most."""
    chat_template: str | None = None
    """A jinja template to use in place of the model's own."""


@dataclass(frozen=True)
class Role(Hosting):
    """A custom role: a session and its handlers, named by import path.

    Both paths have the form ``"package.module:attribute"`` and are imported in the
    worker only. ``sys.path`` of the host is handed to the worker.
    """

    session: str
    """Callable ``(role_config, abort) -> session``; a session has ``close()``."""
    handlers: str
    """Mapping of kind to ``(reply, payload, state) -> None``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Handed to the session factory as ``role_config.options``; any payload type."""
    sandbox: SandboxLevel = "basic"
    """Only the role's author knows what it needs, so more is asked for here."""
    readable: Sequence[str | os.PathLike[str]] = ()
    """Above ``"basic"``: models by name, files and folders to read, beside ``sys.path``."""
    retry: int = field(default=0, kw_only=True)
    """How often a call (not a stream) whose worker ended is made again before its caller learns
    of it. Only for a role whose calls may be served twice. One whose worker ended while it started
    is not made again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sandbox(self.sandbox)
        if isinstance(self.readable, str):
            raise TypeError("readable must be a sequence of paths, not a str")
        for name in ("session", "handlers"):
            module, separator, attribute = getattr(self, name).partition(":")
            if not (module and separator and attribute):
                raise ValueError(
                    f"{name} must look like 'package.module:attribute', not {getattr(self, name)!r}"
                )


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """What holds for every role of a pool; `inferpool.Pool` says what each means."""

    log_dir: Path | None
    log_level: str
    policy: Policy
    memory_budget: int | None
    close_timeout: float
    wait: str

    def __post_init__(self) -> None:
        _check_policy(self.policy)
        if self.wait not in {"adaptive", "park"}:
            raise ValueError(f"wait must be 'adaptive' or 'park', not {self.wait!r}")
        if self.log_level not in logging.getLevelNamesMapping():
            raise ValueError(f"unknown log_level {self.log_level!r}")
        _check_seconds("close_timeout", self.close_timeout)
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise ValueError(f"memory_budget must be positive, not {self.memory_budget}")


def cache_dir() -> Path:
    """Folder for converted models: ``INFERPOOL_CACHE_DIR``, or the user's cache folder."""
    override = os.environ.get("INFERPOOL_CACHE_DIR")
    return Path(override) if override else platformdirs.user_cache_path("inferpool")


# What a worker inherits of the environment: what the loader, the interpreter and the numerical
# libraries go by. Keys and tokens of the host are none of its business.
INHERITED_VARIABLES = [
    *("PATH", "HOME", "TMPDIR", "TZ", "LANG", "LANGUAGE", "LC_*", "LD_*", "PYTHON*"),
    *("XDG_CACHE_HOME", "INFERPOOL_*", "LLAMA_*", "GGML_*"),
    *("OMP_*", "GOMP_*", "KMP_*", "OPENBLAS_*", "MKL_*", "BLIS_*"),
    *("CUDA_*", "NVIDIA_*", "HIP_*", "HSA_*", "ROCR_*", "ROCM_*", "GPU_*", "VK_*"),
    *("ONEAPI_*", "SYCL_*", "ZE_*"),
]


def worker_environment(added: Mapping[str, str]) -> dict[str, str]:
    """The environment that workers are started with."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if any(fnmatchcase(name, pattern) for pattern in INHERITED_VARIABLES)
    }
    environment = {**inherited, **added}
    # How often idle OpenMP threads look again before they sleep: long enough to bridge the gap
    # between graph nodes, short enough that an idle worker uses no CPU. On an Intel Xeon it takes
    # 33 us; with 1000, four streams of SmolLM2 took 1.27 times as long there, and with
    # 30000 no less.
    environment.setdefault("GOMP_SPINCOUNT", "3000")
    return environment


def library_path() -> list[str]:
    """Folders where the loader, or llama-cpp-python, looks for libraries, beside their own."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [folder for folder in (*folders, os.environ.get("LLAMA_CPP_LIB_PATH")) if folder]
