"""The terms of the training loss, one a file; `fused.py` is what training runs, `sparse_kd.py` what it must equal."""
