"""Architectures that belong to the zoo and can't be built: what is known of them, and what isn't."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An architecture whose dimensions no public text or code gives.

    known: what its paper states of it. missing: what there is no source for.
    """

    name: str
    title: str
    authors: str
    year: int
    arxiv: str
    known: str
    missing: str


LEFT_OUT = (
    LeftOut(
        name="FMViT",
        title="FMViT: A multiple-frequency mixing Vision Transformer",
        authors="Tan et al.",
        year=2023,
        arxiv="2311.05707",
        known="gMLP, RLMHSA and CFB, which are merged for inference; 83.3 % at the latency of ResNet-101 on TensorRT",
        missing="channels, heads and blocks of every stage; the authors' repository holds a README and a licence",
    ),
    LeftOut(
        name="HIRI-ViT",
        title="HIRI-ViT: Scaling Vision Transformer with High Resolution Inputs",
        authors="Yao et al.",
        year=2024,
        arxiv="2403.11999",
        known="five stages, two branches in the early ones; S has 84.3 % at 448 × 448 with about 5.0 GMACs",
        missing="channels and blocks of every stage, and the layers of a branch; there is no code of the authors",
    ),
    LeftOut(
        name="TurboViT",
        title="TurboViT: Generating Fast Vision Transformers via Generative Architecture Search",
        authors="Wong et al.",
        year=2023,
        arxiv="2308.11421",
        known="mask unit attention and three Q-poolings; as accurate as FasterViT-0, over 2.47 times smaller",
        missing="channels, heads and blocks of every stage, in a figure alone; there is no code of the authors",
    ),
)
