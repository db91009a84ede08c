"""Progress as people give it: True, a bar, or a function."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple

Report = Callable[[int, int], Any]


def adapt(progress: Any, what: str) -> Tuple[Optional[Report], Callable[[], None]]:
    """A function of bytes done and bytes in all, and what to call in the end."""

    def nothing() -> None:
        pass

    if progress is None or progress is False:
        return None, nothing
    if progress is True:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            # Asked for a bar where there is none to be had: no reason to fail a load.
            return None, nothing
        bar = tqdm(total=None, desc=what, unit="B", unit_scale=True, unit_divisor=1000)
        return _of_bar(bar), bar.close
    if hasattr(progress, "update") and hasattr(progress, "total"):
        return _of_bar(progress), nothing
    if callable(progress):
        return progress, nothing
    raise TypeError("progress must be True, a bar with `total` and `update`, or a function of (done, total)")


def _of_bar(bar: Any) -> Report:
    last = 0

    def report(done: int, total: int) -> None:
        nonlocal last
        if bar.total != total:
            bar.total = total
            refresh = getattr(bar, "refresh", None)
            if refresh is not None:
                refresh()
        if done > last:
            bar.update(done - last)
            last = done

    return report
