"""`shoal cluster`: expert nodes on the machines of a Ray cluster, and the map that names them."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.errors import NodeError, UsageError

if TYPE_CHECKING:
    from client.ray_nodes import RayNode

MAX_NODES = 1024
app = typer.Typer(help="Run expert nodes on a Ray cluster: Ray places and restarts them.")

Address = Annotated[
    str,
    typer.Option(envvar="RAY_ADDRESS", help="of Ray: auto (this machine's), host:6379, ray://…"),
]
Name = Annotated[str, typer.Option(help="of these nodes, if you run several sets")]
AsJson = Annotated[bool, typer.Option("--json", help="print one object instead")]


class Strategy(StrEnum):
    """How Ray spreads nodes: one a machine, that if it can, or as few machines as will do."""

    STRICT_SPREAD = "strict-spread"
    SPREAD = "spread"
    PACK = "pack"


@app.command()
def up(
    model: Annotated[str, typer.Argument(help="name or path, on every machine")],
    nodes: Annotated[
        int, typer.Option(min=1, max=MAX_NODES, help="how many; each gets an even range of experts")
    ] = 2,
    address: Address = "auto",
    name: Name = "default",
    cpus: Annotated[float, typer.Option(min=0.1, help="that Ray reserves for each node")] = 1.0,
    threads: Annotated[
        int | None, typer.Option(help="of each node; default: as `shoal node` chooses")
    ] = None,
    base_port: Annotated[
        int, typer.Option(min=1, max=65535 - MAX_NODES, help="of the first node, then upwards")
    ] = 50051,
    strategy: Annotated[
        Strategy, typer.Option(help="how nodes are spread")
    ] = Strategy.STRICT_SPREAD,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="of each node, as `shoal node` has it: a path on its machine"),
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="likewise")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="likewise")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="as `shoal node` has it: no TLS, a private network")
    ] = False,
    ready_timeout: Annotated[float, typer.Option(help="seconds for the nodes to warm up")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Start nodes that outlive this command, and print the --moe-shards that names them."""
    from client.ray_nodes import Fleet, connected, start
    from client.shards import even_ranges, num_experts
    from shoal.paths import resolve_model

    path = resolve_model(model)
    arguments = ["--warmup"]
    arguments += ["--threads", str(threads)] if threads is not None else []
    arguments += ["--insecure"] if insecure else []
    tls = {"--tls-cert": tls_cert, "--tls-key": tls_key, "--tls-client-ca": tls_client_ca}
    arguments += [word for flag, path in tls.items() if path for word in (flag, str(path))]
    fleet = Fleet(
        name=_checked_name(name),
        model=str(path.resolve()) if Path(model).exists() else model,
        ranges=tuple(even_ranges(num_experts(path), nodes)),
        base_port=base_port,
        cpus=cpus,
        strategy=strategy.name,
        node_arguments=tuple(arguments),
    )
    with connected(address) as ray:
        _show(start(ray, fleet, ready_timeout), as_json)
    typer.echo(f"Stop them: shoal cluster down --name {shlex.quote(name)}", err=True)


@app.command()
def status(address: Address = "auto", name: Name = "default", as_json: AsJson = False) -> None:
    """Show where the nodes are now, and their --moe-shards. Fails unless all of them serve."""
    from client.ray_nodes import connected, describe

    with connected(address) as ray:
        nodes = describe(ray, _checked_name(name))
    if not nodes:
        raise UsageError(f"there are no nodes named {name!r}: `shoal cluster up` starts some")
    _show(nodes, as_json)
    if missing := [str(node.index) for node in nodes if node.problem]:
        raise NodeError(f"node {', '.join(missing)} of {len(nodes)} does not serve; see above")


@app.command()
def down(address: Address = "auto", name: Name = "default") -> None:
    """Drain the nodes, end them, and give their places back."""
    from client.ray_nodes import connected, stop

    with connected(address) as ray:
        count = stop(ray, _checked_name(name))
    typer.echo(f"stopped {count} node{'' if count == 1 else 's'}", err=True)


def _checked_name(name: str) -> str:
    if not name or "/" in name or not name.isprintable():
        raise UsageError(f"--name {name!r}: letters and digits, at least one, without a slash")
    return name


def _show(nodes: "list[RayNode]", as_json: bool) -> None:
    from dataclasses import asdict

    import orjson

    from client.ray_nodes import shards_of

    all_serve = not any(node.problem for node in nodes)
    shards = shards_of(nodes) if all_serve else None
    if as_json:
        fields = {"moe_shards": shards, "nodes": [asdict(node) for node in nodes]}
        typer.echo(orjson.dumps(fields).decode())
        return
    for node in nodes:
        where = f"{node.endpoint}  pid {node.pid}" if node.endpoint else node.problem
        typer.echo(f"node {node.index}  experts {node.experts}  {where}", err=True)
    if shards is not None:
        typer.echo(f"--moe-shards {shlex.quote(shards)}")
