"""Loads one version of a model: reads its bundle, proves it on the device, and measures the cost of calls there."""

from collections.abc import Callable, Collection, Container, Hashable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from weakref import WeakValueDictionary

import numpy as np
import structlog

from unroll import bundle as bundles
from unroll.bundle import Bundle, BundleError, Manifest
from unroll.bundle.graph import operators
from unroll.bundle.signature import TrustedKeys
from unroll.bundle.verification import Differences
from unroll.service.core.clock import Clock
from unroll.service.core.errors import NonFiniteOutput
from unroll.service.engine.backend import DeviceBackend, EngineOptions, open_backend
from unroll.service.engine.curve import Curve, measure
from unroll.service.engine.engine import Engine, PlainRows
from unroll.service.engine.runner import DeviceUnavailable
from unroll.service.models.served_model import ServedModel, Serving
from unroll.service.models.serving_figures import ServingFigures
from unroll.service.models.trial import ANY, Trials
from unroll.service.models.trial_process import TrialLimits
from unroll.service.protocol.tensors import Codec
from unroll.service.scheduler.limits import ModelTraits, SchedulerLimits, SessionLimits
from unroll.service.scheduler.loop import EngineThread, Loop
from unroll.service.scheduler.scheduler import Scheduler
from unroll.service.scheduler.session import Session
from unroll.service.state.slots import INITIAL, SCRATCH
from unroll.service.store.interface import Store
from unroll.service.telemetry.statistics import Statistics

_log = structlog.get_logger(__name__)

#: Approximate host memory of a session, besides its state row and its last step.
_SESSION_BYTES = 1024


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How every model is served.

    Attributes:
        spill_bytes: Host memory for idle sessions that lost their row.
        trusted_keys: Public keys of trusted signers; None: signatures are not required.
        trial: Limits for trying a bundle; its `calls` and `slack` are set by the server.
        fill_memory: Ignore `sessions.capacity` and allow as many sessions as fit in `engine.memory_share`, per device.
    """

    max_steps: int = 65_536
    max_sequences: int = 1024
    spill_bytes: int = 256 * 2**20
    fill_memory: bool = False
    trusted_keys: TrustedKeys | None = None
    trial: TrialLimits = field(default_factory=TrialLimits)
    engine: EngineOptions = field(default_factory=EngineOptions)
    sessions: SessionLimits = field(default_factory=SessionLimits)
    scheduler: SchedulerLimits = field(default_factory=SchedulerLimits)


class ModelRefused(BundleError):
    """A bundle that must not be served."""


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn any error inside the block into the refusal of a bundle, so that other bundles are still served."""
    try:
        yield
    except (ModelRefused, DeviceUnavailable):
        raise
    except BundleError as error:
        raise ModelRefused(error.code, error.message) from error
    except bundles.GoldenMismatch as error:
        raise ModelRefused("bundle_mismatch", str(error)) from error
    except Exception as error:
        raise ModelRefused("bundle_unusable", f"{type(error).__name__}: {error}") from error


class ModelLoader:
    """Loads a bundle on every device.

    Args:
        devices: Device names, each with the executor of its engine thread.
        spill: Keeps an idle session that must give up its row; returns False if it cannot.
        is_verified: Whether the running call has looked up the session in the store, by model and id.
    """

    def __init__(
        self,
        options: ModelOptions,
        clock: Clock,
        devices: Sequence[tuple[str, Executor]],
        store: Store | None = None,
        spill: Callable[[ServedModel, Session, bool], bool] = lambda model, session, at_cost: False,
        is_verified: Callable[[str, str], bool] = lambda name, session_id: True,
    ) -> None:
        self._options = options
        self._clock = clock
        self._devices = devices
        self._trials = Trials(_trial_limits(options, [device for device, _ in devices]))
        self._store = store
        self._spill = spill
        self._is_verified = is_verified
        self._curves: WeakValueDictionary[Hashable, Curve] = WeakValueDictionary()  # by `_form`, while served

    def load(self, path: Path, known: Container[str] = (), seconds: float | None = None) -> list[ServedModel]:
        """Load a version on every device; the instances share their statistics.

        Args:
            known: Identities of bundles that are already loaded; the result is then empty.
            seconds: Processor time for the trial, if less than the limit.

        Raises:
            ModelRefused: The bundle is damaged, differs from PyTorch on a device, or does not fit there.
            DeviceUnavailable: A device cannot be used.
        """
        models: list[ServedModel] = []
        with _refusing(), ExitStack() as on_error:
            content = bundles.read_content(path)
            if content.identity in known:
                bundles.check_digests(content)
                return []
            if self._options.trusted_keys is not None:
                self._options.trusted_keys.check(content)
            parity = self._trials.prove(content, seconds)
            bundle = bundles.parse(content, self._trials.limits.allowed_operators)
            for device, executor in self._devices:
                statistics = models[0].figures.statistics if models else None
                models.append(self._load(bundle, parity, device, executor, statistics, on_error))
            on_error.pop_all()
        return models

    def shut_down(self) -> None:
        """End the engine threads; the loops must have ended."""
        for _, executor in self._devices:
            executor.shutdown()

    def end_trial(self, *, for_good: bool = False) -> None:
        """End the trial process. The next bundle starts another, unless `for_good`."""
        self._trials.close(for_good=for_good)

    def _load(
        self,
        bundle: Bundle,
        parity: Differences,
        device: str,
        executor: Executor,
        statistics: Statistics | None,
        on_error: ExitStack,
    ) -> ServedModel:
        started = perf_counter()
        options = self._options
        manifest = bundle.manifest

        def spill(session: Session, at_cost: bool) -> bool:
            return self._spill(model, session, at_cost)

        backend = open_backend(bundle, device, options.engine)
        if device != "cpu":  # the trial has done this on the CPU
            parity = bundles.Verifier(backend.runner, manifest).replay(bundle.golden, backend.slack)
        codec = Codec(manifest, options.max_steps, min(options.max_sequences, options.scheduler.max_queue))
        traits = ModelTraits(manifest.inputs, manifest.outputs, manifest.streamable, manifest.ragged, codec.faults)
        limits = _session_limits(backend, manifest, options)
        is_verified = partial(self._is_verified, manifest.name)
        scheduler = Scheduler(traits, limits, options.scheduler, is_verified, spill)
        engine, proof = backend.create_engine(scheduler.rows, options.scheduler.max_batch)
        on_error.callback(engine.close)
        parity = parity | {name: max(worst, parity[name]) for name, worst in proof.parity.items()}
        precision = options.engine.precision if manifest.precision == "float32" else manifest.precision
        serving = Serving(device, backend.runner.provider, precision, parity, proof.stability)
        form = _form(bundle, device)
        curve = self._curves[form] = _warm_up(engine, bundle, options.scheduler, self._curves.get(form))
        scheduler.pace.seconds_per_step = curve.seconds(curve.max_rows) / curve.max_rows
        scheduler.overload.efficient_seconds = curve.seconds(curve.best_rows())
        figures = ServingFigures(scheduler, self._clock, statistics or Statistics(curve.points(), curve.best_rows()))
        thread = EngineThread(engine, executor, curve.seconds)
        loop = Loop(manifest.name, scheduler, thread, self._store, self._clock, figures.observe)
        model = ServedModel(replace(bundle, model=b""), engine, loop, codec, serving, figures)
        _log_loaded(model, curve, perf_counter() - started)
        return model


def _trial_limits(options: ModelOptions, devices: Collection[str]) -> TrialLimits:
    """The limits of trials. A GPU is judged by its own answers, so a server with one accepts any answer of a trial."""
    limits = options.scheduler
    long_rows = min(limits.max_batch, max(1, limits.max_batch_steps // limits.piece_steps))
    calls = ((limits.max_batch, 1), (long_rows, limits.piece_steps))
    slack = 1.0 if {*devices} == {"cpu"} else ANY
    return replace(options.trial, calls=calls, slack=slack)


def _log_loaded(model: ServedModel, curve: Curve, seconds: float) -> None:
    _log.info(
        "model loaded",
        model=model.name,
        version=model.version,
        device=model.serving.device,
        provider=model.serving.provider,
        precision=model.serving.precision,
        parity={name: float(f"{error:.3g}") for name, error in model.serving.parity.items()},
        stability=float(f"{model.serving.stability:.3g}"),
        session_capacity=model.scheduler.sessions.limits.capacity,
        microseconds_per_step=round(model.scheduler.pace.seconds_per_step * 1e6, 2),
        best_batch=curve.best_rows(),
        seconds=round(seconds, 3),
    )


def _session_limits(backend: DeviceBackend, manifest: Manifest, options: ModelOptions) -> SessionLimits:
    if not options.fill_memory:
        return options.sessions
    host_bytes = _SESSION_BYTES + sum(spec.nbytes for spec in (*manifest.inputs, *manifest.outputs))
    rows = backend.max_sessions(4 * manifest.state_size, host_bytes) - 2 - options.scheduler.max_batch
    return replace(options.sessions, capacity=max(1, rows))


def _form(bundle: Bundle, device: str) -> Hashable:
    """A key that is equal for models with probably equal costs, such as versions of one model."""
    about = bundle.manifest
    counts = tuple(operators(bundle.model).items())
    return device, about.inputs, about.outputs, about.state_size, about.precision, counts


def _warm_up(engine: Engine, bundle: Bundle, limits: SchedulerLimits, alike: Curve | None) -> Curve:
    """Measure the cost of calls, on the scratch row, with golden inputs, because not every model accepts zeros."""
    golden = [bundle.golden.inputs[spec.name] for spec in bundle.manifest.inputs]

    def run(rows: int, steps: int) -> None:
        inputs = tuple(np.resize(array[:1], (rows, steps, *array.shape[2:])) for array in golden)
        _, failed = engine.run(PlainRows(inputs, [steps] * rows, [INITIAL] * rows, [SCRATCH] * rows))
        if failures := [error for error in failed.values() if not isinstance(error, NonFiniteOutput)]:
            raise ModelRefused("bundle_unusable", f"it cannot run a batch of {rows}: {failures[0].message}")

    return measure(run, limits.max_batch, limits.piece_steps, limits.max_batch_steps, alike=alike)
