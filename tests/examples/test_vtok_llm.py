"""Video tokens before a language model: shapes, gradients, generation, and the probe."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("transformers")

from vtok_llm import DIRECTIONS, VideoLM, main, moving, probe, tiny_lm

from vtok_fast.models import VTok


@pytest.fixture(scope="module")
def parts():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vtok = VTok(
        dim=16,
        depth=1,
        heads=2,
        key_grid=(2, 2),
        token_dim=10,
        motion_hidden=12,
        patch=8,
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
    ).eval()
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    yield (
        VideoLM(tiny_lm(width=16, layers=1), 10).eval(),
        vtok.sequence(vtok.encode(video)),
        torch.tensor([[5, 6, 7], [1, 2, 3]]),
    )
    torch.set_num_threads(threads)


def test_the_lm_reads_the_video_first(parts):
    model, tokens, ids = parts
    assert tokens.shape == (2, 4 + 4, 10)
    logits = model(tokens, ids)
    assert logits.shape == (2, 3, 8)
    whole = model.llm(
        inputs_embeds=torch.cat((model.project(tokens), model.llm.get_input_embeddings()(ids)), 1)
    ).logits
    assert torch.equal(logits, whole[:, 8:])
    # Another video, another answer
    assert not torch.allclose(model(tokens + 1 - 2 * (torch.arange(10) % 2), ids), logits)
    later = ids.clone()
    later[:, 2] = 0
    assert torch.allclose(model(tokens, later)[:, :2], logits[:, :2], atol=1e-6)  # causal


def test_the_projection_learns(parts):
    model, tokens, ids = parts
    model(tokens, ids).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.project.parameters())


def test_generate(parts):
    model, tokens, ids = parts
    said = model.generate(tokens, ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    logits = model(tokens, ids)[:, -1].detach()
    logits[:, model.llm.generation_config.eos_token_id] = -torch.inf  # min_new_tokens forbids the end
    assert said.shape == (2, 4) and torch.equal(said[:, 0], logits.argmax(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((slice(None), slice(None), slice(9)), "expected \\(B, N, 10\\)"),
        ((slice(1),), "one row for each video"),
    ],
)
def test_wrong_shapes_are_refused(parts, change, message):
    model, tokens, ids = parts
    with pytest.raises(ValueError, match=message):
        model(tokens[change], ids)


def test_the_command_with_a_backbone_of_clip(tmp_path, capsys):
    pytest.importorskip("av")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast

    from vtok_fast.io.video import write_video
    from vtok_fast.models.vtok.backbones import CLIPBackbone

    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    VTok(
        backbone=CLIPBackbone(clip),
        feature_dim=16,
        key_grid=(2, 2),
        token_dim=8,
        motion_hidden=8,
        patch=8,
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
    ).save(tmp_path / "vtok.safetensors")
    vocabulary = ("?", "what", "moves", "the", "left", "right", "up", "down")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "llm")
    llm = tiny_lm(width=16, layers=1)
    llm.config.eos_token_id = llm.generation_config.eos_token_id = (
        None  # it has no end: it says as many words as it may
    )
    llm.save_pretrained(tmp_path / "llm")
    write_video(tmp_path / "clip.mp4", torch.rand(3, 6, 32, 32) * 2 - 1)
    options = [
        str(tmp_path / "clip.mp4"),
        "--vtok",
        str(tmp_path / "vtok.safetensors"),
        "--clip",
        str(tmp_path / "clip"),
        "--llm",
        str(tmp_path / "llm"),
        "--prompt",
        "what moves",
        "--frames",
        "4",
        "--size",
        "16",
        "--words",
        "3",
    ]
    assert main(options) == 0
    said = capsys.readouterr().out.split()
    assert len(said) == 3 and set(said) <= set(vocabulary)


def test_windows_slide_as_they_are_labeled():
    """What is at p in one frame is at p + step in the next one."""
    picture = torch.arange(3 * 64 * 64, dtype=torch.float32).reshape(3, 64, 64)
    videos, labels = moving([picture], random.Random(0), 40, 4, 16)
    assert videos.shape == (40, 3, 4, 16, 16) and set(labels.tolist()) == {0, 1, 2, 3}
    for video, label in zip(videos, labels, strict=True):
        y, x = list(DIRECTIONS.values())[label]
        found = []
        for speed in (1, 2):
            seen = video[:, 1].roll((-speed * y, -speed * x), dims=(1, 2))
            found.append(torch.equal(seen[:, 4:12, 4:12], video[:, 0, 4:12, 4:12]))
        assert sum(found) == 1
    with pytest.raises(ValueError, match="too small"):
        moving([picture], random.Random(0), 40, 60, 32)


def test_the_probe_learns_what_is_there_and_not_what_is_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (192,), generator=generator)
    videos = 0.3 * torch.randn(192, 3, 6, generator=generator)
    telling = videos.clone()
    telling[torch.arange(192), 1, labels] += 4
    halves = slice(None, 128), slice(128, None)
    right = [
        probe(
            lambda v: v,
            lambda: tiny_lm(width=16, layers=1),
            *[(x[half], labels[half]) for half in halves],
            steps=120,
        )
        for x in (telling, videos)
    ]
    assert right[0] > 0.85 and right[1] < 0.5
