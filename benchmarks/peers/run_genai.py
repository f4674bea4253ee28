"""Worker: onnxruntime-genai on a folder of its own model builder."""

from __future__ import annotations

import argparse
import json
import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before the import, or it has begun

import onnxruntime_genai as genai  # noqa: TID251 - the peer itself
from protocol import Handler, Times, serve, timed


def main() -> None:
    """Serves one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    def load() -> Handler:
        config = genai.Config(options.model)
        session = {"session_options": {"intra_op_num_threads": options.threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        model = genai.Model(config)

        def answer(ids: list[int], tokens: int, refuse: bool) -> Times:
            if refuse:
                raise ValueError("this peer does not judge")
            settings = genai.GeneratorParams(model)
            length = len(ids) + tokens
            settings.set_search_options(max_length=length, min_length=length, do_sample=False)
            generator = genai.Generator(model, settings)

            def prefill() -> int:
                generator.append_tokens(ids)
                return following(0)

            def following(_: int) -> int:
                generator.generate_next_token()
                return int(generator.get_next_tokens()[0])

            return timed(prefill, following, tokens)

        return answer

    serve(load, ("onnxruntime-genai", "onnxruntime"))


if __name__ == "__main__":
    main()
