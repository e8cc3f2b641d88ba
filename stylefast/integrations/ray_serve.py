"""The service on Ray Serve: one front with the queue, and an engine in each replica.

`serve run stylefast.integrations.ray_serve:app model=tiny replicas=2` starts it. The front is the same application as
`stylefast serve`, with the same settings. Requests go to a replica that holds their style, if one does.
"""

import argparse
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

from stylefast import values
from stylefast.commands import serve as command
from stylefast.errors import InvalidRequest, MissingDependency
from stylefast.integrations.replicas import EngineReplica, Heartbeat, News, Replicas, Stream
from stylefast.serving.app import create_app
from stylefast.serving.dispatcher import Dispatcher, EngineProcess, Message
from stylefast.serving.engine_process import Load, StylesOf
from stylefast.serving.engine_styles import MOST_HELD
from stylefast.serving.server import log_to_stderr
from stylefast.serving.settings import PREFIX, ServeSettings

try:
    from ray import serve
    from ray.exceptions import RayTaskError
    from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise MissingDependency("Ray Serve is missing; pip install 'stylefast[ray]' brings it") from error

FRONT, ENGINE = "front", "engine"  # names of the deployments
WAITING = "stylefast_waiting"  # what replicas report for autoscaling
MOST_REPLICAS = 1000
_ASK_SECONDS = 5.0
_HEALTH_SECONDS = 2.0  # between two checks; a dead replica is replaced after this at the latest
_ERRANDS = 2  # styles that are tried and baked beside the pictures
_QUIET = {"enable_access_log": False}  # the front writes its own line for each request
_LIMITS = ("max_waiting", "max_per_key")  # that may change while the front runs


def app(args: Mapping[str, Any]) -> serve.Application:
    """Return the application for `serve run` and for a Serve config file.

    args: options of `stylefast serve` by name without dashes (`model`, `styles`, `max_running`); `replicas`, a number
    or a range ("1-4"), in which the queue decides; `cpus` and `gpus` of each replica. Raises InvalidRequest.
    """
    words = dict(args)
    least, most = _range(words.pop("replicas", 1))
    cpus, gpus = (_share(name, words.pop(name, default)) for name, default in (("cpus", 1), ("gpus", _own_gpus())))
    settings, load = _chosen(words)
    return application(settings, load, least, most, {"num_cpus": cpus, "num_gpus": gpus})


def application(
    settings: ServeSettings, load: Load, least: int, most: int, resources: Mapping[str, float]
) -> serve.Application:
    """Return the application with `least` to `most` replicas. load: called in each replica's process."""
    options: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=settings.max_running,
            policy=AutoscalingPolicy(policy_function=by_queue),
        )
        options = {"autoscaling_config": scaling}
    watched = {"health_check_period_s": _HEALTH_SECONDS, "health_check_timeout_s": 30.0, "logging_config": _QUIET}
    engines = serve.deployment(
        **options,
        **watched,
        name=ENGINE,
        ray_actor_options=dict(resources),
        max_ongoing_requests=settings.max_running + _ERRANDS,
        graceful_shutdown_timeout_s=settings.grace,
    )(Engine)
    front = serve.deployment(
        **watched,
        name=FRONT,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_running * most + settings.max_waiting + 100,
        graceful_shutdown_timeout_s=settings.grace + 5,
    )(Front)
    return front.bind(settings, engines.bind(load, settings))


def by_queue(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Return how many replicas the calls in progress and the requests in the front's queue need."""
    waiting = max((context.aggregated_metrics or {}).get(WAITING, {}).values(), default=0.0)
    return (context.total_num_requests + waiting) / context.config.get_target_ongoing_requests(), {}


class Engine:
    """A replica with one engine."""

    async def __init__(self, load: Load, settings: ServeSettings):
        """Load the model; the replica takes no requests before."""
        log_to_stderr()
        folder = settings.styles_dir
        styles = None if folder is None else StylesOf(folder)
        self._replica = EngineReplica(
            lambda tell: EngineProcess(load, not settings.no_warm_up, tell, styles),
            pictures=settings.max_running,
            name=serve.get_replica_context().replica_tag,
            stalled=settings.deadline,
            # Ray then tells all callers at once, and starts another replica
            lost=lambda: os._exit(1),
        )
        self._has_styles = folder is not None
        await self._replica.start()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Read the styles that `styles` of user_config names before requests come for them."""
        for name in _known(user_config, ("styles",)).get("styles") or ():
            await self.hold(name)

    @serve.multiplexed(max_num_models_per_replica=MOST_HELD)
    async def hold(self, style: str) -> str:
        """Read a style, and tell Ray that this replica holds it."""
        if self._has_styles:
            await self._replica.load_style(style)  # what is wrong with it, the request will hear
        return style

    async def run(self, message: Any) -> AsyncIterator[News]:
        """Yield what becomes of a message."""
        if style := serve.get_multiplexed_model_id():
            await self.hold(style)
        async for news in self._replica.run(message):
            yield news

    def heartbeat(self, waiting: int) -> Heartbeat:
        """Return how the replica is; `waiting`: requests in the front's queue."""
        return self._replica.heartbeat(waiting)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the length of the front's queue, for `by_queue`."""
        return {WAITING: float(self._replica.waiting)}

    def check_health(self) -> None:
        """Raise RuntimeError if the engine is dead or stuck; Ray then replaces the replica."""
        self._replica.check()

    async def __del__(self):
        """End the engine's process."""
        if hasattr(self, "_replica"):
            await self._replica.close()


@serve.ingress()
class Front:
    """The web application, with the queue; there is one of it."""

    def __init__(self, settings: ServeSettings, engines: DeploymentHandle):
        log_to_stderr()
        self._settings, self._engines = settings, engines
        self._dispatcher: Dispatcher | None = None

    def __serve_build_asgi_app__(self) -> Any:
        """Return the application of `stylefast serve`."""
        return without_id(create_app(self._settings, self._make_dispatcher))

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take `max_waiting` and `max_per_key` of user_config, for requests that come from now on."""
        self._settings = replace(self._settings, **_known(user_config, _LIMITS))
        self._limit()

    def check_health(self) -> None:
        """Raise RuntimeError if the front no longer hears of its replicas."""
        if self._dispatcher is not None and isinstance(self._dispatcher.engine, Replicas):
            self._dispatcher.engine.check()

    def _make_dispatcher(self) -> Dispatcher:
        settings = self._settings
        self._dispatcher = Dispatcher(
            lambda tell: Replicas(
                tell, call=self._call, ask=self._ask, waiting=lambda: self._waiting, bugs=RayTaskError
            ),
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_per_owner=settings.max_per_key,
        )
        return self._dispatcher

    @property
    def _waiting(self) -> int:
        return 0 if self._dispatcher is None else self._dispatcher.waiting

    def _limit(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.max_waiting = self._settings.max_waiting
            self._dispatcher.max_per_owner = self._settings.max_per_key

    def _call(self, message: Message, style: str) -> Stream:
        return self._engines.options(stream=True, multiplexed_model_id=style).run.remote(message)

    async def _ask(self, waiting: int) -> Sequence[Any]:
        asked = self._engines.broadcast("heartbeat", waiting)
        return await asked.results_async(timeout_s=_ASK_SECONDS, return_exceptions=True)


def without_id(application: Any) -> Any:
    """Return an ASGI application whose replies have no x-request-id: Ray's proxy adds it, and it is the same."""

    async def passed(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await application(scope, receive, sent if scope["type"] == "http" else send)

    return passed


# arguments


class _Words(argparse.ArgumentParser):
    """The options of `stylefast serve`, whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise InvalidRequest(f"an argument of the application is wrong: {message}")


def _chosen(words: Mapping[str, Any]) -> tuple[ServeSettings, Load]:
    for name in ("host", "port"):
        if name in words:
            raise InvalidRequest(f"{name} is Ray's: set it in http_options of the Serve config file")
    for name in ("api_keys", "admin_keys"):
        if name in words:
            raise InvalidRequest(
                f"{name} come from {PREFIX}{name.upper()}, or from a file (config), not from arguments"
            )
    kinds = {name: setting["kind"] for name, setting in ServeSettings.flags().items()}
    given = []
    for name, value in words.items():
        option = f"--{str(name).replace('_', '-')}"
        if kinds.get(name) == "flag":
            given += [option] if _truth(name, value) else []
            continue
        if kinds.get(name) == "hosts" and isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        for one in value if isinstance(value, list | tuple) else [value]:
            given.append(f"{option}={os.path.abspath(one) if name == 'styles' else one}")
    parser = _Words(prog="ray_serve:app", add_help=False, allow_abbrev=False)
    command.add_arguments(parser)
    # others may reach Ray's proxy, wherever it listens, so that keys are needed, or no_auth
    return command.chosen(parser.parse_args([*given, "--host=0.0.0.0"]))


def _truth(name: str, given: Any) -> bool:
    found = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(str(given).lower())
    if found is None:
        raise InvalidRequest(f"{name} is {values.quoted(given)}; it must be true or false")
    return found


def _range(given: Any) -> tuple[int, int]:
    least, _, most = str(given).partition("-")
    ends = [int(end) if end.isdigit() else end for end in (least, most or least)]
    least, most = (values.whole_number("replicas", end, 1, MOST_REPLICAS) for end in ends)
    if most < least:
        raise InvalidRequest(f"replicas is {values.quoted(given)}; write the smaller number first")
    return least, most


def _share(name: str, given: Any) -> float:
    with suppress(TypeError, ValueError):  # of the command line, where all is text
        given = float(given)
    return values.real_number(name, given, low=0, high=1024)


def _own_gpus() -> int:
    import torch

    return int(torch.cuda.is_available())


def _known(config: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    config = dict(config or {})
    for name in config:
        if name not in names:
            raise InvalidRequest(f"user_config has {values.quoted(name)}; it may have {', '.join(names)}")
    return config
