"""The examples that need transformers run as their first lines say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.launch import python

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
pytest.importorskip("transformers", reason="clients: transformers is not installed")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_llama_under_init_learns_and_generates(precision: str) -> None:
    options = [
        "--hidden",
        "64",
        "--layers",
        "2",
        "--steps",
        "20",
        *(["--bf16"] if precision == "bf16" else []),
    ]
    ended = python(*LAUNCH, str(EXAMPLES / "llama_under_init.py"), *options, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert re.search(r"[\d,]+ parameters on 2 ranks; building it took \d+ MB", ended.stdout)
    bits = [float(found) for found in re.findall(r"step \d+: ([\d.]+) bits per byte", ended.stdout)]
    assert len(bits) == 3 and bits[-1] < bits[0] - 1
    assert "\ndef " in ended.stdout  # what it wrote after the prompt


def test_a_pipeline_of_a_hugging_face_decoder() -> None:
    ended = python(*LAUNCH, str(EXAMPLES / "pipeline_from_huggingface.py"), timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    plain, losses = re.findall(r"loss ([\d.]+); the pipeline's \[([\d., ]+)\]", ended.stdout)[0]
    assert float(losses.split(",")[0]) == pytest.approx(float(plain), rel=1e-5)  # printed with six digits
