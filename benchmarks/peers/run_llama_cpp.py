"""Worker: llama.cpp on a GGUF file, through the C interface of llama-cpp-python."""

from __future__ import annotations

import argparse
import ctypes

import llama_cpp
import numpy as np
from protocol import Handler, Times, serve, timed

_CONTEXT_STEP = 1024


class Model:
    """A GGUF model and a context as long as its longest request."""

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), options)
        if not self._model:
            raise OSError(f"llama.cpp cannot open {path}")
        self._words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads
        self._length = 0
        self._context = None
        self._reserve(_CONTEXT_STEP)

    def answer(self, ids: list[int], tokens: int, refuse: bool) -> Times:
        """See ``protocol.Handler``."""
        if refuse:
            raise ValueError("this peer does not judge")
        self._reserve(len(ids) + tokens)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return timed(lambda: self._read(ids), lambda token: self._read([token]), tokens)

    def _reserve(self, length: int) -> None:
        if length <= self._length:
            return
        if self._context:
            llama_cpp.llama_free(self._context)
        self._length = -(-length // _CONTEXT_STEP) * _CONTEXT_STEP
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = self._length
        options.n_threads = options.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)

    def _read(self, ids: list[int]) -> int:
        """Reads tokens and returns the likeliest next one."""
        array = (llama_cpp.llama_token * len(ids))(*ids)
        failed = llama_cpp.llama_decode(
            self._context, llama_cpp.llama_batch_get_one(array, len(ids))
        )
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._words,)).argmax())


def main() -> None:
    """Serves one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))

    def load() -> Handler:
        return Model(options.model, options.threads).answer

    serve(load, ("llama-cpp-python",))


if __name__ == "__main__":
    main()
