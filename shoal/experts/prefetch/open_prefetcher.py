"""open_prefetcher: the one way to a `Prefetcher`, for nodes and for the coordinator's process."""

from collections.abc import Mapping

from shoal import ops
from shoal.artifact import Artifact
from shoal.artifact.pregate import plan_pregates
from shoal.artifact.pregate_build import build_pregate
from shoal.errors import UsageError
from shoal.experts.ownership import Ownership
from shoal.experts.prefetch.governor import Governor
from shoal.experts.prefetch.guesser import PREDICTORS, CallKind, Guesser, RoutedLayer
from shoal.experts.prefetch.interface import Mode, Prefetcher, PrefetchStore
from shoal.experts.prefetch.prefetcher import ReadAhead
from shoal.experts.prefetch.pregate import Pregate
from shoal.limits import MAX_MARKOV_BYTES
from shoal.model_spec import RouterKind, RouterSpec

# Of a governor's window: tokens, and chunks of a prompt. Short ones lie close together: what else
# the machine does meanwhile falls on both sides of a comparison.
_DECODE_PASSES, _PREFILL_PASSES = 4, 1
_GUARD_PASSES = 1  # of the 4: what the window before left in the cache
_HINT_LEARN_WINDOWS = 1  # hints come ready made: only their gaps are to be learned


def open_prefetcher(
    mode: Mode,
    artifact: Artifact,
    ownership: Ownership,
    store: PrefetchStore,
    *,
    is_governed: bool = True,
) -> Prefetcher | None:
    """Return a prefetcher, or None where `mode` is off or nothing is to be guessed.

    Nothing is to be guessed where each token visits every expert.

    Args:
        is_governed: whether `auto` switches itself off where it does not win; not in a measurement.

    Raises:
        UsageError: `mode` is pregate and the artifact has no matrices and cannot make them.
        CorruptArtifact: its matrices are damaged.
    """
    if mode is Mode.OFF:
        return None
    routers = {
        index: layer.router
        for index, layer in enumerate(artifact.spec.layers)
        if layer.router is not None and layer.router.kind is not RouterKind.ALL
    }
    layers = [
        RoutedLayer(index, router.num_experts, router.experts_per_token, ownership.experts(index))
        for index, router in routers.items()
        if ownership.experts(index)
    ]
    if not layers:
        return None
    pregates = _pregates(artifact, routers, ownership)
    if mode is Mode.PREGATE and not pregates:
        raise UsageError(
            f"--prefetch pregate: {artifact.path} has no pre-gate matrices: convert or slice the"
            " model again, or use --prefetch auto"
        )
    predictors = _predictors(mode, layers, pregates)
    if not predictors:
        return None
    expert_bytes = {
        layer.layer: artifact.expert_location(layer.layer, layer.owned[0]).num_bytes
        for layer in layers
    }
    guesser = Guesser(layers, pregates, predictors)
    if mode is not Mode.AUTO or not is_governed:
        return ReadAhead(mode, guesser, store, expert_bytes, {})
    hints = Governor(*_decode_window(len(layers)), _HINT_LEARN_WINDOWS)
    return ReadAhead(mode, guesser, store, expert_bytes, _governors(len(layers)), hints)


def _predictors(
    mode: Mode, layers: list[RoutedLayer], pregates: Mapping[int, Pregate]
) -> tuple[str, ...]:
    if mode is not Mode.AUTO:
        return (mode.value,)
    markov_bytes = sum(2 * 4 * layer.num_experts**2 for layer in layers)
    useless = set() if pregates else {"pregate"}
    if markov_bytes > MAX_MARKOV_BYTES:
        useless.add("markov")
    return tuple(name for name in PREDICTORS if name not in useless)


def _decode_window(num_layers: int) -> tuple[int, int]:
    return _DECODE_PASSES * num_layers, _GUARD_PASSES * num_layers


def _governors(num_layers: int) -> dict[CallKind, Governor]:
    decode = Governor(*_decode_window(num_layers))
    prefill = Governor(_PREFILL_PASSES * num_layers, 0)
    return {CallKind.ONE: decode, CallKind.FEW: decode, CallKind.MANY: prefill}


def _pregates(
    artifact: Artifact, routers: Mapping[int, RouterSpec], ownership: Ownership
) -> dict[int, Pregate]:
    # Those that the artifact has; a whole one that is older than they are can make them.
    manifest = artifact.manifest
    if manifest.pregates:
        matrices = {
            entry.plan: artifact.read_pregate(entry)
            for entry in manifest.pregates
            if _is_useful(entry.plan.layer, entry.plan.target, ownership)
        }
    elif manifest.has_dense:
        schemes = {layer.layer: layer.weights.scheme for layer in manifest.experts}
        matrices = {
            plan: ops.Matrix(
                plan.format, plan.rows, plan.dim, build_pregate(plan, artifact.dense_values)
            )
            for plan in plan_pregates(artifact.spec, schemes)
            if _is_useful(plan.layer, plan.target, ownership)
        }
    else:
        return {}
    return {
        plan.layer: Pregate(matrix, plan.parts, routers[plan.target].experts_per_token)
        for plan, matrix in matrices.items()
    }


def _is_useful(layer: int, target: int, ownership: Ownership) -> bool:
    return bool(ownership.experts(layer) and ownership.experts(target))
