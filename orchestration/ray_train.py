"""Trains one phase on a Ray cluster: the driver that `ray job submit` starts.

    ray job submit --address http://head:8265 --working-dir . -- \
        python -m orchestration.ray_train --config configs/saisa-vicuna-7b-stage1.yaml --root $PWD --num-workers 64

Ray Train places one worker per GPU (or CPU share), forms the process group and calls the same `train()` as torchrun
does. A worker that dies restarts the group, which continues from the last checkpoint.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from common.console import describe, run
from pipeline.config import RunConfig, load_config, resolve_paths, with_resume
from pipeline.stop import STATUS


def train_worker(config: dict[str, Any]) -> bool:
    """Runs one worker's part of the run that `config`, a dumped run configuration, describes.

    Returns whether it has come to its end; Ray would take the end of a run that was asked to stop for a failure.
    """
    from pipeline.loop import train  # the driver does not need it

    try:
        train(RunConfig.model_validate(config))
    except SystemExit as end:
        if end.code != STATUS:
            raise
        return False
    return True


def train_on_ray(run: RunConfig, num_workers: int, cpus_per_worker: float, max_failures: int) -> bool:
    """Trains on the cluster of this job; returns whether the run has come to its end, and was not asked to stop.

    Raises:
        ValueError: A worker could not train; the message is its own.
    """
    # Ray takes seconds to import: not before the configuration is known to be right
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RunSettings
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    if not ray.is_initialized():
        ray.init()
    use_gpu = "GPU" in ray.cluster_resources()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=run.model_dump(mode="json"),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus_per_worker}
        ),
        run_config=RunSettings(
            name="ray", storage_path=str(run.run_dir), failure_config=FailureConfig(max_failures=max_failures)
        ),
    )
    try:
        is_finished = bool(trainer.fit().return_value)
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {}).values()
        causes = [describe(cause) for cause in failures if isinstance(cause, ValueError | OSError)]
        raise ValueError(causes[0] if causes else " ".join(str(error).split())) from error
    return is_finished


def main(
    config: Annotated[Path, typer.Option(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, after the file")] = None,
    resume: Annotated[str | None, typer.Option(help="auto or newest_whole; short for checkpoint.resume=...")] = None,
    root: Annotated[
        Path, typer.Option(help="relative paths of the run mean this folder; every node must see it")
    ] = Path(),
    num_workers: Annotated[int, typer.Option(help="training processes, one per GPU where there are GPUs")] = 1,
    cpus_per_worker: Annotated[float, typer.Option(help="CPU cores to reserve for each")] = 1,
    max_failures: Annotated[int, typer.Option(help="restarts from the last checkpoint after a worker dies")] = 3,
) -> None:
    """Trains one phase of SAISA on a Ray cluster."""
    run = resolve_paths(load_config(config, with_resume(overrides, resume)), root.absolute())
    if not train_on_ray(run, num_workers, cpus_per_worker, max_failures):
        raise SystemExit(STATUS)


if __name__ == "__main__":
    run(main)
