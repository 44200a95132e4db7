"""The verb `node`: flags and environment to a NodeConfig, and the line that says it is ready."""

import os
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from shoal import limits
from shoal.errors import UsageError
from shoal.log_options import LogFormat, LogLevel
from shoal.paths import resolve_model
from shoal.transport import Transport


def node(
    model: Annotated[
        str,
        typer.Argument(
            envvar=["SHOAL_MODEL", "MODEL_PATH"], help="an artifact or a slice of one: path or name"
        ),
    ] = "",
    experts: Annotated[
        str | None,
        typer.Option(
            envvar=["SHOAL_EXPERTS", "EXPERTS"], help="experts to own: 0-63+96; default: all it has"
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(envvar=["SHOAL_LAYERS", "LAYERS"], help="of these layers: 0-14; default: all"),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(envvar="SHOAL_LISTEN", help="host:port (port 0: any free) or unix:///path"),
    ] = "127.0.0.1:50051",
    port: Annotated[
        int | None,
        typer.Option(envvar=["SHOAL_PORT", "PORT"], help="replaces the port of --listen"),
    ] = None,
    warmup: Annotated[
        bool,
        typer.Option(
            "--warmup/--no-warmup",
            envvar=["SHOAL_WARMUP", "WARMUP"],
            help="read all experts before being ready; else each on first use",
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            envvar="SHOAL_THREADS", help="of compute; default: the CPUs this process may use"
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", envvar="SHOAL_INSECURE", help="serve other machines without TLS or token"
        ),
    ] = False,
    drain_timeout: Annotated[
        float,
        typer.Option(
            envvar="SHOAL_DRAIN_TIMEOUT", min=0, help="seconds for calls in flight after SIGTERM"
        ),
    ] = limits.DRAIN_TIMEOUT_S,
    transport: Annotated[
        Transport,
        typer.Option(
            envvar="SHOAL_TRANSPORT",
            help="who speaks gRPC's wire to coordinators: grpcio, or our own fast server (auto)",
        ),
    ] = Transport.AUTO,
    leave_with_stdin: Annotated[
        bool,
        typer.Option(
            "--leave-with-stdin",
            help="drain when standard input closes: with whoever started this node and holds it",
        ),
    ] = False,
    json_ready: Annotated[
        bool,
        typer.Option(
            "--json-ready", envvar="SHOAL_JSON_READY", help="print the ready line as JSON"
        ),
    ] = False,
    log_format: Annotated[
        LogFormat, typer.Option(envvar="SHOAL_LOG_FORMAT", help="of the log on stderr")
    ] = LogFormat.CONSOLE,
    log_level: Annotated[
        LogLevel, typer.Option(envvar="SHOAL_LOG_LEVEL", help="least level that is logged")
    ] = LogLevel.INFO,
) -> None:
    """Serve a range of a model's experts to coordinators.

    Prints one line on stdout once it is ready; logs go to stderr. SIGTERM and SIGINT drain: calls
    in flight are finished, then the process exits with status 0.
    """
    if not model:
        hint = ""
        if os.environ.get("HF_REPO"):
            hint = ": HF_REPO is set, but this version does not fetch from the Hub"
        raise UsageError(f"no model: give an artifact's path or name, or set MODEL_PATH{hint}")
    from shoal.log import configure  # structlog: not for --help

    configure(log_format, log_level)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what matters it also raises, and we report

    import orjson

    from expert_node import app, config  # gRPC and the kernels: not for --help

    def announce(ready: app.Ready) -> None:
        text = orjson.dumps(asdict(ready)).decode() if json_ready else str(ready)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    app.run(
        config.NodeConfig(
            model=resolve_model(model),
            listen=config.parse_listen(listen, port),
            experts=experts,
            layers=layers,
            warmup=warmup,
            threads=threads,
            insecure=insecure,
            drain_timeout_s=drain_timeout,
            transport=transport,
            leave_with_stdin=leave_with_stdin,
            log_calls=log_level is LogLevel.DEBUG,
        ),
        announce,
    )
