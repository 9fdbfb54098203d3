"""Training flags of models that start from pictures: the share of image-to-video, CLIP, what each task reads."""

import json

import pytest
from test_cli_train import *  # noqa: F403
