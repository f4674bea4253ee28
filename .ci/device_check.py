"""Proves that a device install runs a bundle: `python device_check.py BUNDLE`.

Run it with the interpreter of an environment that holds `edge-safe[cpu]` alone.
"""

from __future__ import annotations

import importlib.util
import sys

MUST_BE_ABSENT = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "scipy")
LAZY = ("typer", "torch", "PIL", "onnxruntime", "tokenizers")


def main() -> int:
    """Returns the exit code: 0 if everything held."""
    present = [name for name in MUST_BE_ABSENT if importlib.util.find_spec(name) is not None]
    if present:
        print(f"the device install must not bring {', '.join(present)}", file=sys.stderr)
        return 1
    import edge_safe

    early = [name for name in LAZY if name in sys.modules]
    if early:
        print(f"`import edge_safe` loaded {', '.join(early)}", file=sys.stderr)
        return 1
    model = edge_safe.SafeModel.load(sys.argv[1])
    verdict = model.assess("How do I bake a cake?")
    if verdict.decision is edge_safe.Decision.ERROR:
        print(f"the gate could not decide: {verdict.reason}", file=sys.stderr)
        return 1
    # A threshold that the weights of a random bundle cannot reach, so that it answers.
    stages = model.manifest.safety.stages
    policy = edge_safe.Policy(thresholds=dict.fromkeys(stages, 1.0))
    reply = edge_safe.SafeModel.load(sys.argv[1], policy=policy).generate("Hello.", max_tokens=8)
    if reply.text is None or not 1 <= reply.usage.completion_tokens <= 8:
        print(f"no answer: {reply}", file=sys.stderr)
        return 1
    import numpy
    import onnxruntime

    print(
        f"Python {sys.version.split()[0]}, onnxruntime {onnxruntime.__version__}, "
        f"numpy {numpy.__version__}: {verdict.decision.value} at {verdict.stage}, "
        f"{reply.usage.completion_tokens} tokens answered"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
