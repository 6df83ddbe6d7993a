"""Made-up choices of a precision, with everything that a report can show of them."""

from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.precision.record import PrecisionPoint, PrecisionRecord

ERROR = "onnxruntime cannot make int4 weights (block 32) of model.onnx: <b>no MatMul</b> | broken"


def quality(value, kind="agreement"):
    ends = (value - 0.01 * abs(value), min(value + 0.005 * abs(value), 100.0))
    error = 0.01 if kind != "output_error" else value
    values = {"output_error": error, kind: value, f"{kind}_interval": ends}
    return OutputQuality(samples=200, data_fingerprint="0" * 64, **values)


def point(name, size, value, speed=None, *, kind="agreement", scheme="static int8 (minmax)", **more):
    ends = None if speed is None else (0.97 * speed, 1.04 * speed)
    return PrecisionPoint(
        name=name,
        scheme=scheme,
        is_rival=more.pop("is_rival", False),
        bytes=size,
        quality=None if value is None else quality(value, kind),
        speedup=speed,
        speedup_interval=ends,
        **more,
    )


def record(*, kind="agreement", delivered=7, timed=True, more_bits=None):
    """Ten models: the dense one, three of onnxruntime's, one that it cannot make, and five of ours."""
    scale = {"agreement": 1.0, "cosine": 0.01, "output_error": 0.001}[kind]
    rows = [
        ("dense float32", 3_430_000, 100.0, None, "float32", True),
        ("onnxruntime's static int8 (minmax)", 1_072_000, 98.9, 4.7, "static int8 (minmax)", True),
        ("onnxruntime's dynamic int8", 3_390_000, 99.8, 1.0, "dynamic int8", True),
        ("onnxruntime's int4 weights (block 32)", None, None, None, "int4 weights (block 32)", True),
        ("dense, static int8 (minmax)", 1_060_000, 99.0, 4.71, "static int8 (minmax)", False),
        ("dense, static int8 (percentile)", 1_059_000, 99.1, 4.69, "static int8 (percentile)", False),
        ("dense, static int8, 4 bits", 640_000, 98.6, 4.6, "static int8 (minmax)", False),
        ("low rank, static int8 (minmax)", 700_000, 98.7, 3.2, "static int8 (minmax)", False),
        ("low rank, static int8, 4 bits", 430_000, 97.4, 3.1, "static int8 (minmax)", False),
        ("low rank, float32", 1_700_000, 99.2, 1.3, "float32", False),
    ]
    points = [
        point(
            name,
            size,
            None if value is None else scale * value,
            speed if timed else None,
            kind=kind,
            scheme=scheme,
            is_rival=is_rival,
            is_delivered=number == delivered,
            keeps_limit=size is None or size < 1_000_000,
            error=ERROR if size is None else "",
        )
        for number, (name, size, value, speed, scheme, is_rival) in enumerate(rows)
    ]
    return PrecisionRecord(
        request="auto",
        scheme=points[delivered].scheme,
        rule="the best outputs among models that are so small",
        points=tuple(points),
        bits=more_bits or {},
        tables={"embed": 4} if more_bits else {},
    )
