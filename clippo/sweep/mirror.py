"""A copy of the search's study in an Optuna storage, for optuna-dashboard."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from clippo.config import SearchConfig
from clippo.errors import ConfigError
from clippo.evaluate.objectives import Objectives

OWNER = "clippo_results"
SECRETS = {"password", "passwd", "sslpassword"}
"""Where a database URL may have a password besides its usual place."""


class Mirror:
    """Gets each trial that Optuna was told. It is never read: the result tables are the truth.

    Args:
        results: of the sweep; a study of this name that another store's sweep or another program made is left
            alone.
        report: gets one line when the storage fails; the sweep goes on without it.

    Raises:
        ConfigError: the storage cannot be used, or has a foreign study of this name.
    """

    def __init__(
        self, search: SearchConfig, objectives: Objectives, name: str, results: str,
        report: Callable[[str], object],
    ) -> None:  # fmt: skip
        self._report = report
        try:
            storage = _storage(search.mirror)
            known = {s.study_name: s.user_attrs.get(OWNER) for s in optuna.get_all_study_summaries(storage)}
            if known.get(name, results) != results:
                raise ConfigError(
                    f"search.mirror {search.mirror!r} has a study {name!r} of another origin; "
                    "choose another --name or storage"
                )
            if name in known:  # of an earlier run of this sweep; all its trials are told again
                optuna.delete_study(study_name=name, storage=storage)
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                directions=objectives.directions(search.objectives),
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names(list(search.objectives))
            study.set_user_attr(OWNER, results)
        except (OSError, ImportError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
            raise ConfigError(f"search.mirror is {search.mirror!r}: {_first_line(error)}") from error
        self._study: optuna.Study | None = study

    def told(self, trial: FrozenTrial) -> None:
        """Copies a trial."""
        if self._study is None:
            return
        try:
            self._study.add_trial(trial)
        except Exception as error:  # whatever a database says; a mirror must not end a sweep
            self._study = None
            self._report(f"search.mirror is no longer written: {_first_line(error)}")


def check_mirror(url: str) -> None:
    """Refuses what is no storage, and passwords, before anything is written or printed.

    Raises:
        ConfigError: never with the URL, which may have a secret in it.
    """
    if not url or url.startswith("journal:"):
        return
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(
            "search.mirror is no storage; it must be journal:FILE or a database URL such as sqlite:///sweeps.db"
        ) from None
    if parsed.password is not None or SECRETS & parsed.query.keys():
        raise ConfigError(
            "search.mirror carries a password; leave it to the database's own means (such as ~/.pgpass)"
        )


def _storage(url: str) -> BaseStorage:
    """The storage of ``journal:FILE`` or a database URL."""
    check_mirror(url)
    kind, _, path = url.partition(":")
    return JournalStorage(JournalFileBackend(path)) if kind == "journal" else RDBStorage(url)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
