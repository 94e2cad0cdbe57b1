"""Models with real weights that few bits and pruning are measured on, and the images of each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import peers
import small_models
from setups.tuning_tasks import vit_tiny

if TYPE_CHECKING:
    from martlet.core.model import Model


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, and where images are that calibrate it and others that test it, in the assets' `data`.

    load: with the options that name the assets and the folder `small` of models that small_models.py trained.
    test_images: how many few bits are tested on; of 2,000 answers a point or two can be chance, of 500 two or three.
    """

    load: Callable[[argparse.Namespace], Model]
    calibration: str
    test: str
    test_images: int = 2000


SUBJECTS = {
    "vit_tiny": Subject(
        load=lambda options: vit_tiny(options.assets),
        calibration=f"{peers.VALIDATION}/test.parquet",
        test=f"{peers.SAMPLE}/test.parquet",
        test_images=500,
    ),
    **{
        name: Subject(
            load=lambda options, name=name: small_models.load(name, options.small),
            calibration=f"{small.data}/train.parquet",
            test=f"{small.data}/test.parquet",
        )
        for name, small in small_models.SMALL.items()
    },
}
