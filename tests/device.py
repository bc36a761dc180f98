"""The device of the operator tests' tensors; `make gpu` sets OPD_TEST_DEVICE."""

import os

import torch

DEVICE = torch.device(os.environ.get("OPD_TEST_DEVICE", "cpu"))
