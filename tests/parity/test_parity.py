"""The parity report: golden cases are identical, differences are caught, the command line keeps its word."""

import dataclasses
import json
import shutil
import sys

import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from parity import live
from parity.__main__ import app, main
from parity.case import GOLDEN, case_class, find_cases, read_case
from parity.compare import check
from parity.subjects import Subject, subjects_of

KNOWN = [path for path in find_cases(GOLDEN) if subjects_of(case_class(path))]
CASE = GOLDEN / "lrnnx_lru_b"


def invoke(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def rows(precision="float32", paths=KNOWN):
    return [check(read_case(path), subject, precision) for path in paths for subject in subjects_of(case_class(path))]


def test_every_known_case_is_found():
    names = [path.name for path in KNOWN]
    assert len([name for name in names if name.startswith("lrnnx_s5lti_")]) == 9
    assert len([name for name in names if name.startswith("lrnnx_lru_")]) == 2
    assert len([name for name in names if name.startswith("lrnnx_mamba_")]) == 16
    assert len([name for name in names if name.startswith(("lrnnx_s4_", "lrnnx_s4d_"))]) == 58


def check_golden(path):
    case = read_case(path)
    has_steps = any(run.step is not None for run in case.runs)
    for row in rows(paths=[path]):
        assert row.verdict == "identical", row.note
        assert row.forward is not None
        # a case recorded in bfloat16 has neither gradients nor a float64 output
        assert (None in (row.gradient, row.relative)) == (case.recorded_in is not None)
        assert (row.step is not None) == has_steps


@pytest.mark.parametrize("path", KNOWN[5::16], ids=lambda path: path.name)
def test_golden_cases_are_identical(path):
    check_golden(path)


@pytest.mark.full
@pytest.mark.parametrize("path", KNOWN, ids=lambda path: path.name)
def test_golden_cases_are_identical_everywhere(path):
    check_golden(path)


@pytest.mark.parametrize("path", KNOWN[3::45], ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_other_precisions(path, precision):
    for row in rows(precision, [path]):
        assert row.verdict == "identical", row.note


@pytest.mark.full
@pytest.mark.parametrize("path", KNOWN, ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_other_precisions_everywhere(path, precision):
    for row in rows(precision, [path]):
        assert row.verdict == "identical", row.note


def spoilt(forward=lambda y: y, steps=lambda y: y):
    (ours, _) = subjects_of(case_class(CASE))
    return Subject("spoilt", lambda *a: forward(ours.forward(*a)), lambda *a: steps(ours.steps(*a)))


@pytest.mark.parametrize(
    ("subject", "measure"),
    [
        (spoilt(forward=lambda y: y + 2e-4), "forward"),
        (spoilt(forward=lambda y: y * (1 + 2e-6)), "relative"),
        (spoilt(steps=lambda y: y + 4e-4), "step"),
        (spoilt(forward=lambda y: jnp.where(y > 1.5, jnp.nan, y)), "forward"),
        (spoilt(forward=lambda y: y[:, :-1]), "shape"),
    ],
)
def test_differences_are_seen(subject, measure):
    row = check(read_case(CASE), subject)
    assert row.verdict == "differs"
    assert measure in row.note


def test_wrong_gradients_are_seen():
    import jax

    @jax.custom_vjp
    def same(y):
        return y

    same.defvjp(lambda y: (y, None), lambda _, g: (g * 1.001,))
    row = check(read_case(CASE), spoilt(forward=same))
    assert row.verdict == "differs"
    assert "gradient" in row.note


def test_a_gradient_that_the_reference_lacks_must_be_zero():
    case = read_case(GOLDEN / "lrnnx_s5lti_zoh_b")
    grads = {name: value for name, value in case.runs[0].grads.items() if name != "log_dt"}
    changed = dataclasses.replace(case, runs=(dataclasses.replace(case.runs[0], grads=grads),))
    (subject,) = subjects_of(case.cls)
    assert "grad.log_dt" in check(changed, subject).note


def test_an_exception_is_a_difference_not_the_end():
    def explode(*args):
        raise RuntimeError("no such thing")

    row = check(read_case(CASE), Subject("broken", explode, explode))
    assert (row.verdict, row.note) == ("differs", "RuntimeError: no such thing")


def test_command_line_table_json_and_exit_status(tmp_path):
    report = tmp_path / "report.json"
    result = invoke("-k", "lrnnx_lru_b", "--json", report)
    assert result.exit_code == 0, result.output
    assert "lrnnx_lru_b" in result.output
    assert "2 identical, 0 differ, 0 unsupported" in result.output
    content = json.loads(report.read_text())
    assert [row["subject"] for row in content["rows"]] == ["compat_torch.LRU", "spyx.LRU"]
    assert content["about"]["dtype"] == "float32"
    assert "jax" in content["about"]


def test_differences_make_exit_status_1(tmp_path):
    shutil.copytree(CASE, tmp_path / "changed")
    from safetensors.numpy import load_file, save_file

    io = load_file(tmp_path / "changed" / "io.safetensors")
    (tmp_path / "changed" / "io.safetensors").unlink()
    moved = {name: io[name] + io[name].dtype.type(0.01) for name in ("y", "y64")}
    save_file({**io, **moved}, tmp_path / "changed" / "io.safetensors")
    result = invoke("--golden", tmp_path, "--json", tmp_path / "report.json")
    assert result.exit_code == 1
    assert "2 differ" in result.output
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["verdict"] == "differs"


def test_unsupported_cases_are_listed_when_asked_for(tmp_path):
    shutil.copytree(CASE, tmp_path / "known")
    shutil.copytree(CASE, tmp_path / "later")
    meta = json.loads((tmp_path / "later" / "case.json").read_text())
    (tmp_path / "later" / "case.json").unlink()
    (tmp_path / "later" / "case.json").write_text(json.dumps({**meta, "cls": "lrnnx.models.ltv.mamba:Unheard"}))
    quiet = invoke("--golden", tmp_path)
    assert quiet.exit_code == 0
    assert "1 more cases belong to classes that do not exist here yet" in quiet.output
    for args in (["--all"], ["-k", "later"]):
        asked = invoke("--golden", tmp_path, *args)
        assert asked.exit_code == 1
        assert "1 unsupported" in asked.output
        assert "no class for lrnnx.models.ltv.mamba:Unheard yet" in asked.output


def test_nothing_to_check_is_exit_status_2(tmp_path):
    assert invoke("-k", "no-such-case").exit_code == 2
    assert invoke("--golden", tmp_path / "absent").exit_code == 2
    assert invoke("--golden", tmp_path).exit_code == 2


def test_the_word_run_may_be_left_out(monkeypatch, capsys):
    for args in (["run", "-k", "lrnnx_lru_b"], ["-k", "lrnnx_lru_b"]):
        monkeypatch.setattr(sys, "argv", ["parity", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        assert "2 identical" in capsys.readouterr().out


def test_live_without_the_reference_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lrnnx", None)
    result = invoke("--live")
    assert result.exit_code == 2
    for line in live.INSTALL.splitlines():
        assert line in result.output


def test_live_configurations_cover_every_class_and_discretization():
    found = live.configurations()
    assert all(subjects_of(configuration.cls) for configuration in found)
    assert len({configuration.name for configuration in found}) == len(found)
    discretizations = {(c.cls.split(":")[1], c.event, c.kwargs.get("discretization")) for c in found}
    usual = {"zoh", "bilinear", "dirac"}
    assert {d for name, _, d in discretizations if name == "S5"} == {*usual, "no_discretization"}
    for event in (False, True):
        assert {d for name, e, d in discretizations if (name, e) == ("Mamba", event)} == {*usual, "mamba"}
