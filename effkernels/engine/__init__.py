"""A model made ready to serve: prepared once, run at any batch size, alone or from many threads.

    engine = effkernels.InferenceEngine(model, dtype=torch.bfloat16)
    logits = engine(engine.preprocess(photographs))          # a batch
    with engine:
        logits = engine.submit(photograph).result()          # one of many, from any thread

`inference.py` is the engine as users see it, `prepared.py` the prepared model and its buckets, `buckets.py` how a batch
is cut, `runners.py` how a bucket is computed, `batcher.py` how requests of many threads become batches, `devices.py`
what is needed of a device, `cpu_recording.py` recordings of CPU kernels, `cuda.py` all that needs a GPU.
"""

from __future__ import annotations

from effkernels.engine.batcher import QueueFull
from effkernels.engine.buckets import buckets_for
from effkernels.engine.inference import InferenceEngine
from effkernels.engine.report import BucketReport, EngineReport, EngineStats

__all__ = ["BucketReport", "EngineReport", "EngineStats", "InferenceEngine", "QueueFull", "buckets_for"]
