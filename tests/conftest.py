"""Checkpoints that many tests share, written once a run."""

from pathlib import Path

import pytest
from toy_checkpoint import OTHER, write_checkpoint

from mlx_gemma4 import load
from mlx_gemma4.model import Model
from mlx_gemma4.prompt import Processor


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("other"), OTHER, seed=1)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> tuple[Model, Processor]:
    return load(tiny_folder)


@pytest.fixture(scope="session")
def other(other_folder: Path) -> tuple[Model, Processor]:
    return load(other_folder)
