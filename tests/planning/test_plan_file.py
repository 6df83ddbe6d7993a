import errno
import json
import os
import typing

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import graph_passes.forms
from rsi_deploy.core.errors import UsageError
from rsi_deploy.planning import plan_file
from rsi_deploy.planning.plan_file import Plan, PlannedForm, PlannedSite, check_plan, read_plan, write_plan

SITES = [
    ("features.0", {"channel": 27, "input": 3, "separable": 9}),
    ("features.3", {"channel": 64, "input": 64}),
    ("classifier", {"gemm": 10}),
    ("depthwise", {}),
]
PLAN = Plan(
    tool="rsi-deploy 0.2.0",
    source_hash="3f1c",
    sites={
        "features.3": PlannedSite(form="channel", rank=24),
        "classifier": PlannedSite(form="dense", reason="excluded by --exclude classifier"),
    },
)


def document(**changes):
    return {"schema_version": 1, "tool": "by hand", "sites": {}} | changes


def refusal(path, text):
    """The error of `read_plan` for a file with `text` (or the JSON of an object)."""
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_file_matches_the_docstring(tmp_path):
    write_plan(tmp_path / "plan.json", PLAN)
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "schema_version": 1,
        "tool": "rsi-deploy 0.2.0",
        "source_hash": "3f1c",
        "sites": {
            "features.3": {"form": "channel", "rank": 24},
            "classifier": {"form": "dense", "reason": "excluded by --exclude classifier"},
        },
    }
    write_plan(tmp_path / "plan.json", PLAN.model_copy(update={"source_hash": None}))
    assert "source_hash" not in json.loads((tmp_path / "plan.json").read_text())


SPLIT = st.builds(
    PlannedSite,
    form=st.sampled_from(["matmul", "gemm", "channel", "input", "separable"]),
    rank=st.integers(1, 10**6),
    reason=st.text(),
)
DENSE = st.builds(PlannedSite, form=st.just("dense"), reason=st.text())


@settings(deadline=None)
@given(
    st.builds(Plan, tool=st.text(), source_hash=st.none() | st.text(), sites=st.dictionaries(st.text(), SPLIT | DENSE))
)
def test_a_written_plan_can_be_read(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_plan(path, plan)
    assert read_plan(path) == plan
    assert list(read_plan(path).sites) == list(plan.sites)
    first = path.read_bytes()
    write_plan(path, read_plan(path))
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (errno.EACCES, UsageError, r"cannot write .*plan\.json: Permission denied; choose another name"),
        (errno.ENOSPC, OSError, "No space left on device"),  # reported by the command line as for any file
    ],
)
def test_writing_is_all_or_nothing(tmp_path, monkeypatch, code, error, words):
    path = tmp_path / "plan.json"
    write_plan(path, PLAN)
    before = path.read_bytes()

    def failing(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(error, match=words):
        write_plan(path, PLAN.model_copy(update={"sites": {}}))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]
    monkeypatch.undo()
    write_plan(path, PLAN.model_copy(update={"sites": {}}))
    assert read_plan(path).sites == {}
    assert os.listdir(tmp_path) == ["plan.json"]


def test_the_file_mode_follows_the_umask(tmp_path):
    write_plan(tmp_path / "plan.json", PLAN)
    (tmp_path / "usual").touch()
    assert (tmp_path / "plan.json").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_missing_folder(tmp_path):
    with pytest.raises(UsageError, match=r"cannot write .*plan\.json: No such file or directory; choose another name"):
        write_plan(tmp_path / "nowhere" / "plan.json", PLAN)


@pytest.mark.parametrize("name", ["none.json", "."])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(UsageError, match=r"cannot read the plan .*; expected a plan\.json"):
        read_plan(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "form: dense", '{"a": 1,}', "[" * 100_000])
def test_not_json(tmp_path, text):
    assert "is not JSON" in refusal(tmp_path / "plan.json", text)


def test_not_text(tmp_path):
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not JSON"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("text", ["[]", "3", '"plan"', "null"])
def test_json_of_another_kind(tmp_path, text):
    assert f'must be an object with "schema_version" and "sites", but got {text}' in refusal(tmp_path / "p", text)


@pytest.mark.parametrize(
    ("version", "came"), [(2, "2"), (0, "0"), ("1", '"1"'), (1.0, "1.0"), (True, "true"), (None, "null")]
)
def test_another_version(tmp_path, version, came):
    assert f'expected "schema_version": 1, but got {came};' in refusal(tmp_path / "p", document(schema_version=version))
    without = document()
    del without["schema_version"]
    assert 'expected "schema_version": 1, but got none;' in refusal(tmp_path / "p", without)


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (
            {"form": "gemm", "rank": 4, "power": 2},
            "site 'fc', 'power': unknown key; known keys are form, rank, bits, repair, products, reason",
        ),
        ({"form": "gemm"}, 'site \'fc\': form "gemm" needs a rank; add "rank": N with N of at least 1'),
        ({"form": "gemm", "rank": None}, "site 'fc': form \"gemm\" needs a rank"),
        ({"form": "gemm", "rank": 0}, "site 'fc', 'rank': input should be greater than or equal to 1, but got 0"),
        ({"form": "gemm", "rank": -3}, "site 'fc', 'rank': input should be greater than or equal to 1, but got -3"),
        ({"form": "gemm", "rank": "8"}, "site 'fc', 'rank': input should be a valid integer, but got \"8\""),
        ({"form": "gemm", "rank": True}, "site 'fc', 'rank': input should be a valid integer, but got true"),
        ({"form": "gemm", "rank": 8.5}, "site 'fc', 'rank': input should be a valid integer"),
        ({"form": "dense", "rank": 4}, "site 'fc': form \"dense\" has no rank, but got 4; remove the rank"),
        ({"form": "svd", "rank": 4}, "site 'fc', 'form': input should be 'dense', 'matmul', 'gemm', 'channel',"),
        ({"rank": 4}, "site 'fc', 'form': missing; add it"),
        ({"form": "dense", "reason": 3}, "site 'fc', 'reason': input should be a valid string, but got 3"),
        (4, "site 'fc': input should be an object, but got 4"),
    ],
)
def test_sites_that_are_invalid(tmp_path, site, words):
    (tmp_path / "right").write_text(json.dumps(document(sites={"fc": {"form": "gemm", "rank": 4}})))
    assert read_plan(tmp_path / "right").sites == {"fc": PlannedSite(form="gemm", rank=4)}
    assert words in refusal(tmp_path / "wrong", document(sites={"fc": site}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": {}}, "'ranks': unknown key; known keys are schema_version, tool, source_hash, sites"),
        ({"tool": None}, "'tool': input should be a valid string, but got null"),
        ({"sites": []}, "'sites': input should be an object, but got []"),
        ({"sites": {}, "source_hash": 5}, "'source_hash': input should be a valid string, but got 5"),
    ],
)
def test_documents_that_are_invalid(tmp_path, changes, words):
    assert words in refusal(tmp_path / "plan.json", document(**changes))


def test_a_duplicate_site(tmp_path):
    text = '{"schema_version": 1, "tool": "", "sites": {"fc": {"form": "dense"}, "fc": {"form": "gemm", "rank": 2}}}'
    assert '"fc" twice; keep one of them' in refusal(tmp_path / "plan.json", text)


def test_many_problems_are_counted(tmp_path):
    message = refusal(tmp_path / "plan.json", document(sites={f"s{i}": {"form": "gemm"} for i in range(9)}))
    assert message.count("needs a rank") == plan_file.SHOWN
    assert message.endswith("; and 4 more")
    assert " more" not in refusal(tmp_path / "plan.json", document(sites={f"s{i}": {"form": "gemm"} for i in range(5)}))


def test_the_constructors_refuse_the_same():
    for wrong in (
        {"form": "gemm"},
        {"form": "gemm", "rank": 0},
        {"form": "dense", "rank": 1},
        {"form": "x", "rank": 1},
    ):
        with pytest.raises(pydantic.ValidationError):
            PlannedSite(**wrong)


def test_the_forms_are_those_of_graph_passes():
    assert set(typing.get_args(PlannedForm)) == {"dense", *typing.get_args(graph_passes.forms.Form)}


def plan(**sites):
    return Plan(tool="", sites={name.replace("_", "."): site for name, site in sites.items()})


def test_a_plan_that_fits_gives_every_site_in_order_with_a_reason():
    assert check_plan(PLAN, iter(SITES)) == {
        "features.0": PlannedSite(form="dense", reason="not in the plan"),
        "features.3": PlannedSite(form="channel", rank=24, reason="as the plan says"),
        "classifier": PlannedSite(form="dense", reason="excluded by --exclude classifier"),
        "depthwise": PlannedSite(form="dense", reason="not in the plan"),
    }
    assert list(check_plan(PLAN, SITES)) == [name for name, _ in SITES]
    assert check_plan(plan(), []) == {}


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            {"clasifier": PlannedSite(form="gemm", rank=2)},
            "site 'clasifier' is not in the model (similar names: classifier); remove it from the plan",
        ),
        ({"zzz": PlannedSite(form="dense")}, "site 'zzz' is not in the model (similar names: features.0, features.3,"),
        (
            {"classifier": PlannedSite(form="matmul", rank=2)},
            'site \'classifier\' cannot have the form "matmul"; possible are "gemm" up to rank 10, or "dense"',
        ),
        (
            {"features_0": PlannedSite(form="input", rank=4)},
            'site \'features.0\' cannot have rank 4 as "input"; possible are "channel" up to rank 27, '
            '"input" up to rank 3, "separable" up to rank 9, or "dense"',
        ),
        (
            {"depthwise": PlannedSite(form="channel", rank=1)},
            'site \'depthwise\' cannot be split, but got form "channel"; write "form": "dense" without a rank',
        ),
    ],
)
def test_plans_that_do_not_fit(sites, message):
    with pytest.raises(UsageError) as caught:
        check_plan(plan(**sites), SITES)
    assert str(caught.value).startswith("the plan does not fit the model: ")
    assert message in str(caught.value)


def test_the_largest_rank_fits():
    for name, forms in SITES:
        for form, full in forms.items():
            site = PlannedSite(form=form, rank=full, reason="full")
            assert check_plan(Plan(tool="", sites={name: site}), SITES)[name] == site
            with pytest.raises(UsageError, match=f"cannot have rank {full + 1}"):
                check_plan(Plan(tool="", sites={name: PlannedSite(form=form, rank=full + 1)}), SITES)


def test_one_message_names_several_misfits():
    wrong = plan(**{f"no{i}": PlannedSite(form="dense") for i in range(7)})
    with pytest.raises(UsageError) as caught:
        check_plan(wrong, SITES)
    assert str(caught.value).count("is not in the model") == plan_file.SHOWN
    assert str(caught.value).endswith("; and 2 more")
    with pytest.raises(UsageError, match=r"'no0' is not in the model \(it has no sites\)"):
        check_plan(wrong, [])
