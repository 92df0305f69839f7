"""A registry of one model in memory, and clients of it whose requests come in turns and may be their last."""

from types import SimpleNamespace

from tests.turns import Died, Turns


class Registry:
    """The tags and aliases of one registered model."""

    def __init__(self, champion: int | None = 1) -> None:
        self.tags: dict[str, str] = {}
        self.aliases = {} if champion is None else {"champion": champion}

    def get_registered_model(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(tags=dict(self.tags), aliases=dict(self.aliases))

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        words = key.startswith("ddpm.move-claim.")
        assert not words or key not in self.tags, "a word once given is never replaced"
        self.tags[key] = value

    def delete_registered_model_tag(self, name: str, key: str) -> None:
        self.tags.pop(key, None)

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self.aliases[alias] = int(version)


class Stepped:
    """A job's client of the registry: each request waits for the job's turn, and may be its last."""

    def __init__(self, registry: Registry, turns: Turns | None, job: int, dies_at: int | None) -> None:
        self._registry, self._turns, self._job, self.left = registry, turns, job, dies_at

    def __getattr__(self, request: str) -> object:
        if self._turns is not None:
            self._turns.next()
            self._turns.wait(self._job)
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Died
        return getattr(self._registry, request)
