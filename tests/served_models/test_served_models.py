"""The bundles that tests serve equal today's export."""

from pathlib import Path

import pytest
from served_models import models

from unroll import bundle
from unroll.bundle.graph import operators
from unroll.service.engine.runner import Runner


@pytest.mark.long
@pytest.mark.parametrize("folder", models.MODELS)
def test_new_export_gives_the_same_numbers(folder: str, tmp_path: Path) -> None:
    models.export(folder, tmp_path)
    committed, fresh = bundle.read(models.BUNDLES / folder), bundle.read(tmp_path / folder)
    assert (fresh.manifest.inputs, fresh.manifest.outputs) == (committed.manifest.inputs, committed.manifest.outputs)
    assert (fresh.manifest.state, fresh.manifest.streamable) == (
        committed.manifest.state,
        committed.manifest.streamable,
    )
    assert operators(fresh.model) == operators(committed.model)
    for golden, model in ((committed, fresh), (fresh, committed)):
        bundle.Verifier(Runner(model.model, model.manifest), golden.manifest).replay(golden.golden)
