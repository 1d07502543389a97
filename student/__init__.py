"""Stage two: shards -> batches -> xLSTM -> losses -> checkpoint, generation, evaluation."""

from student.cuda_toolkit import import_xlstm

import_xlstm()
