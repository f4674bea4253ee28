"""Worker: transformers on torch, float32, on an ordinary checkpoint folder."""

from __future__ import annotations

import argparse

import torch
from protocol import Handler, Times, serve, timed
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    """Serves one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()

    def load() -> Handler:
        torch.set_num_threads(options.threads)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()

        def answer(ids: list[int], tokens: int, refuse: bool) -> Times:
            if refuse:
                raise ValueError("this peer does not judge")
            cache = DynamicCache(config=model.config)

            def read(new: list[int]) -> int:
                found = model(
                    input_ids=torch.tensor([new]),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                return int(found.logits[0, -1].argmax())

            with torch.inference_mode():
                return timed(lambda: read(ids), lambda token: read([token]), tokens)

        return answer

    serve(load, ("torch", "transformers"))


if __name__ == "__main__":
    main()
