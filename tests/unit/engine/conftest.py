"""Two tiny models in every form that the engines' tests need, lowered once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import ConvNet, quantized

from martlet import engine as engines
from martlet.core import store
from martlet.core.model import Model
from martlet.data.preprocess import Preprocess
from martlet.source import load_model


@pytest.fixture(scope="session")
def vit() -> Model:
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = load_model("timm:vit_tiny_patch16_224", num_classes=10, model_kwargs=kwargs)
    assert model.preprocess.size == (32, 32)
    return model


@pytest.fixture(scope="session")
def int8(vit: Model) -> Callable[[str], Model]:
    """The ViT as an engine wants it in int8. Not to be changed."""
    return cache(lambda engine: quantized(vit, engine))


@pytest.fixture(scope="session")
def conv() -> Model:
    torch.manual_seed(0)
    module = ConvNet().eval()
    module.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return Model(name="conv", module=module, preprocess=Preprocess(size=(32, 32)), num_classes=5, origin={})


Lower = Callable[[Model, str], Path]


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """Writes a model for an engine, once, as the store does, and gives the folder."""
    done: dict[tuple[int, str], Path] = {}
    kept: list[Model] = []  # so that no id is used twice

    def lower(model: Model, engine: str) -> Path:
        if (id(model), engine) not in done:
            folder = tmp_path_factory.mktemp(engine)
            kept.append(model)
            files = store.write_model(folder, model, engines.get(engine))
            store.seal(folder, model, engine, files)
            done[id(model), engine] = folder
        return done[id(model), engine]

    return lower


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
