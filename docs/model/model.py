"""The protocol by which tasks are claimed, run, ended and rescued, as a small model; every interleaving of it is searched.

    python docs/model/model.py                     all properties, all scenes
    python docs/model/model.py --without fence     the same with a guard taken out: prints the shortest way into the fault
    python docs/model/model.py --list              the guards

README.md beside it says which statement each step stands for, what is left out, and what the bounds are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from scenes import SCENES, WIDE, Scene
from states import State, Step, Violation, canonical, check
from steps import GUARDS, HARMLESS, OF_TRANSACTIONS, Model


class Found(NamedTuple):
    """What a search has found."""

    scene: Scene
    states: int
    steps: int
    violation: str | None
    trace: tuple[str, ...]
    seconds: float


def scenes(without: str | None = None, *, wide: bool = False) -> tuple[Scene, ...]:
    """Those in which it would show that a guard is taken out; all, if none is."""
    chosen = SCENES + (WIDE if wide else ())
    return tuple(s for s in chosen if without is None or bool(s.begins) == (without in OF_TRANSACTIONS))


def search(scene: Scene, without: str | None = None) -> Found:
    """All states of a scene, breadth first, until one breaks a property: the trace into it is a shortest one.

    At the end, if nothing else was found: the states from which no way leads to where all tasks have ended.
    """
    began = time.perf_counter()
    model = Model(scene, without)
    first = canonical(model.normal(model.first()))
    numbers = {first: 0}
    states = [first]
    parents = [-1]
    before: list[list[int]] = [[]]
    steps = 0

    def found(violation: str | None, at: int | None = None) -> Found:
        trace = _trace(model, states, parents, at, violation) if at is not None else ()
        return Found(scene, len(states), steps, violation, trace, time.perf_counter() - began)

    at = 0
    while at < len(states):
        try:
            for _, after in model.steps(states[at]):
                steps += 1
                state = canonical(model.normal(after))
                number = numbers.get(state)
                if number is None:
                    number = numbers[state] = len(states)
                    states.append(state)
                    parents.append(at)
                    before.append([])
                    check(state, scene.max_attempts)
                before[number].append(at)
        except Violation as violation:
            return found(str(violation), len(states) - 1 if _is_broken(states[-1], scene) else at)
        at += 1
    stuck = _stuck(states, before)
    if stuck is not None:
        return found("no way leads on to where all tasks have ended", stuck)
    return found(None)


def _is_broken(state: State, scene: Scene) -> bool:
    try:
        check(state, scene.max_attempts)
    except Violation:
        return True
    return False


def _stuck(states: list[State], before: list[list[int]]) -> int | None:
    """The first state from which the end can't be reached."""
    todo = [n for n, state in enumerate(states) if all(task.ended for task in state.tasks)]
    reached = bytearray(len(states))
    for number in todo:
        reached[number] = 1
    while todo:
        for number in before[todo.pop()]:
            if not reached[number]:
                reached[number] = 1
                todo.append(number)
    at = reached.find(0)
    return None if at < 0 else at


def _trace(model: Model, states: list[State], parents: list[int], at: int, violation: str | None) -> tuple[str, ...]:
    """The steps from the first state to this one, and the one that is forbidden. Workers keep their numbers on the way."""
    path = [at]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    state = model.normal(model.first())
    labels = []
    for number in reversed(path[:-1]):
        for label, after in _possible(model, state):
            if canonical(model.normal(after)) == states[number]:
                labels.append(label)
                state = model.normal(after)
                break
    return (*labels, f"=> {violation}")


def _possible(model: Model, state: State) -> Iterator[Step]:
    """Its steps, as far as none of them breaks a property."""
    try:
        yield from model.steps(state)
    except Violation:
        return


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Search every interleaving of the protocol in a small scene.")
    parser.add_argument("--without", choices=GUARDS, help="take this guard out")
    parser.add_argument("--wide", action="store_true", help="search the large scenes, too: minutes")
    parser.add_argument("--list", action="store_true", help="list the guards")
    chosen = parser.parse_args()
    if chosen.list:
        for guard, what in GUARDS.items():
            print(f"{guard:13}{what}{' (nothing goes wrong without it)' if guard in HARMLESS else ''}")
        return 0
    status = 0
    for scene in scenes(chosen.without, wide=chosen.wide):
        found = search(scene, chosen.without)
        verdict = found.violation or "all properties hold"
        print(
            f"{scene.name}: {found.states:,} states, {found.steps:,} steps, {found.seconds:.1f} s: {verdict}",
            flush=True,
        )
        if found.violation is not None:
            for number, label in enumerate(found.trace, 1):
                print(f"  {number:2}. {label}")
            status = 1
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
