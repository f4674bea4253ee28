"""How often pebble says what its object tower's own classifier sees in a picture.

    python benchmarks/objects.py models/pebble --cutouts /usr/share/tuxpaint/stamps --pictures 120

Draws cut-outs that training held out on backgrounds, and keeps the pictures of which the tower's
published classifier, which pebble leaves out, is confident. Among the 50 labels that it gives most
often, the language model is asked what is in the picture: the name chosen is the one that its
answer would most likely be, per word piece and beside the same answer without a picture. Needs the
export extra. The last line is one JSON object:

- pictures, labels: how many were asked about, and how many labels they show
- chosen: share of the pictures for which the language model chooses the classifier's label, and
  interval: its 95 % bootstrap interval over pictures
- named, begun: share of the pictures whose tokens are the label's whole name, or begin with its
  first piece
- tokens: mean number of object tokens of such a picture
- silent_pages: share of pages of text that get no object token
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from edge_safe.models.pebble import parts
from edge_safe.models.pebble.efficientnet_lite import read_checkpoint
from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration
from edge_safe.models.pebble.object_pictures import draw_objects, draw_page, find_cutouts
from edge_safe.models.pebble.object_states import Teacher, object_names
from edge_safe.models.pebble.processing_pebble import object_pixels
from edge_safe.models.pebble.processor_settings import ObjectConfig
from edge_safe.models.pebble.tokenization_pebble import PebbleTokenizer

QUESTION = "What is in the picture?"
ANSWER = "In the picture there is a"
PAGE = "The shop is open from nine to five. Please ring the bell and wait for an answer."
CONFIDENT = 0.5


def answers(
    model: PebbleForConditionalGeneration, prompt: list[int], names: list[list[int]]
) -> Tensor:
    """(names,) mean log-probability per word piece of each name behind a prompt."""
    read = model.language_model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    longest = max(map(len, names))
    rows = torch.tensor([name + [0] * (longest - len(name)) for name in names])
    read.past_key_values.batch_repeat_interleave(len(names))
    later = model.language_model(rows, past_key_values=read.past_key_values).logits[:, :-1]
    first = read.logits[:, -1:].expand(len(names), -1, -1)
    logits = torch.cat([first, later], 1).log_softmax(-1)
    return torch.stack(
        [row[torch.arange(len(name)), name].mean() for row, name in zip(logits, names, strict=True)]
    )


def main(argv: list[str] | None = None) -> int:
    """Draws, asks, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cutouts", type=Path, nargs="+", required=True)
    parser.add_argument("--held-share", type=float, default=0.2, help="as in the recipe")
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--labels", type=int, default=50)
    options = parser.parse_args(argv)

    model = PebbleForConditionalGeneration.from_pretrained(options.checkpoint)
    tokenizer = PebbleTokenizer.from_pretrained(options.checkpoint)
    named = parts.read_parts(model.config.parts)["vision_encoder"]
    _, classifier = read_checkpoint(parts.fetch({"encoder": named})["encoder"])
    slots = model.config.vision_projector_config.slots
    backend: Tokenizer = tokenizer.backend_tokenizer
    teacher = Teacher.make(classifier, backend, slots)
    embedding: Tensor = model.get_parameter("language_model.model.embed_tokens.weight")
    settings = ObjectConfig()
    _, held = find_cutouts(options.cutouts, options.held_share)
    rng = np.random.default_rng(0)

    with torch.no_grad():
        seen: list[tuple[int, list[int]]] = []
        for _ in range(20 * options.pictures):
            picture = draw_objects(held, rng, settings.size)
            states = model.vision_encoder(object_pixels([picture], settings))
            sure, label = teacher.judge(states.mean(1))
            if sure >= CONFIDENT:
                _, _, spoken = model.vision_projector.project(states, embedding)
                seen.append((int(label), spoken.tolist()))
            if len(seen) == options.pictures:
                break
        labels = [label for label, _ in Counter(label for label, _ in seen).most_common(50)]
        others = [i for i in range(len(object_names())) if i not in labels]
        labels += others[:: max(1, len(others) // options.labels)][: options.labels - len(labels)]
        names = [teacher.pieces[i][teacher.pieces[i] >= 0].tolist() for i in labels]

        def prompt(pieces: list[int]) -> list[int]:
            message = f"{backend.decode(pieces)}\n{QUESTION}" if pieces else QUESTION
            turns = [{"role": "user", "content": message}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids: list[int] = backend.encode(f"{text}{ANSWER}", add_special_tokens=False).ids
            return ids

        without = answers(model, prompt([]), names)
        chosen, begun, whole = [], [], []
        for wanted, pieces in seen:
            if wanted not in labels:
                continue
            name = names[labels.index(wanted)]
            best = int((answers(model, prompt(pieces), names) - without).argmax())
            chosen.append(labels[best] == wanted)
            begun.append(pieces[:1] == name[:1])
            whole.append(pieces == name)
        pages = [draw_page(PAGE, rng, settings.size) for _ in range(20)]
        blank = model.vision_encoder(object_pixels(pages, settings))
        _, loud, _ = model.vision_projector.project(blank, embedding)
    drawn = np.random.default_rng(0).integers(len(chosen), size=(1000, len(chosen)))
    low, high = np.quantile(np.array(chosen)[drawn].mean(1), (0.025, 0.975))
    report = {
        "pictures": len(chosen),
        "labels": len({label for label, _ in seen}),
        "chosen": float(np.mean(chosen)),
        "interval": (float(low), float(high)),
        "named": float(np.mean(whole)),
        "begun": float(np.mean(begun)),
        "tokens": float(np.mean([len(pieces) for _, pieces in seen])),
        "silent_pages": 1 - len(set(loud.tolist())) / len(pages),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
