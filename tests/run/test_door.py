"""The door: help, one-line answers before anything heavy, earlier runs, Hydra's own flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hydra.errors
import hydra.utils
import pytest
import yaml

from hiperlab.cli.overrides import assign, merge, parse, values
from hiperlab.cli.run_dir import with_earlier
from hiperlab.cli.targets import MODULES, is_allowed, targets, trusted
from hiperlab.run import main as door
from tests.run import bench


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with the small conf; the light job instead of the stages."""
    bench.write_conf(tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(door.JOB, "tests.run.bench:job")
    for key in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "HIPERLAB_RUN_DIR", "SLURM_PROCID"):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


@pytest.fixture
def ask(here, capsys):
    """Call the door in this process: (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        code = door.main(["--config-path", str(here / "conf"), *words])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


def runs(folder: Path = Path("outputs")) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("results.json"))


MISTAKES = {
    "wrong key": (["method.lrr=1"], "method.lrr: no such setting. Did you mean method.lr?"),
    "wrong key without its group": (["lr=1"], "Did you mean method.lr?"),
    "wrong group": (["metod=ti"], "Did you mean method"),
    "wrong member": (["method=nety"], "method=nety: no such method. Did you mean neti?"),
    "wrong member of a sweep": (["-m", "method=ti,nety"], "method=nety: no such method. Did you mean neti?"),
    "wrong key of a sweep": (["-m", "method=ti,neti", "method.scale=1"], "method.scale: no such setting."),
    "empty sweep": (["-m", "method=glob(x*)"], "sweeps over nothing"),
    "wrong launcher": (["-m", "seed=1,2", "hydra/launcher=proces"], "Did you mean process?"),
    "unreadable": (["x={a"], "Cannot read 'x={a': expected key=value"),
    "no value": (["seed"], "Cannot read 'seed'"),
    "sweep without -m": (["method=ti,neti"], "add -m for a sweep"),
    "plus on a chosen group": (["+method=neti"], "write it without the +: method=neti"),
    "key is there": (["+method.lr=1"], "++method.lr=1"),
    "missing": (["data=folder"], "Missing: data.dir, data.word. Give data.dir=… data.word=…"),
    "stage": (["stages=[fit,scor]"], "stages=[scor]: no such stage. Did you mean score?"),
    "stages not a list": (["stages=fit"], "expected a list such as stages=[sample,score]"),
    "resume": (["resume=yes"], "resume=yes: expected null, auto or the path"),
    "seed": (["seed=abc"], "seed=abc: expected a whole number"),
    "lightning's own": (
        ["+trainer.accumulate_grad_batches=4"],
        "use fit.batch_size with a smaller fit.micro_batch_size",
    ),
    "lightning's steps": (["+trainer.max_steps=4"], "trainer.max_steps is set by hiperlab itself: use fit.steps"),
    "reference": (["behave=${nothing.here}"], "does not resolve"),
    "target": (["method._target_=os.system"], "method._target_=os.system is not allowed"),
    "target from a file": (["experiment=evil"], "method._target_=os.system is not allowed"),
    "stage alone": (["stages=[sample]"], "works on an earlier run, but no run_dir is given"),
    "stage on nothing": (["stages=[sample]", "run_dir=nope"], "run_dir=nope does not exist"),
    "config name": (["--config-name", "confg"], "no such config. Did you mean config?"),
    "config dir": (["--config-dir", "nope"], "There is no config folder nope"),
    "flag": (["--cfgg"], "--cfgg"),
    "cfg kind": (["--cfg", "jobb"], "jobb"),
    "cfg and sweep": (["-m", "--cfg", "job"], "-m runs a sweep"),
    "run_dir of a sweep": (["-m", "seed=1,2", "run_dir=x"], "run_dir cannot be given to a sweep"),
    "sweep name": (["-m", "seed=1,2", "sweep=../x"], "sweep=../x: expected a plain folder name"),
    "devices": (["-m", "seed=1,2", "trainer.devices=2", "hydra/launcher=basic"], "needs hydra/launcher=process"),
    "pickled rerun": (["--experimental-rerun", "x"], "--experimental-rerun reads pickled files"),
    "allowed_targets": (["allowed_targets=os"], "expected a list of modules"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(ask, name):
    words, expected = MISTAKES[name]
    code, out, err = ask(*words)
    assert code == 2
    assert expected in err
    assert err.startswith("hiperlab: ") and err.count("\n") == 1
    assert not runs() and "started" not in out


@pytest.mark.parametrize("words", [["method=nety"], ["method.lrr=1"], ["data=folder"], ["--help"]], ids=str)
def test_it_answers_in_seconds_and_without_torch(here, words):
    code = (
        "import sys; from hiperlab.run.main import main;"
        f"code = main(['-cp', 'conf', *{words!r}]);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    before = os.times()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=bench.environment(), capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode == (0 if words == ["--help"] else 2), done.stderr
    assert "Traceback" not in done.stderr
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    assert busy < 3  # CPU seconds: a busy machine is not the door's fault


def test_help_lists_groups_members_and_settings(ask, here):
    mine = here / "mine" / "method"
    mine.mkdir(parents=True)
    (mine / "shift.yaml").write_text("# my own shift\n_target_: mymethods.Shift\n")
    code, out, _ = ask("--help", "--config-dir", str(here / "mine"))
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for expected in (
        "neti NeTI",
        "*ti Textual Inversion",
        "shift my own shift",
        "folder your own photographs",
        "method",
        "hydra/launcher",
        "*process each job a fresh process of its own, one per GPU (CPU: one at a time)",
        "seed=0 every random choice",
        "fit.steps=2 how long",
        "both both methods",
    ):
        assert expected in lines, expected
    assert not any("output_subdir" in line for line in lines)


def test_version_and_hydra_flags(ask):
    from hiperlab import __version__

    assert ask("--version")[:2] == (0, f"hiperlab {__version__}\n")
    code, out, _ = ask("method=neti", "--cfg", "job", "--package", "method")
    assert code == 0 and yaml.safe_load(out)["scale"] == 1.0
    code, out, _ = ask("--cfg", "job", "--resolve", "fit.steps=9")
    assert code == 0 and yaml.safe_load(out)["fit"]["steps"] == 9
    assert ask("--hydra-help")[0] == 0
    assert not runs()


def test_info_shows_the_search_path(here):
    command = [sys.executable, "-m", "hiperlab.run", "-cp", "conf", "--info", "searchpath"]
    done = subprocess.run(command, env=bench.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and str(here / "conf") in done.stdout


def test_a_run_gets_its_folder_and_its_record(ask):
    assert ask("method=neti", "fit.steps=4", "hydra.verbose=false")[0] == 0
    (folder,) = runs()
    assert folder.parent == Path("outputs/neti_cats_tiny")
    assert sorted(p.name for p in folder.iterdir()) == ["overrides.yaml", "ran-0", "results.json"]  # nothing of Hydra's
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == ["method=neti", "fit.steps=4"]


def test_flags_may_stand_among_overrides(ask):
    code, out, _ = ask("method=neti", "--cfg", "job", "fit.steps=9")
    assert code == 0 and yaml.safe_load(out)["fit"]["steps"] == 9


def test_a_refused_command_leaves_no_folder(tmp_path, capsys):
    words = ["model=tiny", "logger=csv", f"outputs_dir={tmp_path / 'out'}"]
    assert door.main([*words, "data=folder", "data.dir=/nowhere"]) == 2
    assert door.main([*words, "monitor=identty"]) == 2
    assert "no score of metric=twin" in capsys.readouterr().err
    assert list((tmp_path / "out").rglob("*")) == []
    assert door.main([*words, "monitor=identty", f"run_dir={tmp_path / 'mine'}"]) == 2
    assert (tmp_path / "mine").is_dir(), "a folder that was named is not ours to delete"


def test_an_earlier_run_is_asked_again(ask):
    assert ask("method=neti", "seed=3", "+extra=1", "run_dir=a run, odd=name")[0] == 2  # Hydra's grammar needs quotes
    name = "a run, odd=name"
    assert ask("method=neti", "seed=3", "+extra=1", assign("run_dir", name))[0] == 0
    assert ask("stages=[sample]", "extra=2", assign("run_dir", name))[0] == 0
    facts = json.loads(Path(name, "results.json").read_text())
    assert (facts["method"], facts["seed"], facts["stages"]) == ("hiperlab.method.neti.NeTI", 3, ["sample"])
    assert yaml.safe_load(Path(name, "overrides.yaml").read_text()) == ["method=neti", "seed=3", "+extra=2"]
    assert ask("method=ti", assign("run_dir", name))[0] == 0
    assert json.loads(Path(name, "results.json").read_text())["method"].endswith("TextualInversion")


def test_a_foreign_record_cannot_steer(ask, here):
    (here / "theirs").mkdir()
    record = here / "theirs" / "overrides.yaml"
    record.write_text("[allowed_targets=[os], method._target_=os.system, stages=[fit]]\n".replace("[os]", "'[os]'"))
    record.write_text(yaml.safe_dump(["allowed_targets=[os]", "method._target_=os.system", "hydra.job.chdir=true"]))
    code, _, err = ask("run_dir=theirs")
    assert code == 2 and "os.system is not allowed" in err
    record.write_text("- {a: 1}\n")
    code, _, err = ask("run_dir=theirs")
    assert code == 2 and "is not a list of overrides" in err


@pytest.mark.parametrize(
    ("line", "stays"),
    [
        ("outputs_dir={here}", True),  # the run lies in <outputs_dir>/<names>/<run>
        ("outputs_dir={here}/elsewhere", False),
        ("outputs_dir=..", False),
        ("outputs_dir=null", True),
        ("+method.cache={here}/neti_cats_tiny/run/cache", True),
        ("+method.cache={here}/inversions", True),  # inside the outputs folder beside it
        ("++method.cache={here}/../x", False),
        ("method.cache=${{outputs_dir}}/inversions", True),
        ("method.cache=${{outputs_dir}}/../x", False),
        ("method.cache='${{oc.env:HOME}}/x'", False),
        ("method.prior.folder=/etc", False),
        ("method.prior={{folder:/etc,weight:1}}", False),
        ("+method={{prior:{{folder:/etc}}}}", False),
        ("method.prior={{weight:1}}", True),
        ("method.cache=null", True),
    ],
)
def test_a_foreign_record_chooses_no_folder(line, stays, tmp_path, capsys):
    """What a run folder from elsewhere asks to have written outside itself and its outputs folder is left out."""
    folder, line = tmp_path / "neti_cats_tiny" / "run", line.format(here=tmp_path)
    folder.mkdir(parents=True)
    lines = ["method=neti", *([] if line.startswith("outputs_dir") else [f"outputs_dir={tmp_path}"]), line]
    (folder / "overrides.yaml").write_text(yaml.safe_dump(lines))
    asked = with_earlier([f"run_dir={folder}", "stages=[sample]"])
    assert (line in asked) == stays
    assert ("left out" in capsys.readouterr().out) != stays
    assert f"outputs_dir={tmp_path}/mine" in with_earlier([f"run_dir={folder}", f"outputs_dir={tmp_path}/mine"])


def test_resume_auto_finds_the_same_unfinished_run(ask):
    assert ask("method=neti", "seed=1", "behave=raise")[0] == 1
    assert ask("method=neti", "seed=2", "behave=raise")[0] == 1
    first, second = sorted(runs(), key=lambda f: json.loads((f / "results.json").read_text())["seed"])
    code, out, _ = ask("behave=raise", "seed=1", "method=neti", "resume=auto", "trainer=gpu")  # trainer may differ
    assert code == 1 and f"continues {first}" in out and (first / "ran-1").exists() and not (second / "ran-1").exists()
    code, out, _ = ask("method=neti", "seed=5", "resume=auto")
    assert code == 0 and "starting a new one" in out
    code, out, _ = ask("method=neti", "seed=5", "resume=auto")  # that one is finished: not again
    assert code == 0 and "starting a new one" in out


@pytest.mark.parametrize(
    ("behave", "code", "text"),
    [
        ("raise", 1, "Traceback"),
        ("user", 2, "hiperlab: prompt too long\n"),
        ("exit", 3, ""),
    ],
)
def test_exit_codes(ask, behave, code, text):
    got, _, err = ask(f"behave={behave}")
    assert got == code and text in err and ("Traceback" in err) == (behave == "raise")


def test_a_users_mistake_inside_an_instantiation_has_no_traceback(here, ask, monkeypatch):
    import types

    from hiperlab.errors import UserError

    def job(cfg):
        try:
            raise UserError("scale=2: expected at most 1")
        except UserError as error:
            raise RuntimeError("Error in call to target") from error

    monkeypatch.setitem(sys.modules, "deep", types.SimpleNamespace(job=job))
    monkeypatch.setenv(door.JOB, "deep:job")
    assert ask() == (2, "", "hiperlab: scale=2: expected at most 1\n")


def test_other_ranks_share_the_folder(here, ask, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("NODE_RANK", "0")
    monkeypatch.setenv("HIPERLAB_RUN_DIR", "outputs/of rank 0")
    lightning = ['hydra.run.dir="outputs/of rank 0"', "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert ask(*lightning)[0] == 0
    assert runs() == [Path("outputs/of rank 0")]
    monkeypatch.delenv("HIPERLAB_RUN_DIR")
    code, _, err = ask()
    assert code == 2 and "Several processes share this run: give run_dir" in err


def test_the_environment_is_left_as_it_was(ask):
    before = dict(os.environ)
    ask("seed=1")
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("key", "target", "allowed"),
    [
        ("method", "hiperlab.method.neti.NeTI", True),
        ("method.optimizer", "torch.optim.AdamW", True),
        ("method.optimizer", "hiperlab.optim.muon.Muon", True),
        ("method.prior", "hiperlab.base.prior_preservation.Prior", True),
        ("method.p2p", "hiperlab.edit.prompt_to_prompt.PromptToPrompt", True),
        ("model", "hiperlab.model.load.pretrained", True),
        ("data", "hiperlab.data.folder.load", True),
        ("metric.encoders.clip.preprocess", "hiperlab.metric.preprocess.Preprocess", True),
        ("trainer.strategy", "pytorch_lightning.strategies.DDPStrategy", True),
        # of another kind, though of hiperlab or torch
        ("method.optimizer", "hiperlab.files.atomic_write", False),
        ("method.optimizer", "hiperlab.method.neti.NeTI", False),
        ("method.prior", "hiperlab.report.html.write", False),
        ("method", "hiperlab.data.folder.load", False),
        ("method", "hiperlab.method.neti.Path", False),  # imported there, not defined
        ("method.prior", "hiperlab.base.prior_preservation.Clock", False),
        ("data", "hiperlab.data.folder.read_folder", False),
        ("model", "diffusers.UNet2DConditionModel.from_pretrained", False),
        ("trainer.profiler", "pytorch_lightning.profilers.SimpleProfiler", False),
        ("trainer.logger", "pytorch_lightning.loggers.WandbLogger", False),
        ("seed", "hiperlab.method.neti.NeTI", False),
        ("data.word", "hiperlab.data.folder.load", False),
        # of anything else
        ("method", "mine.Shift", False),
        ("method", "os.system", False),
        ("method.optimizer", "torch.load", False),
        ("method.optimizer", "torch.hub.load", False),
        ("method.optimizer", "torch.os.system", False),
        ("method.optimizer", "torch.optim.lr_scheduler.Any", False),
        ("method", "hiperlab.sweep.job.subprocess.Popen", False),
        ("method", "hiperlab", False),
        ("method", "builtins.eval", False),
        ("method", "", False),
    ],
)
def test_targets(key, target, allowed):
    assert is_allowed(key, target) is allowed
    assert is_allowed(key, "mine.Shift", ["mine"]) and not is_allowed(key, "mineral.Shift", ["mine"])


def test_targets_are_found_everywhere():
    node = {"a": [{"_target_": "x"}, {"b": {"_target_": "y"}}], "_target_": "z"}
    assert dict(targets(node)) == {"a[0]": "x", "a[1].b": "y", "": "z"}


@pytest.mark.skipif(not hasattr(hydra.utils, "execution_whitelist"), reason="from Hydra 1.4 on")
def test_hydra_itself_imports_from_the_same_modules():
    with trusted():
        assert hydra.utils.instantiate({"_target_": "torch.optim.Adam", "_partial_": True})
        for target in ("os.getcwd", "hiperlab.files.sha256", "mine.Shift"):
            with pytest.raises(hydra.errors.InstantiationException, match="whitelist"):
                hydra.utils.instantiate({"_target_": target, "_partial_": True})
    with trusted(["shlex"]):
        assert hydra.utils.instantiate({"_target_": "shlex.quote", "_partial_": True})


def test_allowed_targets_on_the_command_line(ask):
    assert ask("method._target_=mine.Shift", "allowed_targets=[mine]")[0] == 0
    (folder,) = runs()
    assert "allowed_targets=[mine]" not in yaml.safe_load((folder / "overrides.yaml").read_text())


ODD = ["plain", "with space", "a,b=c", "it's", 'say "x"', "back\\slash", "[a]", "null", "${x}"]


@pytest.mark.parametrize("value", ODD)
def test_assign_survives_the_grammar(value):
    assert values([assign("key", value)])["key"] == value


def test_merge():
    old = ["method=ti", "+a.b=1", "seed=1", "~c"]
    assert merge(old, ["seed=2", "a.b=3", "d=4"]) == ["method=ti", "~c", "seed=2", "+a.b=3", "d=4"]
    assert [o.key_or_group for o in parse(merge(old, []))] == ["method", "a.b", "seed", "c"]


REAL = bench.ROOT / "conf"


def test_every_real_group_has_a_description_and_allowed_targets():
    from hiperlab.cli.help import groups

    found = groups([REAL])
    assert found
    for group, members in found.items():
        for member, text in members.items():
            assert text, f"conf/{group}/{member}.yaml does not begin with a one-line comment"
            if group.startswith("hydra/"):
                continue
            written = (REAL / group / f"{member}.yaml").read_text()
            root = "" if "# @package _global_" in written else group
            for key, target in targets(yaml.safe_load(written) or {}, root):
                assert is_allowed(key, target), f"{group}/{member}: {key}={target}"
                assert any(target.startswith(name.removesuffix("*")) for name in MODULES), target


def test_the_wandb_sweep_composes(here, monkeypatch, capsys):
    """What a W&B agent would start: `${args_no_hyphens}` becomes key=value for every parameter."""
    if not (REAL / "method" / "neti.yaml").is_file():
        pytest.skip("conf/method/neti.yaml has not landed yet")
    content = yaml.safe_load((REAL / "wandb_sweep" / "neti.yaml").read_text())
    assert content["command"] == ["${env}", "${interpreter}", "-m", "hiperlab.run", "${args_no_hyphens}"]
    words = [
        f"{key}={p['value'] if 'value' in p else p['values'][0] if 'values' in p else p['min']}"
        for key, p in content["parameters"].items()
    ]
    assert door.main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(p.stem for p in (REAL / "experiment").glob("*.yaml")))
def test_every_experiment_composes(name, capsys):
    if not (REAL / "method" / "neti.yaml").is_file():
        pytest.skip("conf/method/neti.yaml has not landed yet")
    assert door.main([f"experiment={name}", "--cfg", "job"]) == 0, capsys.readouterr().err
    opening = (REAL / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert f"python -m hiperlab.run experiment={name}" in " ".join(opening[:6])
