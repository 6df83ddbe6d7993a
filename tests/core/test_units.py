"""Quantities as users type them: one parser each, which says what to type."""

import pytest

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.units import (
    duration_text,
    parse_nanoseconds,
    parse_percent,
    parse_seconds,
    parse_share,
    parse_size,
    size_text,
)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("0.5", 0.5),
        (" .5 ", 0.5),
        ("1", 1.0),
        ("1.0", 1.0),
        ("50%", 0.5),
        ("50 %", 0.5),
        ("12.7%", 0.127),
        ("100%", 1.0),
        ("1%", 0.01),
        ("5e-1", 0.5),
        (0.5, 0.5),
        (1e-05, 1e-05),
        (1, 1.0),
    ],
)
def test_shares(text, share):
    assert parse_share(text, "--keep-params") == share


@pytest.mark.parametrize(
    ("text", "to_type"),
    [
        ("50", "write --keep-macs 50%"),
        ("12.5", "write --keep-macs 12.5%"),
        ("100", "write --keep-macs 100%"),
        ("1.5", "write --keep-macs 1.5%"),
        ("1e1", "write --keep-macs 10%"),
        ("101", "for example 0.5 or 50%"),
        ("0", "for example 0.5 or 50%"),
        ("-0.5", "for example 0.5 or 50%"),
        ("0%", "(0 %, 100 %]"),
        ("101%", "(0 %, 100 %]"),
        ("-5%", "(0 %, 100 %]"),
        ("half", "such as 0.5 or 50%"),
        ("", "such as 0.5 or 50%"),
        ("%", "such as 0.5 or 50%"),
        ("nan", "such as 0.5 or 50%"),
        ("0,5", "such as 0.5 or 50%"),
        ("50%%", "such as 0.5 or 50%"),
        (True, "such as 0.5 or 50%"),
    ],
)
def test_refused_shares_say_what_to_type(text, to_type):
    with pytest.raises(UsageError) as caught:
        parse_share(text, "--keep-macs")
    assert to_type in str(caught.value)
    assert f"got {str(text)!r}" in str(caught.value)
    assert str(caught.value).startswith("--keep-macs ")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20MB", 20_000_000),
        ("20 MB", 20_000_000),
        ("20MiB", 20 * 1024**2),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("1GB", 10**9),
        ("5kB", 5000),
        ("512mb", 512_000_000),
        ("20Mib", 20 * 1024**2),
        (12, 12),
        ("5KB", 5000),
        ("5KiB", 5120),
        (".5kB", 500),
        ("0.29MB", 290_000),  # 0.29 * 10**6 is 289999.99999999994
        ("1.2345kB", 1234),
        ("4096", 4096),
        ("4096B", 4096),
        (4096, 4096),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, "--max-size") == size


@pytest.mark.parametrize(
    ("text", "to_type"),
    [
        ("20M", "write --max-size 20MB or 20MiB"),
        ("7K", "write --max-size 7kB or 7KiB"),
        ("20 bytes", "write --max-size 20B"),
        ("20TB", "write --max-size 20MB or 20MiB"),
        ("12", "write 12MB, or 12B"),
        ("0.5", "for example 0.5MB"),
        ("0.5B", "for example 0.5MB"),
        ("0", "at least 1 byte"),
        ("0MB", "at least 1 byte"),
        ("0.0001kB", "at least 1 byte"),
        ("-5MB", "such as 20MB, 20MiB or 20000000"),
        ("20,000,000", "such as 20MB, 20MiB or 20000000"),
        ("1e6", "such as 20MB, 20MiB or 20000000"),
        ("50%", "such as 20MB, 20MiB or 20000000"),
        ("MB", "such as 20MB, 20MiB or 20000000"),
        ("", "such as 20MB, 20MiB or 20000000"),
        (True, "such as 20MB, 20MiB or 20000000"),
    ],
)
def test_refused_sizes_say_what_to_type(text, to_type):
    with pytest.raises(UsageError) as caught:
        parse_size(text, "--max-size")
    assert to_type in str(caught.value)
    assert f"got {str(text)!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "to_type"),
    [
        ("25", "write --max-latency 25ms"),
        ("0ms", "at least 1 nanosecond"),
        ("-1ms", "such as 25ms"),
        ("soon", "such as 25ms"),
    ],
)
def test_refused_times_say_what_to_type(text, to_type):
    with pytest.raises(UsageError, match=to_type):
        parse_nanoseconds(text, "--max-latency")


@pytest.mark.parametrize("text", ["5", "0.05", "x%", "-1%", "5%%", "", "nan%", "inf%"])
def test_a_percentage_has_its_sign(text):
    with pytest.raises(UsageError, match=r"--max-slowdown takes a percentage such as 5%, but got"):
        parse_percent(text, "--max-slowdown")
    assert parse_percent(" 2.5% ", "--max-slowdown") == 2.5


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("240s", 240.0),
        ("2m", 120.0),
        ("2min", 120.0),
        ("1h", 3600.0),
        ("25ms", 0.025),
        ("25MS", 0.025),
        ("7us", 7e-6),
        ("60", 60.0),
        (0.5, 0.5),
        (3, 3.0),
        (" 1.5 s ", 1.5),
    ],
)
def test_durations(text, seconds):
    assert parse_seconds(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["soon", "", "-1s", "0", "0s", "nan", "inf", "5 days", -1.0, True])
def test_refused_durations_say_what_to_type(text):
    with pytest.raises(UsageError, match="--budget .*(takes a time|for example) .*25ms|--budget must be at least"):
        parse_seconds(text, "--budget")


def test_texts_are_read_back():
    for size in (1, 500, 1536, 20_000_000, 3 << 30):
        assert parse_size(size_text(size), "--max-size") == size
    for nanoseconds in (1500, 25_000_000, 240 * 10**9, 10**9 + 1000):
        assert parse_nanoseconds(duration_text(nanoseconds), "--max-latency") == nanoseconds
