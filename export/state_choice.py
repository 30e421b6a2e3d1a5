"""Chooses the state that a model gets in addition to its recurrent layers: as much as it still streams with.

Less is tried only where more does not stream: a short trial cannot show that a step is needed a thousand steps later.
"""

from itertools import product

from unroll.export.errors import ExportError
from unroll.export.lifting.carried_state import Carried
from unroll.export.lifting.history import Place
from unroll.export.lifting.lifted_model import LiftedModel
from unroll.export.lifting.module_state import Attribute
from unroll.export.lifting.observe import find_carried_attributes, observe
from unroll.export.lifting.streaming import torch_runner
from unroll.export.onnx.graph import Trace, to_onnx
from unroll.export.verification import probes
from unroll.export.verification.draft import draft_manifest
from unroll.export.verification.trials import Subject


def choose_state(
    lifted: LiftedModel, history: list[Place | None], attributes: list[Attribute], output_names: list[str] | None
) -> tuple[str | None, Trace | None]:
    """Give both modules of `lifted` the history and attributes with which the model streams, or none.

    Args:
        history: where forward reads earlier time steps.
        attributes: the attributes that hold state.

    Returns:
        Why a model that could stream does not, or None; and its graph, if it was traced.
    """
    # Counts may belong to the sequence, or to the current call only, as a mask's do. First time steps are kept only if
    # the model does not stream without them: a slice of the first steps need not mean the start of the sequence.
    known = [place for place in history if place is None or place.first is None]
    histories = [known, _without_counts(known)]
    if len(known) < len(history) and _hands_on(lifted, known, output_names):
        histories += [history, _without_counts(history)]
    carried = find_carried_attributes(lifted, attributes)
    reason = None
    for kept, places in product((carried, {}) if carried else ({},), histories):
        _give(lifted, kept, places if any(places) else [])
        if (kept or any(places)) and _streams(lifted, output_names):
            if not lifted.single.row_by_row:
                return None, None
            try:
                return None, to_onnx(lifted.single, lifted.samples.draw(3, 5, seed=1))
            except ExportError as error:
                loops = any(hasattr(module, "unroll_loop") for module in lifted.single.modules())
                reason = (
                    "it counts time steps, as with torch.arange, and loops over them; count in the loop, as n = n + 1 "
                    "from n = torch.zeros(batch, 1), and compute with n"
                    if loops
                    else f"it counts time steps, and that could not be traced ({error})"
                )
                break
    _give(lifted, {}, [])
    return reason, None


def _hands_on(lifted: LiftedModel, history: list[Place | None], output_names: list[str] | None) -> bool:
    """Does the model carry any state with this history? One that only reads the first time step does not stream."""
    _give(lifted, {}, history if any(history) else [])
    try:
        observe(lifted, output_names)
    except ExportError as error:
        return error.code != "no_recurrent_layer"
    return True


def _without_counts(history: list[Place | None]) -> list[Place | None]:
    return [place if place and not place.counted else None for place in history]


def _give(lifted: LiftedModel, attributes: dict[Attribute, Carried], history: list[Place | None]) -> None:
    for module in (lifted.single, lifted.double):
        module.carried_attributes, module.history = attributes, history


def _streams(lifted: LiftedModel, output_names: list[str] | None) -> bool:
    run = torch_runner(lifted.double, double=True)
    try:
        observation = observe(lifted, output_names)
        manifest = draft_manifest("draft", "1", lifted, observation.initial_row)
        samples = probes.with_reached(Subject(run, manifest, lifted.samples))
        return probes.why_not_streamable(Subject(run, manifest, samples), lifted.double) is None
    except ExportError:
        return False
