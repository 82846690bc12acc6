"""Computes the metrics of an evaluation in a separate process."""

import logging
import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection

from detection.data.annotations import Annotations
from detection.evaluation.coco_evaluator import Evaluation, Result, evaluate_results

log = logging.getLogger("detection")


class BackgroundScoring:
    """Starts to compute at once; `wait` returns the evaluation.

    The process ends with this one. If this one is killed, the other finishes its work, which takes about a minute, and
    its result is lost.
    """

    def __init__(self, annotations: Annotations, results: Sequence[Result], backend: str) -> None:
        self.arguments = annotations, results, backend
        # Not forked: CUDA and the threads of this process do not survive that.
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_score, args=(theirs, *self.arguments), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> Evaluation:
        """Wait for the evaluation. If its process died, the metrics are computed here."""
        try:
            evaluation = self._ours.recv()
        except (EOFError, OSError):
            log.warning("the process that scored the evaluation died (out of memory?): it is scored here instead")
            evaluation = evaluate_results(*self.arguments)
        self._process.join()
        self._ours.close()
        return evaluation


def _score(out: Connection, annotations: Annotations, results: Sequence[Result], backend: str) -> None:
    # Ctrl-C goes to all processes of a terminal; the training decides what to do about this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out.send(evaluate_results(annotations, results, backend))
