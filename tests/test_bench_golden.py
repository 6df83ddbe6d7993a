"""bench/golden.py: the record is compared, and a difference of one number or file is named."""

import copy
import json

from bench import golden

RECORD = json.loads(golden.RECORD.read_text(encoding="utf-8"))["outcomes"]


def test_every_command_is_in_the_record_and_covers_every_verb():
    assert golden.CASES.keys() <= RECORD.keys()
    verbs = {words[0] for words in golden.CASES.values()}
    assert {"export", "inspect", "sweep", "eval", "verify", "package", "schema"} <= verbs
    assert sum(bool(outcome["files"]) for outcome in RECORD.values()) > 25


def test_a_changed_number_file_or_exit_code_is_named():
    then = RECORD["cnn"]
    assert golden._goal("cnn", then, then).held
    path = next(iter(then["numbers"]))
    file = next(iter(then["files"]))
    for part, key in (("numbers", path), ("files", file)):
        now = copy.deepcopy(then)
        now[part][key] = "other"
        goal = golden._goal("cnn", then, now)
        assert not goal.held
        assert key in goal.row
        del now[part][key]
        assert not golden._goal("cnn", then, now).held
    assert not golden._goal("cnn", then, then | {"code": 3}).held
    assert not golden._goal("new", None, then).held


def test_numbers_leave_out_what_is_of_the_run():
    document = {"seconds": 3.0, "a": [{"b": 1}, 2], "yes": True, "machine": {"cores": 2}}
    assert dict(golden._numbers(document)) == {"a.0.b": 1, "a.1": 2}
