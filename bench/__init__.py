"""Benchmarks of asa_ops: what a call costs beside what else could be used, on a CPU and on a GPU.

What is measured: ``inputs``, ``peers`` (other ways to compute attention), ``eager`` (blocks as published) and
``workloads`` (an op on an input, ours and its peers). How: ``measure`` (seconds, bytes, the machine), ``accounting``
(operations) and ``record`` (the file of results). Commands: ``run`` measures, ``report`` makes a page, ``check`` tells
whether something got slower, ``gpu`` tests and times on a CUDA machine, judged by ``goals``, in steps that go on where
a call was ended (``progress``); its rows are in ``timings`` and ``kernels``, its tests go through ``shard``.
``triton.budget`` compiles every Triton kernel without a GPU, ``triton.tune`` times other configurations of them.

Imports go one way: what is measured <- how <- run, report, check <- goals, timings, kernels <- gpu. ``triton`` stands
beside run; only ``triton/launches.py`` knows how asa_ops launches its Triton kernels.
"""
