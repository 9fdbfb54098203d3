"""What surrounds a run: the locks on the names of its files, and its trackers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator

from utils.files import writable_folder
from utils.locks import sole_writer
from utils.run.config import TrainConfig
from utils.run.run import Run
from utils.run.save_schedule import SaveConfig


@contextmanager
def only_run_of_its_names(
    config: TrainConfig, asked: Sequence[TrainConfig], accelerator: Accelerator
) -> Iterator[None]:
    """Locks every name that the run gives to files: of two experts theirs, and that of their samples."""
    saves = {save.name: save for save in (config.save, *(own.save for own in asked))}
    with ExitStack() as locks:
        for save in saves.values():
            locks.enter_context(_only_run_of_its_name(save, accelerator))
        yield


@contextmanager
def _only_run_of_its_name(save: SaveConfig, accelerator: Accelerator) -> Iterator[None]:
    """Locks the names of this run's files; InputError while another run writes them."""
    if not accelerator.is_main_process:
        yield
        return
    is_new, what = not save.folder.exists(), f"--output_name {save.name} in {save.folder}"
    folder = writable_folder(save.folder, "--output_dir")
    try:
        with sole_writer(folder, save.name, what, "choose another --output_name, or wait until that run ends"):
            yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty: the run was not refused
                folder.rmdir()


def start_trackers(runs: Sequence[Run]) -> None:
    """Starts the trackers of a run, or of two experts together."""
    run = runs[0]
    log, folder = run.config.log, run.accelerator.project_dir
    if not log.trackers:
        return
    arguments = {tracker: dict(own) for tracker, own in log.tracker_settings.items()}
    if "wandb" in log.trackers and folder:  # else it writes to the folder that the run was started in
        Path(folder).mkdir(parents=True, exist_ok=True)
        arguments["wandb"] = {"dir": str(folder)} | arguments.get("wandb", {})
    settings = None
    if log.with_settings:
        settings = {_own_name(key, own): value for own in runs for key, value in own.metadata.items()}
    run.accelerator.init_trackers(log.tracker_name, config=settings, init_kwargs=arguments)


def _own_name(name: str, run: Run) -> str:
    return f"{name}/{run.config.expert}" if run.config.expert else name
