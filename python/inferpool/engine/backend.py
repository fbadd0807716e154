"""The native library: its symbols checked, its logs routed, initialised once.

Every other module of the engine takes ``lib`` from here.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import re
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferpool.errors import ModelLoadError

try:
    # The bindings look up every symbol while they are imported.
    from llama_cpp import llama_cpp as lib
except (AttributeError, OSError, RuntimeError) as error:
    raise ImportError(
        f"llama-cpp-python's bindings and its native library don't fit together: {error}. "
        "hint: reinstall llama-cpp-python, and unset LLAMA_CPP_LIB_PATH"
    ) from error

__all__ = [
    "init_backend",
    "lib",
    "may_repack",
    "missing_symbols",
    "model_params",
    "native_bridge",
    "native_errors",
]

# What the engine calls, with the number of arguments it passes: ctypes lets surplus
# arguments through to C, so a changed signature would otherwise go unnoticed.
_REQUIRED = {
    "llama_backend_init": 0,
    "llama_context_default_params": 0,
    "llama_decode": 2,
    "llama_free": 1,
    "llama_get_embeddings_seq": 2,
    "llama_get_logits_ith": 2,
    "llama_get_memory": 1,
    "llama_init_from_model": 2,
    "llama_log_set": 2,
    "llama_memory_clear": 2,
    "llama_memory_seq_cp": 5,
    "llama_memory_seq_rm": 4,
    "llama_model_chat_template": 2,
    "llama_model_cls_label": 2,
    "llama_model_default_params": 0,
    "llama_model_free": 1,
    "llama_model_get_vocab": 1,
    "llama_model_has_encoder": 1,
    "llama_model_load_from_file": 2,
    "llama_model_meta_val_str": 4,
    "llama_model_n_cls_out": 1,
    "llama_model_n_ctx_train": 1,
    "llama_model_n_embd_inp": 1,
    "llama_model_n_embd_out": 1,
    "llama_n_batch": 1,
    "llama_pooling_type": 1,
    "llama_print_system_info": 0,
    "llama_sampler_accept": 2,
    "llama_sampler_apply": 2,
    "llama_sampler_chain_add": 2,
    "llama_sampler_chain_default_params": 0,
    "llama_sampler_chain_init": 1,
    "llama_sampler_free": 1,
    "llama_sampler_init_dist": 1,
    "llama_sampler_init_dry": 7,
    "llama_sampler_init_grammar": 3,
    "llama_sampler_init_greedy": 0,
    "llama_sampler_init_logit_bias": 3,
    "llama_sampler_init_min_p": 2,
    "llama_sampler_init_mirostat": 5,
    "llama_sampler_init_mirostat_v2": 3,
    "llama_sampler_init_penalties": 5,
    "llama_sampler_init_temp": 1,
    "llama_sampler_init_top_k": 1,
    "llama_sampler_init_top_p": 2,
    "llama_sampler_init_typical": 2,
    "llama_sampler_init_xtc": 4,
    "llama_sampler_sample": 3,
    "llama_set_abort_callback": 3,
    "llama_set_n_threads": 3,
    "llama_token_to_piece": 6,
    "llama_tokenize": 7,
    "llama_vocab_bos": 1,
    "llama_vocab_eos": 1,
    "llama_vocab_get_add_bos": 1,
    "llama_vocab_get_add_eos": 1,
    "llama_vocab_get_add_sep": 1,
    "llama_vocab_get_attr": 2,
    "llama_vocab_get_suppress_tokens": 2,
    "llama_vocab_get_text": 2,
    "llama_vocab_is_eog": 2,
    "llama_vocab_n_tokens": 1,
    "llama_vocab_type": 1,
    "llama_vocab_sep": 1,
}

# Not bound by llama_cpp, but exported by what it loads.
_UNBOUND = ["ggml_set_abort_callback"]

# What compilers write into the section .comment of a library, and requirements/llama-cpp.h does.
_GCC_VERSION = re.compile(rb"GCC: \([^)]*\) (\d+)\.(\d+)\.")
_CLANG = b"clang version "
_CONFIGURATION_IS_WHOLE = b"ldtilecfg: 64 bytes"

# enum ggml_log_level of ggml.h. Text without a level (0) is what the library would print.
_LEVELS = {0: logging.INFO, 1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUED = 5


class _LogBridge:
    """Turns llama.cpp's log callback into records of the logger ``llama.cpp``.

    A message may come in pieces: a piece of level "continued" belongs to the one before,
    and a record is emitted at the end of its line. Any native thread may log.
    """

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=4)
        self._logger = logging.getLogger("llama.cpp")
        self._lock = threading.Lock()
        self._level = logging.INFO
        self._pending = ""

    def __call__(self, native_level: int, text: bytes | None, _user_data: Any) -> None:
        piece = (text or b"").decode("utf-8", "replace")
        with self._lock:
            lines = []
            if native_level != _CONTINUED:
                if self._pending:
                    lines.append((self._level, self._pending))
                    self._pending = ""
                self._level = _LEVELS.get(native_level, logging.INFO)
            *complete, self._pending = (self._pending + piece).split("\n")
            lines += [(self._level, line) for line in complete]
        for level, line in lines:
            if line.strip():
                self._emit(level, line.rstrip())

    def flush(self) -> None:
        """Log a message whose end has not come."""
        self(logging.NOTSET, b"", None)

    def _emit(self, level: int, line: str) -> None:
        if level >= logging.ERROR:
            self.errors.append(line)
        self._logger.log(level, "%s", line)


_bridge = _LogBridge()
# The library keeps only the address, so this object must live as long as the process.
native_bridge = lib.llama_log_callback(_bridge)


def _on_abort(message: bytes | None) -> None:
    """Say in the log why ggml is about to end the process.

    In place of its own report, which starts a debugger for a backtrace if there is one, and so
    keeps the dead waiting.
    """
    _bridge.flush()
    logging.getLogger("ggml").critical("ggml_abort: %s", (message or b"").decode(errors="replace"))


_native_on_abort = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_on_abort)


@functools.cache
def init_backend() -> None:
    """Check and initialise the native library; later calls do nothing.

    Raises:
        ModelLoadError: if the installed llama-cpp-python lacks something the engine needs.
    """
    problems = missing_symbols(lib, _REQUIRED)
    problems += [f"{name} is missing" for name in _UNBOUND if not hasattr(lib._lib, name)]
    if problems:
        raise ModelLoadError(
            f"the installed llama-cpp-python does not fit this version of inferpool: "
            f"{', '.join(problems)}"
        )
    lib.llama_log_set(native_bridge, ctypes.c_void_p(0))
    lib._lib.ggml_set_abort_callback(_native_on_abort)
    lib.llama_backend_init()


def model_params() -> lib.llama_model_params:
    """Default parameters of a model, but for what is broken in the installed library."""
    params: lib.llama_model_params = lib.llama_model_default_params()
    params.use_extra_bufts = may_repack(Path(lib._lib._name).parent)
    if not params.use_extra_bufts:
        logging.getLogger("llama.cpp").warning(
            "AMX is not used: llama-cpp-python was compiled by a GCC that breaks it. "
            "hint: compile it with inferpool's requirements/llama-cpp.h, or GCC 14"
        )
    return params


def may_repack(folder: Path) -> bool:
    """Whether the llama.cpp in ``folder`` can work with the weights that it repacks.

    GCC before 14, 13.3 and 12.4 leaves out most of the tile configuration that ggml's AMX kernels
    load, and the first product of a quantised model is a SIGSEGV (https://gcc.gnu.org/PR114098).
    That can't be found out by trying: in place of what is left out there is what happens to lie on
    the stack. But compilers, and requirements/llama-cpp.h, say in a library what made it.
    """
    if b"AMX_INT8 = 1" not in lib.llama_print_system_info():
        return True
    libraries = [path.read_bytes() for path in folder.glob("libggml-cpu*.so")]
    return bool(libraries) and all(map(_configures_tiles, libraries))


def _configures_tiles(library: bytes) -> bool:
    if _CONFIGURATION_IS_WHOLE in library or _CLANG in library:
        return True
    versions = [(int(major), int(minor)) for major, minor in _GCC_VERSION.findall(library)]
    # Older ones are those of the start-up objects of the C library.
    major, minor = max(versions, default=(0, 0))
    return major > 13 or minor >= {12: 4, 13: 3}.get(major, math.inf)


def missing_symbols(bindings: Any, required: Mapping[str, int]) -> list[str]:
    """Describe what ``bindings`` lack of what the engine calls; empty when all is there.

    Args:
        bindings: a module of ctypes functions.
        required: how many arguments the engine passes, by name of the function.
    """
    problems = []
    for name, n_arguments in required.items():
        function = getattr(bindings, name, None)
        if function is None:
            problems.append(f"{name} is missing")
        elif len(function.argtypes) != n_arguments:
            problems.append(
                f"{name} takes {len(function.argtypes)} arguments instead of {n_arguments}"
            )
    return problems


def native_errors() -> str:
    """Take the last error lines that llama.cpp logged, for the message of an exception."""
    lines = list(_bridge.errors)
    _bridge.errors.clear()
    return "; ".join(lines)
