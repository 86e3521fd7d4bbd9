"""Guards over a run's loss: spikes are said and counted, a diverged run is ended with what to do about it.

A loss is measured by that of a blind guess: ln V nats among V codes, a squared error of 1 among normalised pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, final

from toto.model.weights import checkpoints
from toto.runtime.errors import ConfigError, DivergedError
from toto.runtime.progress import say
from toto.training.optimizer import OptimizerConfig

RECENT = 64  # losses that medians are taken of
FIRST_JUDGED = 16  # losses before a spike is told from a beginning
SPREADS = 6.0  # a spike is as many standard deviations above the median, by the median deviation
LOST = 0.6  # share of what was learnt, measured from a blind guess, that a diverged run has lost
COMING_DOWN = 0.05  # share of the lost part whose return gives a run its patience anew
EXPLODED, EXPLODED_STEPS = 2.0, 10  # so many times the loss of a blind guess, for so many steps one after another
ITEMS_SHOWN = 300  # characters


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a loss is a spike, and when a run has diverged.

    Attributes:
        spike: how far above the recent losses a spike lies, as a share of the loss of a blind guess.
        patience: steps for which the recent median may stay far above the best one, without coming down.
        stop: end a diverged run; without, it is said and the run goes on.
    """

    spike: float = 0.15
    patience: int = 500
    stop: bool = True

    def __post_init__(self) -> None:
        if self.spike <= 0:
            raise ConfigError(f"must be positive, is {self.spike}", where="--guard.spike")
        if self.patience < 1:
            raise ConfigError(f"must be at least 1, is {self.patience}", where="--guard.patience")


@final
class Guard:
    """Looks at every step's loss.

    A run has exploded when every loss of 10 steps is above twice that of a blind guess, after having been near it. It
    has diverged when, after the warm-up, the median of 64 losses has lost most of what was learnt, or never came near a
    blind guess, and hasn't come down for `patience` steps.

    Args:
        config: how strict.
        out: the run's folder, for messages.
        blind: loss of a blind guess: ln V, or 1 where pixels are predicted.
        optimizer: whose warm-up is not judged, and whose values the remedy names.
        changes: steps, counted from 0, from which on the data are others; what was known of the loss is forgotten.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        out: Path,
        blind: float,
        optimizer: OptimizerConfig,
        changes: Collection[int] = (),
    ):
        self._config, self._out, self._blind, self._optimizer = config, out, blind, optimizer
        self._changes = frozenset(changes)
        self.spikes = 0
        self._begin()

    def _begin(self) -> None:
        """Know nothing of the loss."""
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._in_spike = False
        self._began, self._above = False, 0  # has been near a blind guess; losses far above it, one after another
        self._best, self._best_step = self._blind, 0
        self._rose = 0  # the step at which the median became high
        self._since: int | None = None  # the step since which it is high and doesn't come down
        self._low = 0.0  # the lowest high median
        self._said = False

    def check(self, step: int, loss: float, grad_norm: float, items: Callable[[], str]) -> None:
        """Take a step's loss and gradient norm, both finite.

        Args:
            step: finished steps.
            loss: of the batch.
            grad_norm: before clipping.
            items: names what the batch held; called for a spike only.

        Raises:
            DivergedError: the loss stays far above what it was.
        """
        if step - 1 in self._changes:
            self._begin()
        self._look_for_spike(step, loss, grad_norm, items)
        self._look_for_explosion(step, loss)
        self._losses = [*self._losses[1 - RECENT :], loss]
        self._norms = [*self._norms[1 - RECENT :], grad_norm]
        if len(self._losses) == RECENT:
            self._look_for_divergence(step, median(self._losses))

    def _look_for_spike(self, step: int, loss: float, grad_norm: float, items: Callable[[], str]) -> None:
        """A spike is far above the median, by the spread as by itself, and above every recent loss."""
        if len(self._losses) < FIRST_JUDGED:
            return
        usual = median(self._losses)
        spread = 1.4826 * median(abs(each - usual) for each in self._losses)
        high = self._config.spike * self._blind
        before, self._in_spike = self._in_spike, loss > usual + high / 2 and self._in_spike
        if loss > usual + max(high, SPREADS * spread) and loss > max(self._losses) + high / 2 and not before:
            self._in_spike = True
            self.spikes += 1
            say(
                f"step {step}: the loss jumped to {loss:.3f} from a median of {usual:.3f}, the gradient norm is "
                f"{grad_norm:.3g} (median {median(self._norms):.3g}); items {items()[:ITEMS_SHOWN]}"
            )

    def _look_for_explosion(self, step: int, loss: float) -> None:
        """All of the last losses are far above a blind guess."""
        self._began = self._began or loss <= (1 + self._config.spike) * self._blind
        self._above = self._above + 1 if self._began and loss > EXPLODED * self._blind else 0
        if self._above == EXPLODED_STEPS:
            what = (
                f"exploded: the loss is {loss:.3f} at step {step}, and was above {EXPLODED:g} times the "
                f"{self._blind:.3f} of a blind guess for {EXPLODED_STEPS} steps"
            )
            self._end(what, before=step - EXPLODED_STEPS)

    def _look_for_divergence(self, step: int, now: float) -> None:
        """The median stays above a line between the best one and a blind guess, or above a blind guess."""
        if now < self._best:
            self._best, self._best_step = now, step
        lost = max(self._config.spike * self._blind, LOST * (self._blind - self._best))
        if step <= self._optimizer.warmup_steps or now <= self._best + lost:
            self._since, self._said = None, False
            return
        if self._since is None:
            self._rose = step
        if self._since is None or now < self._low - COMING_DOWN * lost:
            self._since, self._low = step, now
        if step - self._since < self._config.patience or self._said:
            return
        self._said = True
        best = f"the best median was {self._best:.3f} at step {self._best_step}"
        if not self._best_step:
            best = f"a blind guess has {self._blind:.3f}"
        what = (
            f"the median loss is {now:.3f} at step {step} and hasn't come down for {step - self._since} steps, {best}"
        )
        self._end(f"diverged: {what}", before=self._rose - RECENT)

    def _end(self, what: str, *, before: int) -> None:
        """Say what happened and what to do; a checkpoint of at most so many steps is good."""
        good = [path for path in checkpoints(self._out) if int(path.name.removeprefix("step-")) <= before]
        start = f"begin another --out with --init {good[-1]}" if good and self._best_step else "begin again"
        rate, warmup = self._optimizer.peak_lr, self._optimizer.warmup_steps
        error = DivergedError(
            what,
            where=self._out,
            fix=f"lower optimizer.peak_lr ({rate:g}) or raise optimizer.warmup_steps ({warmup}) and {start}; "
            "--no-guard.stop trains on",
        )
        if self._config.stop:
            raise error
        say(str(error))

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as plain numbers."""
        return {
            "spikes": self.spikes,
            "losses": self._losses,
            "norms": self._norms,
            "in_spike": self._in_spike,
            "began": self._began,
            "above": self._above,
            "best": self._best,
            "best_step": self._best_step,
            "rose": self._rose,
            "since": self._since,
            "low": self._low,
            "said": self._said,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.spikes = state["spikes"]
        self._losses, self._norms = list(state["losses"]), list(state["norms"])
        self._in_spike, self._said = state["in_spike"], state["said"]
        self._began, self._above = state["began"], state["above"]
        self._best, self._best_step = state["best"], state["best_step"]
        self._rose, self._since, self._low = state["rose"], state["since"], state["low"]
