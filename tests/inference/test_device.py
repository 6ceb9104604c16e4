"""The device under the networks fails: no report says so of a picture, none is lost, and the CPU stands in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inference.bundle import load_bundle
from inference.errors import DeviceFull, DeviceLost, InferenceError, ModelUnavailable
from inference.pipeline import Pipeline
from inference.runner import ModelRunner
from storage.failpoints import VARIABLE, failpoint_from_environment
from storage.records import JobKind, JobState
from tests.inference.laboratory import TASKS, ingest, photograph, picture, pipeline_of, worker_of, write_laboratory
from tests.inference.test_worker import job_of, later
from tests.storage.house import House, build

LOST = "CUDA error: unspecified launch failure"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a laboratory whose gates are open."""
    return write_laboratory(tmp_path_factory.mktemp("device"))


@pytest.fixture
def house(tmp_path: Path) -> House:
    """Open an archive in a folder."""
    return build(tmp_path / "house")


class Raises:
    """A failpoint that raises what torch raises, from some computation on, as often as told."""

    def __init__(self, *errors: BaseException | None) -> None:
        self.errors = list(errors)
        self.armed = False

    def __call__(self, _name: str) -> None:
        """Raise the next one, if it is one."""
        error = self.errors.pop(0) if self.armed and self.errors else None
        if error is not None:
            raise error


def runner_of(bundles: Path, reach: Callable[[str], None], **options: object) -> ModelRunner:
    """Make a runner with a failpoint."""
    loaded = [load_bundle(bundles / task) for task in TASKS]
    return ModelRunner(loaded, threads=1, reach=reach, **{"device": "cpu", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError(LOST + "\nCUDA kernel errors might be asynchronously reported"), DeviceLost),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), DeviceLost),
        (torch.AcceleratorError("a text of a later version"), DeviceLost),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), DeviceLost),
        (RuntimeError("No CUDA-capable device is detected"), DeviceLost),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), DeviceFull),
        (torch.AcceleratorError("CUDA error: out of memory"), DeviceFull),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), DeviceFull),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179869184 bytes."), DeviceFull),
        (MemoryError(), DeviceFull),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x3 and 4x5)"), RuntimeError),
        (ModelUnavailable("the network gave a value that is not finite"), ModelUnavailable),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_torch_raises_is_told_apart(bundles: Path, error: BaseException, kind: type[BaseException]) -> None:
    """Device gone, memory gone, or neither: by the types and words of torch, and no item of the pipeline takes it for a bad picture."""
    reach = Raises(error)
    runner = runner_of(bundles, reach)
    reach.armed = True
    with pytest.raises(kind) as caught:
        runner.diagnosis(picture())
    assert type(caught.value) is kind
    assert isinstance(caught.value, (InferenceError, RuntimeError)) == (kind in (RuntimeError, ModelUnavailable))


@pytest.mark.parametrize("after", [0, 1, 2, 3], ids=["quality", "domain", "diagnosis", "segmentation"])
def test_a_lost_device_costs_no_try_and_writes_no_report(house: House, bundles: Path, after: int) -> None:
    """In mid-run: the job is back at once with its tries untouched, the worker ends, the next one concludes it (33)."""
    uid = ingest(house, photograph()).sop_instance_uid
    reach = Raises(*[None] * after, RuntimeError(LOST))
    pipeline = Pipeline(model=runner_of(bundles, reach))
    reach.armed = True
    with pytest.raises(DeviceLost):
        worker_of(house, pipeline).work_once()
    job = job_of(house, uid)
    assert (job.state, job.attempts) == (JobState.READY, 0)
    assert LOST in job.reason
    assert house.index.reports_of(uid) == []
    assert worker_of(house, pipeline_of(bundles)).work_once()
    assert job_of(house, uid).state is JobState.DONE


def test_a_picture_that_fails_every_device_ends_dead(house: House, bundles: Path) -> None:
    """The same job fails device after device: from the second time on it costs tries, so that it ends and others get their turn (33)."""
    uid = ingest(house, photograph()).sop_instance_uid
    reach = Raises(*(RuntimeError(LOST) for _ in range(20)))
    pipeline = Pipeline(model=runner_of(bundles, reach))
    reach.armed = True
    ends = 0
    while job_of(house, uid).state is not JobState.DEAD:
        with pytest.raises(DeviceLost):
            worker_of(house, pipeline, queue=later(house, 60 * 24 * (ends + 1))).work_once()
        ends += 1
        assert ends < 20
    assert ends > 1
    assert house.queue.counts()[JobKind.ANALYSE, JobState.DEAD] == 1


def test_no_memory_is_another_try_and_no_report(house: House, bundles: Path) -> None:
    """Out of memory: no report with holes is written; the job waits, and the worker lives."""
    uid = ingest(house, photograph()).sop_instance_uid
    reach = Raises(None, None, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    pipeline = Pipeline(model=runner_of(bundles, reach))
    reach.armed = True
    assert worker_of(house, pipeline).work_once()
    job = job_of(house, uid)
    assert (job.state, job.attempts) == (JobState.READY, 1)
    assert "no memory" in job.reason
    assert house.index.reports_of(uid) == []
    assert worker_of(house, pipeline, queue=later(house)).work_once()
    assert job_of(house, uid).state is JobState.DONE


def test_control_what_a_model_cannot_digest_is_an_item_of_the_report(house: House, bundles: Path) -> None:
    """Negative control: another RuntimeError is taken for the picture's, and a report says so; a device's must not go that way."""
    uid = ingest(house, photograph()).sop_instance_uid
    reach = Raises(None, None, RuntimeError("shapes cannot be multiplied"))  # the gates are open
    pipeline = Pipeline(model=runner_of(bundles, reach))
    reach.armed = True
    assert worker_of(house, pipeline).work_once()
    job = job_of(house, uid)
    assert job.state is JobState.DONE
    assert job.result["failures"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_the_device_the_cpu_stands_in(bundles: Path) -> None:
    """A GPU is asked for and there is none: results as on the CPU, and why is said; `check` refuses, and names the setting."""
    runner = runner_of(bundles, lambda _: None, device="cuda", fall_back=True)
    assert "'cuda' cannot be used" in runner.fault
    plain = runner_of(bundles, lambda _: None)
    assert plain.fault == ""
    assert runner.diagnosis(picture()) == plain.diagnosis(picture())
    with pytest.raises(ModelUnavailable, match=r"\[inference\] device"):
        runner_of(bundles, lambda _: None, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_without_a_device_is_no_fault(bundles: Path) -> None:
    """With auto the CPU is as good as any: nothing is degraded."""
    assert runner_of(bundles, lambda _: None, device="auto", fall_back=True).fault == ""


def test_a_failpoint_raises_as_told() -> None:
    """The failpoint of whole nodes: at its time, with its words, once."""
    reach = failpoint_from_environment({VARIABLE: f"device.compute:2:raise={LOST}"})
    reach("device.compute")
    with pytest.raises(RuntimeError, match=LOST):
        reach("device.compute")
    reach("device.compute")
    with pytest.raises(ValueError, match="is no failpoint"):
        failpoint_from_environment({VARIABLE: "device.compute:2:raise="})
