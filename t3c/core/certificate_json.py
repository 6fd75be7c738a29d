"""Certificates as JSON; infinite bounds are written as a word, since JSON has no infinity."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from t3c.core.certificate import (
    Bound,
    Calibrated,
    Certificate,
    Checked,
    Draw,
    Drifts,
    Estimate,
    Labels,
    Margin,
    Observed,
    Proxy,
    Share,
    Shifted,
    Sound,
    SoundStatus,
)
from t3c.core.fields import Fields
from t3c.core.per_input import PerInput


def certificate_to_json(c: Certificate) -> dict[str, Any]:
    """A certificate as manifests store it."""
    return {
        "proxy": None if c.proxy is None else _proxy_to_json(c.proxy),
        "sound": None if c.sound is None else sound_to_json(c.sound),
        "calibrated": None if c.calibrated is None else _calibrated_to_json(c.calibrated),
        "observed": None if c.observed is None else asdict(c.observed),
        "labels": None if c.labels is None else asdict(c.labels),
        "per_input": None if c.per_input is None else _per_input_to_json(c.per_input),
    }


def _number(value: float | None) -> float | str | None:
    return "inf" if value == math.inf else value


def certificate_from_json(f: Fields) -> Certificate:
    """What `certificate_to_json` wrote."""
    return Certificate(
        f.optional("proxy", lambda k: f.within(k, _proxy_from_json)),
        f.optional("sound", lambda k: f.within(k, sound_from_json)),
        f.optional("calibrated", lambda k: f.within(k, _calibrated_from_json)),
        f.optional("observed", lambda k: f.within(k, _observed_from_json)),
        f.optional("labels", lambda k: f.within(k, _labels_from_json)),
        f.optional("per_input", lambda k: f.within(k, _per_input_from_json)),
    )


def _proxy_to_json(found: Proxy) -> dict[str, Any]:
    return {
        "estimates": {n: _numbers(asdict(e)) for n, e in found.estimates.items()},
        "shares": {
            site: _numbers({k: v for k, v in asdict(s).items() if k != "estimates"})
            | {"estimates": _numbers(s.estimates)}
            for site, s in found.shares.items()
        },
        "spread": _number(found.spread),
        "inputs": found.inputs,
        "gains_measured": found.gains_measured,
        "seconds": found.seconds,
    }


def _numbers(values: Mapping[str, float]) -> dict[str, Any]:
    return {name: _number(value) for name, value in values.items()}


def _proxy_from_json(f: Fields) -> Proxy:
    return Proxy(
        estimates=f.named("estimates", _estimate_from_json),
        shares=f.named("shares", _share_from_json),
        spread=f.number("spread"),
        inputs=f.whole("inputs"),
        gains_measured=f.whole("gains_measured"),
        seconds=f.number("seconds"),
    )


def _estimate_from_json(f: Fields) -> Estimate:
    return Estimate(f.number("value"), f.number("raw"), f.number("teacher"), f.number("rounding"))


def _share_from_json(f: Fields) -> Share:
    return Share(
        f.number("gain"),
        f.number("residual"),
        f.number("alpha"),
        f.number("rounding"),
        f.within("estimates", lambda e: {k: e.number(k) for k in e.data}),
    )


def sound_to_json(found: Sound) -> dict[str, Any]:
    """A proven bound as JSON; infinity is a word."""
    numbers = {k: _number(v) for k, v in asdict(found).items() if isinstance(v, float)}
    return {**asdict(found), **numbers}


def sound_from_json(f: Fields) -> Sound:
    """What `sound_to_json` wrote."""
    status: SoundStatus = f.choice("status", get_args(SoundStatus))
    return Sound(
        status,
        f.number("value"),
        f.number("raw"),
        f.number("teacher"),
        f.text("domain"),
        f.text("reason"),
    )


def _calibrated_to_json(found: Calibrated) -> dict[str, Any]:
    bounds = [
        {
            "level": b.level,
            "value": _number(b.value),
            "raw": _number(b.raw),
            "teacher": _number(b.teacher),
            "coverage": list(b.coverage),
        }
        for b in found.bounds
    ]
    draws = [{**asdict(d), "bounds": [_number(b) for b in d.bounds]} for d in found.draws]
    return {
        "bounds": bounds,
        "inputs": found.inputs,
        "sha256": found.sha256,
        "draws": draws,
        "shifted": None if found.shifted is None else asdict(found.shifted),
    }


def _calibrated_from_json(f: Fields) -> Calibrated:
    return Calibrated(
        f.each("bounds", _bound_from_json),
        f.whole("inputs"),
        f.text("sha256"),
        f.optional("draws", lambda k: f.each(k, _draw_from_json)) or (),
        f.optional("shifted", lambda k: f.within(k, _shifted_from_json)),
    )


def _draw_from_json(f: Fields) -> Draw:
    return Draw(
        f.whole("inputs"),
        f.text("sha256"),
        f.limits("bounds"),
        f.numbers("covered"),
        f.number("drift"),
        f.optional("agreement", f.number),
        f.optional("accuracy", f.number),
    )


def _shifted_from_json(f: Fields) -> Shifted:
    return Shifted(f.whole("inputs"), f.text("sha256"), f.numbers("coverage"), f.number("drift"))


def _bound_from_json(f: Fields) -> Bound:
    return Bound(
        f.number("level"),
        f.number("value"),
        f.number("raw"),
        f.number("teacher"),
        f.numbers("coverage"),
    )


def _observed_from_json(f: Fields) -> Observed:
    return Observed(
        **asdict(_drifts_from_json(f)),
        inputs=f.whole("inputs"),
        teacher=f.optional("teacher", lambda k: f.within(k, _drifts_from_json)),
    )


def _drifts_from_json(f: Fields) -> Drifts:
    return Drifts(
        mean=f.number("mean"),
        median=f.number("median"),
        p95=f.number("p95"),
        max=f.number("max"),
        relative=f.number("relative"),
        flips=f.optional("flips", f.number),
    )


def _labels_from_json(f: Fields) -> Labels:
    return Labels(
        inputs=f.whole("inputs"),
        flips=f.number("flips"),
        teacher=f.number("teacher"),
        confidence=f.number("confidence"),
        accuracy=f.optional("accuracy", f.number),
        original_accuracy=f.optional("original_accuracy", f.number),
        ece=f.optional("ece", f.number),
        original_ece=f.optional("original_ece", f.number),
        margins=f.each("margins", _margin_from_json),
        checked=f.each("checked", _checked_from_json),
    )


def _margin_from_json(f: Fields) -> Margin:
    return Margin(
        f.number("low"),
        f.number("high"),
        f.whole("inputs"),
        f.number("flips"),
        f.number("confidence"),
        f.optional("ece", f.number),
    )


def _checked_from_json(f: Fields) -> Checked:
    level = f.optional("level", f.number)
    return Checked(level, f.number("certified"), f.number("flips"))


def _per_input_to_json(found: PerInput) -> dict[str, Any]:
    limits = {k: [_number(v) for v in getattr(found, k)] for k in ("factors", "ratios")}
    return asdict(found) | limits


def _per_input_from_json(f: Fields) -> PerInput:
    return PerInput(
        weights=f.numbers("weights"),
        offset=f.number("offset"),
        low=f.number("low"),
        high=f.number("high"),
        levels=f.numbers("levels"),
        factors=f.limits("factors"),
        ratios=f.limits("ratios"),
        inputs=f.whole("inputs"),
        taught=f.optional("taught", f.whole) or 0,
        directions=f.optional("directions", f.whole) or 0,
    )
