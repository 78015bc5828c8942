"""Every layout and every attention backend gives the loss and gradients of the plain computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.model.policy import PolicySetup
from tests.conftest import build_model
from tests.exact.conftest import gradients, in_double, plain_loss

ARCHITECTURES = ("llama", "mistral", "qwen3", "gemma3", "gpt2")
WAYS = [
    ("padded", None),
    ("padded", "dense"),
    ("packed", "dense"),
    ("packed", "segments"),
    ("shared", "dense"),
    ("shared", "segments"),
]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    torch.set_default_dtype(torch.float64)
    try:
        yield in_double(build_model(request.param, dtype=torch.float64)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@st.composite
def trees(draw) -> list[Encoded]:
    """Examples whose answers branch at random depths, up to three levels and five answers, some identical."""
    token = st.integers(7, 399)
    examples = []
    for _ in range(draw(st.integers(1, 3))):
        trunk = draw(st.lists(token, min_size=1, max_size=14))
        paths = []
        for k in range(draw(st.integers(1, 5))):
            stem = paths[draw(st.integers(0, len(paths) - 1))].ids if paths else trunk
            keep = draw(st.integers(1, len(stem)))
            ids = [*stem[:keep], *draw(st.lists(token, min_size=1, max_size=10))]
            weights = [0.0] + [draw(st.sampled_from([0.0, 1.0, 0.5])) for _ in ids[1:]]
            weights[-1] = 1.0
            paths.append(Path(ids, weights, f"candidate-{k}"))
        examples.append(Encoded(tuple(paths)))
    return examples


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(items=trees())
def test_loss_and_gradients_equal_the_plain_computation(model, items):
    model.set_attn_implementation("sdpa")
    expected = plain_loss(model, items)
    expected_gradients = gradients(model, expected)
    for layout, backend in WAYS:
        setup = PolicySetup(model, backend=backend)
        batch = collate([(item, "") for item in items], layout=layout, pad_id=3)
        loss = batch.mean(setup.bind().nll(batch), over="token")
        found = gradients(model, loss)
        setup.close()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9), (layout, backend)
        for name, gradient in expected_gradients.items():
            assert torch.allclose(found[name], gradient, atol=1e-9, rtol=0), (layout, backend, name)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_eager_attention_gets_additive_masks(model, layout):
    items = [
        Encoded(
            (Path([9, 8, 7, 11, 12, 13, 14, 15, 16, 17], [0.0] * 3 + [1.0] * 7), Path([9, 8, 20, 21], [0.0, 0, 1, 1]))
        )
    ]
    model.set_attn_implementation("sdpa")
    expected = plain_loss(model, items)
    model.set_attn_implementation("eager")
    setup = PolicySetup(model)
    assert setup.implementation == "eager"
    batch = collate([(item, "") for item in items], layout=layout, pad_id=3)
    loss = batch.mean(setup.bind().nll(batch), over="token")
    setup.close()
    # transformers' eager softmax is float32 whatever the model's dtype.
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
