"""Findings for made-up machines: the problem, the remedy, and whether it matters."""

from dataclasses import replace

import pytest
from machines import BARE, CPU, DRIVER, GPU, NO_DEVICE

from unroll.service.doctor.facts import Facts, Machine, Runtime
from unroll.service.doctor.findings import Finding, Status, judge


def judged(facts: Facts, device: str = "auto") -> dict[str, Finding]:
    return {finding.name: finding for finding in judge(facts, device)}


def works(findings: dict[str, Finding]) -> bool:
    return not any(finding.fault for finding in findings.values())


def runtime(facts: Facts, **changes: object) -> Runtime:
    assert facts.runtime
    return replace(facts.runtime, **changes)  # type: ignore[arg-type]


def without_gpu(machine: Machine) -> Facts:
    """A driver without a GPU: `auto` takes the CPU."""
    sessions = {"cpu": None, "cuda:0": "the NVIDIA driver finds no usable GPU"}
    by_auto = runtime(GPU, auto=("cpu",), auto_why="no GPU")
    return replace(GPU, machine=machine, driver=NO_DEVICE, runtime=by_auto, sessions=sessions)


def test_a_machine_with_a_gpu():
    findings = judged(GPU)
    assert {finding.status for finding in findings.values()} == {Status.OK}
    assert all(finding.mend is None for finding in findings.values())
    assert findings["NVIDIA driver"].says.startswith("580.65.06 (")
    assert "CUDA up to 13.0; /dev/nvidia0, /dev/nvidiactl" in findings["NVIDIA driver"].says
    assert findings["cuda:0"].says == (
        "NVIDIA H100 80GB HBM3, 80.0 GiB of memory, 79.0 GiB free, compute capability 9.0"
    )
    assert findings["--device auto"].says == "selects cuda:0 (a GPU was found); it works"


def test_a_machine_without_one_lacks_nothing():
    findings = judged(CPU)
    assert works(findings)
    assert findings["NVIDIA driver"].status == Status.NOTE
    assert str(findings["NVIDIA driver"].mend).startswith("if there is an NVIDIA GPU: ")
    assert findings["--device auto"].says == "selects cpu (no GPU); it works"


def test_requested_but_absent_gpu_is_an_error():
    findings = judged(replace(CPU, sessions={"cpu": None, "cuda:0": "there is no CUDA provider"}), "cuda:0")
    assert not works(findings)
    assert findings["NVIDIA driver"].status == findings["providers"].status == Status.MISSING
    assert findings["LSTM on cuda:0"].status == findings["--device cuda:0"].status == Status.BROKEN
    assert findings["--device cuda:0"].mend == "see above; `unroll serve --device cpu` works"


def test_a_driver_without_device_nodes_in_a_container():
    facts = without_gpu(replace(BARE, container=True))
    by_auto, asked = judged(facts), judged(facts, "cuda:0")
    for findings in (by_auto, asked):
        assert "no /dev/nvidia*; no GPU: no CUDA-capable device" in findings["NVIDIA driver"].says
        assert "docker run --gpus all" in str(findings["NVIDIA driver"].mend)
    assert works(by_auto)
    assert by_auto["NVIDIA driver"].status == Status.NOTE
    assert not works(asked)
    assert asked["NVIDIA driver"].status == Status.BROKEN


def test_a_container_without_driver():
    findings = judged(replace(CPU, machine=replace(BARE, container=True)))
    assert works(findings)
    assert str(findings["NVIDIA driver"].mend).startswith("if the host has an NVIDIA GPU: ")
    assert "docker run --gpus all" in str(findings["NVIDIA driver"].mend)


@pytest.mark.parametrize(
    ("machine", "mend"),
    [
        (replace(BARE, visible_devices=""), "CUDA_VISIBLE_DEVICES is ''"),
        (BARE, "nvidia-smi"),
        (replace(BARE, container=True, nodes=("/dev/nvidia0",)), "nvidia-smi"),
    ],
)
def test_other_reasons_for_which_a_driver_finds_no_gpu(machine: Machine, mend: str):
    assert mend in str(judged(without_gpu(machine))["NVIDIA driver"].mend)


def test_device_nodes_without_a_driver_in_a_container():
    machine = replace(BARE, container=True, nodes=("/dev/nvidia0",))
    assert "NVIDIA_DRIVER_CAPABILITIES" in str(judged(replace(CPU, machine=machine))["NVIDIA driver"].mend)


def test_without_cudnn():
    findings = judged(replace(GPU, sessions={"cpu": None, "cuda:0": "cuDNN is unavailable"}))
    assert not works(findings)
    assert findings["LSTM on cuda:0"] == Finding(
        "LSTM on cuda:0",
        Status.BROKEN,
        "cuDNN is unavailable",
        "if a library is missing: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    )
    assert findings["--device auto"].says == "selects cuda:0 (a GPU was found); it does not work"


def test_remedy_in_a_container_is_to_rebuild_the_image():
    findings = judged(replace(CPU, driver=DRIVER, machine=replace(BARE, container=True)))
    assert works(findings)  # `auto` takes the CPU
    assert "--build-arg RUNTIME=gpu" in str(findings["providers"].mend)


def test_without_nvidias_bindings():
    failing = {"cpu": None, "cuda:0": "cuda:0 needs NVIDIA's Python bindings"}
    findings = judged(replace(GPU, bindings=None, sessions=failing))
    assert (findings["cuda-bindings"].status, findings["cuda-bindings"].mend) == (
        Status.MISSING,
        "pip install cuda-bindings",
    )
    assert "cuda-bindings" not in judged(CPU)


def test_several_gpus_must_all_work():
    facts = replace(GPU, sessions={**GPU.sessions, "cuda:1": None})
    assert works(judged(facts, "cuda:0,cuda:1"))
    findings = judged(replace(facts, sessions={**GPU.sessions, "cuda:1": "broken"}), "cuda:0,cuda:1")
    assert not works(findings)
    assert findings["--device cuda:0,cuda:1"].status == Status.BROKEN


def test_both_packages():
    packages = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    findings = judged(replace(GPU, packages=packages))
    assert not works(findings)
    assert findings["onnxruntime"] == Finding(
        "onnxruntime",
        Status.BROKEN,
        "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are installed into the same folder "
        "and have overwritten each other's files",
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'",
    )
    assert str(judged(replace(CPU, packages=packages))["onnxruntime"].mend).endswith("&& pip install onnxruntime")


def test_a_gpu_and_an_onnxruntime_without_cuda():
    findings = judged(replace(CPU, driver=DRIVER))
    assert works(findings)  # `auto` takes the CPU, which works, but the finding is reported
    assert findings["providers"].status == Status.NOTE
    assert findings["providers"].mend == "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_no_onnxruntime():
    facts = replace(CPU, packages={}, runtime=None, runtime_problem="No module named 'onnxruntime'", sessions={})
    findings = judged(facts)
    assert not works(findings)
    assert findings["onnxruntime"] == Finding(
        "onnxruntime", Status.MISSING, "No module named 'onnxruntime'", "pip install onnxruntime"
    )
    assert findings["--device auto"].status == Status.BROKEN


def test_an_onnxruntime_that_cannot_be_imported():
    findings = judged(replace(CPU, runtime=None, runtime_problem="undefined symbol", sessions={}))
    assert findings["onnxruntime"].status == Status.BROKEN
    assert "undefined symbol" in findings["onnxruntime"].says


def test_a_driver_that_is_too_old():
    sessions = {"cpu": None, "cuda:0": "CUDA driver version is insufficient"}
    findings = judged(replace(GPU, driver=replace(DRIVER, cuda="12.8"), sessions=sessions))
    assert not works(findings)
    assert findings["NVIDIA driver"].status == Status.BROKEN
    assert "onnxruntime needs CUDA 13.0" in findings["NVIDIA driver"].says
    assert "580 or newer" in str(findings["NVIDIA driver"].mend)


def test_broken_second_gpu_is_reported_and_an_error_if_requested():
    facts = replace(GPU, sessions={**GPU.sessions, "cuda:1": "onnxruntime runs on CPUExecutionProvider"})
    assert judged(facts)["LSTM on cuda:1"].status == Status.BROKEN
    assert works(judged(facts))
    assert not works(judged(facts, "cuda:1"))


def test_a_gpu_that_ends_on_the_cpu_is_broken():
    problem = "onnxruntime runs on CPUExecutionProvider instead of cuda:0"
    findings = judged(replace(GPU, sessions={"cpu": None, "cuda:0": problem}))
    assert not works(findings)
    assert (findings["LSTM on cuda:0"].status, findings["LSTM on cuda:0"].says) == (Status.BROKEN, problem)


def test_cpu_suffices_if_requested():
    facts = replace(GPU, sessions={"cpu": None, "cuda:0": "broken"}, driver=replace(DRIVER, cuda="12.8"))
    assert works(judged(facts, "cpu"))
    assert judged(facts, "cpu")["NVIDIA driver"].status == Status.NOTE
    assert not works(judged(facts))


@pytest.mark.parametrize(
    ("limit", "container", "mend"),
    [(4096, False, "systemd"), (4096, True, "docker run --ulimit"), (1_048_576, True, "ulimit -n 1048576")],
)
def test_few_open_files_are_few_streams(limit: int, container: bool, mend: str):
    findings = judged(replace(CPU, machine=replace(BARE, files=1024, files_limit=limit, container=container)))
    assert findings["open files"].status == Status.NOTE
    assert mend in str(findings["open files"].mend)
    assert works(findings)
