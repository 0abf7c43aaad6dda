"""Define ``loopserve bench serve``: the load of many conversations on any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from loopserve.cli.options import Format, FormatOption
from loopserve.cli.output import print_json, print_table
from loopserve.core.errors import ConfigError


def serve(
    base_url: Annotated[str, typer.Option(help="Address of the server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Its model. [default: the first that it lists]")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Conversations in all.")] = 16,
    num_turns: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 4,
    random_input_len: Annotated[int, typer.Option(min=1, help="Words of a first message.")] = 256,
    turn_input_len: Annotated[int, typer.Option(min=1, help="Words of a later message.")] = 32,
    random_output_len: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    request_rate: Annotated[
        float | None, typer.Option(min=0.001, help="Conversations that begin per second. [default: all at once]")
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Conversations under way at once. [default: all]")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of full length; not every server knows the field.")
    ] = False,
    percentile_metrics: Annotated[str, typer.Option(help="Of ttft, tpot, itl, e2el.")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles to report.")] = "50,99",
    goodput: Annotated[
        list[str] | None, typer.Option(help="A limit in ms, as ttft:500, that good requests keep; repeatable.")
    ] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON that every request has as well.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of the server.")] = None,
    seed: Annotated[int, typer.Option(help="Of the texts and the times.")] = 0,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the figures as JSON.")] = False,
    result_dir: Annotated[Path, typer.Option(help="Where to.")] = Path("."),
    result_filename: Annotated[str | None, typer.Option(help="[default: serve-DATE.json]")] = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Conversations of several turns with any OpenAI-compatible server: latency by turn, throughput, cached share, errors."""
    try:
        from loopserve.bench.serving.client import Load, first_model, hold
    except ModuleNotFoundError as error:
        raise ConfigError(f"this needs {error.name}: pip install 'loopserve[serve]'") from error
    from loopserve.bench.serving.summary import METRICS, read_goodput, summary

    metrics = [each.strip() for each in percentile_metrics.split(",") if each.strip()]
    if unknown := [each for each in metrics if each not in METRICS]:
        raise ConfigError(f"--percentile-metrics: {unknown[0]!r} is not known (known: {', '.join(METRICS)})")
    shares, limits, more = _percentiles(metric_percentiles), read_goodput(goodput or ()), _object(extra_body)
    url = base_url.rstrip("/").removesuffix("/v1")
    load = Load(
        url,
        model or asyncio.run(first_model(url, api_key)),
        conversations=num_prompts,
        turns=num_turns,
        first_words=random_input_len,
        words=turn_input_len,
        output_tokens=random_output_len,
        rate=request_rate,
        concurrency=max_concurrency,
        ignore_eos=ignore_eos,
        seed=seed,
        api_key=api_key,
        extra_body=more,
    )
    turns, seconds = asyncio.run(hold(load, lambda done: _progress(done, num_prompts)))
    found = summary(turns, seconds, metrics=metrics, percentiles=shares, goodput=limits)
    found = {"base_url": url, "model": load.model, "date": datetime.now(UTC).isoformat(timespec="seconds"), **found}
    if save_result:
        path = result_dir / (result_filename or f"serve-{found['date'].replace(':', '')}.json")
        _save(path, found)
    if format is Format.JSON:
        print_json(found)
    else:
        _print(found, metrics, shares)
    if found["failed"]:
        raise typer.Exit(1)


def _percentiles(given: str) -> list[float]:
    try:
        found = [float(each) for each in given.split(",")]
    except ValueError:
        raise ConfigError(f"--metric-percentiles {given!r}: write numbers, as 50,90,99") from None
    if not all(0 <= each <= 100 for each in found):
        raise ConfigError(f"--metric-percentiles {given!r}: they are between 0 and 100")
    return found


def _object(given: str | None) -> dict[str, Any]:
    try:
        found = json.loads(given or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body: no valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError("--extra-body: it must be a JSON object")
    return found


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} conversations", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _save(path: Path, found: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--result-dir {path}: cannot be written ({error.strerror})") from error


def _print(found: dict[str, Any], metrics: list[str], shares: list[float]) -> None:
    rows = [
        ("turns completed, failed", f"{found['completed']}, {found['failed']}"),
        ("seconds", f"{found['duration']:.2f}"),
        ("input tokens, of them cached", f"{found['total_input_tokens']}, {found['cached_share']:.1%}"),
        ("output tokens", str(found["total_output_tokens"])),
        ("turns per second", f"{found['request_throughput']:.2f}"),
        ("output tokens per second", f"{found['output_throughput']:.1f}"),
    ]
    if found["request_goodput"] is not None:
        rows.append(("good turns per second", f"{found['request_goodput']:.2f}"))
    print_table(("figure", "value"), rows)
    names = ["mean", *(f"p{share:g}" for share in shares)]
    print()
    print_table(("ms", *names), [(name, *(_ms(found, each, name) for each in names)) for name in metrics], right=True)
    by_turn = [
        (
            str(row["turn"]),
            f"{row['input_tokens']:.0f}",
            f"{row['cached_share']:.1%}",
            *(_ms(row, f"p{share:g}", name) for name in ("ttft", "itl", "e2el") for share in shares),
        )
        for row in found["turns"]
    ]
    columns = [f"{name} p{share:g}" for name in ("TTFT", "ITL", "E2E") for share in shares]
    print()
    print_table(("turn", "input", "cached", *columns), by_turn, right=True)
    for text, count in found["errors"].items():
        print(f"{count} x {text}", file=sys.stderr)


def _ms(figures: dict[str, Any], share: str, metric: str) -> str:
    value = figures[f"{share}_{metric}_ms"]
    return "-" if value is None else f"{value:.1f}"
