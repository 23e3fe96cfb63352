"""This file lets several trainings wait for one another, so that one pass serves all of them.

Each training is what it always is, a Trainer with callbacks, optimizer and files of its own, but
runs in a thread that hands its forward and backward pass to whoever leads. The leader lets one
thread go on at a time, until each has asked for a pass or has ended, and then computes what can be
stacked at once. So nothing else of a training needs to know that it is not alone, and none of them
can see another half way through a step.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from statistics import median
from threading import Thread
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from mergekit_lit.lit.passes import inputs
from mergekit_lit.lit.preemption import hold, preemptible
from mergekit_lit.lit.quiet import quiet
from mergekit_lit.lit.stacking import stacked_losses

if TYPE_CHECKING:
    from mergekit_lit.lit.expert import ExpertModule

Together: TypeAlias = Callable[["ExpertModule", Tensor, Tensor], Tensor | None]
"""Returns the loss of a module on images and labels, or None where it is to compute it alone."""

# The first passes choose algorithms and fill caches.
_WARM_UP, _TIMED = 1, 5


@dataclass
class Pace:
    """Which way is faster: one pass for all, or one each; rounds of both tell, in turns.

    Both ways are steps of the trainings, so that measuring costs nothing.

    Attributes:
        together: whether one pass serves all; None while that is measured.
        on_gpu: whether a GPU works, so that the wall's time counts; else the processor's does.
        alone_s: seconds of a round of steps, one pass each, as measured.
        together_s: the same of one pass for all.
        refusal: why the networks cannot be stacked, if they cannot.
    """

    together: bool | None = None
    on_gpu: bool = False
    alone_s: list[float] = field(default_factory=list)
    together_s: list[float] = field(default_factory=list)
    refusal: str = ""
    _begun: float = 0.0

    def begin(self) -> bool:
        """Begin a round, and return whether it is to be made together."""
        if self.together is not None:
            return self.together
        self._begun = self._clock()
        return len(self.together_s) < len(self.alone_s)

    def end(self, *, together: bool) -> None:
        """End a round, and settle on the faster way once there are enough of both."""
        if self.together is not None:
            return
        (self.together_s if together else self.alone_s).append(self._clock() - self._begun)
        if len(self.together_s) == _WARM_UP + _TIMED:
            del self.alone_s[:_WARM_UP], self.together_s[:_WARM_UP]
            self.together = median(self.together_s) < median(self.alone_s)

    def _clock(self) -> float:
        """Return the time in seconds, after all work so far."""
        if not self.on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def refuse(self, reason: str) -> None:
        """Go on alone from here on."""
        self.together, self.refusal = False, reason


def in_lockstep(
    trainings: Sequence[Callable[[Together], None]], pace: Pace
) -> list[Exception | None]:
    """Do several trainings at once, and return the error of each that failed.

    Args:
        trainings: each is given what its module must ask for its losses, `ExpertModule.together`.
        pace: whether one pass serves all, or how that is found out.

    Raises:
        SystemExit: the process was told to end; each training has kept what it had.
    """
    members = [_Member(training) for training in trainings]
    # What each thread silences would end with the first of them.
    with preemptible(), quiet():
        try:
            for member in members:
                member.start()
            _lead(members, pace)
        except BaseException:
            for member in members:
                member.leave()
            raise
    return [member.failure() for member in members]


def _lead(members: Sequence["_Member"], pace: Pace) -> None:
    """Let the members go on, round by round, until all have ended."""
    asked: dict[_Member, _Call | None] = dict.fromkeys(members)
    while asked:
        begun, together = list(asked.values()), pace.begin()
        answers = _answers(asked, pace) if together else dict.fromkeys(asked)
        asked = {member: call for member in asked if (call := member.go_on(answers[member]))}
        # A round in which one ends, or measures something, tells nothing of a step.
        if _is_step([*begun, *asked.values()]) and len(asked) == len(begun):
            pace.end(together=together)
        # Each leaves at the end of its step, with a checkpoint, if the process is told to.
        hold()


@dataclass(frozen=True)
class _Call:
    """What a training asks for: the loss of its module on a batch."""

    module: "ExpertModule"
    x: Tensor
    y: Tensor

    @property
    def key(self) -> Hashable:
        """What must agree in calls that one pass serves."""
        module = self.module
        backbone = (module.base.backbone, module.base.image_size, module.finetuning)
        head = (module.head_kind, module.head.weight.shape)
        return (*backbone, *head, module.training, self.x.shape, self.x.device)


class _Left(BaseException):
    """The leader has left; raised where a training waits for it."""


class _Member(Thread):
    """A training in a thread that goes on only while the leader waits for it."""

    def __init__(self, training: Callable[[Together], None]) -> None:
        super().__init__(daemon=True)
        self._training = training
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._answers: SimpleQueue[Tensor | _Left | None] = SimpleQueue()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train, in the member's thread, from the first `go_on` on."""
        try:
            self._wait()
            self._training(self._ask)
        # The leader hands it on.
        except BaseException as error:
            self.error = error
        finally:
            self._calls.put(None)

    def go_on(self, answer: Tensor | None) -> _Call | None:
        """Answer the last call, and return the next one; None once the training has ended."""
        self._answers.put(answer)
        return self._calls.get()

    def leave(self) -> None:
        """End the training, which puts its files away."""
        self._answers.put(_Left())
        if self.ident is not None:
            self.join()

    def failure(self) -> Exception | None:
        """Return what went wrong; what ends a process goes on to do so."""
        if self.error is None or isinstance(self.error, Exception):
            return self.error
        raise self.error

    def _ask(self, module: "ExpertModule", x: Tensor, y: Tensor) -> Tensor | None:
        self._calls.put(_Call(module, x, y))
        return self._wait()

    def _wait(self) -> Tensor | None:
        answer = self._answers.get()
        if isinstance(answer, _Left):
            raise answer
        return answer


def _is_step(calls: Sequence[_Call | None]) -> bool:
    """Return whether all calls are for one pass, of training."""
    first = calls[0]
    return (
        first is not None
        and first.module.training
        and {call and call.key for call in calls} == {first.key}
    )


def _answers(asked: dict[_Member, _Call | None], pace: Pace) -> dict[_Member, Tensor | None]:
    """Return the losses of all calls that agree with another; None for those to be made alone."""
    groups: dict[Hashable, list[_Member]] = {}
    for member, call in asked.items():
        groups.setdefault(call and call.key, []).append(member)
    answers: dict[_Member, Tensor | None] = dict.fromkeys(asked)
    for group in groups.values():
        calls = [call for member in group if (call := asked[member])]
        if len(calls) > 1 and not pace.refusal:
            try:
                answers |= zip(group, _losses(calls), strict=True)
            except (RuntimeError, NotImplementedError) as error:
                pace.refuse(" ".join(str(error).split()))
    return answers


def _losses(calls: Sequence[_Call]) -> list[Tensor]:
    """Return the loss of each call, by one pass."""
    first = calls[0].module
    images = inputs(first.backbone, torch.cat([call.x for call in calls])).contiguous()
    return stacked_losses(
        [nn.Sequential(call.module.backbone, call.module.head) for call in calls],
        images.view(len(calls), -1, *images.shape[1:]),
        torch.stack([call.y for call in calls]),
        label_smoothing=first.finetuning.label_smoothing,
    )
