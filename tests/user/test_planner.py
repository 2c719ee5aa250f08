"""Default drafts: what each kind of device and size gets, and that the demo's run is not one that is slower than plain decoding."""

import pytest

import cpu_kernels
import mlspecqd_jax as mlsd
from mlspecqd_jax import planner, specs


def test_every_device_has_drafts_for_every_size_and_each_row_says_why():
    kinds = {row.device for row in planner.TABLE}
    assert kinds == {"cpu", "cpu-xla", "gpu", "tpu"}
    for kind in kinds:
        sizes = [row.least_bytes for row in planner.TABLE if row.device == kind]
        assert sizes == sorted(sizes, reverse=True)  # or a row would never be reached
        assert sizes[-1] == 0
        assert planner.drafts_for(kind, 1)
    for row in planner.TABLE:
        assert specs.parse(row.drafts)
        assert row.why


@pytest.mark.parametrize(
    ("device", "nbytes", "drafts"),
    [
        ("cpu", 19_000_000, ("ngram",)),
        ("cpu", 270_000_000, ("ngram",)),
        ("cpu", 2_200_000_000, ("mxfp4",)),
        ("cpu-xla", 2_200_000_000, ("ngram",)),
        ("gpu", 16_000_000_000, ("ngram",)),
    ],
)
def test_a_twin_drafts_where_it_was_found_to_pay(device, nbytes, drafts):
    assert planner.drafts_for(device, nbytes) == drafts


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_demo_is_drafted_by_look_up(dtype):
    model = mlsd.load("demo", dtype=dtype)
    assert planner.default_drafts(model) == ("ngram",)
    assert model.runs_on == ("cpu" if dtype == "bfloat16" and cpu_kernels.usable() else "cpu-xla")
