"""Where the kernels of a test run: natively on a GPU, else in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is defined: Triton settles it then.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that Triton kernels run on in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
