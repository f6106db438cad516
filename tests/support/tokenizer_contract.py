"""What every tokenizer must do, whatever it is made of: used by the tests of each system."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import vtok_fast
from vtok_fast import parity
from vtok_fast.io.tokens import Tokens


def clip(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A video in [-1, 1] of that shape."""
    return (
        torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    ).to(dtype)


def randomize(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Random values for every parameter, so that nothing is hidden behind a zero or a one; a weight of a norm
    stays near one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        around = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(around + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def check_tokens(model, video: torch.Tensor, path) -> None:
    """Counts, decode(encode) = forward, and a token file that comes back bit-equal."""
    tokens = model.encode(video)
    size = tuple(video.shape[2:])
    assert (
        tokens.grid == model.token_grid(*size)
        and tokens.video_shape == size
        and tokens.batch == video.shape[0]
    )
    channels = 1 if tokens.latents is None else tokens.latents.shape[1]
    assert model.num_tokens(*size) * tokens.batch * channels == tokens.data.numel()
    with torch.no_grad():
        expected = model(video)
    assert expected.shape == video.shape
    assert torch.equal(model.decode(tokens), expected)
    assert torch.equal(model.reconstruct(video).video, expected)
    tokens.save(path)
    loaded = Tokens.load(path)
    assert torch.equal(loaded.data, tokens.data) and loaded.data.dtype == tokens.data.dtype
    assert (loaded.model, loaded.config, loaded.video_shape, loaded.dtype) == (
        tokens.model,
        tokens.config,
        size,
        video.dtype,
    )
    assert torch.equal(model.decode(loaded), expected)


def check_files(model, video: torch.Tensor, folder, **parts) -> None:
    """`save` and `from_checkpoint` give the same model; other files are refused."""
    kind, path = type(model), folder / "model.safetensors"
    model.save(path)
    expected = model.encode(video).data
    assert torch.equal(kind.from_checkpoint(path, **parts).encode(video).data, expected)
    torch.save({"state_dict": model.own_state()}, folder / "plain.ckpt")
    loaded = kind.from_checkpoint(folder / "plain.ckpt", model.config, **parts)
    assert torch.equal(loaded.encode(video).data, expected) and not any(
        p.is_meta for p in loaded.parameters()
    )
    other = replace(model.config, in_channels=model.config.in_channels + 1)
    with pytest.raises(
        ValueError, match="holds .* with in_channels=.*, which was asked for, has in_channels="
    ):
        kind.from_checkpoint(path, other, **parts)
    assert kind.from_checkpoint(path, dtype=torch.float64, **parts).parameter.dtype == torch.float64
    with pytest.raises(ValueError, match="does not say what model"):
        kind.from_checkpoint(folder / "plain.ckpt", **parts)
    with pytest.raises(FileNotFoundError, match="absent"):
        kind.from_checkpoint(folder / "absent.ckpt", **parts)
    state = dict(model.own_state())
    del state[next(iter(state))]
    torch.save(state, folder / "less.ckpt")
    with pytest.raises(ValueError, match="does not fit.*1 missing"):
        kind.from_checkpoint(folder / "less.ckpt", model.config, **parts)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated"):
        kind.from_checkpoint(path, **parts)


def check_refusals(model, video: torch.Tensor) -> None:
    """Wrong videos and tokens raise what names them."""
    tokens, (h, w) = model.encode(video), video.shape[3:]
    for bad, error, message in (
        ("clip.mp4", TypeError, "video must be a tensor, not str"),
        (video.to(torch.uint8), TypeError, "video is torch.uint8"),
        (video.double(), TypeError, "video is torch.float64"),
        (video[0], ValueError, "B, C, T, H, W"),
        (video[:, :2], ValueError, "2 channels"),
        (video[:0], ValueError, "empty"),
        (video[:, :, :0], ValueError, "empty"),
        (video[..., :-1], ValueError, f"{h}x{w - 1}.*multiples of"),
        (video / 0, ValueError, "NaN or infinite"),
    ):
        with pytest.raises(error, match=message):
            model.encode(bad)
    kind = "latents" if tokens.indices is None else "indices"
    for bad, error, message in (
        (tokens.data, TypeError, "not Tensor"),
        (replace(tokens, model="nobody/x"), ValueError, "nobody/x"),
        (replace(tokens, **{kind: tokens.data[..., :-1]}), ValueError, "positions"),
    ):
        with pytest.raises(error, match=message):
            model.decode(bad)
    if tokens.indices is None:
        with pytest.raises(ValueError, match="channels, the model has"):
            model.decode(replace(tokens, latents=tokens.latents[:, 1:]))
        with pytest.raises(ValueError, match="NaN"):
            model.decode(replace(tokens, latents=tokens.latents * float("nan")))
    else:
        with pytest.raises(ValueError, match="the codebook has"):
            model.decode(replace(tokens, indices=tokens.indices + model.codebook_size))


def check_gradients(model, video: torch.Tensor) -> None:
    """Every parameter that learns gets a gradient, and so does the video."""
    model.train()
    video = video.clone().requires_grad_()
    result = model.reconstruct(video, step=1)
    (result.video.square().mean() + result.loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), (
                name
            )
        else:
            assert parameter.grad is None, name
    assert video.grad.isfinite().all() and video.grad.any()


def check_autocast(model, video: torch.Tensor) -> None:
    """Under bfloat16 autocast the model trains: outputs stay within a bfloat16 model's reach of float32's,
    gradients are finite."""
    model.eval()
    with torch.no_grad():
        expected = model(video)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        result = model.reconstruct(video, step=1)
    (result.video.float().square().mean() + result.loss).backward()
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = model.eval()(video)
    assert (y - expected).norm() < 0.1 * expected.norm()


def check_stream(model, video: torch.Tensor, stream) -> None:
    """Windows that do not overlap: each is a video of its own."""
    parts, frames = [], video.shape[2]
    for start, end in stream.chunks(frames):
        tokens = stream.encode_chunk(video[:, :, start:end])
        assert torch.equal(tokens.data, model.encode(video[:, :, start:end]).data)
        parts.append(stream.decode_chunk(tokens))
        assert torch.equal(parts[-1], model.decode(tokens))
    assert torch.cat(parts, dim=2).shape == video.shape


def check_acceleration(model, video: torch.Tensor) -> vtok_fast.Report:
    """Accelerated, outputs and gradients are close to those of the float64 model with the reference ops;
    reverting gives it back.

    Each of n swapped layers may have the floor of the contract *close* for an error, and these errors are
    independent: sqrt(n) floors are allowed for the output, which has come through all of them, or twice its
    error without swaps. A gradient has come through all of them twice.
    """
    double = copy.deepcopy(model).double()
    with vtok_fast.backend("reference"):
        eager, ref64 = _outputs(model, video), _outputs(double, video.double())
    before = _outputs(model, video)
    report = vtok_fast.accelerate(model, example=video)
    assert not [e for e in report.skipped if e.error is not None], report
    fast = _outputs(model, video)
    # Swapped layers follow one another: independent errors add up as a root of their number.
    measured = parity.close(fast["video"], ref64["video"], eager["video"])
    together = parity.floor(video.dtype) * max(1, len(report.swapped)) ** 0.5
    assert measured.error <= max(measured.bound, together), measured
    errors, eager_errors = (
        {
            (name, region): error
            for name in ref64
            if name != "video"
            for region, error in parity.relative_errors(outputs[name], ref64[name]).items()
        }
        for outputs in (fast, eager)
    )
    # What is compared here are gradients: each passes every swap twice, forward and backward, and each pass
    # may be off by the floor of its contract; independent errors add up as a root of their number.
    passes = 2 * max(1, len(report.swapped))
    bound = max(2 * max(eager_errors.values()), parity.floor(video.dtype) * passes**0.5)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= bound, (worst, errors[worst], bound)
    report.revert()
    after = _outputs(model, video)
    assert all(torch.equal(after[name], before[name]) for name in before)
    return report


def _outputs(model, video: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    video = video.clone().requires_grad_()
    y = model(video)
    y.square().mean().backward()
    grads = {
        f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    return {"video": y.detach(), "gradient of the video": video.grad, **grads}


def check_learning(model, video: torch.Tensor, steps: int, learning_rate: float) -> None:
    """A few steps on one clip lower its error by a quarter at least: the gradients point the right way."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    errors = []
    for step in range(steps):
        result = model.reconstruct(video, step=step)
        error = (result.video - video).abs().mean()
        optimizer.zero_grad()
        (error + 1e-6 * result.loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.75 * errors[0], errors


def check_compile(model, video: torch.Tensor, *, fullgraph: bool = True) -> None:
    """torch.compile takes the model, without a break where there is none to be expected."""
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
        torch.testing.assert_close(compiled(video), model(video))
