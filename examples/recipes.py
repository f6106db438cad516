"""What differs between the systems when `train.py` trains them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recipe:
    """Shapes of batches (B, T, H, W), of a validation clip (T, H, W), the learning rate, and weights of
    losses.

    Attributes:
        weights: of this package's losses, which suit hours on a CPU: a squared error and one of edges beside
            the absolute one, no other network.
        paper: those of the system's paper or code (--losses paper). Where it has no word on a term, the term
            is not there.
    """

    crops: tuple[tuple[int, int, int, int], ...]
    validation: tuple[int, int, int]
    lr: float = 2e-4
    weights: dict[str, float] = field(default_factory=dict)
    paper: dict[str, float] = field(default_factory=dict)


# aux is the model's own loss: of FSQ the entropy and commitment, of SoftVQ the entropy, of a Gaussian the
# divergence.
OURS = {"mse": 2.0, "edges": 0.2, "aux": 0.0, "lpips": 0.0, "gan": 0.0, "gan_start": 0, "lecam": 0.005}
BARE = OURS | {"mse": 0.0, "edges": 0.0}  # the mean absolute error alone
RECIPES = {
    # arXiv 2412.13061 and its configurations. The released weights of this package were trained without the
    # quantizer's own loss.
    "vidtok": Recipe(
        ((1, 9, 40, 40), (1, 9, 48, 48), (1, 9, 64, 64), (1, 5, 56, 56)),
        (17, 128, 128),
        paper={"aux": 1.0, "lpips": 1.0, "gan": 0.2, "gan_start": 20001, "lecam": 0.005},
    ),
    # As InfoTok, its descendant
    "cosmos": Recipe(((1, 9, 48, 48), (1, 9, 64, 64)), (17, 128, 128), paper={"lpips": 0.1}),
    # FSQ without a loss of its own
    "infotok": Recipe(((1, 9, 64, 64),), (17, 128, 128), paper={"lpips": 0.1}),
    # The paper names the three terms and no weights: those are inferred.
    "promag": Recipe(
        ((1, 9, 64, 64), (1, 17, 48, 48)),
        (17, 64, 64),
        weights={"aux": 1e-6},
        paper={"aux": 1e-6, "gan": 0.2},
    ),
    "tivtok": Recipe(
        ((4, 16, 64, 64),),
        (16, 64, 64),
        lr=1e-3,
        weights={"aux": 1.0},
        paper={"aux": 1.0, "lpips": 1.0, "gan": 0.2, "gan_start": 30000, "lecam": 0.001},
    ),
    "vtok": Recipe(((2, 8, 64, 64),), (16, 64, 64), lr=1e-3),  # its decoder is this package's own
}
GAUSSIAN = 1e-6  # of a divergence, which is a sum over the latent


def weights_of(model: str, losses: str, gaussian: bool) -> dict[str, float]:
    """The weights of "package" or "paper"; `gaussian`: whether the model's own loss is a divergence."""
    recipe = RECIPES[model]
    weights = OURS | recipe.weights if losses == "package" else BARE | recipe.paper
    return weights | ({"aux": GAUSSIAN} if gaussian else {})
