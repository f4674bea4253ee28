"""Quantizes a float32 GGUF file by llama.cpp's own quantizer: `quantize_gguf.py IN OUT FORMAT`."""

from __future__ import annotations

import sys

import llama_cpp

FORMATS = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}

if __name__ == "__main__":
    source, target, name = sys.argv[1:]
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = FORMATS[name]
    sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), options))
