"""The models by name, and what every command asks of its files before anything is loaded: a mistake is said
at once, without waiting for torch."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

# As `Config.presets` of each system has them, which importing torch would take seconds to tell; a test
# compares.
MODELS: dict[str, tuple[str, ...]] = {
    "cosmos": (
        *("0.1-DV4x8x8", "0.1-DV8x8x8", "0.1-DV8x16x16", "0.1-CV4x8x8", "0.1-CV8x8x8", "0.1-CV8x16x16"),
        *("predict1-DV4x8x8-360p", "predict1-DV8x16x16-720p", "predict1-CV4x8x8-360p"),
        *("predict1-CV8x8x8-720p", "tiny"),
    ),
    "infotok": ("flex-4x8x8", "tiny"),
    "promag": (
        *("4x_8chn", "4x_16chn", "8x_8chn", "8x_16chn", "16x_8chn", "16x_16chn", "direct_8x_8chn"),
        *("direct_16x_8chn", "tiny", "tiny_8x", "tiny_16x", "tiny_direct_8x"),
    ),
    "tivtok": ("t128", "t512", "t1024", "tiny"),
    "vidtok": (
        *("fsq_causal_488_4096", "fsq_causal_488_32768", "fsq_causal_488_262144", "fsq_causal_41616_262144"),
        *("fsq_noncausal_488_262144", "fsq_noncausal_41616_262144", "kl_causal_488_4chn"),
        *("kl_causal_488_8chn", "kl_causal_488_16chn", "kl_causal_288_8chn", "kl_causal_444_4chn"),
        *("kl_causal_41616_4chn", "kl_noncausal_488_4chn", "kl_noncausal_488_16chn"),
        *("kl_noncausal_41616_4chn", "kl_noncausal_41616_16chn", "v1_1_fsq_488_32768"),
        *("v1_1_fsq_888_32768", "v1_1_fsq_41616_262144", "v1_1_kl_488_4chn", "v1_1_kl_488_16chn"),
        *("v1_1_kl_288_8chn", "v1_1_kl_41616_16chn", "tiny"),
    ),
    "vtok": ("clip_l_336", "tiny"),
}
DEMO_MODEL = "vidtok/tiny"  # whose weights the package has


def check_model(name: str, checkpoint: Path | None = None) -> None:
    """Raises ValueError for a model that is not known, or one whose weights are missing."""
    system, _, config = name.partition("/")
    if system not in MODELS:
        raise ValueError(
            f"model={name!r}: the tokenizers are {', '.join(MODELS)}; give one as in vidtok/tiny"
        )
    if config and config not in MODELS[system]:
        raise ValueError(f"model={name!r}: the configurations of {system} are {', '.join(MODELS[system])}")
    if checkpoint is None and name != DEMO_MODEL:
        raise ValueError(
            f"checkpoint: {name} needs one; the package has only the demo weights of {DEMO_MODEL}"
        )


def check_config(config: str) -> None:
    """Raises ValueError for a configuration that VidTok does not have."""
    if config not in MODELS["vidtok"]:
        raise ValueError(f"config={config!r}: expected one of {', '.join(MODELS['vidtok'])}")


def complete_model(incomplete: str) -> list[str]:
    """For the shell: the models that begin so."""
    known = (f"{system}/{config}" for system, configs in MODELS.items() for config in configs)
    return [name for name in known if name.startswith(incomplete)]


def complete_config(incomplete: str) -> list[str]:
    """For the shell: the configurations of VidTok that begin so."""
    return [name for name in MODELS["vidtok"] if name.startswith(incomplete)]


def check_input(kind: str, path: Path | None) -> None:
    """Raises FileNotFoundError where there is no file; ``kind``: a video, a checkpoint, a tokens file."""
    if path is not None and not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise FileNotFoundError(f"path: no {kind} at {path}, which {what}")


def check_output(path: Path, kinds: Iterable[str], *, force: bool, what: str) -> None:
    """Whether a file may be written, before any work.

    Args:
        kinds: the suffixes that name what is written; with an empty one among them, any that does not name
            something else.

    Raises FileExistsError for a file that is there, without ``force``; FileNotFoundError where its folder is
    missing; ValueError for a suffix that says something else.
    """
    kinds, suffix = tuple(kinds), path.suffix.lower()
    if suffix not in kinds and ("" not in kinds or suffix in OTHER_CONTENT):
        named = ", ".join(kind for kind in kinds if kind)
        raise ValueError(f"output: {path} would hold {what}; give it a name that ends in {named}")
    if path.is_dir():
        raise OSError(errno.EISDIR, f"output: cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output: cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not force:
        raise FileExistsError(f"output: {path} is there already; --force replaces it")


MP4 = (".mp4", ".m4v")
TOKENS = (".tokens", ".safetensors", "")
PICTURES = (".png", ".svg", ".pdf")
# What names something that no command writes as tokens.
OTHER_CONTENT = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".y4m", ".mpg", ".ts"),
    *(
        ".png",
        ".jpg",
        ".jpeg",
        ".svg",
        ".pdf",
        ".json",
        ".csv",
        ".txt",
        ".npy",
        ".npz",
        ".pt",
        ".pth",
        ".ckpt",
    ),
}
