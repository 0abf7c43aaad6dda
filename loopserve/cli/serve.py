"""Define ``loopserve serve``: an OpenAI-compatible server."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from loopserve.cli.options import (
    BreakEvenFrom,
    BreakEvenOption,
    ChecksOption,
    DeviceOption,
    DtypeOption,
    FaultOption,
    ModelArgument,
    RevisionOption,
    Settings,
    StackOption,
    TimeoutOption,
    TrustOption,
    Weights,
    WeightsOption,
)
from loopserve.core.errors import POLICY_TIMEOUT_S, ConfigError, OnPolicyFault, PolicyChecks

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def read_bytes(text: str) -> int:
    """Return the bytes that ``4GiB``, ``500M`` or a plain number stand for. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    if match is None or not (found := int(float(match[1]) * _UNITS[match[2] or ""])):
        raise typer.BadParameter(f"{text!r} is no size; write 4GiB, 500MiB or a number of bytes")
    return found


def read_seconds(text: str) -> float:
    """Return the seconds that ``24h``, ``30m`` or a plain number stand for; 0 = for ever. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])?", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no duration; write 24h, 30m, 90s or 7d")
    return float(match[1]) * _SECONDS[match[2] or ""]


def serve(
    context: typer.Context,
    model: ModelArgument,
    stack: StackOption = "loopserve",
    allow_stack: Annotated[
        list[str] | None, typer.Option(help="A further stack that a request may name; may be repeated.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other than this machine's own: needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="LOOPSERVE_API_KEY", help="Key that requests must carry; each is a tenant. May be repeated."
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with keys, one a line.")] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name, in the Host header, to be served under without a key; may be repeated."),
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Listen for other machines without a key.")] = False,
    session_dir: Annotated[
        Path | None, typer.Option(help="Where conversations and their caches are kept. Not given: in memory.")
    ] = None,
    session_key_file: Annotated[
        Path | None, typer.Option(help="Key that encrypts the session directory: 32 bytes, plain, hex or base64.")
    ] = None,
    session_ttl: Annotated[str, typer.Option(help="Forget conversations that rest this long; 0 = never.")] = "24h",
    session_disk: Annotated[
        str | None, typer.Option(help="Bytes that caches may take on disk; the oldest are removed. [default: any]")
    ] = None,
    session_disk_per_key: Annotated[
        str | None, typer.Option(help="The same for the caches of one key. [default: any]")
    ] = None,
    kv_cache_memory: Annotated[str, typer.Option(help="Bytes that the caches of all conversations may take.")] = "4GiB",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 16,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass.")] = 512,
    max_pass_steps: Annotated[
        float,
        typer.Option(
            min=0.0, help="While requests overlap, a pass takes about so many decode steps at most; 0 = any time."
        ),
    ] = 2.0,
    max_queued: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are answered 503.")] = 256,
    max_requests_per_key: Annotated[
        int | None, typer.Option(min=1, help="Requests of one key at once; more are answered 429. [default: any]")
    ] = None,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that running answers get at the end.")
    ] = 30.0,
    restart: Annotated[
        bool, typer.Option(help="Start the server again if its process crashes, on the same port.")
    ] = True,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in the API. [default: MODEL]")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    weights: WeightsOption = Weights.AUTO,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    policy_checks: ChecksOption = PolicyChecks.CHEAP,
    on_policy_fault: FaultOption = OnPolicyFault.DENSE,
    policy_timeout: TimeoutOption = POLICY_TIMEOUT_S,
    break_even: BreakEvenOption = BreakEvenFrom.AUTO,
) -> None:
    """An OpenAI-compatible server for one model, whose conversations branch and survive restarts."""
    from loopserve.serve.listening import listen
    from loopserve.serve.sealing import read_key
    from loopserve.serve.settings import ServerSettings, read_keys
    from loopserve.serve.supervising import supervise

    settings = ServerSettings(
        model_name=served_model_name or model,
        host=host,
        port=port,
        api_keys=(*(api_key or ()), *(read_keys(api_key_file) if api_key_file is not None else ())),
        insecure=insecure,
        allowed_hosts=tuple(allowed_host or ()),
        session_dir=session_dir,
        session_disk=None if session_disk is None else read_bytes(session_disk),
        session_disk_per_key=None if session_disk_per_key is None else read_bytes(session_disk_per_key),
        max_requests_per_key=max_requests_per_key,
        session_key=None if session_key_file is None else read_key(session_key_file),
        session_ttl_s=read_seconds(session_ttl) or None,
        kv_cache_memory=read_bytes(kv_cache_memory),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_pass_steps=max_pass_steps or None,
        max_queued=max_queued,
        shutdown_timeout_s=shutdown_timeout,
    )
    settings.check()
    listener = listen(settings)
    try:  # before the fork: most of the time of a start is spent here
        from loopserve.serve.run import run_server
    except ModuleNotFoundError as error:
        raise ConfigError(f"the server needs {error.name}: pip install 'loopserve[serve]'") from error
    from loopserve.api import Engine
    from loopserve.models.quiet import quiet_libraries

    # The listener is closed in the parent at the end: else connections would wait while the child finishes its last answers.
    ready = supervise(listener.close) if restart else lambda: None
    chosen, *others = context.obj.stacks([stack, *(allow_stack or ())])
    with quiet_libraries():
        engine = Engine.from_pretrained(
            model,
            chosen,
            dtype=dtype,
            device=device,
            weights=weights.value,
            revision=revision,
            trust_remote_code=trust_remote_code,
            policy_checks=policy_checks,
            on_policy_fault=on_policy_fault,
            policy_timeout_s=policy_timeout or None,
            break_even=break_even.value,
        )
        sys.exit(run_server(engine, settings, {each.name: each for each in others}, listener, ready))


__all__ = ["Settings", "read_bytes", "read_seconds", "serve"]
