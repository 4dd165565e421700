"""A sweep on a cluster: packed, submitted, looked after from another shell, preempted, retried."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from cells import records, tiny
from records import record as made
from records import store
from sweeps import cells, look, outcome, submit, until

from lra import launcher, provenance
from lra.launcher import Job
from lra.record import FILENAME, Cell, write_json
from lra.sweep import manifest, states, submission
from lra.sweep.worker import Pack

FAKE = Path(__file__).parents[1] / "support" / "fake_slurm"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch) -> Path:
    """A SLURM of one core, made of shell scripts; its folder."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{FAKE}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    return folder


@pytest.fixture
def held(slurm: Path, monkeypatch) -> Path:
    """The same, with a queue in which nothing moves."""
    monkeypatch.setenv("FAKE_SLURM_HOLDS", "1")
    return slurm


def finish(results: Path, cell: Cell, **values) -> None:
    """What the job of a cell would have left."""
    identity = (cell.attention, cell.task, cell.seed)
    store(results, made(*identity, budget=cell.budget, overrides=dict(cell.overrides), starred=True, **values))


# Before anything is submitted


def test_cells_of_one_shape_share_jobs_up_to_the_size_asked_for():
    def job(attention: str, seed: int, rate: float = 1.0, batch: int = 8) -> Job:
        resolved = {"attention": {"name": attention}, "seed": seed, "training": {"learning_rate": rate}}
        config = SimpleNamespace(resolved=resolved, training=SimpleNamespace(batch_size=batch))
        return Job(Cell(attention, "listops", "small", "demo", seed), False, [], config)  # type: ignore[arg-type]

    jobs = [job(name, seed) for seed in range(3) for name in ("mra", "lln")]
    jobs += [job("mra", 3, rate=2.0), job("mra", 4, batch=16)]
    packs = [[(job.cell.attention, job.cell.seed) for job in pack] for pack in submission.pack(jobs, 2)]
    assert packs == [
        [("mra", 0), ("mra", 1)],
        [("mra", 2), ("mra", 3)],
        [("lln", 0), ("lln", 1)],
        [("lln", 2)],
        [("mra", 4)],
    ]


def test_a_plan_shows_cells_hours_and_the_script_and_submits_nothing(tmp_path: Path, data_root: Path, capfd):
    results = tmp_path / "results"
    arguments = ("attention=none", "seed=0,1", "hydra.launcher.partition=big", "hydra.launcher.gpus=2")
    arguments += ("hydra.launcher.setup=[module load cuda]", "hydra.launcher.parallel=1")
    assert submit(results, data_root, *arguments, "--plan") == 0
    shown = capfd.readouterr().out
    assert "seed1: unknown, no finished cell of this row" in shown
    lines = ("#SBATCH --partition=big", "#SBATCH --array=0-1%1", "#SBATCH --time=240", "#SBATCH --mem=32GB")
    lines += ("#SBATCH --gpus-per-node=2", "#SBATCH --requeue", "\nmodule load cuda\n", "nothing was submitted")
    for line in lines:
        assert line in shown
    assert not (results / "runs").exists()
    assert not (results / "sweeps").exists()


def test_an_estimate_is_that_of_the_same_row_on_a_named_device():
    past = [made(seed=k, wall_s={"total": seconds}, device="H100") for k, seconds in enumerate((10.0, 30.0, 7200.0))]
    past += [made("mra", wall_s={"total": 1.0}), made(budget="demo", wall_s={"total": 1.0}), made(seed=9, status="oom")]
    cell = Cell("softmax", "listops", "small", "published", 5)
    assert submission.estimate(cell, past) == (30.0, "30 s, as 3 on H100")
    assert submission.estimate(Cell("lln", "listops", "small", "published", 5), past)[0] is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("hydra.launcher.cells_per_job=0", "hydra.launcher.cells_per_job=0 is not possible; it must be a positive"),
        ("hydra.launcher.minutes=1.5", "hydra.launcher.minutes=1.5 is not possible"),
        ("hydra.launcher.minutes=2", "hydra.launcher.minutes=2 is not possible; SLURM warns a job up to 2.5 minutes"),
        ("hydra.launcher.cluster=lsf", "hydra.launcher.cluster=lsf is not possible; use slurm or local"),
        ("hydra.launcher.name=a/b", "hydra.launcher.name=a/b is not possible; it must be letters"),
        ("hydra.launcher.partitoin=x", "hydra.launcher.partitoin"),
        ("model.dim=0", "model.dim=0 is not possible"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_submitted(argument: str, message: str, held, tmp_path, capfd):
    assert submit(tmp_path / "results", tmp_path / "data", "attention=none", argument) == 2
    written = capfd.readouterr().err
    assert written.startswith(message)
    assert written.count("\n") == 1
    assert not (held / "last").exists()
    assert not (tmp_path / "data").exists()


def test_without_slurm_the_line_says_so(tmp_path: Path, data_root: Path, capfd, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit(tmp_path / "results", data_root, "attention=none") == 2
    assert "this machine has no sbatch" in capfd.readouterr().err


def test_what_sbatch_refuses_is_told_and_can_be_retried(held, tmp_path: Path, data_root: Path, capfd, monkeypatch):
    monkeypatch.setenv("FAKE_SLURM_REFUSES", "Invalid account")
    assert submit(tmp_path, data_root, "attention=none,linear") == 2
    assert "Invalid account" in capfd.readouterr().err
    assert outcome(tmp_path) == {"none": "lost", "linear": "lost"}
    monkeypatch.delenv("FAKE_SLURM_REFUSES")
    assert look(tmp_path, "retry") == 0
    assert outcome(tmp_path) == {"none": "queued", "linear": "queued"}


# In the queue


def test_every_cell_has_a_state_from_any_shell(held: Path, tmp_path: Path, data_root: Path, monkeypatch):
    assert submit(tmp_path, data_root, "attention=none,linear,softmax", "training.learning_rate=1e-4,1e-3") == 0
    assert (held / "last").read_text() == "101\n"  # one array
    one = manifest.read(tmp_path, None)
    assert one.jobs == [f"101_{k}" for k in range(6)]
    assert states.counts(states.of(one)) == "6 queued"

    finish(tmp_path, one.entries[0].cell)
    finish(tmp_path, one.entries[1].cell, status="nan")
    write_json(one.folder / "pack0.json", {"ended": {"0": "ok"}, "over": True})
    write_json(one.folder / "pack1.json", {"ended": {"0": "nan"}, "over": True})
    write_json(one.folder / "pack2.json", {"now": 0})
    for k in (0, 1, 3):  # job 3 is gone, nobody knows why
        (held / f"101_{k}.state").unlink()
    (held / "101_2.state").write_text("RUNNING\n")
    log = one.entries[2].cell.directory(tmp_path).with_name("seed0.log")
    log.parent.mkdir(parents=True)
    log.write_text("linear listops: step 4/6\n")
    found = states.of(one)
    assert [state.what for state in found] == ["ok", "nan", "running", "lost", "queued", "queued"]
    assert found[2].detail == "step 4 of 6"
    assert states.counts(found) == "1 ok, 2 queued, 1 running, 1 lost, 1 nan"

    monkeypatch.setenv("FAKE_SLURM_DOWN", "1")
    assert [state.what for state in states.of(one)] == ["ok", "nan", "unknown", "unknown", "unknown", "unknown"]


def test_finished_cells_are_not_submitted_and_a_name_is_taken_once(held: Path, tmp_path: Path, data_root: Path, capfd):
    assert submit(tmp_path, data_root, "attention=none,linear") == 0
    first = cells(tmp_path)
    finish(tmp_path, first[0])
    assert submit(tmp_path, data_root, "attention=none,linear") == 2
    assert "hydra.launcher.name=one is taken" in capfd.readouterr().err
    assert submit(tmp_path, data_root, "attention=none,linear", "hydra.launcher.name=two") == 0
    assert [entry.pack for entry in manifest.read(tmp_path, "two").entries] == [None, 0]


def test_collect_makes_tables_of_what_is_there_and_is_zero_only_if_all_is_ok(
    held: Path, tmp_path: Path, data_root: Path, capfd
):
    assert submit(tmp_path, data_root, "attention=none,linear") == 0
    none, linear = cells(tmp_path)
    finish(tmp_path, none)
    assert look(tmp_path, "collect") == 1
    assert "none" in (tmp_path / "leaderboard.csv").read_text()
    finish(tmp_path, linear)
    for state in held.glob("*.state"):
        state.unlink()
    assert look(tmp_path, "collect") == 0
    assert "sweep one: 2 ok" in capfd.readouterr().out


def test_retry_halves_the_micro_batch_of_what_ran_out_of_memory_and_keeps_its_record(
    held: Path, tmp_path: Path, data_root: Path, capfd
):
    assert submit(tmp_path, data_root, "attention=none,linear,softmax") == 0
    none, linear, softmax = cells(tmp_path)
    finish(tmp_path, none)
    finish(tmp_path, linear, status="oom")
    finish(tmp_path, softmax, status="error")
    for state in held.glob("*.state"):
        state.unlink()
    assert look(tmp_path, "retry", "--oom", "halve") == 0
    now = {cell.attention: cell for cell in cells(tmp_path)}
    assert len(cells(tmp_path)) == 3
    assert now["none"] == none
    assert now["softmax"] == softmax
    assert now["linear"].overrides == {**linear.overrides, "trainer.accumulate": 2}
    assert outcome(tmp_path) == {"none": "ok", "linear": "queued", "softmax": "queued"}
    assert [r["status"] for r in records(tmp_path) if r["cell"]["attention"] == "linear"] == ["oom"]

    finish(tmp_path, now["linear"], status="oom")
    for state in held.glob("*.state"):
        state.unlink()
    assert look(tmp_path, "retry", "--oom", "halve") == 0
    assert {c.attention: c for c in cells(tmp_path)}["linear"].overrides["trainer.accumulate"] == 4


def test_retry_of_a_batch_that_cannot_be_halved_is_one_line(held: Path, tmp_path: Path, data_root: Path, capfd):
    assert submit(tmp_path, data_root, "attention=none", "trainer.accumulate=8") == 0
    finish(tmp_path, cells(tmp_path)[0], status="oom")
    for state in held.glob("*.state"):
        state.unlink()
    assert look(tmp_path, "retry", "--oom", "halve") == 2
    assert "cannot be halved: trainer.accumulate=16 is not possible" in capfd.readouterr().err
    assert len(cells(tmp_path)) == 1


# In a job


def pack(tmp_path: Path, overrides: list[str], count: int = 2) -> Pack:
    def job(seed: int) -> Job:
        config = SimpleNamespace(results_dir=tmp_path, resolved={}, afresh="rerun=true" in overrides)
        return Job(Cell("mra", "listops", "small", "published", seed), False, list(overrides), config)  # type: ignore

    return Pack([job(seed) for seed in range(count)], tmp_path / "pack0.json", Path.cwd(), "digest")


def test_a_requeued_job_goes_on_where_it_stopped_and_begins_nothing_afresh(tmp_path: Path, monkeypatch):
    ran: list[tuple[int, list[str]]] = []

    def run_job(job: Job, environment) -> dict:
        ran.append((job.cell.seed, job.overrides))
        if len(ran) == 2:
            raise SystemExit  # submitit requeues the job
        return made("mra", seed=job.cell.seed)

    monkeypatch.setattr("lra.sweep.worker.run_job", run_job)
    with pytest.raises(SystemExit):
        pack(tmp_path, ["rerun=true"], count=3)()
    assert json.loads((tmp_path / "pack0.json").read_text())["ended"] == {"0": "ok"}
    assert pack(tmp_path, ["rerun=true"], count=3)() == ["ok", "ok", "ok"]
    assert ran == [(0, ["rerun=true"]), (1, ["rerun=true"]), (1, []), (2, ["rerun=true"])]


def test_a_cell_stopped_with_its_node_continues_when_the_job_is_requeued(tmp_path: Path, monkeypatch):
    """SLURM's SIGTERM reaches the cell too; a cell that failed by itself is not run again."""
    outcomes = iter(["preempted", "nan", "ok"])
    monkeypatch.setattr("lra.sweep.worker.run_job", lambda job, environment: made("mra", status=next(outcomes)))
    assert pack(tmp_path, [])() == ["stopped", "nan"]
    assert pack(tmp_path, [])() == ["ok", "nan"]


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_job_that_is_asked_to_end_begins_no_further_cell(
    state: str, requeued: bool, slurm: Path, tmp_path: Path, monkeypatch
):
    """It asks to run again only where SLURM does not end it for good: where it is preempted with a grace time."""

    def run_job(job: Job, environment) -> dict:
        os.kill(os.getpid(), signal.SIGTERM)
        return made("mra", status="interrupted")

    monkeypatch.setattr("lra.sweep.worker.run_job", run_job)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (slurm / "7.state").write_text(state)
    assert pack(tmp_path, [])() == ["stopped", "stopped"]
    left = json.loads((tmp_path / "pack0.json").read_text())
    assert (left["begun"], left["ended"], left["stopped"], left["over"]) == ([0], {}, True, not requeued)
    assert (slurm / "7.requeue").exists() == requeued


def test_cells_of_a_job_share_what_is_compiled_in_a_folder_of_its_own(tmp_path: Path, monkeypatch):
    caches = []

    def run_job(job: Job, environment) -> dict:
        caches.append((environment["TRITON_CACHE_DIR"], environment["TORCHINDUCTOR_CACHE_DIR"]))
        assert Path(caches[0][0]).parent.is_dir()
        return made("mra")

    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    monkeypatch.setattr("lra.sweep.worker.run_job", run_job)
    pack(tmp_path, [])()
    assert caches[0] == caches[1]
    assert Path(caches[0][0]).parent.parent == tmp_path
    assert not Path(caches[0][0]).parent.exists()


def test_code_that_changed_between_submission_and_start_is_recorded_and_shown(monkeypatch):
    monkeypatch.setenv(provenance.AT_SUBMISSION, "other")
    code = provenance.code_revision()
    assert code["digest_at_submission"] == "other" != code["digest"]
    one = manifest.Sweep("one", Path(), "", {"dirty": True, "revision": "0123456789abcdef"}, {})
    cell = made(code=code)
    state = states.State(manifest.Entry(cell["cell"], []), "ok", record=cell)
    assert states.remarks(one, [state]) == [
        "submitted from a checkout with uncommitted changes on 0123456789ab",
        "softmax listops small published seed0: the code changed between submission and start",
    ]
    code["digest"] = "other"
    assert len(states.remarks(one, [state])) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_cell_that_a_scheduler_stops_is_preempted_not_failed(number: int, tmp_path: Path, monkeypatch):
    script = tmp_path / "stops.py"
    script.write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    monkeypatch.setattr(launcher, "RUN", script)
    job = pack(tmp_path, []).jobs[0]
    job.directory.parent.mkdir(parents=True)
    assert launcher.run_job(job)["status"] == "preempted"


# As a whole


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_its_cells_end_with_the_same_metrics(slurm, tmp_path, data_root):
    """Through submitit: sbatch, its signal, its requeue. The second cell of the job runs after it."""
    long = ("training.steps=300", "training.validate_every=20", "attention=none")
    whole = tmp_path / "whole"
    assert tiny(whole, *long, f"data.root={data_root}") == 0
    results = tmp_path / "results"
    assert submit(results, data_root, *long, "seed=0,1", "hydra.launcher.cells_per_job=2") == 0
    until(lambda: list(results.rglob("seed0/last.ckpt")))
    state = results / "sweeps" / "one" / "pack0.json"
    os.kill(json.loads(state.read_text())["pid"], signal.SIGUSR2)
    until(lambda: not list(slurm.glob("*.state")))
    assert json.loads(state.read_text())["starts"] == 2
    assert outcome(results) == {"none": "ok"}
    assert look(results, "collect") == 0
    (expected,) = records(whole)
    preempted = next(r for r in records(results) if r["cell"]["seed"] == 0)
    assert len(records(results)) == 2
    for key in ("test", "validation", "steps"):
        assert preempted[key] == expected[key]
    losses = [[point["train_loss"] for point in r["curve"]] for r in (preempted, expected)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_multirun_itself_waits_and_says_how_it_ended(slurm, tmp_path, data_root, capfd, monkeypatch):
    """`hydra/launcher=slurm` of `run.py`; one cell of two explodes."""
    monkeypatch.setattr(submission, "SECONDS_BETWEEN_LOOKS", 0.2)
    grid = ("-m", "attention=none", "training.learning_rate=1e-4,1e30", "hydra/launcher=slurm")
    assert tiny(tmp_path, *grid, "hydra.launcher.gpus=0", "hydra.launcher.name=one", f"data.root={data_root}") == 1
    assert sorted(r["status"] for r in records(tmp_path)) == ["nan", "ok"]
    shown = capfd.readouterr().out
    assert "sweep one: 1 ok, 1 nan" in shown
    assert all(r["code"]["digest_at_submission"] == r["code"]["digest"] for r in records(tmp_path))
    assert FILENAME not in shown
