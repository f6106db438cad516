"""A video before a language model: VTok's key-frame and residual tokens as `inputs_embeds` of any causal LM
of `transformers`.

    python examples/vtok_llm.py clip.mp4 --vtok vtok.safetensors --llm FOLDER --prompt "What moves?"

FOLDER holds a causal LM and its tokenizer, as `save_pretrained` writes them. The projection between the two
must be trained (`VideoLM` is an ordinary module; `probe` below is such a training in small); without
--projection it is random, and the answer is noise.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok_fast import TokenClip, fsq_decode
from vtok_fast.models import VTok

DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}


class VideoLM(nn.Module):
    """A causal LM that reads video tokens (B, N, token_dim) before its text.

    Args:
        llm: any causal LM of `transformers` (or what has its `get_input_embeddings()`, and takes
            inputs_embeds).
        token_dim: channels of a video token. A linear layer takes it to the width of the LM's embeddings.
    """

    def __init__(self, llm: nn.Module, token_dim: int):
        super().__init__()
        self.llm = llm
        embeddings = llm.get_input_embeddings()
        width = embeddings.weight.shape[1]
        self.project = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, width)).to(
            embeddings.weight
        )

    def embeds(self, tokens: Tensor, input_ids: Tensor) -> Tensor:
        """[video | text] (B, N + L, width) of tokens (B, N, token_dim) and input_ids (B, L). Raises
        ValueError for other shapes."""
        if tokens.dim() != 3 or tokens.shape[2] != self.project[0].normalized_shape[0]:
            raise ValueError(
                f"tokens of {tuple(tokens.shape)}: expected (B, N, {self.project[0].normalized_shape[0]})"
            )
        if input_ids.dim() != 2 or len(input_ids) != len(tokens):
            raise ValueError(
                f"input_ids of {tuple(input_ids.shape)}: expected ({len(tokens)}, L), one row for each video"
            )
        text = self.llm.get_input_embeddings()(input_ids)
        return torch.cat((self.project(tokens.to(self.project[1].weight)), text), dim=1)

    def forward(self, tokens: Tensor, input_ids: Tensor) -> Tensor:
        """Logits (B, L, vocabulary): those at position i are of what follows input_ids[:, i]."""
        logits = self.llm(inputs_embeds=self.embeds(tokens, input_ids)).logits
        return logits[:, tokens.shape[1] :]

    @torch.no_grad()
    def generate(self, tokens: Tensor, input_ids: Tensor, **options) -> Tensor:
        """The ids that follow; options as for `llm.generate`."""
        embeds = self.embeds(tokens, input_ids)
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)


def codes_of(clips: list[TokenClip], levels: Sequence[int]) -> Tensor:
    """The FSQ codes (B, N, len(levels)) of clips of a corpus, as `VideoLM` reads them: each as long as the
    shortest. With it as `collate`, a `TokenLoader` gives batches for training:

    TokenLoader(TokenDataset("tokens"), 8, collate=partial(codes_of, levels=levels))
    """
    shortest = min(len(clip.indices) for clip in clips)
    return fsq_decode(torch.stack([clip.indices[:shortest] for clip in clips]), levels, dim=2)


# The probe: which way does the picture move?


def moving(
    pictures: list[Tensor], dice: random.Random, count: int, frames: int, size: int
) -> tuple[Tensor, Tensor]:
    """`count` videos (count, 3, frames, size, size) of a window that slides over a picture (3, H, W) by one
    or two pixels per frame, and the numbers (count) of the directions in which what is seen moves."""
    videos, labels = [], []
    for _ in range(count):
        picture, label, speed = dice.choice(pictures), dice.randrange(len(DIRECTIONS)), dice.choice((1, 2))
        way = list(DIRECTIONS.values())[label]
        corner = []
        for axis, step in enumerate(way):
            reach = speed * (frames - 1) * -step  # the window goes the other way
            lowest, highest = max(0, -reach), picture.shape[1 + axis] - size - max(0, reach)
            if highest < lowest:
                raise ValueError(
                    f"pictures: {tuple(picture.shape)} is too small for {frames} frames of {size}x{size}"
                )
            corner.append(dice.randint(lowest, highest))
        tops = [[c - speed * t * step for c, step in zip(corner, way, strict=True)] for t in range(frames)]
        videos.append(torch.stack([picture[:, y : y + size, x : x + size] for y, x in tops], dim=1))
        labels.append(label)
    return torch.stack(videos), torch.tensor(labels)


def probe(
    encode: Callable[[Tensor], Tensor],
    lm: Callable[[], nn.Module],
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    steps: int,
    seed: int = 0,
) -> float:
    """The share of right answers on `test` of a LM that is trained to name the direction after reading
    encode(videos) (B, N, C).

    Ids 0 to 3 of its vocabulary are the directions, 4 is the question.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        known, unknown = (
            torch.cat([encode(part) for part in videos.split(8)]) for videos, _ in (training, test)
        )
    mean, std = known.mean((0, 1)), known.std((0, 1)) + 1e-6
    known, unknown = (known - mean) / std, (unknown - mean) / std
    model = VideoLM(lm(), known.shape[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    question = torch.full((len(known), 1), len(DIRECTIONS))
    for _ in range(steps):
        chosen = torch.randint(len(known), (32,))
        loss = F.cross_entropy(model(known[chosen], question[chosen])[:, 0], training[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(unknown, torch.full((len(unknown), 1), len(DIRECTIONS)))[
            :, 0, : len(DIRECTIONS)
        ]
    return (logits.argmax(1) == test[1]).double().mean().item()


def tiny_lm(vocabulary: int = 8, width: int = 64, layers: int = 2) -> nn.Module:
    """A causal LM with random weights, of the architecture of Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=512,
        )
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("video", type=Path)
    parser.add_argument("--vtok", type=Path, required=True, help="a VTok that `save` wrote")
    parser.add_argument(
        "--clip", type=Path, help="folder of the CLIP vision model that the VTok needs, if it has no own ViT"
    )
    parser.add_argument("--llm", type=Path, required=True, help="folder of a causal LM and its tokenizer")
    parser.add_argument("--projection", type=Path, help="a state dict of VideoLM.project (.pt)")
    parser.add_argument("--prompt", default="Describe the video.")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--words", type=int, default=32, help="new tokens at most")
    options = parser.parse_args(argv)

    from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

    from vtok_fast.io.video import read_video
    from vtok_fast.models.vtok.backbones import CLIPBackbone

    parts = {"backbone": CLIPBackbone(CLIPVisionModel.from_pretrained(options.clip))} if options.clip else {}
    vtok = VTok.from_checkpoint(options.vtok, **parts).eval()
    words = AutoTokenizer.from_pretrained(options.llm)
    model = VideoLM(AutoModelForCausalLM.from_pretrained(options.llm), vtok.config.token_dim).eval()
    if options.projection:
        model.project.load_state_dict(torch.load(options.projection, weights_only=True))
    video = read_video(options.video, size=(options.size, options.size), frames=options.frames).video
    tokens = vtok.sequence(vtok.encode(video[None]))
    ids = words(options.prompt, return_tensors="pt").input_ids
    print(
        words.decode(model.generate(tokens, ids, max_new_tokens=options.words)[0], skip_special_tokens=True)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
